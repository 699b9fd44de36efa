"""Masks as run-length text, moved into a larger frame and rid of small parts and holes, without a frame.

Letters: N masks, S strips (see `rle.Strips`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hqlabel.model.masks import runs_from_edges
from hqlabel.model.rle import Runs, Strips, batches, components, parse_strips

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
SizeHW = tuple[int, int]


def shift_masks(counts: Sequence[str], size_hw: SizeHW, offset_xy: tuple[int, int], full_hw: SizeHW) -> Runs:
    """Return masks of a crop as masks of the image, in which the crop begins at `offset_xy`."""
    strips = parse_strips(counts, size_hw)
    x, y = offset_xy
    moved = replace(strips, x=strips.x + x, top=strips.top + y, bottom=strips.bottom + y)
    return _runs(moved, len(counts), full_hw)


@dataclass(frozen=True, kw_only=True)
class CleanedMasks:
    """N masks: text, pixels, and tight boxes, as in `Instances`."""

    counts: tuple[str, ...]
    area: Int64Array
    bbox_xywh: npt.NDArray[np.float32]


def remove_small_regions(
    counts: Sequence[str], size_hw: SizeHW, min_area: int
) -> tuple[CleanedMasks, BoolArray]:
    """Return masks without holes and parts of fewer than `min_area` pixels, and which had any, bool (N,).

    Pixels that touch by edge or corner are of one part, or of one hole. Holes are filled first; what touches
    the border is one of them too. Of a mask with small parts alone, the largest stays.
    """
    cleaned = [_clean(counts[part], size_hw, min_area) for part in batches(counts)]
    runs = [one for one, _ in cleaned]
    masks = CleanedMasks(
        counts=tuple(text for one in runs for text in one.counts()),
        area=np.concatenate([np.zeros(0, np.int64), *[one.areas() for one in runs]]),
        bbox_xywh=np.concatenate([np.zeros((0, 4), np.float32), *[one.bboxes_xywh() for one in runs]]),
    )
    return masks, np.concatenate([np.zeros(0, np.bool_), *[changed for _, changed in cleaned]])


def _clean(counts: Sequence[str], size_hw: SizeHW, min_area: int) -> tuple[Runs, BoolArray]:
    strips, count = parse_strips(counts, size_hw), len(counts)
    outside = parse_strips(_complement(strips, count, size_hw).counts(), size_hw)
    area_S, _ = _areas(outside)
    small_S = area_S < min_area
    changed = np.bincount(outside.mask[small_S], minlength=count) > 0
    if changed.any():
        edges = np.concatenate([_edges(strips, size_hw), _edges(_take(outside, small_S), size_hw)])
        strips = parse_strips(runs_from_edges(edges, count, size_hw).counts(), size_hw)
    area_S, first_S = _areas(strips)
    small_S = area_S < min_area
    changed |= np.bincount(strips.mask[small_S], minlength=count) > 0
    kept_S = ~small_S | (first_S == _largest(strips, area_S, first_S, count)[strips.mask])
    return _runs(_take(strips, kept_S), count, size_hw), changed


def _largest(strips: Strips, area_S: Int64Array, first_S: Int64Array, count: int) -> Int64Array:
    """Return the first strip of each mask's largest part, -1 for a mask with none; int64 (count,)."""
    order = np.lexsort((first_S, -area_S, strips.mask))
    largest = np.full(count, -1, dtype=np.int64)
    masks, place = np.unique(strips.mask[order], return_index=True)
    largest[masks] = first_S[order][place]
    return largest


def _areas(strips: Strips) -> tuple[Int64Array, Int64Array]:
    """Return, of each strip, the pixels of the part it belongs to, and the part's first strip; int64 (S,)."""
    first_S = components(strips)
    pixels = np.bincount(first_S, weights=strips.bottom - strips.top, minlength=len(first_S))
    return pixels.astype(np.int64)[first_S], first_S


def _take(strips: Strips, kept_S: BoolArray) -> Strips:
    return Strips(
        mask=strips.mask[kept_S],
        x=strips.x[kept_S],
        top=strips.top[kept_S],
        bottom=strips.bottom[kept_S],
        sizes_hw=strips.sizes_hw,
    )


def _runs(strips: Strips, count: int, size_hw: SizeHW) -> Runs:
    return runs_from_edges(_edges(strips, size_hw), count, size_hw)


def _complement(strips: Strips, count: int, size_hw: SizeHW) -> Runs:
    """Return what is outside of each mask: the edges are the same, but for the frame's first and last."""
    pixels = size_hw[0] * size_hw[1]
    starts = np.arange(count, dtype=np.int64) * (pixels + 1)
    return runs_from_edges(np.concatenate([_edges(strips, size_hw), starts, starts + pixels]), count, size_hw)


def _edges(strips: Strips, size_hw: SizeHW) -> Int64Array:
    """Return where strips begin and end, as `runs_from_edges` takes them."""
    height, width = size_hw
    column = strips.mask * (height * width + 1) + strips.x * height
    return np.concatenate([column + strips.top, column + strips.bottom])
