"""Committed units -> the tables that users query: fixed ranges of units, flat, in image order.

A part is one atomic put under the name of its range, so a plain glob reads whole, undoubled rows
at any time. Only ranges whose units are all committed are published. Filters are applied here: they
mark rows, and a new threshold is one publish. Equal inputs give equal bytes, and parts that are
stored already are not written again.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pyarrow as pa

from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import DamageFound, JobRefused
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.job_state.driver_lock import latest_number, require_latest
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.output_store import NotFound, Store
from hqlabel.pipeline.tables.count_masks import Counts, add_counts
from hqlabel.pipeline.tables.images_and_instances import flatten_unit
from hqlabel.pipeline.tables.manifest import (
    CATEGORIES_KEY,
    Manifest,
    Part,
    PartFile,
    part_key,
    read_manifest,
    write_manifest,
)
from hqlabel.pipeline.tables.unit_files import CommittedUnit, footer, list_committed, read_committed

READERS = 8


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """All that a worker needs to write one part; small and picklable. `part_units`: every unit, in order.

    `driver`: the number of the driver that publishes; a part is not put once a later one has the job.
    """

    context: JobContext
    index: int
    part_units: tuple[CommittedUnit, ...]
    filters: FilterSettings
    driver: int = 0


Mapper = Callable[[Callable[[PartTask], Part], Sequence[PartTask]], Iterable[Part]]


def publish(
    store: Store,
    job: Job,
    filters: FilterSettings,
    *,
    require_owner: Callable[[str], None],
    mapper: Mapper = map,
) -> Manifest:
    """Publish every range whose units are all committed, marked by `filters`; return the manifest.

    `require_owner`: raises when another driver has the job; called before each write. `mapper`: runs the
    parts, in any order (serial by default, Ray tasks in a job). When nothing is new, nothing is written.

    Raises:
        JobRefused: not the owner, files of something else among the tables, or working files that
            were cleaned and would be needed.
        DamageFound: a unit does not verify; with its name.
    """
    committed = list_committed(store)
    before = read_manifest(store)
    if before is not None and before.cleaned:
        if before.filters == filters:
            return before
        raise JobRefused(
            "the working files of this job were removed by clean, so its tables cannot be marked anew; "
            "filter the columns predicted_iou, stability_score, area, ... in a query instead"
        )
    _refuse_foreign_parts(store, job)
    tasks = _whole_ranges(job, committed, filters)
    stored = _stored_parts(store, before, job, filters)
    kept = [stored[task.index] for task in tasks if _same_units(stored.get(task.index), task)]
    due = [task for task in tasks if task.index not in {part.index for part in kept}]
    if not due and before is not None:
        current = _manifest(job, filters, kept, complete=True)
        if before == dataclasses.replace(current, published_at=before.published_at):
            return before
    require_owner("publish")  # may take the job now
    driver = latest_number(store)
    require_owner("publish")  # so `driver` is ours: a later one has a higher number
    due = [dataclasses.replace(task, driver=driver) for task in due]
    if due:
        manifest = _manifest(job, filters, kept, complete=False)
        write_manifest(store, dataclasses.replace(manifest, state="publishing"))
        visit("publish.begun")
    made = list(mapper(publish_part, due))
    visit("publish.parts")
    require_owner("publish")
    _write_categories(store, job)
    visit("publish.categories")
    after = _manifest(job, filters, [*kept, *made], complete=True)
    write_manifest(store, after)
    visit("publish.done")
    return after


def _whole_ranges(
    job: Job, committed: Mapping[int, CommittedUnit], filters: FilterSettings
) -> list[PartTask]:
    tasks = []
    for index, first in enumerate(range(0, job.units, job.units_per_part)):
        ids = range(first, min(first + job.units_per_part, job.units))
        if all(unit_id in committed for unit_id in ids):
            part_units = tuple(committed[unit_id] for unit_id in ids)
            tasks.append(PartTask(context=job.context, index=index, part_units=part_units, filters=filters))
    return tasks


def _stored_parts(
    store: Store, before: Manifest | None, job: Job, filters: FilterSettings
) -> dict[int, Part]:
    """Return the parts of the last manifest, by index, whose files exist and were made with these filters."""
    if before is None or (before.filters, before.plan_sha256) != (filters, job.context.plan_sha256):
        return {}
    sizes = {entry.key: entry.size for entry in [*store.list("images/"), *store.list("instances/")]}
    return {
        part.index: part
        for part in before.parts
        if all(sizes.get(file.key) == file.bytes for file in (part.images, part.instances))
    }


def _same_units(part: Part | None, task: PartTask) -> bool:
    return part is not None and [
        (unit_id, part.generation_of(unit_id)) for unit_id in range(part.first_unit, part.stop_unit)
    ] == [(unit.unit_id, unit.generation) for unit in task.part_units]


def _manifest(job: Job, filters: FilterSettings, parts: Sequence[Part], *, complete: bool) -> Manifest:
    whole = complete and sum(part.stop_unit - part.first_unit for part in parts) == job.units
    return Manifest(
        state="complete" if whole else "partial",
        run_id=job.context.run_id,
        plan_sha256=job.context.plan_sha256,
        units=job.units,
        filters=filters,
        parts=tuple(sorted(parts, key=lambda part: part.index)),
        published_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        lineage=footer(job.context),
    )


def foreign_parts(store: Store, job: Job) -> list[str]:
    """Return keys below images/ and instances/ that are no part of this job; a glob would read them too."""
    count = -(-job.units // job.units_per_part)
    ours = {part_key(table, index) for table in _TABLES for index in range(count)}
    keys = [entry.key for table in _TABLES for entry in store.list(f"{table}/")]
    return [key for key in keys if key not in ours]


_TABLES: tuple[Literal["images", "instances"], ...] = ("images", "instances")


def _refuse_foreign_parts(store: Store, job: Job) -> None:
    foreign = foreign_parts(store, job)
    if foreign:
        raise JobRefused(
            f"{store.place.uri}: {foreign[0]} and {len(foreign) - 1} more are no files of this job, and "
            "every query over the folder would read them too; move them away"
        )


def _write_categories(store: Store, job: Job) -> None:
    body = (json.dumps(list(job.categories), ensure_ascii=False, indent=1) + "\n").encode()
    try:
        if store.read(CATEGORIES_KEY) == body:
            return
    except NotFound:
        pass
    store.put(CATEGORIES_KEY, body)


# ---------------------------------------------------------------------------------------------
# One part
# ---------------------------------------------------------------------------------------------


def publish_part(task: PartTask) -> Part:
    """Write one part: units are read a few at a time, both files put whole.

    Memory: the two compressed files, one row group of rows each, and `READERS` units.

    Raises:
        DamageFound: a unit does not verify, or does not follow the one before it.
        JobRefused: another driver has taken the job over.
    """
    store = Store(task.context.output)
    lineage = {**footer(task.context), "filters": json.dumps(task.filters.model_dump())}
    images = checksummed_parquet.ParquetSink(schema.IMAGES, lineage)
    instances = checksummed_parquet.ParquetSink(schema.INSTANCES, lineage)
    counts: list[Counts] = []
    last_id: bytes | None = None
    for unit, table in _in_order(store, task.part_units):
        last_id = _follows(unit, table, last_id)
        flat = flatten_unit(table, task.filters)
        images.write(flat.images)
        instances.write(flat.instances)
        counts.append(flat.counts)
    ids = [unit.unit_id for unit in task.part_units]
    image_file = _put(store, task.driver, part_key("images", task.index), images)
    visit("publish.images")
    instance_file = _put(store, task.driver, part_key("instances", task.index), instances)
    visit("publish.part")
    return Part(
        index=task.index,
        first_unit=ids[0],
        stop_unit=ids[-1] + 1,
        generations={u.unit_id: u.generation for u in task.part_units if u.generation},
        images=image_file,
        instances=instance_file,
        counts=add_counts(counts),
    )


def _in_order(store: Store, part_units: Sequence[CommittedUnit]) -> Iterator[tuple[CommittedUnit, pa.Table]]:
    """Yield each unit with its rows. A bucket makes every read wait, so some are under way at once."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(part_units), READERS):
            batch = part_units[start : start + READERS]
            yield from zip(batch, pool.map(partial(read_committed, store), batch), strict=True)


def _put(store: Store, driver: int, key: str, sink: checksummed_parquet.ParquetSink) -> PartFile:
    """Put the file of a part unless a later driver has the job: it may have published newer rows."""
    body = sink.finish()
    require_latest(store, driver, "publish")
    store.put(key, body)
    return PartFile(key=key, rows=sink.rows, bytes=len(body), sha256=hashlib.sha256(body).hexdigest())


def _follows(unit: CommittedUnit, table: pa.Table, last_id: bytes | None) -> bytes | None:
    """Return the unit's last image id, in UTF-8; DamageFound when ids do not rise or are another unit's."""
    for image_id, unit_id in zip(table["image_id"].to_pylist(), table["unit_id"].to_pylist(), strict=True):
        risen = last_id is None or image_id.encode() > last_id
        if not risen or unit_id != unit.unit_id:
            raise DamageFound(
                f"unit {unit.unit_id} ({unit.key}): image {image_id!a} of unit {unit_id} is out of order"
            )
        last_id = image_id.encode()
    return last_id
