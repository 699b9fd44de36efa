"""One row group of pictures out of a Parquet file, in bounded memory, whatever the file states of itself.

A page of 58 kB may unpack to 2 GB, a dictionary or shared prefix may repeat one large value in every row, and
the footer may deny both. So the pages' own headers are read first: Arrow allocates for a page what its header
states. Then rows are taken a few at a time, as few as the largest page requires, and counted.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hqlabel.pipeline.errors import ImageError
from hqlabel.pipeline.storage.checksummed_parquet import open_closed
from hqlabel.pipeline.storage.read_objects import blockwise

GROUP_BYTES = 2**30
"""The largest pictures of one row group that are read, packed or not; more would fill a worker's memory."""
BATCH_BYTES = 64 * 2**20
BATCH_ROWS = 1024
FOOTER_BYTES = 256 * 2**20
_AS = {"bytes": pa.large_binary(), "path": pa.large_string()}

ReadRange = Callable[[int, int], bytes]


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

    def keep(self, start: int, stop: int) -> memoryview:
        """Return a range, which is kept."""
        if not 0 < start < stop <= self.size:
            raise ValueError(f"a column at bytes {start} to {stop} of {self.size}")
        data = self._read_range(start, stop)
        self._chunks.append((start, data))
        return memoryview(data)

    def read(self, start: int, stop: int) -> bytes:
        for first, data in self._chunks:
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        return self._read_range(start, stop)


def _read(source: _Kept, column: str, group: int) -> pa.Table:
    _check_footer(source)
    file = open_closed(blockwise(source.read, source.size), page_checksum_verification=True, pre_buffer=False)
    if group >= file.num_row_groups:
        raise ImageError("changed", f"the file has {file.num_row_groups} row groups, planned {group}")
    chunks = _chunks(file.metadata.row_group(group), column)
    if f"{column}.bytes" not in chunks:
        raise KeyError(f"no {column}.bytes")
    _refuse_large(sum(chunk.total_compressed_size for chunk in chunks.values()))
    largest = max(_largest_page(source.keep(*_place(chunk))) for chunk in chunks.values())
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(largest, 1)))
    tables, kept = [], 0
    for batch in file.iter_batches(rows, row_groups=[group], columns=list(chunks), use_threads=False):
        table = _plain(batch.column(column))
        kept += table.nbytes
        _refuse_large(kept)
        tables.append(table)
    return pa.concat_tables(tables) if tables else pa.table({"bytes": pa.array([], _AS["bytes"])})


def _check_footer(source: _Kept) -> None:
    """Raise ValueError for a footer that no file of pictures has: Arrow makes objects of all of it."""
    length = int.from_bytes(source.read(max(0, source.size - 8), source.size)[:4], "little")
    if length > FOOTER_BYTES:
        raise ValueError(f"a footer of {length} bytes, wanted at most {FOOTER_BYTES}")


def _refuse_large(size: int) -> None:
    if size > GROUP_BYTES:
        raise ImageError(
            "too_many_bytes",
            f"the pictures of a row group have {size} bytes or more, wanted at most {GROUP_BYTES}; write the "
            "file again with smaller row groups",
        )


def _chunks(group: pq.RowGroupMetaData, column: str) -> dict[str, pq.ColumnChunkMetaData]:
    found = (group.column(at) for at in range(group.num_columns))
    wanted = {f"{column}.{name}" for name in _AS}
    return {one.path_in_schema: one for one in found if one.path_in_schema in wanted}


def _place(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Return where the pages of a column begin and end, as Arrow finds it."""
    start, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset
    if dictionary is not None and 0 < dictionary < start:
        start = dictionary
    return start, start + chunk.total_compressed_size


def _plain(pictures: pa.StructArray) -> pa.Table:
    """Return the fields of the pictures, null where a picture is, of one type whatever wrote them."""
    fields = zip(pictures.type, pictures.flatten(), strict=True)
    return pa.table({field.name: _cast(values, _AS[field.name]) for field, values in fields})


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return pc.cast(values, kind)


# ---------------------------------------------------------------------------------------------
# Headers of pages: Thrift's compact protocol, as far as they need it
# ---------------------------------------------------------------------------------------------

_MOST_NESTED = 8


def _largest_page(chunk: memoryview) -> int:
    """Return the most bytes that a page of a column is unpacked to, by the pages' own headers.

    Raises:
        ImageError: `too_many_bytes`, together they are more than GROUP_BYTES. ValueError: no such headers.
    """
    at, largest, total = 0, 0, 0
    while at < len(chunk):
        header = _Thrift(chunk, at)
        sizes = header.page_sizes()
        largest, total = max(largest, sizes[0]), total + sizes[0]
        _refuse_large(total)
        at = header.at + sizes[1]
    if at != len(chunk):
        raise ValueError("the pages of a column do not fill it")
    return largest


class _Thrift:
    """One value of Thrift's compact protocol after the other."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data = data
        self.at = at

    def page_sizes(self) -> tuple[int, int]:
        """Return the unpacked and the packed size that the page header here states."""
        sizes: dict[int, int] = {}
        field = 0
        while (kind := self._byte()) != 0:
            field = field + (kind >> 4) if kind >> 4 else self._zigzag()
            if field in (2, 3) and kind & 15 == 5:
                sizes[field] = self._zigzag()
            else:
                self._skip(kind & 15, 0)
        if set(sizes) != {2, 3} or min(sizes.values()) < 0:
            raise ValueError("a page without sizes")
        return sizes[2], sizes[3]

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, kind: int, depth: int) -> None:
        if depth > _MOST_NESTED:
            raise ValueError("a page header of too many levels")
        if kind in (1, 2):  # true and false are in the type
            return
        if kind in (3, 7):
            self.at += 1 if kind == 3 else 8
        elif kind in (4, 5, 6):
            self._varint()
        elif kind == 8:
            length = self._varint()
            self.at += length
        elif kind in (9, 10):
            self._skip_list(depth)
        elif kind == 12:
            while (inner := self._byte()) != 0:
                if not inner >> 4:
                    self._zigzag()
                self._skip(inner & 15, depth + 1)
        else:
            raise ValueError(f"a page header with a value of type {kind}")

    def _skip_list(self, depth: int) -> None:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._varint()
        for _ in range(min(count, len(self._data))):
            if head & 15 in (1, 2):
                self.at += 1
            else:
                self._skip(head & 15, depth + 1)
