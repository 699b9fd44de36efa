"""What a column may hold, how that is checked before any value is read, and how it is made plain.

Plain means: large_string, int64 or float64 leaves under ordinary lists, dictionaries decoded, narrow
numbers widened. Only widening that loses nothing is done; every other difference is an error that names
file, column, wanted and found. Extension types are refused by their name, because some of them run code
when their values, or even their type, are made into Python objects.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.arrays import list_lengths, null_mask, to_lists
from pipeline.errors import JobRefused, clean_text

Leaf = Literal["text", "key", "number", "integer", "flag", "rle", "null"]

_LEAF_WORDS: dict[Leaf, str] = {
    "text": "string",
    "key": "string or integer",
    "number": "number",
    "integer": "integer",
    "flag": "true, false, 1 or 0",
    "rle": "struct<size: list<integer>, counts: string>",
    "null": "null",
}
_ACCEPTS: dict[Leaf, tuple[Leaf, ...]] = {
    "text": ("text",),
    "key": ("text", "integer"),
    "number": ("number", "integer"),
    "integer": ("integer",),
    "flag": ("flag", "integer", "number", "text"),
    "rle": ("rle",),
}
UNSETTLED = ("key", "flag")
"""Leaves that several types may hold; a column's own type settles which (see `check_type` and `settle`)."""
_RLE_FIELDS = [pa.field("size", pa.list_(pa.int32())), pa.field("counts", pa.large_string())]
_LEAF_TYPES: dict[Leaf, pa.DataType] = {
    "text": pa.large_string(),
    "number": pa.float64(),
    "integer": pa.int64(),
    "flag": pa.bool_(),
    "rle": pa.struct(_RLE_FIELDS),
}

# Other people's names for our columns: proposed in messages, never used by themselves.
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "image_uri": ("uri", "url", "path", "file_name", "filename", "file", "image", "image_path", "filepath"),
    "image_id": ("id", "img_id", "imageid", "image"),
    "boxes": ("bboxes", "bbox", "detections", "objects"),
    "bbox": ("box", "bounding_box"),
    "labels": ("classes", "categories", "category_ids", "names"),
    "label": ("class", "category", "name", "class_name"),
    "category_id": ("class_id", "cls"),
    "scores": ("confidences", "score"),
    "score": ("confidence", "conf", "scores"),
    "x1": ("xmin", "x_min", "left", "x"),
    "y1": ("ymin", "y_min", "top", "y"),
    "x2": ("xmax", "x_max", "right", "w", "width"),
    "y2": ("ymax", "y_max", "bottom", "h", "height"),
}


@dataclass(frozen=True)
class Kind:
    """Lists nested `depth` deep around leaves: Kind(2, "number") is list<list<number>>."""

    depth: int
    leaf: Leaf

    def __str__(self) -> str:
        return "list<" * self.depth + _LEAF_WORDS[self.leaf] + ">" * self.depth

    def arrow_type(self) -> pa.DataType:
        """The plain Arrow type; `key` and `null` must have been settled before (see `settle`)."""
        kind = _LEAF_TYPES[self.leaf]
        for _ in range(self.depth):
            kind = pa.list_(kind)
        return kind


def locate(
    names: Sequence[str], wanted: Mapping[str, Kind], mapping: Mapping[str, str], *, uri: str
) -> dict[str, str]:
    """Our name -> the file's name, for those of the wanted columns that the file has.

    `mapping`: a person's choice of other names; it is used where the file has the other name.
    """
    doubled = {name for name in names if list(names).count(name) > 1}
    found = {ours: name for ours in wanted if (name := _name_in(names, ours, mapping)) is not None}
    if clash := doubled & set(found.values()):
        raise JobRefused(f"{uri}: the column {clean_text(min(clash))!r} is there twice; rename one")
    return found


def _name_in(names: Sequence[str], ours: str, mapping: Mapping[str, str]) -> str | None:
    mapped = mapping.get(ours)
    if mapped is not None and mapped in names:
        return mapped
    return ours if ours in names else None


def missing_column(uri: str, wanted: str, names: Sequence[str]) -> JobRefused:
    """The error for a table without a column it needs: names the nearest and how to map it.

    `wanted`: one of our names, or several of which one would do, parted by " or ".
    """
    shown = ", ".join(clean_text(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")
    message = f"{uri}: no column {wanted}; found {shown or 'no columns at all'}"
    for ours in wanted.replace(",", " or ").split(" or "):
        near = _nearest(ours.strip(), names)
        if near is not None and near.isprintable():  # a shell could not carry the others
            setting = shlex.quote(f"input.columns.{ours.strip()}={near}")
            message += f". If {near!r} is meant: --set {setting}"
            break
    return JobRefused(message)


def _nearest(ours: str, names: Sequence[str]) -> str | None:
    lowered = {name.lower(): name for name in reversed(names)}
    for other in (ours, *_OTHER_NAMES.get(ours, ())):
        if other in lowered:
            return lowered[other]
    near = difflib.get_close_matches(ours, lowered, n=1, cutoff=0.75)
    return lowered[near[0]] if near else None


def check_type(field: pa.Field, wanted: Kind, *, uri: str, ours: str) -> Kind:
    """The kind of an Arrow column, `key` settled; leaf `null` when the type says that all are null.

    Raises:
        JobRefused: another type than wanted, or an extension type anywhere inside it.
    """
    name = f"{uri}: column {clean_text(field.name)!r}"
    extension = _extension_name(field)
    if extension is not None:
        raise JobRefused(
            f"{name} has the extension type {clean_text(extension)!r}, which is never opened; "
            f"write it as plain {wanted}"
        )
    found = _kind_of(field.type)
    if found is not None and _fits(found, wanted):
        as_found = found.leaf == "null" or wanted.leaf in UNSETTLED
        return replace(wanted, leaf=found.leaf if as_found else wanted.leaf)
    raise JobRefused(f"{name} has type {field.type}; wanted {wanted} for {ours}")


def _fits(found: Kind, wanted: Kind) -> bool:
    if found.leaf == "null":
        return found.depth <= wanted.depth
    return found.depth == wanted.depth and found.leaf in _ACCEPTS[wanted.leaf]


def settle(name: str, found: Mapping[str, Kind], wanted: Kind) -> Kind:
    """The one kind of column `name` in several files (uri -> kind); columns of nulls go with the others.

    Raises:
        JobRefused: two files hold different kinds.
    """
    settled = {uri: kind for uri, kind in found.items() if kind.leaf not in ("null", "key")}
    if not settled:
        return replace(wanted, leaf="text" if wanted.leaf == "key" else wanted.leaf)
    first_uri, first = next(iter(settled.items()))
    for uri, kind in settled.items():
        if kind != first:
            raise JobRefused(f"{uri}: {name} holds {kind}, but {first} in {first_uri}; the files must agree")
    return first


def _extension_name(field: pa.Field) -> str | None:
    if isinstance(field.type, pa.BaseExtensionType):
        return str(field.type.extension_name)
    name = (field.metadata or {}).get(b"ARROW:extension:name")
    if name is not None:
        return bytes(name).decode("utf-8", errors="replace")
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    inner = (_extension_name(kind.field(i)) for i in range(kind.num_fields))
    return next((found for found in inner if found is not None), None)


def _kind_of(kind: pa.DataType) -> Kind | None:
    """None for types that no column of ours may have: dates, decimals, halves, maps ..."""
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    leaf = _leaf_of(kind)
    return None if leaf is None else Kind(depth, leaf)


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(test(kind) for test in (*tests, *views))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _leaf_of(kind: pa.DataType) -> Leaf | None:
    if pa.types.is_null(kind):
        return "null"
    if _is_text(kind):
        return "text"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_boolean(kind):
        return "flag"
    if pa.types.is_float32(kind) or pa.types.is_float64(kind):
        return "number"
    return "rle" if _is_rle(kind) else None


def _is_rle(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or {"size", "counts"} - {field.name for field in kind}:
        return False
    return _kind_of(kind.field("size").type) == Kind(1, "integer") and _is_text(kind.field("counts").type)


def plain(array: pa.Array, kind: Kind) -> pa.Array:
    """The values as `kind.arrow_type()`.

    Raises:
        pa.ArrowInvalid: text that is not UTF-8, an integer that float64 or int64 cannot hold.
    """
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind.arrow_type())
    if kind.depth:
        values = plain(array.flatten(), replace(kind, depth=kind.depth - 1))
        return to_lists(list_lengths(array), values, kind=pa.list_(values.type), null=null_mask(array))
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if kind.leaf == "rle":
        return _plain_rle(array)
    if _is_text(array.type):
        array.validate(full=True)
    return pc.cast(array, _LEAF_TYPES[kind.leaf])


def _plain_rle(array: pa.Array) -> pa.Array:
    children = dict(zip([field.name for field in array.type], array.flatten(), strict=True))
    size = plain(children["size"], Kind(1, "integer"))
    counts = plain(children["counts"], Kind(0, "text"))
    size = pc.cast(size, _RLE_FIELDS[0].type)
    mask = pa.array(null_mask(array))
    return pa.StructArray.from_arrays([size, counts], fields=_RLE_FIELDS, mask=mask)
