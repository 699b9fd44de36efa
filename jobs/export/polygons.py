"""Masks -> one polygon each, for formats that know no runs; and how much of the mask a polygon keeps.

The outline is followed along pixel edges, so it is exact before it is simplified. Parts and holes are
joined to one ring by bridges of no width: a point on a bridge is passed twice, and fills nothing to readers
who measure area. Readers who fill whole pixels, edges too, need another polygon: `filled_polygon_of`. The
loss is measured, never guessed: the polygon as written, drawn by the reader's own rule, against the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, repeat

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from hqlabel.jobs.export.fill_polygon import edge_pixels, fill_polygon

Points = npt.NDArray[np.float64]
Mask = npt.NDArray[np.uint8]

_BLOCK = 2_000_000  # distances computed in one step
_A_BIT = 1e-9

Bridge = tuple[int, int, int, int]
"""A ring, its point, the ring before it that it is joined to, and that one's; points by place in all."""


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
    kept = ring[_kept_places(ring, tolerance_px, _distances)]
    return kept if len(kept) > 2 else ring


def _kept_places(
    ring: Points,
    tolerance_px: float,
    measure: Callable[[Points, Points, Points], Points],
    fixed: Sequence[int] = (),
) -> npt.NDArray[np.int64]:
    """Return which points of the ring stay; those of `fixed` do."""
    if tolerance_px <= 0 or len(ring) < 4:
        return np.arange(len(ring))
    far = int(((ring - ring[0]) ** 2).sum(axis=1).argmax())
    closed = np.concatenate([ring, ring[:1]])
    keep = np.zeros(len(closed), dtype=np.bool_)
    keep[[0, far, len(ring), *fixed]] = True
    spans = list(pairwise(np.flatnonzero(keep).tolist()))
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        distance = measure(closed[first + 1 : last], closed[first], closed[last])
        worst = int(distance.argmax())
        if distance[worst] > tolerance_px:
            middle = first + 1 + worst
            keep[middle] = True
            spans += [(first, middle), (middle, last)]
    return np.flatnonzero(keep[:-1])


def _distances(points: Points, start: Points, end: Points) -> Points:
    along = end - start
    length = float(np.hypot(*along))
    offset = points - start
    if length == 0:
        return np.asarray(np.hypot(offset[:, 0], offset[:, 1]), dtype=np.float64)
    return np.asarray(np.abs(along[0] * offset[:, 1] - along[1] * offset[:, 0]) / length, dtype=np.float64)


def _distances_across(points: Points, start: Points, end: Points) -> Points:
    """Return how far points are from an edge along its shorter side, or beyond its ends along the longer."""
    along, offset = end - start, points - start
    longer = int(np.abs(along).argmax())
    length = abs(float(along[longer]))
    if length == 0:
        return np.asarray(np.abs(offset).max(axis=1), dtype=np.float64)
    apart = np.abs(along[0] * offset[:, 1] - along[1] * offset[:, 0]) / length
    passed = offset[:, longer] * np.sign(along[longer])
    return np.asarray(np.maximum(apart, np.maximum(-passed, passed - length)), dtype=np.float64)


def join_rings(rings: Sequence[Points]) -> Points:
    """Return all rings as one, each reached and left by the shortest bridge from those before."""
    return _joined(rings, _shortest_bridges(rings))


def _joined(rings: Sequence[Points], bridges: Sequence[Bridge]) -> Points:
    points = np.concatenate(rings)
    first = np.cumsum([0, *map(len, rings)])
    joined = np.arange(first[1])  # places in `points`
    for ring, here, _, there in bridges:
        ours = int(np.flatnonzero(joined == there)[0])
        around = [np.arange(here, first[ring + 1]), np.arange(first[ring], here + 1)]
        joined = np.concatenate([joined[: ours + 1], *around, joined[ours:]])
    return points[joined]


def _shortest_bridges(rings: Sequence[Points]) -> list[Bridge]:
    """Return a bridge to each ring but the first, always the nearest one next (Prim's tree)."""
    points = np.concatenate(rings)
    owner = np.repeat(np.arange(len(rings)), list(map(len, rings)))
    first = np.cumsum([0, *map(len, rings)])
    apart, nearest = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    outside = owner > 0
    found: list[Bridge] = []
    newest = 0
    while len(found) < len(rings) - 1:
        waiting = np.flatnonzero(outside)
        distance, place = _nearest(points[waiting], points[first[newest] : first[newest + 1]])
        closer = distance < apart[waiting]
        apart[waiting[closer]] = distance[closer]
        nearest[waiting[closer]] = place[closer] + first[newest]
        here = int(waiting[apart[waiting].argmin()])
        newest, there = int(owner[here]), int(nearest[here])
        found.append((newest, here, int(owner[there]), there))
        outside[first[newest] : first[newest + 1]] = False
    return found


def _worth_their_pixels(rings: Sequence[Points], worth: Sequence[float], mask_hw: Mask) -> list[Bridge]:
    """Return the shortest bridges, but for those that draw more pixels outside the mask than they bring.

    `worth`: how many pixels each ring brings.
    """
    bridges, total, points = _shortest_bridges(rings), list(worth), np.concatenate(rings)
    cost = {ring: _pixels_outside(points[here], points[there], mask_hw) for ring, here, _, there in bridges}
    for ring, _, other, _ in reversed(bridges):  # a bridge comes after the one to the ring that it begins at
        total[other] += max(0.0, total[ring] - cost[ring])
    kept, reached = [], {0}
    for bridge in bridges:
        ring, _, other, _ = bridge
        if other in reached and total[ring] > cost[ring]:
            kept.append(bridge)
            reached.add(ring)
    return kept


def _pixels_outside(start: Points, end: Points, mask_hw: Mask) -> int:
    x, y = edge_pixels(start[None].astype(np.int64), end[None].astype(np.int64))
    return int((mask_hw[y, x] == 0).sum())


def _nearest(points: Points, others: Points) -> tuple[Points, npt.NDArray[np.int64]]:
    """Return for each point its least squared distance from the others, and which of them that is."""
    step = max(1, _BLOCK // len(others))
    found = []
    for start in range(0, len(points), step):
        apart = ((points[start : start + step, None, :] - others[None, :, :]) ** 2).sum(axis=2)
        place = apart.argmin(axis=1)
        found.append((apart[np.arange(len(place)), place], place))
    return np.concatenate([apart for apart, _ in found]), np.concatenate([place for _, place in found])


def polygon_of(mask_hw: Mask, tolerance_px: float) -> Points:
    """Return one polygon (N, 2) of (x, y) in pixels for a mask that is not empty, holes and parts bridged."""
    x, y, width, height = (int(v) for v in _window(mask_hw))
    window = mask_hw[y : y + height, x : x + width]
    joined = join_rings([simplify(ring, tolerance_px) for ring in outline_rings(window)])
    return joined + np.array([x, y], dtype=np.float64)


def filled_polygon_of(mask_hw: Mask, tolerance_px: float) -> Points:
    """Return one polygon (N, 2), N >= 3, that `fill_polygon` and readers like it draw as the mask.

    It runs through the centres of the outermost pixels. A part so small and far off that its bridge would be
    larger is left out.
    """
    x, y, width, height = (int(v) for v in _window(mask_hw))
    window = mask_hw[y : y + height, x : x + width]
    outlines = sorted(outline_rings(window), key=lambda ring: -abs(_area(ring)))  # the first is no hole
    rings = [_outermost_pixels(ring) for ring in outlines]
    worth = [abs(_area(ring)) for ring in outlines]
    joined = _joined(*_thinned(rings, _worth_their_pixels(rings, worth, window), tolerance_px))
    low, high = joined.min(axis=0), joined.max(axis=0)
    if (low == high).any():  # a line: a box within its pixels, because readers drop objects without an area
        (x1, y1), (x2, y2) = low - 0.25, high + 0.25
        joined = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    if len(joined) < 3:  # readers take a line of two points for a box
        joined = np.concatenate([joined, joined[:1]])
    return joined + np.array([x, y], dtype=np.float64)


def _outermost_pixels(ring: Points) -> Points:
    """Return the centres of all pixels inside along an outline of corners, one step after the other."""
    span = np.roll(ring, -1, axis=0) - ring
    length = np.abs(span).sum(axis=1).astype(np.int64)
    along = np.sign(span)
    inside = np.stack([-along[:, 1], along[:, 0]], axis=1)  # the mask lies to the right of its outline
    side = np.repeat(np.arange(len(ring)), length)
    step = np.arange(len(side)) - np.repeat(np.cumsum(length) - length, length)
    centres = ring[side] + along[side] * (step[:, None] + 0.5) + inside[side] / 2
    kept: Points = centres[np.any(centres != np.roll(centres, 1, axis=0), axis=1)]
    return kept if len(kept) else centres[:1]


def _thinned(
    rings: Sequence[Points], bridges: Sequence[Bridge], tolerance_px: float
) -> tuple[list[Points], list[Bridge]]:
    """Return the rings with fewer points, and the bridges between them, whose ends stay."""
    first = np.cumsum([0, *map(len, rings)])
    ends: list[list[int]] = [[] for _ in rings]
    for ring, here, other, there in bridges:
        ends[ring].append(here - first[ring])
        ends[other].append(there - first[other])
    # An edge that passes less than half a pixel from a pixel's centre, across, is drawn through that pixel.
    tolerance_px = max(tolerance_px - _A_BIT, _A_BIT)
    kept = [
        _kept_places(*one)
        for one in zip(rings, repeat(tolerance_px), repeat(_distances_across), ends, strict=False)
    ]
    fewer = np.cumsum([0, *map(len, kept)])

    def moved(ring: int, place: int) -> int:
        return int(fewer[ring] + np.searchsorted(kept[ring], place - first[ring]))

    return (
        [ring[places] for ring, places in zip(rings, kept, strict=True)],
        [(ring, moved(ring, here), other, moved(other, there)) for ring, here, other, there in bridges],
    )


def _area(ring: Points) -> float:
    x, y = ring.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def _window(mask_hw: Mask) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask_hw.any(axis=1)), np.flatnonzero(mask_hw.any(axis=0))
    return columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1


def kept_iou(polygon: Points, counts: str, size_hw: tuple[int, int]) -> float:
    """Return the IoU of the polygon, drawn by pycocotools, with its own mask (COCO compressed runs)."""
    height, width = size_hw
    drawn = coco_mask.frPyObjects([polygon.ravel().tolist()], height, width)
    return float(coco_mask.iou(drawn, [{"size": size_hw, "counts": counts}], [0])[0, 0])


def filled_iou(polygon: Points, mask_hw: Mask) -> float:
    """Return the IoU of the polygon, drawn as OpenCV's `fillPoly` draws it, with its own mask."""
    drawn = fill_polygon(polygon, (mask_hw.shape[0], mask_hw.shape[1]))
    return float((drawn & mask_hw).sum() / (drawn | mask_hw).sum())
