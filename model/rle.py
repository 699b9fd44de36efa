"""COCO run-length encoding (RLE) without dense masks: parsing, writing and measuring many masks at once.

A mask's runs go down the columns: position p = x * H + y. Their lengths alternate outside, inside, outside,
... and begin with outside, of length 0 when pixel (0, 0) is inside. Compressed counts are the text of
`rleFrString` in maskApi.c of cocodataset/cocoapi: numbers of 5 bits a character, lowest first, 32 set where
another follows, 48 added; from the fourth run of a mask on, the difference to the run two before.

pycocotools checks nothing: it takes any byte, reads on past the end of a text that stops inside a number, and
from runs too short it makes a mask with whatever was in memory before. So text is parsed here first, and goes
to pycocotools only when nothing is wrong with it.

Cut at the column ends, runs become vertical strips, and every measurement is arithmetic on strips: a
30,000-run mask of a 12-megapixel image takes milliseconds and no frame. A call costs some hundred array
operations whatever its size, as much as the arithmetic on a hundred usual masks: so the masks of a whole unit
are parsed together, in `batches`.

NumPy alone: CPU workers import this, and torch would cost them 200 MB each.

Letters: N masks, R runs, S strips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

BLOCK_RUNS = 8192
"""Runs written at a time: their arrays stay in a core's cache. The text does not depend on it."""
SHORT_PIXELS = 2**29
"""A mask of fewer needs no number of 7 characters, of which pycocotools 2.0.11 misreads negative ones."""
MASKS_PER_BATCH = 200
"""Also the most that pycocotools gets at a time: 2.0.11 overflows on lists of 256 masks (with numpy 2)."""
TEXT_PER_BATCH = 1 << 18
"""Characters of a batch, which bounds its memory: each becomes some 30 numbers of 8 bytes at most."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The uncompressed runs of N masks of one size.

    `lengths`: int64 (R,), the run lengths of all masks one after the other; those of mask n are
    `lengths[offsets[n] : offsets[n + 1]]` and sum to H * W. `offsets`: int64 (N + 1,).
    `size_hw`: (H, W).
    """

    lengths: Int64Array
    offsets: Int64Array
    size_hw: tuple[int, int]

    def __len__(self) -> int:
        """Return the number of masks."""
        return len(self.offsets) - 1

    def counts(self) -> tuple[str, ...]:
        """Return the compressed text of each mask: ASCII, equal to pycocotools' byte for byte."""
        return write_counts(self.lengths, self.offsets)

    def areas(self) -> Int64Array:
        """Return the number of pixels inside each mask, int64 (N,)."""
        totals = np.concatenate([[0], np.cumsum(np.where(self._is_inside(), self.lengths, 0))])
        return np.diff(totals[self.offsets])

    def bboxes_xywh(self) -> Float32Array:
        """Return the tight box of each mask in pixels, float32 (N, 4); zeros for an empty mask."""
        height, width = self.size_hw
        boxes = np.zeros((len(self), 4), dtype=np.float32)
        inside = np.flatnonzero(self._is_inside() & (self.lengths > 0))
        if len(inside) == 0:
            return boxes
        end = np.cumsum(self.lengths)[inside]
        mask = (end - 1) // (height * width)
        end -= mask * (height * width)
        start_x, start_y = np.divmod(end - self.lengths[inside], height)
        last_x, last_y = np.divmod(end - 1, height)
        # A run that goes on into the next column touches both bottom and top.
        wraps = start_x != last_x
        start_y[wraps], last_y[wraps] = 0, height - 1
        first = np.flatnonzero(np.diff(mask, prepend=-1))
        x1, x2 = np.minimum.reduceat(start_x, first), np.maximum.reduceat(last_x, first)
        y1, y2 = np.minimum.reduceat(start_y, first), np.maximum.reduceat(last_y, first)
        boxes[mask[first]] = np.stack([x1, y1, x2 - x1 + 1, y2 - y1 + 1], axis=1)
        return boxes

    def _is_inside(self) -> BoolArray:
        """Return whether each run lies inside its mask: every second one, from the second on; bool (R,)."""
        inside = np.zeros(len(self.lengths), dtype=np.bool_)
        inside[1::2] = True
        inside ^= np.repeat(self.offsets[:-1] % 2 == 1, np.diff(self.offsets))
        return inside


# Writing


def write_counts(lengths: Int64Array, offsets: Int64Array) -> tuple[str, ...]:
    """Return the compressed text of N masks; `lengths` and `offsets` as in `Runs`."""
    values = lengths.copy()
    values[2:] -= lengths[:-2]
    for k in range(3):
        place = offsets[:-1] + k
        place = place[place < offsets[1:]]
        values[place] = lengths[place]
    blocks = [_write_numbers(values[i : i + BLOCK_RUNS]) for i in range(0, len(values), BLOCK_RUNS)]
    text = b"".join(characters for characters, _ in blocks).decode("ascii")
    num_characters = [np.zeros(1, dtype=np.int64), *[number for _, number in blocks]]
    ends = np.cumsum(np.concatenate(num_characters))[offsets].tolist()
    return tuple(text[start:end] for start, end in pairwise(ends))


def _write_numbers(values: Int64Array) -> tuple[bytes, Int64Array]:
    """Return signed numbers as COCO writes them, and the number of characters of each.

    Most numbers are one or two characters, so each pass goes on with those alone that have more.
    """
    num_characters = np.ones(len(values), dtype=np.int64)
    bound = 16
    while (longer := (values >= bound) | (values < -bound)).any():
        num_characters += longer
        bound <<= 5
    ends = np.cumsum(num_characters)
    characters = np.empty(ends[-1] if len(ends) else 0, dtype=np.uint8)
    place, remaining = ends - num_characters, num_characters - 1
    while len(values):
        more = remaining > 0
        characters[place] = (values & 31) + (48 + 32 * more)
        place, remaining, values = place[more] + 1, remaining[more] - 1, values[more] >> 5
    return characters.tobytes(), num_characters


def compress_lengths(lengths: Sequence[object]) -> str:
    """Return the compressed text of one mask's uncompressed runs, as COCO's crowds have them.

    Raises:
        ValueError: a run that is no whole number from 0 to `SHORT_PIXELS`; names it.
    """
    for place, run in enumerate(lengths):
        if type(run) is not int or not 0 <= run < SHORT_PIXELS:
            raise ValueError(f"run {place} is no whole number from 0 to {SHORT_PIXELS}")
    return write_counts(np.array(lengths, np.int64), np.array([0, len(lengths)]))[0]


# Parsing


@dataclass(frozen=True, kw_only=True)
class ParsedCounts:
    """The runs of the sound ones of N texts, one text's after the other's.

    `lengths`, `mask`: int64 (R,), each run's length and the index of its text. `faults`: what is wrong with
    the others, by index.
    """

    lengths: Int64Array
    mask: Int64Array
    faults: dict[int, str]


def batches(counts: Sequence[str]) -> Iterator[slice]:
    """Yield slices that cover N texts in order, each small enough to be parsed at once; one text at least."""
    start = characters = 0
    for place, text in enumerate(counts):
        if place > start and (place - start == MASKS_PER_BATCH or characters + len(text) > TEXT_PER_BATCH):
            yield slice(start, place)
            start, characters = place, 0
        characters += len(text)
    if len(counts) > start:
        yield slice(start, len(counts))


def parse_counts(counts: Sequence[str], pixels: npt.ArrayLike) -> ParsedCounts:
    """Return the runs of N texts, whatever these hold; nothing is raised for a text.

    A text is sound when it is whole numbers in the alphabet, none too long, no run below 0, and all runs
    together are `pixels`, height times width of each mask: int64 (N,), or one number for all.
    """
    pixels = np.broadcast_to(np.asarray(pixels, np.int64), (len(counts),))
    faults: dict[int, str] = {}
    sizes = np.array([len(text) for text in counts], dtype=np.int64)
    # DEL is outside the alphabet too, so what is no ASCII is found with the rest.
    text = "".join(c if c.isascii() else "\x7f" * len(c) for c in counts)
    codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    _add(faults, sizes == 0, "an empty run-length text")
    mask = np.repeat(np.arange(len(counts)), sizes)
    _add(faults, _any(mask, (codes < 0) | (codes > 63), len(counts)), "a character outside the alphabet")
    ends_open = np.zeros(len(counts), dtype=np.bool_)
    ends_open[sizes > 0] = (codes[(np.cumsum(sizes) - 1)[sizes > 0]] & 32) != 0
    _add(faults, ends_open, "the run-length text ends inside a number")
    codes, mask = _without(faults, mask, codes, mask)
    last = (codes & 32) == 0
    place = _place_in_group(np.concatenate([[0], np.cumsum(last)[:-1]]) if len(last) else mask)
    most = np.where(pixels < SHORT_PIXELS, 6, 7)
    _add(faults, _any(mask, place >= most[mask], len(counts)), "a number of too many characters")
    codes, place, mask = _without(faults, mask, codes, place, mask)
    lengths, mask = _parse_numbers(codes, place, mask)
    _add_wrong_lengths(faults, lengths, mask, pixels)
    lengths, mask = _without(faults, mask, lengths, mask)
    return ParsedCounts(lengths=lengths, mask=mask, faults=dict(sorted(faults.items())))


def tight_boxes_xywh(counts: Sequence[str], size_hw: tuple[int, int]) -> list[tuple[float, ...] | None]:
    """Return the tight box of each of N texts of masks of one size; None for an empty or unsound one.

    A box is x, y, width, height with its ends on the edges of pixels: one pixel at (3, 5) is (3, 5, 1, 1), as
    pycocotools' `toBbox` has it.
    """
    height, width = size_hw
    found: list[tuple[float, ...] | None] = [None] * len(counts)
    if min(size_hw) < 1 or height * width >= SHORT_PIXELS:
        return found
    for some in batches(counts):
        parsed = parse_counts(counts[some], height * width)
        places = np.unique(parsed.mask)
        starts = np.searchsorted(parsed.mask, places)
        offsets = np.append(starts, len(parsed.mask)).astype(np.int64)
        boxes = Runs(lengths=parsed.lengths, offsets=offsets, size_hw=size_hw).bboxes_xywh()
        for place, box in zip(places.tolist(), boxes.astype(np.float64), strict=True):
            found[some.start + place] = tuple(box.tolist()) if box[2] > 0 else None
    return found


def rle_faults(counts: Sequence[object], sizes_hw: Sequence[object]) -> list[str | None]:
    """Return what is wrong with each of N masks from users' files, as text; None where nothing is.

    A mask is compressed runs, text, and its size, a list of two whole numbers, height and width. Nothing is
    raised, whatever the values are. A mask without a fault is safe in pycocotools, which checks nothing
    itself. The messages repeat none of the users' text, so they need no cleaning.
    """
    faults = [_type_fault(text, size) for text, size in zip(counts, sizes_hw, strict=True)]
    sized = [place for place, fault in enumerate(faults) if fault is None]
    texts = [str(counts[place]) for place in sized]
    for batch in batches(texts):
        sides = np.array([sizes_hw[place] for place in sized[batch]], np.int64)
        for at, fault in parse_counts(texts[batch], sides.prod(axis=1)).faults.items():
            faults[sized[batch][at]] = fault
    return faults


def _type_fault(text: object, size: object) -> str | None:
    """Return what is wrong with a mask before its text is parsed."""
    if not isinstance(size, list | tuple) or len(size) != 2 or any(type(side) is not int for side in size):
        return "a size that is not two whole numbers, height and width"
    if min(size) < 1 or size[0] * size[1] >= SHORT_PIXELS:
        return f"a size out of range; wanted sides from 1 and fewer than {SHORT_PIXELS} pixels"
    if not isinstance(text, str):
        return f"counts of type {type(text).__name__}; wanted the text of compressed runs"
    return None


def rle_to_mask(counts: str, size_hw: tuple[int, int]) -> BoolArray:
    """Return the dense mask of a compressed text, bool (H, W).

    Raises:
        ValueError: the text is not the runs of a mask of this size.
    """
    height, width = size_hw
    parsed = parse_counts([counts], height * width)
    if parsed.faults:
        raise ValueError(f"{parsed.faults[0]}, of a mask of {height} x {width}; it is {counts[:40]!a}")
    is_inside = np.arange(len(parsed.lengths)) % 2 == 1
    return np.repeat(is_inside, parsed.lengths).reshape(width, height).T


def _parse_numbers(codes: Int64Array, place: Int64Array, mask: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the lengths, and each one's mask, of characters and the place of each in its number."""
    starts = np.flatnonzero(place == 0)
    if not len(starts):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    last = (codes & 32) == 0
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= np.where((codes[last] & 16) != 0, np.int64(1) << (5 * (place[last] + 1)), 0)
    return _undo_differences(values, mask[starts]), mask[starts]


def _undo_differences(values: Int64Array, mask: Int64Array) -> Int64Array:
    """Return lengths from stored values: from a mask's fourth run on, the difference to two before."""
    order = _place_in_group(mask)
    firsts = np.flatnonzero(order == 0)
    repeats = np.diff(np.append(firsts, len(values)))
    lengths = values.copy()
    for chain in ((order % 2 == 1), (order % 2 == 0) & (order > 0)):
        sums = np.cumsum(np.where(chain, values, 0))
        before = np.repeat(np.concatenate([[0], sums])[firsts], repeats)
        lengths[chain] = (sums - before)[chain]
    return lengths


def _add_wrong_lengths(
    faults: dict[int, str], lengths: Int64Array, mask: Int64Array, pixels: Int64Array
) -> None:
    firsts = np.flatnonzero(_place_in_group(mask) == 0)
    if not len(firsts):
        return
    masks, shortest = mask[firsts], np.minimum.reduceat(lengths, firsts)
    totals = np.add.reduceat(lengths, firsts)
    for at in np.flatnonzero(shortest < 0).tolist():
        faults[int(masks[at])] = f"a run of {shortest[at]} pixels"
    for at in np.flatnonzero((totals != pixels[masks]) & (shortest >= 0)).tolist():
        faults[int(masks[at])] = f"runs of {totals[at]} pixels in all, wanted {pixels[masks[at]]}"


def _place_in_group(group: Int64Array) -> Int64Array:
    """Return the place of each in its row of equal neighbours, from 0."""
    firsts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(firsts, np.diff(np.append(firsts, len(group))))


def _any(mask: Int64Array, where: BoolArray, count: int) -> BoolArray:
    """Return which of `count` masks have a True; bool (count,)."""
    result = np.zeros(count, dtype=np.bool_)
    result[mask[where]] = True
    return result


def _add(faults: dict[int, str], where: BoolArray, fault: str) -> None:
    for place in np.flatnonzero(where).tolist():
        faults.setdefault(place, fault)


def _without(faults: dict[int, str], mask: Int64Array, *columns: Int64Array) -> list[Int64Array]:
    """Return the columns without the entries of masks at fault."""
    if not faults:
        return list(columns)
    kept = ~np.isin(mask, np.fromiter(faults, dtype=np.int64, count=len(faults)))
    return [column[kept] for column in columns]


# Measuring


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


def parse_strips(counts: Sequence[str], sizes_hw: npt.ArrayLike) -> Strips:
    """Return the strips of N compressed texts; `sizes_hw`: (2,) of all masks, or (N, 2).

    Raises:
        ValueError: a text is not the runs of a mask of its size; names it and the fault.
    """
    sizes_hw = np.broadcast_to(np.asarray(sizes_hw, np.int64), (len(counts), 2))
    pixels = sizes_hw[:, 0] * sizes_hw[:, 1]
    parsed = parse_counts(counts, pixels)
    for place, fault in parsed.faults.items():
        height, width = sizes_hw[place]
        raise ValueError(f"mask {place}: {fault}, of a mask of {height} x {width}")
    lengths, mask = parsed.lengths, parsed.mask
    ends = np.cumsum(lengths) - (np.cumsum(pixels) - pixels)[mask]
    inside = (_place_in_group(mask) % 2 == 1) & (lengths > 0)
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
    """Return the pixels of each mask whose centre lies in its box (N, 4), edges included; int64 (N,)."""
    limit = strips.sizes_hw[:, ::-1].astype(np.float64)
    low = np.clip(np.ceil(boxes_xyxy[:, :2] - 0.5), 0, limit).astype(np.int64)
    high = np.clip(np.floor(boxes_xyxy[:, 2:] - 0.5) + 1, 0, limit).astype(np.int64)
    rows = np.minimum(strips.bottom, high[strips.mask, 1]) - np.maximum(strips.top, low[strips.mask, 1])
    in_columns = (strips.x >= low[strips.mask, 0]) & (strips.x < high[strips.mask, 0])
    inside = np.where(in_columns, np.maximum(rows, 0), 0)
    return np.bincount(strips.mask, weights=inside, minlength=len(strips.sizes_hw)).astype(np.int64)


def count_components(strips: Strips) -> Int64Array:
    """Return the connected parts of each mask, where pixels touch by edge or corner; int64 (N,)."""
    parent = components(strips)
    is_root = parent == np.arange(len(parent))
    return np.bincount(strips.mask[is_root], minlength=len(strips.sizes_hw)).astype(np.int64)


def components(strips: Strips) -> Int64Array:
    """Return the first strip of the connected part to which each strip belongs; int64 (S,)."""
    return _roots(len(strips.x), *_touching(strips))


def _touching(strips: Strips) -> tuple[Int64Array, Int64Array]:
    """Return pairs of strips that touch: in the next column with rows that meet, or joined in one column."""
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
    """Return the smallest member of each one's group, given pairs of the same group; int64 (count,).

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
