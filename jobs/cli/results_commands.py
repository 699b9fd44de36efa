"""The commands over what a job has made: tables, checks, pictures, exports, figures; and `doctor`.

A command reads its options and calls the module of its name, which is imported when the command runs: Ray
and torch cost seconds, `--help` must not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hqlabel.jobs.cli import options
from hqlabel.jobs.cli.app import app, command, interrupts
from hqlabel.jobs.cli.options import CHECKPOINT, DETECTOR, FILTERS, OUTPUT, RAY_ADDRESS, ROOTS
from hqlabel.pipeline.errors import UsageError

if TYPE_CHECKING:
    from hqlabel.jobs.load_config import ConfigSources

_FORMATS = """\b
coco          RLE, for most trainers
yolo-seg      polygons, for Ultralytics
cvat          CVAT for images 1.1
labelme       a JSON for each image
png           indexed, as Pascal VOC
webdataset    tars for streaming
label-studio  tasks with brushes
hf            Hugging Face datasets"""


@app.command(rich_help_panel="Results")
@command(OUTPUT, *FILTERS, RAY_ADDRESS)
def publish(
    given: ConfigSources,
    json: bool,
    *,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="OUTPUT", help="The output; with --merge: further ones to merge."),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            "--merge",
            metavar="OUTPUT",
            help="Write the tables of these outputs as one into --output, a new folder: --merge A B C. "
            "Of an image that several have, the newest row holds.",
        ),
    ] = None,
) -> int:
    """Write the tables again with other filters, or merge outputs; no model runs.

    Example:  hqlabel publish out --min-predicted-iou 0.8

    Example:  hqlabel publish --output all --merge monday tuesday

    Nothing is deleted: a filter marks rows (accepted, reject_reason). All filters: --set filter.NAME=VALUE.
    """
    if more and len(more) == 1 and not merge:
        given, more = options.with_output(given, more[0]), None
    given.load()  # report what is wrong with the call before the slow imports below
    if merge:
        if any(given.flags[flag.setting] is not None for flag in FILTERS):
            raise UsageError("--merge takes the marks as they are; publish each output with the filter first")
        from hqlabel.jobs.commands.merge import run as merge_outputs

        return merge_outputs(given, [*merge, *(more or ())], interrupts, json=json)
    if more:
        raise UsageError(
            f"publish {' '.join(more)}: wanted --output OUTPUT, or --merge before several outputs"
        )
    from hqlabel.jobs.commands.publish import run

    return run(given, interrupts, json=json)


@app.command(rich_help_panel="Results")
@command(OUTPUT)
def validate(
    given: ConfigSources,
    json: bool,
    *,
    place: options.OutputWord = None,
    sample: Annotated[
        int,
        typer.Option("--sample", min=0, help="Decode this many masks of every part; all sums are checked."),
    ] = 64,
    all_masks: Annotated[bool, typer.Option("--all-masks", help="Decode every mask.")] = False,
) -> int:
    """Read everything again and check it; finds one flipped bit.

    Exit code 0: sound; 6: damage, named on stderr.

    Example:  hqlabel validate out
    """
    given = options.with_output(given, place)
    from hqlabel.jobs.commands.validate import run

    return run(given, sample=None if all_masks else sample, json=json)


@app.command(rich_help_panel="Results")
@command(OUTPUT, *ROOTS)
def inspect(
    given: ConfigSources,
    json: bool,
    *,
    words: Annotated[
        list[str], typer.Argument(metavar="[OUTPUT] IMAGE_ID", help="The image_id is as in the tables.")
    ],
    picture: Annotated[
        str | None,
        typer.Option("--picture", help="Where to write the overlay PNG. Default: ID.overlay.png here."),
    ] = None,
) -> int:
    """Show one image: its rows, and a picture with boxes and masks.

    Example:  hqlabel inspect out street/0001.jpg --allow-root photos
    """
    *place, image_id = words
    if len(place) > 1:
        raise UsageError(f"inspect {' '.join(words)}: wanted the output and one image_id")
    given = options.with_output(given, place[0] if place else None)
    from hqlabel.jobs.commands.inspect_image import run

    return run(given, image_id, picture=picture, json=json)


@app.command(rich_help_panel="Results")
@command(OUTPUT, *ROOTS)
def report(
    given: ConfigSources,
    json: bool,
    *,
    place: options.OutputWord = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FILE",
            help="A local file for the page. Default: report/index.html in the output.",
        ),
    ] = None,
) -> int:
    """Make one HTML page: totals, failures, scores, best and worst masks.

    It is made from the published tables and the images, holds its pictures inside, and needs no server.

    Example:  hqlabel report out --allow-root photos
    """
    given = options.with_output(given, place)
    from hqlabel.jobs.report.page import run

    return run(given, to=to, as_json=json)


@app.command(rich_help_panel="Results")
@command(OUTPUT, *ROOTS)
def export(
    given: ConfigSources,
    json: bool,
    *,
    format_: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help=_FORMATS,
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="OUTPUT PLACE", help="Instead of --output and --to.", show_default=False),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="PLACE", help="A new folder or prefix for the files.")
    ] = None,
    where: options.Where = None,
    accepted_only: options.AcceptedOnly = False,
    per_file: Annotated[
        int | None,
        typer.Option(
            "--per-file",
            min=1,
            help="Begin a new file after that many masks (Label Studio: tasks). Bounds the memory.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0,
            metavar="PIXELS",
            help="Of polygons: how far outlines may move to save points. Default: 0.5.",
        ),
    ] = None,
    image_prefix: Annotated[
        str | None,
        typer.Option(
            "--image-prefix",
            metavar="URI",
            help="label-studio: where it finds the images; put before their relative names.",
        ),
    ] = None,
    categories_from_1: Annotated[
        bool,
        typer.Option(
            "--categories-from-1",
            help="coco: number the categories anew from 1, for tools that take 0 for no label (CVAT).",
        ),
    ] = False,
    images: Annotated[
        str | None,
        typer.Option(
            "--images",
            metavar="link|copy",
            help="Put the pictures beside their labels too; --allow-root names their folder.",
        ),
    ] = None,
    polygons: Annotated[
        bool, typer.Option("--polygons", help="cvat, labelme: polygons to edit instead of whole masks.")
    ] = False,
    subset: Annotated[
        str | None,
        typer.Option(
            "--subset",
            metavar="NAME",
            help="coco: in folders as Datumaro and CVAT import them, under this name, such as default.",
        ),
    ] = None,
    val: Annotated[
        float,
        typer.Option(
            "--val", metavar="SHARE", help="yolo-seg: hold back this share of the images, such as 0.1."
        ),
    ] = 0.0,
) -> int:
    """Write the masks for a trainer or an annotation tool.

    Example:  hqlabel export coco out out-coco --accepted-only

    Example:  hqlabel export png out voc --images link --allow-root photos

    Every format says what it skips and loses: yolo-seg, png and --polygons some pixels, the others none.
    """
    given, to = _output_and_place(given, words or [], to)
    from hqlabel.jobs.export.export import ExportOptions, run
    from hqlabel.jobs.results.select_rows import Selection

    chosen = ExportOptions(
        format=format_,
        to=to,
        selection=Selection(accepted_only=accepted_only, where=where),
        per_file=per_file,
        tolerance_px=tolerance,
        image_prefix=image_prefix,
        categories_from_1=categories_from_1,
        images=images,
        polygons=polygons,
        subset=subset,
        val=val,
        json=json,
    )
    return run(given, chosen)


def _output_and_place(given: ConfigSources, words: list[str], to: str | None) -> tuple[ConfigSources, str]:
    """Return what was given with the output, and the place; words fill what no flag names, in this order."""
    left = list(words)
    if left and given.flags.get(OUTPUT.setting) is None:
        given = options.with_output(given, left.pop(0))
    if left and to is None:
        to = left.pop(0)
    if left or to is None:
        wrong = f"{left[0]} is one word too many" if left else "the place for the files is missing"
        raise UsageError(
            f"export: {wrong}; wanted FORMAT OUTPUT PLACE, as in: hqlabel export coco out out-coco"
        )
    return given, to


@app.command(rich_help_panel="Results")
@command(OUTPUT)
def evaluate(
    given: ConfigSources,
    json: bool,
    *,
    place: options.OutputWord = None,
    truth: Annotated[
        str,
        typer.Option("--truth", metavar="PLACE", help="COCO instances JSON with masks: polygons or runs."),
    ],
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
        int, typer.Option("--max-per-image", min=10, help="Masks of an image and class that count for AP.")
    ] = 100,
    where: options.Where = None,
    accepted_only: options.AcceptedOnly = False,
) -> int:
    """Measure the masks against ground truth: AP, boundary AP, mean IoU.

    Prompts and objects are matched by box_id when the boxes came from the truth's own file, else by their
    boxes. Images of the truth that the job never had do not count. Needs the extra `eval`.

    Example:  hqlabel evaluate out --truth instances_val.json
    """
    given = options.with_output(given, place)
    from hqlabel.jobs.evaluate.evaluate import EvaluateOptions, run
    from hqlabel.jobs.results.select_rows import Selection

    chosen = EvaluateOptions(
        truth=truth,
        selection=Selection(accepted_only=accepted_only, where=where),
        score=score,
        class_agnostic=class_agnostic,
        max_per_image=max_per_image,
        json=json,
    )
    return run(given, chosen)


@app.command(rich_help_panel="Results")
@command(OUTPUT)
def clean(
    given: ConfigSources,
    json: bool,
    *,
    place: options.OutputWord = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only list what would go.")] = False,
) -> int:
    """Delete the working files of a finished job; the tables stay.

    Example:  hqlabel clean out --yes

    Afterwards the tables can be read and validated, but no longer be retried or published anew.
    Needs the right to delete; no other command does.
    """
    given = options.with_output(given, place)
    from hqlabel.jobs.commands.clean import run

    return run(given, interrupts, sure=yes, json=json)


@app.command(rich_help_panel="This machine")
@command(CHECKPOINT, *DETECTOR, OUTPUT, RAY_ADDRESS)
def doctor(
    given: ConfigSources,
    json: bool,
    *,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Do not start or join Ray.")] = False,
) -> int:
    """Check this machine: versions, devices, weights, rights, Ray.

    Example:  hqlabel doctor --checkpoint demo --output s3://bucket/labels
    """
    settings = given.load()
    from hqlabel.jobs.commands.doctor import USES, run
    from hqlabel.jobs.job_setup.saved_job import refuse_unused

    refuse_unused(given, "doctor", USES)

    return run(settings, with_ray=not no_ray, json=json)
