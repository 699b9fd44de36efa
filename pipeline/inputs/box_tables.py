"""Tables of boxes, in the two shapes that there are: one row an image, or one row a box.

The shape follows from the column names: `boxes` (lists), or `bbox` or `x1, y1, x2, y2` (one box). Prompts
without a box are rows, or list entries, whose box is null. The order of the input is kept.

A row that names its image and nothing else, as a left join writes it, is an image without boxes, and so are
lists that such rows were gathered into; a row of nulls alone is none at all.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import (
    BoolArray,
    Int64Array,
    list_lengths,
    null_mask,
    ranges,
    single,
    starts_of,
    to_lists,
)
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.inputs.columns import CORNERS, UNUSABLE, Kind, RowFaults, locate, readable
from hqlabel.pipeline.inputs.image_box_lists import (
    BOX_COLUMNS,
    NUMBERS,
    TEXT,
    BoxList,
    Groups,
    examples,
    group_rows,
    grouped_boxes,
)
from hqlabel.pipeline.inputs.propose_columns import (
    BOX_ROWS,
    IMAGE_ROWS,
    KEYS,
    known_names,
    missing_column,
    missing_columns,
    unclear_columns,
    unread_note,
)
from hqlabel.pipeline.inputs.read_table import TableFile, inspect_tables, naming_values, read_batches
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.settings import BoxFormat


@dataclass(frozen=True, kw_only=True)
class BoxTables:
    """The checked files of one table of boxes. `one_row_per_image`: a row holds the lists of an image.

    `box_format`: of the numbers, by their columns; None where these do not say. `unused`, `notes`: for the
    summary.
    """

    files: tuple[TableFile, ...]
    one_row_per_image: bool
    box_format: BoxFormat | None
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def read_box_tables(
    uris: Sequence[str],
    mapping: Mapping[str, str],
    access: AccessRules,
    *,
    folder: str,
    box_format: BoxFormat | None = None,
    needs_uri: bool = True,
) -> BoxList:
    """Return the boxes of one table, kept in one file or in several of the same columns.

    `box_format`: as the user stated it. `needs_uri`: nothing else says where the images are.

    Raises:
        JobRefused: unreadable, a missing column or a wrong type, two columns that could be meant, an image
            without a name.
    """
    tables = inspect_box_tables(
        uris, mapping, access, folder=folder, box_format=box_format, needs_uri=needs_uri
    )
    read = _read_image_rows if tables.one_row_per_image else _read_box_rows
    boxes = read(tables.files, access, folder)
    return replace(
        boxes,
        used=tables.files[0].names,
        box_format=tables.box_format or boxes.box_format,
        unused=tables.unused,
        notes=(*boxes.notes, *tables.notes),
    )


def inspect_box_tables(
    uris: Sequence[str],
    mapping: Mapping[str, str],
    access: AccessRules,
    *,
    folder: str,
    box_format: BoxFormat | None = None,
    needs_uri: bool = True,
) -> BoxTables:
    """Return the files of a table of boxes, their columns found and checked; arguments as `read_box_tables`.

    Raises:
        JobRefused: as `read_box_tables`, but for what a row holds.
    """
    given, first = mapping, inspect_tables(uris[:1], {}, mapping, access)[0]
    names = first.all_names
    known = known_names(first, mapping, access, box_format=box_format, needs_uri=needs_uri)
    mapping = known.mapping
    wanted = _shape(names, mapping, uri=uris[0])
    if wanted is None or not locate(names, KEYS, mapping, uri=uris[0]):
        raise missing_columns(uris[0], names, given, access, unclear=known.unclear)
    if known.unclear:
        raise unclear_columns(uris[0], given, known.unclear)
    files = inspect_tables(uris, wanted, mapping, access)
    for file in files:
        if not {"image_uri", "image_id"} & file.names.keys():
            raise missing_column(file.uri, "image_uri or image_id", file.all_names, mapping)
    unused = unused_columns(files[0])
    return BoxTables(
        files=files,
        one_row_per_image=wanted is IMAGE_ROWS,
        box_format=known.box_format,
        unused=unused,
        notes=(*_partition_note(files[0], folder), *unread_note(files[0], unused, mapping)),
    )


def _shape(names: Sequence[str], mapping: Mapping[str, str], *, uri: str) -> dict[str, Kind] | None:
    """Return the columns of the shape that a table has; None where it lacks columns for its boxes."""
    lists = locate(names, {"boxes": Kind(2, "number")}, mapping, uri=uri)
    single = locate(names, {name: Kind(0, "number") for name in ("bbox", *CORNERS)}, mapping, uri=uri)
    if {"prompt_bbox", "prompt_bbox_given"} <= set(names):
        raise JobRefused(f"{uri}: this table was written by hqlabel; give its output folder as --boxes")
    corners = [name for name in CORNERS if name in single]
    if bool(lists) + ("bbox" in single) + bool(corners) > 1:
        raise JobRefused(
            f"{uri}: the boxes are there more than once ({', '.join([*lists, *single])}); "
            "leave one of them, or give the one that is meant an own column name"
        )
    if (not lists and not single) or (corners and len(corners) < len(CORNERS)):
        return None
    return IMAGE_ROWS if lists else BOX_ROWS


# ---------------------------------------------------------------------------------------------
# Columns that are missing, or not used
# ---------------------------------------------------------------------------------------------

_INDEX = ("", "Unnamed: 0", "__index_level_0__")
"""What pandas calls the numbers of the rows."""


def unused_columns(file: TableFile) -> tuple[str, ...]:
    """Return the columns of a table that are not read, without pandas' numbers of the rows."""
    used = {*file.names.values(), *_INDEX}
    return tuple(name for name in file.all_names if name not in used)


def _partition_note(file: TableFile, folder: str) -> tuple[str, ...]:
    """Return a sentence where folders are called `label=cat`, as partitioned tables keep columns."""
    names = re.findall(r"(?<=/)(\w+)=[^/]*(?=/)", file.uri.removeprefix(folder))
    lost = [name for name in names if name not in file.all_names]
    if not lost:
        return ()
    return (f"{file.uri}: {', '.join(lost)} of its folders is not read; write it as a column of the files",)


# ---------------------------------------------------------------------------------------------
# One row an image
# ---------------------------------------------------------------------------------------------


def named_rows(batch: pa.Table, faults: RowFaults) -> tuple[dict[str, pa.Array], pa.Table]:
    """Return the columns that name the image, as text, and the rows themselves, without those that name none.

    Rows of nulls alone are left out, and so are rows that name no image though they hold something else,
    which are counted as faults. A row that lacks one of two names has the other, and is counted too.
    """
    keys = {name: as_names(batch.column(name)) for name in KEYS if name in batch.column_names}
    lacks = {name: null_mask(column) for name, column in keys.items()}
    if not any(lack.any() for lack in lacks.values()):
        faults.lacking(dict.fromkeys(lacks, ()), rows_there=batch.num_rows, blank=0)
        return keys, batch
    others = [name for name in batch.column_names if name not in keys]
    blank = _blank(batch) if others else np.zeros(batch.num_rows, dtype=np.bool_)
    new = ~blank
    if UNUSABLE in others:
        new &= null_mask(single(batch.column(UNUSABLE)))
    rows = {name: np.flatnonzero(lack & new).tolist() for name, lack in lacks.items()}
    faults.lacking(rows, rows_there=batch.num_rows, blank=int(blank.sum()))
    kept = pa.array(~blank & ~np.logical_and.reduce(list(lacks.values())))
    return {name: column.filter(kept) for name, column in keys.items()}, batch.filter(kept)


def as_names(names: pa.ChunkedArray) -> pa.Array:
    """Return names as text; empty ones, which name nothing, as null."""
    texts = pc.cast(single(names), TEXT)
    blank = pc.equal(texts, "")
    return pc.if_else(blank, pa.scalar(None, TEXT), texts) if pc.any(blank).as_py() else texts


def _blank(rows: pa.Table) -> BoolArray:
    """Return true for the rows of which every column is null, as spreadsheets leave them at their end."""
    blank = np.ones(rows.num_rows, dtype=np.bool_)
    for column in rows.columns:
        blank &= null_mask(column.combine_chunks())
    return blank


def completed_ids(image_id: pa.Array, image_uri: pa.Array) -> pa.Array:
    """Return the ids, null ones replaced by the id that other rows give the uri, or else by the uri."""
    if not image_id.null_count:
        return image_id
    both = pc.and_(image_id.is_valid(), image_uri.is_valid())
    at = pc.index_in(image_uri, image_uri.filter(both), skip_nulls=True)
    return pc.coalesce(image_id, image_id.filter(both).take(at), image_uri)


NO_URI = ""
"""The uri of an image that has none: no rule lets it be opened, so its row fails."""


def _read_image_rows(files: Sequence[TableFile], access: AccessRules, folder: str) -> BoxList:
    faults = RowFaults(files[0].uri)
    batches = ((file.uri, batch) for file in files for batch in read_batches(file, access, faults))
    boxes = boxes_of_rows(batches, tuple(files[0].names), faults, folder=folder, box_format="xyxy")
    return replace(
        boxes,
        boxes=_settled([boxes.boxes], files),
        files=tuple(file.uri for file in files),
        columns=files[0].all_names,
    )


def boxes_of_rows(
    batches: Iterable[tuple[str, pa.Table]],
    names: Collection[str],
    faults: RowFaults,
    *,
    folder: str,
    box_format: BoxFormat,
) -> BoxList:
    """Return the boxes of rows that are one image each, from tables with columns of IMAGE_ROWS.

    `batches`: rows with the uri of the file that they are of, each as `faults.add` returned it. `names`: the
    columns that they have.

    Raises:
        JobRefused: a column of which most values cannot be used.
    """
    parts: list[pa.Table] = []
    boxes: list[pa.Table] = []
    for uri, batch in batches:
        with naming_values(uri):
            keys, named = named_rows(batch, faults)
            part, flat = _flatten(named)
            part, own = _without_empty(part, pa.table(_entry_columns(flat, part, faults)))
            parts.append(pa.table(keys | part))
            boxes.append(own)
    faults.refuse_bad_columns()
    empty = {name: pa.array([], TEXT) for name in KEYS if name in names}
    empty |= {"length": pa.array([], pa.int64()), "is_null": pa.array([], pa.bool_())}
    images = pa.concat_tables([pa.table(empty | {"error": pa.array([], TEXT)}), *parts])
    ids = single(images.column("image_id")) if "image_id" in names else None
    uris = single(images.column("image_uri")) if "image_uri" in names else None
    if ids is not None and uris is not None:
        ids = completed_ids(ids, uris)
    return BoxList(
        image_id=ids,
        image_uri=None if uris is None else pc.fill_null(uris, NO_URI),
        lengths=images.column("length").to_numpy(),
        is_null=images.column("is_null").to_numpy(),
        error=single(images.column("error")),
        boxes=_joined(boxes),
        rows=None,
        folder=folder,
        box_format=box_format,
        one_row_per_image=True,
        notes=faults.notes(COST_OF_LISTS),
    )


COST_OF_LISTS = "images fail (labels_mismatch, uri_refused), rows without an image are left out"


def _entry_columns(
    flat: Mapping[str, pa.Array], image: dict[str, pa.Array], faults: RowFaults
) -> dict[str, pa.Array]:
    """Return `box_columns` of the entries of lists; one that cannot be used fails its image."""
    found: dict[int, str] = {}
    columns = box_columns(flat, found)
    faults.unlike(found, len(columns["given"]))
    if found:
        ends = np.cumsum(image["length"].to_numpy())
        at = {int(np.searchsorted(ends, row, side="right")): text for row, text in found.items()}
        texts = pa.array([at.get(row) for row in range(len(ends))], TEXT)
        image["error"] = pc.coalesce(image["error"], texts)
    return columns


def _flatten(batch: pa.Table) -> tuple[dict[str, pa.Array], dict[str, pa.Array]]:
    """Return each image's length, is_null and error, and its lists as columns, one row a box."""
    lists = {name: batch.column(name).combine_chunks() for name in batch.column_names if name not in KEYS}
    boxes = lists.pop("boxes")
    lengths, is_null = list_lengths(boxes), null_mask(boxes)
    error = lists.pop(UNUSABLE, pa.nulls(len(boxes), TEXT))
    flat = {"given": boxes.flatten()}
    for name, column in lists.items():
        flat[_ENTRY_NAMES[name]], differs = align(column, lengths)
        differs &= ~is_null
        if differs.any():
            error = pc.coalesce(error, _mismatch(name, column, lengths, differs))
    image = {"length": pa.array(lengths), "is_null": pa.array(is_null), "error": error}
    return image, flat


def _without_empty(image: dict[str, pa.Array], boxes: pa.Table) -> tuple[dict[str, pa.Array], pa.Table]:
    """Return the same without the boxes of images that have none but empty ones: a left join put into lists.

    Where they have anything else, or lists differ in length, they are kept: as broken boxes, with a reason.
    """
    given = single(boxes.column("given"))
    # [[]] is no join's: a detector wrote a box without numbers
    empty = _is_empty(boxes) & ((list_lengths(given) > 0) | null_mask(given))
    if not empty.any():
        return image, boxes
    lengths = image["length"].to_numpy()
    of_image = np.repeat(np.arange(len(lengths)), lengths)
    full = np.bincount(of_image[~empty], minlength=len(lengths)) > 0
    kept = full | image["error"].is_valid().to_numpy(zero_copy_only=False)
    return image | {"length": pa.array(np.where(kept, lengths, 0))}, boxes.filter(pa.array(kept[of_image]))


# the list of an image -> the name of one entry, as in BOX_ROWS
_ENTRY_NAMES = {
    "labels": "label",
    "scores": "score",
    "box_ids": "box_id",
    "points": "points",
    "point_labels": "point_labels",
    "prompt_mask": "prompt_mask",
    "iscrowd": "iscrowd",
}


def align(lists: pa.Array, lengths: Int64Array) -> tuple[pa.Array, BoolArray]:
    """Return one entry a box: the lists' values, null where a list is null or has not the boxes' length.

    Returns them with the mask of the lists that are not null and yet of another length.
    """
    own, null = list_lengths(lists), null_mask(lists)
    differs = ~null & (own != lengths)
    if not (own != lengths).any():
        return lists.flatten(), differs
    fits = own == lengths
    index = np.where(np.repeat(fits, lengths), ranges(starts_of(own), lengths), 0)
    return lists.flatten().take(pa.array(index, mask=~np.repeat(fits, lengths))), differs


def _mismatch(name: str, lists: pa.Array, lengths: Int64Array, differs: BoolArray) -> pa.Array:
    own, wanted = (pc.cast(pa.array(counts), pa.string()) for counts in (list_lengths(lists), lengths))
    text = pc.binary_join_element_wise(f"{name} has", own, "values for", wanted, "boxes", " ")
    return pc.if_else(pa.array(differs), pc.cast(text, TEXT), pa.scalar(None, TEXT))


# ---------------------------------------------------------------------------------------------
# One row a box
# ---------------------------------------------------------------------------------------------


def _read_box_rows(files: Sequence[TableFile], access: AccessRules, folder: str) -> BoxList:
    keys: dict[str, list[pa.Array]] = {"image_id": [], "image_uri": []}
    boxes: list[pa.Table] = []
    faults = RowFaults(files[0].uri)
    for named_by, part in box_rows(files, access, faults):
        for name, column in named_by.items():
            keys[name].append(column.dictionary_encode())
        boxes.append(part)
    faults.refuse_bad_columns()
    encoded = pa.dictionary(pa.int32(), TEXT)
    named = {n: pa.chunked_array(parts, encoded) for n, parts in keys.items() if n in files[0].names}
    table = _settled(boxes, files)
    groups = with_boxes_alone(grouped_rows(**named), table)
    uris = [file.uri for file in files]
    grouped = grouped_boxes(groups, table, folder=folder, box_format="xyxy", files=uris)
    notes = (*faults.notes(COST_OF_ROWS), *spaced_names(table, files[0].uri))
    return replace(grouped, columns=files[0].all_names, notes=notes)


COST_OF_ROWS = (
    "boxes get no mask (box_malformed), images without a uri fail, rows without an image are left out"
)


def box_rows(
    files: Sequence[TableFile], access: AccessRules, faults: RowFaults
) -> Iterator[tuple[dict[str, pa.Array], pa.Table]]:
    """Yield rows that are one box each, in order: the columns that name their image, and BOX_COLUMNS."""
    for file in files:
        for batch in read_batches(file, access, faults):
            with naming_values(file.uri):
                named_by, rows = named_rows(batch, faults)
                boxes = pa.table(_single_boxes(rows, faults))
            yield named_by, boxes


def grouped_rows(
    image_id: pa.ChunkedArray | None = None,
    image_uri: pa.ChunkedArray | None = None,
    *,
    is_part: bool = False,
) -> Groups:
    """Return rows grouped by their image; where a row lacks one of two names, by the other.

    Both are dictionary-encoded. `is_part`: as in `group_rows`.
    """
    if image_id is not None and image_uri is not None and image_id.null_count:
        decoded = (single(pc.cast(names, TEXT)) for names in (image_id, image_uri))
        image_id = pa.chunked_array([completed_ids(*decoded).dictionary_encode()])
    groups = group_rows(image_id, image_uri, is_part=is_part)
    return replace(
        groups, image_uri=None if groups.image_uri is None else pc.fill_null(groups.image_uri, NO_URI)
    )


def with_boxes_alone(groups: Groups, boxes: pa.Table) -> Groups:
    """Return the groups without rows that hold no box: an image of such rows alone is one without boxes.

    `boxes`: columns of BOX_COLUMNS, one row for each row that was grouped. A row without a number of a box,
    and with nothing else either, is what a left join writes for an image without boxes; a row of which
    anything is given, be it a label or one corner, is a box, good or bad.
    """
    empty = _is_empty(boxes)
    if not empty.any():
        return groups
    rows = np.arange(len(empty)) if groups.rows is None else groups.rows
    kept = ~empty[rows]
    image = np.repeat(np.arange(len(groups.lengths)), groups.lengths)
    lengths = np.bincount(image[kept], minlength=len(groups.lengths)).astype(np.int64)
    return replace(groups, lengths=lengths, rows=rows[kept])


def _is_empty(boxes: pa.Table) -> BoolArray:
    """Return true for rows without a number of a box and without anything next to."""
    empty = _no_number(single(boxes.column("given")))
    for name in boxes.column_names if empty.any() else ():
        column = single(boxes.column(name))
        if name == "score":
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        if name != "given":
            empty &= null_mask(column)
    return empty


def _no_number(given: pa.Array) -> BoolArray:
    """Return true for lists that are null, empty, or hold nulls alone."""
    lengths, values = list_lengths(given), given.flatten()
    if not values.null_count:
        return np.asarray(lengths == 0)
    there = np.repeat(np.arange(len(given)), lengths)[~null_mask(values)]
    return np.asarray(np.bincount(there, minlength=len(given)) == 0)


def spaced_names(table: pa.Table, uri: str) -> tuple[str, ...]:
    """Return a sentence where names of categories begin or end with white space, as in a CSV of `a, b`."""
    if "category_name" not in table.column_names:
        return ()
    names = pc.unique(table.column("category_name")).drop_null()
    odd = names.filter(pc.match_substring_regex(names, r"\A\s|\s\z"))
    if not len(odd):
        return ()
    return (f"{uri}: labels begin or end with white space, such as {examples(odd, 1)}; it is kept",)


def _single_boxes(batch: pa.Table, faults: RowFaults) -> dict[str, pa.Array]:
    """Return the columns of a batch, one row a box, as BOX_COLUMNS."""
    columns = {name: batch.column(name).combine_chunks() for name in batch.column_names if name not in KEYS}
    reasons = columns.pop(UNUSABLE, None)
    return usable_boxes(_with_given(columns), reasons, faults)


def usable_boxes(
    flat: Mapping[str, pa.Array], reasons: pa.Array | None, faults: RowFaults
) -> dict[str, pa.Array]:
    """Return `box_columns`; a row of which something cannot be used has a box that is not four numbers.

    `reasons`: the column UNUSABLE of the rows, if there is one. `faults` gets what is not in it.
    """
    found: dict[int, str] = {}
    columns = box_columns(flat, found)
    rows = len(next(iter(columns.values())))
    faults.unlike(found, rows)
    bad = np.zeros(rows, dtype=np.bool_) if reasons is None else ~null_mask(reasons)
    bad[list(found)] = True
    if bad.any():
        given = columns.get("given", pa.nulls(rows, NUMBERS))
        at = pa.array(np.where(bad, rows, np.arange(rows)))
        columns["given"] = pa.concat_arrays([given, pa.array([[math.nan]], NUMBERS)]).take(at)
    return columns


def _with_given(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """Return plain columns with the box as `given`."""
    if "bbox" in columns:
        return {"given": columns.pop("bbox")} | columns
    corners = [columns.pop(name) for name in CORNERS]
    null_N4 = np.stack([null_mask(corner) for corner in corners], axis=1)
    value_N4 = np.stack([corner.to_numpy(zero_copy_only=False) for corner in corners], axis=1)
    all_null: BoolArray = np.asarray(null_N4.all(axis=1))
    lengths = np.where(all_null, 0, len(CORNERS)).astype(np.int64)
    values = pa.array(value_N4[~all_null].reshape(-1), mask=null_N4[~all_null].reshape(-1))
    return {"given": to_lists(lengths, values, kind=NUMBERS, null=all_null)} | columns


# ---------------------------------------------------------------------------------------------
# Both shapes
# ---------------------------------------------------------------------------------------------


def box_columns(flat: Mapping[str, pa.Array], found: dict[int, str] | None = None) -> dict[str, pa.Array]:
    """Return columns of BOX_COLUMNS from plain ones with one row a box, named as in BOX_ROWS.

    `found` gets the boxes with a category that does not fit 32 bits, or a flag of neither 0 nor 1: these
    become null.

    Raises:
        pa.ArrowInvalid: categories are there twice; without `found`, such a box.
    """
    columns: dict[str, pa.Array] = {}
    for name, column in flat.items():
        is_number = pa.types.is_integer(column.type) or pa.types.is_decimal(column.type)
        target = "category_id" if name == "label" and is_number else _TARGETS[name]
        if target in columns:
            raise pa.ArrowInvalid("integer labels and category_id are both given; leave one of them out")
        rows: dict[int, str] = {}
        columns[target] = readable(column, functools.partial(_as_target, name=name, target=target), rows)
        if rows and found is None:
            raise pa.ArrowInvalid(next(iter(rows.values())))
        if found is not None:
            found.update(rows)
    return columns


def _as_target(column: pa.Array, name: str, target: str) -> pa.Array:
    try:
        if name in _CONVERTED:
            column = _CONVERTED[name](column)
        return pc.cast(column, BOX_COLUMNS[target])
    except pa.ArrowInvalid as error:
        raise pa.ArrowInvalid(f"{name}: {error}") from error


def _bounded_labels(labels: pa.Array) -> pa.Array:
    """Return the labels, those out of range as 2: no label (`prompt_invalid`), and a number of 32 bits."""
    values = labels.flatten()
    known = pc.is_in(values, pa.array([1, 0, -1], values.type))
    values = pc.if_else(pc.or_(known, values.is_null()), values, pa.scalar(2, values.type))
    return to_lists(list_lengths(labels), values, kind=pa.list_(values.type), null=null_mask(labels))


_SAME_NAMES = ("given", "category_id", "score", "box_id", "point_labels", "prompt_mask", "iscrowd")
_TARGETS = {"label": "category_name", "points": "points_xy"} | {name: name for name in _SAME_NAMES}


def crowds(flags: pa.Array) -> pa.Array:
    """Return True where a flag means crowd, else null; flags: booleans, or 0 and 1 as numbers or text.

    Raises:
        pa.ArrowInvalid: another value, which could mean either.
    """
    words = pc.utf8_lower(pc.utf8_trim_whitespace(pc.cast(flags, TEXT)))
    known = pc.is_in(words, pa.array([*_CROWD, *_NO_CROWD, None], TEXT))
    if not pc.all(known).as_py() and len(flags):
        odd = flags.filter(pc.invert(known))[0].as_py()
        raise pa.ArrowInvalid(f"iscrowd holds {odd!r}; wanted 0, 1, true or false")
    return pc.if_else(pc.is_in(words, pa.array(_CROWD, TEXT)), True, pa.scalar(None, pa.bool_()))


_CROWD, _NO_CROWD = ("1", "1.0", "true"), ("0", "0.0", "-0", "-0.0", "false", "", "nan")


def flatten_points(points: pa.Array) -> pa.Array:
    """Return lists of [x, y] -> lists x, y, x, y ...; a point that is not two numbers becomes one NaN.

    That NaN makes the prompt unusable later (`prompt_invalid`), instead of shifting its other points.
    """
    counts = list_lengths(points)
    inner = points.flatten()
    sizes, values = list_lengths(inner), inner.flatten()
    sound = sizes == 2
    taken = np.where(sound, 2, 1)
    index = np.minimum(ranges(starts_of(sizes), taken), max(0, len(values) - 1))
    flat = pc.fill_null(values.take(pa.array(index, mask=~np.repeat(sound, taken))), float("nan"))
    ends = np.concatenate([[0], np.cumsum(taken)])
    lengths = ends[np.cumsum(counts)] - ends[starts_of(counts)]
    return to_lists(lengths, flat, kind=NUMBERS, null=null_mask(points))


_CONVERTED = {"points": flatten_points, "point_labels": _bounded_labels, "iscrowd": crowds}


def _joined(boxes: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(boxes).combine_chunks() if boxes else pa.table({"given": pa.array([], NUMBERS)})


_WHOLE = r"\A(0|-?[1-9][0-9]{0,9})(\.0)?\z"
"""An integer, or one that became a float next to gaps, as pandas writes it."""


def _settled(boxes: Sequence[pa.Table], files: Sequence[TableFile]) -> pa.Table:
    """Return the parts as one table; labels of a CSV that are all integers become category ids."""
    table = _joined(boxes)
    if files[0].file_format != "csv" or not are_labels_ids(table):
        return table
    return labels_as_ids(table, files[0].uri)


def are_labels_ids(table: pa.Table) -> bool:
    """Return whether all labels of a CSV are integers."""
    if "category_name" not in table.column_names:
        return False
    names = table.column("category_name")
    return names.null_count < len(names) and bool(pc.all(pc.match_substring_regex(names, _WHOLE)).as_py())


def labels_as_ids(table: pa.Table, uri: str) -> pa.Table:
    """Return the boxes of a CSV with its labels, all integers, as category ids.

    Raises:
        JobRefused: it has category ids too, or a label is too large for one.
    """
    if "category_id" in table.column_names:
        raise JobRefused(f"{uri}: integer labels and category_id are both given; leave one of them out")
    with naming_values(uri):
        ids = pc.cast(pc.replace_substring_regex(table.column("category_name"), r"\.0\z", ""), pa.int32())
    return table.drop_columns(["category_name"]).append_column("category_id", ids)
