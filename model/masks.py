"""Low-resolution logits -> the full-resolution masks' runs, without a dense frame.

The original predictor's masks: bilinear from 4G x 4G to the input side S, the padding cut off, bilinear to
the upright size, `> 0` strictly, logits interpolated and thresholded last. `upsample_logits` does just that.

Logits of a model that stretches images (HQ-SAM 2) cover all of them: there it is one bilinear step from
4G x 4G to the upright size. `resized_hw` is None for these.

`trace_masks`, which production takes, never makes a frame. All bilinear steps together are one separable
operator, A L B^T, with at most 3 neighbouring taps an axis and no negative weight. So where all taps of a
tile of pixels lie on one side of a threshold, the tile does, and only the tiles that a contour crosses are
computed: the cost grows with a mask's outline, not with its area. The positions at which a mask changes are
its runs (see `rle.Runs`). Where most tiles are crossed (noise, which is what random weights give), a CPU
computes the whole frame instead, by the same products and sums in the same order, so the bits are the same.

Its arithmetic is additions and products of single elements in a fixed order, never a matrix kernel: a
mask's bytes depend on its own logits alone, whatever else is in the call.

Letters: N masks, L = 4G, H x W the upright size, T a tile's side, A tiles of an axis (X columns, Y rows), Q
tiles of a slab, P pixels of a tile along an axis, F pixels of an axis, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from hqlabel.model.rle import Runs

SizeHW = tuple[int, int]

# Masks traced at a time: bounds memory where a call has thousands, or where logits are noise.
MASKS_PER_STEP = 32
SMALLEST_TILE = 16
# A tile's side is doubled until a frame has at most this many tiles an axis: bounds the grid of any image.
TILES_PER_AXIS = 128
# Pixels of tiles computed at a time: on a CPU as many as stay in a core's cache, on a GPU many.
SLAB_PIXELS_CPU = 1 << 17
SLAB_PIXELS_GPU = 1 << 24
# Share of crossed tiles from which a CPU computes the whole frame: a pixel of a tile costs 2.7 times as much.
WHOLE_FRAME_SHARE = 0.37
# Pixels of a whole frame computed at a time: half a MiB of logits, which stays in a core's cache.
STRIP_PIXELS = 1 << 17

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TracedMasks:
    """Where the masks of one image change, on the host.

    `edges`: int64, as `runs_from_edges` takes them. `size_hw`: (H, W). `stability_score`: float32 (N,), see
    `stability`.
    """

    edges: Int64Array
    size_hw: tuple[int, int]
    stability_score: Float32Array

    def runs(self) -> Runs:
        """Return the runs of all masks, in order: work that any thread may do."""
        return runs_from_edges(self.edges, len(self.stability_score), self.size_hw)

    def take(self, kept_N: npt.NDArray[np.bool_]) -> TracedMasks:
        """Return some of the masks, in order."""
        stride = self.size_hw[0] * self.size_hw[1] + 1
        mask = self.edges // stride
        stays = kept_N[mask]
        removed = np.cumsum(~kept_N)[mask[stays]]
        return TracedMasks(
            edges=self.edges[stays] - removed * stride,
            size_hw=self.size_hw,
            stability_score=self.stability_score[kept_N],
        )


def upsample_logits(low_res_NLL: torch.Tensor, resized_hw: SizeHW | None, size_hw: SizeHW) -> torch.Tensor:
    """Return full-resolution logits, float32 (N, H, W), by the original's bilinear steps.

    A mask is where they are greater than 0.

    Args:
        low_res_NLL: float32 (N, 4G, 4G) in the model frame.
        resized_hw: the image's (height, width) in model pixels; what lies outside is padding. None: the model
            stretches images, and there is one step.
        size_hw: (H, W), the upright size.
    """
    _check_logits(low_res_NLL, resized_hw, size_hw)
    if resized_hw is None:
        return F.interpolate(low_res_NLL[:, None], size_hw, mode="bilinear", align_corners=False)[:, 0]
    side = 4 * low_res_NLL.shape[-1]
    model_N1SS = F.interpolate(low_res_NLL[:, None], (side, side), mode="bilinear", align_corners=False)
    model_N1hw = model_N1SS[:, :, : resized_hw[0], : resized_hw[1]]
    return F.interpolate(model_N1hw, size_hw, mode="bilinear", align_corners=False)[:, 0]


def stability(above_N: torch.Tensor, below_N: torch.Tensor) -> torch.Tensor:
    """Return stability scores, float32 (N,), from the two pixel counts of each mask.

    As the original: pixels with a logit over the offset, divided by those over minus the offset, at full
    resolution. A mask with neither scores 0: the original has 0 / 0 there, a NaN that its filter drops like a
    low score.
    """
    return above_N.double().div(below_N.clamp(min=1).double()).float()


def trace_masks(
    low_res_NLL: torch.Tensor,
    *,
    resized_hw: SizeHW | None,
    size_hw: SizeHW,
    stability_offset: float = 1.0,
) -> TracedMasks:
    """Return the masks of one image as runs, with their stability.

    Every pixel whose logit is not within about 1e-5 of 0 is as by `upsample_logits` (the order of operations
    differs). Memory is bounded whatever N, H and W; on a GPU only edges and counts come back.

    Args:
        low_res_NLL: float32 (N, 4G, 4G), finite, in the model frame.
        resized_hw: the image's (height, width) in model pixels; None: the model stretches images.
        size_hw: (H, W), the upright size.
        stability_offset: distance of the two stability thresholds from 0, greater than 0.

    Raises:
        ValueError: wrong dtype or shape, `resized_hw` outside the model frame, `size_hw` without pixels, or
            an offset not over 0.
    """
    _check_logits(low_res_NLL, resized_hw, size_hw)
    if not stability_offset > 0:
        raise ValueError(f"stability_offset is {stability_offset}; it must be greater than 0")
    grid = tile_grid(low_res_NLL.shape[-1], resized_hw, size_hw, low_res_NLL.device)
    edges, scores = [], []
    for start in range(0, max(1, len(low_res_NLL)), MASKS_PER_STEP):
        step = low_res_NLL[start : start + MASKS_PER_STEP]
        step_edges, step_scores = _trace_step(step, grid, stability_offset)
        edges.append(step_edges + start * grid.stride)
        scores.append(step_scores)
    return TracedMasks(
        edges=np.concatenate(edges), size_hw=grid.size_hw, stability_score=np.concatenate(scores)
    )


def _trace_step(low_NLL: torch.Tensor, grid: TileGrid, offset: float) -> tuple[Int64Array, Float32Array]:
    """Return edges and stability scores of the masks of some logits."""
    height, tile = grid.size_hw[0], grid.tile
    lowest_NXY, highest_NXY = _tile_levels(low_NLL, grid, offset)
    crossed_NXY = lowest_NXY != highest_NXY
    # A run along the frame's top or bottom starts or ends there, even where the mask is solid.
    for border in (0, -1):
        crossed_NXY[:, :, border] |= highest_NXY[:, :, border] >= 2
    whole_frames = _whole_frame_masks(crossed_NXY)
    if whole_frames:
        crossed_NXY[whole_frames] = False
    solid_NXY = torch.where(crossed_NXY, 0, grid.inside_XY)
    above_N = (solid_NXY * (lowest_NXY == 3)).sum((1, 2))
    below_N = (solid_NXY * (lowest_NXY >= 1)).sum((1, 2))

    n, x, y = torch.nonzero(crossed_NXY, as_tuple=True)
    origin = n * grid.stride + x * (tile * height) + y * tile
    # Pixels outside the frame have the value 0, which lies over -offset: take them off beforehand.
    below_N.index_add_(0, n, grid.inside_XY[x, y] - tile * tile)
    slab = max(1, (SLAB_PIXELS_GPU if low_NLL.is_cuda else SLAB_PIXELS_CPU) // (tile * tile))
    tile_edges = [torch.zeros(0, dtype=torch.int64, device=low_NLL.device)]
    for start in range(0, len(n), slab):
        part = slice(start, start + slab)
        values_PTQ = _tile_values(low_NLL, grid, n[part], x[part], y[part])
        above_N.index_add_(0, n[part], _count_over(values_PTQ[1:], offset))
        below_N.index_add_(0, n[part], _count_over(values_PTQ[1:], -offset))
        tile_edges.append(_tile_edges(values_PTQ, origin[part], height))
    edges = [torch.cat(tile_edges).cpu().numpy()]
    for i in whole_frames:
        frame = trace_frame(low_NLL[i], grid.resized_hw, grid.size_hw, offset)
        edges.append(frame.edges + i * grid.stride)
        above_N[i], below_N[i] = frame.above, frame.below
    return np.concatenate(edges), stability(above_N, below_N).cpu().numpy()


def _whole_frame_masks(crossed_NXY: torch.Tensor) -> list[int]:
    """Return the masks with more than `WHOLE_FRAME_SHARE` of their tiles crossed; none on a GPU."""
    if crossed_NXY.device.type != "cpu":
        return []
    crossed_share_N = crossed_NXY.float().mean((1, 2))
    indices: list[int] = torch.nonzero(crossed_share_N > WHOLE_FRAME_SHARE).flatten().tolist()
    return indices


def _tile_levels(low_NLL: torch.Tensor, grid: TileGrid, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and highest level among each tile's taps, uint8 (N, X, Y) each.

    A sample's level is how many of the thresholds -offset, 0, offset it exceeds. A tile whose taps share
    one level has it throughout: its pixels are averages of them.
    """
    low_NLL = low_NLL[:, : grid.rows.num_low, : grid.columns.num_low]
    level_NLL = (low_NLL > -offset).to(torch.uint8) + (low_NLL > 0) + (low_NLL > offset)
    lowest_NYL, highest_NYL = _pool_taps(level_NLL, level_NLL, grid.rows.taps_KA)
    return _pool_taps(
        lowest_NYL.transpose(1, 2).contiguous(),
        highest_NYL.transpose(1, 2).contiguous(),
        grid.columns.taps_KA,
    )


def _pool_taps(
    lowest: torch.Tensor, highest: torch.Tensor, taps_KA: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the minimum of the one and the maximum of the other over each tile's taps, along axis 1."""
    low_result = lowest.index_select(1, taps_KA[0])
    high_result = highest.index_select(1, taps_KA[0])
    for taps_A in taps_KA[1:]:
        low_result = torch.minimum(low_result, lowest.index_select(1, taps_A))
        high_result = torch.maximum(high_result, highest.index_select(1, taps_A))
    return low_result, high_result


def _tile_values(
    low_NLL: torch.Tensor, grid: TileGrid, n: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Return the logits of Q tiles (mask n, column x, row y), float32 (1 + T, T, Q): rows, columns, tiles.

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
    """Return the sum of products, broadcast, added one after the other in the given order."""
    total = weights[0] * values[0]
    product = torch.empty_like(total)
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total += torch.mul(weight, value, out=product)
    return total


def _count_over(values_PTQ: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return how many pixels of each tile lie over `threshold`, int64 (Q,)."""
    # Ones and zeros as floats: on a CPU several times faster than booleans, and exact up to 2**24.
    over_PTQ = torch.gt(values_PTQ, threshold, out=torch.empty_like(values_PTQ))
    return over_PTQ.sum((0, 1)).to(torch.int64)


def _tile_edges(values_PTQ: torch.Tensor, origin_Q: torch.Tensor, height: int) -> torch.Tensor:
    """Return where masks change from one row to the next in Q tiles, for `runs_from_edges`, int64."""
    inside_PTQ = values_PTQ > 0
    changed_SQ = (inside_PTQ[1:] ^ inside_PTQ[:-1]).flatten(0, 1)
    spot, tile = torch.nonzero(changed_SQ, as_tuple=True)
    step = torch.arange(values_PTQ.shape[1], device=values_PTQ.device)
    offset_S = (step[:, None] + step * height).flatten()  # of row and column inside a tile
    return origin_Q[tile] + offset_S[spot]


# Whole frames


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
    low_LL: torch.Tensor, resized_hw: SizeHW | None, size_hw: SizeHW, offset: float
) -> FrameTrace:
    """Return the edges and counts of one mask from its logits, float32 (4G, 4G) on the CPU, pixel by pixel.

    Costs a third of the tiles' price a pixel; these win by skipping pixels. No frame is held, only a strip of
    columns.
    """
    height, width = size_hw
    resized_height, resized_width = resized_hw or (None, None)
    row_taps_KF, row_weights_KF = _axis_taps(low_LL.shape[0], resized_height, height)
    taps_KF, weights_KF = _axis_taps(low_LL.shape[0], resized_width, width)
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
    """Return the F weighted sums of rows of `samples`, one product and one sum after the other."""
    total = samples.index_select(0, taps_KF[0]).mul_(weights_KF[0, :, None])
    for taps_F, weights_F in zip(taps_KF[1:], weights_KF[1:], strict=True):
        total += samples.index_select(0, taps_F).mul_(weights_F[:, None])
    return total


@lru_cache(maxsize=64)
def _axis_taps(low_side: int, resized: int | None, full: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the taps of each pixel of an axis, int64, and their weights, float32: (K, F) each."""
    first, weights_FK = composite_taps(low_side, resized, full)
    # A tap past the last sample has the weight 0.
    taps_KF = np.minimum(first + np.arange(3)[:, None], low_side - 1)
    return torch.from_numpy(taps_KF), torch.from_numpy(np.ascontiguousarray(weights_FK.T))


# Tables of the bilinear steps


@dataclass(frozen=True, kw_only=True)
class TileAxis:
    """One axis of a tile grid: the low-resolution samples of its pixels.

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

    A tile has T x T own pixels and the row above them, so that every vertical change of a mask lies in one
    tile. Above and below the frame everything counts as outside: a mask that touches the top starts its runs
    there, and there is always a tile that holds the row below the frame, where its runs end.
    """

    tile: int
    resized_hw: SizeHW | None
    size_hw: SizeHW
    rows: TileAxis
    columns: TileAxis

    @property
    def inside_XY(self) -> torch.Tensor:
        """The pixels of each tile that lie in the frame, int64 (X, Y)."""
        return self.columns.inside_A[:, None] * self.rows.inside_A

    @property
    def stride(self) -> int:
        """The distance between the edges of one mask and of the next, see `runs_from_edges`."""
        return self.size_hw[0] * self.size_hw[1] + 1


@lru_cache(maxsize=64)
def tile_grid(low_side: int, resized_hw: SizeHW | None, size_hw: SizeHW, device: torch.device) -> TileGrid:
    """Return the tiles of one image, with their tables on `device`; kept for the last few sizes.

    Args:
        low_side: 4G, the side of the logits.
        resized_hw: the image's (height, width) in model pixels, the model frame being 4 * low_side square;
            None: the model stretches images.
        size_hw: its upright (height, width).
        device: where the logits are.
    """
    tile = SMALLEST_TILE
    while max(size_hw) > TILES_PER_AXIS * tile:
        tile *= 2
    height, width = size_hw
    resized_height, resized_width = resized_hw or (None, None)
    return TileGrid(
        tile=tile,
        resized_hw=resized_hw,
        size_hw=size_hw,
        rows=_tile_axis(
            low_side, resized_height, height, np.arange(height // tile + 1) * tile, tile, 1, device
        ),
        columns=_tile_axis(low_side, resized_width, width, np.arange(0, width, tile), tile, 0, device),
    )


def _tile_axis(
    low_side: int,
    resized: int | None,
    full: int,
    starts: Int64Array,
    tile: int,
    before: int,
    device: torch.device,
) -> TileAxis:
    """Return the tiles at `starts` along one axis, each with `before` pixels more ahead of its own."""
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


def composite_taps(low_side: int, resized: int | None, full: int) -> tuple[Int64Array, Float32Array]:
    """Return both bilinear steps of one axis as one: first taps, and the weights of each and the next two.

    int64 (full,) and float32 (full, 3). A tap that would lie past the last sample has the weight 0.
    `resized` None: there is one step, and the third weight is 0.
    """
    if resized is None:
        first, two_weights = _bilinear_taps(low_side, full)
        return first, np.pad(two_weights, ((0, 0), (0, 1)))
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
    """Return first taps (num_out,) and the weights (num_out, 2) of each and the next, as in `F.interpolate`.

    The source index is scale * (i + 0.5) - 0.5 in float32, rounded once: ATen's kernels fuse the product
    and the difference, on CPU and CUDA; float64 in between gives the same bits.
    """
    scale = np.float64(np.float32(num_in) / np.float32(num_out))
    source = np.maximum((scale * (np.arange(num_out) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(source.astype(np.int64), num_in - 1)
    share = source - first.astype(np.float32)
    share[first == num_in - 1] = 0  # the next tap is the same sample again
    return first, np.stack([1 - share, share], axis=1)


# Edges to runs


def runs_from_edges(edges: Int64Array, num_masks: int, size_hw: tuple[int, int]) -> Runs:
    """Return the runs of `num_masks` masks from where they change; nothing is compared pixel by pixel.

    Args:
        edges: int64 (E,), in any order: n * (H * W + 1) + p for every position p at which a vertical run
            of mask n starts or, one past its last pixel, ends. A run that touches the bottom of column x
            ends at p = (x + 1) * H. Where one run's end is the next one's start (a mask that touches both
            bottom and top), both are given, and cancel.
        num_masks: how many masks there are; a mask without edges is empty.
        size_hw: (H, W) of each.
    """
    stride = size_hw[0] * size_hw[1] + 1
    # Each mask's last run ends where the mask ends, whether inside or outside.
    terminators = np.arange(1, num_masks + 1, dtype=np.int64) * stride - 1
    # PyTorch's sort: on 200,000 edges a quarter of NumPy's time.
    edges = torch.from_numpy(np.concatenate([edges, terminators])).sort().values.numpy()
    single = np.ones(len(edges), dtype=np.bool_)
    equal = edges[1:] == edges[:-1]
    single[1:] &= ~equal
    single[:-1] &= ~equal
    # A mask that is inside up to its end has given that edge too: of the two, one stays.
    single[np.searchsorted(edges, terminators)] = True
    edges = edges[single]
    offsets = np.concatenate([[0], np.searchsorted(edges, terminators) + 1]).astype(np.int64)
    lengths = np.diff(edges, prepend=0)
    lengths[offsets[1:-1]] -= 1  # the first run of mask n > 0 starts one past the terminator before it
    return Runs(lengths=lengths, offsets=offsets, size_hw=size_hw)


def _check_logits(low_res_NLL: torch.Tensor, resized_hw: SizeHW | None, size_hw: SizeHW) -> None:
    shape = tuple(low_res_NLL.shape)
    if low_res_NLL.dtype != torch.float32 or len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"logits are {low_res_NLL.dtype} {shape}; wanted float32 (N, 4G, 4G)")
    if resized_hw is not None and not 1 <= min(resized_hw) <= max(resized_hw) <= 4 * shape[1]:
        raise ValueError(
            f"resized_hw is {resized_hw}; wanted sides from 1 to {4 * shape[1]}, "
            f"the input side that logits of side {shape[1]} belong to"
        )
    if min(size_hw) < 1:
        raise ValueError(f"size_hw is {size_hw}; wanted sides of at least 1 pixel")
