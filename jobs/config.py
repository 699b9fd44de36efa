"""The configuration of a job: one YAML file, flags for the common cases, `--set a.b=v` on top.

Every name that a person can write is a field here, with its meaning; an unknown name is an error that
proposes the nearest known one. Secrets have no field: they come from the environment, a profile or a
role of the machine. The resolved configuration is written to `config.yaml` in the output.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import UsageError
from pipeline.settings import BoxFormat, BoxFrame

CONFIG_KEY = "config.yaml"
Number = Annotated[float, Field(strict=False)]
"""A float that YAML may also write as 1 or 1e-3 (PyYAML reads the latter as text)."""
Share = Annotated[Number, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class InputSection(_Section):
    """Which images, which boxes, and how the boxes are to be read."""

    images: str | None = None
    """Folder, prefix, glob, table of uris, COCO instances, tars or Hugging Face Parquet (docs/inputs.md)."""
    boxes: str | None = None
    """Table, COCO, MegaDetector or YOLO boxes, tars, Hugging Face Parquet, or an earlier output."""
    box_format: BoxFormat | None = None
    """Default: what the kind of file means (docs/inputs.md): xyxy for tables, xywh for COCO files."""
    box_frame: BoxFrame = "upright"
    """`upright`: boxes are in the picture as people see it (EXIF applied); `stored`: as the file has it."""
    columns: dict[str, str] = {}
    """Where a table has other column names: our name (such as image_uri) to the table's."""
    image_root: str | None = None
    """Folder or prefix that relative uris and COCO file names start from; null: the folder of their table."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first N images in the order of their ids."""
    draft_jpeg: bool = False
    """Decode a JPEG at half, quarter or eighth size where that is still enough: quicker, other masks."""
    tar_ids: Literal["member", "key", "shard"] = "member"
    """What images in tars are called: their name in the tar, that up to its first dot, or tar and name."""
    allow_unmatched: bool = False
    """Leave out boxes whose image is not listed, instead of refusing the job."""
    allow_roots: list[str] = []
    """Further local folders that image uris may point into."""
    allow_schemes: list[str] = []
    """Further uri schemes, such as https; s3, gs, az, abfs and hf are allowed anyway."""


class ModelSection(_Section):
    """The checkpoint, and what the model is asked for; all of it changes masks."""

    checkpoint: str | None = None
    """File, folder, uri, hub id, or `demo` for the small model that comes with hqlabel."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the hardware multiplies it natively, else float32; resolved once per job."""
    images_per_call: int = Field(default=1, ge=1)
    """Images in one encoder call."""
    boxes_per_call: int | None = Field(default=None, ge=1)
    """Boxes in one decoder call, the last one padded; null: 2 on a CPU, 16 on a GPU, chosen once per job."""
    multimask: Literal["single", "best"] = "single"
    """single: SAM's single-mask output, as HQ-SAM was measured; best: the best-scored of three."""
    hq_token_only: bool = False
    """True leaves SAM's own mask logits out of the sum."""
    stability_offset: Number = Field(default=1.0, gt=0)
    """Logit offset of stability_score."""
    compile: bool = False
    """On GPUs: compile the model's calls and record them as CUDA graphs; a process begins minutes later."""
    cpu_threads: int = Field(default=1, ge=1)
    """Without GPUs: threads of a model process. As many processes of one thread do more, where they fit."""


class DetectorSection(_Section):
    """The detector that finds the boxes, where none are given (docs/detectors.md)."""

    name: str | None = None
    """`hf:ID_OR_FOLDER`, `hf-zero-shot:ID_OR_FOLDER`, or your own class as `module:Class`."""
    prompts: dict[str, str] = {}
    """What a zero-shot detector looks for: text to the name of its category."""
    longest_side: int = Field(default=1333, ge=16)
    """The detector is shown the upright picture with no side longer than this; none is enlarged."""
    score_threshold: Share = 0.3
    """Only boxes that score over this count; the others leave no row."""
    max_detections: int = Field(default=100, ge=1)
    """The best so many boxes of an image count."""
    images_per_call: int = Field(default=1, ge=1)
    """Pictures in one call; the last call is filled up to it."""
    options: dict[str, Any] = {}
    """Keyword arguments for your own class; no secrets."""


class BoxesSection(_Section):
    """Which boxes, given or detected, get no mask; each keeps its row with the reason."""

    min_score: Number | None = None
    """Boxes with a lower score get none (box_score); one without a score does."""
    top_k: int | None = Field(default=None, ge=1)
    """Only the best-scored so many of an image get one (else box_rank)."""
    nms_mode: Literal["none", "class", "all"] = "none"
    """Of two boxes that overlap the lower-scored gets none (nms): within one class, or over all classes."""
    nms_iou: Share = 0.7
    """IoU of two boxes over which `nms_mode` leaves one out."""
    min_side_px: Number = Field(default=0.0, ge=0)
    """Boxes with a shorter side get none (box_small); upright pixels, before `expand`."""
    expand: Number = Field(default=0.0, ge=0, le=1)
    """Each side of a prompt is moved out by this share of the box's width or height, inside the picture."""


class FilterSection(_Section):
    """What is marked as not accepted when tables are published; nothing is ever deleted."""

    min_predicted_iou: Share | None = None
    """Masks below this are marked; null: no such filter."""
    min_stability_score: Share | None = None
    """Masks whose edge moves more than this with the threshold are marked."""
    min_detector_score: Number | None = None
    """Boxes with a lower score of the detector are marked; one without a score never is."""
    min_box_iou: Share | None = None
    """Masks whose tight box agrees less with the prompt box are marked."""
    min_area_px: int | None = Field(default=None, ge=0)
    """Masks of fewer pixels are marked."""
    nms_mode: Literal["none", "class", "all"] = "none"
    """Mark the worse of two masks that overlap: within one class, or over all classes."""
    nms_iou: Share = 0.7
    """IoU of two masks over which `nms_mode` marks the worse."""


class OutputSection(_Section):
    """Where the labels go."""

    uri: str | None = None
    """A folder or prefix that belongs to this job alone."""
    images_per_unit: int = Field(default=64, ge=1, le=4096)
    """Images a unit of work and a commit; a decoded unit near 150 MB is good."""


class LimitsSection(_Section):
    """Bounds on one image and on the job."""

    max_image_bytes: int = Field(default=256 * 2**20, ge=1)
    """A larger object fails (too_many_bytes) before it is downloaded."""
    max_image_pixels: int = Field(default=89_478_485, ge=1)
    """A picture of more pixels fails (too_large) before it is decoded."""
    max_boxes_per_image: int = Field(default=10_000, ge=1)
    """Boxes that one image may have."""
    fetch_timeout_s: Number = Field(default=60.0, gt=0)
    """Seconds for one object, all retries together (fetch_timeout)."""
    decode_timeout_s: Number = Field(default=60.0, gt=0)
    """Seconds for decoding one picture (timeout)."""
    segment_timeout_s: Number = Field(default=300.0, gt=0)
    """Seconds for the masks of one image (timeout)."""
    decode_memory_bytes: int = Field(default=4 * 2**30, ge=2**20)
    """Memory of the process that decodes one picture (out_of_memory)."""
    max_failure_rate: Share = 0.05
    """More failed images than this share end the job with exit code 3."""
    failure_rate_from_images: int = Field(default=1, ge=1)
    """The share is judged from this many images on."""


class ClusterSection(_Section):
    """The machines; may change between resumes."""

    ray_address: str | None = None
    """A running cluster (host:port); null: a private Ray on this machine. Also from RAY_ADDRESS."""
    actors: int | None = Field(default=None, ge=1)
    """Model processes; null: one a GPU, or one a core."""
    actors_min: int | None = Field(default=None, ge=1)
    """Let the pool begin with fewer than `actors` and grow; null: the same as `actors`."""
    gpus_per_actor: Number | None = Field(default=None, ge=0, le=1)
    """Share of a GPU for a model process; null: 1 where the cluster has GPUs, else 0."""
    cpus_per_actor: Number | None = Field(default=None, gt=0)
    """CPU cores for a model process; null: chosen from the machine. Its threads are `model.cpu_threads`."""
    decode_cpus: Number | None = Field(default=None, gt=0)
    """CPU cores for a task that fetches and decodes one unit; null: chosen from the machine."""
    wait_for_nodes_s: Number = Field(default=0.0, ge=0)
    """How long the nodes that an autoscaler brings may take at the start."""
    cpus: int | None = Field(default=None, ge=1)
    """Cores of the private local Ray; null: all this process may use."""
    shared_paths: bool = False
    """Local paths are one shared folder on every node; else several nodes refuse a local output."""

    @model_validator(mode="after")
    def _pool(self) -> ClusterSection:
        if self.actors is not None and self.actors_min is not None and self.actors_min > self.actors:
            raise ValueError(f"actors_min {self.actors_min} is more than actors {self.actors}")
        return self


class CostSection(_Section):
    """What the machines cost; only plan and report use it, and only to say it."""

    usd_per_gpu_hour: Number | None = Field(default=None, ge=0)
    """Price of one model process's device for an hour; null: no money is named."""


class Config(_Section):
    """A whole job."""

    version: Literal[1] = 1
    input: InputSection = InputSection()
    model: ModelSection = ModelSection()
    detector: DetectorSection = DetectorSection()
    boxes: BoxesSection = BoxesSection()
    filter: FilterSection = FilterSection()
    output: OutputSection = OutputSection()
    limits: LimitsSection = LimitsSection()
    cluster: ClusterSection = ClusterSection()
    cost: CostSection = CostSection()
    storage: dict[str, dict[str, Any]] = {}
    """fsspec options by uri scheme, such as s3: {endpoint_url: ...}; no secrets."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a command was given: a YAML file, flags by dotted name (None: not given), `a.b=value` texts."""

    path: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    sets: Sequence[str] = ()

    def load(self, saved: str | None = None) -> Config:
        """The configuration: the saved one of a job (YAML), then the file, then flags, then `--set`.

        Raises `UsageError` with every mistake named.
        """
        tree = _parse_yaml(saved, "the saved configuration") if saved else {}
        _merge(tree, read_yaml(self.path) if self.path else {})
        given = {name: value for name, value in self.flags.items() if value is not None}
        for name, value in given.items():
            _put(tree, name, value, origin="a flag")
        for name, value in map(parse_set, self.sets):
            if given.get(name, value) != value:
                raise UsageError(
                    f"--set {name}={value} contradicts the flag that gives {given[name]!r}; keep one"
                )
            _put(tree, name, value, origin="--set")
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            raise UsageError(_explain(error)) from None


def load_config(
    path: str | None, *, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> Config:
    """The configuration from a YAML file (or none), then flags by dotted name, then `a.b=value` texts."""
    return Given(path=path, flags=flags or {}, sets=sets).load()


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a local YAML file. Raises `UsageError` naming the file, the line and the fault."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--config {path}: cannot be read: {reason}") from None
    return _parse_yaml(text, f"--config {path}")


def _parse_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: not valid YAML: {_one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        found = type(tree).__name__
        raise UsageError(f"{name}: wanted `name: value` lines at the top, found a {found}")
    return tree


def parse_prompts(text: str | None) -> dict[str, str] | None:
    """`person; red car` as {"person": "person", "red car": "red car"}; None for None."""
    if text is None:
        return None
    prompts = [one.strip() for one in text.split(";") if one.strip()]
    if not prompts:
        raise UsageError(f"--prompts {text!r}: wanted words parted by ';', such as 'person; red car'")
    return {prompt: prompt for prompt in prompts}


def parse_set(text: str) -> tuple[str, Any]:
    """The dotted name and the YAML-typed value of one `--set a.b=v`."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {text!r}: wanted name=value, such as --set model.dtype=float32")
    try:
        return name.strip(), yaml.safe_load(value) if value else None
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text!r}: the value is not valid YAML: {_one_line(error)}") from None


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `--config` reads back to an equal `Config`."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True, default_flow_style=False)
    return f"# the resolved configuration of this job; `hqlabel label --config` reads it\n{text}"


def known_names() -> list[str]:
    """Every dotted name of the configuration, in the order of the sections."""
    return list(_names(Config, ""))


def _names(model: type[BaseModel], prefix: str) -> list[str]:
    names: list[str] = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        names += _names(kind, f"{prefix}{name}.") if nested else [prefix + name]  # type: ignore[arg-type]
    return names


def _merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Put `over` into `tree`: sections are merged name by name, anything else is replaced."""
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value


def _put(tree: dict[str, Any], name: str, value: Any, *, origin: str) -> None:
    *folders, leaf = name.split(".")
    for folder in folders:
        inner = tree.get(folder)
        if inner is None:
            inner = tree[folder] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"{origin}: {name} cannot be set, because {folder} is the value {inner!r}")
        tree = inner
    tree[leaf] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, known_names(), n=1, cutoff=0.6)
            lines.append(f"{name}: no such name" + (f"; did you mean {near[0]}?" if near else ""))
        else:
            found = "" if item["type"] == "value_error" else f" (found {item['input']!r})"
            wanted = _SECTION if item["type"] == "model_type" else item["msg"]
            lines.append(f"{name}: {wanted.removeprefix('Value error, ')}{found}")
    return "configuration: " + "; ".join(dict.fromkeys(lines))


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key written twice: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"the name {key!r} is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_SECTION = "wanted a section of `name: value` lines"
BOX_FORMATS: tuple[str, ...] = get_args(BoxFormat)
BOX_FRAMES: tuple[str, ...] = get_args(BoxFrame)
