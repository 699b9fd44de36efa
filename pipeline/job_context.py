"""What a worker gets with a unit number, and what the driver gets back: small, frozen, picklable records.

With a `JobContext` a worker opens the plan, the images and the weights by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hqlabel.pipeline.settings import (
    BoxFormat,
    BoxFrame,
    BoxSettings,
    DetectorSettings,
    Identity,
    Limits,
    ModelSettings,
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder or prefix in a store: `uri`, with the fsspec options to reach it (no secrets inside).

    Secrets come from the environment, profiles, roles or files of the machine that opens it.
    """

    uri: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AccessRules:
    """What image uris may point at. `roots`: allowed local folders, absolute and resolved.

    `schemes`: allowed as well as local files. `options`: fsspec options by scheme, no secrets inside.
    """

    roots: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ("s3", "gs", "az", "abfs", "hf")
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The job's checkpoint: where a worker opens it, and the sha256 (hex) it must have."""

    source: str
    sha256: str
    options: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None
    architecture: str = ""
    input_side: int = 1024
    fit: Literal["pad", "stretch"] = "pad"
    """How images come to that side; it follows from the tensors, as the side does."""
    note: str | None = None
    """A sentence that every summary and footer repeats, such as the demo checkpoint's warning."""
    warning: str | None = None
    """What is next to the tensors and was not followed, in one line; no part of a job's identity."""


class BoxRules(BoxSettings):
    """How boxes become prompts: the settings, with the boxes' format and frame as planning found them."""

    box_format: Identity[BoxFormat] = "xyxy"
    box_frame: Identity[BoxFrame] = "upright"


class JobDetector(DetectorSettings):
    """A job's detector: its settings, and what it states of itself once it is loaded.

    `fingerprint`: what it must state in every process. `title`, `license`: for users.
    """

    name: Identity[str]
    fingerprint: Identity[str] = ""
    title: str = ""
    license: str | None = None


@dataclass(frozen=True, kw_only=True)
class EarlierPlan:
    """A plan that the job had before its inputs changed: units of it hold rows that are still true.

    Its units are `units` many; their files have generations from `first_generation` to `stop_generation`,
    end-exclusive.
    """

    plan_sha256: str
    units: int
    first_generation: int
    stop_generation: int


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """All that a worker needs to do any unit of a job; kept in job.json, handed to every stage."""

    output: Place
    plan_sha256: str
    images_per_unit: int
    run_id: str
    weights: Weights
    model: ModelSettings
    """With `dtype` and `boxes_per_call` resolved."""
    box_rules: BoxRules
    access: AccessRules
    limits: Limits
    draft_jpeg: bool = False
    """See `InputSettings.draft_jpeg`."""
    detector: JobDetector | None = None
    """As read from job.json it is for reports only: what a worker loads comes from this process."""
    lineage: Mapping[str, str] = field(default_factory=dict)
    """Footer entries beyond the fixed ones, already strings; keys without the `hqlabel.` prefix."""
    first_generation: int = 0
    """Generations of unit files from here on are of this plan; lower ones of the plans before."""
    earlier: tuple[EarlierPlan, ...] = ()
    """The plans before, newest first."""
    segmenter: str = "hqlabel.pipeline.stages.load_model:load_segmenter"
    """`module:function` that makes a worker's segmenter from (context, use_gpu). Tests and benchmarks put a
    stub here. It names code that is run: it comes from this process, never from a file of the output."""
    decoder: str = "hqlabel.pipeline.images.decode_upright:decode_image"
    """`module:function` that the decoding child calls; this process's as well."""


@dataclass(frozen=True, kw_only=True)
class LiveCount:
    """How far one model process is. `units`: of each of its last units the images that are done, and failed.

    `busy_s`: seconds in calls of the model since the process began.
    """

    busy_s: float
    units: Mapping[int, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class UnitOutcome:
    """What the driver gets of a finished unit: counts only, never data."""

    unit_id: int
    generation: int
    images: int
    labelled: int
    no_boxes: int
    failed: int
    instances: int
    bytes: int
    repeated: bool
    """True when the unit was already there: another driver, or an earlier attempt, committed it."""
    begun_before: int = 0
    """Images of a unit that was begun at least once before without a commit, so done again."""
    failed_by_code: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    device: str = ""
    """The kind of device that made it; empty where that is not known."""
    kept: int = 0
    """Of the images, those whose rows were taken over from before: not done anew."""
