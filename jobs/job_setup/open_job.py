"""From a configuration to an opened job: planned anew, or found in the output and proved to be the same.

A new job opens a few pictures, to warn of likely mistakes. A resume opens no image and lists no folder: the
weights and the box and table files are fingerprinted again, and with everything else compared to what
`job.json` holds. The stored plan is then the plan; `--check-inputs` makes it anew and compares that too.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from hqlabel.jobs.job_setup import resolve_settings as settings
from hqlabel.jobs.job_setup.check_models import CheckedDetector, read_checkpoint, read_detector
from hqlabel.jobs.job_setup.saved_job import saved_tree
from hqlabel.jobs.load_config import Config
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.console import code_version
from hqlabel.model.records import MODEL_PROTOCOL
from hqlabel.pipeline.errors import JobRefused, SystemicFault, UsageError
from hqlabel.pipeline.inputs.open_inputs import allowed_access
from hqlabel.pipeline.job_context import AccessRules, BoxRules, JobContext, JobDetector, Place, Weights
from hqlabel.pipeline.job_state.job_file import (
    Difference,
    Job,
    identity_of,
    open_job,
    read_job,
    units_per_part,
    unlike_stored,
)
from hqlabel.pipeline.job_state.plan_files import UNITS_PER_FILE
from hqlabel.pipeline.planning.make_plan import Plan, make_plan
from hqlabel.pipeline.planning.partitioned_plan import SOME_ROWS, AnyPlan, TasksFor, plan_of_any_size
from hqlabel.pipeline.planning.preview import with_preview_warnings
from hqlabel.pipeline.settings import InputSettings
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.read_objects import fingerprint
from hqlabel.pipeline.storage.uri_rules import options_for
from hqlabel.pipeline.tables.changed_inputs import Changes, compare, going_on

_ELSEWHERE = ("limit", "box_format", "box_frame", "draft_jpeg")
"""Settings of the section `input` that other parts of the identity hold, as what they were resolved to."""


@dataclass(frozen=True, kw_only=True)
class TakenOver:
    """The job of which the inputs changed, and how."""

    before: Job
    changes: Changes


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A job that may be worked on. `plan`: as just made, None when the stored one is used.

    `config`: with local places absolute. `resumed`: the output already held this job. `taken_over`: it held
    the job of an earlier plan, which this one is to take over before any work.
    """

    config: Config
    store: Store
    job: Job
    plan: AnyPlan | None
    resumed: bool
    taken_over: TakenOver | None = None


def open_or_create(
    config: Config,
    *,
    check_inputs: bool,
    dtype: Callable[[], str],
    device: Callable[[], str],
    accept_changed_inputs: bool = False,
    tasks: TasksFor | None = None,
) -> Opened:
    """Open the job that `config` describes in its output, or create it there.

    `dtype`: the number format that `model.dtype` means; `device`: the kind that the call shape is chosen
    for. Each is called at most once, for a new job. `accept_changed_inputs`: a job of which only the inputs
    changed may be taken over. `tasks`: as in `plan_inputs`.

    Raises:
        UsageError: a setting that is needed is missing.
        JobRefused: inputs or weights that cannot be used, or an output that belongs to something else.
    """
    with before_work():
        return _open_or_create(config, check_inputs, dtype, device, accept_changed_inputs, tasks)


@contextlib.contextmanager
def before_work() -> Iterator[None]:
    """Turn a fault of the surroundings into a refusal: nothing was begun, so there is nothing to resume."""
    try:
        yield
    except SystemicFault as fault:
        raise JobRefused(f"nothing was begun: {fault}") from fault


def _open_or_create(
    config: Config,
    check_inputs: bool,
    dtype: Callable[[], str],
    device: Callable[[], str],
    accept_changed_inputs: bool,
    tasks: TasksFor | None,
) -> Opened:
    output = settings.output_place(config)
    access = allowed_access(config.input, settings.check_inputs(config))
    weights, detector = read_checkpoint(config), read_detector(config)
    config = settings.resolved(config)
    store = Store(output)
    stored = read_job(store)
    config = _with_boxes_per_call(config, stored, device)
    _refuse_compiling_for_a_cpu(config, device)
    plan = None
    if stored is None:
        made = plan_inputs(config, tasks)
        plan = with_preview_warnings(made, config.limits, detected=detector is not None)
    elif check_inputs or not _plan_holds(store, stored, config.input):
        plan = plan_inputs(config, tasks)
    make_context = partial(
        new_context,
        config,
        output=output,
        weights=weights,
        dtype=_dtype(config, stored, dtype),
        detector=detector.settings if detector else None,
    )
    if plan is not None:
        job = _planned_job(plan, make_context, config, detector)
    else:
        assert stored is not None, "without a stored job a plan was made"
        job = _stored_job(stored, make_context, config, access)
    recorded = {} if stored is None else _kept_elsewhere(store, stored, config.input)
    if stored is not None and _only_inputs_differ(unlike_stored(store, job, recorded)):
        plan = plan or plan_inputs(config, tasks)
        job = _planned_job(plan, make_context, config, detector)
        unlike = unlike_stored(store, job, recorded)
        if _only_inputs_differ(unlike):
            if not isinstance(plan, Plan):
                raise JobRefused(_too_large(store, unlike))
            changes = compare(store, stored, plan.table)
            if not accept_changed_inputs:
                raise JobRefused(_refusal(store, changes, unlike))
            return Opened(
                config=config,
                store=store,
                job=going_on(store, stored, job),
                plan=plan,
                resumed=True,
                taken_over=TakenOver(before=stored, changes=changes),
            )
    job = open_job(store, job, recorded=recorded)
    return Opened(config=config, store=store, job=job, plan=plan, resumed=stored is not None)


def _only_inputs_differ(unlike: Sequence[Difference]) -> bool:
    """Return whether a job differs from the stored one, and in nothing that decides all rows at once."""
    rights = ("inputs.arguments.allow_roots", "inputs.arguments.allow_schemes")
    inputs = [
        one.name in ("plan_sha256", "limit") or one.name.startswith("inputs.")
        for one in unlike
        if not one.name.startswith(rights)
    ]
    return len(inputs) == len(unlike) > 0 and all(inputs)


def _too_large(store: Store, unlike: Sequence[Difference]) -> str:
    names = ", ".join(one.name[:100] for one in unlike[:5])
    return (
        f"{store.place.uri}: the inputs are not those that the job there began with, and a job of so many "
        "rows cannot go on with other inputs; nothing was changed. Choose another output folder. "
        f"Unlike: {names}"
    )


def _refusal(store: Store, changes: Changes, unlike: Sequence[Difference]) -> str:
    names = ", ".join(one.name[:100] for one in unlike[:5])
    return (
        f"{store.place.uri}: the inputs are not those that the job there began with: {changes}; nothing was "
        "changed. With --accept-changed-inputs the job goes on: unchanged images keep their rows, changed "
        "and new ones are done, those that are gone leave the tables. Or choose another output folder. "
        f"Unlike: {names}"
    )


def _kept_elsewhere(store: Store, stored: Job, now: InputSettings) -> dict[str, Any]:
    """Return the input settings that are not in the job.json of an earlier version, from its `config.yaml`.

    Only to be compared: a value from there refuses a resume, and gives no rights.
    """
    arguments = stored.identity.get("inputs", {}).get("arguments", {})
    if not arguments:
        return {}
    # Before there was this setting, boxes were boxes.
    found: dict[str, Any] = {} if "boxes_from" in arguments else {"boxes_from": "boxes"}
    missing = {"allow_roots", "allow_schemes"} - set(arguments)
    if not missing:
        return found
    inputs = saved_tree(store).get("input")
    for name in missing:
        value = inputs.get(name) if isinstance(inputs, dict) else None
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            found[name] = sorted(set(value))
        else:
            console.say(f"warning: with which input.{name} this job began is not known; taken as now")
            found[name] = now.identity()[name]
    return found


def plan_inputs(config: Config, tasks: TasksFor | None = None, *, some_rows: int = 0) -> AnyPlan:
    """Return the plan of the configured inputs; see `make_plan`.

    `tasks`: for large inputs, which are then planned in partitions; without it one process holds all.
    `some_rows`: how many rows of it are wanted as such.
    """
    access, images_per_unit = settings.check_inputs(config), config.output.images_per_unit
    if tasks is None:
        return make_plan(config.input, access, images_per_unit=images_per_unit)
    return plan_of_any_size(
        config.input,
        access,
        images_per_unit=images_per_unit,
        tasks=tasks,
        tell=console.say,
        some_rows=max(SOME_ROWS, some_rows),
    )


def _refuse_compiling_for_a_cpu(config: Config, device: Callable[[], str]) -> None:
    if config.model.compile and device() == "cpu":
        raise UsageError(
            "model.compile=true, and the model would run on a CPU, which cannot; drop it, or "
            "name a cluster with GPUs (--ray-address)"
        )


def _dtype(config: Config, stored: Job | None, dtype: Callable[[], str]) -> str:
    """Return the number format: of a new job by what the device can do; `auto` is what a job began with."""
    if stored is None:
        return dtype()
    return stored.context.model.dtype if config.model.dtype == "auto" else config.model.dtype


def _with_boxes_per_call(config: Config, stored: Job | None, device: Callable[[], str]) -> Config:
    """Resolve `model.boxes_per_call`: null is what the job began with, or by the kind of device."""
    if config.model.boxes_per_call is not None:
        return config
    if stored is not None:
        return settings.with_boxes_per_call(config, stored.context.model.boxes_per_call)
    return settings.with_boxes_per_call(config, settings.BOXES_PER_CALL[device()])


def _reading(inputs: InputSettings) -> dict[str, Any]:
    """Return how boxes are configured to be read; what null means for a kind of file only a plan knows."""
    return {"box_format": inputs.box_format, "box_frame": inputs.box_frame}


def _plan_holds(store: Store, stored: Job, inputs: InputSettings) -> bool:
    """Return whether the stored plan is of these settings, and was written whole by the first start."""
    files = store.list(f"plan/{stored.context.plan_sha256[:16]}/")
    return stored.plan.get("asked") == _reading(inputs) and len(files) == -(-stored.units // UNITS_PER_FILE)


def _planned_job(
    plan: AnyPlan, make_context: Callable[..., JobContext], config: Config, detector: CheckedDetector | None
) -> Job:
    """Return the job that a plan made just now describes."""
    summary = plan.summary
    rules = settings.box_rules(config, summary.box_format, summary.box_frame)
    context = make_context(plan_sha256=plan.sha256, box_rules=rules, access=plan.access)
    return Job(
        identity=_identity(context, config.input, summary.input_files),
        context=context,
        plan={**asdict(summary), "asked": _reading(config.input)},
        categories=detector.categories if detector else plan.categories,
        units_per_part=units_per_part(
            images=summary.images,
            boxes=None if detector else summary.boxes,
            images_per_unit=plan.images_per_unit,
        ),
    )


def _stored_job(
    stored: Job, make_context: Callable[..., JobContext], config: Config, access: AccessRules
) -> Job:
    """Return the stored job with the settings, box files and tables of now."""
    rules = settings.box_rules(
        config, stored.context.box_rules.box_format, stored.context.box_rules.box_frame
    )
    context = make_context(plan_sha256=stored.context.plan_sha256, box_rules=rules, access=access)
    uris = [file["uri"] for file in stored.identity["inputs"]["files"]]
    files = [fingerprint(uri, options_for(uri, access), roots=access.roots) for uri in uris]
    return replace(stored, identity=_identity(context, config.input, files), context=context)


def _identity(
    context: JobContext, inputs: InputSettings, files: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return `identity_of` a job of this code; `files`: fingerprints of box and table files."""
    arguments = {name: value for name, value in inputs.identity().items() if name not in _ELSEWHERE}
    return identity_of(
        context,
        inputs={"arguments": arguments, "files": [dict(file) for file in files]},
        limit=inputs.limit,
        protocol=MODEL_PROTOCOL,
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
    """Return what workers get of a new job with this configuration; `dtype` is resolved."""
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
    """Return a unique name for this run that sorts by time; for users, nothing is decided by it."""
    return f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
