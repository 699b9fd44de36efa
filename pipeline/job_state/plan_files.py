"""The files of a plan in the output: their names, and how a unit or all of them are read back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.errors import DamageFound
from hqlabel.pipeline.schema import PLAN, PLAN_BEFORE
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.output_store import Store

UNITS_PER_FILE = 64


def plan_key(plan_sha256: str, file_index: int) -> str:
    """Return the name of one file of a plan."""
    return f"plan/{plan_sha256[:16]}/{file_index:08d}.parquet"


def read_unit(store: Store, plan_sha256: str, unit_id: int) -> pa.Table:
    """Return the rows of one unit (schema.PLAN), read from its own row group with page checksums verified.

    Raises:
        NotFound: no such file of the plan. DamageFound: it is not what was written.
    """
    key = plan_key(plan_sha256, unit_id // UNITS_PER_FILE)
    group = unit_id % UNITS_PER_FILE
    with (
        store.open_parquet(key) as stream,
        checksummed_parquet.open_body(stream, PLAN, key, or_schema=PLAN_BEFORE) as file,
    ):
        if group >= file.num_row_groups:
            raise DamageFound(f"{key}: {file.num_row_groups} units, so there is no unit {unit_id}")
        try:
            rows = _as_now(file.read_row_group(group).replace_schema_metadata())
        except (OSError, pa.ArrowException) as error:
            raise DamageFound(f"{key}: unit {unit_id} cannot be read back ({error})") from error
    if pc.unique(rows.column("unit_id")).to_pylist() != [unit_id]:
        raise DamageFound(f"{key}: row group {group} does not hold unit {unit_id}")
    return rows


def count_images(store: Store, plan_sha256: str) -> int:
    """Return the number of images of a plan, from its listing and the footers of its first and last file.

    Raises:
        NotFound: there is no such plan.
    """
    last = max(len(store.list(f"plan/{plan_sha256[:16]}/")) - 1, 0)
    rows = []
    for index in sorted({0, last}):
        key = plan_key(plan_sha256, index)
        with (
            store.open_parquet(key) as stream,
            checksummed_parquet.open_body(stream, PLAN, key, or_schema=PLAN_BEFORE) as file,
        ):
            rows.append(int(file.metadata.num_rows))
    return rows[0] * last + rows[-1] if last else rows[0]


def iter_plan(store: Store, plan_sha256: str) -> Iterator[pa.Table]:
    """Yield the units of a plan in order, one table (schema.PLAN) each; read every file once, seal verified.

    Raises:
        DamageFound: a file is not what was written, or one is missing between others.
    """
    for index, entry in enumerate(store.list(f"plan/{plan_sha256[:16]}/")):
        if entry.key != plan_key(plan_sha256, index):
            raise DamageFound(f"{plan_key(plan_sha256, index)}: missing; the next file is {entry.key}")
        body = store.read(entry.key)
        rows = _as_now(checksummed_parquet.read_body(body, PLAN, entry.key, or_schema=PLAN_BEFORE))
        ids = rows.column("unit_id").to_numpy()
        edges = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
        for start, stop in pairwise(edges):
            yield rows.slice(start, stop - start)


def _as_now(rows: pa.Table) -> pa.Table:
    """Return rows of a plan, also of one of an earlier version, as schema.PLAN."""
    if rows.num_columns == len(PLAN):
        return rows
    return rows.append_column(PLAN.field("source_version"), pa.nulls(rows.num_rows, pa.string()))
