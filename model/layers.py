"""What several of the networks share: a channel norm, two multi-layer perceptrons, the neck.

Nothing here knows about images or prompts. Letters as in `structures.py`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

VIT_NORM_EPS = 1e-6
"""Epsilon of the ViT blocks' LayerNorms and of every channel norm (neck, upscaling, HQ branches)."""

TORCH_NORM_EPS = 1e-5
"""Epsilon of the two-way transformer's and TinyViT's LayerNorms, and of BatchNorm."""


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of an NCHW tensor, biased variance, eps 1e-6.

    The result lies in memory channels last, which the convolution that follows takes as it is.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=VIT_NORM_EPS)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the normalised tensor, same shape and dtype."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ReluMLP(nn.ModuleList):
    """Linear layers with ReLU between them: hypernetworks, the IoU head and the HQ token's head.

    `widths` are those of input, hidden layers and output, so that three layers need four numbers.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., widths[-1]) from (..., widths[0])."""
        for layer in list(self)[:-1]:
            x = F.relu(layer(x))
        out: torch.Tensor = self[-1](x)
        return out


class Neck(nn.Module):
    """1x1 convolution, norm, 3x3 convolution, norm: from the backbone's width to the decoder's."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.norm1 = LayerNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = LayerNorm2d(out_channels)

    def forward(self, x_BCGG: torch.Tensor) -> torch.Tensor:
        """Return (B, out_channels, G, G)."""
        out: torch.Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x_BCGG))))
        return out


def is_inference(device: torch.device) -> bool:
    """Return whether nothing asks for gradients or, by autocast, for other products than the weights' own."""
    kind = device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return not torch.is_grad_enabled() and not autocast
