"""CSV and JSONL read by Arrow with types stated beforehand: nothing is guessed from what the rows look like.

CSV: comma, a header line, UTF-8. An empty field is null, a quoted empty one is the empty string; no other
word means null, so a class may be called NA. A list, or a mask, in a CSV field is JSON text: [[1, 2, 3, 4]].
JSONL: one object a line; a missing key is null; NaN and Infinity are read as Python writes them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from pipeline.columns import Kind, Leaf
from pipeline.json_arrays import JsonDamage

BLOCK_BYTES = 32 * 2**20
"""The longest row; a longer one is refused."""
SAMPLE_BYTES = 4 * 2**20
SAMPLE_ROWS = 1000


def sampled_leaf(values: Iterable[Any]) -> Leaf:
    """`integer` or `text` by the first leaf of the values that is one; `null` when there is none."""
    for value in values:
        if isinstance(value, list):
            leaf = sampled_leaf(value)
            if leaf != "null":
                return leaf
        elif isinstance(value, str):
            return "text"
        elif isinstance(value, int) and not isinstance(value, bool):
            return "integer"
    return "null"


def sampled_flag(values: Iterable[Any]) -> Leaf:
    """Return how flags are written, by the first value that is one: true, 1, 1.0 or "1"; else `null`."""
    for value in values:
        if isinstance(value, list):
            leaf = sampled_flag(value)
            if leaf != "null":
                return leaf
        for kind, leaf in _FLAG_LEAVES:
            if isinstance(value, kind):
                return leaf
    return "null"


# bool first: it is an int too.
_FLAG_LEAVES: tuple[tuple[type, Leaf], ...] = (
    *((bool, "flag"), (int, "integer")),
    *((float, "number"), (str, "text")),
)


def settled_leaf(values: Iterable[Any], wanted: Leaf) -> Leaf:
    """Return the leaf of a column of UNSETTLED ones by its values; any other is as wanted."""
    if wanted == "flag":
        return sampled_flag(values)
    return sampled_leaf(values) if wanted == "key" else wanted


def csv_header(stream: BinaryIO) -> tuple[list[str], dict[str, list[Any]]]:
    """The column names, and for columns whose fields look like JSON lists the first rows' values."""
    reader = pa_csv.open_csv(stream, read_options=_csv_block(SAMPLE_BYTES), parse_options=_CSV_PARSE)
    try:
        first = reader.read_next_batch().slice(0, SAMPLE_ROWS)
    except StopIteration:
        return reader.schema.names, {}
    columns = zip(first.schema.names, first.columns, strict=True)
    return first.schema.names, {
        name: _json_samples(column) for name, column in columns if pa.types.is_string(column.type)
    }


_CSV_PARSE = pa_csv.ParseOptions(newlines_in_values=True)


def _csv_block(size: int) -> pa_csv.ReadOptions:
    # With threads Arrow does not know the number of a row, and its errors would not name it.
    return pa_csv.ReadOptions(block_size=size, use_threads=False)


def _json_samples(column: pa.Array) -> list[Any]:
    texts = [text for text in column.to_pylist() if text and text.lstrip().startswith("[")]
    try:
        return [json.loads(text) for text in texts]
    except (ValueError, RecursionError):
        return []  # the reader below says where and why


def csv_batches(
    stream: BinaryIO, columns: Mapping[str, Kind], header: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """The rows of the named columns, typed by their kinds; `header`: all columns there, for messages."""
    json_text = {name for name, kind in columns.items() if kind.depth or kind.leaf == "rle"}
    types = {name: pa.string() if name in json_text else kind.arrow_type() for name, kind in columns.items()}
    convert = pa_csv.ConvertOptions(
        column_types=types,
        include_columns=list(columns),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
        true_values=["1", "1.0", "true", "TRUE", "True"],  # pandas writes 1.0 beside empty fields
        false_values=["0", "0.0", "false", "FALSE", "False"],
    )
    for batch in _typed_csv(stream, convert, header):
        arrays = [
            _parse_fields(batch.column(name), name, kind) if name in json_text else batch.column(name)
            for name, kind in columns.items()
        ]
        yield pa.record_batch(arrays, names=list(columns))


def _typed_csv(
    stream: BinaryIO, convert: pa_csv.ConvertOptions, header: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Arrow's batches; what it says of a column by its number alone is said with the column's name."""
    try:
        yield from pa_csv.open_csv(
            stream, read_options=_csv_block(BLOCK_BYTES), parse_options=_CSV_PARSE, convert_options=convert
        )
    except pa.ArrowInvalid as error:
        match = _OTHER_FIELD.search(str(error))
        if match is None:
            raise
        name = header[int(match["column"])]
        wanted = _WORDS.get(match["wanted"], match["wanted"])
        place = f" in row {match['row']}" if match["row"] else ""
        raise JsonDamage(f"{name!r} holds {match['found'][:40]}{place}; wanted {wanted}") from error


_OTHER_FIELD = re.compile(
    r"In CSV column #(?P<column>\d+):(?: Row #(?P<row>\d+):)? CSV conversion error to (?P<wanted>\w+): "
    r"invalid value (?P<found>'.*')",
    re.DOTALL,
)


def _parse_fields(texts: pa.Array, name: str, kind: Kind) -> pa.Array:
    """A column of JSON text -> lists, by writing it as one JSONL and reading that; null stays null."""
    one_line = pc.replace_substring_regex(pc.fill_null(texts, "null"), "[\r\n]", " ")
    lines = pc.binary_join_element_wise(f"{{{json.dumps(name)}:", one_line, "}", "")
    body = "\n".join(lines.to_pylist()).encode()
    parsed = read_lines(body, len(texts), pa.schema([(name, kind.arrow_type())]))
    return parsed.column(name).combine_chunks()


def jsonl_sample(stream: BinaryIO) -> dict[str, list[Any]]:
    """The values of the first rows by key, in the order in which the keys appear.

    Raises:
        JsonDamage: a line that is no JSON object.
    """
    head = stream.read(SAMPLE_BYTES)
    whole = len(head) < SAMPLE_BYTES
    lines = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    values: dict[str, list[Any]] = {}
    for number, line in enumerate(lines if whole else lines[:-1], start=1):
        if line.strip():
            for key, value in _object(line, number).items():
                values.setdefault(key, []).append(value)
    return values


def _object(line: bytes, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise JsonDamage(f"line {number} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise JsonDamage(
            f"line {number} holds a {type(row).__name__}; wanted an object "
            "(a file that is one JSON value, such as COCO, must be named .json)"
        )
    return row


_NULL_LINE = re.compile(rb"\n[ \t\r]*null")


def _refuse_null(text: bytes) -> None:
    """None unless a record is `null`: one at the start of a block ends the process of Arrow's reader."""
    if text.lstrip().startswith(b"null") or _NULL_LINE.search(text):
        raise JsonDamage("a record is null; wanted an object")


class _Records(io.BufferedIOBase):
    """A stream of JSON lines that is read as it is, up to a record which is `null`."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._before = b"\n"

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._stream.read(-1 if size is None else size)
        seen = self._before + data
        if _NULL_LINE.search(seen):
            raise JsonDamage("a line is null; wanted an object")
        line = seen[seen.rfind(b"\n") :] if b"\n" in seen else b""
        self._before = line if b"null".startswith(line.strip()) else b""
        return data


def jsonl_batches(stream: BinaryIO, columns: Mapping[str, Kind]) -> Iterator[pa.RecordBatch]:
    """The rows of the named keys, typed by their kinds; other keys are not looked at.

    Raises:
        pa.ArrowInvalid, JsonDamage: as `read_lines`.
    """
    schema = pa.schema([(name, kind.arrow_type()) for name, kind in columns.items()])
    with _naming_keys(schema):
        yield from pa_json.open_json(
            _Records(stream),
            read_options=pa_json.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=_typed(schema),
        )


def read_lines(text: bytes, count: int, schema: pa.Schema) -> pa.Table:
    """`count` JSON objects, one a line, as a table of `schema`; keys that it lacks are not looked at.

    Raises:
        pa.ArrowInvalid: no JSON.
        JsonDamage: a value of another type (the message names the key, what was found and what was wanted),
            another number of objects than `count`, or a null among them.
    """
    if not count:
        return schema.empty_table()
    _refuse_null(text)
    options = pa_json.ReadOptions(block_size=len(text) + 1)
    with _naming_keys(schema):
        table = pa_json.read_json(io.BytesIO(text), read_options=options, parse_options=_typed(schema))
    if table.num_rows != count:
        raise JsonDamage(f"{count} records were counted, {table.num_rows} can be read")
    table.validate(full=True)  # Arrow's reader lets text through that is not UTF-8
    return table


def _typed(schema: pa.Schema) -> pa_json.ParseOptions:
    return pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")


_OTHER_TYPE = re.compile(r"Column\(/(?P<path>.*)\) changed from (?P<wanted>\w+) to (?P<found>\w+)")
_OTHER_NUMBER = re.compile(
    r"Failed to convert JSON to (?P<wanted>\w+), couldn't parse:\s*(?P<found>.*)", re.DOTALL
)

_WORDS = {
    "array": "a list",
    "bool": "true, false, 1 or 0",
    "boolean": "true or false",
    "double": "a number",
    "int64": "a whole number",
    "number": "a number",
    "object": "an object",
    "string": "text",
}


@contextlib.contextmanager
def _naming_keys(schema: pa.Schema) -> Iterator[None]:
    """Says as a person would what Arrow says of a value of another type, the row in its block left out."""
    try:
        yield
    except pa.ArrowInvalid as error:
        if (match := _OTHER_TYPE.search(str(error))) is not None:
            key = match["path"].replace("/[]", "[]").replace("/", ".")
            found, wanted = (_WORDS.get(match[name], match[name]) for name in ("found", "wanted"))
            raise JsonDamage(f"{key!r} holds {found}; wanted {wanted}") from error
        if (match := _OTHER_NUMBER.search(str(error))) is not None:
            keys = [repr(field.name) for field in schema if _leaf_type(field.type) == match["wanted"]]
            wanted = _WORDS.get(match["wanted"], match["wanted"])
            raise JsonDamage(f"{' or '.join(keys)} holds {match['found'][:40]}; wanted {wanted}") from error
        raise


def _leaf_type(kind: pa.DataType) -> str:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return str(kind)
