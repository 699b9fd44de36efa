"""Low-resolution logits -> full-resolution masks: the plain road, and the traced one that production takes.

Both give what the original predictor gives: bilinear from 4G x 4G to the input side S, the padding cut
off, bilinear to the upright size, `> threshold` strictly, logits interpolated and thresholded last.
`plain_masks` does just that, whole frames at a time, and is the reference.

`trace_masks` never makes a frame. Both bilinear steps together are one separable operator, A L B^T, with at
most 3 taps an axis and no negative weight. So where all taps of a tile of pixels lie on one side of a
threshold, the tile does, and only the tiles that a contour crosses are worked out: the cost grows with a
mask's outline, not with its area. Their places of change are the runs of the mask (see `rle.Runs`). Where
most tiles are crossed, a CPU works out the whole frame instead (`frames`).

Its arithmetic is additions and products of single elements in a fixed order, never a matrix kernel: a
mask's bytes depend on its own logits alone, whatever stands beside it in the call.

Letters: N masks, L = 4G, H x W the upright size, T the side of a tile, K taps, Q tiles of a slab.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from model import rle
from model.frames import trace_frame
from model.tiles import TileGrid, tile_grid

# Masks traced at a time: bounds memory where a call has thousands, or where logits are noise.
MASKS_PER_STEP = 32
# Pixels of tiles worked out at a time: on a CPU so many as stay in a core's cache, on a GPU many.
SLAB_PIXELS_CPU = 1 << 17
SLAB_PIXELS_GPU = 1 << 24
# Crossed tiles of all from which a CPU works out the whole frame: a pixel of a tile costs 2.7 times as much.
WHOLE_FRAME_SHARE = 0.37

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class PlainMasks:
    """Dense masks and what is measured on them, on the device of the logits.

    `masks_NHW`: bool (N, H, W). `stability_score_N`: float32. `area_N`: int64, pixels.
    `bbox_xywh_N4`: float32, tight, zeros for an empty mask.
    """

    masks_NHW: torch.Tensor
    stability_score_N: torch.Tensor
    area_N: torch.Tensor
    bbox_xywh_N4: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TracedMasks:
    """Where the masks of one image change, on the host.

    `edges`: a few masks' at a time, as `rle.runs_from_edges` wants them, and how many masks these are.
    `size_hw`: (H, W). `stability_score`: float32 (N,), see `stability`.
    """

    edges: tuple[tuple[Int64Array, int], ...]
    size_hw: tuple[int, int]
    stability_score: npt.NDArray[np.float32]

    @cached_property
    def runs(self) -> rle.Runs:
        """The runs of all masks, in order; made when first asked for, which any thread may do."""
        parts = [rle.runs_from_edges(edges, masks, self.size_hw) for edges, masks in self.edges]
        return rle.concatenate(parts)


def upsample_logits(
    low_res_NLL: torch.Tensor, resized_hw: tuple[int, int], size_hw: tuple[int, int]
) -> torch.Tensor:
    """Full-resolution logits, float32 (N, H, W), by the original's two bilinear steps.

    Args:
        low_res_NLL: float32 (N, 4G, 4G) in the padded model frame.
        resized_hw: the image's (height, width) in model pixels; what lies outside is padding.
        size_hw: (H, W), the upright size.
    """
    _check(low_res_NLL, resized_hw, size_hw)
    side = 4 * low_res_NLL.shape[-1]
    model_N1SS = F.interpolate(low_res_NLL[:, None], (side, side), mode="bilinear", align_corners=False)
    model_N1hw = model_N1SS[:, :, : resized_hw[0], : resized_hw[1]]
    return F.interpolate(model_N1hw, size_hw, mode="bilinear", align_corners=False)[:, 0]


def stability(above_N: torch.Tensor, below_N: torch.Tensor) -> torch.Tensor:
    """Stability scores, float32 (N,), from the two pixel counts of each mask.

    As the original: pixels with a logit over threshold + offset, divided by those over threshold - offset,
    at full resolution. A mask with neither scores 0: the original has 0 / 0 there, a NaN that its filter
    drops like a low score.
    """
    return above_N.double().div(below_N.clamp(min=1).double()).float()


def plain_masks(
    low_res_NLL: torch.Tensor,
    *,
    resized_hw: tuple[int, int],
    size_hw: tuple[int, int],
    mask_threshold: float = 0.0,
    stability_offset: float = 1.0,
) -> PlainMasks:
    """Dense masks, one whole frame each: the reference for `trace_masks`, and 20 bytes a pixel a mask.

    Arguments as for `trace_masks`.
    """
    logits_NHW = upsample_logits(low_res_NLL, resized_hw, size_hw)
    masks_NHW = logits_NHW > mask_threshold
    above_N = (logits_NHW > mask_threshold + stability_offset).sum((1, 2))
    below_N = (logits_NHW > mask_threshold - stability_offset).sum((1, 2))
    return PlainMasks(
        masks_NHW=masks_NHW,
        stability_score_N=stability(above_N, below_N),
        area_N=masks_NHW.sum((1, 2)),
        bbox_xywh_N4=_dense_bboxes_xywh(masks_NHW),
    )


def trace_masks(
    low_res_NLL: torch.Tensor,
    *,
    resized_hw: tuple[int, int],
    size_hw: tuple[int, int],
    mask_threshold: float = 0.0,
    stability_offset: float = 1.0,
) -> TracedMasks:
    """The masks of one image as runs, with their stability: `plain_masks` without the frames.

    Every pixel whose logit is not within about 1e-5 of the threshold is as on the plain road (the order of
    operations differs). Memory is bounded whatever N, H and W; on a GPU only edges and counts come back.

    Args:
        low_res_NLL: float32 (N, 4G, 4G), finite, in the padded model frame.
        resized_hw: the image's (height, width) in model pixels.
        size_hw: (H, W), the upright size.
        mask_threshold: a pixel is inside if its logit is greater.
        stability_offset: distance of the two stability thresholds, greater than 0.

    Raises:
        ValueError: wrong dtype or shape, `resized_hw` outside the model frame, `size_hw` without pixels, an
            offset not over 0, or a threshold that is not finite.
    """
    _check(low_res_NLL, resized_hw, size_hw)
    if not stability_offset > 0:
        raise ValueError(f"stability_offset is {stability_offset}; it must be greater than 0")
    if not math.isfinite(mask_threshold):
        raise ValueError(f"mask_threshold is {mask_threshold}; it must be a finite number")
    grid = tile_grid(low_res_NLL.shape[-1], resized_hw, size_hw, low_res_NLL.device)
    shifted_NLL = low_res_NLL - mask_threshold if mask_threshold else low_res_NLL
    starts = range(0, max(1, len(shifted_NLL)), MASKS_PER_STEP)
    parts = [shifted_NLL[start : start + MASKS_PER_STEP] for start in starts]
    steps = [_trace_step(part, grid, stability_offset) for part in parts]
    return TracedMasks(
        edges=tuple((edges, len(part)) for (edges, _), part in zip(steps, parts, strict=True)),
        size_hw=grid.size_hw,
        stability_score=np.concatenate([scores for _, scores in steps]),
    )


def _trace_step(
    low_NLL: torch.Tensor, grid: TileGrid, offset: float
) -> tuple[Int64Array, npt.NDArray[np.float32]]:
    """Edges and stability scores of the masks of some logits, threshold 0."""
    (height, width), tile = grid.size_hw, grid.tile
    frame_size = height * width + 1
    lowest_NXY, highest_NXY = _tile_levels(low_NLL, grid, offset)
    crossed_NXY = lowest_NXY != highest_NXY
    # A run along the frame's top or bottom starts or ends there, even where the mask is solid.
    for border in (0, -1):
        crossed_NXY[:, :, border] |= highest_NXY[:, :, border] >= 2
    whole = _traced_whole(crossed_NXY)
    if whole:
        crossed_NXY[whole] = False
    solid_NXY = torch.where(crossed_NXY, 0, grid.inside_XY)
    above_N = (solid_NXY * (lowest_NXY == 3)).sum((1, 2))
    below_N = (solid_NXY * (lowest_NXY >= 1)).sum((1, 2))

    n, x, y = torch.nonzero(crossed_NXY, as_tuple=True)
    origin = n * frame_size + x * (tile * height) + y * tile
    # Pixels outside the frame have the value 0, which lies over -offset: take them off beforehand.
    below_N.index_add_(0, n, grid.inside_XY[x, y] - tile * tile)
    step = max(1, (SLAB_PIXELS_GPU if low_NLL.is_cuda else SLAB_PIXELS_CPU) // (tile * tile))
    edges = [torch.zeros(0, dtype=torch.int64, device=low_NLL.device)]
    for start in range(0, len(n), step):
        part = slice(start, start + step)
        values_PTQ = _tile_values(low_NLL, grid, n[part], x[part], y[part])
        above_N.index_add_(0, n[part], _count_over(values_PTQ[1:], offset))
        below_N.index_add_(0, n[part], _count_over(values_PTQ[1:], -offset))
        edges.append(_tile_edges(values_PTQ, origin[part], height))
    all_edges = [torch.cat(edges).cpu().numpy()]
    for i in whole:
        found = trace_frame(low_NLL[i], resized_hw=grid.resized_hw, size_hw=grid.size_hw, offset=offset)
        all_edges.append(found.edges + i * frame_size)
        above_N[i], below_N[i] = found.above, found.below
    return np.concatenate(all_edges), stability(above_N, below_N).cpu().numpy()


def _traced_whole(crossed_NXY: torch.Tensor) -> list[int]:
    """The masks of whose frame so much is crossed that every pixel is cheaper worked out than tiles."""
    if crossed_NXY.device.type != "cpu":
        return []
    crossed_share_N = crossed_NXY.float().mean((1, 2))
    whole: list[int] = torch.nonzero(crossed_share_N > WHOLE_FRAME_SHARE).flatten().tolist()
    return whole


def _tile_levels(low_NLL: torch.Tensor, grid: TileGrid, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and highest level among each tile's taps, uint8 (N, X, Y) each.

    A sample's level is how many of the thresholds -offset, 0, offset it exceeds. A tile whose taps share
    one level has it throughout: its pixels are averages of them.
    """
    low_NLL = low_NLL[:, : grid.rows.num_low, : grid.columns.num_low]
    level_NLL = (low_NLL > -offset).to(torch.uint8) + (low_NLL > 0) + (low_NLL > offset)
    lowest_NYL, highest_NYL = _pool(level_NLL, level_NLL, grid.rows.taps_KA)
    return _pool(
        lowest_NYL.transpose(1, 2).contiguous(),
        highest_NYL.transpose(1, 2).contiguous(),
        grid.columns.taps_KA,
    )


def _pool(
    lowest: torch.Tensor, highest: torch.Tensor, taps_KA: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimum of the one and the maximum of the other over the taps of each tile, along axis 1."""
    low_result = lowest.index_select(1, taps_KA[0])
    high_result = highest.index_select(1, taps_KA[0])
    for taps_A in taps_KA[1:]:
        low_result = torch.minimum(low_result, lowest.index_select(1, taps_A))
        high_result = torch.maximum(high_result, highest.index_select(1, taps_A))
    return low_result, high_result


def _tile_values(
    low_NLL: torch.Tensor, grid: TileGrid, n: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """The logits of Q tiles (mask n, column x, row y), float32 (1 + T, T, Q): rows, columns, tiles.

    Q is the last axis so that every operation runs along it. Products and sums stay separate operations:
    a fused one may round differently in a loop's vector part and in its remainder.
    """
    low_side = low_NLL.shape[-1]
    row_KQ = grid.rows.taps_KA.index_select(1, y) * low_side + n * low_side**2
    column_KQ = grid.columns.taps_KA.index_select(1, x)
    taps_KJQ = low_NLL.take(row_KQ[:, None] + column_KQ)
    row_weights_PKQ = grid.rows.weights_PKA.index_select(2, y)
    column_weights_TJQ = grid.columns.weights_PKA.index_select(2, x)
    rows_PJQ = _weighted_sum(row_weights_PKQ[:, :, None].unbind(1), taps_KJQ.unbind(0))
    return _weighted_sum(rows_PJQ[:, :, None].unbind(1), column_weights_TJQ.unbind(1))


def _weighted_sum(weights: tuple[torch.Tensor, ...], values: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum of products, broadcast, added one after the other in the order given."""
    total = weights[0] * values[0]
    product = torch.empty_like(total)
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total += torch.mul(weight, value, out=product)
    return total


def _count_over(values_PTQ: torch.Tensor, threshold: float) -> torch.Tensor:
    """How many pixels of each tile lie over `threshold`, int64 (Q,)."""
    # Ones and zeros as floats: on a CPU several times faster than booleans, and exact up to 2**24.
    over_PTQ = torch.gt(values_PTQ, threshold, out=torch.empty_like(values_PTQ))
    return over_PTQ.sum((0, 1)).to(torch.int64)


def _tile_edges(values_PTQ: torch.Tensor, origin_Q: torch.Tensor, height: int) -> torch.Tensor:
    """Where masks change from one row to the next in Q tiles, as `rle.runs_from_edges` wants it, int64."""
    inside_PTQ = values_PTQ > 0
    changed_SQ = (inside_PTQ[1:] ^ inside_PTQ[:-1]).flatten(0, 1)
    spot, tile = torch.nonzero(changed_SQ, as_tuple=True)
    step = torch.arange(values_PTQ.shape[1], device=values_PTQ.device)
    offset_S = (step[:, None] + step * height).flatten()  # of row and column inside a tile
    return origin_Q[tile] + offset_S[spot]


def _dense_bboxes_xywh(masks_NHW: torch.Tensor) -> torch.Tensor:
    """The tight boxes of dense masks, float32 (N, 4); zeros for an empty mask."""
    spans = []
    for axis in (1, 2):  # reducing the rows leaves the columns, and the other way round
        touched = masks_NHW.any(axis).to(torch.uint8)
        first = touched.argmax(1)
        spans += [(first, touched.shape[1] - touched.flip(1).argmax(1) - first)]
    (x, width), (y, height) = spans
    boxes = torch.stack([x, y, width, height], dim=1)
    return torch.where(masks_NHW.any(2).any(1)[:, None], boxes, 0).float()


def _check(low_res_NLL: torch.Tensor, resized_hw: tuple[int, int], size_hw: tuple[int, int]) -> None:
    shape = tuple(low_res_NLL.shape)
    if low_res_NLL.dtype != torch.float32 or len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"logits are {low_res_NLL.dtype} {shape}; wanted float32 (N, 4G, 4G)")
    if not 1 <= min(resized_hw) <= max(resized_hw) <= 4 * shape[1]:
        raise ValueError(
            f"resized_hw is {resized_hw}; wanted sides from 1 to {4 * shape[1]}, "
            f"the input side that logits of side {shape[1]} belong to"
        )
    if min(size_hw) < 1:
        raise ValueError(f"size_hw is {size_hw}; wanted sides of at least 1 pixel")
