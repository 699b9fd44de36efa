"""Masks -> one polygon each, for formats that know no runs; and how much of the mask a polygon keeps.

The outline is followed along pixel edges, so it is exact before it is simplified. Parts and holes are
joined to one ring by bridges of no width: a point on a bridge is passed twice, and fills nothing. The
loss is measured, never guessed: the polygon as written, drawn by pycocotools, against the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

Points = npt.NDArray[np.float64]
Mask = npt.NDArray[np.uint8]

_BLOCK = 2_000_000  # distances computed in one step


def outline_rings(mask_hw: Mask) -> list[Points]:
    """Return the closed outlines of a mask, (N, 2) corners (x, y) in pixels each, the longest first.

    Outer rings run clockwise as seen, holes the other way; they hold corners only. Where two pixels
    touch by a corner alone, the rings stay apart.
    """
    padded = np.pad(mask_hw.astype(bool), 1)
    inside = padded[1:-1, 1:-1]
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    sides = (  # an edge of a pixel (y, x) whose neighbour is outside: from corner, direction
        (inside & ~padded[:-2, 1:-1], (0, 0), (1, 0)),
        (inside & ~padded[1:-1, 2:], (1, 0), (0, 1)),
        (inside & ~padded[2:, 1:-1], (1, 1), (-1, 0)),
        (inside & ~padded[1:-1, :-2], (0, 1), (0, -1)),
    )
    for edge, (dx, dy), step in sides:
        for y, x in np.argwhere(edge).tolist():
            following.setdefault((x + dx, y + dy), []).append(step)
    rings = []
    while following:
        rings.append(_follow(next(iter(following)), following))
    return sorted(rings, key=len, reverse=True)


def _follow(start: tuple[int, int], following: dict[tuple[int, int], list[tuple[int, int]]]) -> Points:
    """Return one ring from `start`; its edges are taken out of `following`."""
    corners: list[tuple[int, int]] = []
    at, before = start, (0, 0)
    while at in following:
        steps = following[at]
        # At a corner where two pixels touch, the right turn keeps to the same pixel.
        right = (-before[1], before[0])
        step = right if len(steps) > 1 and right in steps else steps[0]
        steps.remove(step)
        if not steps:
            del following[at]
        if step != before:
            corners.append(at)
        at, before = (at[0] + step[0], at[1] + step[1]), step
    return np.array(corners, dtype=np.float64)


def simplify(ring: Points, tolerance_px: float) -> Points:
    """Return the ring with fewer points, none of the dropped ones farther than `tolerance_px` from it.

    A ring that would fall to fewer than three points stays as it is (Douglas and Peucker).
    """
    if tolerance_px <= 0 or len(ring) < 4:
        return ring
    far = int(((ring - ring[0]) ** 2).sum(axis=1).argmax())
    closed = np.concatenate([ring, ring[:1]])
    keep = np.zeros(len(closed), dtype=np.bool_)
    keep[[0, far, len(ring)]] = True
    spans = [(0, far), (far, len(ring))]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        distance = _distances(closed[first + 1 : last], closed[first], closed[last])
        worst = int(distance.argmax())
        if distance[worst] > tolerance_px:
            middle = first + 1 + worst
            keep[middle] = True
            spans += [(first, middle), (middle, last)]
    kept = closed[:-1][keep[:-1]]
    return kept if len(kept) > 2 else ring


def _distances(points: Points, start: Points, end: Points) -> Points:
    along = end - start
    length = float(np.hypot(*along))
    offset = points - start
    if length == 0:
        return np.asarray(np.hypot(offset[:, 0], offset[:, 1]), dtype=np.float64)
    return np.asarray(np.abs(along[0] * offset[:, 1] - along[1] * offset[:, 0]) / length, dtype=np.float64)


def join_rings(rings: Sequence[Points]) -> Points:
    """Return all rings as one, in order, each reached and left by the shortest bridge from those before."""
    joined = rings[0]
    for ring in rings[1:]:
        ours, theirs = _nearest(joined, ring)
        around = np.concatenate([ring[theirs:], ring[: theirs + 1]])
        joined = np.concatenate([joined[: ours + 1], around, joined[ours:]])
    return joined


def _nearest(one: Points, other: Points) -> tuple[int, int]:
    """Return the places of the two points that are nearest to each other."""
    best, found = np.inf, (0, 0)
    step = max(1, _BLOCK // len(other))
    for start in range(0, len(one), step):
        block = one[start : start + step]
        apart = ((block[:, None, :] - other[None, :, :]) ** 2).sum(axis=2)
        place = int(apart.argmin())
        if apart.flat[place] < best:
            best, found = float(apart.flat[place]), (start + place // len(other), place % len(other))
    return found


def polygon_of(mask_hw: Mask, tolerance_px: float) -> Points:
    """Return one polygon (N, 2) of (x, y) in pixels for a mask that is not empty, holes and parts bridged."""
    x, y, width, height = (int(v) for v in _window(mask_hw))
    window = mask_hw[y : y + height, x : x + width]
    joined = join_rings([simplify(ring, tolerance_px) for ring in outline_rings(window)])
    return joined + np.array([x, y], dtype=np.float64)


def _window(mask_hw: Mask) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask_hw.any(axis=1)), np.flatnonzero(mask_hw.any(axis=0))
    return columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1


def kept_iou(polygon: Points, counts: str, size_hw: tuple[int, int]) -> float:
    """Return the IoU of the polygon, drawn by pycocotools, with its own mask (COCO compressed runs)."""
    height, width = size_hw
    drawn = coco_mask.frPyObjects([polygon.ravel().tolist()], height, width)
    return float(coco_mask.iou(drawn, [{"size": size_hw, "counts": counts}], [0])[0, 0])
