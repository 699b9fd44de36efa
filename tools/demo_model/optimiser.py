"""The optimiser of the demo training: Muon for matrices, AdamW for everything else.

Muon (Keller Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum
by the nearest orthogonal matrix. In a trial of the first stage it took fewer steps than AdamW, and
steps are what a CPU lacks. torch.optim.Muon iterates in bfloat16, which is slow on a CPU without it; this
one does so only where the processor has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 4
WIDEST = 1024  # a matrix with a longer side costs more to orthogonalise than it gains
NOT_MATRICES = ("rel_pos", "embed", "_mlp", "iou_prediction_head", "iou_token", "mask_tokens", "hf_token")


def native_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively (AMX or AVX-512 BF16)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def orthogonalise(matrices_KMN: torch.Tensor) -> torch.Tensor:
    """K matrices with all their singular values pushed to about 1 (quintic Newton-Schulz iteration)."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices_KMN.shape[1] > matrices_KMN.shape[2]
    x = matrices_KMN.transpose(1, 2) if tall else matrices_KMN
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    x = x.bfloat16() if x.is_cuda or native_bf16() else x
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).to(matrices_KMN.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum SGD on matrices with an orthogonalised step, whose rms is 0.2 `lr`.

    Matrices of one shape are worked together: many small products cost more than one large one.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95, decay: float = 0.01
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002 - the base class has it
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for weights in by_shape.values():
                self._step_alike(weights, group)

    def _step_alike(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        directions = []
        for weight in weights:
            velocity = self.state[weight].setdefault("velocity", torch.zeros_like(weight))
            velocity.lerp_(weight.grad, 1 - group["momentum"])
            directions.append(weight.grad.lerp(velocity, group["momentum"]))
        # An orthogonal m x n matrix has rms max(m, n)^-0.5; the factor makes every step's rms 0.2 lr.
        scale = 0.2 * max(weights[0].shape) ** 0.5
        for weight, direction in zip(weights, orthogonalise(torch.stack(directions)), strict=True):
            weight.mul_(1 - group["lr"] * group["decay"])
            weight.add_(direction, alpha=-group["lr"] * scale)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters as (hidden matrices for Muon, all others for AdamW)."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        hidden = weight.ndim == 2 and min(weight.shape) >= 32 and max(weight.shape) <= WIDEST
        (matrices if hidden and not any(part in name for part in NOT_MATRICES) else others).append(weight)
    return matrices, others
