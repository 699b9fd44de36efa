"""`hqlabel status`: how far a job is, from its output alone; it contacts no cluster and no driver.

With `--watch` it reads again and again until every unit is committed: one page that is redrawn on a
terminal, one line each time elsewhere.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hqlabel.jobs.commands.end_summary import over_budget
from hqlabel.jobs.job_setup.saved_job import STORE, open_saved
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import count
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.job_status import JobStatus, Seen, status

WATCH_EVERY_S = 5.0


def run(given: ConfigSources, *, json: bool, watch: bool = False, every_s: float = WATCH_EVERY_S) -> int:
    """Print the status of the job in the output, and return 0; with `watch`, when all of it is committed."""
    saved = open_saved(given, "status", STORE)
    store, job = saved.store, saved.job
    seen: Seen = {}
    found = status(store, job, seen=seen)
    if watch:
        with _screen() as show:
            while not found.complete:
                show(store, job, found)
                time.sleep(every_s)
                found = status(store, job, seen=seen)
    if json:
        console.data_json(_as_json(store, job, found))
    else:
        console.data(_page(store, job, found))
    return 0


def _page(store: Store, job: Job, found: JobStatus) -> str:
    return f"{store.place.uri}: {_state(found)}\n{console.pairs(_rows(job, found))}"


@contextlib.contextmanager
def _screen() -> Iterator[Callable[[Store, Job, JobStatus], None]]:
    """Yield what shows a status while it changes, on stderr: stdout is for the last one alone."""
    if not sys.stderr.isatty():
        yield lambda _, job, found: console.say(f"{time.strftime('%H:%M:%S')}  {_line(job, found)}")
        return
    with Live(
        console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=False
    ) as live:
        yield lambda store, job, found: live.update(
            Text(console.visible(_page(store, job, found))), refresh=True
        )


def _line(job: Job, found: JobStatus) -> str:
    """Return the status in one line of plain text."""
    done = _images_done(job, found)
    parts = [f"{done:,} of {count(found.images, 'image')} ({console.share(done, found.images)})"]
    if found.images_per_s is not None:
        parts.append(f"{console.rate(found.images_per_s)} images/s")
    if found.eta_s is not None:
        parts.append(f"about {console.duration(found.eta_s)} left")
    if failed := found.counts.status.get("failed"):
        parts.append(f"{failed:,} failed")
    if found.holder is not None and found.holder[1].is_surely_dead():
        parts.append("the driver is gone")
    return " · ".join(parts)


def _images_done(job: Job, found: JobStatus) -> int:
    """Return images in committed units; exact while the short last unit is known to be in or out."""
    if found.complete:
        return found.images
    return min(found.images, found.units_done * job.context.images_per_unit)


def _state(found: JobStatus) -> str:
    if not found.complete:
        return "not finished"
    return "complete" if found.units_published == found.units else "complete, not yet published"


def _rows(job: Job, found: JobStatus) -> list[tuple[str, str]]:
    done, counts = _images_done(job, found), found.counts
    rows = [
        ("images", f"{done:,} of {found.images:,} done ({console.share(done, found.images)})"),
        ("units", f"{found.units_done:,} of {found.units:,} committed, {found.units_published:,} published"),
    ]
    by_status = ", ".join(f"{name} {number:,}" for name, number in counts.status.items())
    if by_status:
        partly = (
            "" if found.units_counted >= found.units_done else f" (of {found.units_counted:,} units read)"
        )
        rows.append(("status", by_status + partly))
        rows.append(("boxes", f"{counts.boxes:,} given, {console.with_a_mask(counts.masks, counts.empty)}"))
    if counts.devices:
        kinds = ", ".join(f"{kind} {number:,}" for kind, number in counts.devices.items())
        rows.append(("devices", f"{kinds} (units by the kind that made them)"))
    for code, number in sorted(counts.failed.items(), key=lambda item: -item[1]):
        rows.append(("failed", f"{code} {number:,}"))
    if over := _over_budget(job, found):
        rows.append(("budget", over))
    if found.images_per_s is not None:
        rows.append(("rate", f"{console.rate(found.images_per_s)} images/s over the last commits"))
    if found.eta_s is not None:
        rows.append(("left", f"about {console.duration(found.eta_s)} at that rate, while a driver runs"))
    if found.last_commit_at is not None:
        rows.append(("last commit", found.last_commit_at.isoformat(timespec="seconds")))
    if found.holder is not None:
        number, holder = found.holder
        dead = holder.is_surely_dead()
        gone = ", which is gone; the same label command goes on from here" if dead else ""
        if not (dead and found.complete):
            rows.append(("driver", f"{holder} (number {number}){gone}"))
    return rows


def _over_budget(job: Job, found: JobStatus) -> str | None:
    """Return the sentence on a finished job with too many failed images; None before its end."""
    if not found.complete or found.units_counted < found.units_done:
        return None
    failed = found.counts.status.get("failed", 0)
    return over_budget(job.context.limits, images=found.images, failed=failed)


def _as_json(store: Store, job: Job, found: JobStatus) -> dict[str, Any]:
    holder = found.holder
    return {
        "output": store.place.uri,
        "state": "complete" if found.complete else "unfinished",
        "run_id": job.context.run_id,
        "images": {
            "planned": found.images,
            "done": _images_done(job, found),
            "by_status": found.counts.status,
            "failed_by_code": found.counts.failed,
        },
        "over_budget": _over_budget(job, found) is not None,
        "boxes": {"given": found.counts.boxes, "masks": found.counts.masks, "empty": found.counts.empty},
        "units": {
            "planned": found.units,
            "done": found.units_done,
            "counted": found.units_counted,
            "published": found.units_published,
            "by_device": found.counts.devices,
        },
        "images_per_s": found.images_per_s,
        "eta_s": found.eta_s,
        "last_commit_at": found.last_commit_at.isoformat() if found.last_commit_at else None,
        "driver": None
        if holder is None
        else {"number": holder[0], "host": holder[1].host, "pid": holder[1].pid},
    }
