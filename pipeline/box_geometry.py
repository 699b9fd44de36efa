"""Boxes as arrays: formats, clipping, overlap, and which of overlapping objects is the better one.

Coordinates are continuous: pixel (0, 0) covers [0, 1) x [0, 1), and a box that covers a W x H image is
(0, 0, W, H). x runs right, y runs down. xyxy is (x1, y1, x2, y2), xywh is (x1, y1, width, height), cxcywh is
(centre x, centre y, width, height). The format is in every name; one array holds one format.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

PixelFormat = Literal["xyxy", "xywh", "cxcywh"]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


def boxes_to_xyxy(boxes: npt.ArrayLike, box_format: PixelFormat) -> Float64Array:
    """Return boxes (N, 4) in `box_format` as xyxy, float64, same frame.

    Raises:
        ValueError: a format that is not `xyxy`, `xywh` or `cxcywh`.
    """
    boxes = _rows_of_four(boxes)
    first, second = boxes[..., :2], boxes[..., 2:]
    if box_format == "xyxy":
        return boxes.copy()
    if box_format == "xywh":
        return np.concatenate([first, first + second], axis=-1)
    if box_format == "cxcywh":
        return np.concatenate([first - second / 2, first + second / 2], axis=-1)
    raise ValueError(f"box format {box_format!r} is not known; use xyxy, xywh or cxcywh")


def denormalise_boxes(boxes_normalised: npt.ArrayLike, size_hw: tuple[int, int]) -> Float64Array:
    """Return boxes (N, 4) in fractions of the image in pixels of a `size_hw` image.

    Fractions are multiplied by the side they run along; any of the three formats stays what it was.
    """
    height, width = size_hw
    sides = np.array([width, height, width, height], dtype=np.float64)
    return _rows_of_four(boxes_normalised) * sides


def box_around(polygon: Sequence[float]) -> tuple[float, float, float, float] | None:
    """Return x1, y1, x2, y2 of the upright box around x, y, x, y ...; None below 3 points, or for NaN.

    The polygon's own extent, in its own units: no rounding, and no pixel added.
    """
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
        return None
    x, y = points[0::2], points[1::2]
    return float(x.min()), float(y.min()), float(x.max()), float(y.max())


def clip_boxes(boxes_xyxy: npt.ArrayLike, size_hw: tuple[int, int]) -> Float64Array:
    """Return xyxy boxes (N, 4) in pixels of a `size_hw` image, each corner moved into the image.

    A box wholly outside comes back with no area; NaN stays NaN.
    """
    height, width = size_hw
    highest = np.array([width, height, width, height], dtype=np.float64)
    return np.clip(_rows_of_four(boxes_xyxy), 0.0, highest)


def box_areas(boxes_xyxy: npt.ArrayLike) -> Float64Array:
    """Return the area (N,) of xyxy boxes (N, 4), float64; 0 where a side is not positive."""
    boxes = _rows_of_four(boxes_xyxy)
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return sides[..., 0] * sides[..., 1]


def box_iou(boxes_a_xyxy: npt.ArrayLike, boxes_b_xyxy: npt.ArrayLike) -> Float64Array:
    """Return the intersection over union of boxes row by row, (N, 4) and (N, 4) xyxy -> (N,) float64.

    Two boxes without area give 0.
    """
    boxes_a, boxes_b = _rows_of_four(boxes_a_xyxy), _rows_of_four(boxes_b_xyxy)
    low = np.maximum(boxes_a[..., :2], boxes_b[..., :2])
    high = np.minimum(boxes_a[..., 2:], boxes_b[..., 2:])
    overlap = box_areas(np.concatenate([low, high], axis=-1))
    union = box_areas(boxes_a) + box_areas(boxes_b) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def best_first(*scores: Float64Array) -> Int64Array:
    """Return the places of N objects, the highest score first; the second score decides between equal ones.

    NaN, no score, comes last; of objects that are still equal the earlier one comes first.
    """
    keys = [-np.nan_to_num(one, nan=-np.inf) for one in scores]
    return np.lexsort((np.arange(len(keys[0])), *keys[::-1]))


def suppress(
    ranked: Int64Array,
    kinds: Sequence[Hashable],
    iou: Callable[[int, Int64Array], Float64Array],
    max_iou: float,
) -> list[tuple[int, int]]:
    """Return (loser, winner) pairs of greedy non-maximum suppression; every loser once.

    `ranked`: the places that take part, the best first. `kinds`: of each place; objects of unlike kinds do
    not compete. `iou(winner, rivals)`: the overlaps; a rival loses by more than `max_iou`.
    """
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    kind_N = np.array([numbers[kind] for kind in kinds], np.int64)
    free_N = np.zeros(len(kinds), np.bool_)
    free_N[ranked] = True
    pairs: list[tuple[int, int]] = []
    for winner in ranked.tolist():
        if not free_N[winner]:
            continue
        free_N[winner] = False
        rivals = np.flatnonzero(free_N & (kind_N == kind_N[winner]))
        losers = rivals[iou(winner, rivals) > max_iou]
        free_N[losers] = False
        pairs += [(loser, winner) for loser in losers.tolist()]
    return pairs


def _rows_of_four(boxes: npt.ArrayLike) -> Float64Array:
    """Return boxes as float64 (N, 4); an empty list is no boxes."""
    array: np.ndarray[Any, np.dtype[np.float64]] = np.asarray(boxes, dtype=np.float64)
    if array.shape == (0,):
        return array.reshape(0, 4)
    if array.ndim == 0 or array.shape[-1] != 4:
        raise ValueError(f"boxes have shape {array.shape}; the last axis must be 4 long")
    return array
