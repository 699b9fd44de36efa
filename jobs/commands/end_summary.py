"""The outcome of a job: the summary for users on stderr, the object for programs, and the exit code."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hqlabel.jobs.job_setup.driver_slice import Slice
from hqlabel.jobs.job_setup.printed_flags import picture_flags, retry_command, storage_flags
from hqlabel.jobs.load_config import Config
from hqlabel.jobs.results.read_tables import Row, failed_examples
from hqlabel.jobs.terminal import console, input_report
from hqlabel.jobs.terminal.progress import CallCounts
from hqlabel.pipeline.errors import SystemicFault, count
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import Manifest

EXIT_OVER_BUDGET = 3
_MOST_CODES = 5
_BUG = ": a bug in hqlabel or a library; the workers' log (image_raised) has the trace"


RATES_FROM_S = 120
"""A rate of a shorter run would be that of starting Ray."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A job at the end of a command. `counts`: what this process did; `manifest`: None for a slice.

    `redone`: images that a retry did again, of the units in `counts`, whose other rows it copied.
    """

    config: Config
    store: Store
    job: Job
    counts: CallCounts
    seconds: float
    manifest: Manifest | None = None
    picture: str | None = None
    redone: int | None = None

    @property
    def images(self) -> int:
        """The images that this process has done."""
        return self.counts.anew if self.redone is None else self.redone


def over_budget(limits: Limits, *, images: int, failed: int) -> str | None:
    """Return the sentence on a job of which more images failed than `limits` allows; None where not.

    A share that is exactly the limit is not over it.
    """
    # Divided, not multiplied: 29 / 100 is the very number that 0.29 is, while 0.29 * 100 is below 29.
    if not failed or images < limits.failure_rate_from_images or failed / images <= limits.max_failure_rate:
        return None
    next_tenth = math.ceil(10 * (failed / images)) / 10
    return (
        f"over the failure budget: {failed:,} of {count(images, 'image')} failed "
        f"({console.share(failed, images)}), limits.max_failure_rate is {limits.max_failure_rate:g}; fix "
        f"the cause and retry, or allow more: --set limits.max_failure_rate={next_tenth:g} "
        f"(exit code {EXIT_OVER_BUDGET})"
    )


def report_done(end: Ending, *, json: bool) -> int:
    """Print the summary of a whole job; its exit code.

    Raises:
        SystemicFault: the tables do not hold what the plan does, although every unit is committed.
    """
    manifest = _whole_manifest(end)
    counts, limits = manifest.counts, end.job.context.limits
    failed = counts.status.get("failed", 0)
    over = over_budget(limits, images=counts.images, failed=failed)
    code = 0 if over is None else EXIT_OVER_BUDGET
    examples = failed_examples(end.store, manifest) if failed else {}
    console.say("\n".join(_lines(end, manifest, examples, over)))
    if json:
        console.data_json(_as_json(end, manifest, examples, code))
    return code


def report_slice_done(end: Ending, part: Slice, *, json: bool) -> int:
    """Print that this slice is done while others are not; exit code 0."""
    output = end.store.place.uri
    console.say(
        f"slice {part.text} is done: {describe_run(end)}; other slices are not, so nothing was published"
    )
    command = ["hqlabel", "status", "--output", output, *storage_flags(end.config)]
    console.say(f"  next       {shlex.join(command)}")
    if json:
        console.data_json({"output": output, "state": "slice_done", "slice": part.text, **_run_json(end)})
    return 0


def describe_counts(manifest: Manifest) -> list[tuple[str, str]]:
    """Return names and values of what is published: images by status, boxes, tables."""
    counts = manifest.counts
    images = [f"{counts.status.get('labelled', 0):,} labelled"]
    if counts.status.get("no_boxes"):
        images.append(f"{counts.status['no_boxes']:,} without boxes")
    if counts.status.get("failed"):
        failed = counts.status["failed"]
        images.append(f"{failed:,} failed ({console.share(failed, counts.images)})")
    masks = console.with_a_mask(counts.masks, counts.empty)
    boxes = f"{counts.boxes:,} in all · {masks} · {counts.accepted:,} accepted"
    rows = [("images", " · ".join(images)), ("boxes", boxes)]
    rejected = dict(counts.rejected)
    if crowds := rejected.pop("crowd", 0):
        rows.append(("", input_report.crowd_sentence(crowds)))
    if len(counts.devices) > 1:
        kinds = ", ".join(f"{kind} {number:,}" for kind, number in counts.devices.items())
        rows.append(("devices", f"{kinds}: units by the kind that made them"))
    if rejected:
        worst = sorted(rejected.items(), key=lambda item: -item[1])
        rows.append(("", "not accepted: " + ", ".join(f"{name} {number:,}" for name, number in worst)))
    return rows


def describe_failures(failed: Mapping[str, int], examples: Mapping[str, list[Row]]) -> list[tuple[str, str]]:
    """Return the commonest codes with an image each, and its message; bugs first, however few."""
    rows = []
    ordered = sorted(failed.items(), key=lambda item: (item[0] != "internal", -item[1]))
    for code, number in ordered[:_MOST_CODES]:
        rows.append(("failed", f"{code} {number:,}{_BUG if code == 'internal' else ''}"))
        for row in examples.get(code, [])[:1]:
            rows.append(
                ("", f"such as {console.shown(row['image_id'])}: {console.shown(row['error_message'], 140)}")
            )
    if len(failed) > _MOST_CODES:
        rows.append(("", f"and {len(failed) - _MOST_CODES} more codes: see error_code in images/"))
    return rows


def next_commands(output: str, config: Config, job: Job, *, failed: int) -> list[str]:
    """Return what to type next, the most useful first, with all that a command takes from its call alone."""
    place = ["--output", output, *storage_flags(config)]
    limited = config.input.limit is not None
    commands = []
    if failed:
        commands.append(retry_command(output, config, job) + "   # once the cause is fixed")
    if limited:
        commands.append("the same command without --limit and with another --output, for all images")
    commands.append(shlex.join(["hqlabel", "report", *place, *picture_flags(job)]))
    commands.append(shlex.join(["hqlabel", "validate", *place]))
    return commands


def _whole_manifest(end: Ending) -> Manifest:
    manifest, planned = end.manifest, int(end.job.plan["images"])
    if manifest is None or manifest.state != "complete" or manifest.counts.images != planned:
        found = "nothing" if manifest is None else f"{manifest.counts.images} images, {manifest.state}"
        raise SystemicFault("store", f"the tables hold {found}; the plan has {planned} images")
    return manifest


def _lines(end: Ending, manifest: Manifest, examples: Mapping[str, list[Row]], over: str | None) -> list[str]:
    output, counts = end.store.place.uri.rstrip("/"), manifest.counts
    failed = counts.status.get("failed", 0)
    head = describe_run(end) if end.counts.units else "nothing was left to do, and nothing was changed"
    size = sum(part.images.bytes + part.instances.bytes for part in manifest.parts)
    rows = [*describe_counts(manifest), *describe_failures(counts.failed, examples)]
    rows.append(("tables", f"{output}/instances/*.parquet, {output}/images/*.parquet ({console.size(size)})"))
    if end.picture:
        rows.append(("picture", f"{output}/{end.picture}"))
    if end.job.context.weights.note:
        rows.append(("note", end.job.context.weights.note))
    for place, text in enumerate(next_commands(output, end.config, end.job, failed=failed)):
        rows.append(("next" if place == 0 else "", text))
    lines = [f"done: {count(counts.images, 'image')} in {output}; {head}", console.pairs(rows)]
    return lines if over is None else [*lines, over]


def describe_run(end: Ending) -> str:
    """Return what this process did and how long it took; with rates if that was long."""
    counts = end.counts
    kept = f", {count(counts.kept, 'row')} kept" if counts.kept and end.redone is None else ""
    done = f"{count(end.images, 'image')} in this run{kept}, {console.duration(end.seconds)}"
    rates = ""
    if end.seconds >= RATES_FROM_S:
        rates = f" ({console.rate(end.images / end.seconds)} images/s"
        if end.redone is None and not counts.kept:  # boxes are counted by unit, those of kept rows with them
            rates += f", {console.rate(counts.instances / end.seconds)} boxes/s"
        rates += ")"
    repeated = f", {counts.repeated:,} of them done before by another" if counts.repeated else ""
    again = f", {counts.begun_before:,} of them begun before and done again" if counts.begun_before else ""
    return f"{done}{rates}{repeated}{again}"


def _as_json(end: Ending, manifest: Manifest, examples: Mapping[str, list[Row]], code: int) -> dict[str, Any]:
    output, job = end.store.place.uri, end.job
    counts = manifest.counts
    failed = counts.status.get("failed", 0)
    return {
        "output": output,
        "state": manifest.state,
        "exit_code": code,
        "run_id": job.context.run_id,
        "understood": input_report.as_json(end.config, job.plan),
        "model": {**asdict(job.context.weights), "dtype": job.context.model.dtype},
        "counts": asdict(counts),
        "failed_examples": examples,
        "bytes": sum(part.images.bytes + part.instances.bytes for part in manifest.parts),
        "picture": end.picture,
        "next": next_commands(output, end.config, end.job, failed=failed),
        **_run_json(end),
    }


def _run_json(end: Ending) -> dict[str, Any]:
    rate = end.images / end.seconds if end.seconds else None
    counts = {**asdict(end.counts), "images": end.images}
    return {"this_run": {**counts, "seconds": end.seconds, "images_per_s": rate}}
