"""How far a job is, from its store alone: no cluster, no driver, no file of this machine."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc

from hqlabel.pipeline.job_state.driver_lock import Holder, current_holder
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.count_masks import Counts, add_counts, count_unit
from hqlabel.pipeline.tables.manifest import Manifest, read_manifest
from hqlabel.pipeline.tables.published_parts import finished_units
from hqlabel.pipeline.tables.unit_files import (
    CommittedUnit,
    CommittedUnits,
    Numbers,
    list_committed,
    read_committed,
)

READERS = 16
RATE_WINDOW_S = 1200.0
UNITS_READ_AT_MOST = 20_000


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """`images`, `units`: planned. `counts`: of the `units_counted` units that were counted, which are
    all of them unless there were more unpublished ones than status reads.

    `images_per_s`: over the last 20 minutes of commits, None when there were fewer than two. `eta_s`:
    what is left at that rate. `last_commit_at`: None when it is not known. `holder`: the driver that
    took the job last, with its number; whether it lives is not known without waiting for its heart.
    """

    images: int
    units: int
    units_done: int
    units_counted: int
    units_published: int
    counts: Counts = field(default_factory=Counts)
    images_per_s: float | None = None
    eta_s: float | None = None
    last_commit_at: dt.datetime | None = None
    holder: tuple[int, Holder] | None = None

    @property
    def complete(self) -> bool:
        """Whether every planned unit is committed."""
        return self.units_done == self.units


UnitCounts = tuple[Counts, dt.datetime]
"""The counts of a unit, and when it was committed."""
Seen = dict[str, UnitCounts]
"""What `status` has read of units, by key. Passed again, it spares the reading: a unit never changes."""


def status(
    store: Store, job: Job, *, read_at_most: int = UNITS_READ_AT_MOST, seen: Seen | None = None
) -> JobStatus:
    """Return the status of a job: published parts by the manifest; other units are read, unless `seen`.

    Raises:
        DamageFound: a unit or the manifest does not verify.
    """
    committed = list_committed(store, job.context.first_generation, units=job.units)
    manifest = read_manifest(store)
    left = finished_units(store, committed.numbers, manifest).missing(range(job.units))
    known, rest = _split(committed, manifest)
    unread = [committed[int(unit_id)] for unit_id in rest[-read_at_most:]] if read_at_most else []
    counted = _count(store, unread, {} if seen is None else seen)
    rate, last = _rate(counted)
    images = int(job.plan["images"])
    per_unit = job.context.images_per_unit
    unfinished = int(np.minimum(per_unit, images - left * per_unit).sum())
    return JobStatus(
        images=images,
        units=job.units,
        units_done=job.units - len(left),
        units_counted=sum(units for units, _ in known) + len(counted),
        units_published=manifest.published_units if manifest else 0,
        counts=add_counts([*(counts for _, counts in known), *(counts for counts, _ in counted)]),
        images_per_s=rate,
        eta_s=unfinished / rate if rate and unfinished else None,
        last_commit_at=last,
        holder=current_holder(store),
    )


def _split(committed: CommittedUnits, manifest: Manifest | None) -> tuple[list[tuple[int, Counts]], Numbers]:
    """Return (units, counts) of the parts that still hold, and the committed units outside them."""
    known: list[tuple[int, Counts]] = []
    holding: list[range] = []
    for part in manifest.parts if manifest else ():
        ids = range(part.first_unit, part.stop_unit)
        if any(generation != part.generation_of(u) for u, generation in committed.generations(ids).items()):
            continue  # a retry came after: its units are counted anew
        known.append((len(ids), part.counts))
        holding.append(ids)
    return known, committed.numbers.outside(holding)


def _count(store: Store, units: Sequence[CommittedUnit], seen: Seen) -> list[UnitCounts]:
    unread = [unit for unit in units if unit.key not in seen]
    with ThreadPoolExecutor(READERS) as pool:
        counted = pool.map(lambda unit: _count_unit(store, unit), unread)
        seen.update(zip((unit.key for unit in unread), counted, strict=True))
    return [seen[unit.key] for unit in units]


def _count_unit(store: Store, unit: CommittedUnit) -> UnitCounts:
    table = read_committed(store, unit)
    return count_unit(table), pc.max(table["processed_at"]).as_py()


def _rate(counted: Sequence[UnitCounts]) -> tuple[float | None, dt.datetime | None]:
    """Return (images a second, time of the last commit) of the newest commits."""
    if not counted:
        return None, None
    newest = max(at for _, at in counted)
    start = newest - dt.timedelta(seconds=RATE_WINDOW_S)
    recent = [(at, counts.images) for counts, at in counted if at >= start]
    oldest, images_before = min(recent, key=lambda one: one[0])
    seconds = (newest - oldest).total_seconds()
    # The first unit of the window was worked on before it: its images do not count.
    done = sum(images for _, images in recent) - images_before
    return (done / seconds if seconds > 0 and done else None), newest
