"""Polygons drawn as OpenCV's `fillPoly` draws them, which trainers of YOLO read labels with.

Corners are whole pixels: coordinates are cut to integers. Every pixel that an edge passes is inside, and what
lies between edges by the even-odd rule. A polygon along a mask's outline is therefore drawn half a pixel too
large on all sides; one through the centres of its outermost pixels gives the mask back.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BITS = 16  # OpenCV follows an edge from row to row in fixed-point numbers of so many bits
_ONE = 1 << _BITS


def fill_polygon(polygon: npt.NDArray[np.float64], size_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return the mask, uint8 (H, W), 1 inside, of a polygon (N, 2) of (x, y) in pixels within the picture."""
    corners = polygon.astype(np.int32).astype(np.int64)
    following = np.roll(corners, -1, axis=0)
    drawn = _inside(corners, following, size_hw)
    x, y = edge_pixels(corners, following)
    drawn[y, x] = True
    return drawn.astype(np.uint8)


def edge_pixels(
    start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (x, y) of all pixels that the edges pass: one on each step of the longer side, from the left."""
    swap = start[:, :1] > end[:, :1]
    start, end = np.where(swap, end, start), np.where(swap, start, end)
    span = end - start
    steps = np.abs(span).max(axis=1)
    edge = np.repeat(np.arange(len(span)), steps + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    longer = np.maximum(steps, 1)[edge]
    # The nearest pixel across the longer side; halves go towards the start.
    across = (2 * np.abs(span[edge]) * step[:, None] + longer[:, None] - 1) // (2 * longer[:, None])
    place = start[edge] + np.sign(span[edge]) * across
    return place[:, 0], place[:, 1]


def _inside(
    start: npt.NDArray[np.int64], end: npt.NDArray[np.int64], size_hw: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Return the pixels between the first and second, third and fourth … edge of each row."""
    height, width = size_hw
    level = start[:, 1] != end[:, 1]
    start, end = start[level], end[level]
    swap = start[:, 1:] > end[:, 1:]
    start, end = np.where(swap, end, start), np.where(swap, start, end)
    rows = end[:, 1] - start[:, 1]
    run = (end[:, 0] - start[:, 0]) << _BITS
    slope = np.sign(run) * (np.abs(run) // rows) if len(rows) else run
    edge = np.repeat(np.arange(len(rows)), rows)
    down = np.arange(len(edge)) - np.repeat(np.cumsum(rows) - rows, rows)
    x = (start[edge, 0] << _BITS) + slope[edge] * down
    y = start[edge, 1] + down
    order = np.lexsort((x, y))
    x, y = x[order], y[order]
    first, last = (x[0::2] + _ONE - 1) >> _BITS, x[1::2] >> _BITS
    row, some = y[0::2], first <= last
    turns = np.zeros((height, width + 1), np.int32)
    np.add.at(turns, (row[some], first[some]), 1)
    np.add.at(turns, (row[some], last[some] + 1), -1)
    return np.asarray(turns.cumsum(axis=1)[:, :width] > 0)
