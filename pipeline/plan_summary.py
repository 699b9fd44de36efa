"""What planning understood, in numbers and sentences: shown before any work, checked by a person."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.access import without_credentials
from pipeline.arrays import Int64Array, list_lengths, null_mask, single
from pipeline.boxes import suspicions
from pipeline.errors import clean_text
from pipeline.inputs import InputSettings, allowed_access
from pipeline.joins import Joined, Unmatched
from pipeline.listings import BoxList, ImageList
from pipeline.records import BoxFormat, BoxFrame, BoxRules
from pipeline.storage import fingerprint, options_for

_LOOK_AT_BOXES = 200_000  # boxes looked at for likely mistakes, spread evenly over all


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """What planning understood.

    `images`, `boxes`, `units`: of the plan. `listed_images`: before `limit`. `without_boxes`: images with
    an empty list; of these, `listed_without_boxes` are named by no box file. `null_boxes`,
    `mismatched_labels`, `refused_uris`: images that will fail without being fetched. `unmatched_boxes`:
    left out by `allow_unmatched`. `skipped_files`: files of an image folder that are no pictures.
    `left_out`: sentences on what else of it is not taken.
    `box_format`, `box_frame`: how the boxes are read. `id_rule`: where ids come from and how boxes were
    joined, in words. `warnings`: likely mistakes, with the flag that mends each. `input_files`:
    fingerprints of all tables and box files.
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
    unmatched_boxes: Unmatched
    skipped_files: int
    left_out: tuple[str, ...]
    box_format: BoxFormat
    box_frame: BoxFrame
    id_rule: str
    warnings: tuple[str, ...]
    input_files: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Understood:
    """The inputs, read and joined. `boxes`: None when there is no box file."""

    settings: InputSettings
    images: ImageList
    boxes: BoxList | None
    joined: Joined
    rules: BoxRules


def summarise(inputs: Understood, table: pa.Table, mention: Int64Array) -> PlanSummary:
    """The summary of a plan; `table` its rows, `mention` the place of each in the box list."""
    lengths, null = _box_counts(table)
    refused = _count(table, "uri_refused")
    mismatched = _count(table, "labels_mismatch")
    files = dict.fromkeys((*inputs.images.files, *(inputs.boxes.files if inputs.boxes else ())))
    access = allowed_access(inputs.settings)
    return PlanSummary(
        images=table.num_rows,
        boxes=int(lengths.sum()),
        units=-(-table.num_rows // inputs.settings.images_per_unit),
        listed_images=len(inputs.joined.image_id),
        without_boxes=int(((lengths == 0) & ~null).sum()),
        listed_without_boxes=int((mention < 0).sum()),
        null_boxes=int(null.sum()),
        mismatched_labels=mismatched,
        refused_uris=refused,
        unmatched_boxes=inputs.joined.unmatched,
        skipped_files=inputs.images.skipped_files,
        left_out=inputs.images.left_out,
        box_format=inputs.rules.box_format,
        box_frame=inputs.rules.box_frame,
        id_rule=inputs.joined.id_rule,
        warnings=(*_box_warnings(inputs), *_row_warnings(table), *_notes(inputs)),
        input_files=tuple(fingerprint(uri, options_for(uri, access), roots=access.roots) for uri in files),
    )


def _box_counts(table: pa.Table) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """Boxes of each image, and whether its list is null."""
    chunks = table.column("boxes").chunks
    lengths = [list_lengths(chunk) for chunk in chunks]
    nulls = [null_mask(chunk) for chunk in chunks]
    return np.concatenate([*lengths, np.zeros(0, np.int64)]), np.concatenate([*nulls, np.zeros(0, np.bool_)])


def _count(table: pa.Table, code: str) -> int:
    return int(pc.sum(pc.equal(table.column("error_code"), code)).as_py() or 0)


def _row_warnings(table: pa.Table) -> list[str]:
    """A sentence for each kind of row that fails by the plan alone, with the first reason."""
    sentences = []
    for code, start in (
        ("uri_refused", "uris are refused"),
        ("labels_mismatch", "images have lists of unlike length"),
    ):
        rows = table.filter(pc.equal(table.column("error_code"), code))
        if rows.num_rows:
            first = rows.slice(0, 1).to_pylist()[0]
            sentences.append(
                f"{rows.num_rows} of {table.num_rows} {start} and will fail: "
                f"{clean_text(without_credentials(first['image_uri']))}: {first['error_message']}"
            )
    return sentences


def _notes(inputs: Understood) -> list[str]:
    notes = [*inputs.images.notes, *(inputs.boxes.notes if inputs.boxes else ())]
    lost = inputs.joined.unmatched
    if lost.boxes:
        notes.append(f"{lost.boxes} boxes of {lost.images} images that are not listed are left out")
    return notes


def _box_warnings(inputs: Understood) -> tuple[str, ...]:
    """What the boxes look like, judged by up to _LOOK_AT_BOXES of them."""
    boxes = inputs.boxes
    total = 0 if boxes is None else int(boxes.lengths.sum())
    if boxes is None or not total or boxes.box_frame is not None:  # an earlier output is no guess
        return ()
    flat = np.arange(0, total, max(1, total // _LOOK_AT_BOXES), dtype=np.int64)
    mention = np.searchsorted(np.cumsum(boxes.lengths), flat, side="right")
    rows = flat if boxes.rows is None else boxes.rows[flat]
    given = single(boxes.boxes.column("given")).take(pa.array(rows))
    whole = list_lengths(given) == 4
    values = given.filter(pa.array(whole)).flatten().to_numpy(zero_copy_only=False)
    sizes = _sizes(inputs)
    return suspicions(
        values.reshape(-1, 4),
        inputs.rules,
        upright_size_hw=None if sizes is None else sizes[mention[whole]],
    )


def _sizes(inputs: Understood) -> Int64Array | None:
    """The picture's size for each image of the box list, where an input states it; 0 where not."""
    boxes, images = inputs.boxes, inputs.images
    assert boxes is not None, "the caller has looked"
    if boxes.size_hw is not None or images.size_hw is None:
        return boxes.size_hw
    sizes = np.zeros((len(boxes.lengths), 2), dtype=np.int64)
    named = inputs.joined.mention >= 0
    sizes[inputs.joined.mention[named]] = images.size_hw[named]
    return sizes
