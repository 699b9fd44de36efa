"""What a job is: job.json, created once, and the refusal to mix two jobs in one folder.

The identity holds the settings marked `Identity`, the plan, the weights and the inputs; a resume compares it
field by field. The rest (machines, code version) is next to it and may change. The file is data,
never code: what names a function to run, a folder to read or a place to write comes from the process that
opens the job, not from its output.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json, to_jsonable_python

from hqlabel.pipeline.errors import JobRefused, clean_text, count
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.job_context import AccessRules, BoxRules, EarlierPlan, JobContext, JobDetector, Weights
from hqlabel.pipeline.schema import SCHEMA_VERSION
from hqlabel.pipeline.settings import Limits, ModelSettings
from hqlabel.pipeline.storage.bounded_json import MOST_BYTES, reason
from hqlabel.pipeline.storage.output_store import NotFound, Store

JOB_KEY = "job.json"
JOB_FORMAT = 1
SHOWN_DIFFERENCES = 20

PART_BYTES = 256 * 2**20
BYTES_PER_INSTANCE = 160  # measured: about 123 B of columns for 100 B of runs; large images have more
BYTES_PER_IMAGE = 120
BOXES_WHEN_UNKNOWN = 10
MAX_UNITS_PER_PART = 20_000
MOST_UNITS = 20_000_000
"""1,280 million images of 64 a unit. What a file states is walked in loops, so it is bounded."""

_PLAIN = re.compile(r"[\w.-]{1,100}")
"""What a name in job.json may hold that becomes part of keys."""
_FROM_THE_PROCESS = ("output", "access", "segmenter", "decoder")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as job.json has it, which stores all but `context.access`, the output place and code names.

    `identity`: what `identity_of` gives. `plan`: counts (`images`, `boxes`, `units`) and the rest of the
    plan's summary. `categories`: `{"id", "name"}` each. `units_per_part`: units in one published part,
    decided once, when the job is created. `created_at`: ISO time, for users only.
    """

    identity: Mapping[str, Any]
    context: JobContext
    plan: Mapping[str, Any]
    categories: Sequence[Mapping[str, Any]] = ()
    units_per_part: int = 1
    created_at: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))

    @property
    def units(self) -> int:
        """How many units the plan has; their ids are 0 to this, end-exclusive."""
        return int(self.plan["units"])


def identity_of(
    context: JobContext,
    *,
    inputs: Mapping[str, Any],
    limit: int | None,
    protocol: int,
) -> dict[str, Any]:
    """Return all that decides what a job's rows and masks are, as plain JSON values.

    `inputs`: the input settings and a fingerprint of every table and box file. `protocol`: the
    model-protocol number, which moves when equal weights and settings would give other masks.
    """
    identity = {
        "schema_version": SCHEMA_VERSION,
        "model_protocol": protocol,
        "plan_sha256": context.plan_sha256,
        "images_per_unit": context.images_per_unit,
        "limit": limit,
        "inputs": inputs,
        "weights": {"sha256": context.weights.sha256, "input_side": context.weights.input_side},
        "masks": mask_settings(context),
        "box_rules": context.box_rules.identity(),
        "detector": _detector_identity(context.detector) if context.detector else None,
        "limits": context.limits.identity(),
    }
    # As it comes back from the file: tuples become lists, keys strings.
    return dict(json.loads(json.dumps(identity, allow_nan=False)))


def mask_settings(context: JobContext) -> dict[str, Any]:
    """Return the settings that change masks, as job.json has them."""
    masks = context.model.mask_settings()
    shape = {name: masks.pop(name) for name in ("images_per_call", "boxes_per_call")}
    return masks | {"call_shape": shape, "compiled": masks.pop("compile"), "draft_jpeg": context.draft_jpeg}


def _from_mask_settings(masks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `JobContext` from `mask_settings`."""
    model = {**masks, **masks["call_shape"], "compile": masks["compiled"]}
    draft_jpeg = model.pop("draft_jpeg")
    del model["call_shape"], model["compiled"]
    return {"model": ModelSettings.from_file(model), "draft_jpeg": draft_jpeg}


def _detector_identity(detector: JobDetector) -> dict[str, Any]:
    """Return all of a detector but where its files are, which may change."""
    fields = detector.identity()
    name = fields.pop("name")
    kind, colon, _ = name.partition(":")
    return {"kind": kind + colon if kind in ("hf", "hf-zero-shot") else name, **fields}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field in which two identities differ; `ABSENT` where one has no such field."""

    name: str
    stored: Any
    now: Any


ABSENT = "(absent)"


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Return every field in which two identities differ, by dotted name, sorted."""
    before, after = dict(_flat(stored)), dict(_flat(now))
    return [
        Difference(name=name, stored=before.get(name, ABSENT), now=after.get(name, ABSENT))
        for name in sorted(before.keys() | after.keys())
        # JSON's text, because 1, 1.0 and true are three values there
        if json.dumps(before.get(name, ABSENT)) != json.dumps(after.get(name, ABSENT))
    ]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _flat(below, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value:
        for place, below in enumerate(value):
            yield from _flat(below, f"{prefix}[{place}]")
    else:
        yield prefix, value


def units_per_part(*, images: int, boxes: int | None, images_per_unit: int) -> int:
    """Return how many units make a published part of about 256 MB, from plan counts alone."""
    boxes_per_image = BOXES_WHEN_UNKNOWN if boxes is None else boxes / max(images, 1)
    unit_bytes = images_per_unit * (BYTES_PER_IMAGE + boxes_per_image * BYTES_PER_INSTANCE)
    return max(1, min(MAX_UNITS_PER_PART, round(PART_BYTES / unit_bytes)))


def open_job(store: Store, job: Job, *, recorded: Mapping[str, Any] | None = None) -> Job:
    """Return the job to work on: created when the folder is empty, else the stored one, if it is the same.

    The stored run id, creation time and part size are kept. A second process that opens the same job at the
    same time gets the same. `recorded`: input settings that earlier versions kept elsewhere than in job.json.

    Raises:
        JobRefused: the folder holds another job (naming every differing field with both values), or
            files of something else, or is on a store that does not honour create-if-absent.
    """
    if job.units > MOST_UNITS:
        raise JobRefused(
            f"{count(job.units, 'unit')}, wanted at most {MOST_UNITS:,}: raise output.images_per_unit, or "
            "make several jobs"
        )
    stored = _read_json(store)
    if stored is None:
        _refuse_foreign_files(store)
        body = job_body(job)
        if store.put_if_absent(JOB_KEY, body):
            visit("job.created")
            store.refuse_unconditional(JOB_KEY, body)
        stored = _parse_json(store.read(JOB_KEY), store)
    _refuse_other_job(store, _with_recorded(stored, recorded or {}, job), job)
    kept = _context_of(stored["context"], store, job.context.access)
    context = replace(
        job.context, run_id=kept.run_id, first_generation=kept.first_generation, earlier=kept.earlier
    )
    return replace(
        job, context=context, created_at=stored["created_at"], units_per_part=stored["units_per_part"]
    )


def unlike_stored(store: Store, job: Job, recorded: Mapping[str, Any]) -> list[Difference]:
    """Return where `job` differs from the one that the store holds; `recorded` as in `open_job`."""
    stored = _parse_json(store.read(JOB_KEY, most=MOST_BYTES), store)
    return differences(_with_recorded(stored, recorded, job), job.identity)


def read_job(store: Store, *, access: AccessRules | None = None) -> Job | None:
    """Return the job in this folder, or None when it has none. Image access comes from the caller.

    Raises:
        JobRefused: job.json is damaged, or of a later version.
    """
    stored = _read_json(store)
    if stored is None:
        return None
    try:
        context = _context_of(stored["context"], store, access or AccessRules())
        _check_counts(stored, context)
    except (ValueError, TypeError, KeyError) as error:
        raise JobRefused(
            f"{store.place.uri}/{JOB_KEY} was written by another version ({reason(error)})"
        ) from error
    return Job(
        identity=stored["identity"],
        context=context,
        plan=stored["plan"],
        categories=tuple(stored["categories"]),
        units_per_part=stored["units_per_part"],
        created_at=stored["created_at"],
    )


def require_job(store: Store, *, access: AccessRules | None = None) -> Job:
    """Return the job in this folder; JobRefused when it has none."""
    job = read_job(store, access=access)
    if job is None:
        raise JobRefused(
            f"{store.place.uri}: there is no job here ({JOB_KEY} is missing); start one with label"
        )
    return job


def _refuse_foreign_files(store: Store) -> None:
    """Raise JobRefused unless the folder is empty but for owner files, written just before, and dot files."""
    keys = [entry.key for entry in store.list(limit=1000)]
    foreign = [key for key in keys if not key.startswith((".", "owner/"))]
    # Another process may have created the job since the listing: then these are its files.
    if foreign and store.head(JOB_KEY) is None:
        examples = ", ".join(foreign[:3])
        raise JobRefused(
            f"{store.place.uri}: this folder has files but no {JOB_KEY} ({examples}); nothing was changed. "
            "Choose an empty folder for the output."
        )


def _with_recorded(stored: Mapping[str, Any], recorded: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """Return the stored identity; of an earlier version's, with what was not part of it yet."""
    identity = dict(stored["identity"])
    if "limits" in job.identity and "limits" not in identity:
        identity["limits"] = Limits.from_file(stored["context"]["limits"]).identity()
    arguments = identity.get("inputs", {}).get("arguments")
    if isinstance(arguments, dict):
        identity["inputs"] = {**identity["inputs"], "arguments": {**recorded, **arguments}}
    return identity


def _refuse_other_job(store: Store, stored: Mapping[str, Any], job: Job) -> None:
    unlike = differences(stored, job.identity)
    if not unlike:
        return
    lines = [
        f"  {_short_name(d.name)}: the job there has {_short(d.stored)}, now {_short(d.now)}" for d in unlike
    ]
    if len(lines) > SHOWN_DIFFERENCES:
        lines[SHOWN_DIFFERENCES:] = [f"  and {len(unlike) - SHOWN_DIFFERENCES} more"]
    raise JobRefused(
        f"{store.place.uri}: this folder belongs to another job; nothing was changed.\n"
        + "\n".join(lines)
        + f"\nResume with the old settings{_flags_to_add(unlike)}, or choose another output folder."
        + (_LATER if any(one.name.startswith(("limits.", *_FLAGS)) for one in unlike) else "")
    )


_FLAGS = {"inputs.arguments.allow_roots": "--allow-root", "inputs.arguments.allow_schemes": "--allow-scheme"}
_LATER = (
    "\nOnce the job is done, hqlabel retry does the images that failed again with other limits, folders or "
    "schemes."
)


def _flags_to_add(unlike: Sequence[Difference]) -> str:
    """Return the flags that the job began with and this call lacks, as text; empty when there are none."""
    missing = [
        f"{_FLAGS[name]} {shlex.quote(clean_text(one.stored))}"
        for one in unlike
        for name in [one.name.partition("[")[0]]
        if name in _FLAGS and isinstance(one.stored, str) and one.stored != ABSENT
    ]
    return f" (add {' '.join(missing[:5])})" if missing else ""


def _short_name(name: str) -> str:
    return clean_text(name[:200])


def _short(value: Any) -> str:
    text = value if value == ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def job_body(job: Job) -> bytes:
    """Return the content of job.json."""
    context = to_jsonable_python(job.context) | {"masks": mask_settings(job.context)}
    of_one_plan = () if job.context.earlier else ("first_generation", "earlier")
    for name in (*_FROM_THE_PROCESS, "model", "draft_jpeg", *of_one_plan):
        del context[name]
    content = {
        "product": "hqlabel",
        "format": JOB_FORMAT,
        "created_at": job.created_at,
        "identity": job.identity,
        "context": context,
        "plan": job.plan,
        "categories": list(job.categories),
        "units_per_part": job.units_per_part,
    }
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _check_counts(stored: Mapping[str, Any], context: JobContext) -> None:
    """Raise ValueError for counts that no plan has."""
    plan, per_unit = stored["plan"], context.images_per_unit
    for name in ("images", "units", "boxes"):
        if type(plan[name]) is not int or plan[name] < 0:
            raise ValueError(f"plan.{name} is {plan[name]!r}")
    # Merged tables have images and no units.
    if plan["units"] > MOST_UNITS or plan["units"] not in (0, -(-plan["images"] // per_unit)):
        raise ValueError(f"{plan['units']} units of {per_unit} images for {plan['images']} images")
    if stored["units_per_part"] < 1:
        raise ValueError(f"units_per_part is {stored['units_per_part']}")
    for one in stored["categories"]:
        if not isinstance(one["id"], int) or not isinstance(one["name"], str | None):
            raise ValueError(f"a category is {one!r}")


def _read_json(store: Store) -> dict[str, Any] | None:
    try:
        body = store.read(JOB_KEY, most=MOST_BYTES)
    except NotFound:
        return None
    return _parse_json(body, store)


def _parse_json(body: bytes, store: Store) -> dict[str, Any]:
    name = f"{store.place.uri}/{JOB_KEY}"
    try:
        content = from_json(body)
        if content["product"] != "hqlabel":
            raise ValueError("not of this product")
        if content["format"] > JOB_FORMAT:
            raise JobRefused(f"{name} has format {content['format']}; this version reads up to {JOB_FORMAT}")
        kinds: dict[str, type] = {"identity": dict, "context": dict, "plan": dict, "categories": list}
        kinds |= {"units_per_part": int, "created_at": str}
        wrong = [key for key, kind in kinds.items() if not isinstance(content[key], kind)]
        if wrong or not isinstance(content["context"]["run_id"], str):
            raise ValueError(f"wrong type of {wrong or 'run_id'}")
        inputs = content["identity"].get("inputs", {})
        if not isinstance(inputs, dict) or not isinstance(inputs.get("arguments", {}), dict):
            raise ValueError("wrong type of identity.inputs")
    except (ValueError, KeyError, TypeError) as error:
        raise JobRefused(
            f"{name} cannot be read ({reason(error)}); nothing was changed. "
            "Restore the file, or choose another output folder."
        ) from error
    return dict(content)


def _context_of(stored: Mapping[str, Any], store: Store, access: AccessRules) -> JobContext:
    rest = {name: value for name, value in stored.items() if name not in _FROM_THE_PROCESS}
    rest |= {
        **_from_mask_settings(rest.pop("masks")),
        "weights": TypeAdapter(Weights).validate_python(rest["weights"]),
        "box_rules": BoxRules.from_file(rest["box_rules"]),
        "limits": Limits.from_file(rest["limits"]),
    }
    if "earlier" in rest:
        rest["earlier"] = TypeAdapter(tuple[EarlierPlan, ...]).validate_python(rest["earlier"])
        if any(not _PLAIN.fullmatch(one.plan_sha256) or one.units > MOST_UNITS for one in rest["earlier"]):
            raise ValueError("an earlier plan is none")
    if rest.get("detector") is not None:
        rest["detector"] = JobDetector.from_file(rest["detector"])
    context = JobContext(output=store.place, access=access, **rest)
    kinds: dict[str, type] = {"plan_sha256": str, "run_id": str, "images_per_unit": int, "lineage": dict}
    kinds["first_generation"] = int
    wrong = [name for name, kind in kinds.items() if type(getattr(context, name)) is not kind]
    if wrong or not _PLAIN.fullmatch(context.plan_sha256) or not 1 <= context.images_per_unit <= 4096:
        raise ValueError(f"wrong: {', '.join(wrong) or 'plan_sha256 or images_per_unit'}")
    return context
