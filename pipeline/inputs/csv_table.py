"""CSV, read by Arrow as text and made numbers and lists here: no type is guessed from the rows.

A header line, UTF-8; fields are parted by what parts the header most: comma, semicolon, tab or bar. An empty
field is null, a quoted empty one is the empty string, and words such as NA are text, so a class may be called
NA. A file that has quoted empty fields, or such words without quotes, in columns of numbers shows by it how
it writes null, in all of its columns. Numbers have a decimal point. A list in a field is the text of JSON, of
Python, or of a numpy array of numbers or words: [[1, 2, 3, 4]], [(1, 2, 3, 4)], [[1. 2. 3. 4.]]; a mask is
JSON, or the text of a Python dictionary, and so may be a box: {'x1': 1.0, 'y1': 2.0, 'x2': 3.0, 'y2': 4.0}.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from hqlabel.pipeline.errors import count
from hqlabel.pipeline.inputs.columns import (
    ARROW_WORDS,
    Found,
    Kind,
    plain_corners,
    plain_masks,
    readable,
)
from hqlabel.pipeline.inputs.json_records import (
    BLOCK_BYTES,
    BOM,
    HEAD_BYTES,
    SAMPLE_BYTES,
    SAMPLE_ROWS,
    TextDamage,
    read_lines,
    refuse_other_bytes,
)

_SEPARATORS = ",;\t|"
_NULL_WORDS = ("NA", "N/A", "#N/A", "NULL", "null", "None", "\\N")


@dataclass(frozen=True, kw_only=True)
class _Dialect:
    """How a CSV is written.

    `skip`: lines before the header. `only_header`: the columns of a file of one line that does not end, which
    Arrow takes for an empty file.
    """

    separator: str
    skip: int = 0
    only_header: tuple[str, ...] | None = None


def _dialect(stream: BinaryIO) -> _Dialect:
    """Return how a CSV is written, by its header; the stream is rewound.

    Raises:
        TextDamage: a line of comment where the header was expected.
    """
    head = refuse_other_bytes(stream)
    text = head.removeprefix(BOM).decode("utf-8", errors="replace")
    every = text.splitlines()
    if every and (stated := re.fullmatch(r"sep=(.)", every[0])):  # as Excel writes and reads it
        return _Dialect(separator=stated[1], skip=1)
    lines = [re.sub(r'"[^"]*"', "", line) for line in every if line.strip()][:2]
    header = lines[0] if lines else ""
    separator = max(_SEPARATORS, key=header.count)
    if header.startswith("#") and len(lines) == 2:
        most = max(map(lines[1].count, _SEPARATORS))
        if header.count(separator) != most:
            raise TextDamage(
                f"line 1 is a comment ({header[:40]!r}); wanted the names of the columns: take it out"
            )
    if text.strip() and "\n" not in text and "\r" not in text and len(head) < HEAD_BYTES:
        return _Dialect(separator=separator, only_header=tuple(next(csv.reader([text], delimiter=separator))))
    return _Dialect(separator=separator)


def csv_header(stream: BinaryIO) -> tuple[list[str], dict[str, list[Any]]]:
    """Return the column names, and for columns whose fields look like lists the first rows' values."""
    dialect = _dialect(stream)
    if dialect.only_header is not None:
        return list(dialect.only_header), {}
    reader = _open(stream, dialect, block=SAMPLE_BYTES)
    try:
        first = reader.read_next_batch().slice(0, SAMPLE_ROWS)
    except StopIteration:
        return reader.schema.names, {}
    columns = zip(first.schema.names, first.columns, strict=True)
    return first.schema.names, {
        name: _list_samples(column) for name, column in columns if pa.types.is_string(column.type)
    }


def _open(
    stream: BinaryIO,
    dialect: _Dialect,
    convert: pa_csv.ConvertOptions | None = None,
    *,
    block: int,
    skipped: dict[int, str] | None = None,
) -> pa_csv.CSVStreamingReader:
    rows = {} if skipped is None else skipped

    def skip(row: pa_csv.InvalidRow) -> Literal["skip"]:
        fields = f"has {count(row.actual_columns, 'field')}; wanted {row.expected_columns}"
        rows[row.number - 2 - dialect.skip] = f"{fields}: {row.text[:60]!r}"  # the header is row 1
        return "skip"

    # With threads Arrow does not know the number of a row.
    return pa_csv.open_csv(
        stream,
        read_options=pa_csv.ReadOptions(block_size=block, use_threads=False, skip_rows=dialect.skip),
        parse_options=pa_csv.ParseOptions(
            delimiter=dialect.separator, newlines_in_values=True, invalid_row_handler=skip
        ),
        convert_options=convert,
    )


def _list_samples(column: pa.Array) -> list[Any]:
    texts = [text for text in column.to_pylist() if text and text.lstrip().startswith(("[", "(", "{"))]
    if texts and texts[0].lstrip()[0] == "{":
        return [_shown_masks(text) for text in texts]
    try:
        return [read_list(text) for text in texts]
    except TextDamage:
        return []  # the reader reports where and why


def csv_batches(
    opened: Callable[[], contextlib.AbstractContextManager[BinaryIO]],
    columns: Mapping[str, Kind],
    skipped: dict[int, str],
) -> Iterator[tuple[pa.RecordBatch, Found]]:
    """Yield the rows of the named columns, typed by their kinds, and which values are null as unusable.

    `skipped` gets the rows that have another number of fields than the header: number -> reason.

    `opened`: opens the file from its start. Each pass takes a stream of its own, because Arrow's threads read
    ahead, and go on doing so after a pass has ended.

    Raises:
        TextDamage: the last row is cut.
    """
    numbers = [name for name, kind in columns.items() if _is_number(kind)]
    with opened() as stream:
        dialect = _dialect(stream)
        if dialect.only_header is not None:
            return
        sampled = _texts_of_numbers(stream, dialect, numbers)
    nulls = ["", *(word for word in _NULL_WORDS if word in sampled)]
    quoted_nulls = "" in sampled  # unquoted ones are null by then
    first = 0
    with opened() as stream:
        options = _as_text(list(columns), nulls)
        for raw in _open(stream, dialect, options, block=BLOCK_BYTES, skipped=skipped):
            found: Found = {name: {} for name in columns}
            batch = pa.record_batch(
                [readable(raw.column(name), _utf8, found[name]) for name in columns], names=list(columns)
            )
            quoted_nulls |= any(pc.any(pc.equal(batch.column(name), "")).as_py() for name in numbers)
            yield _converted(batch, columns, nulls if quoted_nulls else [], found), found
            first += batch.num_rows
    last = first + len(skipped) - 1
    if last in skipped and _is_cut(opened):
        raise TextDamage(f"it ends early: its last row {skipped[last]}")


def _is_cut(opened: Callable[[], contextlib.AbstractContextManager[BinaryIO]]) -> bool:
    """Return whether the last line has no end."""
    end = b""
    with opened() as stream:
        while block := stream.read(SAMPLE_BYTES):
            end = block[-1:]
    return end not in (b"\n", b"\r")


def _utf8(values: pa.Array) -> pa.Array:
    try:
        return pc.cast(values, pa.string())
    except pa.ArrowInvalid as error:
        raise TextDamage(
            "a value is not UTF-8 text; wanted UTF-8: "
            "iconv -f WINDOWS-1252 -t UTF-8 IN > OUT, if that is how it was saved"
        ) from error


def _texts_of_numbers(stream: BinaryIO, dialect: _Dialect, numbers: Sequence[str]) -> set[str | None]:
    """Return what the first rows hold in the columns of numbers."""
    if not numbers:
        return set()
    try:
        first = _open(stream, dialect, _as_text(numbers, [""]), block=SAMPLE_BYTES).read_next_batch()
    except (StopIteration, pa.ArrowInvalid):
        return set()  # the reader reports where and why
    words = (word for column in first.columns for word in pc.unique(column).to_pylist())
    return {None if word is None else word.decode(errors="replace") for word in words}


def _as_text(names: Sequence[str], nulls: Sequence[str]) -> pa_csv.ConvertOptions:
    return pa_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.binary()),  # one that is not UTF-8 costs its own row
        include_columns=list(names),
        null_values=list(nulls),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )


def _is_number(kind: Kind) -> bool:
    return not kind.depth and kind.leaf in ("number", "integer")


def _converted(
    batch: pa.RecordBatch, columns: Mapping[str, Kind], quoted_nulls: Sequence[str], found: Found
) -> pa.RecordBatch:
    """Return a batch of text with every column as its kind wants it; `found` gets what cannot be so.

    `quoted_nulls`: texts that are null though they are quoted.
    """
    arrays = []
    for name, kind in columns.items():
        column = batch.column(name)
        if quoted_nulls:
            is_null = pc.is_in(column, pa.array(quoted_nulls, pa.string()))
            column = pc.if_else(is_null, pa.scalar(None, pa.string()), column)
        if kind.depth or kind.leaf == "rle":
            column = readable(column, functools.partial(_lists, name=name, kind=kind), found[name])
        elif _is_number(kind):
            column = readable(column, functools.partial(_numbers, name=name, kind=kind), found[name])
        arrays.append(column)
    return pa.record_batch(arrays, names=list(columns))


def _numbers(texts: pa.Array, name: str, kind: Kind) -> pa.Array:
    """Return a column of text as numbers; an empty text is null, and `3.0` is an integer."""
    with contextlib.suppress(pa.ArrowInvalid):
        return pc.cast(texts, kind.arrow_type())
    trimmed = pc.utf8_trim_whitespace(texts)
    trimmed = pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, pa.string()), trimmed)
    if kind.leaf == "integer":
        trimmed = pc.replace_substring_regex(trimmed, r"\A([+-]?[0-9]+)\.0*\z", r"\1")
    try:
        return pc.cast(trimmed, kind.arrow_type())
    except pa.ArrowInvalid as error:
        if len(texts) > 1:
            raise
        raise TextDamage(_other_field(name, repr(texts[0].as_py()), kind)) from error


def _other_field(name: str, text: str, kind: Kind) -> str:
    inner, hint = text.strip("'").strip(), ""
    if re.fullmatch(r"[+-]?[0-9][0-9.,' ]*", inner) and "," in inner:
        hint = "; decimal commas and signs between thousands are not read: write 1234.5"
    elif inner.lower() in ("na", "n/a", "nan", "null", "none", "-", "?", "\\n", ""):
        hint = "; an empty field means that there is none"
    return f"{name!r} holds {text[:40]}; wanted {ARROW_WORDS[str(kind.arrow_type())]}{hint}"


# ---------------------------------------------------------------------------------------------
# Lists and masks in a field
# ---------------------------------------------------------------------------------------------


def _lists(texts: pa.Array, name: str, kind: Kind) -> pa.Array:
    """Return texts of lists as lists, by writing them as JSONL and reading that; null stays null."""
    if kind.leaf == "rle":
        fields = [_masks_field(text, kind.depth, name) if text else None for text in texts.to_pylist()]
        return _read_fields(pa.array(fields, pa.string()), name, kind)
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, texts.type), texts)
    if len(texts) > 1:  # a field alone was refused with others: reading it once more costs Arrow 0.3 ms
        with contextlib.suppress(pa.ArrowInvalid, TextDamage):
            return _read_fields(texts, name, kind)
    # Not all of it is JSON: it is read as Python or numpy write lists, which Arrow cannot.
    lists = [None if text is None else _read_field(text, name, kind) for text in texts.to_pylist()]
    if kind.leaf != "number":
        lists = [_without_nan(one) for one in lists]
    values = [None if one is None else json.dumps(one) for one in lists]
    return _read_fields(pa.array(values, pa.string()), name, kind)


def _read_field(text: str, name: str, kind: Kind) -> list[Any] | None:
    """Return the list that a field shows; a box may be an object of four corners."""
    if kind == Kind(1, "number") and text.lstrip().startswith("{"):
        corners = plain_corners(_shown_masks(text))
        if isinstance(corners, list):
            return corners
    return read_list(text, name)


def _read_fields(texts: pa.Array, name: str, kind: Kind) -> pa.Array:
    one_line = pc.replace_substring_regex(pc.fill_null(texts, "null"), "[\r\n]", " ")
    lines = pc.binary_join_element_wise(f"{{{json.dumps(name)}:", one_line, "}", "")
    text = "\n".join(lines.to_pylist()).encode()
    table = read_lines(text, len(texts), pa.schema([(name, kind.arrow_type())]))
    return table.column(name).combine_chunks()


def _without_nan(value: Any) -> Any:
    """Return the value with null for NaN, which among words or classes can only be pandas' gap."""
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value


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
    """Return the list that a text is, as JSON, Python or numpy write numbers and words; None for `None`.

    Values are parted by a comma or, as numpy does it, by white space. Nothing is evaluated.

    Raises:
        TextDamage: anything else, such as the text of other objects, or rows that numpy skips (`...`).
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
            with contextlib.suppress(ValueError):
                return str(json.loads(token))  # as JSON writes it, or else as Python does
            return str(ast.literal_eval(token))
    raise _no_list(text, at, name)


def _no_list(text: str, at: int, name: str) -> TextDamage:
    rest = text[at:].lstrip()
    hint = ""
    if rest.startswith("..."):
        hint = "; numpy left numbers out there: write lists (.tolist()) instead of arrays"
    elif re.match(r"(np\.\w+|array|tensor|\w+)\(", rest):
        hint = "; it is the text of objects: write plain lists (.tolist()) instead"
    elif re.match(r"[^\W\d]", rest):
        hint = "; words must be in quotes (DuckDB writes them so by to_json(COLUMN))"
    place = f" at {rest[:20]!r}" if at and rest else ""
    wanted = """wanted JSON such as [[1, 2, 3, 4]] or ["a", "b"]"""
    return TextDamage(f"{name!r} holds {text[:60]!r}, which is no list{place}; {wanted}{hint}")


def _masks_field(text: str, depth: int, name: str) -> str:
    """Return a CSV field of masks with each as it is to be; what shows none, as one mask that cannot be used.

    Raises:
        TextDamage: it shows no list, where one is wanted.
    """
    value = _shown_masks(text)
    if depth and not (value is None or isinstance(value, list)):
        raise TextDamage(
            f"{name!r} holds {text[:60]!r}, which is no list of masks; "
            'wanted JSON such as [{"size": [480, 640], "counts": "..."}, null]'
        )
    return json.dumps(plain_masks(value, depth))


_QUOTED = re.compile(r"""b?("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""", re.DOTALL)
_AROUND_QUOTED = re.compile(r"(?:[\s0-9.,:\[\]{}()-]|None)*")
_MOST_OPEN = 8  # of brackets in one another; Python's parser can be made to fail by thousands


def _shown_masks(text: str) -> Any:
    """Return a field parsed as JSON, or as Python prints dictionaries and bytes; else the text itself."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    around = _QUOTED.sub("", text)
    opened = (1 if sign in "[{(" else -1 for sign in around if sign in "[{()}]")
    deepest = max(itertools.accumulate(opened), default=0)
    if _AROUND_QUOTED.fullmatch(around) and deepest <= _MOST_OPEN and "--" not in around:
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return ast.literal_eval(text.strip())
    return text
