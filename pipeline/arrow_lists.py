"""Arrow lists measured, gathered, rebuilt and hashed by whole columns: no row becomes a Python object.

Lists are handled as (lengths, values): numpy counts next to one flat Arrow array. A null list counts as
length 0 and contributes no values; who needs the difference keeps the null mask next to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

HASH_ROWS = 65_536


def single(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return one array with the values of a column; large_string and large_list never overflow by it."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def list_lengths(lists: pa.Array) -> Int64Array:
    """Return how many values each list holds, int64 (n,); 0 for a null list."""
    return _numpy(pc.fill_null(pc.cast(pc.list_value_length(lists), pa.int64()), 0))


def null_mask(array: pa.Array) -> BoolArray:
    """Return true where a value is null; bool (n,)."""
    return _numpy(array.is_null())


def first_null(array: pa.ChunkedArray | pa.Array) -> int:
    """Return the place of the first null of a column that has one."""
    return int(np.flatnonzero(null_mask(single(array)))[0])


def starts_of(lengths: Int64Array) -> Int64Array:
    """Return where each of the lists laid end to end begins; int64 (n,)."""
    return np.cumsum(lengths) - lengths


def ranges(starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """Return the indices of many ranges laid end to end: starts[0] .. starts[0]+lengths[0]-1, starts[1] .."""
    shift = starts - starts_of(lengths)
    return np.repeat(shift, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def to_lists(
    lengths: Int64Array, values: pa.Array, *, kind: pa.ListType, null: BoolArray | None = None
) -> pa.Array:
    """Return a list array of `kind` from flat values; null where `null` is True (its length is then 0).

    Raises:
        OverflowError: more than 2**31 - 1 values, which one chunk cannot address.
    """
    if len(values) >= 2**31:
        raise OverflowError(f"{len(values)} values do not fit into one list chunk")
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    mask = None if null is None or not null.any() else pa.array(null)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=mask)


def positions(values: pa.Array, among: pa.Array) -> Int64Array:
    """Return where each value first is in `among`, int64 (n,); -1 for a null, or where it is not."""
    found = pc.index_in(values, value_set=among, skip_nulls=True)
    return _numpy(pc.fill_null(found, -1)).astype(np.int64)


def table_sha256(table: pa.Table) -> str:
    """Return hex sha256 of a table's names and values: the same for every chunking and library version.

    Nulls, lengths and values are hashed column by column over slices of HASH_ROWS rows.
    """
    return rows_sha256(table.column_names, table.num_rows, [table])


def rows_sha256(names: Sequence[str], rows: int, tables: Iterable[pa.Table]) -> str:
    """Return `table_sha256` of tables that follow each other; `names`: of the columns, `rows`: of all."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0")
    digest.update(str(rows).encode())
    for some in _cut(tables, HASH_ROWS):
        for name in names:
            _hash_array(digest, single(some.column(name).combine_chunks()))
    return digest.hexdigest()


def _cut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the rows of tables that follow each other, so many at a time; the last ones may be fewer."""
    kept: list[pa.Table] = []
    missing = rows
    for table in tables:
        start = 0
        while table.num_rows - start >= missing:
            yield pa.concat_tables([*kept, table.slice(start, missing)])
            start, missing, kept = start + missing, rows, []
        if start < table.num_rows:
            kept.append(table.slice(start))
            missing -= table.num_rows - start
    if kept:
        yield pa.concat_tables(kept)


def _hash_array(digest: Any, array: pa.Array) -> None:
    digest.update(np.packbits(null_mask(array)).tobytes())
    kind = array.type
    if pa.types.is_struct(kind):
        for child in array.flatten():
            _hash_array(digest, child)
    elif pa.types.is_list(kind):
        digest.update(list_lengths(array).astype("<i8").tobytes())
        _hash_array(digest, array.flatten())
    elif pa.types.is_string(kind):
        digest.update(_numpy(pc.fill_null(pc.binary_length(array), 0)).astype("<i4").tobytes())
        whole = pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), pc.fill_null(array, ""))
        digest.update(pc.binary_join(whole, "")[0].as_buffer() or b"")  # all strings end to end
    else:
        values = _numpy(pc.fill_null(array, pa.scalar(0).cast(kind)))
        digest.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes())


def _numpy(array: pa.Array) -> npt.NDArray[Any]:
    result: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return result
