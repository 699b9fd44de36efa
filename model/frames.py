"""A mask whose outline is everywhere, traced by working out every pixel, column by column, on a CPU.

The tiles of `masks.trace_masks` cost some three times as much a pixel as this; they win by leaving pixels
out. Noise, which is what random weights give, leaves none out. Products and sums are those of the tiles in
the same order, so both roads give the same bits, and which one a mask takes cannot be seen in its result.

Letters: L side of the logits, H x W the upright size, K = 3 taps, F pixels of an axis, C columns of a strip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from model.tiles import composite_taps

STRIP_PIXELS = 1 << 17
"""Pixels worked out at a time: half a MiB of logits, which stays in a core's cache."""

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FrameTrace:
    """Where one mask changes, and what its stability is counted from.

    `edges`: int64 (E,), rising: the positions x * H + y at which the mask differs from the one before.
    `above`, `below`: pixels with a logit over +offset and over -offset.
    """

    edges: Int64Array
    above: int
    below: int


def trace_frame(
    low_LL: torch.Tensor, *, resized_hw: tuple[int, int], size_hw: tuple[int, int], offset: float
) -> FrameTrace:
    """The edges and counts of one mask, threshold 0, from its logits: float32 (4G, 4G) on the CPU.

    `resized_hw`, `size_hw`: as for `masks.trace_masks`. No frame is held, only a strip of columns.
    """
    height, width = size_hw
    row_taps_KF, row_weights_KF = _axis_taps(low_LL.shape[0], resized_hw[0], height)
    taps_KF, weights_KF = _axis_taps(low_LL.shape[0], resized_hw[1], width)
    # Columns first, so that a strip of them lies in memory as COCO's runs go.
    rows_LH = _interpolate(low_LL, row_taps_KF, row_weights_KF).t().contiguous()
    edges, above, below, inside_before = [np.zeros(0, np.int64)], 0, 0, False
    step = max(1, STRIP_PIXELS // height)
    for start in range(0, width, step):
        strip = slice(start, start + step)
        logits = _interpolate(rows_LH, taps_KF[:, strip], weights_KF[:, strip]).numpy().ravel()
        above += int(np.count_nonzero(logits > offset))
        below += int(np.count_nonzero(logits > -offset))
        inside = logits > 0
        if inside[0] != inside_before:
            edges.append(np.array([start * height]))
        edges.append(np.flatnonzero(inside[1:] != inside[:-1]) + (start * height + 1))
        inside_before = bool(inside[-1])
    return FrameTrace(edges=np.concatenate(edges), above=above, below=below)


def _interpolate(samples: torch.Tensor, taps_KF: torch.Tensor, weights_KF: torch.Tensor) -> torch.Tensor:
    """The F weighted sums of rows of `samples`, one product and one sum after the other."""
    total = samples.index_select(0, taps_KF[0]).mul_(weights_KF[0, :, None])
    for taps_F, weights_F in zip(taps_KF[1:], weights_KF[1:], strict=True):
        total += samples.index_select(0, taps_F).mul_(weights_F[:, None])
    return total


@lru_cache(maxsize=64)
def _axis_taps(low_side: int, resized: int, full: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The taps of each pixel of an axis, int64, and their weights, float32: (K, F) each."""
    first, weights_FK = composite_taps(low_side, resized, full)
    # A tap past the last sample has the weight 0.
    taps_KF = np.minimum(first + np.arange(3)[:, None], low_side - 1)
    return torch.from_numpy(taps_KF), torch.from_numpy(np.ascontiguousarray(weights_FK.T))
