"""`hqlabel retry`: the failed images again, once the cause is fixed.

A unit with failed images is written once more as its next generation: redone rows next to good rows
that keep every value. Then the parts concerned are published again.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from hqlabel.jobs.cluster.ray_session import Machine
from hqlabel.jobs.cluster.run_units import Work, images_in, run_pending
from hqlabel.jobs.commands.end_summary import Ending, report_done
from hqlabel.jobs.job_setup.check_models import read_checkpoint, read_detector
from hqlabel.jobs.job_setup.driver_slice import JobLock
from hqlabel.jobs.job_setup.printed_flags import access_flags, begun_with
from hqlabel.jobs.job_setup.saved_job import PICTURES, SavedJob, open_saved
from hqlabel.jobs.load_config import Config, ConfigSources
from hqlabel.jobs.results.read_tables import failed_units
from hqlabel.jobs.results.render_images import write_contact_sheet
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.progress import CallCounts
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.pipeline.errors import IMAGE_CODES, ImageError, JobRefused, UsageError, clean_text, count
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.job_state.job_file import Job, differences
from hqlabel.pipeline.settings import DEMO
from hqlabel.pipeline.storage.archive_uris import container_of
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.uri_rules import check_uri, is_inside, split_scheme, without_credentials
from hqlabel.pipeline.tables.manifest import Manifest, Part, read_manifest
from hqlabel.pipeline.tables.publish_tables import publish
from hqlabel.pipeline.tables.unit_files import CommittedUnit, list_committed, read_committed

_READERS = 16
USES = (
    *(*PICTURES, "input.images", "input.boxes", "input.image_root", "model.checkpoint", "detector.name"),
    *("filter", "cluster"),
)
"""The settings that the command takes from the call; what else decides rows is the job's."""


@dataclass(frozen=True, kw_only=True)
class RetryOptions:
    """How one call works. `codes`: which failures to do again; empty: all."""

    codes: tuple[str, ...] = ()
    progress: bool = True
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class _Target:
    """A unit to be written again. `images`: how many of its images are done again."""

    generation: int
    images: int


def run(given: ConfigSources, options: RetryOptions, interrupts: Interrupts) -> int:
    """Do the failed images again, publish, and return the exit code."""
    began = time.monotonic()
    _check_codes(options.codes)
    opened = open_saved(given, "retry", USES)
    saved = _with_settings(opened)
    with Machine(saved.config, interrupts) as machine, contextlib.ExitStack() as stack:
        lock = stack.enter_context(JobLock(saved.store, interrupts))
        lock.take()  # first, or another may do meanwhile what is found to be done
        targets = find_targets(saved.store, saved.job, options.codes)
        visit("retry.listed")
        refuse_lost_rights(saved.store, saved.job, targets, options.codes)
        if targets:
            machine.check()
        images = sum(target.images for target in targets.values())
        what = " or ".join(options.codes) or "any code"
        console.say(f"{saved.store.place.uri}: {count(images, 'image')} failed with {what}")
        counts = _redo(saved, targets, machine, lock, options, interrupts) if targets else CallCounts()
        # As the job has it: the limits of this call are of the rows done again, whose footers state them.
        manifest = publish(
            saved.store, opened.job, saved.config.filter, require_owner=lock.require, mapper=machine.map_parts
        )
        picture = write_contact_sheet(saved.store, saved.job, manifest, again=counts.units > 0)
        if targets:
            console.say(_describe_redone(saved.store, targets, manifest, options.codes, images))
        end = Ending(
            config=saved.config,
            store=saved.store,
            job=saved.job,
            counts=counts,
            seconds=time.monotonic() - began,
            manifest=manifest,
            picture=picture,
            redone=images,
        )
        return report_done(end, json=options.json)


def find_targets(store: Store, job: Job, codes: Sequence[str]) -> dict[int, _Target]:
    """Return the committed units that have images failed with one of `codes` (empty: with any).

    Raises:
        JobRefused: the job is not finished, or its working files were removed.
    """
    manifest = read_manifest(store)
    if manifest is not None and manifest.cleaned:
        raise JobRefused(
            f"{store.place.uri}: its working files were removed by clean, so it cannot be retried"
        )
    committed = list_committed(store, job.context.first_generation)
    if len(committed) < job.units:
        raise JobRefused(
            f"{store.place.uri}: {job.units - len(committed):,} of {count(job.units, 'unit')} are "
            "not done yet; finish the job with label, then retry"
        )
    published = _published(store, manifest, committed, codes)
    rest = [unit for unit_id, unit in committed.items() if unit_id not in published]
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda unit: (unit.unit_id, _failed_in(store, unit, codes)), rest)
        failed = {**published, **dict(found)}
    return {
        unit_id: _Target(generation=committed[unit_id].generation + 1, images=number)
        for unit_id, number in sorted(failed.items())
        if number
    }


def _published(
    store: Store, manifest: Manifest | None, committed: Mapping[int, CommittedUnit], codes: Sequence[str]
) -> dict[int, int]:
    """Failed images of every unit whose published rows are of its newest generation; reads no unit."""
    failed: dict[int, int] = {}
    for part in manifest.parts if manifest else ():
        ids = range(part.first_unit, part.stop_unit)
        if any(committed[unit_id].generation != part.generation_of(unit_id) for unit_id in ids):
            continue
        found = failed_units(store, part.images, codes) if _concerned(part, codes) else {}
        failed.update({unit_id: found.get(unit_id, 0) for unit_id in ids})
    return failed


def refuse_lost_rights(store: Store, job: Job, targets: Iterable[int], codes: Sequence[str]) -> None:
    """Raise JobRefused where the job could read an image to be redone and this call may not: name the flags.

    Its row would come out as uri_refused, whatever it failed with before.
    """
    began, now = begun_with(job), job.context.access
    roots = [root for root in began.roots if not any(is_inside(root, mine) for mine in now.roots)]
    schemes = [scheme for scheme in began.schemes if scheme not in now.schemes]
    if not roots and not schemes:
        return
    committed = list_committed(store, job.context.first_generation)
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda unit_id: _uris_failed_in(store, committed[unit_id], codes), targets)
        lost = [uri for uris in found for uri in uris if _may_read(uri, began) and not _may_read(uri, now)]
    if not lost:
        return
    flags = access_flags(
        [root for root in roots if any(_may_read(uri, AccessRules(roots=(root,))) for uri in lost)],
        [scheme for scheme in schemes if any(split_scheme(container_of(uri))[0] == scheme for uri in lost)],
    )
    raise JobRefused(
        f"{store.place.uri}: {count(len(lost), 'image')} to do again "
        f"{'lies' if len(lost) == 1 else 'lie'} outside what this call may read, such as "
        f"{clean_text(without_credentials(lost[0]))}, and the job could read them; nothing was changed. "
        f"Add {shlex.join(flags)}"
    )


def _uris_failed_in(store: Store, unit: CommittedUnit, codes: Sequence[str]) -> list[str]:
    rows = read_committed(store, unit).select(["image_uri", "error_code"]).to_pylist()
    return [
        row["image_uri"] for row in rows if row["error_code"] and (not codes or row["error_code"] in codes)
    ]


def _may_read(uri: str, access: AccessRules) -> bool:
    try:
        check_uri(uri, access)
    except ImageError as error:
        return error.code != "uri_refused"
    return True


def _concerned(part: Part, codes: Sequence[str]) -> bool:
    return any(code in part.counts.failed for code in codes) if codes else bool(part.counts.failed)


def _failed_in(store: Store, unit: CommittedUnit, codes: Sequence[str]) -> int:
    found = [code for code in read_committed(store, unit)["error_code"].to_pylist() if code is not None]
    return sum(code in codes for code in found) if codes else len(found)


def _check_codes(codes: Sequence[str]) -> None:
    for code in codes:
        if code not in IMAGE_CODES:
            raise UsageError(f"--code {code}: no such code; known: {', '.join(IMAGE_CODES)}")


def _with_settings(saved: SavedJob) -> SavedJob:
    """Return the job with this call's limits, weights and detector, which must be the ones it began with.

    Raises:
        UsageError: weights or a detector that the call must name.
        JobRefused: other weights, or another detector, than the job began with.
    """
    context = saved.job.context
    config = _with_demo(saved)
    weights = read_checkpoint(config)
    if weights.sha256 != context.weights.sha256:
        raise JobRefused(
            f"--checkpoint {config.model.checkpoint}: sha256 {weights.sha256}, the job began with "
            f"{context.weights.sha256}; a retry needs the same weights"
        )
    if context.detector is not None and config.detector.name is None:
        name = console.shown(context.detector.name, 100)
        raise UsageError(
            f"the job's detector, {name!r}, is never taken from an output: name it again with --detector "
            f"{name}"
        )
    detector = read_detector(config)
    found = detector and detector.settings.fingerprint
    began_with = context.detector and context.detector.fingerprint
    if found != began_with:
        raise JobRefused(
            f"--detector {config.detector.name}: fingerprint {found}, the job began with {began_with}; a "
            "retry needs the same detector"
        )
    changed = differences(context.limits.identity(), config.limits.identity())
    for one in changed:
        console.say(f"limits.{one.name}: {one.now} for the images done again, {one.stored} for all others")
    context = replace(
        context,
        weights=weights,
        detector=None if detector is None else detector.settings,
        limits=config.limits,
    )
    return replace(saved, config=config, job=replace(saved.job, context=context))


def _with_demo(saved: SavedJob) -> Config:
    """Return the configuration, with the demo checkpoint if the call names none and the job is of that.

    Raises:
        UsageError: none is named, and the job has other weights.
    """
    config, began_with = saved.config, saved.job.context.weights
    if config.model.checkpoint is not None:
        return config
    demo = config.model_copy(update={"model": config.model.model_copy(update={"checkpoint": DEMO})})
    if began_with.source == DEMO and read_checkpoint(demo).sha256 == began_with.sha256:
        return demo
    raise UsageError(
        f"--checkpoint is missing: the job has the weights of sha256 {console.shown(began_with.sha256, 64)}, "
        f"called {console.shown(began_with.source, 100)} there; what to read is never taken from an output, "
        "so name them again"
    )


def _redo(
    saved: SavedJob,
    targets: Mapping[int, _Target],
    machine: Machine,
    lock: JobLock,
    options: RetryOptions,
    interrupts: Interrupts,
) -> CallCounts:
    """Write the targets again; return what was done, whole units counted."""
    generations = {unit_id: target.generation for unit_id, target in targets.items()}

    def pending() -> list[int]:
        lock.require("the retry")  # before a clean's deletes are taken for work that is left
        committed = list_committed(saved.store, saved.job.context.first_generation)
        return [unit for unit, number in generations.items() if committed[unit].generation < number]

    work = Work(
        config=saved.config,
        store=saved.store,
        job=saved.job,
        machine=machine,
        owner=lock.take(),
        interrupts=interrupts,
        show_progress=options.progress,
    )
    total = images_in(saved.job, list(generations))
    kept = total - sum(target.images for target in targets.values())
    with work.owner.blamed("the retry"):
        return run_pending(
            work,
            pending,
            total_images=total,
            done_images=0,
            kept_images=kept,
            generations=generations,
            codes=options.codes,
        )


def _describe_redone(
    store: Store, targets: Mapping[int, _Target], manifest: Manifest, codes: Sequence[str], before: int
) -> str:
    """Return how many of the redone images failed again, with one of the same codes or another, as text."""
    units = set(targets)
    again = 0
    for part in manifest.parts:
        if units & set(range(part.first_unit, part.stop_unit)) and part.counts.failed:
            found = failed_units(store, part.images, codes)
            again += sum(number for unit, number in found.items() if unit in units)
    kind = "with the same code" if codes else ""
    return f"{count(before, 'image')} done again; {again:,} failed again {kind}".rstrip()
