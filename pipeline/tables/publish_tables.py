"""Committed units -> the tables that users query: fixed ranges of units, flat, in image order.

A part is one atomic put under the name of its range, so a plain glob reads whole, undoubled rows
at any time. Only ranges whose units are all committed are published. Filters are applied here: they
mark rows, and a new threshold is one publish. Parts that are stored already are not written again.

Two commands at once: the job is taken before anything is looked at, each manifest replaces the one that
its writer has read, and each part the file that was there when its writer last owned the job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import DamageFound, JobRefused
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.job_state.driver_lock import latest_number, require_latest
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.backend import Entry
from hqlabel.pipeline.storage.output_store import NotFound, Store
from hqlabel.pipeline.tables.count_masks import Counts, add_counts, counts_of
from hqlabel.pipeline.tables.images_and_instances import FlatUnit, flatten_unit
from hqlabel.pipeline.tables.lineage import devices_of
from hqlabel.pipeline.tables.manifest import (
    CATEGORIES_KEY,
    TABLES,
    Manifest,
    Part,
    PartFile,
    look_for_manifest,
    part_key,
    write_manifest,
)
from hqlabel.pipeline.tables.published_parts import (
    HeldPart,
    StatedPart,
    as_footer,
    count_parts,
    describe_file,
    held_parts,
    is_merged,
    open_part,
    read_part,
    unfinished_change,
    units_of_part,
)
from hqlabel.pipeline.tables.unit_files import (
    CommittedUnit,
    CommittedUnits,
    footer,
    list_committed,
    read_committed,
)

READERS = 8
PUT_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """All that a worker needs to write one part; small and picklable. `part_units`: every unit, in order.

    `driver`: the number of the driver that publishes; a part is not put once a later one has the job.
    `publication`: see `StatedPart`. `base`: the part as it is, from which all rows come but those of
    `part_units`, when units were cleaned and others were written after.
    """

    context: JobContext
    index: int
    part_units: tuple[CommittedUnit, ...]
    filters: FilterSettings
    driver: int = 0
    publication: int = 0
    base: Part | None = None


Mapper = Callable[[Callable[[PartTask], Part], Sequence[PartTask]], Iterable[Part]]


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What a store holds, and what is to be done.

    `entry`: the manifest's version; `before`: the manifest, if it can be read. `kept`: parts that are right
    as they are; `due`: parts to write. `cleaned`: as in `Manifest`. `revision`: the highest so far.
    """

    entry: Entry | None
    before: Manifest | None
    kept: tuple[Part, ...]
    due: tuple[PartTask, ...]
    cleaned: bool
    revision: int

    def manifest(self, job: Job, filters: FilterSettings, parts: Sequence[Part], revision: int) -> Manifest:
        """Return the manifest of these parts."""
        whole = len(parts) == count_parts(job)
        return Manifest(
            state="complete" if whole else "partial",
            run_id=job.context.run_id,
            plan_sha256=job.context.plan_sha256,
            units=job.units,
            filters=filters,
            parts=tuple(sorted(parts, key=lambda part: part.index)),
            published_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            cleaned=self.cleaned,
            lineage=footer(job.context) if job.units or self.before is None else self.before.lineage,
            revision=revision,
        )


def publish(
    store: Store,
    job: Job,
    filters: FilterSettings,
    *,
    require_owner: Callable[[str], None],
    mapper: Mapper = map,
    save_filters: Callable[[], None] = lambda: None,
) -> Manifest:
    """Publish every range whose units are all committed, marked by `filters`; return the manifest.

    `require_owner`: raises when another driver has the job; called before each write. `mapper`: runs the
    parts, in any order (serial by default, Ray tasks in a job). When nothing is new, nothing is written.
    `save_filters`: called before the manifest says that the tables have them, so that none are forgotten.
    A manifest that is damaged or gone is made again.

    Raises:
        JobRefused: not the owner, files of something else among the tables, or working files that
            were cleaned and would be needed.
        DamageFound: a unit or part that is needed does not verify; with its name.
    """
    current = _if_current(store, job, filters)
    if current is not None:
        return current
    require_owner("publish")  # takes the job; only what is seen from now on is built upon
    driver = latest_number(store)
    require_owner("publish")  # so `driver` is ours: a later one has a higher number
    look = _look(store, job, filters)
    visit("publish.listed")
    if _is_current(look, job, filters):
        assert look.before is not None, "what is current was read"
        return look.before
    entry, revision = look.entry, look.revision + 1
    due = [dataclasses.replace(task, driver=driver, publication=revision) for task in look.due]
    if due:
        based = [task.base for task in due if task.base is not None]
        begun = look.manifest(job, filters, [*look.kept, *based], revision)
        entry = write_manifest(store, dataclasses.replace(begun, state="publishing"), entry)
        revision += 1
        visit("publish.begun")
    made = list(mapper(publish_part, due))
    visit("publish.parts")
    require_owner("publish")
    _write_categories(store, job)
    save_filters()
    visit("publish.categories")
    after = look.manifest(job, filters, [*look.kept, *made], revision)
    write_manifest(store, after, entry)
    visit("publish.done")
    return after


def _if_current(store: Store, job: Job, filters: FilterSettings) -> Manifest | None:
    """Return the manifest when there is nothing to write, which needs no owner; else None."""
    with contextlib.suppress(JobRefused, DamageFound):  # what another is writing may look like damage
        look = _look(store, job, filters)
        if _is_current(look, job, filters):
            return look.before
    return None


def _is_current(look: _Look, job: Job, filters: FilterSettings) -> bool:
    before = look.before
    if before is None or look.due or before.state == "publishing":
        return False
    if before.cleaned and before.state == "complete" and before.parts == look.kept:
        return True
    current = look.manifest(job, filters, look.kept, before.revision)
    return before == dataclasses.replace(current, published_at=before.published_at)


def _look(store: Store, job: Job, filters: FilterSettings) -> _Look:
    """Return what is there and what is to be done; raises what `publish` does."""
    committed = list_committed(store, job.context.first_generation, units=job.units)
    found = look_for_manifest(store)
    before = found.manifest
    if before is not None and before.plan_sha256 != job.context.plan_sha256:
        before = None
    _refuse_foreign_parts(store, job)
    held = _held(store, job, committed, before, known=before is not None or found.damage is not None)
    cleaned = before.cleaned if before is not None else _are_cleaned(job, committed, held)
    kept: list[Part] = []
    due: list[PartTask] = []
    begun = {entry.key for table in TABLES for entry in store.list(f"{table}/")}
    begun |= {file.key for part in (before.parts if before else ()) for file in (part.images, part.instances)}
    for index in range(count_parts(job)):
        ids = units_of_part(job, index)
        units = committed.within(ids)
        task = PartTask(context=job.context, index=index, part_units=units, filters=filters)
        choice = _choose(store, task, held.get(index), whole=len(units) == len(ids), cleaned=cleaned)
        if isinstance(choice, Part):
            kept.append(choice)
        elif choice is not None:
            due.append(choice)
        elif is_merged(job) or not begun.isdisjoint(part_key(table, index) for table in TABLES):
            changed = unfinished_change(store, job)
            raise JobRefused(changed) if changed else _lost(store, job, index)
    published = max((one.publication for one in held.values()), default=0)
    return _Look(
        entry=found.entry,
        before=before,
        kept=tuple(kept),
        due=tuple(due),
        cleaned=cleaned,
        revision=max(before.revision if before is not None else 0, published),
    )


def _held(
    store: Store,
    job: Job,
    committed: CommittedUnits,
    before: Manifest | None,
    *,
    known: bool,
) -> dict[int, HeldPart]:
    """Return the parts that the store holds: those that the manifest names, and others that are the only
    truth, because units of theirs are gone; these are believed by what their own files state.
    """
    held = held_parts(store, before) if before is not None else {}
    if not known:
        return held
    named = {part.index: part for part in before.parts} if before is not None else {}
    for index in range(count_parts(job)):
        ids = units_of_part(job, index)
        newest = committed.generations(ids)
        if index in held or (ids and len(newest) == len(ids)):
            continue
        part = read_part(store, job, index, newest)
        wanted = named.get(index)
        older = part and wanted and any(part.part.generation_of(u) < wanted.generation_of(u) for u in ids)
        if part is not None and not older:
            held[index] = part
    return held


def _are_cleaned(job: Job, committed: CommittedUnits, held: Mapping[int, HeldPart]) -> bool:
    """Return whether parts are the only truth: some unit of theirs has no file, or there are no units."""
    units = (range(one.part.first_unit, one.part.stop_unit) for one in held.values())
    return bool(held) and (not job.units or any(len(committed.numbers.missing(ids)) for ids in units))


def _choose(
    store: Store, task: PartTask, held: HeldPart | None, *, whole: bool, cleaned: bool
) -> Part | PartTask | None:
    """Return the part to keep, or what is to be written in its place, or None when neither can be."""
    if held is None:
        return task if whole and task.part_units else None
    part = held.part
    newer = tuple(unit for unit in task.part_units if unit.generation > part.generation_of(unit.unit_id))
    marked = held.filters in (None, task.filters)
    if marked and not newer:
        return part
    if whole and not cleaned:
        return task
    if not marked:
        raise JobRefused(
            f"{store.place.uri}: working files of this job were removed, by clean or otherwise, so its "
            "tables cannot be marked anew; filter the columns predicted_iou, stability_score, area, ... in a "
            "query instead, or publish with the filters that they have"
        )
    return dataclasses.replace(task, part_units=newer, base=part)


def _lost(store: Store, job: Job, index: int) -> DamageFound:
    if is_merged(job):
        return DamageFound(
            f"{store.place.uri}: {part_key('images', index)} or its instances are damaged or gone, or a "
            "merge was interrupted; merge the outputs again into another folder"
        )
    ids = units_of_part(job, index)
    return DamageFound(
        f"{store.place.uri}: {part_key('images', index)} or its instances are damaged or gone, and so are "
        f"files of units {ids.start} to {ids.stop - 1}. Put the files back from a copy; or move what is left "
        "of the two away, and `hqlabel label` does these units again"
    )


def foreign_parts(store: Store, job: Job) -> list[str]:
    """Return keys below images/ and instances/ that are no part of this job; a glob would read them too."""
    ours = {part_key(table, index) for table in TABLES for index in range(count_parts(job))}
    keys = [entry.key for table in TABLES for entry in store.list(f"{table}/")]
    return [key for key in keys if key not in ours]


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

    Memory: the two compressed files, one row group of rows each, and `READERS` units; all rows of a base.

    Raises:
        DamageFound: a unit does not verify, or does not follow the one before it.
        JobRefused: another driver has taken the job over.
    """
    store = Store(task.context.output)
    lineage = {**footer(task.context), "filters": json.dumps(task.filters.model_dump())}
    images = checksummed_parquet.ParquetSink(schema.IMAGES, lineage)
    instances = checksummed_parquet.ParquetSink(schema.INSTANCES, lineage)
    counts = [] if task.base is None else [Counts(devices=task.base.counts.devices)]
    last_id: bytes | None = None
    for unit_id, flat in _in_order(store, task):
        last_id = _follows(unit_id, flat.images, last_id)
        images.write(flat.images)
        instances.write(flat.instances)
        counts.append(flat.counts)
    made = _state(task, add_counts(counts))
    image_file = _put(store, task.driver, part_key("images", task.index), images, made)
    visit("publish.images")
    instance_file = _put(store, task.driver, part_key("instances", task.index), instances, made)
    visit("publish.part")
    return Part(
        index=task.index,
        first_unit=made.first_unit,
        stop_unit=made.stop_unit,
        generations=made.generations,
        images=image_file,
        instances=instance_file,
        counts=made.counts,
    )


def _state(task: PartTask, counts: Counts) -> StatedPart:
    ids = [unit.unit_id for unit in task.part_units]
    of_base = {} if task.base is None else dict(task.base.generations)
    return StatedPart(
        index=task.index,
        first_unit=ids[0] if task.base is None else task.base.first_unit,
        stop_unit=ids[-1] + 1 if task.base is None else task.base.stop_unit,
        generations={**of_base, **{u.unit_id: u.generation for u in task.part_units if u.generation}},
        counts=counts,
        publication=task.publication,
    )


def _in_order(store: Store, task: PartTask) -> Iterator[tuple[int, FlatUnit]]:
    """Yield each unit with its published rows, those of the base among them."""
    fresh = _read_units(store, task)
    if task.base is None:
        yield from fresh
        return
    kept = _base_rows(store, task.base)
    replaced = dict(fresh)
    for unit_id in range(task.base.first_unit, task.base.stop_unit):
        yield unit_id, replaced.get(unit_id) or kept(unit_id)


def _read_units(store: Store, task: PartTask) -> Iterator[tuple[int, FlatUnit]]:
    """Yield each unit flat. A bucket makes every read wait, so some are under way at once."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(task.part_units), READERS):
            batch = task.part_units[start : start + READERS]
            for unit, table in zip(batch, pool.map(partial(read_committed, store), batch), strict=True):
                wrong = pc.any(pc.not_equal(table["unit_id"], unit.unit_id)).as_py()
                if wrong:
                    raise DamageFound(f"unit {unit.unit_id} ({unit.key}): it has rows of another unit")
                flat = flatten_unit(table, task.filters)
                yield unit.unit_id, flat if task.base is None else _instead(flat, table, task.base)


def _instead(flat: FlatUnit, table: pa.Table, base: Part) -> FlatUnit:
    """Return a unit that takes the place of its rows in `base`, whose devices are counted there already."""
    unit_id = table["unit_id"][0].as_py()
    before = devices_of(table, generation=base.generations.get(unit_id, 0))
    new = {kind: number for kind, number in flat.counts.devices.items() if kind not in before}
    return dataclasses.replace(flat, counts=dataclasses.replace(flat.counts, devices=new))


def _base_rows(store: Store, base: Part) -> Callable[[int], FlatUnit]:
    """Return a function from a unit to its rows as they are published."""
    with open_part(store, base.images, schema.IMAGES) as file:
        images = file.read().replace_schema_metadata()
    with open_part(store, base.instances, schema.INSTANCES) as file:
        instances = file.read().replace_schema_metadata()

    def rows(unit_id: int) -> FlatUnit:
        mine = images.filter(pc.equal(images["unit_id"], unit_id))
        theirs = instances.filter(pc.is_in(instances["image_id"], mine["image_id"].combine_chunks()))
        return FlatUnit(images=mine, instances=theirs, counts=counts_of(mine, theirs))

    return rows


def _put(
    store: Store, driver: int, key: str, sink: checksummed_parquet.ParquetSink, part: StatedPart
) -> PartFile:
    """Put the file of a part, over the one that was there when the job was last proved to be ours.

    A later driver that has put its own since then is not overwritten; one that has not yet will overwrite
    this file, because the manifest does not name it.
    """
    body = sink.finish(as_footer(part))
    for _ in range(PUT_TRIES):
        seen = store.head(key)
        require_latest(store, driver, "publish")
        visit("publish.putting")
        if store.put_if_unchanged(key, body, seen):
            return describe_file(key, body, sink.rows)
    require_latest(store, driver, "publish")
    raise JobRefused(
        f"{store.place.uri}/{key}: another process keeps writing it; stop it, then publish again"
    )


def _follows(unit_id: int, images: pa.Table, last_id: bytes | None) -> bytes | None:
    """Return the unit's last image id, in UTF-8; DamageFound when ids do not rise."""
    for image_id in images["image_id"].to_pylist():
        if last_id is not None and image_id.encode() <= last_id:
            raise DamageFound(f"unit {unit_id}: image {image_id!a} is out of order")
        last_id = image_id.encode()
    return last_id
