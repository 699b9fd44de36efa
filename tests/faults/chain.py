"""A whole small job in one process: every step of the real code but Ray, gone on with where it ended.

    open -> own -> plan -> prepare, segment, commit -> publish -> retry -> publish -> clean

`run_job` is what a person does by calling the same commands again: it looks at the store and does what
is missing. Children run it with one fail point armed, and are gone in the middle of it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hqlabel.pipeline import failpoints
from hqlabel.pipeline.images.decode_upright import DecodedImage
from hqlabel.pipeline.job_context import JobContext, Place
from hqlabel.pipeline.job_state.driver_lock import Owner
from hqlabel.pipeline.job_state.job_file import Job, identity_of, open_job
from hqlabel.pipeline.planning.make_plan import Plan, write_plan
from hqlabel.pipeline.settings import FilterSettings, Limits
from hqlabel.pipeline.stages.commit import commit_unit, read_outcome
from hqlabel.pipeline.stages.prepare import prepare_unit
from hqlabel.pipeline.stages.rows_between_stages import UnitRow
from hqlabel.pipeline.stages.segment import SegmentWorker
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.clean_output import clean
from hqlabel.pipeline.tables.manifest import read_manifest
from hqlabel.pipeline.tables.publish_tables import publish
from hqlabel.pipeline.tables.published_parts import finished_units
from hqlabel.pipeline.tables.unit_files import list_committed, read_committed
from tests.fakes import troubled_decoder
from tests.pipeline import made_jobs
from tests.pipeline.made_jobs import noise, png
from tests.table_digest import mask_columns_digest

BROKEN = "05.png"
BOXES = {"03.png": [], "04.png": None, "06.png": [[1.0, 2.0, 30.0, 20.0]] * 7, "07.png": [[9, 9, 1, 1]]}
IMAGES = 11
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.faults.chain", "tests.faults.racing"])


@dataclass(frozen=True, kw_only=True)
class SmallJob:
    """A job of 11 images in 4 units, 2 units a part; image 05 is cut in half until the first retry."""

    job: Job
    plan: Plan
    pictures: Path
    mended: bytes

    @property
    def context(self) -> JobContext:
        return self.job.context

    @property
    def store(self) -> Store:
        return Store(self.context.output)

    def at(self, place: Place) -> SmallJob:
        """The same job with another place for its output, and its picture broken again."""
        self.write_broken(self.mended[:900])
        return replace(self, job=replace(self.job, context=replace(self.context, output=place)))

    def write_broken(self, data: bytes) -> None:
        (self.pictures / BROKEN).write_bytes(data)
        os.utime(self.pictures / BROKEN, (len(data), len(data)))  # the time is part of its version tag


def make_small_job(folder: Path, **lineage: str) -> SmallJob:
    """The job over pictures in `folder`; nothing of it is in a store yet."""
    pictures = {f"{n:02}.png": png(noise(n)) for n in range(IMAGES)}
    mended = pictures[BROKEN]
    made = made_jobs.make_job(
        folder, pictures | {BROKEN: mended[:900]}, BOXES, images_per_unit=3,
        place=Place(uri=str(folder / "unused")), limits=Limits(segment_timeout_s=20),
        lineage={"code_version": "test", **lineage},
    )  # fmt: skip
    return SmallJob(
        job=as_job(made.context, made.plan), plan=made.plan, pictures=folder / "pictures", mended=mended
    )


def as_job(context: JobContext, plan: Plan) -> Job:
    """The job of a plan, two units a part."""
    images = plan.table.num_rows
    return Job(
        identity=identity_of(context, inputs={}, limit=None, protocol=1),
        context=context,
        plan={"images": images, "boxes": 0, "units": -(-images // context.images_per_unit)},
        units_per_part=2,
    )


class DirectDecoder:
    """Decodes in this process; what a bad picture does to its decoder is for other tests."""

    def __init__(self, limits: Limits, side: int) -> None:
        self._limits, self._side = limits, side

    def decode(self, data: bytes) -> DecodedImage:
        return troubled_decoder(data, max_pixels=self._limits.max_image_pixels, side=self._side)


def do_unit(unit: UnitRow, context: JobContext, *, epoch: int = 1) -> UnitRow:
    """One unit through the three stages; raises the systemic fault that it met."""
    store = Store(context.output)
    decoder = DirectDecoder(context.limits, context.weights.input_side)
    prepared, _ = prepare_unit(unit, context, store, decoder)  # type: ignore[arg-type]
    done = SegmentWorker(context, epoch=epoch, use_gpu=False).run(prepared)
    read_outcome(commit_unit(done, context, store))
    return done


def run_job(made: SmallJob, *, until: str = "clean", codes: tuple[str, ...] = ("truncated",)) -> None:
    """Do what is missing of `made`, up to and with one of `label`, `retry` (of `codes`) and `clean`."""
    store = made.store
    job = open_job(store, made.job)
    with Owner.take(store, takeover_after_s=0.5, beat_every_s=0.1) as owner:
        write_plan(store, made.plan)
        done = finished_units(store, list(list_committed(store)), read_manifest(store))
        for unit_id in sorted(set(range(job.units)) - done):
            do_unit(UnitRow(unit_id=unit_id), job.context, epoch=owner.number)
        publish(store, job, FilterSettings(), require_owner=owner.require)
        if until == "label":
            return
        made.write_broken(made.mended)
        failpoints.visit("retry.listed")
        for unit in list_committed(store).values():
            if set(codes) & set(read_committed(store, unit)["error_code"].to_pylist()):
                again = UnitRow(unit_id=unit.unit_id, generation=unit.generation + 1, redo_codes=codes)
                do_unit(again, job.context, epoch=owner.number)
        publish(store, job, FilterSettings(), require_owner=owner.require)
        if until == "clean":
            clean(store, require_owner=owner.require)


# ---------------------------------------------------------------------------------------------
# Children
# ---------------------------------------------------------------------------------------------


def in_child(
    function: Callable[..., object], *arguments: object, failpoint: str = "", timeout_s: float = 120
) -> int:
    """The exit code of a process that runs `function`, with a fail point armed."""
    process = start_child(function, *arguments, failpoint=failpoint)
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"a child with {failpoint or 'no fail point'} did not end")
    return process.exitcode


def start_child(
    function: Callable[..., object], *arguments: object, failpoint: str = ""
) -> multiprocessing.Process:
    """The started process; its exit code is 0, 1 after an exception, or -9 when it was killed."""
    environ = {**os.environ, failpoints.VARIABLE: failpoint}
    child = _processes.Process(target=_armed, args=(environ, function, arguments), daemon=True)
    child.start()
    return child  # type: ignore[return-value]


def _armed(environ: dict[str, str], function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    os.environ.update(environ)
    failpoints.arm(os.environ)
    function(*arguments)


# ---------------------------------------------------------------------------------------------
# What a reader sees
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The published tables as a glob reads them: ids, digests of what lasts, counts by status."""

    ids: tuple[str, ...]
    digests: tuple[str, str]
    statuses: tuple[tuple[str, int], ...]


def look(store: Store) -> Seen:
    """What is published now."""
    images, instances = (read_table(store, name) for name in ("images", "instances"))
    statuses = Counter(images["status"].to_pylist())
    return Seen(
        ids=tuple(images["image_id"].to_pylist()),
        digests=(mask_columns_digest(images), mask_columns_digest(instances)),
        statuses=tuple(sorted(statuses.items())),
    )


def read_table(store: Store, name: str) -> pa.Table:
    """One published table, by a listing of its folder."""
    bodies = [store.read(entry.key) for entry in store.list(f"{name}/")]
    tables = [pq.read_table(pa.BufferReader(body)).replace_schema_metadata() for body in bodies]
    return pa.concat_tables(tables)


def lost_and_doubled(store: Store, made: SmallJob) -> tuple[int, int]:
    """Planned images that are not in the published table, and rows too many."""
    ids = Counter(look(store).ids)
    planned = made.plan.table["image_id"].to_pylist()
    return sum(image_id not in ids for image_id in planned), sum(ids.values()) - len(ids)
