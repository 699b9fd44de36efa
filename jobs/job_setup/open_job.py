"""From a configuration to an opened job: planned anew, or found in the output and proved to be the same.

A new job looks at a few pictures, to warn of likely mistakes. A resume opens no image and lists no folder:
the weights and the box and table files are fingerprinted again, and with everything else compared to what
`job.json` holds. The stored plan is then the plan;
`--check-inputs` makes it anew and compares that too.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.config import Config
from jobs.job_setup import resolve_settings as settings
from jobs.job_setup.checkpoint import read_checkpoint
from jobs.job_setup.job_detector import FoundDetector, read_detector
from jobs.terminal.input_report import with_a_look
from model.records import MODEL_PROTOCOL
from pipeline.errors import JobRefused, SystemicFault, UsageError
from pipeline.inputs.open_inputs import allowed_access
from pipeline.job.job_file import Job, identity_of, open_job, read_job, units_per_part
from pipeline.job.plan_files import UNITS_PER_FILE
from pipeline.planning.make_plan import Plan, make_plan
from pipeline.settings import AccessRules, BoxRules, InputSettings, JobContext, JobDetector, Place, Weights
from pipeline.storage.read_objects import fingerprint
from pipeline.storage.store import Store
from pipeline.storage.uri_rules import options_for


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A job that may be worked on. `plan`: as just made, None when the stored one is used.

    `config`: with local places absolute. `resumed`: the output already held this job.
    """

    config: Config
    store: Store
    job: Job
    plan: Plan | None
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What a job is asked to be; of a stored plan only its sha256 is known."""

    config: Config
    weights: Weights
    dtype: str
    detector: FoundDetector | None
    box_rules: BoxRules
    plan_sha256: str
    files: tuple[Mapping[str, Any], ...]
    access: AccessRules


def open_or_create(
    config: Config, *, check_inputs: bool, probe_dtype: Callable[[], str], device: Callable[[], str]
) -> Opened:
    """The job that `config` describes, opened in its output or created there.

    `probe_dtype`: the number format for `model.dtype=auto`; `device`: the kind that the call shape is chosen
    for. Each is asked at most once, for a new job.

    Raises:
        UsageError: something needed is not named.
        JobRefused: inputs or weights that cannot be used, or an output that belongs to something else.
    """
    with before_work():
        return _open_or_create(config, check_inputs, probe_dtype, device)


@contextlib.contextmanager
def before_work() -> Iterator[None]:
    """Makes a fault of the surroundings a refusal: nothing was begun, so there is nothing to go on with."""
    try:
        yield
    except SystemicFault as fault:
        raise JobRefused(f"nothing was begun: {fault}") from fault


def _open_or_create(
    config: Config, check_inputs: bool, probe_dtype: Callable[[], str], device: Callable[[], str]
) -> Opened:
    place = settings.output_place(config)
    access = allowed_access(config.input, settings.check_inputs(config))
    weights = read_checkpoint(config)
    detector = read_detector(config)
    config = settings.resolved(config)
    store = Store(place)
    stored = read_job(store)
    config = _with_boxes_per_call(config, stored, device)
    _refuse_compiling_for_a_cpu(config, device)
    plan = None
    if stored is None:
        plan = with_a_look(plan_inputs(config), config.limits, detected=detector is not None)
    elif check_inputs or not _plan_holds(store, stored, config.input):
        plan = plan_inputs(config)
    wanted = _Wanted(
        config=config,
        weights=weights,
        dtype=_dtype(config, stored, probe_dtype),
        detector=detector,
        box_rules=_box_rules(config, plan, stored),
        plan_sha256=plan.sha256 if plan else _stored(stored).context.plan_sha256,
        files=plan.summary.input_files if plan else _fingerprints(_stored(stored), access),
        access=plan.access if plan else access,
    )
    asked = _job(wanted, store, plan, stored)
    return Opened(
        config=config, store=store, job=open_job(store, asked), plan=plan, resumed=stored is not None
    )


def plan_inputs(config: Config) -> Plan:
    """Return the plan of the configured inputs; see `make_plan`."""
    access = settings.check_inputs(config)
    return make_plan(config.input, access, images_per_unit=config.output.images_per_unit)


def _refuse_compiling_for_a_cpu(config: Config, device: Callable[[], str]) -> None:
    if config.model.compile and device() == "cpu":
        raise UsageError(
            "model.compile=true, and the model would run on a CPU, which does not take it; leave it out, or "
            "name a cluster with GPUs (--ray-address)"
        )


def code_version() -> str:
    """The version of this code, as files carry it."""
    try:
        return importlib.metadata.version("hqlabel")
    except importlib.metadata.PackageNotFoundError:
        return "checkout"


def _dtype(config: Config, stored: Job | None, probe: Callable[[], str]) -> str:
    """The number format: as asked; for `auto` what the job began with, or by a probe."""
    if config.model.dtype != "auto":
        return config.model.dtype
    return stored.context.model.dtype if stored else probe()


def _with_boxes_per_call(config: Config, stored: Job | None, device: Callable[[], str]) -> Config:
    """As asked; where nothing is asked, what the job began with, or by the kind of device."""
    if config.model.boxes_per_call is not None:
        return config
    if stored is not None:
        return settings.with_boxes_per_call(config, stored.context.model.boxes_per_call)
    return settings.with_boxes_per_call(config, settings.BOXES_PER_CALL[device()])


def _asked(inputs: InputSettings) -> dict[str, Any]:
    """How the boxes were asked to be read; what that means for a kind of file only a plan tells."""
    return {"box_format": inputs.box_format, "box_frame": inputs.box_frame}


def _plan_holds(store: Store, stored: Job, inputs: InputSettings) -> bool:
    """Whether the stored plan answers what is asked, and was written whole before the first start ended."""
    files = store.list(f"plan/{stored.context.plan_sha256[:16]}/")
    return stored.plan.get("asked") == _asked(inputs) and len(files) == -(-stored.units // UNITS_PER_FILE)


def _box_rules(config: Config, plan: Plan | None, stored: Job | None) -> BoxRules:
    understood = plan.summary if plan else _stored(stored).context.box_rules
    return settings.box_rules(config, understood.box_format, understood.box_frame)


def _fingerprints(stored: Job, access: AccessRules) -> tuple[Mapping[str, Any], ...]:
    """The box and table files of the stored job as they are now."""
    uris = [file["uri"] for file in stored.identity["inputs"]["files"]]
    return tuple(fingerprint(uri, options_for(uri, access), roots=access.roots) for uri in uris)


def _stored(job: Job | None) -> Job:
    assert job is not None, "without a stored job a plan was made"
    return job


def _job(wanted: _Wanted, store: Store, plan: Plan | None, stored: Job | None) -> Job:
    config, given = wanted.config, wanted.config.input
    context = new_context(
        config,
        output=store.place,
        plan_sha256=wanted.plan_sha256,
        weights=wanted.weights,
        dtype=wanted.dtype,
        detector=None if wanted.detector is None else wanted.detector.settings,
        box_rules=wanted.box_rules,
        access=wanted.access,
    )
    arguments = {
        "images": given.images,
        "boxes": given.boxes,
        "image_root": given.image_root,
        "columns": given.columns,
        "allow_unmatched": given.allow_unmatched,
        "tar_ids": given.tar_ids,
    }
    identity = identity_of(
        context,
        inputs={"arguments": arguments, "files": [dict(file) for file in wanted.files]},
        limit=given.limit,
        protocol=MODEL_PROTOCOL,
    )
    if plan is None:
        return replace(_stored(stored), identity=identity, context=context)
    summary = plan.summary
    return Job(
        identity=identity,
        context=context,
        plan={**asdict(summary), "asked": _asked(given)},
        categories=wanted.detector.categories if wanted.detector else plan.categories,
        units_per_part=units_per_part(
            images=summary.images,
            boxes=None if wanted.detector else summary.boxes,
            images_per_unit=plan.images_per_unit,
        ),
    )


def new_context(
    config: Config,
    *,
    output: Place,
    plan_sha256: str,
    weights: Weights,
    dtype: str,
    detector: JobDetector | None,
    box_rules: BoxRules,
    access: AccessRules,
) -> JobContext:
    """What workers get of a new job with this configuration; `dtype` is resolved."""
    return JobContext(
        output=output,
        plan_sha256=plan_sha256,
        images_per_unit=config.output.images_per_unit,
        run_id=_new_run_id(),
        weights=weights,
        model=config.model.model_copy(update={"dtype": dtype}),
        draft_jpeg=config.input.draft_jpeg,
        detector=detector,
        box_rules=box_rules,
        access=access,
        limits=config.limits,
        lineage={"code_version": code_version()},
    )


def _new_run_id() -> str:
    """A name for this run that sorts by time and is unique; people read it, nothing is decided by it."""
    return f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
