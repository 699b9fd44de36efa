"""An image that a box file has more than once: what becomes of its boxes.

- A table with one row per image: rows that say the same count once; where they differ nothing says which
  of them is meant (two runs of a detector, or two halves of one), so that image fails and keeps all boxes.
- A table with one row per box: the boxes of several spellings of one uri are the image's, in the order of
  their rows. With several ids it fails: one of them would name its masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import BoolArray, Int64Array
from hqlabel.pipeline.errors import count
from hqlabel.pipeline.inputs.box_tables import NO_URI
from hqlabel.pipeline.inputs.image_box_lists import TEXT, BoxList, examples, repeated

_SLICE = 50_000  # images whose rows are compared at a time, as Python values
_NAMED = 3  # images that a sentence names


@dataclass(frozen=True, kw_only=True)
class NamedTwice:
    """Images that a box file has more than once: how many, and the first few by their names.

    `same`: in rows that say the same; `spelled`: in several spellings; `failed`: in rows that do not agree.
    `of`: images that the file names.
    """

    same: int = 0
    spelled: int = 0
    failed: int = 0
    of: int = 0
    same_names: tuple[str, ...] = ()
    spelled_names: tuple[str, ...] = ()
    failed_names: tuple[str, ...] = ()

    @classmethod
    def merged(cls, parts: Sequence[NamedTwice]) -> NamedTwice:
        """Return those of all parts."""

        def least(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
            return tuple(sorted(chain.from_iterable(names))[:_NAMED])

        return cls(
            same=sum(one.same for one in parts),
            spelled=sum(one.spelled for one in parts),
            failed=sum(one.failed for one in parts),
            of=sum(one.of for one in parts),
            same_names=least(one.same_names for one in parts),
            spelled_names=least(one.spelled_names for one in parts),
            failed_names=least(one.failed_names for one in parts),
        )

    def is_most(self) -> bool:
        """Return whether most images fail for it, so that another kind of table was meant."""
        return 2 * self.failed > self.of

    def notes(self, boxes: BoxList) -> tuple[str, ...]:
        """Return a sentence on each kind."""
        kinds = (
            (self.same, self.same_names, "in several rows that say the same", "counted once"),
            (self.spelled, self.spelled_names, "in several spellings", "their boxes are joined"),
            (self.failed, self.failed_names, "in rows that do not agree", "they fail (labels_mismatch)"),
        )
        return tuple(
            f"{boxes.files[0]}: {count(number, 'image')} {what}, such as {examples(names)}: {cost}"
            for number, names, what, cost in kinds
            if number
        )


def boxes_once(boxes: BoxList, keys: pa.Array, ids: pa.Array | None) -> tuple[BoxList, NamedTwice]:
    """Return the same images at the same places; of one named twice the first has all boxes, the others none.

    `keys`: what the images of `boxes` are found by. `ids`: their ids, where those are not the keys.
    """
    named = pc.fill_null(pc.not_equal(keys, NO_URI), False).to_numpy(zero_copy_only=False)
    twice = repeated(keys.filter(pa.array(named)))
    if not len(twice):
        return boxes, NamedTwice(of=len(keys))
    code = pc.fill_null(pc.index_in(keys, twice, skip_nulls=True), -1).to_numpy()
    order = np.argsort(code, kind="stable")
    order = order[np.searchsorted(code[order], 0) :]
    groups = np.split(order, np.flatnonzero(np.diff(code[order])) + 1)
    said = _said(boxes, order, ids) if boxes.one_row_per_image else {}
    same = [group for group in groups if said and len({said[place] for place in group.tolist()}) == 1]
    dropped = np.zeros(len(boxes.lengths), dtype=np.bool_)
    for group in same:
        dropped[group[1:]] = True
    unlike = [group for group in groups if not dropped[group[-1]]]
    errors = {int(group[0]): reason for group in unlike if (reason := _why(boxes, keys, ids, group))}
    spelled = [int(group[0]) for group in unlike if int(group[0]) not in errors]
    found = NamedTwice(
        same=len(same),
        spelled=len(spelled),
        failed=len(errors),
        of=len(keys) - len(order) + len(groups),
        same_names=_names(keys, [int(group[0]) for group in same]),
        spelled_names=_names(keys, spelled),
        failed_names=_names(keys, list(errors)),
    )
    return _merged(boxes, unlike, dropped, errors, ids), found


def _names(keys: pa.Array, places: Sequence[int]) -> tuple[str, ...]:
    return tuple(sorted(keys.take(pa.array(places, pa.int64())).to_pylist())[:_NAMED])


def _said(boxes: BoxList, places: Int64Array, ids: pa.Array | None) -> dict[int, bytes]:
    """Return a hash of all that the rows of some images say, by place."""
    said: dict[int, bytes] = {}
    for start in range(0, len(places), _SLICE):
        own = places[start : start + _SLICE]
        lists = boxes.boxes.take(pa.array(boxes.rows_of(own))).to_pylist()
        names = [None] * len(own) if ids is None else ids.take(pa.array(own)).to_pylist()
        errors = boxes.error.take(pa.array(own)).to_pylist()
        at = 0
        for place, name, error in zip(own.tolist(), names, errors, strict=True):
            rows = lists[at : at + int(boxes.lengths[place])]
            at += len(rows)
            text = repr((name, error, bool(boxes.is_null[place]), rows))  # repr: NaN is like NaN
            said[place] = sha256(text.encode(errors="surrogatepass")).digest()
    return said


def _why(boxes: BoxList, keys: pa.Array, ids: pa.Array | None, group: Int64Array) -> str | None:
    """Return why an image named twice cannot be labelled, whatever the order of its rows; None if it can."""
    name = examples([keys[int(group[0])].as_py()])
    own = [] if ids is None else sorted(set(ids.take(pa.array(group)).drop_null().to_pylist()))
    if len(own) > 1:
        return f"{name} has several ids in the box file: {examples(own)}; give the image one"
    if not boxes.one_row_per_image:
        return None
    numbers = ", ".join(map(str, sorted(boxes.lengths[group].tolist())))
    return (
        f"{name} has {len(group)} rows that differ, of {numbers} boxes, in a box file with one row per "
        "image; give it one row"
    )


def _merged(
    boxes: BoxList,
    unlike: Sequence[Int64Array],
    dropped: BoolArray,
    errors: Mapping[int, str],
    ids: pa.Array | None,
) -> BoxList:
    """Return the boxes with those of each group at its first place, by row, and none at places dropped."""
    places = len(boxes.lengths)
    owner, is_null = np.arange(places), boxes.is_null.copy()
    least: dict[int, str] = {}
    for group in unlike:
        owner[group] = group[0]
        is_null[group[0]] = is_null[group].all()
        own = [] if ids is None else ids.take(pa.array(group)).drop_null().to_pylist()
        least |= {int(group[0]): min(own)} if own else {}
    of_box = np.repeat(np.arange(places), boxes.lengths)
    rows = np.arange(len(of_box)) if boxes.rows is None else boxes.rows
    kept = ~dropped[of_box]
    of_box, rows = owner[of_box[kept]], rows[kept]
    reasons = pa.array([errors.get(at) for at in range(places)], TEXT)
    return replace(
        boxes,
        lengths=np.bincount(of_box, minlength=places).astype(np.int64),
        rows=rows[np.lexsort((rows, of_box))].astype(np.int64),
        is_null=is_null,
        error=pc.coalesce(reasons, boxes.error),
        image_id=_replaced(ids, least) if ids is not None else boxes.image_id,
    )


def _replaced(ids: pa.Array, least: Mapping[int, str]) -> pa.Array:
    return pc.coalesce(pa.array([least.get(at) for at in range(len(ids))], TEXT), ids)
