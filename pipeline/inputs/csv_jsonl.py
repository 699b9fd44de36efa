"""CSV and JSONL read by Arrow with types stated beforehand: nothing is guessed from what the rows look like.

CSV: a header line, UTF-8; fields are parted by what parts the header most: comma, semicolon, tab or bar. An
empty field is null, a quoted empty one is the empty string, and words such as NA are text, so a class may be
called NA. A file that has quoted empty fields, or such words without quotes, in columns of numbers says by it
how it writes null, in all of its columns. Numbers have a decimal point. A list in a field is the text of
JSON, of Python, or of a numpy array of numbers or words: [[1, 2, 3, 4]], [(1, 2, 3, 4)], [[1. 2. 3. 4.]]; a
mask is JSON, or the text of a Python dictionary.

JSONL: one object a line; a missing key is null; NaN and Infinity are read as Python writes them.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from pipeline.inputs.columns import Kind, Leaf, plain_mask
from pipeline.inputs.json_stream import JsonDamage

BLOCK_BYTES = 32 * 2**20
"""The longest row; a longer one is refused."""
SAMPLE_BYTES = 4 * 2**20
SAMPLE_ROWS = 1000


def sampled_leaf(values: Iterable[Any]) -> Leaf:
    """The leaf of the values: text or a kind of whole number, by the first that is one; `null` for none.

    Of numbers all that are sampled count: `whole` when one is written as a float, `big` when int64 cannot
    hold one, else `integer`.
    """
    found: set[Leaf] = set()
    for leaf in _leaves(values):
        if leaf == "text" and not found:
            return "text"
        found.add(leaf)
    return next((leaf for leaf in ("whole", "big", "integer") if leaf in found), "null")


def _leaves(values: Iterable[Any]) -> Iterator[Leaf]:
    for value in values:
        if isinstance(value, list):
            yield from _leaves(value)
        elif isinstance(value, str):
            yield "text"
        elif isinstance(value, float) and value == value:  # pandas' gap among words is NaN
            yield "whole"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield "integer" if -(2**63) <= value < 2**63 else "big"


# ---------------------------------------------------------------------------------------------
# CSV
# ---------------------------------------------------------------------------------------------

_SEPARATORS = ",;\t|"
_LOOK_BYTES = 2**16
_OTHER_BYTES = (
    (b"\xff\xfe", "UTF-16 text; wanted UTF-8: iconv -f UTF-16 -t UTF-8 IN > OUT"),
    (b"\xfe\xff", "UTF-16 text; wanted UTF-8: iconv -f UTF-16 -t UTF-8 IN > OUT"),
    (b"\x1f\x8b", "compressed by gzip; unpack it, or name it so if it is a table (.csv.gz, .jsonl.gz)"),
    (b"PK\x03\x04", "a zip or an Excel workbook; wanted plain text: save it as CSV (UTF-8)"),
    (b"PAR1", "Parquet; name it .parquet"),
)


@dataclass(frozen=True, kw_only=True)
class _Dialect:
    """How a CSV is written. `skip`: lines before the header.

    `nulls`: what means null where it is not quoted; `quoted_nulls`: where it is quoted, too.
    """

    separator: str
    skip: int
    nulls: tuple[str, ...] = ("",)
    quoted_nulls: bool = False

    @property
    def parse(self) -> pa_csv.ParseOptions:
        return pa_csv.ParseOptions(delimiter=self.separator, newlines_in_values=True)

    def block(self, size: int) -> pa_csv.ReadOptions:
        # With threads Arrow does not know the number of a row, and its errors would not name it.
        return pa_csv.ReadOptions(block_size=size, use_threads=False, skip_rows=self.skip)


def refuse_other_bytes(stream: BinaryIO) -> bytes:
    """The beginning of a text file, which is rewound.

    Raises:
        JsonDamage: it begins as something else does.
    """
    head = stream.read(_LOOK_BYTES)
    stream.seek(0)
    for start, what in _OTHER_BYTES:
        if head.startswith(start):
            raise JsonDamage(f"it is {what}")
    if b"\0" in head:
        raise JsonDamage("it holds zero bytes, as UTF-16 does; wanted UTF-8 text")
    return head


def _dialect(stream: BinaryIO) -> _Dialect:
    """How a CSV is written, by its header; the stream is rewound.

    Raises:
        JsonDamage: a line of comment where the header was expected.
    """
    text = refuse_other_bytes(stream).removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace")
    every = text.splitlines()
    if every and (stated := re.fullmatch(r"sep=(.)", every[0])):  # as Excel writes and reads it
        return _Dialect(separator=stated[1], skip=1)
    lines = [re.sub(r'"[^"]*"', "", line) for line in every if line.strip()][:2]
    header = lines[0] if lines else ""
    separator = max(_SEPARATORS, key=header.count)
    if header.startswith("#") and len(lines) == 2 and header.count(separator) != _most(lines[1]):
        raise JsonDamage(
            f"line 1 is a comment ({header[:40]!r}); wanted the names of the columns: take it out"
        )
    return _Dialect(separator=separator, skip=0)


def _most(line: str) -> int:
    return max(map(line.count, _SEPARATORS))


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
    """Return the leaf of a column of UNSETTLED ones by its values; any other is as wanted.

    Integers are always read as `whole`: pandas writes 1.0 where a column has gaps, however late.
    """
    if wanted == "integer":
        return "whole"
    if wanted == "flag":
        return sampled_flag(values)
    return sampled_leaf(values) if wanted == "key" else wanted


def csv_header(stream: BinaryIO) -> tuple[list[str], dict[str, list[Any]]]:
    """The column names, and for columns whose fields look like lists the first rows' values."""
    dialect = _dialect(stream)
    if (header := _header_alone(stream, dialect)) is not None:
        return header, {}
    reader = pa_csv.open_csv(stream, read_options=dialect.block(SAMPLE_BYTES), parse_options=dialect.parse)
    try:
        first = reader.read_next_batch().slice(0, SAMPLE_ROWS)
    except StopIteration:
        return reader.schema.names, {}
    columns = zip(first.schema.names, first.columns, strict=True)
    return first.schema.names, {
        name: _list_samples(column) for name, column in columns if pa.types.is_string(column.type)
    }


def _header_alone(stream: BinaryIO, dialect: _Dialect) -> list[str] | None:
    """The names in a file of one line that does not end, which Arrow takes for an empty file; else None."""
    head = stream.read(_LOOK_BYTES)
    stream.seek(0)
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace")
    if not text.strip() or "\n" in text or "\r" in text or len(head) == _LOOK_BYTES:
        return None
    return next(csv.reader([text], delimiter=dialect.separator))


def _list_samples(column: pa.Array) -> list[Any]:
    texts = [text for text in column.to_pylist() if text and text.lstrip().startswith(("[", "("))]
    try:
        return [read_list(text) for text in texts]
    except JsonDamage:
        return []  # the reader below says where and why


Opened = Callable[[], contextlib.AbstractContextManager[BinaryIO]]


def csv_batches(
    opened: Opened, columns: Mapping[str, Kind], header: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """The rows of the named columns, typed by their kinds; `header`: all columns there, for messages.

    Numbers are read by Arrow. From the first field on that Arrow does not take (a quoted empty one, `1.0` for
    an integer) they are read as text and converted here, which is slower and says more.

    `opened`: opens the file from its start. Each pass takes a stream of its own, because Arrow's threads read
    ahead, and go on doing so after a pass has ended.
    """
    with opened() as stream:
        dialect = _dialect(stream)
        if _header_alone(stream, dialect) is not None:
            return
        dialect = _with_nulls(stream, dialect, columns)
    lists = {name for name, kind in columns.items() if kind.depth or kind.leaf == "rle"}
    strict = {name: pa.string() if name in lists else kind.arrow_type() for name, kind in columns.items()}
    done = 0
    try:
        with opened() as stream:
            for batch in _csv_rows(stream, dialect, strict, header):
                yield _converted(batch, columns, lists, first=done)
                done += batch.num_rows
        return
    except _OtherField as error:
        dialect = replace(dialect, quoted_nulls=dialect.quoted_nulls or error.found == "''")
    loose = {name: pa.string() if _is_number(columns[name]) else kind for name, kind in strict.items()}
    first = 0
    with opened() as stream:
        for batch in _csv_rows(stream, dialect, loose, header):
            new = batch.slice(min(batch.num_rows, max(0, done - first)))
            if new.num_rows:
                yield _converted(new, columns, lists, first=max(done, first))
            first += batch.num_rows


_NULL_WORDS = ("NA", "N/A", "#N/A", "NULL", "null", "None", "\\N")


def _with_nulls(stream: BinaryIO, dialect: _Dialect, columns: Mapping[str, Kind]) -> _Dialect:
    """The dialect with what means null, by the columns of numbers in the first rows."""
    types = {name: pa.string() for name, kind in columns.items() if _is_number(kind)}
    if not types:
        return dialect
    options = pa_csv.ConvertOptions(
        column_types=types,
        include_columns=list(types),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
        true_values=["1", "1.0", "true", "TRUE", "True"],  # pandas writes 1.0 beside empty fields
        false_values=["0", "0.0", "false", "FALSE", "False"],
    )
    try:
        first = pa_csv.open_csv(
            stream,
            read_options=dialect.block(SAMPLE_BYTES),
            parse_options=dialect.parse,
            convert_options=options,
        ).read_next_batch()
    except (StopIteration, pa.ArrowInvalid):
        return dialect  # the reader says where and why
    found = {word for column in first.columns for word in pc.unique(column).to_pylist()}
    words = (word for word in _NULL_WORDS if word in found)
    return replace(dialect, nulls=("", *words), quoted_nulls="" in found)


class _OtherField(JsonDamage):
    """A field is not of the type that was stated for its column. `found`: the field in quotes."""

    def __init__(self, message: str, found: str) -> None:
        super().__init__(message)
        self.found = found


def _csv_rows(
    stream: BinaryIO, dialect: _Dialect, types: Mapping[str, pa.DataType], header: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Arrow's batches; what it says of a column by its number alone is said with the column's name."""
    convert = pa_csv.ConvertOptions(
        column_types=types,
        include_columns=list(types),
        null_values=list(dialect.nulls),
        strings_can_be_null=True,
        quoted_strings_can_be_null=dialect.quoted_nulls,
    )
    try:
        yield from pa_csv.open_csv(
            stream,
            read_options=dialect.block(BLOCK_BYTES),
            parse_options=dialect.parse,
            convert_options=convert,
        )
    except pa.ArrowInvalid as error:
        text = str(error)
        if "invalid UTF8" in text and (match := _CSV_COLUMN.search(text)) is not None:
            raise JsonDamage(
                f"{header[int(match['column'])]!r} is not UTF-8 text; wanted UTF-8: "
                "iconv -f WINDOWS-1252 -t UTF-8 IN > OUT, if that is how it was saved"
            ) from error
        match = _CSV_FIELD.search(text)
        if match is None:
            raise
        wanted = _WORDS.get(match["wanted"], match["wanted"])
        place = f" in row {match['row']}" if match["row"] else ""
        name, found = header[int(match["column"])], match["found"]
        raise _OtherField(_other_field(name, found, place, wanted), found) from error


_CSV_COLUMN = re.compile(r"In CSV column #(?P<column>\d+):")
_CSV_FIELD = re.compile(
    r"In CSV column #(?P<column>\d+):(?: Row #(?P<row>\d+):)? CSV conversion error to (?P<wanted>\w+): "
    r"invalid value (?P<found>'.*')",
    re.DOTALL,
)


def _other_field(name: str, found: str, place: str, wanted: str) -> str:
    inner, hint = found.strip("'").strip(), ""
    if re.fullmatch(r"[+-]?[0-9][0-9.,' ]*", inner) and "," in inner:
        hint = "; decimal commas and signs between thousands are not read: write 1234.5"
    elif inner.lower() in ("na", "n/a", "nan", "null", "none", "-", "?", "\\n", ""):
        hint = "; an empty field means that there is none"
    return f"{name!r} holds {found[:40]}{place}; wanted {wanted}{hint}"


def _is_number(kind: Kind) -> bool:
    return not kind.depth and kind.leaf in ("number", "integer")


def _converted(
    batch: pa.RecordBatch, columns: Mapping[str, Kind], lists: Collection[str], *, first: int
) -> pa.RecordBatch:
    """A batch with every column as its kind wants it; `first`: rows of the file before it, for messages."""
    arrays = []
    for name, kind in columns.items():
        column = batch.column(name)
        if name in lists:
            column = _parse_fields(column, name, kind)
        elif _is_number(kind) and pa.types.is_string(column.type):
            column = _numbers(column, name, kind, first)
        arrays.append(column)
    return pa.record_batch(arrays, names=list(columns))


def _numbers(texts: pa.Array, name: str, kind: Kind, first: int) -> pa.Array:
    """A column of text as numbers; an empty text is null, and `3.0` is an integer."""
    trimmed = pc.utf8_trim_whitespace(texts)
    trimmed = pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)
    if kind.leaf == "integer":
        trimmed = pc.replace_substring_regex(trimmed, r"\A([+-]?[0-9]+)\.0*\z", r"\1")
    try:
        return pc.cast(trimmed, kind.arrow_type())
    except pa.ArrowInvalid as error:
        at = next(i for i in range(len(trimmed)) if not _is_castable(trimmed[i], kind))
        wanted = _WORDS[str(kind.arrow_type())]
        # Arrow counts the header as row 1
        raise JsonDamage(
            _other_field(name, repr(texts[at].as_py()), f" in row {first + at + 2}", wanted)
        ) from error


def _is_castable(value: pa.Scalar, kind: Kind) -> bool:
    try:
        value.cast(kind.arrow_type())
    except pa.ArrowInvalid:
        return False
    return True


def _parse_fields(texts: pa.Array, name: str, kind: Kind) -> pa.Array:
    """Texts of lists -> lists, by writing them as one JSONL and reading that; null stays null."""
    if kind.leaf == "rle":
        fields = [_masks_field(text, kind.depth, name) if text else None for text in texts.to_pylist()]
        texts = pa.array(fields, pa.string())
    else:
        texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, texts.type), texts)
    schema = pa.schema([(name, kind.arrow_type())])
    try:
        parsed = read_lines(_as_lines(texts, name), len(texts), schema)
    except (pa.ArrowInvalid, JsonDamage):
        if kind.leaf == "rle":
            raise
        # Not all of it is JSON: it is read as Python or numpy write lists, which Arrow cannot.
        lists = [None if text is None else read_list(text, name) for text in texts.to_pylist()]
        if kind.leaf != "number":
            lists = [_without_nan(one) for one in lists]
        values = [None if one is None else json.dumps(one) for one in lists]
        parsed = read_lines(_as_lines(pa.array(values, pa.string()), name), len(texts), schema)
    return parsed.column(name).combine_chunks()


def _without_nan(value: Any) -> Any:
    """The same with null for NaN, which among words or classes is pandas' gap and can be nothing else."""
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value


def _as_lines(texts: pa.Array, name: str) -> bytes:
    one_line = pc.replace_substring_regex(pc.fill_null(texts, "null"), "[\r\n]", " ")
    lines = pc.binary_join_element_wise(f"{{{json.dumps(name)}:", one_line, "}", "")
    return "\n".join(lines.to_pylist()).encode()


_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<open>[\[(])|(?P<close>[\])])|(?P<comma>,)
    |(?P<number>[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(?![\w.])
    |(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<word>[+-]?[A-Za-z]+)(?![\w.(])""",
    re.VERBOSE | re.DOTALL,
)
_WORD_VALUES = {
    **dict.fromkeys(("null", "None", "NULL"), None),
    **dict.fromkeys(("nan", "NaN", "-nan"), float("nan")),
    **dict.fromkeys(("inf", "Infinity", "+inf"), float("inf")),
    **dict.fromkeys(("-inf", "-Infinity"), float("-inf")),
}
_CLOSERS = {"[": "]", "(": ")"}


def read_list(text: str, name: str = "") -> list[Any] | None:
    """The list that a text shows, as JSON, Python or numpy write lists of numbers and words; None for `None`.

    Values are parted by a comma or, as numpy does it, by white space. Nothing is evaluated.

    Raises:
        JsonDamage: anything else, such as the text of other objects, or rows that numpy left out (`...`).
    """
    whole: list[Any] = []
    stack, signs, parted = [whole], ["("], [False]
    at, may_be_value = 0, True  # False right after a value: a comma, white space or a bracket must come first
    while at < len(text):
        match = _TOKEN.match(text, at)
        kind = match.lastgroup if match else None
        if match is None or (kind not in ("space", "comma", "close") and not may_be_value):
            raise _no_list(text, at, name)
        token, at = match.group(), match.end()
        if kind == "open":
            stack.append([])
            signs.append(token)
            parted.append(False)
            may_be_value = True
        elif kind == "close":
            if len(stack) == 1 or _CLOSERS[signs.pop()] != token:
                raise _no_list(text, match.start(), name)
            done = stack.pop()
            if not parted.pop() and token == ")" and len(done) == 1:  # (7) is no list to Python
                raise _no_list(text, match.start(), name)
            stack[-1].append(done)
            may_be_value = False
        elif kind in ("space", "comma"):
            may_be_value = True
            parted[-1] |= kind == "comma"
        else:
            stack[-1].append(_value(kind, token, text, match.start(), name))
            may_be_value = False
    if (
        len(stack) != 1
        or len(whole) != 1
        or parted[0]
        or not (whole[0] is None or isinstance(whole[0], list))
    ):
        raise _no_list(text, 0, name)
    return whole[0]


def _value(kind: str | None, token: str, text: str, at: int, name: str) -> Any:
    if kind == "word" and token in _WORD_VALUES:
        return _WORD_VALUES[token]
    with contextlib.suppress(ValueError, SyntaxError):  # an escape that is none, 5,000 digits
        if kind == "number":
            return float(token) if any(sign in token for sign in ".eE") else int(token)
        if kind == "text":
            return _word(token)
    raise _no_list(text, at, name)


def _word(token: str) -> str:
    """A quoted word as JSON writes it, or else as Python does."""
    with contextlib.suppress(ValueError):
        return str(json.loads(token))
    return str(ast.literal_eval(token))


def _no_list(text: str, at: int, name: str) -> JsonDamage:
    rest = text[at:].lstrip()
    hint = ""
    if rest.startswith("..."):
        hint = "; numpy left numbers out there: write lists (.tolist()) instead of arrays"
    elif re.match(r"(np\.\w+|array|tensor|\w+)\(", rest):
        hint = "; it is the text of objects: write plain lists (.tolist()) instead"
    elif re.match(r"[^\W\d]", rest):
        hint = "; words stand in quotes (DuckDB writes them so by to_json(COLUMN))"
    place = f" at {rest[:20]!r}" if at and rest else ""
    wanted = """wanted JSON such as [[1, 2, 3, 4]] or ["a", "b"]"""
    return JsonDamage(f"{name!r} holds {text[:60]!r}, which is no list{place}; {wanted}{hint}")


# ---------------------------------------------------------------------------------------------
# JSONL
# ---------------------------------------------------------------------------------------------


def _masks_field(text: str, depth: int, name: str) -> str:
    """A CSV field of masks with each as it is to be; what shows none, as one mask that cannot be used.

    Raises:
        JsonDamage: it shows no list, where one is wanted.
    """
    value = _shown_masks(text)
    if depth and not (value is None or isinstance(value, list)):
        raise JsonDamage(
            f"{name!r} holds {text[:60]!r}, which is no list of masks; "
            'wanted JSON such as [{"size": [480, 640], "counts": "..."}, null]'
        )
    return json.dumps(_plain_masks(value, depth))


_QUOTED = re.compile(r"""b?("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""", re.DOTALL)
_AROUND_QUOTED = re.compile(r"(?:[\s0-9.,:\[\]{}()-]|None)*")
_MOST_OPEN = 8  # of brackets in one another; Python's parser can be made to fail by thousands


def _shown_masks(text: str) -> Any:
    """What a field shows, as JSON or as Python prints its dictionaries and bytes; else the text itself."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    around = _QUOTED.sub("", text)
    if _AROUND_QUOTED.fullmatch(around) and _deepest(around) <= _MOST_OPEN and "--" not in around:
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return ast.literal_eval(text.strip())
    return text


def _deepest(text: str) -> int:
    """How many brackets are open at once, at most."""
    opened = (1 if sign in "[{(" else -1 for sign in text if sign in "[{()}]")
    return max(itertools.accumulate(opened), default=0)


def _plain_masks(value: Any, depth: int) -> Any:
    if not depth:
        return plain_mask(value)
    return [_plain_masks(one, depth - 1) for one in value] if isinstance(value, list) else value


def jsonl_sample(stream: BinaryIO) -> dict[str, list[Any]]:
    """The values of the first rows by key, in the order in which the keys appear.

    Raises:
        JsonDamage: a line that is no JSON object.
    """
    refuse_other_bytes(stream)
    head = stream.read(SAMPLE_BYTES)
    whole = len(head) < SAMPLE_BYTES
    lines = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" and not _is_json(lines[0]):
        raise JsonDamage("it is one JSON list; wanted one object a line: jq -c '.[]' IN > OUT")
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
        many = "; an object must stand on one line: jq -c . IN > OUT" if line.strip() in (b"{", b"[") else ""
        raise JsonDamage(f"line {number} is no JSON: {error}{many}") from error
    if not isinstance(row, dict):
        raise JsonDamage(
            f"line {number} holds {word_of(row)}; wanted an object "
            "(a file that is one JSON value, such as COCO, must be named .json; a list of rows becomes lines "
            "by jq -c '.[]' IN > OUT)"
        )
    return row


def word_of(value: object) -> str:
    """What a value of JSON is called there."""
    if value is None or isinstance(value, bool):
        return str(json.dumps(value))
    words = ((list, "a list"), (str, "text"), (dict, "an object"))
    return next((word for kind, word in words if isinstance(value, kind)), "a number")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


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


class _Lines(io.BufferedIOBase):
    """A stream of lines, each changed on its way."""

    def __init__(self, stream: BinaryIO, change: Callable[[bytes], bytes]) -> None:
        self._stream, self._change = stream, change
        self._ready = b""  # changed, and not yet read
        self._rest = b""  # the beginning of a line
        self._ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        size = sys.maxsize if size is None or size < 0 else size
        while len(self._ready) < size and not self._ended:
            chunk = self._stream.read(SAMPLE_BYTES)
            self._ended = not chunk
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            if len(self._rest) > BLOCK_BYTES:
                raise JsonDamage(f"a row is longer than {BLOCK_BYTES >> 20} MiB")
            self._ready += b"".join(self._change(line) + b"\n" for line in lines)
            if self._ended:
                self._ready += self._change(self._rest)
        data, self._ready = self._ready[:size], self._ready[size:]
        return data


def _with_plain_masks(line: bytes, depths: Mapping[str, int]) -> bytes:
    """The line with each mask as it is to be; a line that is no JSON object is for the reader to refuse."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if not isinstance(row, dict):
        return line
    found = {name: row[name] for name in depths if name in row}
    masks = {name: _plain_masks(value, depths[name]) for name, value in found.items()}
    # Compared as text: 480.0 equals 480, and is no whole number to the reader.
    same = json.dumps(masks, sort_keys=True) == json.dumps(found, sort_keys=True)
    return line if same else json.dumps(row | masks).encode()


def jsonl_batches(stream: BinaryIO, columns: Mapping[str, Kind]) -> Iterator[pa.RecordBatch]:
    """The rows of the named keys, typed by their kinds; other keys are not looked at.

    Raises:
        pa.ArrowInvalid, JsonDamage: as `read_lines`.
    """
    schema = pa.schema([(name, kind.arrow_type()) for name, kind in columns.items()])
    depths = {name: kind.depth for name, kind in columns.items() if kind.leaf == "rle"}
    if depths:
        stream = cast("BinaryIO", _Lines(stream, lambda line: _with_plain_masks(line, depths)))
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
    r"Failed to convert JSON to (?P<wanted>\w+(?:\([^)]*\))?), couldn't parse:\s*(?P<found>.*)", re.DOTALL
)

_NOT_WHOLE = re.compile(r"Failed to convert JSON to (?P<wanted>decimal128\(38, 0\)): (?P<found>\S+) requires")

_OTHER_HINTS = {
    ("a number", "text"): " (a missing value is null, not NaN)",
    ("text", "a list"): " (text that looks like a list is read from CSV alone)",
}
_WORDS = {
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


@contextlib.contextmanager
def _naming_keys(schema: pa.Schema) -> Iterator[None]:
    """Says as a person would what Arrow says of a value of another type, the row in its block left out."""
    try:
        yield
    except pa.ArrowInvalid as error:
        if (match := _OTHER_TYPE.search(str(error))) is not None:
            key = match["path"].replace("/[]", "[]").replace("/", ".")
            found, wanted = (_WORDS.get(match[name], match[name]) for name in ("found", "wanted"))
            hint = _OTHER_HINTS.get((found, wanted), "")
            raise JsonDamage(f"{key!r} holds {found}; wanted {wanted}{hint}") from error
        if (match := _OTHER_NUMBER.search(str(error)) or _NOT_WHOLE.search(str(error))) is not None:
            keys = [repr(field.name) for field in schema if _leaf_type(field.type) == match["wanted"]]
            wanted = _WORDS.get(match["wanted"], match["wanted"])
            raise JsonDamage(f"{' or '.join(keys)} holds {match['found'][:40]}; wanted {wanted}") from error
        raise


def _leaf_type(kind: pa.DataType) -> str:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return str(kind)
