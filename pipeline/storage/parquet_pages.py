"""Parquet of others in bounded memory, whatever a file states of itself: a row group of pictures, and tables.

A page of 58 kB may unpack to 2 GB, a dictionary or shared prefix may repeat one large value in every row, one
row's list may have a billion values in ten bytes, and the footer may deny it all. So the pages' own headers
are read first: Arrow allocates for a page what its header states. Then rows are taken a few at a time, as few
as the largest value requires, and counted.

The footer is parsed here too: pyarrow ends the process when it is asked for a column of one that lacks it.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.storage.checksummed_parquet import MOST_FOOTER_BYTES, open_closed
from hqlabel.pipeline.storage.read_objects import blockwise

GROUP_BYTES = 2**30
"""The largest pictures of one row group that are read, packed or not; more would fill a worker's memory."""
BATCH_BYTES = 64 * 2**20
BATCH_ROWS = 1024
PAGE_BYTES = 2**28
PAGE_VALUES = 2**27
"""The largest page of a table, unpacked, and the most values in it. Writers make pages of about 1 MiB."""
REPEATED_BYTES = 2**32
_AS = {"bytes": pa.large_binary(), "path": pa.large_string()}

ReadRange = Callable[[int, int], bytes]


class UnsoundPages(OSError):
    """The pages of a column are not what a writer of Parquet makes; the message states what is wrong."""


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def read_pictures(read_range: ReadRange, size: int, *, column: str, group: int) -> pa.Table:
    """Return `bytes` and, where the file has them, `path` of one row group, as large_binary and large_string.

    `read_range`: reads start..stop of the file of `size` bytes.

    Raises:
        ImageError: `too_many_bytes`; `changed`, there is no such row group; `corrupt`.
    """
    try:
        return _read(_Kept(read_range, size), column, group)
    except (pa.ArrowException, KeyError, IndexError, OSError, ValueError) as error:
        raise ImageError(
            "corrupt", f"row group {group} of the Parquet file cannot be read ({error})"
        ) from None


class _Kept:
    """A file by ranges, some of which are kept: the chunks of columns, read once for us and for Arrow."""

    def __init__(self, read_range: ReadRange, size: int) -> None:
        self.size = size
        self._read_range = read_range
        self._chunks: list[tuple[int, bytes]] = []

    def keep(self, start: int, stop: int) -> None:
        """Read a range, which is kept."""
        if not 0 < start < stop <= self.size:
            raise UnsoundPages(f"a column at bytes {start} to {stop} of {self.size}")
        self._chunks.append((start, self._read_range(start, stop)))

    def read(self, start: int, stop: int) -> bytes:
        for first, data in self._chunks:
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        return self._read_range(start, stop)


def _read(source: _Kept, column: str, group: int) -> pa.Table:
    groups = _footer(source.read, source.size)
    if group >= len(groups):
        raise ImageError("changed", f"the file has {len(groups)} row groups, planned {group}")
    chunks = [one for one in groups[group] if one.path in {f"{column}.{name}" for name in _AS}]
    if f"{column}.bytes" not in {one.path for one in chunks}:
        raise KeyError(f"no {column}.bytes")
    _refuse_large(sum(one.stop - one.start for one in chunks))
    largest = unpacked = 0
    for chunk in chunks:
        if chunk.stop != chunk.start:
            source.keep(chunk.start, chunk.stop)
        for page in _pages(source.read, chunk):
            largest, unpacked = max(largest, page.unpacked), unpacked + page.unpacked
            _refuse_large(unpacked)
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(largest, 1)))
    stream = blockwise(source.read, source.size)
    file = open_closed(stream, page_checksum_verification=True, pre_buffer=False)
    columns, tables, kept = [one.path for one in chunks], [], 0
    for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
        table = _plain(batch.column(column))
        kept += table.nbytes
        _refuse_large(kept)
        tables.append(table)
    return pa.concat_tables(tables) if tables else pa.table({"bytes": pa.array([], _AS["bytes"])})


def _refuse_large(size: int) -> None:
    if size > GROUP_BYTES:
        raise ImageError(
            "too_many_bytes",
            f"the pictures of a row group have {size} bytes or more, wanted at most {GROUP_BYTES}; write the "
            "file again with smaller row groups",
        )


def _plain(pictures: pa.StructArray) -> pa.Table:
    """Return the fields of the pictures, null where a picture is, of one type whatever wrote them."""
    fields = zip(pictures.type, pictures.flatten(), strict=True)
    return pa.table({field.name: _cast(values, _AS[field.name]) for field, values in fields})


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return pc.cast(values, kind)


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def rows_at_once(stream: BinaryIO, columns: Sequence[str], groups: Collection[int] | None = None) -> int:
    """Return how many rows of some columns may be read together, by the largest value that may repeat.

    `stream`: the file, rewound after. `columns`: as Arrow takes them. `groups`: row groups, None for all.

    Raises:
        UnsoundPages: a page, or what its values come to, is larger than any table's; or more rows than bytes.
    """
    size = stream.seek(0, io.SEEK_END)

    def read(start: int, stop: int) -> bytes:
        stream.seek(start)
        return stream.read(stop - start)

    wanted = [
        chunk
        for number, group in enumerate(_footer(read, size))
        if groups is None or number in groups
        for chunk in group
        if any(chunk.path == one or chunk.path.startswith(f"{one}.") for one in columns)
    ]
    repeated = max((_largest_repeated(read, chunk) for chunk in wanted), default=1)
    stream.seek(0)
    return max(1, REPEATED_BYTES // max(repeated, 1))


def _largest_repeated(read: ReadRange, chunk: _Chunk) -> int:
    largest = 0
    for page in _pages(read, chunk):
        if page.unpacked > PAGE_BYTES or page.values > PAGE_VALUES:
            raise UnsoundPages(
                f"column {chunk.path!r} has a page of {page.unpacked:,} bytes and {page.values:,} values, "
                f"wanted at most {PAGE_BYTES:,} and {PAGE_VALUES:,}: a row, or a page, that is too large"
            )
        if page.is_dictionary or chunk.shares_prefixes:
            largest = max(largest, page.unpacked)
    return largest


# ---------------------------------------------------------------------------------------------
# Footer and headers of pages: Thrift's compact protocol, as far as they need it
# ---------------------------------------------------------------------------------------------

_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
_MOST_NESTED = 16
_TAIL = 2**16
_HEADER_BYTES = (2**12, 2**20)
_DELTA_BYTE_ARRAY = 7


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """The pages of one column in one row group: bytes start..stop of the file."""

    path: str
    start: int
    stop: int
    shares_prefixes: bool


@dataclass(frozen=True, kw_only=True)
class _Page:
    """What the header of a page states; `packed`: bytes that follow it."""

    unpacked: int
    packed: int
    values: int
    is_dictionary: bool


def _footer(read: ReadRange, size: int) -> list[list[_Chunk]]:
    """Return the columns of each row group, by the footer.

    Raises:
        UnsoundPages: there is no such footer.
    """
    tail = read(max(0, size - _TAIL), size)
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != b"PAR1" or not 0 < length <= min(size - 8, MOST_FOOTER_BYTES):
        raise UnsoundPages(f"a footer of {length:,} bytes in a file of {size:,}")
    data = tail[-8 - length : -8] if length + 8 <= len(tail) else read(size - 8 - length, size - 8)
    try:
        return _Thrift(data).row_groups()
    except (IndexError, RecursionError):
        raise UnsoundPages("its footer does not end") from None


def _pages(read: ReadRange, chunk: _Chunk) -> Iterator[_Page]:
    """Yield what the headers of a column's pages state.

    Raises:
        UnsoundPages: there are no such headers, or they do not fill the column.
    """
    at = chunk.start
    while at < chunk.stop:
        page, length = _page_at(read, at, chunk.stop)
        yield page
        at += length + page.packed
    if at != chunk.stop:
        raise UnsoundPages(f"the pages of column {chunk.path!r} do not fill it")


def _page_at(read: ReadRange, at: int, stop: int) -> tuple[_Page, int]:
    """Return the page whose header is here, and the header's length."""
    for most in _HEADER_BYTES:
        with contextlib.suppress(IndexError):
            return _Thrift(read(at, min(at + most, stop))).page()
    raise UnsoundPages("the header of a page does not end")


class _Thrift:
    """Values of Thrift's compact protocol, one after the other; IndexError where the bytes end before."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def page(self) -> tuple[_Page, int]:
        """Return the page header that the bytes begin with, and its length."""
        stated: dict[int, int] = {}
        values, is_dictionary = -1, False
        for field, kind in self._fields():
            if field in (2, 3) and kind == _I32:
                stated[field] = self._number()
            elif field in (5, 7, 8) and kind == _STRUCT:  # data, dictionary, data of version 2
                values, is_dictionary = self._numbers({1}).get(1, -1), field == 7
            else:
                self._skip(kind)
        if len(stated) != 2 or min(*stated.values(), values) < 0:
            raise UnsoundPages("a page without sizes")
        page = _Page(unpacked=stated[2], packed=stated[3], values=values, is_dictionary=is_dictionary)
        return page, self._at

    def row_groups(self) -> list[list[_Chunk]]:
        """Return the columns of each row group of the footer here."""
        for field, kind in self._fields():
            if field == 4 and kind == _LIST:
                return [self._row_group() for _ in self._items(_STRUCT)]
            self._skip(kind)
        return []

    def _row_group(self) -> list[_Chunk]:
        chunks: list[_Chunk] = []
        for field, kind in self._fields():
            if field == 1 and kind == _LIST:
                chunks = [self._chunk() for _ in self._items(_STRUCT)]
            else:
                self._skip(kind)
        return chunks

    def _chunk(self) -> _Chunk:
        found: _Chunk | None = None
        for field, kind in self._fields():
            if field == 3 and kind == _STRUCT:
                found = self._column()
            else:
                self._skip(kind)
        if found is None:
            raise UnsoundPages("its footer states a column without a place")
        return found

    def _column(self) -> _Chunk:
        numbers, path, encodings = dict[int, int](), list[bytes](), list[int]()
        for field, kind in self._fields():
            if field == 2 and kind == _LIST:
                encodings = [self._number() for _ in self._items(_I32)]
            elif field == 3 and kind == _LIST:
                path = [self._binary() for _ in self._items(_BINARY)]
            elif field in (5, 7, 9, 11) and kind == _I64:
                numbers[field] = self._number()
            else:
                self._skip(kind)
        start, dictionary = numbers.get(9, 0), numbers.get(11, 0)
        start = dictionary if 0 < dictionary < start else start  # as Arrow finds it
        return _Chunk(
            path=b".".join(path).decode("utf-8", errors="replace"),
            start=start,
            stop=start + (numbers.get(7, 0) if numbers.get(5) else 0),  # Arrow reads no page of no values
            shares_prefixes=_DELTA_BYTE_ARRAY in encodings,
        )

    def _numbers(self, wanted: Collection[int]) -> dict[int, int]:
        """Return some fields of the struct here that are numbers."""
        found = {}
        for field, kind in self._fields():
            if field in wanted and kind == _I32:
                found[field] = self._number()
            else:
                self._skip(kind)
        return found

    def _fields(self) -> Iterator[tuple[int, int]]:
        """Yield number and type of each field of the struct here; who takes one reads its value."""
        field = 0
        while (head := self._byte()) != 0:
            field = field + (head >> 4) if head >> 4 else self._number()
            yield field, head & 15

    def _items(self, wanted: int) -> Iterator[int]:
        """Yield the places of the list here; who takes one reads its value."""
        head = self._byte()
        if head & 15 != wanted:
            raise UnsoundPages(f"a list of type {head & 15}, wanted {wanted}")
        yield from range(head >> 4 if head >> 4 < 15 else self._varint())

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise UnsoundPages("a number of more than 64 bits")

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _binary(self) -> bytes:
        length = self._varint()
        self._at += length
        return self._data[self._at - length : self._at]

    def _skip(self, kind: int, depth: int = 0) -> None:
        if depth > _MOST_NESTED:
            raise UnsoundPages("too many levels")
        if kind in (1, 2):  # true and false are in the type
            return
        if kind in (3, 7):
            self._at += 1 if kind == 3 else 8
        elif kind in (4, _I32, _I64):
            self._varint()
        elif kind == _BINARY:
            self._binary()
        elif kind in (_LIST, 10):
            self._skip_list(depth)
        elif kind == _STRUCT:
            for _, inner in self._fields():
                self._skip(inner, depth + 1)
        else:
            raise UnsoundPages(f"a value of type {kind}")

    def _skip_list(self, depth: int) -> None:
        head = self._byte()
        inner = 3 if head & 15 in (1, 2) else head & 15  # a byte each, where they are no fields
        for _ in range(head >> 4 if head >> 4 < 15 else self._varint()):
            self._skip(inner, depth + 1)
            if self._at > len(self._data):
                raise IndexError
