"""Run lengths <-> the text of COCO's compressed runs: the one writer, and the one reader, strict.

The format is that of `rleFrString` in maskApi.c of cocodataset/cocoapi: numbers of 5 bits a character, lowest
first, 32 set where another follows, 48 added; from the fourth run of a mask on, the difference to the run two
before. pycocotools looks at nothing: it takes any byte, reads on past the end of a text that stops inside a
number, and from runs too short it makes a mask with whatever stood in memory before. So text is read here
first, and goes to pycocotools only when nothing is wrong with it. NumPy alone: CPU workers import this.

Letters: N texts, R runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

BLOCK_RUNS = 8192
"""Runs compressed at a time: their arrays stay in a core's cache. The strings do not depend on it."""
SHORT_PIXELS = 2**29
"""A mask of fewer needs no number of 7 characters, of which pycocotools 2.0.11 misreads negative ones."""


@dataclass(frozen=True, kw_only=True)
class RunLengths:
    """The runs of the sound ones of N texts, one text's after the other's.

    `lengths`, `mask`: int64 (R,), each run's length and the place of its text. `faults`: what is wrong with
    the others, by place.
    """

    lengths: Int64Array
    mask: Int64Array
    faults: dict[int, str]


def read_lengths(counts: Sequence[str], pixels: npt.ArrayLike) -> RunLengths:
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
    lengths, mask = _lengths(codes, place, mask)
    return _checked(lengths, mask, pixels, faults)


def counts_text(lengths: Int64Array, offsets: Int64Array) -> tuple[str, ...]:
    """Return the text of each of N masks: ASCII, equal to pycocotools' byte for byte.

    `lengths`: int64 (R,), one mask's runs after the other's; `offsets`: int64 (N + 1,), where each begins and
    the last one ends.
    """
    values = lengths.copy()
    values[2:] -= lengths[:-2]
    for k in range(3):
        place = offsets[:-1] + k
        place = place[place < offsets[1:]]
        values[place] = lengths[place]
    blocks = [_characters(values[i : i + BLOCK_RUNS]) for i in range(0, len(values), BLOCK_RUNS)]
    text = b"".join(characters for characters, _ in blocks).decode("ascii")
    num_characters = [np.zeros(1, dtype=np.int64), *[number for _, number in blocks]]
    ends = np.cumsum(np.concatenate(num_characters))[offsets].tolist()
    return tuple(text[start:end] for start, end in pairwise(ends))


def _characters(values: Int64Array) -> tuple[bytes, Int64Array]:
    """Signed numbers as COCO writes them, and how many characters each took.

    Groups of 5 bits, lowest first, 32 added where more follow, 48 added to be printable. Most numbers are
    one or two characters, so each pass goes on with those alone that have more.
    """
    num_characters = np.ones(len(values), dtype=np.int64)
    bound = 16
    while (longer := (values >= bound) | (values < -bound)).any():
        num_characters += longer
        bound <<= 5
    ends = np.cumsum(num_characters)
    characters = np.empty(ends[-1] if len(ends) else 0, dtype=np.uint8)
    place, left = ends - num_characters, num_characters - 1
    while len(values):
        more = left > 0
        characters[place] = (values & 31) + (48 + 32 * more)
        place, left, values = place[more] + 1, left[more] - 1, values[more] >> 5
    return characters.tobytes(), num_characters


def _lengths(codes: Int64Array, place: Int64Array, mask: Int64Array) -> tuple[Int64Array, Int64Array]:
    """The lengths, and each one's mask, of numbers whose characters stand at these places in them."""
    starts = np.flatnonzero(place == 0)
    if not len(starts):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    last = (codes & 32) == 0
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= np.where((codes[last] & 16) != 0, np.int64(1) << (5 * (place[last] + 1)), 0)
    return _undo_differences(values, mask[starts]), mask[starts]


def _undo_differences(values: Int64Array, mask: Int64Array) -> Int64Array:
    """Lengths from stored values: from the fourth run of a mask on, the difference to two before."""
    order = _place_in_group(mask)
    firsts = np.flatnonzero(order == 0)
    repeats = np.diff(np.append(firsts, len(values)))
    lengths = values.copy()
    for chain in ((order % 2 == 1), (order % 2 == 0) & (order > 0)):
        sums = np.cumsum(np.where(chain, values, 0))
        before = np.repeat(np.concatenate([[0], sums])[firsts], repeats)
        lengths[chain] = (sums - before)[chain]
    return lengths


def _checked(lengths: Int64Array, mask: Int64Array, pixels: Int64Array, faults: dict[int, str]) -> RunLengths:
    firsts = np.flatnonzero(_place_in_group(mask) == 0)
    if len(firsts):
        masks, shortest = mask[firsts], np.minimum.reduceat(lengths, firsts)
        totals = np.add.reduceat(lengths, firsts)
        for at in np.flatnonzero(shortest < 0).tolist():
            faults[int(masks[at])] = f"a run of {shortest[at]} pixels"
        for at in np.flatnonzero((totals != pixels[masks]) & (shortest >= 0)).tolist():
            faults[int(masks[at])] = f"runs of {totals[at]} pixels in all, wanted {pixels[masks[at]]}"
    lengths, mask = _without(faults, mask, lengths, mask)
    return RunLengths(lengths=lengths, mask=mask, faults=dict(sorted(faults.items())))


def _place_in_group(group: Int64Array) -> Int64Array:
    """The place of each in the row of equal neighbours that it stands in, from 0."""
    firsts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(firsts, np.diff(np.append(firsts, len(group))))


def _any(mask: Int64Array, where: BoolArray, count: int) -> BoolArray:
    """Which of `count` masks have a True; bool (count,)."""
    found = np.zeros(count, dtype=np.bool_)
    found[mask[where]] = True
    return found


def _add(faults: dict[int, str], where: BoolArray, fault: str) -> None:
    for place in np.flatnonzero(where).tolist():
        faults.setdefault(place, fault)


def _without(faults: dict[int, str], mask: Int64Array, *columns: Int64Array) -> list[Int64Array]:
    """The columns without the entries of masks at fault."""
    if not faults:
        return list(columns)
    kept = ~np.isin(mask, np.fromiter(faults, dtype=np.int64, count=len(faults)))
    return [column[kept] for column in columns]
