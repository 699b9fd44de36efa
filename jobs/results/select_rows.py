"""Published rows, image after image, that a user chose: all, the accepted, or those of an SQL condition.

Read row group by row group, so that tables of any size pass through bounded memory. A condition sees
one row at a time: it may name every column of `instances`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.jobs.results.read_tables import ImageRows, Row, row_groups
from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import UsageError, clean_text
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import Manifest, PartFile

Condition = Callable[[pa.Table], pa.Array]
_BATCH_ROWS = 8192  # rows that are Python objects at one time


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which instances: `accepted_only` and `where`, an SQL condition over a row of `instances`; both hold.

    `with_crowds`: crowd regions, which no filter judges, pass `accepted_only`.
    """

    accepted_only: bool = False
    where: str | None = None
    with_crowds: bool = False

    @property
    def is_all(self) -> bool:
        """True when every row is meant."""
        return not self.accepted_only and self.where is None


def selected_images(
    store: Store, manifest: Manifest, selection: Selection, columns: Sequence[str]
) -> Iterator[ImageRows]:
    """Yield every published image in the order of the tables, with its selected instances (these columns).

    Raises:
        UsageError: the condition is no SQL over the columns of `instances`.
    """
    keep = condition(selection)
    wanted = (
        schema.INSTANCES.names if selection.where else ["image_id", "accepted", "reject_reason", *columns]
    )
    for part in manifest.parts:
        rows = _chosen_rows(store, part.instances, keep, list(dict.fromkeys(wanted)))
        waiting = next(rows, None)
        for group in row_groups(store, part.images, schema.IMAGES, schema.IMAGES.names):
            for image in _dicts(group):
                mine: list[Row] = []
                while waiting is not None and waiting["image_id"] == image["image_id"]:
                    mine.append(waiting)
                    waiting = next(rows, None)
                yield ImageRows(image=image, instances=tuple(mine))


def condition(selection: Selection) -> Condition | None:
    """Return a function from rows of `instances` to booleans, one a row; None when every row is meant.

    A wrong condition is refused here, before any row is read. DuckDB may open no file and no network for it.
    """
    if selection.where is None:
        return partial(_accepted, selection.with_crowds) if selection.accepted_only else None
    accepted = (
        "(accepted OR reject_reason IS NOT DISTINCT FROM 'crowd')" if selection.with_crowds else "accepted"
    )
    sql = f"({selection.where}\n)" + (f" AND {accepted}" if selection.accepted_only else "")
    connection = duckdb.connect(":memory:", config={"enable_external_access": False, "threads": 1})

    def judge(rows: pa.Table) -> pa.Array:
        connection.register("rows", rows)
        try:
            found = connection.sql(f"SELECT coalesce(CAST({sql} AS BOOLEAN), false) AS chosen FROM rows")
            chosen = found.to_arrow_table()["chosen"].combine_chunks()
        except duckdb.Error as error:
            raise _no_condition(selection.where, str(error)) from None
        if len(chosen) != rows.num_rows:
            raise _no_condition(selection.where, "this looks at more than one row")
        return chosen

    judge(schema.INSTANCES.empty_table())
    return judge


def _accepted(with_crowds: bool, rows: pa.Table) -> pa.Array:
    if not with_crowds:
        return rows["accepted"]
    return pc.or_(rows["accepted"], pc.fill_null(pc.equal(rows["reject_reason"], "crowd"), False))


def _no_condition(where: str | None, why: str) -> UsageError:
    first_line = clean_text(why.split("\n", 1)[0])
    return UsageError(
        f"--where {clean_text(str(where))!r}: {first_line}; wanted an SQL condition over a row's columns: "
        + ", ".join(schema.INSTANCES.names)
    )


def _chosen_rows(
    store: Store, file: PartFile, keep: Condition | None, columns: Sequence[str]
) -> Iterator[Row]:
    for group in row_groups(store, file, schema.INSTANCES, columns):
        yield from _dicts(group if keep is None else group.filter(keep(group)))


def _dicts(table: pa.Table) -> Iterator[Row]:
    for start in range(0, table.num_rows, _BATCH_ROWS):
        yield from table.slice(start, _BATCH_ROWS).to_pylist()
