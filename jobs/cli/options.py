"""The options of the command line that several commands share, each with its help text.

It imports nothing slow, as all that `--help` needs: no settings, no YAML.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hqlabel.pipeline.errors import UsageError

if TYPE_CHECKING:
    from hqlabel.jobs.load_config import ConfigSources

_INPUT, _RUN, _SHARED = "Input and output", "Running", "Every command"


def parse_prompts(text: str | None) -> dict[str, str] | None:
    """Return `person; red car` as {"person": "person", "red car": "red car"}; None for None."""
    if text is None:
        return None
    prompts = [prompt.strip() for prompt in text.split(";") if prompt.strip()]
    if not prompts:
        raise UsageError(f"--prompts {text!r}: wanted words separated by ';', such as 'person; red car'")
    return {prompt: prompt for prompt in prompts}


def parse_device(text: str | None) -> float | None:
    """Return the GPUs of a model process on this kind of device; None for None."""
    if text is None:
        return None
    gpus = {"cpu": 0.0, "cuda": 1.0, "gpu": 1.0}.get(text)
    if gpus is None:
        raise UsageError(f"--device {text}: wanted cpu or cuda; shares of a GPU: cluster.gpus_per_actor")
    return gpus


@dataclass(frozen=True, kw_only=True)
class Flag:
    """An option for a setting. `name`: of the option; `setting`: dotted; `read`: from its text to a value.

    `rare`: shown by `--help-all` alone.
    """

    name: str
    setting: str = ""
    help: str
    metavar: str | None = None
    kind: Any = str | None
    panel: str = _INPUT
    short: tuple[str, ...] = ()
    least: int | None = None
    rare: bool = False
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
            hidden=self.rare,
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
    help="Folder or s3://prefix/ of this job alone.",
)
CHECKPOINT = Flag(
    name="--checkpoint",
    setting="model.checkpoint",
    metavar="WEIGHTS",
    help="SAM-HQ weights: file, folder, uri, hub id; demo: the small model of hqlabel.",
)
RAY_ADDRESS = Flag(
    name="--ray-address",
    rare=True,
    setting="cluster.ray_address",
    metavar="HOST:PORT",
    panel=_RUN,
    help="Ray cluster to join (or RAY_ADDRESS), or local. Default: a private Ray here.",
)
WORKERS = Flag(
    name="--workers",
    setting="cluster.actors",
    metavar="N",
    kind=int | None,
    least=1,
    panel=_RUN,
    help="Model processes. Default: one a GPU or core.",
)
DEVICE = Flag(
    name="--device",
    setting="cluster.gpus_per_actor",
    metavar="KIND",
    panel=_RUN,
    help="cpu or cuda. Default: cuda where it is.",
    read=parse_device,
)
DETECTOR = (
    Flag(
        name="--detector",
        setting="detector.name",
        metavar="NAME",
        help="Instead of --boxes: hf:ID, hf-zero-shot:ID (with --prompts) or your module:Class.",
    ),
    Flag(
        name="--prompts",
        rare=True,
        setting="detector.prompts",
        metavar="TEXT",
        help="What a zero-shot detector searches for: 'person; red car'.",
        read=parse_prompts,
    ),
)
ROOTS = (
    Flag(
        name="--allow-root",
        setting="input.allow_roots",
        metavar="FOLDER",
        kind=list[str] | None,
        help="A further folder that images may lie in.",
    ),
    Flag(
        name="--allow-scheme",
        rare=True,
        setting="input.allow_schemes",
        metavar="SCHEME",
        kind=list[str] | None,
        help="A further kind of uri, such as https.",
    ),
)
"""What pictures may be read; never taken from an output."""
JOB = (
    Flag(
        name="--images",
        setting="input.images",
        metavar="PLACE",
        help="Folder, s3://prefix/, glob in quotes, table, tars or COCO. Not needed when the boxes name "
        "them. docs/inputs.md has all kinds.",
    ),
    Flag(
        name="--boxes",
        setting="input.boxes",
        metavar="PLACE",
        help="CSV, JSONL, Parquet, COCO, MegaDetector, YOLO folder or an earlier output.",
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
        help="Only the first N images, to try.",
    ),
    Flag(
        name="--box-format",
        rare=True,
        setting="input.box_format",
        metavar="FORMAT",
        help="How four numbers are meant: xyxy, xywh or cxcywh, or one of these with -normalised, such as "
        "xyxy-normalised. Default: xyxy in tables, xywh in COCO.",
    ),
    Flag(
        name="--box-frame",
        rare=True,
        setting="input.box_frame",
        metavar="FRAME",
        help="upright or stored: is the box measured in the picture as it is viewed (EXIF rotation "
        "applied; default), or as the file stores it?",
    ),
    *ROOTS,
    Flag(
        name="--allow-unmatched",
        rare=True,
        setting="input.allow_unmatched",
        kind=bool | None,
        help="Skip boxes whose image is not listed, instead of refusing the job.",
    ),
    Flag(
        name="--min-score",
        setting="boxes.min_score",
        metavar="SCORE",
        kind=float | None,
        help="Boxes with a lower score get no mask.",
    ),
    DEVICE,
    Flag(
        name="--dtype",
        setting="model.dtype",
        metavar="FORMAT",
        panel=_RUN,
        help="float32, bfloat16 or auto: the faster.",
    ),
    Flag(
        name="--batch",
        setting="model.images_per_call",
        metavar="N",
        kind=int | None,
        least=1,
        panel=_RUN,
        help="Images in one call of the model. Default: 1.",
    ),
    WORKERS,
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
        help="Settings, as hqlabel config prints them.",
    ),
    Flag(
        name="--set",
        metavar="NAME=VALUE",
        kind=list[str] | None,
        panel=_SHARED,
        help="Any setting, such as boxes.top_k=5.",
    ),
    Flag(name="--json", kind=bool, panel=_SHARED, help="One JSON object on stdout."),
    Flag(
        rare=True,
        name="--verbose",
        short=("-v",),
        kind=bool,
        panel=_SHARED,
        help="Show where an error arose.",
    ),
)
"""The flags of every command, which are no settings."""
Slice = Annotated[
    str | None,
    typer.Option(
        "--slice",
        metavar="I/N",
        help="2/4: do the second of four parts of the plan. Several drivers share a very large job this way.",
        rich_help_panel=_RUN,
        hidden=True,
    ),
]
NoProgress = Annotated[
    bool,
    typer.Option("--no-progress", hidden=True, help="No progress lines on stderr.", rich_help_panel=_RUN),
]
CheckInputs = Annotated[
    bool,
    typer.Option(
        "--check-inputs",
        help="On a resume, list the images and read the boxes again, and refuse when anything changed.",
        rich_help_panel=_RUN,
        hidden=True,
    ),
]
AcceptChangedInputs = Annotated[
    bool,
    typer.Option(
        "--accept-changed-inputs",
        help="When boxes or images changed: keep the rows of unchanged images, do changed and new ones.",
        rich_help_panel=_RUN,
        hidden=True,
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


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    """Print the help of a command with its rare options, and end it."""
    if wanted:
        for parameter in ctx.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(ctx.get_help())
        raise typer.Exit


HELP_ALL = inspect.Parameter(
    "help_all",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option("--help-all", callback=_show_all, is_eager=True, help="Show the rarer options too."),
    ],
)
"""The option of every command that shows its rare ones."""
OutputWord = Annotated[
    str | None,
    typer.Argument(metavar="[OUTPUT]", help="The output, instead of --output.", show_default=False),
]


def with_output(given: ConfigSources, word: str | None) -> ConfigSources:
    """Return what was given, with the output named by a word of its own. Raises UsageError for two."""
    if word is None:
        return given
    flag = given.flags.get(OUTPUT.setting)
    if flag not in (None, word):
        raise UsageError(f"{word} and --output {flag} name two outputs; keep one")
    return replace(given, flags={**given.flags, OUTPUT.setting: word})
