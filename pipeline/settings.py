"""The frozen records that cross the files of `pipeline/`; small and picklable, no data in bulk.

`JobContext` is all that a worker gets besides a unit number: it opens the plan, the images and the
weights by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from model.records import CallShape

BoxFormat = Literal["xyxy", "xywh", "cxcywh", "xyxy-normalised", "xywh-normalised", "cxcywh-normalised"]
BoxFrame = Literal["upright", "stored"]
DEMO = "demo"
"""The checkpoint of this name is the one that comes along, whatever lies in the working folder."""


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
    failure_rate_from_images: int = 1


@dataclass(frozen=True, kw_only=True)
class BoxRules:
    """How boxes become prompts: their format, the frame they are measured in, and which get no mask.

    A box that gets none keeps its row with the reason. `min_score`: of a box that has a score. `top_k`: the
    best-scored of an image. `nms_mode`: of two boxes that overlap by an IoU over `nms_iou`, the one with the
    lower score gets none, within one category or over all. `min_side_px`: of width and height. `expand`: how
    far each side of a prompt is moved out, as a share of the box's own width or height.
    """

    box_format: BoxFormat = "xyxy"
    box_frame: BoxFrame = "upright"
    min_score: float | None = None
    top_k: int | None = None
    nms_mode: Literal["none", "class", "all"] = "none"
    nms_iou: float = 0.7
    min_side_px: float = 0.0
    expand: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """What the model is asked for, and of what pixels. All of it changes masks, so all of it is identity.

    `cpu_threads`: that a model process on a CPU computes with. PyTorch's kernels share their work out by it,
    and round some sums otherwise: of 54,753 masks two differed by one pixel in what their stability is
    counted from.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    call_shape: CallShape = field(default_factory=CallShape)
    multimask: Literal["single", "best"] = "single"
    hq_token_only: bool = False
    stability_offset: float = 1.0
    compiled: bool = False
    draft_jpeg: bool = False
    cpu_threads: int = 1


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
    warning: str | None = None
    """What lies beside the tensors and was not followed, in one line; no part of a job's identity."""


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """The detector that finds a job's boxes when none are given.

    `name`: `hf:SOURCE`, `hf-zero-shot:SOURCE` or a person's own `module:Class`. `title`, `license`: what it
    says of itself, for people. `fingerprint`: what it must say in every process. `prompts`: text to category.
    `longest_side`: of the pictures it is shown, in pixels; none is enlarged. Of its boxes those count that
    score over `score_threshold`, at most `max_detections`. `options`: keyword arguments of a person's own
    class.
    """

    name: str
    fingerprint: str = ""
    title: str = ""
    license: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    longest_side: int = 1333
    score_threshold: float = 0.3
    max_detections: int = 100
    images_per_call: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


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
    detector: DetectorSettings | None = None
    """Read back from job.json it is for reading only: what a worker loads comes from this process."""
    lineage: Mapping[str, str] = field(default_factory=dict)
    """Footer entries beyond the fixed ones, already strings; keys without the `hqlabel.` prefix."""
    segmenter: str = "pipeline.stages.load_model:load_segmenter"
    """`module:function` that makes a worker's segmenter from (context, use_gpu). Tests and benchmarks put a
    stub here. It names code that is run: it comes from this process, never from a file of the output."""
    decoder: str = "pipeline.images.decode_upright:decode_image"
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
