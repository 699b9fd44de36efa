"""One number for a table's lasting content: equal for two runs of one job."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import pyarrow as pa

from hqlabel.pipeline import schema
from hqlabel.pipeline.storage import checksummed_parquet


def mask_columns_digest(table: pa.Table, *, without: Collection[str] = schema.VOLATILE) -> str:
    """Return the sha256 (hex) of every column but those that may differ between two runs of one job.

    For schema.UNIT, INSTANCES and IMAGES; row order counts, chunks and metadata do not. The rows are
    written as plain Parquet and hashed: that form does not know how Arrow held them.
    """
    kept = [name for name in table.schema.names if name not in without]
    plain = table.select(kept).replace_schema_metadata().combine_chunks()
    return hashlib.sha256(checksummed_parquet.write_body(plain, {})).hexdigest()
