"""The options of the command line that several commands share, each with its help text.

It imports nothing slow, as all that `--help` needs: no settings, no YAML.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from hqlabel.pipeline.errors import UsageError

_INPUT, _RUN, _SHARED = "Input and output", "Running", "Every command"


def parse_prompts(text: str | None) -> dict[str, str] | None:
    """Return `person; red car` as {"person": "person", "red car": "red car"}; None for None."""
    if text is None:
        return None
    prompts = [prompt.strip() for prompt in text.split(";") if prompt.strip()]
    if not prompts:
        raise UsageError(f"--prompts {text!r}: wanted words separated by ';', such as 'person; red car'")
    return {prompt: prompt for prompt in prompts}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """An option for a setting. `name`: of the option; `setting`: dotted; `read`: from its text to a value."""

    name: str
    setting: str = ""
    help: str
    metavar: str | None = None
    kind: Any = str | None
    panel: str = _INPUT
    short: tuple[str, ...] = ()
    least: int | None = None
    read: Callable[[str | None], Any] | None = None

    @property
    def parameter(self) -> inspect.Parameter:
        """The parameter of a command that Typer makes the option of."""
        option = typer.Option(
            self.name,
            *self.short,
            metavar=self.metavar,
            min=self.least,
            help=self.help,
            rich_help_panel=self.panel,
            show_default=False,
        )
        return inspect.Parameter(
            self.name.removeprefix("--").replace("-", "_"),
            inspect.Parameter.KEYWORD_ONLY,
            default=False if self.kind is bool else None,
            annotation=Annotated[self.kind, option],
        )


OUTPUT = Flag(
    name="--output",
    short=("-o",),
    setting="output.uri",
    metavar="PLACE",
    help="Folder or prefix (s3://bucket/labels/) that belongs to this job alone.",
)
CHECKPOINT = Flag(
    name="--checkpoint",
    setting="model.checkpoint",
    metavar="WEIGHTS",
    help="SAM-HQ weights: a file (.pth, .safetensors), a folder, an s3:// uri, a hub id such as "
    "syscv-community/sam-hq-vit-base, or demo for the small model that comes with hqlabel.",
)
RAY_ADDRESS = Flag(
    name="--ray-address",
    setting="cluster.ray_address",
    metavar="HOST:PORT",
    panel=_RUN,
    help="host:port of a running Ray cluster (RAY_ADDRESS does the same), or local. "
    "Without it: a private Ray on this machine.",
)
DETECTOR = (
    Flag(
        name="--detector",
        setting="detector.name",
        metavar="NAME",
        help="Instead of --boxes: find them in the same job. hf:ID_OR_FOLDER (RT-DETR, D-FINE, DETR ...), "
        "hf-zero-shot:ID_OR_FOLDER with --prompts (Grounding DINO ...), or your own module:Class.",
    ),
    Flag(
        name="--prompts",
        setting="detector.prompts",
        metavar="TEXT",
        help="What a zero-shot detector searches for, such as 'person; red car' (with other category names: "
        "--set 'detector.prompts={red car: vehicle}').",
        read=parse_prompts,
    ),
)
ROOTS = (
    Flag(
        name="--allow-root",
        setting="input.allow_roots",
        metavar="FOLDER",
        kind=list[str] | None,
        help="A further local folder that image uris may point into. May be repeated.",
    ),
    Flag(
        name="--allow-scheme",
        setting="input.allow_schemes",
        metavar="SCHEME",
        kind=list[str] | None,
        help="A further kind of uri, such as https. May be repeated.",
    ),
)
"""What pictures may be read; never taken from an output."""
JOB = (
    Flag(
        name="--images",
        setting="input.images",
        metavar="PLACE",
        help="Folder, prefix (s3://bucket/photos/), glob in quotes, one picture, table of uris "
        "(Parquet, CSV, JSONL), COCO instances JSON, WebDataset tars or Hugging Face Parquet. May be left "
        "out when the boxes name the images.",
    ),
    Flag(
        name="--boxes",
        setting="input.boxes",
        metavar="PLACE",
        help="A detector's boxes: table (Parquet, CSV, JSONL; one row an image or a box), COCO results or "
        "instances, MegaDetector JSON, YOLO folder, tars, Hugging Face Parquet, or an earlier output.",
    ),
    *DETECTOR,
    CHECKPOINT,
    OUTPUT,
    Flag(
        name="--limit",
        setting="input.limit",
        metavar="N",
        kind=int | None,
        least=1,
        help="Only the first N images in the order of their ids: a cheap first test.",
    ),
    Flag(
        name="--box-format",
        setting="input.box_format",
        metavar="FORMAT",
        help="How four numbers are meant: xyxy, xywh or cxcywh, or one of these with -normalised, such as "
        "xyxy-normalised. Default: xyxy in tables, xywh in COCO.",
    ),
    Flag(
        name="--box-frame",
        setting="input.box_frame",
        metavar="FRAME",
        help="upright or stored: is the box measured in the picture as it is viewed (EXIF rotation "
        "applied; default), or as the file stores it?",
    ),
    *ROOTS,
    Flag(
        name="--allow-unmatched",
        setting="input.allow_unmatched",
        kind=bool | None,
        help="Skip boxes whose image is not listed, instead of refusing the job.",
    ),
    RAY_ADDRESS,
)
"""The flags of `label` and `plan`."""
FILTERS = tuple(
    Flag(
        name=f"--{name}",
        setting=f"filter.{name.replace('-', '_')}",
        kind=float | None,
        panel="Options",
        help="Mark masks with a lower score.",
    )
    for name in ("min-predicted-iou", "min-stability-score")
)
SHARED = (
    Flag(
        name="--config",
        short=("-c",),
        metavar="FILE",
        panel=_SHARED,
        help="YAML file with settings; flags and --set go before it. docs/configuration.md lists them.",
    ),
    Flag(
        name="--set",
        metavar="NAME=VALUE",
        kind=list[str] | None,
        panel=_SHARED,
        help="name=value for any setting, such as model.dtype=float32. May be repeated.",
    ),
    Flag(name="--json", kind=bool, panel=_SHARED, help="One JSON object on stdout."),
    Flag(name="--verbose", short=("-v",), kind=bool, panel=_SHARED, help="Show where an error arose."),
)
"""The flags of every command, which are no settings."""
Slice = Annotated[
    str | None,
    typer.Option(
        "--slice",
        metavar="I/N",
        help="2/4: do the second of four parts of the plan. Several drivers share a very large job this way.",
        rich_help_panel=_RUN,
    ),
]
NoProgress = Annotated[
    bool, typer.Option("--no-progress", help="No progress lines on stderr.", rich_help_panel=_RUN)
]
CheckInputs = Annotated[
    bool,
    typer.Option(
        "--check-inputs",
        help="On a resume, list the images and read the boxes again, and refuse when anything changed.",
        rich_help_panel=_RUN,
    ),
]
AcceptChangedInputs = Annotated[
    bool,
    typer.Option(
        "--accept-changed-inputs",
        help="When boxes or images changed: keep the rows of unchanged images, do changed and new ones.",
        rich_help_panel=_RUN,
    ),
]
Where = Annotated[
    str | None,
    typer.Option(
        "--where",
        metavar="SQL",
        help='Only instances for which this holds, such as "predicted_iou > 0.8 AND area > 100". Any column '
        "of instances/ may be used.",
    ),
]
AcceptedOnly = Annotated[
    bool, typer.Option("--accepted-only", help="Only instances that the job's filters accepted.")
]
