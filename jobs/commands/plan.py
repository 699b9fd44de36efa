"""`hqlabel plan`: what `label` would do with the same options; nothing is written to the output.

A few of the images are checked, to warn of likely mistakes. With a sample, some go end to end on this
machine or cluster, into a folder that is thrown away, and what was measured is carried over to all of them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic_core import to_jsonable_python

from hqlabel.jobs.cluster.ray_session import Machine
from hqlabel.jobs.job_setup import resolve_settings
from hqlabel.jobs.job_setup.answering_stores import require_answers
from hqlabel.jobs.job_setup.check_models import CheckedDetector, read_checkpoint, read_detector
from hqlabel.jobs.job_setup.open_job import before_work, plan_inputs
from hqlabel.jobs.load_config import Config
from hqlabel.jobs.terminal import console, input_report
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.pipeline.errors import JobRefused, UsageError, count
from hqlabel.pipeline.job_context import Weights
from hqlabel.pipeline.job_state.job_file import read_job
from hqlabel.pipeline.planning.partitioned_plan import AnyPlan
from hqlabel.pipeline.planning.preview import with_preview_warnings
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import read_manifest
from hqlabel.pipeline.tables.published_parts import finished_units
from hqlabel.pipeline.tables.unit_files import list_committed


def run(config: Config, interrupts: Interrupts, *, sample: int, json: bool) -> int:
    """Plan, check what the output holds and the weights when they are named; print, and return 0.

    `sample`: images to measure with, 0 for none.

    Raises:
        UsageError: a sample is wanted and no checkpoint is named.
    """
    require_answers(config)
    # A large plan is made on Ray, of which only the rows for a sample outlive this block.
    with before_work(), Machine(config, interrupts) as machine:
        made = plan_inputs(config, machine.planning_tasks, some_rows=sample)
        detected = config.detector.name is not None
        plan = with_preview_warnings(made, config.limits, detected=detected)
        weights = read_checkpoint(config) if config.model.checkpoint else None
        detector = read_detector(config)
        done = _done(config, plan) if config.output.uri else None
    estimate, estimated = None, []
    if sample:
        from hqlabel.jobs.commands.estimate import carry_over, describe, measure

        if weights is None:
            raise UsageError("--sample measures the model: name one with --checkpoint")
        left = plan.summary.images - plan.images_per_unit * (done or 0)
        settings = None if detector is None else detector.settings
        measured = measure(config, plan, weights, interrupts, sample=sample, detector=settings)
        estimate = carry_over(measured, plan, left=left, usd_per_gpu_hour=config.cost.usd_per_gpu_hour)
        estimated = describe(estimate)
    if json:
        measured_too = {"detector": to_jsonable_python(detector), "estimate": estimate and asdict(estimate)}
        console.data_json({**_as_json(config, plan, weights, done), **measured_too})
    else:
        rows = _rows(config, plan, weights, done, detector)
        console.data(console.pairs([*rows, *estimated]))
        for line in input_report.warnings(config, asdict(plan.summary)):
            console.data(line)
    if estimate is None and not json:
        also = "" if weights else ", with --checkpoint"
        console.say(f"for time, money and bytes: --sample 64{also}")
    console.say("nothing was written; `hqlabel label` with the same options begins the work")
    return 0


def _done(config: Config, plan: AnyPlan) -> int:
    """Return how many units of this plan the output holds; raises `JobRefused` when it holds another plan."""
    store = Store(resolve_settings.output_place(config))
    job = read_job(store)
    if job is None:
        others = [entry.key for entry in store.list() if not entry.key.startswith((".", "owner/"))]
        if others:
            raise JobRefused(
                f"{store.place.uri}: holds other files, such as {others[0]}, and no job of hqlabel"
            )
        return 0
    if job.context.plan_sha256 != plan.sha256:
        raise JobRefused(
            f"{store.place.uri}: holds a job with another plan "
            f"({count(job.plan['images'], 'image')}, "
            f"{count(job.plan['boxes'], 'box', 'boxes')}); these inputs need another output"
        )
    committed = list_committed(store, job.context.first_generation, units=job.units)
    return len(finished_units(store, committed.numbers, read_manifest(store)))


def _rows(
    config: Config, plan: AnyPlan, weights: Weights | None, done: int | None, detector: CheckedDetector | None
) -> list[tuple[str, str]]:
    rows = input_report.describe_inputs(config, asdict(plan.summary))
    if detector is not None:
        rows.append(("detector", str(detector)))
    if weights is not None:
        licence = weights.license or "unknown"
        rows.append(("model", f"{weights.architecture}, input side {weights.input_side}; licence {licence}"))
        rows += [("", weights.warning)] if weights.warning else []
    rows.append(
        ("work", f"{count(plan.summary.units, 'unit')} of up to {count(plan.images_per_unit, 'image')}")
    )
    if done is not None:
        left = plan.summary.units - done
        rows.append(("done", f"{count(done, 'unit')}; {left:,} left"))
    return rows


def _as_json(config: Config, plan: AnyPlan, weights: Weights | None, done: int | None) -> dict[str, Any]:
    return {
        **input_report.as_json(config, asdict(plan.summary)),
        "plan_sha256": plan.sha256,
        "images_per_unit": plan.images_per_unit,
        "categories": list(plan.categories),
        "model": None if weights is None else asdict(weights),
        "units_done": done,
    }
