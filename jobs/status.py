"""`hqlabel status`: how far a job is, from its output alone; no cluster and no driver is asked."""

from __future__ import annotations

from typing import Any

from jobs import console, settings
from jobs.config import Config
from pipeline.ledger import Job, require_job
from pipeline.status import JobStatus, status
from pipeline.storage import Store, open_store


def run(config: Config, *, json: bool) -> int:
    """Print the status of the job in the output, and return 0."""
    store = open_store(settings.output_place(config))
    job = require_job(store)
    found = status(store, job)
    if json:
        console.data_json(_as_json(store, job, found))
    else:
        console.data(f"{store.place.uri}: {_state(found)}")
        console.data(console.pairs(_rows(job, found)))
    return 0


def _images_done(job: Job, found: JobStatus) -> int:
    """Images in committed units; exact while the short last unit is known to be in or out."""
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
        rows.append(("boxes", f"{counts.boxes:,} given, {counts.masks:,} with a mask"))
    for code, number in sorted(counts.failed.items(), key=lambda item: -item[1]):
        rows.append(("failed", f"{code} {number:,}"))
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
        "boxes": {"given": found.counts.boxes, "masks": found.counts.masks},
        "units": {
            "planned": found.units,
            "done": found.units_done,
            "counted": found.units_counted,
            "published": found.units_published,
        },
        "images_per_s": found.images_per_s,
        "eta_s": found.eta_s,
        "last_commit_at": found.last_commit_at.isoformat() if found.last_commit_at else None,
        "driver": None
        if holder is None
        else {"number": holder[0], "host": holder[1].host, "pid": holder[1].pid},
    }
