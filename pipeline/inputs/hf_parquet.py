"""Hugging Face data sets: Parquet files with the pictures' own bytes and, if there are any, their `objects`.

    image: struct<bytes: binary, path: string>
    objects: struct<bbox: list<list<number>>, category: list<integer or string>, ...>, or a list of structs

While planning no picture is read: the place of its row becomes its uri (`archive_uris`). Ids are the file's
name below the folder and the number of the row, so that the images of a unit are neighbours in their file. A
box is xywh in pixels, as in COCO, unless --box-format states another. Names of categories come from the data
set's own description in the file.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import list_lengths, null_mask, to_lists
from hqlabel.pipeline.errors import JobRefused, clean_text
from hqlabel.pipeline.inputs.box_tables import boxes_of_rows
from hqlabel.pipeline.inputs.columns import (
    Found,
    Kind,
    RowFaults,
    check_type,
    is_bytes,
    is_text,
    plain,
    readable,
)
from hqlabel.pipeline.inputs.image_box_lists import TEXT, BoxList, ImageList
from hqlabel.pipeline.inputs.read_table import naming_values, open_named
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.storage.archive_uris import check_column
from hqlabel.pipeline.storage.checksummed_parquet import open_closed
from hqlabel.pipeline.storage.parquet_pages import rows_at_once
from hqlabel.pipeline.storage.read_objects import is_no_utf8

IMAGE, OBJECTS = "image", "objects"
HF_COLUMNS = (IMAGE, OBJECTS, "objects.bbox", "objects.category", "objects.score", "objects.iscrowd")
"""Our names of their columns; `input.columns` may map others."""
_FIELDS = {
    "bbox": Kind(2, "number"),
    "category": Kind(1, "key"),
    "score": Kind(1, "number"),
    "iscrowd": Kind(1, "flag"),
}
_OURS = {"bbox": "boxes", "category": "labels", "score": "scores", "iscrowd": "iscrowd"}
_BATCH_ROWS = 4096
_ID_RULE = "ids are the files' names and the rows' numbers"


@dataclass(frozen=True, kw_only=True)
class _HfFile:
    """One Parquet file of a data set, and which of its columns and fields are meant."""

    uri: str
    schema: pa.Schema
    image: str
    objects: str | None
    fields: Mapping[str, str]


def holds_pictures(uri: str, mapping: Mapping[str, str], access: AccessRules) -> bool:
    """Return whether a Parquet file has a column of pictures (a struct with `bytes`), by its schema."""
    if not uri.lower().endswith((".parquet", ".pq")):
        return False
    schema, name = _schema(uri, access), mapping.get(IMAGE, IMAGE)
    return schema.names.count(name) == 1 and _field_type(schema.field(name).type, "bytes") is not None


def _schema(uri: str, access: AccessRules) -> pa.Schema:
    with open_named(uri, "parquet", access) as stream:
        return open_closed(stream).schema_arrow


def _field_type(kind: pa.DataType, name: str) -> pa.DataType | None:
    """Return the type of a field of a column of pictures, dictionaries decoded; None where it has none."""
    if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
        return None
    found = kind.field(name).type
    return found.value_type if pa.types.is_dictionary(found) else found


def read_hf_images(
    uris: Sequence[str], mapping: Mapping[str, str], access: AccessRules, *, root: str
) -> ImageList:
    """Return every row of the files as an image."""
    files = [_inspect(uri, mapping, access) for uri in uris]
    keys = [(uris, ids) for file in files for _, uris, ids in _batches(file, root, access, [])]
    return ImageList(
        image_uri=pa.chunked_array([uris for uris, _ in keys], TEXT).combine_chunks(),
        image_id=pa.chunked_array([ids for _, ids in keys], TEXT).combine_chunks(),
        root=root,
        id_rule=_ID_RULE,
        listed=True,
        columns=_names(files[0]),
    )


def read_hf_boxes(
    uris: Sequence[str], mapping: Mapping[str, str], access: AccessRules, *, root: str
) -> BoxList:
    """Return the boxes of every row of the files.

    Raises:
        JobRefused: no `objects`, or of another type than wanted.
    """
    files = [_inspect(uri, mapping, access) for uri in uris]
    for file in files:
        if file.objects is None:
            raise JobRefused(
                f"{file.uri}: no column {mapping.get(OBJECTS, OBJECTS)!r} with the boxes; found "
                f"{', '.join(file.schema.names)}; --set input.columns.objects=NAME if it is another"
            )
    ours = [_OURS[name] for name in _FIELDS if name in files[0].fields]
    faults = RowFaults(files[0].uri)
    found = boxes_of_rows(
        (pair for file in files for pair in _rows(file, root, access, faults)),
        ("image_uri", "image_id", *ours),
        faults,
        folder=root,
        box_format="xywh",
    )
    return replace(
        found,
        id_rule=_ID_RULE,
        categories=_category_names(files[0]),
        columns=_names(files[0]),
        used=_used(files[0]),
        unused=_unused(files[0]),
    )


def _used(file: _HfFile) -> dict[str, str]:
    """Return our name -> theirs for the column of pictures and the fields of the objects that are read."""
    fields = {f"{OBJECTS}.{ours}": f"{file.objects}.{theirs}" for ours, theirs in file.fields.items()}
    return {IMAGE: file.image, **fields}


def _unused(file: _HfFile) -> tuple[str, ...]:
    """Return the columns of a file and the fields of its objects that are not read."""
    assert file.objects is not None, "the caller has checked"
    inner = _as_struct(file.schema.field(file.objects).type) or ()
    fields = (f"{file.objects}.{field.name}" for field in inner if field.name not in file.fields.values())
    return (*(name for name in file.schema.names if name not in (file.image, file.objects)), *fields)


def _names(file: _HfFile) -> tuple[str, ...]:
    """Return every column of a file, and every field of its objects."""
    inner = None if file.objects is None else _as_struct(file.schema.field(file.objects).type)
    return (*file.schema.names, *(field.name for field in inner or ()))


def _inspect(uri: str, mapping: Mapping[str, str], access: AccessRules) -> _HfFile:
    """Return the file's columns, found and of the wanted types."""
    schema = _schema(uri, access)
    image, objects = mapping.get(IMAGE, IMAGE), mapping.get(OBJECTS, OBJECTS)
    check_column(uri, image)
    kind = schema.field(image).type if image in schema.names else None
    data = None if kind is None else _field_type(kind, "bytes")
    if data is None or not is_bytes(data):
        raise JobRefused(
            f"{uri}: column {clean_text(image)!r} has type {kind or 'none'}; wanted struct<bytes: binary, "
            "path: string>"
        )
    if objects not in schema.names:
        return _HfFile(uri=uri, schema=schema, image=image, objects=None, fields={})
    fields = _fields(uri, schema.field(objects), mapping)
    return _HfFile(uri=uri, schema=schema, image=image, objects=objects, fields=fields)


def _fields(uri: str, objects: pa.Field, mapping: Mapping[str, str]) -> dict[str, str]:
    """Return our word -> the field of `objects` that is meant by it, each of the wanted type."""
    inner = _as_struct(objects.type)
    if inner is None:
        raise JobRefused(
            f"{uri}: column {clean_text(objects.name)!r} has type {objects.type}; wanted a struct of lists, "
            "or a list of structs, with `bbox`"
        )
    names = [field.name for field in inner]
    found = {word: mapping.get(f"objects.{word}", word) for word in _FIELDS}
    found = {word: name for word, name in found.items() if name in names}
    if "bbox" not in found:
        there = ", ".join(clean_text(name) for name in names)
        raise JobRefused(
            f"{uri}: {clean_text(objects.name)!r} has no field bbox; found {there}. If another is meant: "
            "--set 'input.columns={objects.bbox: NAME}'"
        )
    for word, name in found.items():
        field = inner.field(name)
        check_type(pa.field(f"{objects.name}.{name}", field.type), _FIELDS[word], uri=uri, ours=_OURS[word])
    return found


def _as_struct(kind: pa.DataType) -> pa.StructType | None:
    """Return a struct of lists as it is; a list of structs as the struct of lists that holds the same."""
    if pa.types.is_struct(kind):
        return kind
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list and pa.types.is_struct(kind.value_type):
        return pa.struct([pa.field(field.name, pa.list_(field.type)) for field in kind.value_type])
    return None


def _rows(file: _HfFile, root: str, access: AccessRules, faults: RowFaults) -> Iterator[tuple[str, pa.Table]]:
    """Yield the rows of a file as a table with one row an image; `faults` gets lists that cannot be read."""
    assert file.objects is not None, "the caller has checked"
    first = 0
    for batch, uris, ids in _batches(file, root, access, [file.objects]):
        found: Found = {}
        with naming_values(f"{file.uri}: column {file.objects!r}"):
            columns = {"image_uri": uris, "image_id": ids} | _lists(batch.column(file.objects), file, found)
        yield file.uri, faults.add(pa.table(columns), found, first_row=first)
        first += batch.num_rows


def _lists(objects: pa.Array, file: _HfFile, found: Found) -> dict[str, pa.Array]:
    """Return the lists of the objects by our names, plain; null where a row has no objects at all.

    A list that cannot be read is null too, and in `found`.
    """
    kind, columns = _as_struct(objects.type), {}
    assert kind is not None, "the file was inspected"
    null = null_mask(objects)
    for word, name in file.fields.items():
        if pa.types.is_struct(objects.type):
            lists = objects.field(name)
            lists = pc.if_else(pa.array(~null), lists, pa.scalar(None, lists.type)) if null.any() else lists
        else:
            values = objects.flatten().field(name)
            lists = to_lists(list_lengths(objects), values, kind=pa.list_(values.type), null=null)
        leaf = check_type(pa.field(name, lists.type), _FIELDS[word], uri=file.uri, ours=word)
        leaf = replace(leaf, leaf="integer") if leaf.leaf in ("key", "null") and word == "category" else leaf
        leaf = replace(leaf, leaf="number") if leaf.leaf == "null" else leaf
        rows = found.setdefault(f"{file.objects}.{name}", {})
        columns[_OURS[word]] = readable(lists, functools.partial(plain, kind=leaf), rows)
    return columns


def _batches(
    file: _HfFile, root: str, access: AccessRules, columns: list[str]
) -> Iterator[tuple[pa.RecordBatch, pa.Array, pa.Array]]:
    """Yield batches of some columns, with uri and id of every row; the pictures' bytes are not read."""
    path_type = _field_type(file.schema.field(file.image).type, "path")
    path = path_type is not None and is_text(path_type)
    wanted = [*columns, *([f"{file.image}.path"] if path else [])]
    name = file.uri.removeprefix(root).lstrip("/")
    with open_named(file.uri, "parquet", access) as stream:
        rows, size = min(_BATCH_ROWS, rows_at_once(stream, wanted)), stream.seek(0, io.SEEK_END)
        parquet = open_closed(stream, page_checksum_verification=True)
        if parquet.metadata.num_rows > size:
            raise JobRefused(
                f"{file.uri}: it states {parquet.metadata.num_rows:,} pictures in {size:,} bytes"
            )
        number = 0
        for group in range(parquet.num_row_groups):
            row = 0
            for batch in parquet.iter_batches(rows, row_groups=[group], columns=wanted):
                count = batch.num_rows
                paths = _paths(batch.column(file.image).flatten()[0]) if path else [""] * count
                uris = [f"{file.uri}#{file.image}:{group}:{row + at}/{paths[at]}" for at in range(count)]
                ids = [f"{name}/{number + at:09d}" for at in range(count)]
                yield batch, pa.array(uris, TEXT), pa.array(ids, TEXT)
                row, number = row + count, number + count


def _paths(paths: pa.Array) -> list[str]:
    """Return the names that a data set states; "" for none, and where the bytes are no text."""
    if pa.types.is_dictionary(paths.type):
        paths = paths.dictionary_decode()
    raw = pc.cast(paths, pa.large_binary()).to_pylist()
    texts = ("" if one is None else one.decode(errors="surrogateescape") for one in raw)
    return ["" if is_no_utf8(text) else text for text in texts]


def _category_names(file: _HfFile) -> dict[int, str]:
    """Return number -> name, where the data set's description in the file gives a ClassLabel; else empty."""
    try:
        described = json.loads((file.schema.metadata or {})[b"huggingface"])["info"]["features"]
        objects = described[file.objects]
        objects = objects[0] if isinstance(objects, list) else objects
        objects = objects.get("feature", objects)
        category: Any = objects[file.fields["category"]]
        category = category[0] if isinstance(category, list) else category
        names = category.get("feature", category)["names"]
        return {at: str(name) for at, name in enumerate(names)}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError):
        return {}
