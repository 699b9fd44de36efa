"""JSON records as Arrow reads them: one object a line (JSONL), or the arrays of one big file (COCO).

JSONL: a missing key is null; NaN and Infinity are read as Python writes them. Types are stated beforehand:
nothing is guessed from what the rows look like.

A COCO file is one JSON value of any size: a list (results), or an object with lists `images`, `annotations`,
`categories` (instances). `split_arrays` finds where its records begin and end, by the depth of brackets
outside strings, and gives blocks with one record a line for Arrow's reader. It does not parse a record. 0.1 s
for 10 MB, about 20 MB of memory. Why not ijson: a file of nested brackets, 400 kB long, made its C parser
take more than 20 GB (measured, 3.6.0), it refuses the NaN that Python's own `json.dump` writes, and it makes
a dict of every box.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json as pa_json

from hqlabel.pipeline.arrow_lists import single
from hqlabel.pipeline.inputs.columns import (
    ARROW_WORDS,
    RECORD,
    Found,
    Kind,
    is_text,
    plain_corners,
    plain_masks,
)

BLOCK_BYTES = 32 * 2**20
"""The longest row; a longer one is refused."""
SAMPLE_BYTES = 4 * 2**20
SAMPLE_ROWS = 1000
HEAD_BYTES = 2**16
BOM = b"\xef\xbb\xbf"

_OTHER_BYTES = (
    (b"\xff\xfe", "UTF-16 text; wanted UTF-8: iconv -f UTF-16 -t UTF-8 IN > OUT"),
    (b"\xfe\xff", "UTF-16 text; wanted UTF-8: iconv -f UTF-16 -t UTF-8 IN > OUT"),
    (b"\x1f\x8b", "compressed by gzip; unpack it, or name it so if it is a table (.csv.gz, .jsonl.gz)"),
    (b"PK\x03\x04", "a zip or an Excel workbook; wanted plain text: save it as CSV (UTF-8)"),
    (b"PAR1", "Parquet; name it .parquet"),
)


class TextDamage(ValueError):
    """The text is not of the wanted form; the message names what is there and what is wanted."""


def refuse_other_bytes(stream: BinaryIO) -> bytes:
    """Return the beginning of a text file, and rewind it.

    Raises:
        TextDamage: it begins as something else does.
    """
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    for start, what in _OTHER_BYTES:
        if head.startswith(start):
            raise TextDamage(f"it is {what}")
    if b"\0" in head:
        raise TextDamage("it holds zero bytes, as UTF-16 does; wanted UTF-8 text")
    return head


# ---------------------------------------------------------------------------------------------
# One object a line
# ---------------------------------------------------------------------------------------------


def jsonl_sample(stream: BinaryIO) -> dict[str, list[Any]]:
    """Return the values of the first rows by key, in the order in which the keys appear.

    Raises:
        TextDamage: most lines are no JSON objects.
    """
    refuse_other_bytes(stream)
    head = stream.read(SAMPLE_BYTES)
    is_whole = len(head) < SAMPLE_BYTES
    text = head.removeprefix(BOM)
    lines = text.split(b"\n")
    if text.lstrip()[:1] == b"[" and not _is_json(lines[0]):
        raise TextDamage("it is one JSON list; wanted one object a line: jq -c '.[]' IN > OUT")
    values: dict[str, list[Any]] = {}
    wrong: list[TextDamage] = []
    good = 0
    for number, line in enumerate(lines if is_whole else lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = _object(line, number)
        except TextDamage as error:  # the reader counts it
            wrong.append(error)
            continue
        good += 1
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    if len(wrong) > good:
        raise wrong[0]
    return values


def _object(line: bytes, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        many = "; an object must be on one line: jq -c . IN > OUT" if line.strip() in (b"{", b"[") else ""
        raise TextDamage(f"line {number} is no JSON: {error}{many}") from error
    if not isinstance(row, dict):
        raise TextDamage(
            f"line {number} holds {json_word(row)}; wanted an object (a file that is one JSON value, such as "
            "COCO, must be named .json; a list of rows becomes lines by jq -c '.[]' IN > OUT)"
        )
    return row


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def json_word(value: object) -> str:
    """Return what a value of JSON is called there."""
    if value is None or isinstance(value, bool):
        return str(json.dumps(value))
    words = ((list, "a list"), (str, "text"), (dict, "an object"))
    return next((word for kind, word in words if isinstance(value, kind)), "a number")


def _line_blocks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield whole lines, a few MiB at a time.

    Raises:
        TextDamage: a line is too long; the last one is cut.
    """
    rest, first = b"", True
    while chunk := stream.read(SAMPLE_BYTES):
        chunk, first = chunk.removeprefix(BOM) if first else chunk, False
        lines, newline, rest = (rest + chunk).rpartition(b"\n")
        if len(rest) > BLOCK_BYTES:
            raise TextDamage(f"a row is longer than {BLOCK_BYTES >> 20} MiB")
        if newline:
            yield lines
    if rest.strip():
        if not _is_json(rest):
            raise TextDamage("it ends early: its last line is no whole JSON")
        yield rest


def _refuse_null(text: bytes) -> None:
    """Raise TextDamage for a `null` where a record may begin: at the text's start, or a line's.

    Arrow may begin a block after any line feed or carriage return, and skips white space and a byte-order
    mark there; 100,000 made texts with both showed no other way to end its process.
    """
    if b"null" in text:
        lines = text.translate(None, b" \t" + BOM).replace(b"\r", b"\n")
        if lines.startswith(b"null") or b"\nnull" in lines:
            raise TextDamage("a record is null; wanted an object")


Shaper = Callable[[Any], Any]


def with_plain_values(line: bytes, shapers: Mapping[str, Shaper]) -> bytes:
    """Return a line with its values made plain; one that is no JSON object is for the reader to refuse."""
    row = json_record(line)
    found = {name: row[name] for name in shapers if name in row}
    plain = {name: shapers[name](value) for name, value in found.items()}
    # Compared as text: 480.0 equals 480, and is no whole number to the reader.
    same = json.dumps(plain, sort_keys=True) == json.dumps(found, sort_keys=True)
    return line if same else json.dumps({**row, **plain}).encode()


def json_record(line: bytes) -> Mapping[str, Any]:
    """Return the object on a line; an empty one for other text, which Arrow's reader refuses."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def jsonl_batches(
    stream: BinaryIO, columns: Mapping[str, Kind], corners: Collection[str] = ()
) -> Iterator[tuple[pa.Table, Found]]:
    """Yield the rows of the named keys, typed by their kinds, and which values are null as unusable.

    Other keys are not parsed. `corners`: keys whose boxes are objects of four corners.

    Raises:
        TextDamage: a line is too long; the last one is cut.
    """
    schema = pa.schema([(name, kind.arrow_type()) for name, kind in columns.items()])
    shapers = shapers_of(columns, corners)
    for text in _line_blocks(stream):
        if shapers:
            text = b"\n".join(with_plain_values(line, shapers) for line in text.split(b"\n"))
        yield from readable_lines(text, schema)


def shapers_of(columns: Mapping[str, Kind], corners: Collection[str] = ()) -> dict[str, Shaper]:
    """Return what makes values plain before Arrow reads them: masks, and boxes of named corners."""
    masks = {name: kind.depth for name, kind in columns.items() if kind.leaf == "rle"}
    shapers: dict[str, Shaper] = {
        name: functools.partial(plain_masks, depth=depth) for name, depth in masks.items()
    }
    return shapers | {name: plain_corners for name in corners if name in columns}


def readable_lines(text: bytes, schema: pa.Schema) -> Iterator[tuple[pa.Table, Found]]:
    """Yield JSON objects, one a line, as tables of `schema`, and which values are null as unusable.

    One table where all is well; else some thousand lines at a time, without what is of another type. A blank
    line is none, a line that is no object a row of nulls.
    """
    with contextlib.suppress(pa.ArrowInvalid, TextDamage):
        yield _parsed(text, schema), {}
        return
    lines = [line for line in text.split(b"\n") if line.strip()]
    for start in range(0, len(lines), _LINES_AT_ONCE):
        found: Found = {}
        some = lines[start : start + _LINES_AT_ONCE]
        yield _whole(some, schema) or _without_misfits(some, schema, found), found


_LINES_AT_ONCE = 4096


def _whole(lines: list[bytes], schema: pa.Schema) -> pa.Table | None:
    """Return the lines as a table of as many rows; None where they are not."""
    try:
        table = _parsed(b"\n".join(lines), schema)
    except (pa.ArrowInvalid, TextDamage):
        return None
    return table if table.num_rows == len(lines) else None


def _without_misfits(lines: list[bytes], schema: pa.Schema, found: Found) -> pa.Table:
    """Return the lines as a table; what cannot be used is null, and in `found`.

    Arrow names one value and gives up, and each attempt costs it 0.3 ms. So values that it is sure to refuse
    are taken out before, and only what it alone refuses is found by halving, several attempts for each.
    """
    checks = {field.name: _check_of(field.type, field.name) for field in schema}
    mended = [_mended(line, checks, found, row) for row, line in enumerate(lines)]
    return pa.concat_tables(_sound_parts(mended, schema, found, 0))


def _sound_parts(lines: list[bytes], schema: pa.Schema, found: Found, first: int) -> Iterator[pa.Table]:
    """Yield the lines as tables, each of as many rows as lines; `first`: the number of the first line."""
    table = _whole(lines, schema)
    if table is not None:
        yield table
    elif len(lines) > 1:
        half = len(lines) // 2
        yield from _sound_parts(lines[:half], schema, found, first)
        yield from _sound_parts(lines[half:], schema, found, first + half)
    else:
        yield _sound_keys(lines[0], schema, found, first)


def _sound_keys(line: bytes, schema: pa.Schema, found: Found, row: int) -> pa.Table:
    """Return a line as a row, null for each key that cannot be read; all are where it is no object."""
    columns = []
    if reason := _no_object(line):
        found.setdefault(RECORD, {})[row] = reason
        return pa.table([pa.nulls(1, field.type) for field in schema], schema=schema)
    for field in schema:
        try:
            columns.append(single(read_lines(line, 1, pa.schema([field])).column(0)))
        except (pa.ArrowInvalid, TextDamage) as error:
            found.setdefault(field.name, {})[row] = str(error)
            columns.append(pa.nulls(1, field.type))
    return pa.table(columns, schema=schema)


class _Fraction(str):
    """A number with a fraction or an exponent, NaN or infinity, as it is written."""


Check = Callable[[Any], str | None]
"""Why Arrow does not read a value, in our words; None where it does, or might."""


def _mended(line: bytes, checks: Mapping[str, Check], found: Found, row: int) -> bytes:
    """Return a line without the values that Arrow is sure to refuse, an empty object where it is none.

    They are added to `found`. A line in which nothing is wrong, or which Arrow may read better, stays.
    """
    text = line.removeprefix(BOM).decode(errors="surrogateescape")
    try:
        record = json.loads(text, parse_float=_Fraction, parse_constant=_Fraction)
    except json.JSONDecodeError:
        if "Inf" in text:  # Arrow's word for Infinity
            return line
        record = None
    except (ValueError, RecursionError):  # numbers of 4,301 digits, keys nested deeply
        return line
    if not isinstance(record, dict):
        found.setdefault(RECORD, {})[row] = _no_object(line) or "no JSON"
        return b"{}"
    reasons = {name: check(record.get(name)) for name, check in checks.items()}
    bad = {name: reason for name, reason in reasons.items() if reason is not None}
    if not bad:
        return line
    for name, reason in bad.items():
        found.setdefault(name, {})[row] = reason
    record = json.loads(text)
    return json.dumps({name: record[name] for name in checks if name in record and name not in bad}).encode()


def _no_object(line: bytes) -> str:
    """Return why a line is no JSON object; "" where it is one."""
    try:
        _object(line.decode(errors="replace").encode(), 0)
    except TextDamage as error:
        return str(error).removeprefix("line 0 ")
    return ""


def _check_of(kind: pa.DataType, path: str) -> Check:
    if pa.types.is_list(kind):
        return _check_of_lists(_check_of(kind.value_type, f"{path}[]"), path)
    if pa.types.is_struct(kind):
        return _check_of_objects({one.name: _check_of(one.type, f"{path}.{one.name}") for one in kind}, path)
    is_fit, wanted = _leaf_check(kind)

    def check(value: Any) -> str | None:
        if value is None or is_fit(value):
            return None
        if type(value) in (int, _Fraction) and wanted != ARROW_WORDS["string"]:
            return f"{path!r} holds {str(value)[:40]}; wanted {wanted}"
        return _other_type(path, value, wanted)

    return check


def _check_of_lists(inner: Check, path: str) -> Check:
    def check(value: Any) -> str | None:
        if type(value) is list:
            return next((text for one in value if (text := inner(one)) is not None), None)
        return None if value is None else _other_type(path, value, "a list")

    return check


def _check_of_objects(inner: Mapping[str, Check], path: str) -> Check:
    def check(value: Any) -> str | None:
        if type(value) is dict:
            texts = (one(value.get(name)) for name, one in inner.items())
            return next((text for text in texts if text is not None), None)
        return None if value is None else _other_type(path, value, "an object")

    return check


def _other_type(path: str, value: Any, wanted: str) -> str:
    if type(value) is str and wanted == ARROW_WORDS["string"]:
        return f"{path!r} holds text that is not UTF-8"
    word = "number" if isinstance(value, _Fraction) else "boolean" if isinstance(value, bool) else ""
    found = ARROW_WORDS[word] if word else json_word(value)
    return f"{path!r} holds {found}; wanted {wanted}{_OTHER_HINTS.get((found, wanted), '')}"


_DECIMAL = re.compile(r"[-+]?[0-9]+(\.0*)?|[-+0-9.]*[eE][-+0-9]*")


def _leaf_check(kind: pa.DataType) -> tuple[Callable[[Any], bool], str]:
    """Return which values Arrow reads as `kind`, or might, and what is wanted, in words."""
    if is_text(kind):
        return (lambda value: type(value) is str and _is_utf8(value)), ARROW_WORDS["string"]
    if pa.types.is_boolean(kind):
        return (lambda value: type(value) is bool), ARROW_WORDS["boolean"]
    wanted = ARROW_WORDS.get(str(kind), "a number")
    if pa.types.is_decimal(kind):  # which Arrow reads from text too
        return (lambda value: type(value) is int or _is_decimal(value)), wanted
    if pa.types.is_integer(kind):
        return (lambda value: type(value) is int and -(2**63) <= value < 2**63), wanted
    return (lambda value: type(value) in (int, _Fraction)), wanted


def _is_decimal(value: Any) -> bool:
    return isinstance(value, str) and _DECIMAL.fullmatch(value) is not None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_lines(text: bytes, number: int, schema: pa.Schema) -> pa.Table:
    """Return `number` JSON objects, one a line, as a table of `schema`; keys that it lacks are not parsed.

    Raises:
        pa.ArrowInvalid: no JSON.
        TextDamage: a value of another type (the message names the key, what was found and what was wanted),
            another number of objects than `number`, or a null among them.
    """
    if not number:
        return schema.empty_table()
    table = _parsed(text, schema)
    if table.num_rows != number:
        raise TextDamage(f"{number} records were counted, {table.num_rows} can be read")
    return table


def _parsed(text: bytes, schema: pa.Schema) -> pa.Table:
    _refuse_null(text)
    if not text.strip():
        return schema.empty_table()
    options = pa_json.ReadOptions(block_size=len(text) + 1)
    with _naming_keys(schema):
        table = pa_json.read_json(io.BytesIO(text), read_options=options, parse_options=_typed(schema))
    try:
        table.validate(full=True)  # Arrow's reader lets text through that is not UTF-8
    except pa.ArrowInvalid as error:
        raise TextDamage(f"{' or '.join(map(repr, schema.names))} holds text that is not UTF-8") from error
    return table


def _typed(schema: pa.Schema) -> pa_json.ParseOptions:
    return pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")


_OTHER_TYPE = re.compile(r"Column\(/(?P<path>.*)\) changed from (?P<wanted>\w+) to (?P<found>\w+)")
_OTHER_NUMBER = re.compile(
    r"Failed to convert JSON to (?P<wanted>\w+(?:\([^)]*\))?), couldn't parse:\s*(?P<found>.*)", re.DOTALL
)
_NOT_WHOLE = re.compile(r"Failed to convert JSON to (?P<wanted>decimal128\(38, 0\)): (?P<found>\S+) requires")
_OTHER_HINTS = {
    ("a number", "text"): " (a missing value is null, not NaN)",
    ("text", "a list"): " (text that looks like a list is read from CSV alone)",
}


@contextlib.contextmanager
def _naming_keys(schema: pa.Schema) -> Iterator[None]:
    """Reword what Arrow reports of a value of another type, without the number of its row in the block."""
    try:
        yield
    except pa.ArrowInvalid as error:
        if (match := _OTHER_TYPE.search(str(error))) is not None:
            key = match["path"].replace("/[]", "[]").replace("/", ".")
            found, wanted = (ARROW_WORDS.get(match[name], match[name]) for name in ("found", "wanted"))
            hint = _OTHER_HINTS.get((found, wanted), "")
            raise TextDamage(f"{key!r} holds {found}; wanted {wanted}{hint}") from error
        if (match := _OTHER_NUMBER.search(str(error)) or _NOT_WHOLE.search(str(error))) is not None:
            keys = [repr(field.name) for field in schema if _leaf_type(field.type) == match["wanted"]]
            wanted = ARROW_WORDS.get(match["wanted"], match["wanted"])
            raise TextDamage(f"{' or '.join(keys)} holds {match['found'][:40]}; wanted {wanted}") from error
        raise


def _leaf_type(kind: pa.DataType) -> str:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return str(kind)


# ---------------------------------------------------------------------------------------------
# The arrays of one big file
# ---------------------------------------------------------------------------------------------

CUT_BYTES = 2 * 2**20
MAX_RECORD_BYTES = 64 * 2**20
MAX_DEPTH = 64

_DELTA = np.zeros(256, dtype=np.int8)
_DELTA[[ord("["), ord("{")]] = 1
_DELTA[[ord("]"), ord("}")]] = -1
_STRUCTURAL = np.zeros(256, dtype=np.bool_)
_STRUCTURAL[[ord(c) for c in '"[]{},']] = True
_KEY = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:\s*\Z')
_KEY_BYTES = 4096
_CLOSER = {b"[": ord("]"), b"{": ord("}")}

_AFTER = "there is text after its end (a file with one object a line must be named .jsonl)"

Positions = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Records of the top-level array `name` ("" when the file is one array): `count` of them in `text`.

    One record a line, the last line without its newline.
    """

    name: str
    text: bytes
    count: int


def first_byte(file: BinaryIO) -> str:
    """Return the first character that is not white space ("" in an empty file); the file is rewound."""
    file.seek(0)
    start = file.read(CUT_BYTES).removeprefix(BOM).lstrip()
    file.seek(0)
    return start[:1].decode("latin-1")


def split_arrays(file: BinaryIO, names: Collection[str]) -> Iterator[Lines]:
    """Yield the records of the wanted arrays, in the order of the file, in blocks of about CUT_BYTES.

    An array without records gives one block of none, to distinguish it from no array.

    `names`: keys of the top-level object; {""} for a file that is one array.

    Raises:
        TextDamage: cut short, trailing text, brackets that do not match, an array given twice, nested
            deeper than MAX_DEPTH, or a record of more than MAX_RECORD_BYTES.
    """
    cutter = _Cutter(names)
    while block := file.read(CUT_BYTES):
        yield from cutter.feed(block)
    cutter.finish()


class _Cutter:
    """Where we are in the file between two blocks."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._level = 1 if "" in names else 2  # the depth at which commas part the records
        self._opener = b""  # the file's first character
        self._over = False  # its last bracket has been read
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the block before ended within an escape
        self._seen: set[str] = set()
        self._current: str | None = None  # the wanted array we are in
        self._carry = b""  # its unfinished record
        self._parted = False  # it had a comma already
        self._tail = b""  # the text before the present block, where a key may be

    def feed(self, block: bytes) -> Iterator[Lines]:
        """Yield the records that end in this block."""
        if not self._opener:
            block = block.removeprefix(BOM)
        position, char, depth = self._structure(block)
        self._check_outer(block, position, char, depth)
        text = np.frombuffer(block, dtype=np.uint8).copy()
        text[(text == 10) | (text == 13)] = 32  # from here on a newline parts two records
        text[position[(char == ord(",")) & (depth == self._level)]] = 10
        opens = (char == ord("[")) & (depth == self._level)
        edges = opens | (char == ord("]")) & (depth == self._level - 1)
        start = 0
        for at, is_open in zip(position[edges].tolist(), opens[edges].tolist(), strict=True):
            if is_open:
                self._enter(block, at)
                start = at + 1
            elif self._current is not None:
                yield from self._close(text[start:at].tobytes())
        if self._current is not None:
            yield from self._extend(text[start:].tobytes())
        self._tail = (self._tail + block[-_KEY_BYTES:])[-_KEY_BYTES:]

    def finish(self) -> None:
        """Raise TextDamage unless the file was one whole JSON value."""
        if not self._opener:
            raise TextDamage("it is empty; wanted a JSON list or object")
        if not self._over:
            raise TextDamage("it ends early: a bracket or a string is not closed")

    def _structure(self, block: bytes) -> tuple[Positions, Bytes, Positions]:
        """Return position and byte of every bracket and comma outside strings, and the depth after it."""
        plain = self._without_escapes(block)
        position = np.flatnonzero(_STRUCTURAL[plain])
        char = plain[position]
        quotes = char == ord('"')
        inside = (np.cumsum(quotes) + self._in_string) % 2 == 1
        if len(inside):
            self._in_string = bool(inside[-1])
        outside = ~quotes & ~inside
        position, char = position[outside], char[outside]
        depth = self._depth + np.cumsum(_DELTA[char], dtype=np.int64)
        if len(depth):
            self._depth = int(depth[-1])
        if depth.max(initial=0) > MAX_DEPTH:
            raise TextDamage(f"its brackets are nested more than {MAX_DEPTH} deep")
        return position, char, depth

    def _without_escapes(self, block: bytes) -> Bytes:
        """Return the block with escaped quotes and backslashes blanked, byte for byte in place."""
        if self._escaped:
            block = b"_" + block[1:]
        if b"\\" in block:
            block = block.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        self._escaped = block.endswith(b"\\")
        return np.frombuffer(block, dtype=np.uint8)

    def _check_outer(self, block: bytes, position: Positions, char: Bytes, depth: Positions) -> None:
        """Raise TextDamage unless the file is one value, with nothing around its first and last bracket."""
        wanted = b"[" if self._level == 1 else b"{"
        self._opener = self._opener or block.lstrip()[:1]
        if self._opener not in (b"", wanted):
            opener = self._opener.decode("ascii", "backslashreplace")
            raise TextDamage(f"it begins with '{opener}'; wanted '{wanted.decode()}'")
        if self._over and block.strip():
            raise TextDamage(_AFTER)
        ends = np.flatnonzero(depth == 0)
        if not len(ends):
            return
        if block[int(position[ends[0]]) + 1 :].strip():
            raise TextDamage(_AFTER)
        if int(char[ends[0]]) != _CLOSER[wanted] or self._in_string:
            raise TextDamage("its brackets do not match")
        self._over = True

    def _enter(self, block: bytes, at: int) -> None:
        """Begin the array that opens at `at`; the key before it is its name."""
        if self._current is not None:
            raise TextDamage(f"its brackets do not match: {self._current!r} is not closed")
        name = "" if self._level == 1 else self._key_before(block, at)
        if name in self._seen:
            raise TextDamage(f"{name!r} is given twice")
        self._seen.add(name)
        self._current = name if name in self._names else None
        self._carry, self._parted = b"", False

    def _key_before(self, block: bytes, at: int) -> str:
        match = _KEY.search((self._tail + block[max(0, at - _KEY_BYTES) : at])[-_KEY_BYTES:])
        if match is None:
            raise TextDamage("there is a list where a key was expected")
        return match.group(1).decode("utf-8", errors="replace")

    def _extend(self, text: bytes) -> Iterator[Lines]:
        """Yield the whole records in more text of the current array, which goes on."""
        name = self._current or ""
        whole, comma, self._carry = (self._carry + text).rpartition(b"\n")
        if len(self._carry) > MAX_RECORD_BYTES:
            raise TextDamage(f"a record of {name!r} is longer than {MAX_RECORD_BYTES >> 20} MiB")
        if comma:
            self._parted = True
            yield Lines(name=name, text=whole, count=whole.count(b"\n") + 1)

    def _close(self, text: bytes) -> Iterator[Lines]:
        """Yield the last records of the current array. A blank one (after a comma) is counted, as no JSON."""
        name, last = self._current or "", self._carry + text
        self._current, self._carry = None, b""
        has_records = bool(last.strip()) or self._parted
        yield Lines(name=name, text=last, count=last.count(b"\n") + 1 if has_records else 0)
