"""The options of the command line that several commands share, each with the words a newcomer needs."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.config import BOX_FORMATS, BOX_FRAMES

_INPUT, _RUN, _SHARED = "Input and output", "Running", "Every command"

Images = Annotated[
    str | None,
    typer.Option(
        "--images",
        metavar="PLACE",
        help="Folder, prefix (s3://bucket/photos/), glob in quotes, one picture, table of uris "
        "(Parquet, CSV, JSONL), COCO instances JSON, WebDataset tars or Hugging Face Parquet. May be left "
        "out when the boxes name the images.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
Boxes = Annotated[
    str | None,
    typer.Option(
        "--boxes",
        metavar="PLACE",
        help="A detector's boxes: table (Parquet, CSV, JSONL; one row an image or a box), COCO results or "
        "instances, MegaDetector JSON, YOLO folder, tars, Hugging Face Parquet, or an earlier output.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
Detector = Annotated[
    str | None,
    typer.Option(
        "--detector",
        metavar="NAME",
        help="Instead of --boxes: find them in the same job. hf:ID_OR_FOLDER (RT-DETR, D-FINE, DETR ...), "
        "hf-zero-shot:ID_OR_FOLDER with --prompts (Grounding DINO ...), or your own module:Class.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="TEXT",
        help="What a zero-shot detector looks for, such as 'person; red car' (with other category names: "
        "--set 'detector.prompts={red car: vehicle}').",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
BoxFormatOption = Annotated[
    str | None,
    typer.Option(
        "--box-format",
        metavar="FORMAT",
        help=f"How four numbers are meant: {', '.join(BOX_FORMATS)}. Default: xyxy in tables, xywh in COCO.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
BoxFrameOption = Annotated[
    str | None,
    typer.Option(
        "--box-frame",
        metavar="FRAME",
        help=f"{' or '.join(BOX_FRAMES)}: is the box measured in the picture as people see it (EXIF rotation "
        "applied; default), or as the file stores it?",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
AllowRoot = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-root",
        metavar="FOLDER",
        help="A further local folder that image uris may point into. May be repeated.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
AllowScheme = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-scheme",
        metavar="SCHEME",
        help="A further kind of uri, such as https. May be repeated.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
AllowUnmatched = Annotated[
    bool,
    typer.Option(
        "--allow-unmatched",
        help="Leave out boxes whose image is not listed, instead of refusing the job.",
        rich_help_panel=_INPUT,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        metavar="N",
        help="Only the first N images in the order of their ids: a cheap first look.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="WEIGHTS",
        help="SAM-HQ weights: a file (.pth, .safetensors), a folder, an s3:// uri, a hub id such as "
        "syscv-community/sam-hq-vit-base, or demo for the small model that comes with hqlabel.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PLACE",
        help="Folder or prefix (s3://bucket/labels/) that belongs to this job alone.",
        rich_help_panel=_INPUT,
        show_default=False,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT",
        help="host:port of a running Ray cluster (RAY_ADDRESS does the same), or local. "
        "Without it: a private Ray on this machine.",
        rich_help_panel=_RUN,
        show_default=False,
    ),
]
Slice = Annotated[
    str | None,
    typer.Option(
        "--slice",
        metavar="I/N",
        help="2/4: do the second of four parts of the plan. Several drivers share a very large job this way.",
        rich_help_panel=_RUN,
        show_default=False,
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
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="YAML file with settings; flags and --set go before it. docs/configuration.md lists them.",
        rich_help_panel=_SHARED,
        show_default=False,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="name=value for any setting, such as model.dtype=float32. May be repeated.",
        rich_help_panel=_SHARED,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.", rich_help_panel=_SHARED)]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Show where an error arose.", rich_help_panel=_SHARED),
]
Where = Annotated[
    str | None,
    typer.Option(
        "--where",
        metavar="SQL",
        help='Only instances for which this holds, such as "predicted_iou > 0.8 AND area > 100". Any column '
        "of instances/ may stand in it.",
        show_default=False,
    ),
]
AcceptedOnly = Annotated[
    bool, typer.Option("--accepted-only", help="Only instances that the job's filters accepted.")
]
