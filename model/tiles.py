"""The tiles of an upright frame, and the low-resolution samples that their pixels are made of.

Going from logits of side 4G to the input side S = 16G and from there to the upright size are two bilinear
steps. Together they are one separable operator with at most 3 neighbouring taps an axis, whose weights are
never negative. The tables here are that operator, cut into square tiles of pixels.

Letters: A tiles of an axis, X and Y those of the two axes, P pixels of a tile, K taps, T a tile's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

SMALLEST_TILE = 16
# A tile's side is doubled until a frame has at most this many tiles an axis: bounds the grid of any image.
TILES_PER_AXIS = 128

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TileAxis:
    """One axis of a tile grid: what low-resolution samples its pixels are made of.

    `taps_KA`: int64, the K low-resolution indices that the pixels of each of the A tiles touch; where a
    tile needs fewer, its last one again. `weights_PKA`: float32, the share of each tap in each of its P
    pixels, all 0 for a pixel outside the frame. `inside_A`: int64, its own pixels inside the frame.
    `num_low`: the low-resolution samples of the axis that are read at all, from the first.
    """

    taps_KA: torch.Tensor
    weights_PKA: torch.Tensor
    inside_A: torch.Tensor
    num_low: int


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """Square tiles over an upright frame, columns (X) before rows (Y) as in a column-major mask.

    A tile has T x T pixels of its own and the row above them, so that every vertical change of a mask lies
    in one tile. Above and below the frame everything counts as outside: a mask that touches the top starts
    its runs there, and there is always a tile that holds the row below the frame, where its runs end.
    """

    tile: int
    resized_hw: tuple[int, int]
    size_hw: tuple[int, int]
    rows: TileAxis
    columns: TileAxis

    @property
    def inside_XY(self) -> torch.Tensor:
        """The pixels of each tile that lie in the frame, int64 (X, Y)."""
        return self.columns.inside_A[:, None] * self.rows.inside_A


@lru_cache(maxsize=64)
def tile_grid(
    low_side: int, resized_hw: tuple[int, int], size_hw: tuple[int, int], device: torch.device
) -> TileGrid:
    """The tiles of one image, with their tables on `device`; a pure function, kept for the last few sizes.

    Args:
        low_side: 4G, the side of the logits.
        resized_hw: the image's (height, width) in model pixels, the model frame being 4 * low_side square.
        size_hw: its upright (height, width).
        device: where the logits are.
    """
    tile = SMALLEST_TILE
    while max(size_hw) > TILES_PER_AXIS * tile:
        tile *= 2
    height, width = size_hw
    return TileGrid(
        tile=tile,
        resized_hw=resized_hw,
        size_hw=size_hw,
        rows=_tile_axis(
            low_side, resized_hw[0], height, np.arange(height // tile + 1) * tile, tile, 1, device
        ),
        columns=_tile_axis(low_side, resized_hw[1], width, np.arange(0, width, tile), tile, 0, device),
    )


def _tile_axis(
    low_side: int, resized: int, full: int, starts: Int64Array, tile: int, before: int, device: torch.device
) -> TileAxis:
    """The tiles at `starts` along one axis, each with `before` pixels more ahead of its own."""
    first, weights = composite_taps(low_side, resized, full)
    last = first + 2 - np.argmax(weights[:, ::-1] > 0, axis=1)
    pixel_AP = starts[:, None] + np.arange(-before, tile)
    inside_AP = (pixel_AP >= 0) & (pixel_AP < full)
    pixel_AP = pixel_AP.clip(0, full - 1)
    low_A = np.where(inside_AP, first[pixel_AP], low_side).min(axis=1)
    high_A = np.where(inside_AP, last[pixel_AP], -1).max(axis=1)
    num_taps = int((high_A - low_A).max()) + 1
    taps_AK = np.minimum(low_A[:, None] + np.arange(num_taps), high_A[:, None])
    weights_APK = np.zeros((len(starts), before + tile, num_taps + 2), dtype=np.float32)
    a, p = np.nonzero(inside_AP)
    for tap in range(3):
        weights_APK[a, p, first[pixel_AP[a, p]] - low_A[a] + tap] = weights[pixel_AP[a, p], tap]
    weights_PKA = np.ascontiguousarray(weights_APK[:, :, :num_taps].transpose(1, 2, 0))
    return TileAxis(
        taps_KA=torch.from_numpy(np.ascontiguousarray(taps_AK.T)).to(device),
        weights_PKA=torch.from_numpy(weights_PKA).to(device),
        inside_A=torch.from_numpy(inside_AP[:, before:].sum(axis=1)).to(device),
        num_low=int(taps_AK.max()) + 1,
    )


def composite_taps(low_side: int, resized: int, full: int) -> tuple[Int64Array, Float32Array]:
    """Both bilinear steps of one axis as one: first tap (full,) and the weights of it and the next two.

    int64 and float32 (full, 3). A tap that would lie past the last sample has the weight 0.
    """
    model_first, model_weights = _bilinear_taps(low_side, 4 * low_side)
    full_first, full_weights = _bilinear_taps(resized, full)
    first = model_first[full_first]
    weights = np.zeros((full, 4), dtype=np.float32)
    pixel = np.arange(full)
    for step in range(2):
        model_pixel = np.minimum(full_first + step, resized - 1)
        for tap in range(2):
            place = model_first[model_pixel] - first + tap
            weights[pixel, place] += full_weights[:, step] * model_weights[model_pixel, tap]
    return first, weights[:, :3]


def _bilinear_taps(num_in: int, num_out: int) -> tuple[Int64Array, Float32Array]:
    """First tap (num_out,) and the weights (num_out, 2) of it and the next, as `F.interpolate` has them.

    The source index is scale * (i + 0.5) - 0.5 in float32, rounded once: ATen's kernels fuse the product
    and the difference, on CPU and CUDA; float64 in between gives the same bits.
    """
    scale = np.float64(np.float32(num_in) / np.float32(num_out))
    source = np.maximum((scale * (np.arange(num_out) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(source.astype(np.int64), num_in - 1)
    share = source - first.astype(np.float32)
    share[first == num_in - 1] = 0  # the next tap is the same sample again
    return first, np.stack([1 - share, share], axis=1)
