"""The prompts of an earlier job of ours, read from its published tables, for another model or setting.

Boxes are taken as they were given then, in the format and frame that the tables' footers state. Where no
box was given (a detector ran inside that job), the boxes as used are taken: xywh, upright pixels. Points
and masks are not in the tables; how many prompts had no box is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import Int64Array, single, starts_of
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.inputs.box_tables import box_columns
from hqlabel.pipeline.inputs.columns import Kind
from hqlabel.pipeline.inputs.image_box_lists import (
    NUMBERS,
    BoxList,
    ImageList,
    group_rows,
    grouped_boxes,
    refuse_repeated,
    with_all_images,
)
from hqlabel.pipeline.inputs.propose_columns import missing_column
from hqlabel.pipeline.inputs.read_table import inspect_tables, naming_values, open_named, read_batches
from hqlabel.pipeline.job_context import AccessRules, BoxRules
from hqlabel.pipeline.settings import BoxFormat, BoxFrame
from hqlabel.pipeline.storage.backend import Entry
from hqlabel.pipeline.storage.checksummed_parquet import open_closed

_IMAGES = {
    "image_id": Kind(0, "text"),
    "image_uri": Kind(0, "text"),
    "num_boxes": Kind(0, "integer"),
    "error_code": Kind(0, "text"),
}
_INSTANCES = {
    "image_id": Kind(0, "text"),
    "instance_index": Kind(0, "integer"),
    "box_id": Kind(0, "text"),
    "category_id": Kind(0, "integer"),
    "category_name": Kind(0, "text"),
    "prompt_bbox_given": Kind(1, "number"),
    "prompt_bbox": Kind(1, "number"),
    "detector_score": Kind(0, "number"),
    "reject_reason": Kind(0, "text"),
}


@dataclass(frozen=True, kw_only=True)
class PublishedParts:
    """The published files of an output folder, uris in order."""

    folder: str
    images: tuple[str, ...]
    instances: tuple[str, ...]


def find_parts(folder: str, entries: Sequence[Entry]) -> PublishedParts | None:
    """Return the parts below `folder` (entries: all its files), or None when it is no output of ours.

    Raises:
        JobRefused: an output without published tables.
    """
    names = [entry.key.removeprefix(f"{folder}/") for entry in entries]

    def parts(table: str) -> tuple[str, ...]:
        found = (n for n in names if n.startswith(f"{table}/part-") and n.endswith(".parquet"))
        return tuple(f"{folder}/{name}" for name in sorted(found))

    found = PublishedParts(folder=folder, images=parts("images"), instances=parts("instances"))
    if found.images and found.instances:
        return found
    if "job.json" in names and any(name.startswith("plan/") for name in names):
        raise JobRefused(f"{folder}: an output without published tables; run `hqlabel publish` on it first")
    return None


def read_previous_images(parts: PublishedParts, access: AccessRules) -> ImageList:
    """Return every image of the earlier job, with its id."""
    images = _table(parts.images, _IMAGES, access)
    return ImageList(
        image_uri=single(images.column("image_uri")),
        image_id=single(images.column("image_id")),
        root=parts.folder,
        files=parts.images,
    )


def read_previous_boxes(parts: PublishedParts, access: AccessRules) -> BoxList:
    """Return the prompts of the earlier job, in their old order, under their old ids."""
    images = _table(parts.images, _IMAGES, access)
    ids = single(images.column("image_id"))
    refuse_repeated(ids, parts.folder)
    rows = _table(parts.instances, _INSTANCES, access)
    groups = group_rows(rows.column("image_id").dictionary_encode(), None)
    given, rules, notes = _prompts(rows, _rules(parts, access))
    with naming_values(parts.folder):
        columns = box_columns(
            {
                "given": given,
                "box_id": single(rows.column("box_id")),
                "label": single(rows.column("category_name")),
                "category_id": single(rows.column("category_id")),
                "score": single(rows.column("detector_score")),
                "iscrowd": pc.fill_null(pc.equal(single(rows.column("reject_reason")), "crowd"), False),
            }
        )
    boxes = grouped_boxes(
        groups,
        pa.table(columns),
        folder=parts.folder,
        box_format=rules.box_format,
        box_frame=rules.box_frame,
        files=(*parts.images, *parts.instances),
    )
    _check_numbers(rows, boxes, parts.folder)
    missing = pc.fill_null(pc.equal(images.column("error_code"), "boxes_missing"), False).to_numpy()
    listed = with_all_images(boxes, ids, single(images.column("image_uri")), is_null=missing)
    _check_counts(listed, images, parts.folder)
    return replace(listed, notes=notes)


def _table(uris: Sequence[str], wanted: dict[str, Kind], access: AccessRules) -> pa.Table:
    files = inspect_tables(uris, wanted, {}, access)
    for file in files:
        for name in wanted.keys() - file.names.keys():
            raise missing_column(file.uri, name, file.all_names)
    batches = [batch for file in files for batch in read_batches(file, access)]
    schema = pa.schema([(name, kind.arrow_type()) for name, kind in wanted.items()])
    return pa.concat_tables([schema.empty_table(), *(batch.select(schema.names) for batch in batches)])


def _rules(parts: PublishedParts, access: AccessRules) -> BoxRules | None:
    """Return format and frame of the boxes as given, from the footers; None where they do not state them."""
    found = set()
    for uri in parts.instances:
        with open_named(uri, "parquet", access) as stream:
            footer: dict[bytes, bytes] = open_closed(stream).metadata.metadata or {}
        found.add((footer.get(b"hqlabel.box_format", b""), footer.get(b"hqlabel.box_frame", b"")))
    if len(found) > 1:
        raise JobRefused(f"{parts.folder}: its parts state different box rules; they are of different jobs")
    box_format, box_frame = (value.decode("utf-8", errors="replace") for value in found.pop())
    if box_format not in get_args(BoxFormat) or box_frame not in get_args(BoxFrame):
        return None
    return BoxRules(box_format=cast(BoxFormat, box_format), box_frame=cast(BoxFrame, box_frame))


def _prompts(rows: pa.Table, rules: BoxRules | None) -> tuple[pa.Array, BoxRules, tuple[str, ...]]:
    """Return the boxes, what they are, and what is to be reported of them."""
    given = single(rows.column("prompt_bbox_given"))
    if rules is None or given.null_count == len(given):
        used = single(rows.column("prompt_bbox"))
        return pc.cast(used, NUMBERS), BoxRules(box_format="xywh", box_frame="upright"), ()
    notes: tuple[str, ...] = ()
    if given.null_count:
        notes = (f"{given.null_count} prompts of the earlier output had no box; they will have none again",)
    return given, rules, notes


def _check_numbers(rows: pa.Table, boxes: BoxList, folder: str) -> None:
    """Raise JobRefused unless the instances of each image are numbered 0, 1, 2 ... in order."""
    number = single(rows.column("instance_index")).to_numpy(zero_copy_only=False)
    every: Int64Array = np.arange(len(boxes.lengths), dtype=np.int64)
    found = number[boxes.rows_of(every)]
    wanted = np.arange(len(found)) - np.repeat(starts_of(boxes.lengths), boxes.lengths)
    if not np.array_equal(found, wanted):
        at: Any = np.searchsorted(np.cumsum(boxes.lengths), np.flatnonzero(found != wanted)[0], side="right")
        assert boxes.image_id is not None, "instances are grouped by image_id"
        raise JobRefused(
            f"{folder}: the instances of image {boxes.image_id[int(at)].as_py()!r} are not numbered from 0 "
            "without gaps; run `hqlabel validate` on it"
        )


def _check_counts(boxes: BoxList, images: pa.Table, folder: str) -> None:
    """Raise JobRefused unless each image has as many instances as its row states."""
    wanted = np.zeros(len(boxes.lengths), dtype=np.int64)
    wanted[: images.num_rows] = single(images.column("num_boxes")).to_numpy(zero_copy_only=False)
    unlike = np.flatnonzero(boxes.lengths != wanted)
    if len(unlike):
        assert boxes.image_id is not None, "instances are grouped by image_id"
        at = int(unlike[0])
        raise JobRefused(
            f"{folder}: image {boxes.image_id[at].as_py()!r} has {boxes.lengths[at]} instances, its row "
            f"states {wanted[at]}; run `hqlabel validate` on it"
        )
