"""Tensors from the host to the model's device."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the host's tensor on `device`.

    To a GPU it goes by pinned memory and without waiting. A plain copy waits until the GPU has done all that
    it was told before, and would then have nothing to do while the host prepares the next thing.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
