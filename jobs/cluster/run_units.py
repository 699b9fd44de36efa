"""Pending units through the graph, in passes, until the store says that none is left.

What Ray reports is not what decides: after every pass the store is listed again, and a pass that ends
well without having finished anything is a fault, not a reason to try for ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jobs.cluster.ray_session import Machine
from jobs.config import CONFIG_KEY, Config, to_yaml
from jobs.job_setup.open_job import code_version
from jobs.terminal.progress import Progress, choose_mode
from jobs.terminal.signals import Interrupted, Interrupts
from pipeline.errors import SystemicFault
from pipeline.job.driver_lock import Owner
from pipeline.job.job_file import Job
from pipeline.settings import JobContext
from pipeline.storage.store import NotFound, Store


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a pass needs besides its units. `config`: resolved. `show_progress`: on stderr."""

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
    progress: Progress,
    *,
    generations: Mapping[int, int] | None = None,
    codes: tuple[str, ...] = (),
) -> None:
    """None, when `pending` (asked of the store before every pass) names no unit any more.

    `generations`, `codes`: of a retry; see `graph.Retry`.

    Raises:
        SystemicFault: what a unit met, or passes that finish nothing.
        JobRefused: another driver has taken the job over.
        Interrupted: a signal came.
    """
    work.machine.start()
    from pipeline.execution.chain import (
        Retry,
        run_units,
    )  # brings Ray along, which is configured before its import

    retry = None if generations is None else Retry(generations=generations, codes=codes)
    left = list(pending())
    while left:
        run_units(
            left,
            working_context(work.job.context, work.machine.device()),
            work.config.cluster,
            epoch=work.owner.number,
            on_outcome=progress.add,
            should_stop=lambda: work.interrupts.should_stop() or work.owner.lost.is_set(),
            retry=retry,
        )
        if work.interrupts.should_stop():
            raise Interrupted
        work.owner.require("the rest of the work")
        before, left = left, list(pending())
        if len(left) >= len(before):
            raise SystemicFault(
                "store",
                f"{len(left)} units are not in the store although their work was reported done, such as unit "
                f"{left[0]}",
            )


def new_progress(work: Work, *, total_images: int, done_images: int) -> Progress:
    """The progress of this work, in the form that suits where stderr goes."""
    mode = choose_mode(wanted=work.show_progress, is_terminal=sys.stderr.isatty())
    return Progress(
        total_images=total_images,
        done_images=done_images,
        mode=mode,
        beginning="the model is being compiled" if work.config.model.compile else None,
    )


def working_context(context: JobContext, device: str) -> JobContext:
    """The context for new units: their footers say which code and kind of device made them."""
    return replace(context, lineage={**context.lineage, "code_version": code_version(), "device": device})


def images_in(job: Job, units: Sequence[int]) -> int:
    """How many images these units have; the last unit of a plan may be short."""
    per_unit, images = job.context.images_per_unit, int(job.plan["images"])
    return sum(min(per_unit, images - unit * per_unit) for unit in units)


def save_config(store: Store, config: Config) -> None:
    """None; `config.yaml` in the output is this configuration. Written only when it differs."""
    body = to_yaml(config).encode()
    try:
        if store.read(CONFIG_KEY) == body:
            return
    except NotFound:
        pass
    store.put(CONFIG_KEY, body)
