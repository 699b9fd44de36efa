"""The frozen records that cross the files of `pipeline/`; small and picklable, no data in bulk.

`JobContext` is all that a worker gets besides a unit number: it opens the plan, the images and the
weights by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from model.structures import CallShape

BoxFormat = Literal["xyxy", "xywh", "cxcywh", "xyxy-normalised", "xywh-normalised", "cxcywh-normalised"]
BoxFrame = Literal["upright", "stored"]


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

    `schemes`: allowed besides local files. `options`: fsspec options by scheme, no secrets inside.
    """

    roots: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ("s3", "gs", "az", "abfs", "hf")
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on one image and on the job. Bytes, pixels, seconds; `max_failure_rate` is a share."""

    max_image_bytes: int = 256 * 2**20
    max_image_pixels: int = 89_478_485
    max_boxes_per_image: int = 10_000
    fetch_timeout_s: float = 60.0
    decode_timeout_s: float = 60.0
    segment_timeout_s: float = 300.0
    decode_memory_bytes: int = 4 * 2**30
    max_failure_rate: float = 0.05
    failure_rate_from_images: int = 1000


@dataclass(frozen=True, kw_only=True)
class BoxRules:
    """How given boxes become prompts: their format and the frame they are measured in."""

    box_format: BoxFormat = "xyxy"
    box_frame: BoxFrame = "upright"


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """What the model is asked for. All of it changes masks, so all of it is identity."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    call_shape: CallShape = field(default_factory=CallShape)
    multimask: Literal["single", "best"] = "single"
    hq_token_only: bool = False
    stability_offset: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The job's checkpoint: where a worker opens it, and the sha256 it must have (hex)."""

    source: str
    sha256: str
    options: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None
    architecture: str = ""
    input_side: int = 1024
    note: str | None = None
    """A sentence that every summary and footer repeats, such as the demo checkpoint's warning."""


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """All that a worker needs to do any unit of a job; kept in job.json, handed to every stage."""

    output: Place
    plan_sha256: str
    images_per_unit: int
    run_id: str
    weights: Weights
    masks: MaskSettings
    box_rules: BoxRules
    access: AccessRules
    limits: Limits
    lineage: Mapping[str, str] = field(default_factory=dict)
    """Footer entries beyond the fixed ones, already strings; keys without the `hqlabel.` prefix."""
    segmenter: str = "pipeline.weights:load_segmenter"
    """`module:function` that makes a worker's segmenter from (context, use_gpu). Tests and benchmarks put a
    stub here. It names code that is run: it comes from this process, never from a file of the output."""
    decoder: str = "pipeline.decode:decode_image"
    """`module:function` that the decoding child calls; the same holds."""


@dataclass(frozen=True, kw_only=True)
class UnitOutcome:
    """What the driver learns of a finished unit: counts only, never data."""

    unit_id: int
    generation: int
    images: int
    labelled: int
    no_boxes: int
    failed: int
    instances: int
    bytes: int
    repeated: bool
    """True when the unit was already there: somebody else, or an earlier try, committed it."""
    begun_before: int = 0
    """Images of a unit that was begun at least once before without coming to a commit, so done again."""
    failed_by_code: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
