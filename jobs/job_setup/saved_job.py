"""The job in an output, for the commands after `label`: its settings are data, this call's are orders.

What says where to connect, what to read, with which rights and on what to run (`settings.Given`) comes from
this call, a file that it names and the environment, never from the output. What decides rows comes from
job.json, and a call that names another value is refused. What marks rows, and the failure budget, comes from
`config.yaml` there, with this call's values on top.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from hqlabel.jobs.job_setup import resolve_settings as settings
from hqlabel.jobs.job_setup.answering_stores import require_answers
from hqlabel.jobs.load_config import (
    CONFIG_KEY,
    MOST_CHARS,
    Config,
    ConfigSources,
    parse_set,
    parse_yaml,
    tree_to_yaml,
)
from hqlabel.pipeline.errors import JobRefused, UsageError, clean_text
from hqlabel.pipeline.inputs.open_inputs import allowed_access
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.job_state.job_file import ABSENT, Job, differences, require_job
from hqlabel.pipeline.settings import GIVEN, IDENTITY, Section
from hqlabel.pipeline.storage.output_store import NotFound, Store

STORE = ("output.uri", "storage")
"""What every command uses that reads an output."""
PICTURES = (*STORE, "input.allow_roots", "input.allow_schemes", "limits")
"""What a command uses that shows pictures."""


@dataclass(frozen=True, kw_only=True)
class SavedJob:
    """A job that was begun earlier. `config`: this call's; where it says nothing, as the job has it.

    `pictures`: what its pictures are read with: rights and limits of this call alone.
    """

    config: Config
    store: Store
    job: Job
    pictures: JobContext


def open_saved(sources: ConfigSources, command: str, uses: Collection[str]) -> SavedJob:
    """Return the job in the output that `sources` name, for a command that uses these settings or sections.

    Raises:
        UsageError: no output is configured, or `--set` names what the command does not use.
        JobRefused: there is no job; or the call names another value than the job's for what decides rows.
    """
    given = sources.load()
    store = Store(settings.output_place(given))
    require_answers(given)
    checked = settings.check_access(given)
    has_inputs = given.input.images or given.input.boxes or given.input.image_root
    access = allowed_access(given.input, checked) if has_inputs else checked
    job = require_job(store, access=access)
    refuse_changes(given, job, command, uses)
    refuse_unused(sources, command, (*uses, *_of_job(job)))
    config = _with_job(given, job, _saved(store, uses))
    # The output is where it is now.
    config = config.model_copy(update={"output": config.output.model_copy(update={"uri": store.place.uri})})
    pictures = replace(job.context, limits=given.limits)
    return SavedJob(config=config, store=store, job=job, pictures=pictures)


def refuse_unused(sources: ConfigSources, command: str, uses: Collection[str]) -> None:
    """Raise UsageError for a `--set` of what the command does not use; a file may hold those of all."""
    for name, _ in map(parse_set, sources.sets):
        if not _is_used(name, uses):
            raise UsageError(
                f"--set {name}: {command} does not use it; it uses {', '.join(sorted(set(uses) & _KNOWN))}"
            )


def refuse_changes(given: Config, job: Job, command: str, uses: Collection[str] = ()) -> None:
    """Raise JobRefused where the call names another value than the job's for what decides rows.

    `uses`: settings that the command takes from the call as they are.
    """
    before = _of_job(job)
    now = {name: value for name, value in _named(given) if name in before}
    now = {name: value for name, value in now.items() if not _is_used(name, uses)}
    unlike = differences({name: before[name] for name in now}, now)
    if unlike:
        changes = "; ".join(
            f"{one.name}: the job has {_shown(one.stored)}, now {_shown(one.now)}" for one in unlike[:10]
        )
        raise JobRefused(
            f"{changes}; {command} needs the settings that the job began with, so leave them out"
        )


def _shown(value: Any) -> str:
    return value if value == ABSENT else clean_text(repr(value)[:120])


def _is_used(name: str, uses: Collection[str]) -> bool:
    return any(name == used or name.startswith(f"{used}.") for used in uses)


def _named(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield the settings that decide rows and that the call names: dotted name and value.

    A value that is chosen when a job begins, such as dtype auto, names none.
    """
    resolved = settings.resolved(config)
    for section_name in config.model_fields_set & _SECTIONS.keys():
        section: Section = getattr(config, section_name)
        for name in section.model_fields_set & section.marked(IDENTITY):
            value = getattr(getattr(resolved, section_name), name)
            if (name, value) not in _CHOSEN_LATER:
                yield f"{section_name}.{name}", value


def _of_job(job: Job) -> dict[str, Any]:
    """Return what decided the job's rows, by dotted name; of the weights and the detector not the place."""
    context = job.context
    arguments = job.identity.get("inputs", {}).get("arguments", {})
    found = {f"input.{name}": value for name, value in arguments.items()}
    found["input.draft_jpeg"] = context.draft_jpeg
    found["output.images_per_unit"] = context.images_per_unit
    if "limit" in job.identity:
        found["input.limit"] = job.identity["limit"]
    sections: list[tuple[str, Section | None]] = [
        ("input", context.box_rules), ("boxes", context.box_rules), ("model", context.model),
        ("limits", context.limits), ("detector", context.detector),
    ]  # fmt: skip
    for name, section in sections:
        values = {} if section is None else section.identity()
        found |= {f"{name}.{key}": value for key, value in values.items() if f"{name}.{key}" in _IDENTITY}
    return {name: value for name, value in found.items() if name not in ("model.checkpoint", "detector.name")}


def _with_job(given: Config, job: Job, saved: Mapping[str, Any]) -> Config:
    """Return the call's configuration, completed by what the job states and its `config.yaml` holds."""
    states = {**saved, **{name: value for name, value in _of_job(job).items() if name not in _GIVEN}}
    config = given
    for section_name in _SECTIONS:
        section: Section = getattr(config, section_name)
        mine = {
            name: states[f"{section_name}.{name}"]
            for name in type(section).model_fields
            if f"{section_name}.{name}" in states and name not in section.model_fields_set
        }
        try:
            whole = type(section).model_validate({**section.model_dump(), **mine})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise JobRefused(
                f"{CONFIG_KEY} of the output: {section_name}.{'.'.join(map(str, first['loc']))}: "
                f"{clean_text(first['msg'])}"
            ) from None
        config = config.model_copy(update={section_name: whole})
    return config


def _saved(store: Store, uses: Collection[str]) -> dict[str, Any]:
    """Return what `config.yaml` of the output holds of what such a command may take from it."""
    wanted = {name for name in _FROM_OUTPUT if _is_used(name, uses)}
    tree = saved_tree(store) if wanted else {}
    sections = {name: section for name, section in tree.items() if isinstance(section, dict)}
    return {name: sections[a][b] for name in wanted for a, b in [name.split(".")] if b in sections.get(a, {})}


def saved_tree(store: Store) -> dict[str, Any]:
    """Return `config.yaml` of an output as plain values, empty without one; JobRefused if unreadable."""
    try:
        text = store.read(CONFIG_KEY, most=MOST_CHARS).decode("utf-8", errors="replace")
    except NotFound:
        return {}
    try:
        return parse_yaml(text, f"{store.place.uri}/{CONFIG_KEY}")
    except UsageError as error:
        raise JobRefused(f"{error}; put the file right, or take it away") from None


def save_tree(store: Store, tree: Mapping[str, Any]) -> None:
    """Write `config.yaml` in the output, unless it holds this already."""
    body = tree_to_yaml(tree).encode()
    try:
        if store.read(CONFIG_KEY, most=MOST_CHARS) == body:
            return
    except NotFound:
        pass
    store.put(CONFIG_KEY, body)


_CHOSEN_LATER = (("dtype", "auto"), ("boxes_per_call", None), ("box_format", None))
_SECTIONS: dict[str, type[Section]] = {
    name: info.annotation
    for name, info in Config.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
}
_FIELDS = {f"{name}.{key}" for name, kind in _SECTIONS.items() for key in kind.model_fields}
_KNOWN = {*_SECTIONS, *_FIELDS, "storage"}
_IDENTITY = {f"{name}.{key}" for name, kind in _SECTIONS.items() for key in kind.marked(IDENTITY)}
_GIVEN = {f"{name}.{key}" for name, kind in _SECTIONS.items() for key in kind.marked(GIVEN)}
_FROM_OUTPUT = _FIELDS - _IDENTITY - _GIVEN
"""The settings that are neither compared nor of this call alone: filters, the failure budget, the price."""
