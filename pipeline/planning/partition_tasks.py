"""The steps of a plan in partitions, each a function of one partition that can run anywhere.

`join_partition` joins, `find_doubles` and `judge_doubles` find images that are not told apart across
partitions, `rows_of_partition` makes rows of the plan, and `rows_of_range` those of a range of image ids, so
that the ranges one after the other are the plan: the very rows that `make_plan` gives for the same inputs.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import BoolArray, Int64Array, rows_sha256, single
from hqlabel.pipeline.inputs.box_tables import NO_URI, grouped_rows, labels_as_ids, with_boxes_alone
from hqlabel.pipeline.inputs.image_box_lists import TEXT, BoxList, ImageList, grouped_boxes, repeated
from hqlabel.pipeline.inputs.open_inputs import resolve_uris
from hqlabel.pipeline.job_context import AccessRules, BoxRules, Place
from hqlabel.pipeline.job_state.plan_files import UNITS_PER_FILE
from hqlabel.pipeline.planning.images_named_twice import NamedTwice
from hqlabel.pipeline.planning.join_boxes_to_images import (
    Joined,
    PartOf,
    Unmatched,
    comparable,
    doubled_rows,
    images_of,
    is_by_uri,
    join,
    likely,
    not_told_apart,
    refuse_most_doubled,
)
from hqlabel.pipeline.planning.key_hashes import UInt64Array, hash64, with_several
from hqlabel.pipeline.planning.make_plan import write_files
from hqlabel.pipeline.planning.partition_inputs import Piece, TableInputs, from_streams, to_stream
from hqlabel.pipeline.planning.plan_summary import (
    CheckedBoxes,
    JoinedInputs,
    RowCounts,
    checked_boxes,
    count_rows,
)
from hqlabel.pipeline.planning.plan_table import RefusedUris, number_categories, plan_table
from hqlabel.pipeline.schema import PLAN
from hqlabel.pipeline.storage.output_store import Store

_SAMPLED_IDS = 2000
"""Of a partition, to cut all ids into ranges of like size."""
_SAMPLED_KEYS = 2000
"""Of the boxes of a partition that have no image, to find out why."""
_MENTIONED = "mentioned by a box file"
"""A column next to those of the plan, while its ranges are made."""
CLASS_COLUMNS = {"category_id": pa.int32(), "category_name": TEXT}


@dataclass(frozen=True, kw_only=True)
class PartFacts:
    """What one partition has to be judged with the others.

    `rows`: of images, `again`: of these, such as say what others say, and the uris of some. `mentions`:
    images of the box file; `matched`: those with an image. `torn`: ids of the box file that name two images,
    and why the first does. `classes`: distinct ids and names of categories; `used_classes`: of boxes with
    an image alone. `columns`: of the boxes. `keys`, `missing`: some of
    the names by which images, and boxes without one, are known. `ids`: some image ids.
    """

    rows: int
    again: int
    again_uris: tuple[str, ...]
    mentions: int
    matched: int
    unmatched: Unmatched
    twice: NamedTwice
    torn: tuple[int, str]
    classes: pa.Table
    used_classes: pa.Table
    columns: tuple[str, ...]
    checked: CheckedBoxes
    keys: tuple[str, ...]
    missing: pa.Array
    ids: pa.Array
    id_rule: str


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The images and boxes of one partition, joined. `keys`: of its images, as they were compared."""

    boxes: BoxList | None
    joined: Joined
    keys: pa.Array


@dataclass(frozen=True, kw_only=True)
class JoinStep:
    """What `join_partition` is told: `most_checked` boxes are sampled, doubles found in `buckets`.

    `image_pieces`: how many of its pieces are of the table of images. `rules`: how boxes are read.
    """

    inputs: TableInputs
    part: PartOf
    image_pieces: int
    buckets: int
    most_checked: int


def join_partition(step: JoinStep, *pieces: Piece) -> list[Any]:
    """Return `PartFacts`, the `Partition`, and hashes of ids and uris for each bucket of `find_doubles`.

    Raises:
        JobRefused: an image whose id is empty.
    """
    inputs = step.inputs
    boxes, torn = (None, (0, "")) if inputs.boxes is None else _box_list(inputs, pieces[step.image_pieces :])
    if inputs.images is not None:
        images = _image_list(inputs, pieces[: step.image_pieces])
    else:
        assert boxes is not None, "there are images, or boxes that name them"
        images = images_of(boxes)
    joined = join(images, boxes, allow_unmatched=True, part=step.part)
    boxes = joined.boxes
    again = np.zeros(len(joined.image_id), dtype=np.bool_)
    if len(repeated(joined.image_id)):
        again = doubled_rows(joined)[0]
        joined = replace(joined, again=again if again.any() else None)
    by_uri = boxes is not None and is_by_uri(images, boxes)
    keys = comparable(joined.image_uri) if by_uri else joined.image_id
    facts = _facts(step, images, boxes, joined, keys, torn)
    return [
        facts,
        Partition(boxes=boxes, joined=joined, keys=keys),
        *_buckets(joined, ~again, step.buckets),
    ]


def _image_list(inputs: TableInputs, pieces: Sequence[Piece]) -> ImageList:
    rows = from_streams([streams[0] for piece in pieces for streams in piece])
    images = inputs.images
    assert images is not None, "the caller has checked"
    ids = single(rows.column("image_id")) if images.image_id is not None else None
    return replace(images, image_uri=single(rows.column("image_uri")), image_id=ids)


def _box_list(inputs: TableInputs, pieces: Sequence[Piece]) -> tuple[BoxList, tuple[int, str]]:
    """Return the boxes, and of how many ids they name two images, with the reason for the first."""
    whole = inputs.boxes
    assert whole is not None, "these inputs have boxes"
    names = [name for name in ("image_id", "image_uri") if getattr(whole, name) is not None]
    rows = from_streams([streams[0] for piece in pieces for streams in piece])
    if whole.one_row_per_image:
        columns = {name: single(rows.column(name)) for name in names}
        return replace(
            whole,
            **columns,
            lengths=rows.column("length").to_numpy(),
            is_null=rows.column("is_null").to_numpy(),
            error=single(rows.column("error")),
            boxes=from_streams([streams[1] for piece in pieces for streams in piece]).combine_chunks(),
        ), (0, "")
    table = rows.drop_columns(names).combine_chunks()
    keys = {name: rows.column(name).combine_chunks() for name in names}
    encoded = {name: pa.chunked_array([single(key).dictionary_encode()]) for name, key in keys.items()}
    groups = with_boxes_alone(grouped_rows(**encoded, is_part=True), table)
    own = grouped_boxes(groups, table, folder=whole.folder, box_format=whole.box_format, files=whole.files)
    reasons = own.error.drop_null()
    torn = (len(reasons), reasons[0].as_py() if len(reasons) else "")
    some = ("image_id", "image_uri", "lengths", "is_null", "error", "boxes", "rows")
    return replace(whole, **{name: getattr(own, name) for name in some}), torn


def _facts(
    step: JoinStep,
    images: ImageList,
    boxes: BoxList | None,
    joined: Joined,
    keys: pa.Array,
    torn: tuple[int, str],
) -> PartFacts:
    has_image = np.zeros(0 if boxes is None else len(boxes.lengths), dtype=np.bool_)
    has_image[joined.mention[joined.mention >= 0]] = True
    uris = joined.image_uri if joined.again is None else joined.image_uri.filter(pa.array(joined.again))
    sampled = JoinedInputs(
        access=step.inputs.access,
        images_per_unit=1,
        images=images,
        boxes=boxes,
        joined=joined,
        rules=BoxRules(),
        format_stated=True,
    )
    return PartFacts(
        rows=len(joined.image_id),
        again=0 if joined.again is None else int(joined.again.sum()),
        again_uris=() if joined.again is None else tuple(pc.unique(comparable(uris)).slice(0, 3).to_pylist()),
        mentions=len(has_image),
        matched=int(has_image.sum()),
        unmatched=joined.unmatched,
        twice=joined.twice,
        torn=torn,
        classes=_classes(boxes, np.ones(len(has_image), dtype=np.bool_)),
        used_classes=_classes(boxes, has_image),
        columns=() if boxes is None else tuple(boxes.boxes.column_names),
        checked=checked_boxes(sampled, step.most_checked),
        keys=tuple(keys.slice(0, 3).to_pylist()),
        missing=pa.array([], TEXT) if boxes is None else _missing(step, images, boxes, has_image),
        ids=_spread(joined.image_id, _SAMPLED_IDS),
        id_rule=joined.id_rule,
    )


def _missing(step: JoinStep, images: ImageList, boxes: BoxList, has_image: BoolArray) -> pa.Array:
    """Return some names of images that boxes have and no list of images, as they were compared."""
    lost = pa.array(~has_image & (boxes.lengths > 0))
    if is_by_uri(images, boxes) and boxes.image_uri is not None:
        names = comparable(resolve_uris(boxes.image_uri.filter(lost), step.part.uris_below))
    else:
        assert boxes.image_id is not None, "boxes are named by id or by uri"
        names = boxes.image_id.filter(lost)
    return _spread(names.drop_null(), _SAMPLED_KEYS)


def _spread(values: pa.Array, most: int) -> pa.Array:
    return values.take(
        pa.array(np.unique(np.linspace(0, len(values) - 1, min(len(values), most)).astype(np.int64)))
    )


def _classes(boxes: BoxList | None, has_image: BoolArray) -> pa.Table:
    """Return the distinct ids and names of the categories of some images' boxes."""
    if boxes is None:
        return pa.table({name: pa.array([], kind) for name, kind in CLASS_COLUMNS.items()})
    flat = np.flatnonzero(np.repeat(has_image, boxes.lengths))
    rows = pa.array(flat if boxes.rows is None else boxes.rows[flat])
    columns = {
        name: single(boxes.boxes.column(name)).take(rows)
        if name in boxes.boxes.column_names
        else pa.nulls(len(rows), kind)
        for name, kind in CLASS_COLUMNS.items()
    }
    return pa.table(columns).group_by(list(CLASS_COLUMNS)).aggregate([])


def likely_keys(partition: Partition, missing: pa.Array) -> pa.Array:
    """Return those keys of images that could be meant by names that have none, but for their spelling."""
    return likely(partition.keys, missing)


# ---------------------------------------------------------------------------------------------
# Images that are not told apart
# ---------------------------------------------------------------------------------------------


def _buckets(joined: Joined, is_first: BoolArray, buckets: int) -> list[tuple[UInt64Array, ...]]:
    """Return, by bucket, hashes of id and uri of rows by the id, and of uri and id of rows by the uri."""
    first = pa.array(is_first)
    ids = hash64(joined.image_id.filter(first))
    texts = comparable(joined.image_uri.filter(first))
    uris, named = hash64(texts), pc.not_equal(texts, NO_URI).to_numpy(zero_copy_only=False)
    by_id, by_uri = ids % np.uint64(buckets), uris % np.uint64(buckets)
    found: list[tuple[UInt64Array, ...]] = []
    for bucket in range(buckets):
        own, other = by_id == bucket, (by_uri == bucket) & named
        found.append((ids[own], uris[own], uris[other], ids[other]))
    return found


def find_doubles(*buckets: tuple[UInt64Array, ...]) -> tuple[UInt64Array, UInt64Array]:
    """Return hashes of the ids that have several uris, and of the uris with several ids, of one bucket."""
    ids, their_uris, uris, their_ids = (np.concatenate(columns) for columns in zip(*buckets, strict=True))
    return with_several(ids, their_uris), with_several(uris, their_ids)


def doubtful_rows(partition: Partition, ids: UInt64Array, uris: UInt64Array) -> pa.Table:
    """Return the images whose id or uri, by their hashes, is that of another one too."""
    joined = partition.joined
    chosen = _is_doubtful(joined, ids, uris)
    if joined.again is not None:
        chosen &= ~joined.again
    rows = pa.array(np.flatnonzero(chosen))
    return pa.table({"image_id": joined.image_id.take(rows), "image_uri": joined.image_uri.take(rows)})


def _is_doubtful(joined: Joined, ids: UInt64Array, uris: UInt64Array) -> BoolArray:
    by_id = np.isin(hash64(joined.image_id), ids)
    return np.asarray(by_id | np.isin(hash64(comparable(joined.image_uri)), uris))


def judge_doubles(of: int, is_box_file: bool, *tables: pa.Table) -> pa.Table:
    """Return what becomes of doubtful rows: those with an `error` fail with it, the others are left out.

    `of`: distinct images there are. Rows that only seemed to be doubtful are not returned.

    Raises:
        JobRefused: most images are not told apart.
    """
    rows = pa.concat_tables(tables)
    ids, uris = single(rows.column("image_id")), single(rows.column("image_uri"))
    nowhere = np.full(len(ids), -1, dtype=np.int64)
    joined = Joined(image_id=ids, image_uri=uris, mention=nowhere, unmatched=Unmatched(), id_rule="")
    _, by_id, by_uri = doubled_rows(joined)
    bad = np.flatnonzero(by_id | by_uri)
    refuse_most_doubled(joined, bad, of, by_id=bool(by_id.any()), is_box_file=is_box_file)
    errors, _ = not_told_apart(joined, bad)
    texts = pa.array([errors.get(row) for row in bad.tolist()], TEXT)
    at = pa.array(bad)
    return pa.table({"image_id": ids.take(at), "image_uri": uris.take(at), "error": texts})


def _as_judged(joined: Joined, verdict: pa.Table | None) -> Joined:
    """Return the images of a partition with what `judge_doubles` found of them."""
    if verdict is None or not verdict.num_rows:
        return joined
    errors = {(row["image_id"], row["image_uri"]): row["error"] for row in verdict.to_pylist()}
    ids, uris = (hash64(single(verdict.column(name))) for name in ("image_id", "image_uri"))
    again = np.zeros(len(joined.image_id), dtype=np.bool_) if joined.again is None else joined.again.copy()
    own: dict[int, str] = {}
    for row in np.flatnonzero(_is_doubtful(joined, ids, uris) & ~again).tolist():
        name = joined.image_id[row].as_py(), joined.image_uri[row].as_py()
        if name in errors and errors[name] is None:
            again[row] = True
        elif name in errors:
            own[row] = errors[name]
    return replace(joined, again=again, errors=own)


# ---------------------------------------------------------------------------------------------
# Rows of the plan
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RowsStep:
    """What `rows_of_partition` is told. `classes`: all there are; `used_alone`: of boxes with an image.

    `labels_are_ids`: of a CSV, of which all labels are integers.
    `edges`: the first image ids of all ranges but the first, sorted by their bytes.
    """

    access: AccessRules
    classes: pa.Table
    used_alone: bool
    labels_are_ids: bool
    edges: tuple[bytes, ...]


def rows_of_partition(step: RowsStep, partition: Partition, verdict: pa.Table | None) -> list[Any]:
    """Return how many images are in each range of ids, and then the rows of each range."""
    joined = _as_judged(partition.joined, verdict)
    boxes = None if partition.boxes is None else _with_classes(partition.boxes, joined, step)
    order = joined.listed()
    table = plan_table(joined, order, boxes, step.access, images_per_unit=1)
    mentioned = pa.array(joined.mention[order.to_numpy()] >= 0)
    table = table.drop_columns(["unit_id"]).append_column(_MENTIONED, mentioned)
    ids = joined.image_id.take(order)
    places = [
        bisect.bisect_left(range(len(ids)), one, key=lambda row: ids[row].as_py().encode())
        for one in step.edges
    ]
    starts = [0, *places, len(ids)]
    counts = np.diff(np.array(starts, dtype=np.int64))
    return [counts, *(to_stream(table.slice(*one)) for one in zip(starts, counts.tolist(), strict=False))]


def _with_classes(boxes: BoxList, joined: Joined, step: RowsStep) -> BoxList:
    """Return the boxes with category ids and names as all partitions number them.

    Every class there is becomes a row behind those of the boxes, which no image has.
    """
    own = boxes.boxes
    if step.labels_are_ids and "category_name" in own.column_names:
        own = labels_as_ids(own, boxes.files[0])
    more = pa.concat_tables([own, step.classes], promote_options="default").combine_chunks()
    used = None
    if step.used_alone:
        behind = np.arange(boxes.boxes.num_rows, more.num_rows)
        used = np.concatenate([boxes.rows_of(joined.mention[joined.mention >= 0]), behind])
    return number_categories(replace(boxes, boxes=more), used)[0]


@dataclass(frozen=True, kw_only=True)
class RangeStep:
    """What `rows_of_range` is told: it is rows `first` to `stop` of the plan, end-exclusive.

    `columns`: that the boxes have; `head`: rows at its beginning that other ranges may need. `places`: rows
    of the plan to return.
    """

    access: AccessRules
    images_per_unit: int
    first: int
    stop: int
    columns: tuple[str, ...]
    head: int
    places: Int64Array


@dataclass(frozen=True, kw_only=True)
class RangeFacts:
    """What is counted of a range. `versions`: whether a row has a source version; `some`: rows asked for."""

    counts: RowCounts
    refused: RefusedUris
    versions: bool
    some: pa.Table


def rows_of_range(step: RangeStep, *pieces: pa.Buffer) -> list[Any]:
    """Return `RangeFacts`, the rows of a range (schema.PLAN) by their ids, and the first of them."""
    rows = from_streams(pieces)
    order = pc.sort_indices(rows.column("image_id"))[: step.stop - step.first]
    rows = rows.take(order).combine_chunks()
    units = (np.arange(rows.num_rows) + step.first) // step.images_per_unit
    mentioned = rows.column(_MENTIONED).to_numpy()
    rows = rows.drop_columns([_MENTIONED]).add_column(0, PLAN.field("unit_id"), [pa.array(units, pa.int32())])
    rows = rows.cast(PLAN)
    own = step.places[(step.places >= step.first) & (step.places < step.stop)] - step.first
    facts = RangeFacts(
        counts=count_rows(rows, mentioned, step.columns),
        refused=RefusedUris.among(rows, step.access, is_part=True),
        versions=rows.column("source_version").null_count < rows.num_rows,
        some=rows.take(pa.array(own)),
    )
    return [facts, to_stream(rows), to_stream(rows.slice(0, step.head))]


def hash_ranges(rows: int, names: tuple[str, ...], ranges: Iterable[pa.Buffer]) -> str:
    """Return the hash of a plan; `names`: of its columns, `ranges`: its rows."""
    return rows_sha256(names, rows, (from_streams([one]) for one in ranges))


@dataclass(frozen=True, kw_only=True)
class WriteStep:
    """What `write_range` is told: `first`: the number of its first row, `files`: those to be written."""

    place: Place
    sha256: str
    images_per_unit: int
    first: int
    files: tuple[int, ...]


def write_range(step: WriteStep, *rows: pa.Buffer) -> None:
    """Write the files of a plan that begin in a range. `rows`: of the range, then those that follow it."""
    rows_per_file = UNITS_PER_FILE * step.images_per_unit
    file = -(-step.first // rows_per_file)
    table = from_streams(rows).slice(file * rows_per_file - step.first)
    write_files(Store(step.place), step.sha256, step.images_per_unit, table, file, step.files)
