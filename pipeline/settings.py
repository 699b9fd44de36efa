"""Every setting of a job, declared once.

A setting is a field of the section that users write it in: its default, range, meaning, unit and whether it
can change a row are here and nowhere else. The configuration of a job (`hqlabel.jobs.load_config`), the code
that reads the setting, the identity in job.json and docs/configuration.md all use these classes. A value that
is chosen when a job begins, such as the number format for `auto`, replaces the one that was written:
`model_copy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:  # it brings NumPy, and every command imports the settings
    from hqlabel.model.records import CallShape

T = TypeVar("T")
IDENTITY, MARKS, KEEPS_ROWS = "identity", "marks", "keeps rows"
REDO, GIVEN = "redo", "given"
Identity = Annotated[T, IDENTITY]
"""The mark of a setting that can change a row: its masks, its values, or whether the image failed.

It belongs to the job's identity: a resume with another value is refused."""
Redo = Annotated[T, IDENTITY, REDO]
"""The same of a setting that decides only whether an image fails: `retry` may do failed images again with
another value, which the footers of their units state."""
Marks = Annotated[T, MARKS]
"""The mark of a setting that marks rows when tables are published, and changes nothing else."""
KeepsRows = Annotated[T, KEEPS_ROWS]
"""The mark of a setting that changes no row. Every setting has one of these marks."""
Given = Annotated[T, GIVEN]
"""A further mark: the setting says where to connect, what to read, with which rights, or on what to run. It
is taken from the command line, a file that it names and the environment, never from an output."""


@dataclass(frozen=True)
class Unit:
    """The mark of what a number counts."""

    name: str


Number = Annotated[float, Field(strict=False)]
"""A float that YAML may also write as 1 or 1e-3 (PyYAML reads the latter as text)."""
Share = Annotated[Number, Field(ge=0, le=1)]
Seconds = Annotated[Number, Unit("seconds")]
Pixels = Annotated[int, Unit("pixels")]
Bytes = Annotated[int, Unit("bytes")]

BoxFormat = Literal["xyxy", "xywh", "cxcywh", "xyxy-normalised", "xywh-normalised", "cxcywh-normalised"]
BoxFrame = Literal["upright", "stored"]
Overlap = Literal["none", "class", "all"]
TarIds = Literal["member", "key", "shard"]
MOST_NUMBER = 2**63 - 1
"""No whole number of a setting is beyond it: Parquet and Arrow have no larger ones."""
DEMO = "demo"
"""The checkpoint of this name is the one that comes with hqlabel, whatever is in the working folder."""


class Section(BaseModel):
    """A section of the configuration: frozen, checked strictly, an unknown name is an error."""

    # A worker gets its settings ready: `defer_build` saves it the making of validators, 30 ms of CPU.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        defer_build=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_large_numbers(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, int) and abs(value) > MOST_NUMBER:
                raise ValueError(f"{str(name)[:100]}: a number beyond {MOST_NUMBER:,}")
        return values

    @classmethod
    def from_file(cls, values: Mapping[str, Any]) -> Self:
        """Return the section that a file of an output holds; raise ValueError, in one line, if it is none."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            raise ValueError("; ".join(faults)) from None

    def identity(self) -> dict[str, Any]:
        """Return the settings that belong to a job's identity."""
        return self.model_dump(include=self.marked(IDENTITY))

    @classmethod
    def marked(cls, mark: str) -> set[str]:
        """Return the names of the settings with a mark."""
        return {name for name, info in cls.model_fields.items() if mark in info.metadata}


class InputSettings(Section):
    """Which images, which boxes, and how the boxes are to be read."""

    images: Given[Identity[str | None]] = None
    """Folder, prefix, glob, table of uris, COCO instances, tars or Hugging Face Parquet (docs/inputs.md)."""
    boxes: Given[Identity[str | None]] = None
    """Table, COCO, MegaDetector or YOLO boxes, tars, Hugging Face Parquet, or an earlier output."""
    box_format: Identity[BoxFormat | None] = None
    """Default: what the kind of file means (docs/inputs.md): xyxy for tables, xywh for COCO files."""
    boxes_from: Identity[Literal["boxes", "masks"]] = "boxes"
    """`masks`: of COCO files and YOLO label folders, the tight box around each mask or polygon."""
    box_frame: Identity[BoxFrame] = "upright"
    """`upright`: boxes are in the picture as users see it (EXIF applied); `stored`: as the file has it."""
    columns: Identity[dict[str, str]] = {}
    """Where a table has other column names: our name (such as image_uri) to the table's."""
    image_root: Given[Identity[str | None]] = None
    """Folder or prefix that relative uris and COCO file names start from; null: the folder of their table."""
    limit: Identity[int | None] = Field(default=None, ge=1)
    """Only the first N images in the order of their ids."""
    draft_jpeg: Identity[bool] = False
    """Decode a JPEG at half, quarter or eighth size where that is still enough: quicker, other masks."""
    tar_ids: Identity[TarIds] = "member"
    """What images in tars are called: their name in the tar, that up to its first dot, or tar and name."""
    allow_unmatched: Identity[bool] = False
    """Skip boxes whose image is not listed, instead of refusing the job."""
    allow_roots: Given[Redo[list[str]]] = []
    """Further local folders that image uris may point into."""
    allow_schemes: Given[Redo[list[str]]] = []
    """Further uri schemes, such as https; s3, gs, az, abfs and hf are allowed anyway."""


class ModelSettings(Section):
    """The checkpoint, and what the model is asked for; all of it changes masks."""

    checkpoint: Given[Identity[str | None]] = None
    """File, folder, uri, hub id, or `demo` for the small model that comes with hqlabel."""
    dtype: Identity[Literal["auto", "float32", "bfloat16"]] = "auto"
    """auto: the faster of both on the device (bfloat16 on GPUs from Ampere); resolved once per job."""
    images_per_call: Identity[int] = Field(default=1, ge=1)
    """Images in one encoder call."""
    boxes_per_call: Identity[int | None] = Field(default=None, ge=1)
    """Boxes in one decoder call, the last one padded; null: 2 on a CPU, 16 on a GPU, chosen once per job."""
    multimask: Identity[Literal["single", "best"]] = "single"
    """single: SAM's single-mask output, as HQ-SAM was measured; best: the best-scored of three."""
    hq_token_only: Identity[bool] = False
    """True leaves SAM's own mask logits out of the sum."""
    stability_offset: Identity[Number] = Field(default=1.0, gt=0)
    """Logit offset of stability_score."""
    compile: Identity[bool] = False
    """On GPUs: compile the model's calls and record them as CUDA graphs; a process begins minutes later."""
    # PyTorch's kernels split their work by it and round some sums differently: of 54,753 masks two differed
    # by one pixel in what their stability is counted from.
    cpu_threads: Identity[int] = Field(default=1, ge=1)
    """Without GPUs: threads of a model process. As many processes of one thread do more, where they fit."""

    def mask_settings(self) -> dict[str, Any]:
        """Return all that changes masks but the weights, which are known by their sha256."""
        return {name: value for name, value in self.identity().items() if name != "checkpoint"}

    @property
    def call_shape(self) -> CallShape:
        """The fixed shapes of the model's calls; `boxes_per_call` must be resolved."""
        from hqlabel.model.records import CallShape

        if self.boxes_per_call is None:
            raise ValueError("model.boxes_per_call is not resolved")
        return CallShape(images_per_call=self.images_per_call, boxes_per_call=self.boxes_per_call)


class DetectorSettings(Section):
    """The detector that finds the boxes of images that have none (docs/detectors.md)."""

    name: Given[Identity[str | None]] = None
    """`hf:ID_OR_FOLDER`, `hf-zero-shot:ID_OR_FOLDER`, or your own class as `module:Class`."""
    prompts: Identity[dict[str, str]] = {}
    """What a zero-shot detector searches for: text to the name of its category."""
    longest_side: Identity[Pixels] = Field(default=1333, ge=16)
    """The detector gets the upright picture with no side longer than this; none is enlarged."""
    score_threshold: Identity[Share] = 0.3
    """Only boxes that score over this count; the others leave no row."""
    max_detections: Identity[int] = Field(default=100, ge=1)
    """The best that many boxes of an image count."""
    images_per_call: Identity[int] = Field(default=1, ge=1)
    """Pictures in one call; the last call is filled up to it."""
    options: Identity[dict[str, Any]] = {}
    """Keyword arguments for your own class; no secrets."""


class BoxSettings(Section):
    """Which boxes, from a file or a detector, get no mask; each keeps its row with the reason."""

    min_score: Identity[Number | None] = None
    """Boxes with a lower score get none (box_score); one without a score does."""
    top_k: Identity[int | None] = Field(default=None, ge=1)
    """Only the best-scored that many of an image get one (else box_rank)."""
    nms_mode: Identity[Overlap] = "none"
    """Of two boxes that overlap the lower-scored gets none (nms): within one class, or over all classes."""
    nms_iou: Identity[Share] = 0.7
    """IoU of two boxes over which `nms_mode` skips one."""
    min_side_px: Identity[Annotated[Number, Unit("pixels")]] = Field(default=0.0, ge=0)
    """Boxes with a shorter side get none (box_small); upright pixels, before `expand`."""
    expand: Identity[Number] = Field(default=0.0, ge=0, le=1)
    """Each side of a prompt is moved out by this share of the box's width or height, inside the picture."""


class FilterSettings(Section):
    """What is marked as not accepted when tables are published; nothing is ever deleted."""

    min_predicted_iou: Marks[Share | None] = None
    """Masks below this are marked; null: no such filter."""
    min_stability_score: Marks[Share | None] = None
    """Masks whose edge moves more than this with the threshold are marked."""
    min_detector_score: Marks[Number | None] = None
    """Boxes with a lower score of the detector are marked; one without a score never is."""
    min_box_iou: Marks[Share | None] = None
    """Masks whose tight box agrees less with the prompt box are marked."""
    min_area_px: Marks[Pixels | None] = Field(default=None, ge=0)
    """Masks of fewer pixels are marked."""
    nms_mode: Marks[Overlap] = "none"
    """Mark the worse of two masks that overlap: within one class, or over all classes."""
    nms_iou: Marks[Share] = 0.7
    """IoU of two masks over which `nms_mode` marks the worse."""


class OutputSettings(Section):
    """Where the labels go."""

    uri: Given[KeepsRows[str | None]] = None
    """A folder or prefix that belongs to this job alone."""
    images_per_unit: Identity[int] = Field(default=64, ge=1, le=4096)
    """Images a unit of work and a commit; a decoded unit near 150 MB is good."""


class Limits(Section):
    """Bounds on one image and on the job."""

    max_image_bytes: Redo[Bytes] = Field(default=256 * 2**20, ge=1)
    """A larger object fails (too_many_bytes) before it is downloaded."""
    max_image_pixels: Redo[Pixels] = Field(default=89_478_485, ge=1)
    """A picture of more pixels fails (too_large) before it is decoded."""
    max_boxes_per_image: Redo[int] = Field(default=10_000, ge=1)
    """Boxes that one image may have."""
    fetch_timeout_s: Redo[Seconds] = Field(default=60.0, gt=0)
    """For one object, all retries together (fetch_timeout)."""
    decode_timeout_s: Redo[Seconds] = Field(default=60.0, gt=0)
    """For decoding one picture (timeout)."""
    segment_timeout_s: Redo[Seconds] = Field(default=300.0, gt=0)
    """For the masks of one image (timeout)."""
    decode_memory_bytes: Redo[Bytes] = Field(default=4 * 2**30, ge=2**20)
    """Memory of the process that decodes one picture (out_of_memory)."""
    max_failure_rate: KeepsRows[Share] = 0.05
    """More failed images than this share end the job with exit code 3."""
    failure_rate_from_images: KeepsRows[int] = Field(default=1, ge=1)
    """The share is judged from this many images on."""


class ClusterSettings(Section):
    """The machines; may change between resumes, and never come from an output."""

    ray_address: Given[KeepsRows[str | None]] = None
    """A running cluster (host:port); null: a private Ray on this machine. Also from RAY_ADDRESS."""
    actors: Given[KeepsRows[int | None]] = Field(default=None, ge=1)
    """Model processes; null: one a GPU, or one a core."""
    actors_min: Given[KeepsRows[int | None]] = Field(default=None, ge=1)
    """Let the pool begin with fewer than `actors` and grow; null: the same as `actors`."""
    gpus_per_actor: Given[KeepsRows[Number | None]] = Field(default=None, ge=0, le=1)
    """Share of a GPU for a model process; null: 1 where the cluster has GPUs, else 0."""
    cpus_per_actor: Given[KeepsRows[Number | None]] = Field(default=None, gt=0)
    """CPU cores for a model process; null: 1 with a GPU, else about `model.cpu_threads`."""
    decode_cpus: Given[KeepsRows[Number | None]] = Field(default=None, gt=0)
    """CPU cores for a task that fetches and decodes one unit; null: chosen from the machine."""
    wait_for_nodes_s: Given[KeepsRows[Seconds]] = Field(default=0.0, ge=0)
    """How long the nodes that an autoscaler brings may take at the start."""
    cpus: Given[KeepsRows[int | None]] = Field(default=None, ge=1)
    """Cores of the private local Ray; null: all this process may use."""
    shared_paths: Given[KeepsRows[bool]] = False
    """Local paths are one shared folder on every node; else several nodes refuse a local output."""

    @model_validator(mode="after")
    def _check_pool(self) -> ClusterSettings:
        if self.actors is not None and self.actors_min is not None and self.actors_min > self.actors:
            raise ValueError(f"actors_min {self.actors_min} is more than actors {self.actors}")
        return self


class CostSettings(Section):
    """What the machines cost; only plan and report use it, and only to print it."""

    usd_per_gpu_hour: KeepsRows[Number | None] = Field(default=None, ge=0)
    """Price of one model process's device for an hour; null: no cost is printed."""
