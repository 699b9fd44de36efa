"""`hqlabel label`: the main job, from inputs to published tables, and back from wherever it ended.

    check -> open or create the job -> say what was understood -> own it -> run what is pending
    -> publish -> say what came out

Done means that the committed set equals the planned set. A job that is done is not touched: no image
is read, Ray is not started, no byte changes.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from jobs.cluster.job_lock import Ownership
from jobs.cluster.ray_session import Machine
from jobs.cluster.run_units import Work, images_in, new_progress, run_pending, save_config
from jobs.commands import end_summary as ending
from jobs.config import CONFIG_KEY, Config
from jobs.job_setup import resolve_settings as settings
from jobs.job_setup.open_job import Opened, code_version, open_or_create
from jobs.job_setup.slices import WHOLE, Slice
from jobs.results.render_images import write_contact_sheet
from jobs.terminal import console
from jobs.terminal import input_report as understood
from jobs.terminal.progress import Counts
from jobs.terminal.signals import Interrupts
from pipeline.errors import UsageError
from pipeline.job.job_file import read_job
from pipeline.planning.make_plan import write_plan
from pipeline.storage.store import Store
from pipeline.tables.manifest import Manifest, finished_units, read_manifest
from pipeline.tables.publish_tables import publish
from pipeline.tables.unit_files import list_committed


@dataclass(frozen=True, kw_only=True)
class Run:
    """How one call of the command works; nothing here changes what comes out."""

    part: Slice = WHOLE
    check_inputs: bool = False
    progress: bool = True
    json: bool = False


def run(config: Config, how: Run, interrupts: Interrupts) -> int:
    """Label what is pending, publish when nothing is left, and return the exit code."""
    began = time.monotonic()
    _hint_at_saved_settings(config)
    with Machine(config, interrupts) as machine, contextlib.ExitStack() as stack:
        machine.check()
        opened = open_or_create(
            config,
            check_inputs=how.check_inputs,
            probe_dtype=machine.native_dtype,
            device=machine.device,
        )
        pending = pending_units(opened, how.part)
        _say_understood(config, opened, machine, how.part, mine=len(pending))
        whole = stack.enter_context(Ownership(opened.store, interrupts))
        mine = whole if how.part == WHOLE else Ownership(opened.store, interrupts, how.part)
        stack.enter_context(mine)
        counts = _work(opened, machine, mine, pending, how, interrupts)
        end = ending.Ending(opened=opened, counts=counts, seconds=time.monotonic() - began)
        if pending_units(opened, WHOLE):
            return ending.say_slice_done(end, how.part, json=how.json)
        manifest = _publish(config, opened, machine, whole)
        picture = write_contact_sheet(opened.store, opened.job, manifest, again=counts.units > 0)
        seconds = time.monotonic() - began
        end = ending.Ending(opened=opened, counts=counts, seconds=seconds, manifest=manifest, picture=picture)
        return ending.say_done(end, json=how.json)


def pending_units(opened: Opened, part: Slice) -> list[int]:
    """The units of this slice that are not committed, by what the store lists now."""
    done = finished_units(list(list_committed(opened.store)), read_manifest(opened.store))
    return [unit for unit in part.units(opened.job.units) if unit not in done]


def _hint_at_saved_settings(config: Config) -> None:
    """Refuse a call without inputs over an existing job, naming the settings that would go on with it."""
    if config.input.images or config.input.boxes:
        return
    store = Store(settings.output_place(config))
    if read_job(store) is not None:
        saved = f"{store.place.uri.rstrip('/')}/{CONFIG_KEY}"
        raise UsageError(
            "--images and --boxes are missing. To go on with the job that is there, repeat the command that "
            f"started it, or use its settings: {console.command(['hqlabel', 'label', '--config', saved])}"
        )


def _say_understood(config: Config, opened: Opened, machine: Machine, part: Slice, *, mine: int) -> None:
    job = opened.job
    left = mine if part == WHOLE else len(pending_units(opened, WHOLE))
    word = "going on with the job in" if opened.resumed else "new job in"
    console.say(f"hqlabel {code_version()}: {word} {opened.store.place.uri}")
    work = understood.describe_work(job, done_units=job.units - left, pending_units=mine, part=part.text)
    rows = [
        *understood.describe_inputs(opened.config, job.plan),
        *understood.describe_detector(job.context),
        *understood.describe_model(job.context, asked_dtype=config.model.dtype),
        *([("machine", machine.describe(mine))] if mine else []),
        work,
    ]
    console.say(console.pairs(rows))
    for line in understood.warnings(opened.config, job.plan):
        console.say(line)


def _work(
    opened: Opened,
    machine: Machine,
    ownership: Ownership,
    pending: list[int],
    how: Run,
    interrupts: Interrupts,
) -> Counts:
    """Run the pending units of this slice until none is left; what this process did."""
    if not pending:
        return Counts()
    owner = ownership.take()
    if opened.plan is not None:
        write_plan(opened.store, opened.plan)
    save_config(opened.store, opened.config)
    work = Work(
        config=opened.config,
        store=opened.store,
        job=opened.job,
        machine=machine,
        owner=owner,
        interrupts=interrupts,
        show_progress=how.progress,
    )
    mine = how.part.units(opened.job.units)
    total = images_in(opened.job, mine)
    done = total - images_in(opened.job, pending)
    machine.start()
    with new_progress(work, total_images=total, done_images=done) as progress:
        run_pending(work, lambda: pending_units(opened, how.part), progress)
    return progress.counts()


def _publish(config: Config, opened: Opened, machine: Machine, ownership: Ownership) -> Manifest:
    return publish(
        opened.store,
        opened.job,
        config.filter,
        require_owner=ownership.require,
        mapper=machine.map_parts,
    )
