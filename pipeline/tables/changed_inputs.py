"""A job whose inputs changed goes on: rows of images that are planned as before are kept, the rest is done.

The new plan takes the job over. Its units have generations from a first one on that no file of the plans
before has, so that nothing old counts as done, and nothing is moved or deleted. A unit of the new plan takes
over the rows of those of its images whose planned row (uri, boxes and all else that decides a row) is equal
in a plan before; stage one opens only the others, and the commit joins both. job.json is replaced last: a
process that is killed before leaves the old job whole, and one that is killed after is gone on with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import DamageFound, JobRefused, count
from hqlabel.pipeline.job_context import EarlierPlan, JobContext
from hqlabel.pipeline.job_state.job_file import JOB_KEY, Job, job_body
from hqlabel.pipeline.job_state.plan_files import iter_plan, read_unit
from hqlabel.pipeline.storage.output_store import NotFound, Store
from hqlabel.pipeline.tables.lineage import devices_of
from hqlabel.pipeline.tables.manifest import (
    MANIFEST_KEY,
    Manifest,
    look_for_manifest,
    read_manifest,
    write_manifest,
)
from hqlabel.pipeline.tables.unit_files import list_committed, list_generations, parse_key, read_generation

GAP = 2
"""A worker of a driver that is gone may still commit the next generation of the old plan's unit."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """How a new plan differs from a job's. `done`: of the `unchanged` images, those that have their row."""

    unchanged: int
    done: int
    changed: int
    new: int
    gone: int

    def __str__(self) -> str:
        differ = count(self.changed + self.new + self.gone, "image differs", "images differ")
        return (
            f"{differ} ({self.changed:,} changed, {self.new:,} new, {self.gone:,} gone), {self.unchanged:,} "
            f"are as before, {self.done:,} of them done"
        )


def compare(store: Store, job: Job, planned: pa.Table) -> Changes:
    """Return how a new plan (schema.PLAN) differs from the plan of a job in the store."""
    committed = list_committed(store, job.context.first_generation)
    before: dict[str, tuple[bytes, bool]] = {}
    for unit_id, table in enumerate(_whole_units(store, job.context.plan_sha256)):
        before |= {row["image_id"]: (_digest(row), unit_id in committed) for row in table.to_pylist()}
    total, unchanged, done, new = len(before), 0, 0, 0
    for batch in planned.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            found = before.pop(row["image_id"], None)
            new += found is None
            if found is not None and found[0] == _digest(row):
                unchanged += 1
                done += found[1]
    met = total - len(before)
    return Changes(unchanged=unchanged, done=done, changed=met - unchanged, new=new, gone=len(before))


def _whole_units(store: Store, plan_sha256: str) -> Iterator[pa.Table]:
    """Yield the units of a plan; of one that was not written whole, those that are there."""
    try:
        yield from iter_plan(store, plan_sha256)
    except (DamageFound, NotFound):
        return


def _deciding(row: Mapping[str, Any]) -> str:
    """Return all of a planned row that decides its image's row, as text; NaN equals NaN."""
    return repr({name: value for name, value in row.items() if name != "unit_id"})


def _digest(row: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(_deciding(row).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def going_on(store: Store, before: Job, job: Job) -> Job:
    """Return `job`, of a new plan, as the one that takes over from `before`; nothing is written.

    Raises:
        JobRefused: the working files were removed, or the tables would have fewer parts.
    """
    manifest = read_manifest(store)
    if manifest is not None and manifest.cleaned:
        raise JobRefused(
            f"{store.place.uri}: its working files were removed by clean, so its rows cannot be taken over; "
            "choose another output"
        )
    parts = -(-job.units // before.units_per_part)
    stale = [part for part in manifest.parts if part.index >= parts] if manifest else []
    if stale:
        raise JobRefused(
            f"{store.place.uri}: the new plan has {count(parts, 'part')}, and {stale[0].images.key} would be "
            "left over in every query; choose another output"
        )
    context = before.context
    first = GAP + max((unit.generation for unit in list_generations(store)), default=context.first_generation)
    plan = EarlierPlan(
        plan_sha256=context.plan_sha256,
        units=before.units,
        first_generation=context.first_generation,
        stop_generation=first,
    )
    earlier = (plan, *context.earlier)
    taking_over = replace(job.context, first_generation=first, earlier=earlier)
    return replace(job, context=taking_over, units_per_part=before.units_per_part)


def take_over(store: Store, before: Job, job: Job) -> None:
    """Put `job` in the place of `before`, which is kept below previous/. The caller owns the job.

    Its plan is written already. job.json is last: until then the old job is whole, but for its manifest,
    which any publish makes again.
    """
    archive = f"previous/{before.context.plan_sha256[:16]}.g{before.context.first_generation}"
    store.put_if_absent(f"{archive}/{JOB_KEY}", store.read(JOB_KEY))
    found = look_for_manifest(store)
    if found.manifest is not None:
        store.put_if_absent(f"{archive}/{MANIFEST_KEY}", store.read(MANIFEST_KEY))
        write_manifest(store, _of_no_part(found.manifest, job), found.entry)
    store.put(JOB_KEY, job_body(job))


def _of_no_part(manifest: Manifest, job: Job) -> Manifest:
    return replace(
        manifest,
        state="publishing",
        run_id=job.context.run_id,
        plan_sha256=job.context.plan_sha256,
        units=job.units,
        parts=(),
        revision=manifest.revision + 1,
    )


# ---------------------------------------------------------------------------------------------
# A unit of the new plan
# ---------------------------------------------------------------------------------------------


def kept_rows(store: Store, context: JobContext, planned: pa.Table) -> pa.Table | None:
    """Return the rows (schema.UNIT) that a unit takes over from the plans before; None when there are none.

    `planned`: the unit's rows of the new plan. Their footer has the kinds of device that made them.
    """
    wanted = {row["image_id"]: _deciding(row) for row in planned.to_pylist()} if context.earlier else {}
    found: list[pa.Table] = []
    devices: set[str] = set()
    for plan in context.earlier:
        for unit_id in _overlapping(store, plan, list(wanted)):
            rows = _equal_rows(store, plan, unit_id, wanted)
            if rows is not None:
                found.append(rows.replace_schema_metadata())
                devices.update(devices_of(rows))
                for image_id in rows["image_id"].to_pylist():
                    del wanted[image_id]
    if not found:
        return None
    table = pa.concat_tables(found)
    unit_ids = pa.array([planned["unit_id"][0].as_py()] * table.num_rows, schema.UNIT.field("unit_id").type)
    place = table.schema.get_field_index("unit_id")
    table = table.set_column(place, schema.UNIT.field("unit_id"), unit_ids)
    return table.replace_schema_metadata({"hqlabel.kept_devices": json.dumps(sorted(devices))})


def _equal_rows(store: Store, plan: EarlierPlan, unit_id: int, wanted: Mapping[str, str]) -> pa.Table | None:
    """Return the committed rows of one unit of a plan before whose planned rows are among `wanted`."""
    planned = read_unit(store, plan.plan_sha256, unit_id).to_pylist()
    equal = [row["image_id"] for row in planned if wanted.get(row["image_id"]) == _deciding(row)]
    generation = _newest(store, plan, unit_id) if equal else None
    if generation is None:
        return None
    rows = read_generation(store, unit_id, generation)
    return rows.filter(pc.is_in(rows["image_id"], pa.array(equal, pa.string())))


def _newest(store: Store, plan: EarlierPlan, unit_id: int) -> int | None:
    """Return the highest generation of a unit that is of this plan; None when there is none."""
    keys = (parse_key(entry.key) for entry in store.list(f"units/{unit_id:08d}.g"))
    generations = [key[1] for key in keys if key is not None and key[0] == unit_id]
    mine = [one for one in generations if plan.first_generation <= one < plan.stop_generation]
    return max(mine, default=None)


def _overlapping(store: Store, plan: EarlierPlan, image_ids: list[str]) -> Iterator[int]:
    """Yield the units of a plan that may hold some of these images: a plan is in the order of their ids."""
    if not image_ids or not plan.units:
        return
    least, most = (end(one.encode() for one in image_ids) for end in (min, max))
    low, high = 0, plan.units - 1  # the last unit whose first id is not over `least`
    while low < high:
        middle = (low + high + 1) // 2
        if _first_id(store, plan, middle) <= least:
            low = middle
        else:
            high = middle - 1
    for unit_id in range(low, plan.units):
        if _first_id(store, plan, unit_id) > most:
            return
        yield unit_id


_first_ids: dict[tuple[str, str, int], bytes] = {}


def _first_id(store: Store, plan: EarlierPlan, unit_id: int) -> bytes:
    """Return the first image id of a unit, in UTF-8; this process remembers it."""
    key = (store.place.uri, plan.plan_sha256, unit_id)
    if key not in _first_ids:
        _first_ids[key] = read_unit(store, plan.plan_sha256, unit_id)["image_id"][0].as_py().encode()
    return _first_ids[key]
