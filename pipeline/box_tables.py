"""Tables of boxes, in the two shapes that people have: one row an image, or one row a box.

The shape is told by the column names: `boxes` (lists), or `bbox` or `x1, y1, x2, y2` (one box). Prompts
without a box are rows, or list entries, whose box is null. The order of the input is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import (
    BoolArray,
    Int64Array,
    list_lengths,
    null_mask,
    ranges,
    single,
    starts_of,
    to_lists,
)
from pipeline.columns import Kind, locate, missing_column
from pipeline.errors import JobRefused
from pipeline.listings import BOX_COLUMNS, NUMBERS, TEXT, BoxList, group_rows, grouped_boxes
from pipeline.records import AccessRules, BoxFormat
from pipeline.tables import TableFile, inspect_tables, naming_values, read_batches

KEYS = {"image_uri": Kind(0, "text"), "image_id": Kind(0, "key")}

# One row an image: every list has one entry a box.
IMAGE_ROWS: dict[str, Kind] = KEYS | {
    "boxes": Kind(2, "number"),
    "labels": Kind(1, "key"),
    "scores": Kind(1, "number"),
    "box_ids": Kind(1, "key"),
    "points": Kind(3, "number"),
    "point_labels": Kind(2, "integer"),
    "prompt_mask": Kind(1, "rle"),
    "iscrowd": Kind(1, "flag"),
}

_CORNERS = ("x1", "y1", "x2", "y2")
BOX_ROWS: dict[str, Kind] = KEYS | {
    "bbox": Kind(1, "number"),
    **dict.fromkeys(_CORNERS, Kind(0, "number")),
    "label": Kind(0, "key"),
    "category_id": Kind(0, "integer"),
    "score": Kind(0, "number"),
    "box_id": Kind(0, "key"),
    "points": Kind(2, "number"),
    "point_labels": Kind(1, "integer"),
    "prompt_mask": Kind(0, "rle"),
    "iscrowd": Kind(0, "flag"),
}


def read_box_tables(
    uris: Sequence[str], mapping: Mapping[str, str], access: AccessRules, *, folder: str
) -> BoxList:
    """The boxes of one table, kept in one file or in several of the same columns.

    Raises:
        JobRefused: unreadable, a missing column or a wrong type, an image without a name.
    """
    names = inspect_tables(uris[:1], {}, mapping, access)[0].all_names
    wanted = _shape(names, mapping, uri=uris[0])
    files = inspect_tables(uris, wanted, mapping, access)
    for file in files:
        if not {"image_uri", "image_id"} & file.names.keys():
            raise missing_column(file.uri, "image_uri or image_id", file.all_names)
    read = _read_image_rows if wanted is IMAGE_ROWS else _read_box_rows
    return read(files, access, folder)


def _shape(names: Sequence[str], mapping: Mapping[str, str], *, uri: str) -> dict[str, Kind]:
    lists = locate(names, {"boxes": Kind(2, "number")}, mapping, uri=uri)
    single = locate(names, {name: Kind(0, "number") for name in ("bbox", *_CORNERS)}, mapping, uri=uri)
    if {"prompt_bbox", "prompt_bbox_given"} <= set(names):
        raise JobRefused(f"{uri}: this table was written by hqlabel; give its output folder as --boxes")
    corners = [name for name in _CORNERS if name in single]
    if bool(lists) + ("bbox" in single) + bool(corners) > 1:
        raise JobRefused(
            f"{uri}: the boxes are there more than once ({', '.join([*lists, *single])}); "
            "leave one of them, or say which by a column name of its own"
        )
    if corners and len(corners) < len(_CORNERS):
        lacking = next(name for name in _CORNERS if name not in corners)
        raise missing_column(uri, lacking, names)
    if not lists and not single:
        raise missing_column(uri, "boxes or bbox or x1", names)
    return IMAGE_ROWS if lists else BOX_ROWS


def image_keys(batch: pa.Table, uri: str, first_row: int) -> dict[str, pa.Array]:
    """The columns that name the image, as text; JobRefused for a null. `first_row`: for the message."""
    keys = {name: batch.column(name).combine_chunks() for name in KEYS if name in batch.column_names}
    for name, column in keys.items():
        if column.null_count:
            row = first_row + int(np.flatnonzero(null_mask(column))[0])
            raise JobRefused(f"{uri}: {name} is null in row {row} (from 0); every row must name its image")
    return {name: pc.cast(column, TEXT) for name, column in keys.items()}


def _read_image_rows(files: Sequence[TableFile], access: AccessRules, folder: str) -> BoxList:
    batches = ((file.uri, batch) for file in files for batch in read_batches(file, access))
    boxes = boxes_of_rows(batches, tuple(files[0].names), folder=folder, box_format="xyxy")
    return replace(
        boxes,
        boxes=_settled([boxes.boxes], files),
        files=tuple(file.uri for file in files),
        columns=files[0].all_names,
    )


def boxes_of_rows(
    batches: Iterable[tuple[str, pa.Table]], names: Collection[str], *, folder: str, box_format: BoxFormat
) -> BoxList:
    """The boxes of rows that are one image each, from tables with columns of IMAGE_ROWS.

    `batches`: rows with the uri of the file that they are of. `names`: the columns that they have.
    """
    parts: list[pa.Table] = []
    boxes: list[pa.Table] = []
    rows: dict[str, int] = {}
    for uri, batch in batches:
        with naming_values(uri):
            part, flat = _flatten(batch)
            parts.append(pa.table(image_keys(batch, uri, rows.get(uri, 0)) | part))
            boxes.append(pa.table(box_columns(flat)))
        rows[uri] = rows.get(uri, 0) + batch.num_rows
    images = pa.concat_tables([_no_images(names), *parts])
    return BoxList(
        image_id=single(images.column("image_id")) if "image_id" in names else None,
        image_uri=single(images.column("image_uri")) if "image_uri" in names else None,
        lengths=images.column("length").to_numpy(),
        is_null=images.column("is_null").to_numpy(),
        error=single(images.column("error")),
        boxes=_joined(boxes),
        rows=None,
        folder=folder,
        box_format=box_format,
        one_row_per_image=True,
    )


def _no_images(names: Collection[str]) -> pa.Table:
    keys = {name: pa.array([], TEXT) for name in KEYS if name in names}
    known = {"length": pa.array([], pa.int64()), "is_null": pa.array([], pa.bool_())}
    return pa.table(keys | known | {"error": pa.array([], TEXT)})


def _flatten(batch: pa.Table) -> tuple[dict[str, pa.Array], dict[str, pa.Array]]:
    """What is known of each image (length, is_null, error), and its lists as columns, one row a box."""
    lists = {name: batch.column(name).combine_chunks() for name in batch.column_names if name not in KEYS}
    boxes = lists.pop("boxes")
    lengths, is_null = list_lengths(boxes), null_mask(boxes)
    error = pa.nulls(len(boxes), TEXT)
    flat = {"given": boxes.flatten()}
    for name, column in lists.items():
        flat[_ENTRY_NAMES[name]], differs = align(column, lengths)
        differs &= ~is_null
        if differs.any():
            error = pc.coalesce(error, _mismatch(name, column, lengths, differs))
    image = {"length": pa.array(lengths), "is_null": pa.array(is_null), "error": error}
    return image, flat


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
    """One entry a box: the lists' values, null where a list is null or of another length than the boxes.

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


def _read_box_rows(files: Sequence[TableFile], access: AccessRules, folder: str) -> BoxList:
    keys: dict[str, list[pa.Array]] = {"image_id": [], "image_uri": []}
    boxes: list[pa.Table] = []
    for file in files:
        row = 0
        for batch in read_batches(file, access):
            with naming_values(file.uri):
                for name, column in image_keys(batch, file.uri, row).items():
                    keys[name].append(column.dictionary_encode())
                boxes.append(pa.table(box_columns(_single_boxes(batch))))
            row += batch.num_rows
    encoded = pa.dictionary(pa.int32(), TEXT)
    named = {n: pa.chunked_array(parts, encoded) for n, parts in keys.items() if n in files[0].names}
    groups = group_rows(named.get("image_id"), named.get("image_uri"))
    uris = [file.uri for file in files]
    boxes_by_image = grouped_boxes(
        groups, _settled(boxes, files), folder=folder, box_format="xyxy", files=uris
    )
    return replace(boxes_by_image, columns=files[0].all_names)


def _single_boxes(batch: pa.Table) -> dict[str, pa.Array]:
    """The columns of a batch, one row a box, with the box as `given`."""
    columns = {name: batch.column(name).combine_chunks() for name in batch.column_names if name not in KEYS}
    if "bbox" in columns:
        return {"given": columns.pop("bbox")} | columns
    corners = [columns.pop(name) for name in _CORNERS]
    null_N4 = np.stack([null_mask(corner) for corner in corners], axis=1)
    value_N4 = np.stack([corner.to_numpy(zero_copy_only=False) for corner in corners], axis=1)
    all_null: BoolArray = np.asarray(null_N4.all(axis=1))
    lengths = np.where(all_null, 0, len(_CORNERS)).astype(np.int64)
    values = pa.array(value_N4[~all_null].reshape(-1), mask=null_N4[~all_null].reshape(-1))
    return {"given": to_lists(lengths, values, kind=NUMBERS, null=all_null)} | columns


# ---------------------------------------------------------------------------------------------
# Both shapes
# ---------------------------------------------------------------------------------------------


def box_columns(flat: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
    """Return columns of BOX_COLUMNS from plain ones with one row a box, named as in BOX_ROWS.

    Raises:
        pa.ArrowInvalid: a category or point label that does not fit 32 bits, a flag that is neither 0 nor 1.
    """
    columns: dict[str, pa.Array] = {}
    for name, column in flat.items():
        target = "category_id" if name == "label" and pa.types.is_integer(column.type) else _TARGETS[name]
        if target in columns:
            raise JobRefused("integer labels and category_id are both given; leave one of them")
        if name == "points":
            column = flatten_points(column)
        if name == "iscrowd":
            column = crowds(column)
        columns[target] = _cast(name, column, BOX_COLUMNS[target])
    return columns


def _cast(name: str, column: pa.Array, kind: pa.DataType) -> pa.Array:
    try:
        return pc.cast(column, kind)
    except pa.ArrowInvalid as error:
        raise pa.ArrowInvalid(f"{name}: {error}") from error


_SAME_NAMES = ("given", "category_id", "score", "box_id", "point_labels", "prompt_mask", "iscrowd")
_TARGETS = {"label": "category_name", "points": "points_xy"} | {name: name for name in _SAME_NAMES}


def crowds(flags: pa.Array) -> pa.Array:
    """Return true where a flag says crowd, else null; flags: booleans, or 0 and 1 as numbers or text.

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
    """Lists of [x, y] -> lists x, y, x, y ...; a point that is not two numbers becomes one NaN.

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


def _joined(boxes: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(boxes).combine_chunks() if boxes else pa.table({"given": pa.array([], NUMBERS)})


def _settled(boxes: Sequence[pa.Table], files: Sequence[TableFile]) -> pa.Table:
    """The parts as one table; labels of a CSV that are all integers become category ids."""
    table = _joined(boxes)
    if files[0].file_format != "csv" or "category_name" not in table.column_names:
        return table
    names = table.column("category_name")
    whole = pc.match_substring_regex(names, r"\A(0|-?[1-9][0-9]{0,9})\z")
    if names.null_count == len(names) or not pc.all(whole).as_py():
        return table
    if "category_id" in table.column_names:
        raise JobRefused(f"{files[0].uri}: integer labels and category_id are both given; leave one of them")
    with naming_values(files[0].uri):
        ids = pc.cast(names, pa.int32())
    return table.drop_columns(["category_name"]).append_column("category_id", ids)
