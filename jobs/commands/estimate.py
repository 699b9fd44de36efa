"""Some images of a plan, end to end, to estimate what all of them would take; nothing of it is kept.

The sample is spread evenly over the plan and runs through the very stages of a job, on the same machine or
cluster, with an output in a temporary folder. The rate is taken after every model process has finished
its first unit, so that starting counts once and not per image.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from hqlabel.jobs.cluster.ray_session import Machine
from hqlabel.jobs.cluster.run_units import working_context
from hqlabel.jobs.job_setup import resolve_settings
from hqlabel.jobs.job_setup.open_job import new_context
from hqlabel.jobs.load_config import Config
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.signals import Interrupted, Interrupts
from hqlabel.pipeline.arrow_lists import table_sha256
from hqlabel.pipeline.errors import JobRefused, count
from hqlabel.pipeline.job_context import JobContext, JobDetector, Place, UnitOutcome, Weights
from hqlabel.pipeline.job_state.job_file import units_per_part
from hqlabel.pipeline.planning.make_plan import Plan, write_plan
from hqlabel.pipeline.planning.partitioned_plan import AnyPlan
from hqlabel.pipeline.ray_execution.placement import Requests
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.storage.checksummed_parquet import compressed_bytes
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.count_masks import Counts
from hqlabel.pipeline.tables.publish_tables import PartTask, publish_part
from hqlabel.pipeline.tables.unit_files import list_committed

_UNITS_PER_ACTOR = 8


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a sample took. `start_s`: Ray and the models, once a job.

    `row_bytes`: of its rows in the published tables, compressed; `part_bytes`: what the two files of a part
    hold except rows. `actors`: model processes; `gpus`: devices they hold together, 0 on the CPU.
    """

    images: int
    images_per_unit: int
    failed: int
    boxes: int
    masks: int
    empty: int
    start_s: float
    images_per_s: float
    row_bytes: int
    part_bytes: int
    actors: int
    gpus: float
    device: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What all images that are left would take on the same machines. `usd`: None when no price is known.

    `bytes`: of the published tables; the working units take as much again or more, until `clean`. `parts`:
    files of each table.
    """

    measured: Measured
    images: int
    hours: float
    gpu_hours: float
    usd: float | None
    bytes: int
    parts: int


def measure(
    config: Config,
    plan: AnyPlan,
    weights: Weights,
    interrupts: Interrupts,
    *,
    sample: int,
    segmenter: str | None = None,
    detector: JobDetector | None = None,
) -> Measured:
    """Return what `sample` images of the plan took, or all when it has fewer.

    `segmenter`: another factory than the model's; see `JobContext.segmenter`.

    Raises:
        JobRefused: there is nothing to measure, or the nodes share no folder for the sample.
        SystemicFault: what the first unit met.
    """
    with tempfile.TemporaryDirectory(prefix="hqlabel-sample-") as folder:
        output = config.output.model_copy(update={"uri": folder})
        with Machine(config.model_copy(update={"output": output}), interrupts) as machine:
            began = time.monotonic()
            requests = machine.check()
            machine.start()
            started = time.monotonic()
            small = sampled_plan(plan, sample, actors=requests.actors_max)
            dtype = machine.dtype()
            summary = plan.summary
            boxes_per_call = resolve_settings.BOXES_PER_CALL[machine.device()]
            context = new_context(
                resolve_settings.with_boxes_per_call(config, boxes_per_call),
                output=Place(uri=folder),
                plan_sha256=small.sha256,
                weights=weights,
                dtype=dtype,
                detector=detector,
                box_rules=resolve_settings.box_rules(config, summary.box_format, summary.box_frame),
                access=plan.access,
            )
            segmenter = segmenter or context.segmenter
            context = replace(context, images_per_unit=small.images_per_unit, segmenter=segmenter)
            write_plan(Store(context.output), small)
            from hqlabel.pipeline.ray_execution.chain import run_units

            clock = _Clock()
            run_units(
                sorted(set(small.table["unit_id"].to_pylist())),
                working_context(context, machine.device()),
                config.cluster,
                epoch=1,
                on_outcome=clock.add,
                should_stop=interrupts.should_stop,
            )
            if interrupts.should_stop():
                raise Interrupted
            rows_and_parts = _published(context, config.filter)
            return clock.measured(*rows_and_parts, requests, machine.device(), ray_s=started - began)


def sampled_plan(plan: AnyPlan, sample: int, *, actors: int) -> Plan:
    """Return `sample` rows of the plan, evenly spread, in units small enough that each actor gets several."""
    rows = plan.table.num_rows
    if rows == 0:
        raise JobRefused("there is no image to measure with")
    places = np.unique(np.linspace(0, rows - 1, min(sample, rows)).round().astype(np.int64))
    per_unit = max(1, min(plan.images_per_unit, len(places) // (_UNITS_PER_ACTOR * actors)))
    table = plan.table.take(pa.array(places)).combine_chunks()
    at = table.schema.get_field_index("unit_id")
    unit_ids = pa.array(np.arange(len(places)) // per_unit, pa.int32())
    table = table.set_column(at, table.schema.field(at), unit_ids)
    return Plan(
        table=table,
        summary=plan.summary,
        categories=plan.categories,
        sha256=table_sha256(table),
        images_per_unit=per_unit,
        access=plan.access,
    )


def _published(context: JobContext, filters: FilterSettings) -> tuple[int, int, Counts]:
    """Publish the sample as one part; return bytes of its rows, other bytes, and its counts.

    Its small unit files would show neither size.
    """
    store = Store(context.output)
    units = tuple(list_committed(store).values())
    part = publish_part(PartTask(context=context, index=0, part_units=units, filters=filters))
    files = (part.images, part.instances)
    rows = sum(compressed_bytes(store.read(file.key)) for file in files)
    return rows, sum(file.bytes for file in files) - rows, part.counts


class _Clock:
    """The outcomes of the sample's units and when they came."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._came: list[tuple[float, UnitOutcome]] = []

    def add(self, outcome: UnitOutcome) -> None:
        """Count a finished unit."""
        self._came.append((time.monotonic() - self._began, outcome))

    def measured(
        self, rows: int, other: int, counts: Counts, requests: Requests, device: str, *, ray_s: float
    ) -> Measured:
        """Return the rate after the first unit of every actor, the start before it, and the counts.

        `rows`, `other`: bytes of the published rows, and of all else in their files.
        """
        images = [outcome.images for _, outcome in self._came]
        first = min(requests.actors_max, max(1, len(images) // 2))
        (warm_s, _), (end_s, _) = self._came[first - 1], self._came[-1]
        before, after = sum(images[:first]), sum(images[first:])
        images_per_s = sum(images) / end_s  # of one unit alone: its start is in the rate
        if after and end_s > warm_s:
            images_per_s = after / (end_s - warm_s)
        return Measured(
            images=sum(images),
            images_per_unit=max(images),
            failed=sum(outcome.failed for _, outcome in self._came),
            boxes=counts.boxes,
            masks=counts.masks,
            empty=counts.empty,
            start_s=ray_s + max(0.0, warm_s - before / images_per_s),
            images_per_s=images_per_s,
            row_bytes=rows,
            part_bytes=other,
            actors=requests.actors_max,
            gpus=requests.gpus_per_actor * requests.actors_max,
            device=device,
        )


def carry_over(measured: Measured, plan: AnyPlan, *, left: int, usd_per_gpu_hour: float | None) -> Estimate:
    """Return the estimate for `left` images of the plan."""
    summary = plan.summary
    hours = (measured.start_s + left / measured.images_per_s) / 3600
    sizes = {"images": summary.images, "boxes": summary.boxes, "images_per_unit": plan.images_per_unit}
    parts = -(-summary.units // units_per_part(**sizes))
    gpu_hours = hours * measured.gpus
    return Estimate(
        measured=measured,
        images=left,
        hours=hours,
        gpu_hours=gpu_hours,
        usd=None if usd_per_gpu_hour is None else gpu_hours * usd_per_gpu_hour,
        bytes=round(measured.row_bytes / measured.images * summary.images) + measured.part_bytes * parts,
        parts=parts,
    )


def describe(estimate: Estimate) -> list[tuple[str, str]]:
    """Return the estimate as lines of text."""
    measured = estimate.measured
    processes = count(measured.actors, "model process", "model processes")
    sample = f"{count(measured.images, 'image')}, {count(measured.boxes, 'box', 'boxes')}"
    sample += f", {console.with_a_mask(measured.masks, measured.empty)}"
    failed = f", {measured.failed:,} failed" if measured.failed else ""
    rate = f"{console.rate(measured.images_per_s)} images/s with {processes} on {measured.device}"
    rows = [
        ("sample", f"{sample}{failed}: {rate}, start {console.duration(measured.start_s)}"),
        ("time", f"about {console.duration(estimate.hours * 3600)} for {count(estimate.images, 'image')}"),
    ]
    if measured.gpus:
        money = "" if estimate.usd is None else f", {estimate.usd:,.2f} USD"
        rows.append(("GPU-hours", f"{estimate.gpu_hours:.2f}{money}"))
    parts = count(estimate.parts, "part")
    size = console.size(estimate.bytes)
    rows.append(("tables", f"about {size} in {parts}, and as much or more of working files"))
    return rows
