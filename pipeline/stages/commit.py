"""The last stage: a unit's results -> one checked Parquet body -> one create-if-absent request.

The plan is read again here and the table is checked against it: what is committed answers every planned box,
or nothing is written. An image of which no sound row can be made fails alone. Only counts go back to the
driver.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import ImageError, SystemicFault
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.job_context import JobContext, UnitOutcome
from hqlabel.pipeline.job_state.plan_files import read_unit
from hqlabel.pipeline.stages.crash_log import Restart, TaskStart
from hqlabel.pipeline.stages.detect import ModelRecord
from hqlabel.pipeline.stages.prompt_groups import with_boxes
from hqlabel.pipeline.stages.rows_between_stages import UnitRow
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.request_retries import shown_uri
from hqlabel.pipeline.tables.changed_inputs import kept_rows
from hqlabel.pipeline.tables.lineage import footer_of, redone_footer
from hqlabel.pipeline.tables.unit_checks import check_against_plan
from hqlabel.pipeline.tables.unit_files import (
    footer,
    outcome_of,
    put_unit,
    read_generation,
    replace_rows,
)
from hqlabel.pipeline.tables.unit_table import build_unit_table
from hqlabel.pipeline.worker import logs
from hqlabel.pipeline.worker.image_guard import charge, is_an_images
from hqlabel.pipeline.worker.process_env import refuse_unsafe_env

OUTCOME = "outcome"
"""The one column of what the driver gets for a unit: JSON of a UnitOutcome, or of a systemic fault."""


def commit_unit(unit: UnitRow, context: JobContext, store: Store, restart: Restart | None = None) -> pa.Table:
    """Commit the unit; return a table of one OUTCOME, of a systemic fault too.

    `restart`: where a process has ended over this unit's commit before.

    Raises:
        ValueError: the results do not answer the plan. A bug: nothing is written.
        DamageFound: there is a file of the unit's name already, and it does not verify.
    """
    try:
        outcome = _commit(unit, context, store, restart) if unit.fault is None else None
    except SystemicFault as fault:
        return _pack(None, fault)
    return _pack(outcome, unit.fault)


def _commit(unit: UnitRow, context: JobContext, store: Store, restart: Restart | None) -> UnitOutcome:
    refuse_unsafe_env()
    began = time.monotonic()
    start = None if restart is None else restart.begin(unit.unit_id, unit.generation)
    planned = read_unit(store, context.plan_sha256, unit.unit_id)
    images = list(unit.images)
    if start is not None:
        images = [_tried_alone(image, planned, context, start) for image in images]
        start.end()
    whole = unit.redo_codes is None and not context.earlier
    mine = planned if whole else _rows_of(images, planned)
    table = _table_of_all(images, mine, context) if images or whole else schema.UNIT.empty_table()
    anew, lineage = table.num_rows, footer(context, unit.device)
    if unit.redo_codes is not None:
        before = read_generation(store, unit.unit_id, unit.generation - 1)
        lineage = redone_footer(before, lineage, generation=unit.generation, images=table.num_rows)
        table = replace_rows(before, table)
        visit("retry.replaced")
        check_against_plan(table, planned, detected=context.detector is not None)
    elif not whole:
        table, lineage = _with_kept(table, lineage, planned, context, store)
    body = checksummed_parquet.write_body(table, lineage)
    visit("unit.built")
    created = put_unit(store, unit.unit_id, unit.generation, body)
    seconds = unit.seconds + time.monotonic() - began
    outcome = outcome_of(
        table, unit.unit_id, unit.generation, size=len(body), created=created, seconds=seconds
    )
    _log(outcome, table, context)
    begun_before = sum(image.attempts > 1 for image in unit.images)
    kept = outcome.images - anew
    return replace(outcome, begun_before=begun_before, device=unit.device, kept=kept)


# ---------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------


def _with_kept(
    table: pa.Table, lineage: Mapping[str, str], planned: pa.Table, context: JobContext, store: Store
) -> tuple[pa.Table, dict[str, str]]:
    """Return the unit's table and lineage with the rows that plans before have done, in the plan's order."""
    kept = kept_rows(store, context, planned)
    if kept is None:
        return table, dict(lineage)
    done = pc.is_in(kept["image_id"], table["image_id"].combine_chunks())
    others = kept.filter(pc.invert(done)).replace_schema_metadata()
    both = pa.concat_tables([table.replace_schema_metadata(), others])
    places = pc.index_in(planned["image_id"], both["image_id"].combine_chunks())
    whole = both.take(places).combine_chunks()
    check_against_plan(whole, planned, detected=context.detector is not None)
    return whole, {**lineage, **footer_of(kept), "kept_rows": str(others.num_rows)}


_record = ModelRecord(code="internal")


def _table_of_all(images: Sequence[ImageResult], planned: pa.Table, context: JobContext) -> pa.Table:
    """Return the images' checked table; one that makes none, alone, is `internal` in it.

    Raises:
        SystemicFault: `internal`, where this process has made no image's row yet.
        Exception: what makes no table although each image does.
    """
    try:
        table = _table_of(images, planned, context)
    except BaseException as error:
        if not is_an_images(error):
            raise
    else:
        _record.worked()
        return table
    return _table_of([_sound(image, planned, context) for image in images], planned, context)


def _table_of(images: Sequence[ImageResult], planned: pa.Table, context: JobContext) -> pa.Table:
    table = build_unit_table([with_boxes(image, context.box_rules) for image in images], context)
    check_against_plan(table, planned, detected=context.detector is not None)
    return table


def _sound(image: ImageResult, planned: pa.Table, context: JobContext) -> ImageResult:
    """Return the image, failed if no row can be made of it."""
    uri = image.planned["image_uri"]
    try:
        _table_of([image], _rows_of([image], planned), context)
    except BaseException as raised:
        error = charge(raised, uri=uri, step="commit")
        _record.raised(f"commit, the last time with {error.message}")
        return _failed(image, ImageError(error.code, f"{shown_uri(uri)}: {error.message}"), context)
    _record.worked()
    return image


def _tried_alone(image: ImageResult, planned: pa.Table, context: JobContext, start: TaskStart) -> ImageResult:
    """Return the image, tried by itself under its mark: an earlier process ended over this unit."""
    error = start.begin(image.planned["image_id"], image.planned["image_uri"])
    return _sound(image, planned, context) if error is None else _failed(image, error, context)


def _failed(image: ImageResult, error: ImageError, context: JobContext) -> ImageResult:
    """Return the image without anything that was made of it, a detector's boxes neither."""
    planned = image.planned if context.detector is None else {**image.planned, "boxes": []}
    return ImageResult(
        planned=planned, error_code=error.code, error_message=error.message, attempts=image.attempts
    )


def _rows_of(images: Sequence[ImageResult], planned: pa.Table) -> pa.Table:
    ids = pa.array([image.planned["image_id"] for image in images], pa.string())
    return planned.filter(pc.is_in(planned.column("image_id"), ids))


def _log(outcome: UnitOutcome, table: pa.Table, context: JobContext) -> None:
    """Log a line for the unit and one for each image of it that failed; those of a retry again."""
    run_id, unit_id = context.run_id, outcome.unit_id
    fields = {k: v for k, v in vars(outcome).items() if k not in ("unit_id", "begun_before", "kept")}
    logs.event("unit_committed", run_id=run_id, unit_id=unit_id, **fields)
    if outcome.repeated or not outcome.failed:
        return
    for row in table.select(["image_id", "error_code", "error_message"]).to_pylist():
        if row["error_code"] is not None:
            logs.image_failed(run_id, unit_id, row["image_id"], row["error_code"], row["error_message"])


def _pack(outcome: UnitOutcome | None, fault: SystemicFault | None) -> pa.Table:
    content = vars(fault) if outcome is None else vars(outcome)
    return pa.table({OUTCOME: [json.dumps(content)]})


def read_outcome(table: pa.Table) -> UnitOutcome:
    """Return the outcome in a table of one.

    Raises:
        SystemicFault: the one the unit met.
    """
    content = json.loads(table[OUTCOME][0].as_py())
    if "code" in content:
        raise SystemicFault(**content)
    return UnitOutcome(**content)
