"""How every Parquet file of a job is written and read: one set of options, sealed, verified.

Page checksums are off in Parquet unless writer and reader both ask, and they do not cover headers,
statistics and the footer. So each file also carries a seal: the sha256 of the file itself with the
seal's own 64 digits set to zero, kept in the footer. One flipped bit anywhere is found from the file
alone. Equal tables give equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hqlabel.pipeline.errors import DamageFound
from hqlabel.pipeline.schema import REPEATING

ROW_GROUP_ROWS = 122_880  # DuckDB's own: far below what viewers scan, large enough to compress

# Extension types that Ray Data and pandas register when they are imported, and that make Python objects of
# what a file's schema states, by unpickling it where a switch allows that.
_TYPES_WITH_CODE = (
    *("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.data.arrow_variable_shaped_tensor"),
    *("ray.data.arrow_pickled_object", "pandas.period", "pandas.interval"),
)
_PREFIX = "hqlabel."
MOST_FOOTER_BYTES = 256 * 2**20
_TAIL = 2**16  # what Arrow reads first, so that it is one request to a store
_SEAL_KEY = "hqlabel.file_sha256"
_BLANK = b"sha256=" + b"0" * 64
_SEAL = re.compile(rb"sha256=([0-9a-f]{64})")


class ParquetSink:
    """Tables in, one sealed Parquet body out; row groups of `row_group_rows`, buffered up to one.

    Memory: the compressed body so far, and at most one row group of rows.
    """

    def __init__(
        self, schema: pa.Schema, footer: Mapping[str, str], *, row_group_rows: int = ROW_GROUP_ROWS
    ) -> None:
        self._schema = schema.with_metadata({f"{_PREFIX}{k}": v for k, v in sorted(footer.items())})
        self._buffer = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(
            self._buffer,
            self._schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=[path for path in _leaf_paths(schema) if REPEATING & set(path.split("."))],
            write_page_checksum=True,
            write_page_index=True,
        )
        self._row_group_rows = row_group_rows
        self._waiting: list[pa.Table] = []
        self._rows_waiting = 0
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        """Write rows after those written before; ValueError for another schema."""
        if not table.schema.equals(self._schema, check_metadata=False):
            raise ValueError(f"rows of another schema:\n{table.schema}\nwanted\n{self._schema}")
        self.rows += table.num_rows
        self._waiting.append(table)
        self._rows_waiting += table.num_rows
        while self._rows_waiting >= self._row_group_rows:
            self._write_group(self._row_group_rows)

    def _write_group(self, rows: int) -> None:
        table = pa.concat_tables([t.replace_schema_metadata() for t in self._waiting]).combine_chunks()
        group = table.slice(0, rows).replace_schema_metadata(self._schema.metadata)
        self._writer.write_table(group, row_group_size=max(rows, 1))
        rest = table.slice(rows)
        self._waiting, self._rows_waiting = [rest], rest.num_rows

    def finish(self, footer: Mapping[str, str] | None = None) -> bytes:
        """Return the whole file. Nothing may be written after. `footer`: what is known at the end only."""
        if self._rows_waiting:
            self._write_group(self._rows_waiting)
        late = {f"{_PREFIX}{k}": v for k, v in sorted((footer or {}).items())}
        self._writer.add_key_value_metadata({**late, _SEAL_KEY: _BLANK.decode("ascii")})
        self._writer.close()
        return seal(self._buffer.getvalue().to_pybytes())


def write_body(table: pa.Table, footer: Mapping[str, str]) -> bytes:
    """Return one table as one sealed Parquet body; `footer` keys without the `hqlabel.` prefix."""
    sink = ParquetSink(table.schema, footer)
    sink.write(table)
    return sink.finish()


def _leaf_paths(fields: Iterable[pa.Field], prefix: str = "") -> Iterable[str]:
    """Yield Parquet's dotted paths of the columns, at any depth."""
    for field in fields:
        path, kind = f"{prefix}{field.name}", field.type
        if pa.types.is_struct(kind):
            yield from _leaf_paths(kind, f"{path}.")
        elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            yield from _leaf_paths([kind.value_field], f"{path}.list.")
        else:
            yield path


def seal(body: bytes) -> bytes:
    """Return the file with its blank seal filled in."""
    if body.count(_BLANK) != 1:
        raise ValueError(f"found {body.count(_BLANK)} blank seals in a new Parquet file; wanted 1")
    return body.replace(_BLANK, b"sha256=" + hashlib.sha256(body).hexdigest().encode("ascii"))


def check_seal(body: bytes, name: str) -> None:
    """Raise DamageFound with `name` unless the file is bit for bit what was written."""
    for match in _SEAL.finditer(body):
        start, stop = match.span(1)
        digest = hashlib.sha256(body[:start])
        digest.update(b"0" * 64)
        digest.update(memoryview(body)[stop:])
        if digest.hexdigest().encode("ascii") == match.group(1):
            return
    raise DamageFound(f"{name}: the file's sha256 is not the one in its footer; some bytes were changed")


def read_body(
    body: bytes,
    schema: pa.Schema,
    name: str,
    *,
    or_schema: pa.Schema | None = None,
    with_footer: bool = False,
) -> pa.Table:
    """Return all rows of a file, seal and page checksums verified, with exactly `schema`.

    `or_schema`: of an earlier version, as which the rows may come as well. `with_footer`: the footer's
    entries are the table's metadata, which else has none.

    Raises:
        DamageFound: with `name` and what is wrong.
    """
    check_seal(body, name)
    with open_body(pa.BufferReader(body), schema, name, or_schema=or_schema) as file:
        try:
            table = file.read().replace_schema_metadata(file.metadata.metadata if with_footer else None)
            table.validate(full=True)
        except (OSError, pa.ArrowException) as error:
            raise DamageFound(f"{name}: rows cannot be read back ({_one_line(error)})") from error
    return table


def open_closed(source: Any, **options: Any) -> pq.ParquetFile:
    """Return a Parquet file whose extension types stay names in its fields' metadata; `options` as pyarrow's.

    pyarrow makes a registered type while it opens a file, before anything can be refused. The types are
    taken off its register for good: no table of ours has one.
    """
    _forget_types_with_code()
    _check_footer(source)
    return pq.ParquetFile(source, **options)


def read_closed_stream(stream: Any) -> pa.Table:
    """Return the table of an Arrow stream, its extension types as `open_closed` leaves them."""
    _forget_types_with_code()
    return pa.ipc.open_stream(stream).read_all()


def _forget_types_with_code() -> None:
    for name in _TYPES_WITH_CODE:
        with contextlib.suppress(pa.ArrowKeyError):  # not registered
            pa.unregister_extension_type(name)


def _check_footer(source: Any) -> None:
    """Raise ArrowInvalid for a longer footer than any table's: Arrow makes objects of all of it."""
    size = source.seek(0, 2)
    source.seek(max(0, size - _TAIL))
    tail = source.read(_TAIL)
    source.seek(0)
    length = int.from_bytes(tail[-8:-4], "little")
    if tail.endswith(b"PAR1") and length > MOST_FOOTER_BYTES:
        raise pa.ArrowInvalid(f"its footer has {length:,} bytes, wanted at most {MOST_FOOTER_BYTES:,}")


def open_body(
    source: Any, schema: pa.Schema, name: str, *, or_schema: pa.Schema | None = None
) -> pq.ParquetFile:
    """Return a Parquet file with page checksums on; DamageFound unless its schema is one of the wanted."""
    try:
        file = open_closed(source, page_checksum_verification=True, pre_buffer=True)
    except (OSError, pa.ArrowException) as error:
        raise DamageFound(f"{name}: this is no readable Parquet file ({_one_line(error)})") from error
    if not any(file.schema_arrow.equals(one, check_metadata=False) for one in (schema, or_schema or schema)):
        found, wanted = set(file.schema_arrow), set(schema)
        unlike = sorted(f.name for f in found ^ wanted) or ["the order of columns"]
        file.close()
        raise DamageFound(f"{name}: the columns are not those of this version; unlike: {', '.join(unlike)}")
    return file


def footer_of(file: pq.ParquetFile) -> dict[str, str]:
    """Return what a file's footer states of its making, without the `hqlabel.` prefix; and its seal."""
    entries = file.metadata.metadata or {}
    prefix = _PREFIX.encode()
    return {
        key.removeprefix(prefix).decode(): value.decode(errors="replace")
        for key, value in entries.items()
        if key.startswith(prefix)
    }


def seal_of(footer: Mapping[str, str]) -> str:
    """Return the sha256 (hex) by which a file's footer seals it; "" without one."""
    return footer.get(_SEAL_KEY.removeprefix(_PREFIX), "").removeprefix("sha256=")


def compressed_bytes(body: bytes) -> int:
    """Return how much of a file is its columns; the rest is footer and seal, once a file."""
    with open_closed(pa.BufferReader(body)) as file:
        groups = [file.metadata.row_group(at) for at in range(file.num_row_groups)]
    return sum(
        group.column(column).total_compressed_size for group in groups for column in range(group.num_columns)
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
