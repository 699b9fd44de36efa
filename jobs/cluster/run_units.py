"""Pending units through the chain, in passes, until the store lists all as committed.

What Ray reports is not what decides: after every pass the store is listed again, and a pass that ends
well without having finished anything is a fault, not a reason to try for ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hqlabel.jobs.cluster.ray_session import Machine
from hqlabel.jobs.load_config import CONFIG_KEY, Config, to_yaml
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.console import code_version
from hqlabel.jobs.terminal.progress import CallCounts, Progress, choose_mode
from hqlabel.jobs.terminal.signals import Interrupted, Interrupts
from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.job_context import JobContext, UnitOutcome
from hqlabel.pipeline.job_state.driver_lock import Owner
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.storage.output_store import NotFound, Store
from hqlabel.pipeline.tables.lineage import devices_of
from hqlabel.pipeline.tables.unit_files import list_committed, read_committed

if TYPE_CHECKING:
    from hqlabel.pipeline.ray_execution.chain import Retry


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a pass needs with its units. `config`: resolved. `show_progress`: on stderr."""

    config: Config
    store: Store
    job: Job
    machine: Machine
    owner: Owner
    interrupts: Interrupts
    show_progress: bool


def run_pending(
    work: Work,
    pending: Callable[[], Sequence[int]],
    *,
    total_images: int,
    done_images: int,
    kept_images: int = 0,
    generations: Mapping[int, int] | None = None,
    codes: tuple[str, ...] = (),
) -> CallCounts:
    """Run units until `pending` (read from the store before every pass) names none; return what was done.

    `total_images`, `done_images`, `kept_images`: for the progress. `generations`, `codes`: of a
    retry; see `chain.Retry`.

    Raises:
        SystemicFault: what a unit met, or passes that finish nothing.
        JobRefused: another driver has taken the job over.
        Interrupted: a signal came.
    """
    work.machine.begin()
    # These import Ray, which must be configured before, and Ray Data, which takes as long as Ray's start.
    from hqlabel.pipeline.ray_execution import live_counts
    from hqlabel.pipeline.ray_execution.chain import Retry

    work.machine.start()
    retry = None if generations is None else Retry(generations=generations, codes=codes)
    earlier = _Devices(work.store, work.job)
    progress = _new_progress(
        work, total_images=total_images, done_images=done_images, kept_images=kept_images
    )
    run_id, epoch = work.job.context.run_id, work.owner.number
    with progress, progress.watching(lambda: live_counts.read(run_id, epoch)):
        units = list(pending())
        while units:
            _run_pass(work, units, progress, earlier, retry)
            before, units = units, list(pending())
            if len(units) >= len(before):
                raise SystemicFault(
                    "store",
                    f"{len(units)} units are not in the store although their work was reported done, such as "
                    f"unit {units[0]}",
                )
    live_counts.forget(run_id, epoch)
    return progress.counts()


class _Devices:
    """The kinds of device that made the units so far, by a few of them; says once when another one works.

    The kind is no part of a job's identity: clusters are mixed, and a job may go on elsewhere.
    """

    def __init__(self, store: Store, job: Job) -> None:
        committed = list_committed(store, job.context.first_generation, units=job.units)
        places = {0, len(committed) // 2, len(committed) - 1}
        some = [committed.nth(place) for place in places] if committed else []
        self._known = {kind for unit in some for kind in devices_of(read_committed(store, unit))}
        self._said = not self._known

    def see(self, outcome: UnitOutcome) -> None:
        if self._said or not outcome.device or outcome.device in self._known:
            return
        self._said = True
        console.say(
            f"warning: units are made on {outcome.device} now, earlier ones on "
            f"{', '.join(sorted(self._known))}: masks may differ in bytes, not in meaning"
        )


def _run_pass(
    work: Work, units: Sequence[int], progress: Progress, earlier: _Devices, retry: Retry | None
) -> None:
    from hqlabel.pipeline.ray_execution.chain import run_units

    def see(outcome: UnitOutcome) -> None:
        earlier.see(outcome)
        progress.add(outcome)

    run_units(
        units,
        working_context(work.job.context, work.machine.device()),
        work.config.cluster,
        epoch=work.owner.number,
        on_outcome=see,
        should_stop=lambda: work.interrupts.should_stop() or work.owner.lost.is_set(),
        retry=retry,
        shared=work.machine.joins,
    )
    if work.interrupts.should_stop():
        raise Interrupted
    work.owner.require("the rest of the work")


def _new_progress(work: Work, *, total_images: int, done_images: int, kept_images: int) -> Progress:
    """Return the progress of this work, in the form that suits where stderr goes."""
    mode = choose_mode(wanted=work.show_progress, is_terminal=sys.stderr.isatty())
    return Progress(
        total_images=total_images,
        done_images=done_images,
        kept_images=kept_images,
        mode=mode,
        beginning="the model is being compiled" if work.config.model.compile else None,
    )


def working_context(context: JobContext, device: str) -> JobContext:
    """Return the context for new units: their footers state which code and kind of device made them."""
    return replace(context, lineage={**context.lineage, "code_version": code_version(), "device": device})


def images_in(job: Job, units: Sequence[int]) -> int:
    """Return how many images these units have; the last unit of a plan may be short."""
    per_unit, images = job.context.images_per_unit, int(job.plan["images"])
    return sum(min(per_unit, images - unit * per_unit) for unit in units)


def save_config(store: Store, config: Config) -> None:
    """Write this configuration to `config.yaml` in the output, unless it is there already."""
    body = to_yaml(config).encode()
    try:
        if store.read(CONFIG_KEY) == body:
            return
    except NotFound:
        pass
    store.put(CONFIG_KEY, body)
