"""Reading COCO run-length strings without decoding masks: numpy only, many masks of any sizes at once.

A mask's runs go down the columns (position p = x * H + y) and alternate outside, inside. Cut at the
column ends they become vertical strips, and everything measured here is arithmetic on strips: a
30,000-run mask of a 12-megapixel image takes milliseconds and no frame. The encoder is model/rle.py.

A call costs some hundred array operations whatever it is given, as much as the arithmetic on a hundred masks
of the usual sort: so the masks of a whole unit are read together, in `steps`.

Letters: N masks, R runs, S strips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.counts import SHORT_PIXELS, counts_text, read_lengths

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


MASKS_PER_STEP = 200
"""Also what pycocotools is given at a time: 2.0.11 overflows on lists of 256 masks or more (with numpy 2)."""
TEXT_PER_STEP = 1 << 18
"""Characters of a step, which bounds its memory: each becomes some 30 numbers of 8 bytes at most."""


@dataclass(frozen=True, kw_only=True)
class Strips:
    """The vertical strips of N masks, in order of mask, column and row; none is empty.

    `mask`, `x`, `top`, `bottom`: int64 (S,); rows top..bottom (end-exclusive) of column x of that
    mask. `sizes_hw`: int64 (N, 2), height and width of each mask.
    """

    mask: Int64Array
    x: Int64Array
    top: Int64Array
    bottom: Int64Array
    sizes_hw: Int64Array


def steps(counts: Sequence[str]) -> Iterator[slice]:
    """Slices that cover N strings in order, each small enough to be read at once; one string at the least."""
    start = characters = 0
    for place, text in enumerate(counts):
        if place > start and (place - start == MASKS_PER_STEP or characters + len(text) > TEXT_PER_STEP):
            yield slice(start, place)
            start, characters = place, 0
        characters += len(text)
    if len(counts) > start:
        yield slice(start, len(counts))


def faults_of(counts: Sequence[object], sizes_hw: Sequence[object]) -> list[str | None]:
    """What is wrong with each of N masks that people bring, in words; None where nothing is.

    A mask is compressed runs, text, and its size, a list of two whole numbers, height and width. Nothing is
    raised, whatever stands there. A mask without a fault is safe in pycocotools, which looks at nothing
    itself. The words repeat no text of people's, so they need no cleaning.
    """
    found = [_fault(text, size) for text, size in zip(counts, sizes_hw, strict=True)]
    sized = [place for place, fault in enumerate(found) if fault is None]
    texts = [str(counts[place]) for place in sized]
    for step in steps(texts):
        sides = np.array([sizes_hw[place] for place in sized[step]], np.int64)
        for at, fault in read_lengths(texts[step], sides.prod(axis=1)).faults.items():
            found[sized[step][at]] = fault
    return found


def _fault(text: object, size: object) -> str | None:
    """What is wrong with a mask before its text is read."""
    if not isinstance(size, list | tuple) or len(size) != 2 or any(type(side) is not int for side in size):
        return "a size that is not two whole numbers, height and width"
    if min(size) < 1 or size[0] * size[1] >= SHORT_PIXELS:
        return f"a size out of range; wanted sides from 1 and fewer than {SHORT_PIXELS} pixels"
    if not isinstance(text, str):
        return f"counts of type {type(text).__name__}; wanted the text of compressed runs"
    return None


def text_of_lengths(lengths: Sequence[object]) -> str:
    """The compressed text of one mask's uncompressed runs, as COCO's crowds have them.

    Raises:
        ValueError: a run that is no whole number from 0 to `SHORT_PIXELS`; says which.
    """
    for place, run in enumerate(lengths):
        if type(run) is not int or not 0 <= run < SHORT_PIXELS:
            raise ValueError(f"run {place} is no whole number from 0 to {SHORT_PIXELS}")
    return counts_text(np.array(lengths, np.int64), np.array([0, len(lengths)]))[0]


def read_strips(counts: Sequence[str], sizes_hw: npt.ArrayLike) -> Strips:
    """The strips of N compressed strings; `sizes_hw`: (2,) of all masks, or (N, 2).

    Raises:
        ValueError: a string is not the runs of a mask of its size; says which and why.
    """
    sizes_hw = np.broadcast_to(np.asarray(sizes_hw, np.int64), (len(counts), 2))
    pixels = sizes_hw[:, 0] * sizes_hw[:, 1]
    found = read_lengths(counts, pixels)
    for place, fault in found.faults.items():
        height, width = sizes_hw[place]
        raise ValueError(f"mask {place}: {fault}, of a mask of {height} x {width}")
    lengths, mask = found.lengths, found.mask
    ends = np.cumsum(lengths)
    firsts = np.flatnonzero(np.diff(mask, prepend=-1))
    ends -= (np.cumsum(pixels) - pixels)[mask]
    order = np.arange(len(lengths)) - np.repeat(firsts, np.diff(np.append(firsts, len(lengths))))
    inside = (order % 2 == 1) & (lengths > 0)
    return _cut_at_columns(mask[inside], (ends - lengths)[inside], ends[inside], sizes_hw)


def _cut_at_columns(mask: Int64Array, start: Int64Array, end: Int64Array, sizes_hw: Int64Array) -> Strips:
    height = sizes_hw[mask, 0]
    (first, from_row), (last, last_row) = np.divmod(start, height), np.divmod(end - 1, height)
    repeats = last - first + 1
    row = np.repeat(np.arange(len(start)), repeats)
    x = np.arange(len(row)) - (np.cumsum(repeats) - repeats - first)[row]
    top = np.where(x == first[row], from_row[row], 0)
    bottom = np.where(x == last[row], last_row[row] + 1, height[row])
    return Strips(mask=mask[row], x=x, top=top, bottom=bottom, sizes_hw=sizes_hw)


def count_inside(strips: Strips, boxes_xyxy: npt.NDArray[np.float64]) -> Int64Array:
    """The pixels of each mask whose centre lies in its box (N, 4), edges included; int64 (N,)."""
    limit = strips.sizes_hw[:, ::-1].astype(np.float64)
    low = np.clip(np.ceil(boxes_xyxy[:, :2] - 0.5), 0, limit).astype(np.int64)
    high = np.clip(np.floor(boxes_xyxy[:, 2:] - 0.5) + 1, 0, limit).astype(np.int64)
    rows = np.minimum(strips.bottom, high[strips.mask, 1]) - np.maximum(strips.top, low[strips.mask, 1])
    in_columns = (strips.x >= low[strips.mask, 0]) & (strips.x < high[strips.mask, 0])
    inside = np.where(in_columns, np.maximum(rows, 0), 0)
    return np.bincount(strips.mask, weights=inside, minlength=len(strips.sizes_hw)).astype(np.int64)


def count_components(strips: Strips) -> Int64Array:
    """The connected parts of each mask, where pixels touch by edge or corner (8 neighbours); int64 (N,)."""
    parent = _roots(len(strips.x), *_touching(strips))
    is_root = parent == np.arange(len(parent))
    return np.bincount(strips.mask[is_root], minlength=len(strips.sizes_hw)).astype(np.int64)


def _touching(strips: Strips) -> tuple[Int64Array, Int64Array]:
    """Pairs of strips that touch: in the next column with rows that meet, or joined in one column."""
    height, width = strips.sizes_hw.max(axis=0, initial=0)
    # One number a column of a mask; a spare column keeps the masks apart, a spare row the columns.
    column = strips.mask * (width + 1) + strips.x
    stride = height + 2
    tops, bottoms = column * stride + strips.top, column * stride + strips.bottom
    # A strip of the next column touches when its top <= our bottom and its bottom >= our top.
    first = np.searchsorted(bottoms, tops + stride, side="left")
    stop = np.searchsorted(tops, bottoms + stride, side="right")
    repeats = np.maximum(stop - first, 0)
    left = np.repeat(np.arange(len(column)), repeats)
    right = np.arange(len(left)) - np.repeat(np.cumsum(repeats) - repeats, repeats) + first[left]
    joined = np.flatnonzero(tops[1:] == bottoms[:-1])  # a run of length 0 lay between
    return np.concatenate([left, joined]), np.concatenate([right, joined + 1])


def _roots(count: int, a: Int64Array, b: Int64Array) -> Int64Array:
    """The smallest member of each one's group, given pairs of the same group; int64 (count,).

    Union-find on whole arrays: every round hooks each root below a smaller one and flattens the trees.
    """
    parent = np.arange(count)
    while len(a):
        low, high = np.minimum(parent[a], parent[b]), np.maximum(parent[a], parent[b])
        apart = low != high
        a, b, low, high = a[apart], b[apart], low[apart], high[apart]
        np.minimum.at(parent, high, low)
        while not np.array_equal(flat := parent[parent], parent):
            parent = flat
    return parent
