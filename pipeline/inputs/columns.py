"""What a column may hold, how that is checked before any value is read, and how it is made plain.

Plain means: large_string, int64 or float64 leaves under ordinary lists, dictionaries decoded, narrow
numbers widened. Only widening that loses nothing is done; every other difference is an error that names
file, column, wanted and found. Whole numbers may be written as floats (pandas makes `1.0` of an integer
column with gaps) below 2**53, from where floats skip numbers. Extension types are refused by their name,
because some of them run code when their values, or even their type, are made into Python objects.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from hqlabel.model.rle import compress_lengths
from hqlabel.pipeline.arrow_lists import list_lengths, null_mask, to_lists
from hqlabel.pipeline.errors import JobRefused, clean_text, count
from hqlabel.pipeline.settings import BoxFormat

Leaf = Literal["text", "key", "number", "integer", "whole", "big", "flag", "rle", "null"]
"""`whole`: integers kept as floats; `big`: integers that may not fit int64; never wanted as such."""

_LEAF_WORDS: dict[Leaf, str] = {
    "text": "string",
    "key": "string or integer",
    "number": "number",
    "integer": "integer",
    "whole": "integer",
    "big": "integer",
    "flag": "true, false, 1 or 0",
    "rle": "struct<size: list<integer>, counts: string>",
    "null": "null",
}
_ACCEPTS: dict[Leaf, tuple[Leaf, ...]] = {
    "text": ("text",),
    "key": ("text", "integer", "whole", "big", "number"),
    "number": ("number", "integer", "big"),
    "integer": ("integer", "whole", "big", "number"),
    "flag": ("flag", "integer", "big", "number", "text"),
    "rle": ("rle",),
}
UNSETTLED = ("key", "flag")
"""Leaves that several types may hold; a column's own type settles which (see `check_type` and `settle`)."""
_RLE_FIELDS = [pa.field("size", pa.list_(pa.int32())), pa.field("counts", pa.large_string())]
_TEXT = pa.large_string()
_INT32_MAX = 2**31 - 1
_DIGITS = pa.decimal128(38, 0)
_LEAF_TYPES: dict[Leaf, pa.DataType] = {
    "text": pa.large_string(),
    "number": pa.float64(),
    "integer": pa.int64(),
    "whole": _DIGITS,
    "big": _DIGITS,
    "flag": pa.bool_(),
    "rle": pa.struct(_RLE_FIELDS),
}

ARROW_WORDS = {
    "array": "a list",
    "decimal128(38, 0)": "a whole number",
    "bool": "true, false, 1 or 0",
    "boolean": "true or false",
    "double": "a number",
    "int64": "a whole number below 2**63 (larger ids as text)",
    "number": "a number",
    "object": "an object",
    "string": "text",
}
"""What Arrow calls a type or a value in its messages -> the words of ours."""

CORNERS = ("x1", "y1", "x2", "y2")
_EXTENTS = (("w", "h"), ("width", "height"))
_CENTRES = (("cx", "cy"), ("xc", "yc"), ("xcenter", "ycenter"), ("centerx", "centery"))
_STARTS = (("x", "y"), ("left", "top"), ("xmin", "ymin"), ("x1", "y1"))
# Four names, as `bare_name` writes them -> how such boxes are meant.
CORNER_NAMES: tuple[tuple[tuple[str, ...], BoxFormat], ...] = (
    (("x1", "y1", "x2", "y2"), "xyxy"),
    (("x0", "y0", "x1", "y1"), "xyxy"),
    (("xmin", "ymin", "xmax", "ymax"), "xyxy"),
    (("minx", "miny", "maxx", "maxy"), "xyxy"),
    (("left", "top", "right", "bottom"), "xyxy"),
    (("xtl", "ytl", "xbr", "ybr"), "xyxy"),
    (("startx", "starty", "endx", "endy"), "xyxy"),
    *(((x, y, *extent), "cxcywh") for x, y in _CENTRES for extent in _EXTENTS),
    *(((x, y, *extent), "xywh") for x, y in _STARTS for extent in _EXTENTS),
)


@dataclass(frozen=True)
class Kind:
    """Lists nested `depth` deep around leaves: Kind(2, "number") is list<list<number>>."""

    depth: int
    leaf: Leaf

    def __str__(self) -> str:
        return "list<" * self.depth + _LEAF_WORDS[self.leaf] + ">" * self.depth

    def arrow_type(self) -> pa.DataType:
        """Return the type as which text is read; `key` and `null` must be settled before (see `settle`).

        It is the plain type too, except that `whole` becomes int64 (see `plain`).
        """
        kind = _LEAF_TYPES[self.leaf]
        for _ in range(self.depth):
            kind = pa.list_(kind)
        return kind


def locate(
    names: Sequence[str], wanted: Mapping[str, Kind], mapping: Mapping[str, str], *, uri: str
) -> dict[str, str]:
    """Return our name -> the file's name, for those of the wanted columns that the file has.

    `mapping`: the choice of other names; it is used where the file has the other name, which then has no
    other meaning. A column mapped to "" is not read.
    """
    doubled = {name for name, number in Counter(names).items() if number > 1}
    found = {ours: name for ours in wanted if (name := _name_in(names, ours, mapping)) is not None}
    if clash := doubled & set(found.values()):
        raise JobRefused(f"{uri}: the column {clean_text(min(clash))!r} is there twice; rename one")
    return found


def _name_in(names: Sequence[str], ours: str, mapping: Mapping[str, str]) -> str | None:
    mapped = mapping.get(ours)
    if mapped == "":
        return None
    if mapped is not None and mapped in names:
        return mapped
    return ours if ours in names and ours not in mapping.values() else None


def setting_of(columns: Mapping[str, str], mapping: Mapping[str, str]) -> str:
    """Return the option that maps these columns and keeps those mapped already, as a shell takes it."""
    if len(columns) == 1 and (name := next(iter(columns.values()))) == _yaml_word(name):
        return f"--set {shlex.quote(f'input.columns.{next(iter(columns))}={name}')}"
    pairs = ", ".join(f"{ours}: {_yaml_word(theirs)}" for ours, theirs in {**mapping, **columns}.items())
    return f"--set {shlex.quote(f'input.columns={{{pairs}}}')}"


def _yaml_word(name: str) -> str:
    """Return a name as YAML reads it back: in quotes (JSON's are YAML's) where it would change."""
    plain_word = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.\-]*", name) and yaml.safe_load(name) == name
    # What does not show, such as a no-break space, would not survive being copied.
    return name if plain_word else json.dumps(name, ensure_ascii=not name.isprintable())


def can_be_pasted(name: str) -> bool:
    """Return whether `_yaml_word` reads back: JSON's escapes of signs over 16 bits are not YAML's."""
    return (
        bool(name)
        and all(sign.isprintable() or sign <= "\uffff" for sign in name)
        and (name.isprintable() or max(name) <= "\uffff")
    )


def bare_name(name: str) -> str:
    """Return a name without case, signs and the word for a box before it: `Bbox_X1` is `x1`."""
    word = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"\A(bbox|bndbox|box|bb|rect)(?=[xycwhlrtbms])", "", word)


def sampled_leaf(values: Iterable[Any], wanted: Leaf = "key") -> Leaf:
    """Return the leaf of a column of UNSETTLED ones by its first rows' values; any other is as wanted.

    Of a `key` it is text or a kind of whole number, by the first value that is one; `null` for none. Of
    numbers all that are sampled count: `whole` when one is written as a float, `big` when int64 cannot hold
    one, else `integer`. A wanted `integer` is always read as `whole`: pandas writes 1.0 where a column has
    gaps, however late. A flag is as the first one is written: true, 1, 1.0 or "1".
    """
    if wanted == "integer":
        return "whole"
    if wanted == "flag":
        leaves = (leaf for one in _scalars(values) for kind, leaf in _FLAG_LEAVES if isinstance(one, kind))
        return next(leaves, "null")
    if wanted != "key":
        return wanted
    found: set[Leaf] = set()
    for value in _scalars(values):
        if isinstance(value, str) and not found:
            return "text"
        if isinstance(value, float) and value == value:  # pandas' gap among words is NaN
            found.add("whole")
        elif isinstance(value, int) and not isinstance(value, bool):
            found.add("integer" if -(2**63) <= value < 2**63 else "big")
    return next((leaf for leaf in _INTEGERS if leaf in found), "null")


def _scalars(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _scalars(value)
        else:
            yield value


# bool first: it is an int too.
_FLAG_LEAVES: tuple[tuple[type, Leaf], ...] = (
    *((bool, "flag"), (int, "integer")),
    *((float, "number"), (str, "text")),
)


def check_type(field: pa.Field, wanted: Kind, *, uri: str, ours: str) -> Kind:
    """Return the kind of an Arrow column, `key` settled; leaf `null` for a type of nulls alone.

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
        return replace(wanted, leaf=_settled_leaf(found.leaf, wanted.leaf))
    raise JobRefused(f"{name} has type {field.type}; wanted {wanted} for {ours}{_other_shape(field, wanted)}")


def _settled_leaf(found: Leaf, wanted: Leaf) -> Leaf:
    if wanted == "flag":
        return "integer" if found == "big" else found
    if found == "number" and wanted in ("key", "integer"):
        return "whole"
    if found == "big" and wanted != "key":
        return wanted
    return found if found == "null" or wanted == "key" else wanted


def _other_shape(field: pa.Field, wanted: Kind) -> str:
    """Return what to do about a column of boxes of another shape; "" where nothing is known of it."""
    found, name = _kind_of(field.type), field.name
    if wanted.leaf == "number" and found is not None and found.leaf in ("number", "integer"):
        if found.depth == 2 and wanted.depth == 1:
            return f". If a row is an image: {setting_of({'boxes': name}, {})}"
        if found.depth == 1 and wanted.depth == 2:
            return f". If a row is a box: {setting_of({'bbox': name}, {})}"
    if wanted.depth and found is not None and found == Kind(0, "text"):
        return ". Text that looks like a list is read from CSV alone; write it as a list"
    kind = field.type.value_type if _is_list(field.type) else field.type
    if wanted.leaf == "number" and pa.types.is_struct(kind):
        return f". Of structs, those with the fields {', '.join(CORNERS)} or xmin, ymin, xmax, ymax are read"
    return ""


def _fits(found: Kind, wanted: Kind) -> bool:
    if found.leaf == "null":
        return found.depth <= wanted.depth
    return found.depth == wanted.depth and found.leaf in _ACCEPTS[wanted.leaf]


def settle(name: str, found: Mapping[str, Kind], wanted: Kind) -> Kind:
    """Return the one kind of column `name` in several files (uri -> kind); columns of nulls fit any.

    Whole numbers go together however they are kept: as integers, as floats, or too large for int64.

    Raises:
        JobRefused: two files hold different kinds.
    """
    settled = {uri: kind for uri, kind in found.items() if kind.leaf not in ("null", "key")}
    if not settled:
        return replace(wanted, leaf="text" if wanted.leaf == "key" else wanted.leaf)
    first_uri, first = next(iter(settled.items()))
    leaves = {kind.leaf for kind in settled.values()}
    if leaves <= set(_INTEGERS) and len({kind.depth for kind in settled.values()}) == 1:
        return replace(first, leaf=next(leaf for leaf in _INTEGERS if leaf in leaves))
    for uri, kind in settled.items():
        if kind != first:
            raise JobRefused(f"{uri}: {name} holds {kind}, but {first} in {first_uri}; the files must agree")
    return first


_INTEGERS: tuple[Leaf, ...] = ("whole", "big", "integer")


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
    """Return the kind of an Arrow type; None for those that no column of ours may have: dates, maps ..."""
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if _corner_fields(kind) is not None:
        return Kind(depth + 1, "number")
    leaf = _leaf_of(kind)
    return None if leaf is None else Kind(depth, leaf)


def _corner_fields(kind: pa.DataType) -> tuple[str, ...] | None:
    """Return the fields of a struct that is a box, in the order x1, y1, x2, y2; None for other types."""
    if not pa.types.is_struct(kind) or kind.num_fields != len(CORNERS):
        return None
    names = {bare_name(field.name): field.name for field in kind}
    if any(_leaf_of(field.type) not in ("number", "integer", "big", "null") for field in kind):
        return None
    for four, box_format in CORNER_NAMES:
        if box_format == "xyxy" and names.keys() == set(four):
            return tuple(names[name] for name in four)
    return None


def is_corners(kind: pa.DataType) -> bool:
    """Return whether a type is a struct of four corners, so that its boxes need no stated format."""
    return _corner_fields(kind) is not None


def plain_corners(value: Any) -> Any:
    """Return a box that is an object of four named corners as a list of them; what is none stays as it is."""
    named = {bare_name(str(name)): one for name, one in value.items()} if isinstance(value, dict) else {}
    for four, box_format in CORNER_NAMES:
        if box_format == "xyxy" and named and named.keys() <= set(four):
            return [named.get(name) for name in four]
    return value


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(test(kind) for test in (*tests, *views))


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's for text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _leaf_of(kind: pa.DataType) -> Leaf | None:
    if pa.types.is_null(kind):
        return "null"
    if is_text(kind):
        return "text"
    if pa.types.is_uint64(kind):
        return "big"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_boolean(kind):
        return "flag"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    return "rle" if _is_rle(kind) else None


def _is_rle(kind: pa.DataType) -> bool:
    """Return whether a type is a mask's: counts as text, as pycocotools' bytes, or as uncompressed runs."""
    if not pa.types.is_struct(kind) or {"size", "counts"} - {field.name for field in kind}:
        return False
    counts = kind.field("counts").type
    is_counts = is_text(counts) or is_bytes(counts) or _kind_of(counts) == Kind(1, "integer")
    size = _kind_of(kind.field("size").type)
    return is_counts and size in (Kind(1, "integer"), Kind(1, "big"))


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's for bytes."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def plain(array: pa.Array, kind: Kind) -> pa.Array:
    """Return the values as `kind.arrow_type()`; `whole` ones as int64.

    Raises:
        pa.ArrowInvalid: text that is not UTF-8, an integer that float64 or int64 cannot hold, or one kept as
            a float that is not whole or not below 2**53.
    """
    kind_type = replace(kind, leaf="integer").arrow_type() if kind.leaf == "whole" else kind.arrow_type()
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind_type)
    if kind == Kind(1, "number") and (fields := _corner_fields(array.type)) is not None:
        return _struct_boxes(array, fields)
    if kind.depth:
        values = plain(array.flatten(), replace(kind, depth=kind.depth - 1))
        return to_lists(list_lengths(array), values, kind=pa.list_(values.type), null=null_mask(array))
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if kind.leaf == "rle":
        return _plain_rle(array)
    if is_text(array.type):
        array.validate(full=True)
    if kind.leaf == "whole":
        return _whole(array)
    return pc.cast(array, _LEAF_TYPES[kind.leaf])


def _whole(array: pa.Array) -> pa.Array:
    if pa.types.is_float16(array.type):
        array = pc.cast(array, pa.float64())
    if pa.types.is_floating(array.type) and pc.any(pc.is_nan(array)).as_py():
        raise pa.ArrowInvalid("holds NaN; wanted whole numbers, and null where there is none")
    try:
        values = pc.cast(array, pa.int64())
    except pa.ArrowInvalid as error:
        raise pa.ArrowInvalid(f"has type {array.type}; wanted whole numbers: {error}") from error
    limit = pc.or_kleene(pc.greater_equal(values, 2**53), pc.less_equal(values, -(2**53)))
    if not pa.types.is_integer(array.type) and pc.any(limit).as_py():
        raise pa.ArrowInvalid(
            "holds whole numbers from 2**53 on as floats, which skip numbers there, so the digits are lost; "
            "write them as integers or as text"
        )
    return values


def _struct_boxes(array: pa.Array, fields: Sequence[str]) -> pa.Array:
    """Return structs of four numbers -> lists x1, y1, x2, y2; a null one is a null list."""
    null = null_mask(array)
    sound = array.filter(pa.array(~null))
    columns = [pc.cast(sound.field(name), pa.float64()) for name in fields]
    values = pa.concat_arrays(columns).take(
        pa.array(np.arange(len(sound) * len(fields)).reshape(len(fields), -1).T.reshape(-1))
    )
    lengths = np.where(null, 0, len(fields)).astype(np.int64)
    return to_lists(lengths, values, kind=pa.list_(pa.float64()), null=null)


def _plain_rle(array: pa.Array) -> pa.Array:
    children = dict(zip([field.name for field in array.type], array.flatten(), strict=True))
    size, counts = children["size"], children["counts"]
    sides = pc.cast(size.flatten(), pa.int64(), safe=False)  # over 2**63 becomes negative: refused as well
    sides = pc.cast(pc.max_element_wise(pc.min_element_wise(sides, _INT32_MAX), -1), pa.int32())
    sides = pc.if_else(size.flatten().is_valid(), sides, pa.scalar(-1, pa.int32()))
    size = to_lists(list_lengths(size), sides, kind=_RLE_FIELDS[0].type, null=null_mask(size))
    if is_text(counts.type):
        counts = plain(counts, Kind(0, "text"))
    else:
        counts = pa.array([None if one is None else _text(one) for one in counts.to_pylist()], _TEXT)
    mask = pa.array(null_mask(array))
    return pa.StructArray.from_arrays([size, counts], fields=_RLE_FIELDS, mask=mask)


def plain_masks(value: Any, depth: int = 0) -> Any:
    """Return a mask out of JSON, or lists of them `depth` deep, as {"size": [h, w], "counts": text}.

    Uncompressed runs become text, whole sides written as 480.0 become whole. What is no mask becomes one
    that no picture has, so that its row alone has no mask (`prompt_invalid`); null stays.
    """
    if depth:
        return [plain_masks(one, depth - 1) for one in value] if isinstance(value, list) else value
    if value is None:
        return None
    size, counts = (value.get("size"), value.get("counts")) if isinstance(value, dict) else (None, None)
    sides = [_side(side) for side in size] if isinstance(size, list | tuple) else []
    return {"size": sides, "counts": _text(counts)}


def _side(side: Any) -> int:
    whole = int(side) if isinstance(side, float) and side.is_integer() else side
    return whole if type(whole) is int and 0 <= whole <= _INT32_MAX else -1


def _text(counts: Any) -> str:
    """Return the text of a mask's counts, as text, bytes or runs; empty where it is none of them."""
    if isinstance(counts, bytes):
        return counts.decode("ascii", errors="replace")
    if isinstance(counts, list):
        try:
            return compress_lengths(counts)
        except ValueError:
            return ""
    return counts if isinstance(counts, str) and counts.isascii() else ""


# ---------------------------------------------------------------------------------------------
# Single values that cannot be used
# ---------------------------------------------------------------------------------------------

Found = dict[str, dict[int, str]]
"""Column (`RECORD` for a whole row) -> row of the batch -> why its value cannot be used."""

RECORD = ""
UNUSABLE = "\0unusable"
"""The column of reasons that `RowFaults.add` puts next to those of a batch."""


def readable(values: pa.Array, convert: Callable[[pa.Array], pa.Array], found: dict[int, str]) -> pa.Array:
    """Return what `convert` makes of the values, null where it raises ValueError; `found` gets these rows.

    One call where all is well; else the distinct values are parted until the bad ones are alone: a few calls
    for each that is bad.
    """
    try:
        return convert(values)
    except ValueError:  # Arrow's are some
        pass
    nothing = convert(pa.nulls(1, values.type))
    try:
        distinct = values.dictionary_encode(null_encoding="encode")
    except pa.ArrowNotImplementedError:  # of lists
        return _parted(values, convert, nothing, found, 0)
    bad: dict[int, str] = {}
    usable = _parted(distinct.dictionary, convert, nothing, bad, 0)
    codes = distinct.indices.to_numpy()
    for row in np.flatnonzero(np.isin(codes, list(bad))).tolist():
        found.setdefault(row, bad[int(codes[row])])
    return usable.take(distinct.indices)


_PARTS = 8
"""Into which values with bad ones among them are cut. Of 2, a third of bad ones takes twice as many calls."""


def _parted(
    values: pa.Array,
    convert: Callable[[pa.Array], pa.Array],
    nothing: pa.Array,
    found: dict[int, str],
    first: int,
) -> pa.Array:
    """Return the values converted, `nothing` where they cannot be; `first`: the number of the first one."""
    try:
        return convert(values)
    except ValueError as error:
        if len(values) < 2:
            found.setdefault(first, str(error))
            return nothing
    size = -(-len(values) // _PARTS)
    starts = range(0, len(values), size)
    parts = (_parted(values.slice(at, size), convert, nothing, found, first + at) for at in starts)
    return pa.concat_arrays(parts)


_SURE = 1000
"""Rows after which a column is judged; those of a table of fewer are judged at its end."""
_TOLD = 3
_BOX = "box "
"""What the names of columns begin with that are judged by box; none of the input's has a blank after it."""


class RowFaults:
    """The rows of a table that hold what cannot be used: counted, and the first few told.

    A row costs only itself. A column that most rows of are bad in is a mistake of the whole table.

    `noun`: what a row is; those of another name than "row" have no numbers, their reasons say where they are.
    `is_part`: of a table that several processes read, so that nothing is judged before `merged`.
    """

    def __init__(self, uri: str, noun: str = "row", *, is_part: bool = False) -> None:
        self._uri, self._noun, self._is_part = uri, noun, is_part
        self._rows = self._count = self._blank = self._boxes = 0
        self._told: list[str] = []
        self._bad: Counter[str] = Counter()
        self._good: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._first_row = 0
        self._skipped: Collection[int] = ()

    def add(
        self, batch: pa.Table, found: Found, *, first_row: int, skipped: Collection[int] = ()
    ) -> pa.Table:
        """Return the batch, with the column UNUSABLE where some of its rows hold what cannot be used.

        `first_row`: rows of the file that were read before the batch; `skipped`: the numbers of those that
        were not, which count too.

        Raises:
            JobRefused: a column is bad in most rows.
        """
        self._first_row, self._skipped = first_row, skipped
        self._rows += batch.num_rows
        reasons: dict[int, str] = {}
        for name, unnamed in found.items():
            rows = {row: text if name in text else f"{name!r}: {text}" for row, text in unnamed.items()}
            for row in sorted(rows):
                reasons.setdefault(row, rows[row])
            self._judge(name, rows, batch.num_rows - len(rows))
        self._tell(reasons)
        if not reasons:
            return batch
        texts = [reasons.get(row) for row in range(batch.num_rows)]
        return batch.append_column(UNUSABLE, pa.array(texts, _TEXT))

    def lacking(self, names: Mapping[str, Iterable[int]], *, rows_there: int, blank: int) -> None:
        """Count rows of the last batch that lack a name, unless they are counted already.

        `names`: column -> rows. `rows_there`: of the batch; `blank`: of these, rows of nulls alone.
        """
        reasons: dict[int, str] = {}
        for name, rows in names.items():
            own = dict.fromkeys(rows, f"{name} is null")
            for row in own:
                reasons[row] = f"{reasons[row]}, and so is {name}" if row in reasons else own[row]
            self._judge(f"no {name}", own, rows_there - blank - len(own))
        self._blank += blank
        self._tell(reasons)

    def unlike(self, boxes: Mapping[int, str], number: int) -> None:
        """Count boxes of which a value does not fit its column in the tables: box -> reason, of `number`."""
        texts = {at: f"{text} (box {at} of those read with it)" for at, text in boxes.items()}
        self._boxes += number
        for name in {text.partition(":")[0] for text in boxes.values()}:
            own = {at: text for at, text in texts.items() if text.startswith(f"{name}:")}
            self._judge(f"{_BOX}{name}", own, 0)
        self._tell(texts)

    def skip(self, skipped: Mapping[int, str]) -> None:
        """Count rows that are no rows of the table: number -> reason."""
        self._first_row, self._skipped = 0, ()
        self._rows += len(skipped)
        self._judge(RECORD, skipped, 0)
        self._tell(skipped)

    def tell(self, name: str, bad: Sequence[str], rows: int) -> None:
        """Count what is bad among some rows that have no numbers; `bad`: its reasons."""
        self._rows += rows
        self._judge(name, dict(enumerate(bad)), rows - len(bad))
        self._tell(dict(enumerate(bad)))

    @classmethod
    def merged(cls, parts: Sequence[RowFaults]) -> RowFaults:
        """Return the faults of a whole table from those of its parts, in their order; none is changed."""
        whole = cls(parts[0]._uri, parts[0]._noun)
        for part in parts:
            whole._rows += part._rows
            whole._count += part._count
            whole._blank += part._blank
            whole._boxes += part._boxes
            whole._told += part._told[: max(0, _TOLD - len(whole._told))]
            whole._bad.update(part._bad)
            whole._good.update(part._good)
            whole._first = part._first | whole._first
        return whole

    def bad(self, name: str) -> int:
        """Return how many rows a column, or what lacks (`no image_id`), was bad in."""
        return self._bad[name]

    def refuse_bad_columns(self) -> None:
        """Raise JobRefused where a column is bad in most rows."""
        for name, bad in self._bad.items():
            good = self._boxes - bad if name.startswith(_BOX) else self._good[name]
            if bad > good and not self._is_part:
                every = bad + good
                share = f", and so it is in {bad:,} of {every:,}" if every > 1 else ""
                start = " (rows from 0)" if self._noun == "row" else ""
                first = clean_text(self._first[name].removeprefix(f"{self._uri}: "))
                raise JobRefused(f"{self._uri}: {first}{start}{share}")

    def notes(self, cost: str) -> tuple[str, ...]:
        """Return a sentence on the rows, none where all are well; `cost`: what becomes of them."""
        notes = []
        if self._blank:
            rows = f"{count(self._blank, 'blank row')}, which name{'s' * (self._blank == 1)} no image"
            notes.append(f"{self._uri}: {rows}: left out")
        if self._count:
            more = self._count - len(self._told)
            told = [one.removeprefix(f"{self._uri}: ") for one in self._told]
            some = "; ".join([*told, *([f"and {more:,} more"] if more > 0 else [])])
            rows = f"{self._count:,} of {count(self._rows, self._noun)}"
            start = "Counted from 0, " if self._noun == "row" else ""
            notes.append(f"{self._uri}: {rows} cannot be used as given: {cost}. {start}{some}")
        return tuple(notes)

    def _judge(self, name: str, bad: Mapping[int, str], good: int) -> None:
        self._bad[name] += len(bad)
        self._good[name] += good
        if bad and name not in self._first:
            self._first[name] = self._place(min(bad), bad[min(bad)])
        if self._rows >= _SURE:
            self.refuse_bad_columns()

    def _tell(self, reasons: Mapping[int, str]) -> None:
        self._count += len(reasons)
        for row in sorted(reasons)[: max(0, _TOLD - len(self._told))]:
            self._told.append(clean_text(self._place(row, reasons[row])))

    def _place(self, row: int, text: str) -> str:
        if self._noun != "row":
            return text
        number = self._first_row + row
        for other in sorted(self._skipped):
            number += other <= number
        return f"row {number}: {text}"
