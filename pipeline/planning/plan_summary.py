"""What planning understood, in numbers and sentences: printed before any work, for the user to check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import BoolArray, Int64Array, list_lengths, null_mask, single
from hqlabel.pipeline.errors import clean_text, count
from hqlabel.pipeline.inputs.image_box_lists import BoxList, ImageList, examples
from hqlabel.pipeline.job_context import AccessRules, BoxRules
from hqlabel.pipeline.planning.join_boxes_to_images import Joined, Unmatched
from hqlabel.pipeline.planning.suspicious_boxes import SUSPICIOUS_SHARE, refuse_other_format, suspicions
from hqlabel.pipeline.schema import PLAN_BOX
from hqlabel.pipeline.settings import BoxFormat, BoxFrame
from hqlabel.pipeline.stages.box_prompts import MOST_POINTS, PROMPT_COLUMNS, prompt_faults
from hqlabel.pipeline.storage.read_objects import fingerprint
from hqlabel.pipeline.storage.uri_rules import options_for, without_credentials

_PROMPTS_AT_ONCE = 4096
MOST_CLASSES = 10
BOXES_CHECKED = 200_000  # boxes checked for likely mistakes, spread evenly over all


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """What planning understood.

    `images`, `boxes`, `units`: of the plan. `listed_images`: before `limit`. `without_boxes`: images with
    an empty list; of these, `listed_without_boxes` are named by no box file. `null_boxes`,
    `mismatched_labels`, `refused_uris`: images that will fail without being fetched. `invalid_prompts`: boxes
    of the plan whose points or mask cannot be used, whatever the picture. `unmatched_boxes`: skipped by
    `allow_unmatched`. `skipped_files`: files of an image folder that are no pictures. `left_out`:
    sentences on what else of it is not taken. `crowd_boxes`: regions, which get no mask.
    `box_format`, `box_frame`: how the boxes are read. `id_rule`: where ids come from and how boxes were
    joined, as text. `unused_columns`: of the tables, those that are not read; `used_columns`: our name to
    theirs, for the others. `warnings`: likely mistakes, with the flag that fixes each. `input_files`:
    fingerprints of all tables and box files. `classes`: {"id", "name", "boxes"} of the MOST_CLASSES with most
    boxes, of `class_count`. `lowest_score`, `highest_score`: None where no box has one.
    """

    images: int
    boxes: int
    units: int
    listed_images: int
    without_boxes: int
    listed_without_boxes: int
    null_boxes: int
    mismatched_labels: int
    refused_uris: int
    invalid_prompts: int
    unmatched_boxes: Unmatched
    skipped_files: int
    left_out: tuple[str, ...]
    box_format: BoxFormat
    box_frame: BoxFrame
    id_rule: str
    unused_columns: tuple[str, ...]
    warnings: tuple[str, ...]
    input_files: tuple[Mapping[str, Any], ...]
    crowd_boxes: int = 0
    used_columns: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[Mapping[str, Any], ...] = ()
    class_count: int = 0
    boxes_without_class: int = 0
    boxes_without_score: int = 0
    lowest_score: float | None = None
    highest_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class JoinedInputs:
    """The inputs, read and joined. `boxes`: None when there is no box file. `format_stated`: by the user."""

    access: AccessRules
    images_per_unit: int
    images: ImageList
    boxes: BoxList | None
    joined: Joined
    rules: BoxRules
    format_stated: bool


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """What is counted of some rows of a plan. `merged` adds those of rows that follow each other.

    `images` to `crowd_boxes`: as in `PlanSummary`. `classes`: (id, name) -> boxes. `first`: error code ->
    uri and reason of the first such row; `first_invalid`: the first prompt that cannot be used, as text.
    """

    images: int = 0
    boxes: int = 0
    without_boxes: int = 0
    listed_without_boxes: int = 0
    null_boxes: int = 0
    mismatched_labels: int = 0
    refused_uris: int = 0
    invalid_prompts: int = 0
    crowd_boxes: int = 0
    boxes_without_score: int = 0
    lowest_score: float | None = None
    highest_score: float | None = None
    classes: Mapping[tuple[int | None, str | None], int] = field(default_factory=dict)
    first: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    first_invalid: str = ""

    @classmethod
    def merged(cls, parts: Sequence[RowCounts]) -> RowCounts:
        """Return the counts of all rows."""
        classes: Counter[tuple[int | None, str | None]] = Counter()
        first: dict[str, tuple[str, str]] = {}
        for part in parts:
            classes.update(part.classes)
            first = dict(part.first) | first
        ends = [part.lowest_score for part in parts], [part.highest_score for part in parts]
        lowest, highest = ([end for end in some if end is not None] for some in ends)
        return cls(
            **{name: sum(getattr(part, name) for part in parts) for name in _ADDED},
            lowest_score=min(lowest, default=None),
            highest_score=max(highest, default=None),
            classes=classes,
            first=first,
            first_invalid=next((part.first_invalid for part in parts if part.first_invalid), ""),
        )


_ADDED = (
    *("images", "boxes", "without_boxes", "listed_without_boxes", "null_boxes", "mismatched_labels"),
    *("refused_uris", "invalid_prompts", "crowd_boxes", "boxes_without_score"),
)


def count_rows(table: pa.Table, is_mentioned: BoolArray, columns: Collection[str]) -> RowCounts:
    """Return the counts of rows of a plan. `is_mentioned`: by a box file; `columns`: that the boxes have."""
    lengths, null = _box_counts(table)
    invalid, first_invalid = _invalid_prompts(table, columns)
    return RowCounts(
        images=table.num_rows,
        boxes=int(lengths.sum()),
        without_boxes=int(((lengths == 0) & ~null).sum()),
        listed_without_boxes=int((~is_mentioned).sum()),
        null_boxes=int(null.sum()),
        mismatched_labels=_count(table, "labels_mismatch"),
        refused_uris=_count(table, "uri_refused"),
        invalid_prompts=invalid,
        crowd_boxes=pc.sum(pc.struct_field(pc.list_flatten(table.column("boxes")), "iscrowd")).as_py() or 0,
        **_classes_and_scores(table),
        first=_first_failures(table),
        first_invalid=first_invalid,
    )


def summarise(inputs: JoinedInputs, rows: RowCounts, checked: CheckedBoxes, *, listed: int) -> PlanSummary:
    """Return the summary of a plan; `rows`: of the plan, `checked`: of the box list, `listed`: its images.

    Raises:
        JobRefused: the boxes are of another format than is assumed.
    """
    files = dict.fromkeys((*inputs.images.files, *(inputs.boxes.files if inputs.boxes else ())))
    access = inputs.access
    order = sorted(rows.classes.items(), key=_most_first)
    classes = [
        {"id": number, "name": name, "boxes": boxes}
        for (number, name), boxes in order
        if (number, name) != (None, None)
    ]
    return PlanSummary(
        images=rows.images,
        boxes=rows.boxes,
        units=-(-rows.images // inputs.images_per_unit),
        listed_images=listed,
        without_boxes=rows.without_boxes,
        listed_without_boxes=rows.listed_without_boxes,
        null_boxes=rows.null_boxes,
        mismatched_labels=rows.mismatched_labels,
        refused_uris=rows.refused_uris,
        invalid_prompts=rows.invalid_prompts,
        unmatched_boxes=inputs.joined.unmatched,
        skipped_files=inputs.images.skipped_files,
        left_out=inputs.images.left_out,
        box_format=inputs.rules.box_format,
        box_frame=inputs.rules.box_frame,
        id_rule=inputs.joined.id_rule,
        unused_columns=_unused_columns(inputs),
        used_columns=dict(inputs.images.used) | (dict(inputs.boxes.used) if inputs.boxes else {}),
        classes=tuple(classes[:MOST_CLASSES]),
        class_count=len(classes),
        boxes_without_class=rows.classes.get((None, None), 0),
        boxes_without_score=rows.boxes_without_score,
        lowest_score=rows.lowest_score,
        highest_score=rows.highest_score,
        warnings=(*_box_warnings(inputs, checked), *_row_warnings(rows), *_notes(inputs)),
        input_files=tuple(fingerprint(uri, options_for(uri, access), roots=access.roots) for uri in files),
        crowd_boxes=rows.crowd_boxes,
    )


def _most_first(one: tuple[tuple[int | None, str | None], int]) -> tuple[int, bool, int, bool, bytes]:
    """Return what sorts classes: by their boxes, most first, then by id and name, those without one last."""
    (number, name), boxes = one
    return -boxes, number is None, number or 0, name is None, (name or "").encode()


def _unused_columns(inputs: JoinedInputs) -> tuple[str, ...]:
    """Return what no reader took. Of a table that gives images and boxes, the reader of boxes takes more."""
    images, boxes = inputs.images, inputs.boxes
    if boxes is None:
        return images.unused
    of_images = () if images.files == boxes.files else images.unused
    return tuple(dict.fromkeys((*of_images, *boxes.unused)))


def _classes_and_scores(table: pa.Table) -> dict[str, Any]:
    """Return the fields of `RowCounts` on the classes and scores of the plan's boxes."""
    boxes = [chunk.flatten() for chunk in table.column("boxes").chunks]
    names = ("category_id", "category_name", "score")
    columns = {
        n: pa.chunked_array([pc.struct_field(b, n) for b in boxes], PLAN_BOX.field(n).type) for n in names
    }
    score = columns.pop("score")
    scores = pc.if_else(pc.is_finite(score), score, pa.scalar(None, score.type))
    grouped = pa.table(columns).group_by(list(columns)).aggregate([([], "count_all")])
    ends = pc.min_max(scores).as_py()  # of finite ones: JSON has no others
    return {
        "classes": {
            (row["category_id"], row["category_name"]): row["count_all"] for row in grouped.to_pylist()
        },
        "boxes_without_score": scores.null_count,
        "lowest_score": ends["min"],
        "highest_score": ends["max"],
    }


def _box_counts(table: pa.Table) -> tuple[Int64Array, BoolArray]:
    """Return boxes of each image, and whether its list is null."""
    chunks = table.column("boxes").chunks
    lengths = [list_lengths(chunk) for chunk in chunks]
    nulls = [null_mask(chunk) for chunk in chunks]
    return np.concatenate([*lengths, np.zeros(0, np.int64)]), np.concatenate([*nulls, np.zeros(0, np.bool_)])


def _count(table: pa.Table, code: str) -> int:
    return int(pc.sum(pc.equal(table.column("error_code"), code)).as_py() or 0)


def _first_failures(table: pa.Table) -> dict[str, tuple[str, str]]:
    """Return uri and reason of the first row of each kind that fails by the plan alone."""
    first = {}
    for code in ("uri_refused", "labels_mismatch"):
        rows = table.filter(pc.equal(table.column("error_code"), code)).slice(0, 1).to_pylist()
        if rows:
            first[code] = (rows[0]["image_uri"], rows[0]["error_message"])
    return first


def _row_warnings(rows: RowCounts) -> list[str]:
    """Return a sentence for each kind of row that fails by the plan alone, with the first reason."""
    sentences = []
    starts = {
        "uri_refused": (rows.refused_uris, "uris is refused", "uris are refused"),
        "labels_mismatch": (
            rows.mismatched_labels,
            "images has lists that do not fit",
            "images have lists that do not fit",
        ),
    }
    for code, (number, one, several) in starts.items():
        if code not in rows.first:
            continue
        uri, reason = rows.first[code]
        sentences.append(
            f"{number:,} of {rows.images:,} {several if number > 1 else one} and will fail: "
            f"{clean_text(without_credentials(uri))}: {reason}"
        )
    if rows.invalid_prompts:
        sentences.append(
            f"{rows.invalid_prompts} of {rows.boxes} boxes have points or a mask that cannot be used, and "
            f"will have no mask (prompt_invalid); the first is {rows.first_invalid}"
        )
    return sentences


def _invalid_prompts(table: pa.Table, columns: Collection[str]) -> tuple[int, str]:
    """Return how many prompts of some rows cannot be used, and the first of them with the reason."""
    names = [name for name in PROMPT_COLUMNS if name in columns]
    prompts = invalid = 0
    first = ""
    for chunk in table.column("boxes").chunks if names else ():
        values = chunk.flatten()
        given = pa.table({name: pc.struct_field(values, name) for name in names})
        for start in range(0, len(values), _PROMPTS_AT_ONCE):
            some = given.slice(start, _PROMPTS_AT_ONCE)
            doubtful = np.flatnonzero(_doubtful(some))
            faults = prompt_faults(some.take(pa.array(doubtful)).to_pylist())
            wrong = [
                (place, fault)
                for place, fault in zip(doubtful.tolist(), faults, strict=True)
                if fault is not None
            ]
            if wrong and not first:
                first = f"{_named(table, prompts + start + wrong[0][0])}: {wrong[0][1]}"
            invalid += len(wrong)
        prompts += len(values)
    return invalid, first


def _doubtful(prompts: pa.Table) -> npt.NDArray[np.bool_]:
    """Return True for prompts to check one by one: all but those of points without a fault alone."""
    doubtful = np.zeros(len(prompts), dtype=np.bool_)
    if "prompt_mask" in prompts.column_names:
        doubtful |= ~null_mask(single(prompts.column("prompt_mask")))
    counts = dict.fromkeys(PROMPT_COLUMNS, np.zeros(len(prompts), dtype=np.int64))
    for name in {"points_xy", "point_labels"} & set(prompts.column_names):
        lists = single(prompts.column(name))
        counts[name] = list_lengths(lists)
        values = lists.flatten().to_numpy(zero_copy_only=False)
        sound = np.isfinite(values) if name == "points_xy" else np.isin(values, (1, 0, -1))
        doubtful[np.repeat(np.arange(len(prompts)), counts[name])[~sound]] = True
    labels = counts["point_labels"]
    doubtful |= (counts["points_xy"] != 2 * labels) | (labels > MOST_POINTS)
    return doubtful


def _named(table: pa.Table, box: int) -> str:
    """Return the box at a place among all boxes of the plan, by its image and its place there."""
    ends = np.cumsum(_box_counts(table)[0])
    row = int(np.searchsorted(ends, box, side="right"))
    start = int(ends[row - 1]) if row else 0
    return f"box {box - start} of {clean_text(table.column('image_id')[row].as_py())}"


def _notes(inputs: JoinedInputs) -> list[str]:
    notes = [*inputs.images.notes, *(inputs.boxes.notes if inputs.boxes else ()), *inputs.joined.notes]
    lost = inputs.joined.unmatched
    if lost.boxes:
        boxes = count(lost.boxes, "box", "boxes")
        hint = f". {inputs.joined.hint.rstrip('. ')}" if inputs.joined.hint else ""
        first = f", such as {examples(lost.examples[:1])}" if lost.examples else ""
        notes.append(f"{boxes} of {count(lost.images, 'unlisted image')}{first}: left out{hint}")
    return notes


@dataclass(frozen=True, kw_only=True)
class CheckedBoxes:
    """Boxes of a box list, spread evenly over it, which are judged together.

    `values_N4`: those of four numbers, float64; `sizes_hw`: int64 (N, 2), of their pictures (0 where not
    known), or None. `lengths`: numbers of each box checked, int64; `is_null`: bool; `lacks`: of these, how
    many are null with no other prompt. `total`: boxes of the list.
    """

    values_N4: npt.NDArray[np.float64]
    sizes_hw: Int64Array | None
    lengths: Int64Array
    is_null: BoolArray
    lacks: int
    total: int

    @classmethod
    def merged(cls, parts: Sequence[CheckedBoxes]) -> CheckedBoxes:
        """Return the boxes of several lists without sizes."""
        return cls(
            values_N4=np.concatenate([np.zeros((0, 4)), *(part.values_N4 for part in parts)]),
            sizes_hw=None,
            lengths=np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in parts)]),
            is_null=np.concatenate([np.zeros(0, np.bool_), *(part.is_null for part in parts)]),
            lacks=sum(part.lacks for part in parts),
            total=sum(part.total for part in parts),
        )


def checked_boxes(inputs: JoinedInputs, most: int = BOXES_CHECKED) -> CheckedBoxes:
    """Return up to `most` boxes of the list; none of one that states its frame."""
    boxes = inputs.boxes
    total = 0 if boxes is None else int(boxes.lengths.sum())
    if boxes is None or not total or boxes.box_frame is not None:  # an earlier output is no guess
        return CheckedBoxes.merged(())
    flat = np.arange(0, total, max(1, total // most), dtype=np.int64)
    mention = np.searchsorted(np.cumsum(boxes.lengths), flat, side="right")
    rows = flat if boxes.rows is None else boxes.rows[flat]
    given = single(boxes.boxes.column("given")).take(pa.array(rows))
    counts = list_lengths(given)
    whole = counts == 4
    sizes = _sizes(inputs)
    null = null_mask(given)
    for name in {"points_xy", "prompt_mask"} & set(boxes.boxes.column_names):
        null &= null_mask(single(boxes.boxes.column(name)).take(pa.array(rows)))
    return CheckedBoxes(
        values_N4=given.filter(pa.array(whole)).flatten().to_numpy(zero_copy_only=False).reshape(-1, 4),
        sizes_hw=None if sizes is None else sizes[mention[whole]],
        lengths=counts,
        is_null=null_mask(given),
        lacks=int(null.sum()),
        total=total,
    )


def _box_warnings(inputs: JoinedInputs, checked: CheckedBoxes) -> tuple[str, ...]:
    """Return warnings on the boxes, judged by those that were checked."""
    boxes, values_N4 = inputs.boxes, checked.values_N4
    if boxes is None or not len(checked.lengths):
        return ()
    if not inputs.format_stated:
        refuse_other_format(values_N4, inputs.rules, (*boxes.files, boxes.folder)[0])
    found = suspicions(values_N4, inputs.rules, upright_size_hw=checked.sizes_hw)
    lacking = checked.lacks + int((~np.isfinite(values_N4).all(axis=1)).sum())
    lengths = checked.lengths[~checked.is_null]
    return (*_other_lengths(lengths, checked.total), *_lacking(lacking, len(checked.lengths)), *found)


def _lacking(lacking: int, checked: int) -> tuple[str, ...]:
    """Return a sentence when many of the boxes checked are null, with no other prompt, or lack a number."""
    if lacking <= SUSPICIOUS_SHARE * checked:
        return ()
    return (
        f"{lacking:,} of {checked:,} boxes checked have null, NaN or infinity among their 4 numbers: "
        "they get no mask (box_malformed, box_not_finite); an image without boxes has null for all 4, or []",
    )


def _other_lengths(counts: Int64Array, total: int) -> tuple[str, ...]:
    """Return a sentence when many boxes have another number of values than four.

    `counts`: of the boxes that were checked and are not null; `total`: of all boxes.
    """
    others = counts[counts != 4]
    if not len(others) or len(others) <= SUSPICIOUS_SHARE * len(counts):
        return ()
    most = int(np.bincount(others).argmax())
    same = int((others == most).sum())
    if same == total:
        many = f"all {total:,} boxes have {most} numbers each"
    elif same == len(counts):
        many = f"all of {same:,} boxes checked have {most} numbers each"
    else:
        boxes = "boxes" if len(counts) == total else "boxes checked"
        many = f"{len(others):,} of {len(counts):,} {boxes} have other than 4 numbers, most of them {most}"
    return (f"{many}{_LENGTHS.get(most, '')}; wanted 4, so they get no mask (box_malformed): {_FIX}",)


_LENGTHS = {
    0: " (empty lists)",
    5: " (turned boxes with an angle? or a score or class behind the corners?)",
    6: " (a score and a class behind the corners?)",
    8: " (the four corners of turned boxes, or polygons?)",
}
_FIX = (
    "write each box as the 4 numbers of an upright box around it, scores and classes in columns of their own"
)


def _sizes(inputs: JoinedInputs) -> Int64Array | None:
    """Return the picture's size for each image of the box list, where an input states it; 0 where not."""
    boxes, images = inputs.boxes, inputs.images
    assert boxes is not None, "the caller has checked"
    if boxes.size_hw is not None or images.size_hw is None:
        return boxes.size_hw
    sizes = np.zeros((len(boxes.lengths), 2), dtype=np.int64)
    named = inputs.joined.mention >= 0
    sizes[inputs.joined.mention[named]] = images.size_hw[named]
    return sizes
