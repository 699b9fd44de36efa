"""The commands over what a job has made: tables, checks, pictures, exports, figures.

A command reads its options and calls the module of its name, which is imported when the command runs: Ray
and torch cost seconds, `--help` must not. `verbose` is read by the decorator (`app.command`).
"""
# ruff: noqa: ARG001 - `verbose` is read by the decorator

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli import options
from jobs.cli.app import app, command, given_of, interrupts
from pipeline.errors import UsageError


@app.command(rich_help_panel="Results")
@command
def publish(
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OUTPUT]...", help="With --merge: further outputs.", show_default=False),
    ] = None,
    output: options.Output = None,
    min_predicted_iou: Annotated[
        float | None,
        typer.Option("--min-predicted-iou", help="Mark masks with a lower score.", show_default=False),
    ] = None,
    min_stability_score: Annotated[
        float | None,
        typer.Option("--min-stability-score", help="Mark masks with a lower score.", show_default=False),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            "--merge",
            metavar="OUTPUT",
            help="Write the tables of these outputs as one into --output, a new folder: --merge A B C. "
            "Of an image that several have, the newest row holds.",
            show_default=False,
        ),
    ] = None,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Write the tables again with other filters, or merge outputs; no model runs.

    Example:  hqlabel publish --output out --min-predicted-iou 0.8

    Example:  hqlabel publish --output all --merge monday tuesday

    Nothing is deleted: a filter marks rows (accepted, reject_reason). All filters: --set filter.NAME=VALUE.
    """
    given = given_of(
        config,
        set_,
        output__uri=output,
        filter__min_predicted_iou=min_predicted_iou,
        filter__min_stability_score=min_stability_score,
    )
    given.load()  # what is wrong with the call is said before the imports below
    if merge:
        if min_predicted_iou is not None or min_stability_score is not None:
            raise UsageError("--merge takes the marks as they are; publish each output with the filter first")
        from jobs.commands import merge as merging

        return merging.run(given, [*merge, *(more or ())], json=json)
    if more:
        raise UsageError(
            f"publish {' '.join(more)}: wanted --output OUTPUT, or --merge before several outputs"
        )
    from jobs.commands import publish as job

    return job.run(given, interrupts, json=json)


@app.command(rich_help_panel="Results")
@command
def validate(
    output: options.Output = None,
    sample: Annotated[
        int, typer.Option("--sample", min=0, help="Decode this many masks in every part, besides all sums.")
    ] = 64,
    all_masks: Annotated[bool, typer.Option("--all-masks", help="Decode every mask.")] = False,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Read everything again and check it; finds one flipped bit.

    Exit code 0: sound; 6: damage, named on stderr.

    Example:  hqlabel validate --output out
    """
    settings = given_of(config, set_, output__uri=output).load()
    from jobs.commands import validate as job

    return job.run(settings, sample=None if all_masks else sample, json=json)


@app.command(rich_help_panel="Results")
@command
def inspect(
    image_id: Annotated[
        str, typer.Argument(help="The image_id as it stands in the tables.", show_default=False)
    ],
    output: options.Output = None,
    picture: Annotated[
        str | None,
        typer.Option(
            "--picture",
            help="Where to write the overlay PNG. Default: ID.overlay.png here.",
            show_default=False,
        ),
    ] = None,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Show one image: its rows, and a picture with boxes and masks.

    Example:  hqlabel inspect street/0001.jpg --output out
    """
    from jobs.commands import inspect_image as job

    return job.run(given_of(config, set_, output__uri=output), image_id, picture=picture, json=json)


@app.command(rich_help_panel="Results")
@command
def report(
    output: options.Output = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FILE",
            help="A local file for the page. Default: report/index.html in the output.",
            show_default=False,
        ),
    ] = None,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Make one HTML page to look at: totals, failures, scores, best and worst masks.

    It is made from the published tables and the images, holds its pictures inside, and needs no server.

    Example:  hqlabel report --output out
    """
    from jobs.report import page as job

    return job.run(given_of(config, set_, output__uri=output), to=to, as_json=json)


@app.command(rich_help_panel="Results")
@command
def export(
    format_: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT", help="coco, yolo-seg, label-studio or hf (Hugging Face).", show_default=False
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="PLACE", help="A new folder or prefix for the files.", show_default=False
        ),
    ],
    output: options.Output = None,
    where: options.Where = None,
    accepted_only: options.AcceptedOnly = False,
    per_file: Annotated[
        int | None,
        typer.Option(
            "--per-file",
            min=1,
            help="Begin a new file after so many masks (Label Studio: tasks). Bounds the memory.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", min=0, help="yolo-seg: pixels by which outlines may move to save points."
        ),
    ] = 0.5,
    image_prefix: Annotated[
        str | None,
        typer.Option(
            "--image-prefix",
            metavar="URI",
            help="label-studio: where it finds the images; put before their relative names.",
            show_default=False,
        ),
    ] = None,
    categories_from_1: Annotated[
        bool,
        typer.Option(
            "--categories-from-1",
            help="coco: number the categories anew from 1, for tools that take 0 for no label (CVAT).",
        ),
    ] = False,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Write the masks for a trainer or an annotation tool.

    Example:  hqlabel export coco --output out --to out-coco --accepted-only

    Every format says what it leaves out and what it loses: coco, label-studio and hf keep each mask whole.
    """
    from jobs.export import export as job
    from jobs.results.select_rows import Selection

    how = job.How(
        format=format_,
        to=to,
        selection=Selection(accepted_only=accepted_only, where=where),
        per_file=per_file,
        tolerance_px=tolerance,
        image_prefix=image_prefix,
        categories_from_1=categories_from_1,
        json=json,
    )
    return job.run(given_of(config, set_, output__uri=output), how)


@app.command(rich_help_panel="Results")
@command
def evaluate(
    truth: Annotated[
        str,
        typer.Option(
            "--truth",
            metavar="PLACE",
            help="COCO instances JSON with masks: polygons or runs.",
            show_default=False,
        ),
    ],
    output: options.Output = None,
    score: Annotated[
        str,
        typer.Option(
            "--score",
            help="What ranks masks for AP: product (detector_score x predicted_iou, as published for "
            "SAM-HQ), detector, predicted-iou or stability.",
        ),
    ] = "product",
    class_agnostic: Annotated[bool, typer.Option("--class-agnostic", help="Let classes not count.")] = False,
    max_per_image: Annotated[
        int,
        typer.Option("--max-per-image", min=10, help="Masks of an image and class that count for AP."),
    ] = 100,
    where: options.Where = None,
    accepted_only: options.AcceptedOnly = False,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure the masks against ground truth: AP, boundary AP, mean IoU.

    Prompts and objects are matched by box_id when the boxes came from the truth's own file, else by their
    boxes. Images of the truth that the job never had do not count. Needs the extra `eval`.

    Example:  hqlabel evaluate --truth instances_val.json --output out
    """
    from jobs.evaluate import evaluate as job
    from jobs.results.select_rows import Selection

    how = job.How(
        truth=truth,
        selection=Selection(accepted_only=accepted_only, where=where),
        score=score,
        class_agnostic=class_agnostic,
        max_per_image=max_per_image,
        json=json,
    )
    return job.run(given_of(config, set_, output__uri=output), how)


@app.command(rich_help_panel="Results")
@command
def clean(
    output: options.Output = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only say what would go.")] = False,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Delete the working files of a finished job; the tables stay.

    Example:  hqlabel clean --output out --yes

    Afterwards the tables can be read and validated, but no longer be retried or published anew.
    Needs the right to delete; no other command does.
    """
    settings = given_of(config, set_, output__uri=output).load()
    from jobs.commands import clean as job

    return job.run(settings, interrupts, sure=yes, json=json)
