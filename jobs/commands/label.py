"""`hqlabel label`: the main job, from inputs to published tables, and back from wherever it ended.

    check -> open or create the job -> report what was understood -> lock it -> run what is pending
    -> publish -> report what came out

Done means that the committed set equals the planned set. A job that is done is not touched: no image
is read, Ray is not started, no byte changes.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from dataclasses import dataclass

from hqlabel.jobs.cluster.ray_session import Machine
from hqlabel.jobs.cluster.run_units import Work, images_in, run_pending, save_config
from hqlabel.jobs.commands.end_summary import Ending, report_done, report_slice_done
from hqlabel.jobs.job_setup import resolve_settings
from hqlabel.jobs.job_setup.answering_stores import require_answers
from hqlabel.jobs.job_setup.driver_slice import WHOLE, JobLock, Slice
from hqlabel.jobs.job_setup.open_job import Opened, open_or_create
from hqlabel.jobs.job_setup.printed_flags import storage_flags
from hqlabel.jobs.load_config import CONFIG_KEY, Config
from hqlabel.jobs.results.render_images import write_contact_sheet
from hqlabel.jobs.terminal import console, input_report
from hqlabel.jobs.terminal.progress import CallCounts
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.pipeline.errors import JobRefused, UsageError
from hqlabel.pipeline.job_state.job_file import Job, read_job, require_job
from hqlabel.pipeline.planning.partitioned_plan import AnyPlan, write_any_plan
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.changed_inputs import take_over
from hqlabel.pipeline.tables.manifest import read_manifest
from hqlabel.pipeline.tables.publish_tables import publish
from hqlabel.pipeline.tables.published_parts import finished_units
from hqlabel.pipeline.tables.unit_files import list_committed


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How one call of the command works; nothing here changes what comes out."""

    part: Slice = WHOLE
    check_inputs: bool = False
    accept_changed_inputs: bool = False
    progress: bool = True
    json: bool = False


def run(config: Config, options: LabelOptions, interrupts: Interrupts) -> int:
    """Label what is pending, publish when nothing is left, and return the exit code."""
    began = time.monotonic()
    require_answers(config)
    _refuse_missing_inputs(config)
    with Machine(config, interrupts) as machine, contextlib.ExitStack() as stack:
        machine.check()
        opened = open_or_create(
            config,
            check_inputs=options.check_inputs,
            dtype=machine.dtype,
            device=machine.device,
            accept_changed_inputs=options.accept_changed_inputs,
            tasks=machine.planning_tasks,
        )
        store, job = opened.store, opened.job
        pending = pending_units(store, job, options.part)
        _report_understood(config, opened, machine, options.part, mine=len(pending))
        job_lock = slice_lock = stack.enter_context(JobLock(store, interrupts))
        if opened.taken_over is not None:
            _take_over(opened, job_lock)
        if options.part != WHOLE:
            slice_lock = stack.enter_context(JobLock(store, interrupts, options.part))
        counts = CallCounts()
        if pending:
            work = Work(
                config=opened.config,
                store=store,
                job=job,
                machine=machine,
                owner=slice_lock.take(),
                interrupts=interrupts,
                show_progress=options.progress,
            )
            kept = _kept_images(opened) if options.part == WHOLE else 0
            counts = _label_pending(work, opened.plan, options.part, pending, kept)
        manifest = picture = None
        if not pending_units(store, job, WHOLE):
            manifest = publish(
                store, job, config.filter, require_owner=job_lock.require, mapper=machine.map_parts
            )
            picture = write_contact_sheet(store, job, manifest, again=counts.units > 0)
        end = Ending(
            config=opened.config.model_copy(update={"cluster": config.cluster}),
            store=store,
            job=job,
            counts=counts,
            seconds=time.monotonic() - began,
            manifest=manifest,
            picture=picture,
        )
        if manifest is None:
            return report_slice_done(end, options.part, json=options.json)
        return report_done(end, json=options.json)


def pending_units(store: Store, job: Job, part: Slice) -> list[int]:
    """Return the units of this slice that are not committed, by what the store lists now."""
    committed = list_committed(store, job.context.first_generation, units=job.units)
    done = finished_units(store, committed.numbers, read_manifest(store))
    return [int(unit) for unit in done.missing(part.units(job.units))]


def _refuse_missing_inputs(config: Config) -> None:
    """Raise UsageError for a call without inputs over an existing job, naming the settings to go on with."""
    if config.input.images or config.input.boxes:
        return
    store = Store(resolve_settings.output_place(config))
    if read_job(store) is not None:
        saved = f"{store.place.uri.rstrip('/')}/{CONFIG_KEY}"
        command = ["hqlabel", "label", "--config", saved, *storage_flags(config)]
        raise UsageError(
            "--images and --boxes are missing. To go on with the job that is there, repeat the command that "
            f"started it, or use its settings: {shlex.join(command)} (if the "
            "folder is not your own, read that file first)"
        )


def _report_understood(config: Config, opened: Opened, machine: Machine, part: Slice, *, mine: int) -> None:
    job = opened.job
    left = mine if part == WHOLE else len(pending_units(opened.store, job, WHOLE))
    if opened.taken_over is not None:
        console.say(f"the inputs changed: {opened.taken_over.changes}; what is done keeps its rows")
    word = "going on with the job in" if opened.resumed else "new job in"
    console.say(f"hqlabel {console.code_version()}: {word} {opened.store.place.uri}")
    work = input_report.describe_work(
        job,
        done_units=job.units - left,
        pending_units=mine,
        part=part.text,
        kept_images=_kept_images(opened),
    )
    rows = [
        *input_report.describe_inputs(opened.config, job.plan),
        *input_report.describe_detector(job.context),
        *input_report.describe_model(job.context, asked_dtype=config.model.dtype),
        *([("machine", machine.describe(mine))] if mine else []),
        work,
    ]
    console.say(console.pairs(rows))
    for line in input_report.warnings(opened.config, job.plan):
        console.say(line)


def _take_over(opened: Opened, lock: JobLock) -> None:
    """Put the job of the changed inputs in the place of the one that is there.

    Raises:
        JobRefused: another driver is at work, or the job there is another by now.
    """
    assert opened.taken_over is not None, "the caller asks"
    assert opened.plan is not None, "it was planned anew"
    lock.require("the change of inputs")
    before, now = opened.taken_over.before, require_job(opened.store)
    if (now.identity, now.context.run_id) != (before.identity, before.context.run_id):
        raise JobRefused(f"{opened.store.place.uri}: the job there was changed meanwhile; start again")
    write_any_plan(opened.store, opened.plan)
    lock.require("the change of inputs")
    take_over(opened.store, before, opened.job)


def _kept_images(opened: Opened) -> int:
    """Return how many images of changed inputs keep their rows."""
    return 0 if opened.taken_over is None else opened.taken_over.changes.done


def _label_pending(
    work: Work, plan: AnyPlan | None, part: Slice, pending: list[int], kept_images: int
) -> CallCounts:
    """Run the pending units of this slice until none is left; return what this process did.

    `plan`: of a new job, written first. `kept_images`: of the pending units, known to keep their rows.
    """
    if plan is not None:
        write_any_plan(work.store, plan)
    save_config(work.store, work.config)
    total = images_in(work.job, part.units(work.job.units))
    return run_pending(
        work,
        lambda: pending_units(work.store, work.job, part),
        total_images=total,
        done_images=total - images_in(work.job, pending),
        kept_images=kept_images,
    )
