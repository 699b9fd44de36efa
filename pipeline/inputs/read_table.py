"""Tables of users (Parquet, CSV, JSONL), read as plain columns in batches of bounded memory.

Two steps. `inspect_tables` opens every file, finds the wanted columns and checks their types, so that a
job is refused before any value is used. `read_batches` then reads only those columns. A file that cannot
be read, or is no table of its kind, refuses the job by name: half of a table is never labelled.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa

from hqlabel.pipeline.arrow_lists import single
from hqlabel.pipeline.errors import HqlabelError, JobRefused, clean_text
from hqlabel.pipeline.inputs.columns import (
    CORNERS,
    RECORD,
    UNSETTLED,
    Found,
    Kind,
    RowFaults,
    check_type,
    is_corners,
    locate,
    plain,
    plain_corners,
    readable,
    sampled_leaf,
    settle,
)
from hqlabel.pipeline.inputs.csv_table import csv_batches, csv_header
from hqlabel.pipeline.inputs.json_records import BLOCK_BYTES, TextDamage, jsonl_batches, jsonl_sample
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.storage.checksummed_parquet import open_closed
from hqlabel.pipeline.storage.parquet_pages import rows_at_once
from hqlabel.pipeline.storage.read_objects import open_input
from hqlabel.pipeline.storage.uri_rules import options_for

TableFormat = Literal["parquet", "csv", "jsonl"]
TABLE_SUFFIXES: dict[str, TableFormat] = {
    **dict.fromkeys((".parquet", ".pq", ".parq"), "parquet"),
    **dict.fromkeys((".csv", ".tsv", ".csv.gz", ".tsv.gz"), "csv"),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"), "jsonl"),
}
BATCH_ROWS = 8192
BATCH_BYTES = 64 * 2**20
FREE_BYTES = 256 * 2**20
"""What any .gz may unpack to; a larger one at most to MOST_RATIO times its size. Tables come to 5 to 30."""
MOST_RATIO = 200
_CHECK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """One checked file: `names` our name -> its name, `kinds` our name -> what the column holds.

    `all_names`: every column of the file, for messages. `corners`: columns whose boxes are objects, or
    structs, of four corners, by the first rows. `groups`: the row groups of a Parquet file that are read,
    None for all; `first_row`: the number of the first row that is read.
    """

    uri: str
    file_format: TableFormat
    names: Mapping[str, str]
    kinds: Mapping[str, Kind]
    all_names: tuple[str, ...]
    corners: tuple[str, ...] = ()
    groups: tuple[int, ...] | None = None
    first_row: int = 0


def table_format(uri: str) -> TableFormat | None:
    """Return the format by a file's name, in any case; None for other names."""
    lowered = uri.lower()
    return next((kind for suffix, kind in TABLE_SUFFIXES.items() if lowered.endswith(suffix)), None)


_OTHER_FILES: dict[str, str] = {
    ".gz .zst .bz2 .xz .zip .lz4 .7z": "unpack it; only .csv.gz and .jsonl.gz are read as such",
    ".xlsx .xls .ods .numbers": "a workbook; save the sheet as CSV (UTF-8)",
    ".feather .arrow .ipc .orc .avro": "write it as Parquet",
    ".pkl .pickle .npy .npz .pt .pth .h5 .hdf5 .mat": "write it as Parquet",
    ".txt .xml": "one file of labels for each picture is read as a folder of YOLO's, or converted to COCO",
}


def instead_of(uri: str) -> str:
    """Return what to do about a file that is no table by its name, as the end of a sentence, or ""."""
    endings = ((tuple(names.split()), text) for names, text in _OTHER_FILES.items())
    return next((f": {text}" for names, text in endings if uri.lower().endswith(names)), "")


def inspect_tables(
    uris: Sequence[str], wanted: Mapping[str, Kind], mapping: Mapping[str, str], access: AccessRules
) -> tuple[TableFile, ...]:
    """Return the files of one table, their wanted columns found, checked and of one kind throughout.

    Raises:
        JobRefused: unreadable, a type other than wanted, or files that differ (one is named).
    """
    files = [_inspect(uri, wanted, mapping, access) for uri in uris]
    for file in files[1:]:
        _check_same_columns(file, files[0])
    kinds = {
        name: settle(name, {file.uri: file.kinds[name] for file in files if name in file.kinds}, kind)
        for name, kind in wanted.items()
    }
    return tuple(replace(file, kinds={name: kinds[name] for name in file.names}) for file in files)


def _check_same_columns(file: TableFile, first: TableFile) -> None:
    if file.file_format != first.file_format:
        raise JobRefused(f"{file.uri}: another kind of file than {first.uri}; give one folder for each kind")
    if file.file_format == "jsonl":
        return  # a key that is missing means null there
    for name in first.names.keys() ^ file.names.keys():
        lacking, other = (file, first) if name in first.names else (first, file)
        raise JobRefused(f"{lacking.uri}: no column {name}, which {other.uri} has; the files must agree")


class _Unpacked(gzip.GzipFile):
    """A gzip file that ends with TextDamage where it unpacks to what no table is, such as endless zeros."""

    def __init__(self, stream: BinaryIO) -> None:
        self._most = max(FREE_BYTES, MOST_RATIO * stream.seek(0, io.SEEK_END))
        stream.seek(0)
        super().__init__(fileobj=stream)

    def refuse_too_much(self) -> None:
        """Unpack to the end before anything is parsed, where that is at most FREE_BYTES: rows take more.

        Raises:
            TextDamage: as `read`.
        """
        while self._most == FREE_BYTES and self.read(_CHECK_BYTES):
            pass
        self.seek(0)

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(BATCH_BYTES if size is None or size < 0 else size)
        if self.tell() > self._most:
            raise TextDamage(
                f"it unpacks to more than {MOST_RATIO} times its size; if that is right: gunzip FILE"
            )
        return data


@contextlib.contextmanager
def _unpacked(uri: str, access: AccessRules) -> Iterator[BinaryIO]:
    """Return a table's file, unpacked on the way where its name ends in `.gz`."""
    with open_input(uri, options_for(uri, access)) as stream:
        if uri.lower().endswith(".gz"):
            yield cast(BinaryIO, _Unpacked(stream))
        else:
            yield stream


def read_batches(file: TableFile, access: AccessRules, faults: RowFaults | None = None) -> Iterator[pa.Table]:
    """Yield the file's rows with our column names and plain types, about BATCH_ROWS at a time, in order.

    `faults`: collects single values that cannot be used, which become null; their rows have a reason in the
    column UNUSABLE.

    Raises:
        JobRefused: unreadable; without `faults`, a value that cannot be used.
    """
    skipped: dict[int, str] = {}
    first = file.first_row
    with naming(file.uri, file.file_format):
        for batch, unread in _batches(file, access, skipped):
            columns: dict[str, pa.Array] = {}
            found = {RECORD: unread.get(RECORD, {})}
            for ours, theirs in file.names.items():
                rows = unread.get(theirs, {})
                convert = functools.partial(plain, kind=file.kinds[ours])
                columns[ours] = readable(single(batch.column(theirs)), convert, rows)
                found[ours] = {row: _with_name(text, theirs) for row, text in rows.items()}
            table = pa.table(columns)
            if faults is None:
                _refuse_any(file.uri, found, {}, first)
                yield table
            else:
                yield faults.add(table, found, first_row=first, skipped=skipped)
            first += batch.num_rows
        if faults is None:
            _refuse_any(file.uri, {}, skipped, 0)
        else:
            faults.skip(skipped)


def _with_name(text: str, theirs: str) -> str:
    return text if repr(theirs) in text else f"column {theirs!r}: {text}"


def _refuse_any(uri: str, found: Found, skipped: Mapping[int, str], first_row: int) -> None:
    places = {first_row + row: text for rows in found.values() for row, text in rows.items()} | dict(skipped)
    if places:
        raise JobRefused(f"{uri}: row {min(places)} (from 0): {clean_text(places[min(places)])}")


def _batches(
    file: TableFile, access: AccessRules, skipped: dict[int, str]
) -> Iterator[tuple[pa.RecordBatch | pa.Table, Found]]:
    columns = {theirs: file.kinds[ours] for ours, theirs in file.names.items()}
    if file.file_format == "csv":
        yield from csv_batches(lambda: _unpacked(file.uri, access), columns, skipped)
        return
    with _unpacked(file.uri, access) as stream:
        if file.file_format == "jsonl":
            yield from jsonl_batches(stream, columns, file.corners)
        else:
            yield from ((batch, {}) for batch in _parquet_batches(stream, list(columns), file.groups))


def _parquet_batches(
    stream: BinaryIO, columns: list[str], groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Return batches of about BATCH_BYTES, unpacked to four times their size: some rows have 10,000 boxes."""
    size = stream.seek(0, io.SEEK_END)
    most = rows_at_once(stream, columns, groups)
    parquet = open_closed(stream, page_checksum_verification=True)
    if parquet.metadata.num_rows > 16 * size:
        raise TextDamage(f"it states {parquet.metadata.num_rows:,} rows in {size:,} bytes")
    bytes_per_row = max(1.0, size / max(1, parquet.metadata.num_rows))
    rows = max(1, min(BATCH_ROWS, most, int(BATCH_BYTES / (4 * bytes_per_row))))
    batches: Iterator[pa.RecordBatch] = parquet.iter_batches(rows, columns=columns, row_groups=groups)
    return batches


@contextlib.contextmanager
def naming(uri: str, what: str) -> Iterator[None]:
    """Turn what a parser raises into a JobRefused that names the file; our own errors pass."""
    try:
        yield
    except HqlabelError:
        raise
    except TextDamage as error:
        raise JobRefused(f"{uri}: not a sound {what} file: {clean_text(str(error))}") from error
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError, RecursionError) as error:
        text = str(error)
        if "straddl" in text:
            text = f"a row is longer than {BLOCK_BYTES >> 20} MiB"
        raise JobRefused(f"{uri}: not a sound {what} file: {clean_text(text)}") from error


@contextlib.contextmanager
def open_named(uri: str, what: str, access: AccessRules) -> Iterator[BinaryIO]:
    """Open a whole input file; errors on its bytes become a JobRefused that names it as a `what`."""
    with naming(uri, what), open_input(uri, options_for(uri, access)) as stream:
        yield stream


@contextlib.contextmanager
def naming_values(uri: str) -> Iterator[None]:
    """Turn errors on values that were read but cannot be used into a JobRefused; other errors pass."""
    try:
        yield
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise JobRefused(f"{uri}: {clean_text(str(error))}") from error


def _inspect(
    uri: str, wanted: Mapping[str, Kind], mapping: Mapping[str, str], access: AccessRules
) -> TableFile:
    file_format = table_format(uri)
    if file_format is None:
        raise JobRefused(f"{uri}: no known table; wanted a name ending in {', '.join(TABLE_SUFFIXES)}")
    samples: dict[str, list[Any]] = {}
    with naming(uri, file_format), _unpacked(uri, access) as stream:
        if isinstance(stream, _Unpacked):
            stream.refuse_too_much()
        if not stream.read(1):
            raise JobRefused(f"{uri}: the file is empty (0 bytes)")
        stream.seek(0)
        if file_format == "parquet":
            schema = open_closed(stream).schema_arrow
            names = schema.names
        elif file_format == "csv":
            names, samples = csv_header(stream)
        else:
            samples = jsonl_sample(stream)
            names = list(samples)
    columns = locate(names, wanted, mapping, uri=uri)
    if file_format == "parquet":
        kinds = _kinds_of(schema, columns, wanted, uri)
        corners = [field.name for field in schema if is_corners(field.type)]
    else:
        kinds = {
            ours: _kind_of_text(file_format, wanted[ours], samples.get(theirs, []))
            for ours, theirs in columns.items()
        }
        corners = [name for name, values in samples.items() if _shows_corners(values)]
    return TableFile(
        uri=uri,
        file_format=file_format,
        names=columns,
        kinds=kinds,
        all_names=tuple(names),
        corners=tuple(corners),
    )


def _kinds_of(
    schema: pa.Schema, columns: Mapping[str, str], wanted: Mapping[str, Kind], uri: str
) -> dict[str, Kind]:
    """Return the kinds of a Parquet file's columns; JobRefused with every column of another type."""
    kinds: dict[str, Kind] = {}
    faults: list[str] = []
    for ours, theirs in columns.items():
        try:
            kinds[ours] = check_type(schema.field(theirs), wanted[ours], uri=uri, ours=ours)
        except JobRefused as error:
            faults.append(str(error))
    if faults:
        first, *others = faults
        raise JobRefused("; ".join([first, *(fault.removeprefix(f"{uri}: ") for fault in others)]))
    return kinds


def _shows_corners(values: Sequence[Any]) -> bool:
    first = next((value for value in values if value is not None), None)
    return isinstance(first, dict) and len(first) == len(CORNERS) and first != plain_corners(first)


def _kind_of_text(file_format: TableFormat, wanted: Kind, values: Sequence[Any]) -> Kind:
    """Return the kind of a column of CSV or JSONL by its first values; CSV has no types outside lists."""
    if file_format == "csv" and not wanted.depth:
        return replace(wanted, leaf="text") if wanted.leaf in UNSETTLED else wanted
    return replace(wanted, leaf=sampled_leaf(values, wanted.leaf))
