"""The command line: `hqlabel COMMAND`, also `python -m jobs COMMAND`.

Stdout is data, stderr is for people. Exit codes: 0 complete, 1 a bug, 2 usage or configuration,
3 complete but over the failure budget, 4 refused before work, 5 stopped by a fault of the
surroundings, 6 damage found, 130 interrupted. After 5 and 130 the same command goes on.

Every command takes `verbose` for the decorator that reports its errors. A command's module is imported
when the command runs: Ray and torch cost seconds, `--help` must not.
"""
# ruff: noqa: ARG001 - `verbose` is read by the decorator

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec

import typer

from jobs import console, options
from jobs.config import Given, parse_prompts
from jobs.environment import make_private, refuse_dangerous_switches
from jobs.interrupts import Interrupted, Interrupts, end_now
from jobs.slices import parse_slice
from pipeline.errors import HqlabelError, UsageError
from pipeline.native import prepare_for_torch

P = ParamSpec("P")

EXIT_BUG = 1
_EPILOG = (
    "Exit codes: 0 complete, 2 usage, 3 over the failure budget, 4 refused before work, 5 stopped by a fault "
    "(start again: it resumes), 6 damage found, 130 interrupted (start again: it resumes)."
)

app = typer.Typer(
    name="hqlabel",
    help="Detector boxes in, SAM-HQ masks out: a job that can be killed and simply started again.\n\n"
    "Begin with:  hqlabel label --images photos/ --boxes boxes.json --checkpoint demo --output out",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
interrupts = Interrupts()


def main() -> None:
    """Run the command line of this process and end it with the command's exit code."""
    interrupts.install()
    make_private()
    prepare_for_torch(os.environ)  # no command has loaded torch yet
    try:
        app()
    except Interrupted:
        _end_interrupted()


def command(function: Callable[P, int]) -> Callable[P, None]:
    """A command whose result is its exit code, with every error turned into a sentence and a code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        verbose = bool(kwargs.get("verbose"))
        try:
            refuse_dangerous_switches(os.environ)
            code = function(*args, **kwargs)
        except Interrupted:
            _end_interrupted()
        except HqlabelError as error:
            code = _explain(error, verbose)
        except Exception as error:
            code = _report_bug(error)
        raise typer.Exit(code)

    return run


def _end_interrupted() -> None:
    interrupts.give_back()
    console.say("interrupted; what is committed is safe, the same command goes on from there")
    end_now()


def _explain(error: HqlabelError, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    console.say(f"hqlabel: {error}")
    if error.exit_code == 5:
        console.say("hqlabel: stopped; what is committed is safe, the same command goes on from there")
    return error.exit_code


def _report_bug(error: Exception) -> int:
    traceback.print_exception(error)
    console.say("hqlabel: this is a bug in hqlabel; what is committed is safe. Please report the lines above")
    return EXIT_BUG


def _given(path: str | None, sets: list[str] | None, **flags: Any) -> Given:
    """What was given, with flags named by their setting, `__` in place of the dot."""
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return Given(path=path, flags=named, sets=tuple(sets or ()))


@app.command(rich_help_panel="Labelling")
@command
def label(
    images: options.Images = None,
    boxes: options.Boxes = None,
    detector: options.Detector = None,
    prompts: options.Prompts = None,
    checkpoint: options.Checkpoint = None,
    output: options.Output = None,
    limit: options.Limit = None,
    box_format: options.BoxFormatOption = None,
    box_frame: options.BoxFrameOption = None,
    allow_root: options.AllowRoot = None,
    allow_scheme: options.AllowScheme = None,
    allow_unmatched: options.AllowUnmatched = False,
    ray_address: options.RayAddress = None,
    slice_: options.Slice = None,
    check_inputs: options.CheckInputs = False,
    no_progress: options.NoProgress = False,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Make masks for boxes; start it again to go on after any end.

    Example:  hqlabel label --images photos/ --boxes boxes.json --checkpoint demo --output out

    The output holds instances/ (one row a box) and images/ (one row an image), both Parquet, and a
    picture of some results. Run the same command again after any end: what is done is not done again.
    """
    given = _given(
        config,
        set_,
        input__images=images,
        input__boxes=boxes,
        detector__name=detector,
        detector__prompts=parse_prompts(prompts),
        input__limit=limit,
        input__box_format=box_format,
        input__box_frame=box_frame,
        input__allow_roots=allow_root,
        input__allow_schemes=allow_scheme,
        input__allow_unmatched=allow_unmatched or None,
        model__checkpoint=checkpoint,
        output__uri=output,
        cluster__ray_address=ray_address,
    )
    settings, part = given.load(), parse_slice(slice_)
    from jobs import label as job

    how = job.Run(part=part, check_inputs=check_inputs, progress=not no_progress, json=json)
    return job.run(settings, how, interrupts)


@app.command(rich_help_panel="Labelling")
@command
def plan(
    images: options.Images = None,
    boxes: options.Boxes = None,
    detector: options.Detector = None,
    prompts: options.Prompts = None,
    checkpoint: options.Checkpoint = None,
    output: options.Output = None,
    limit: options.Limit = None,
    box_format: options.BoxFormatOption = None,
    box_frame: options.BoxFrameOption = None,
    allow_root: options.AllowRoot = None,
    allow_scheme: options.AllowScheme = None,
    allow_unmatched: options.AllowUnmatched = False,
    ray_address: options.RayAddress = None,
    sample: Annotated[
        int,
        typer.Option(
            "--sample",
            min=0,
            help="Measure with so many images, the whole way on this machine or cluster, and say hours, "
            "money (cost.usd_per_gpu_hour) and bytes for all. 64 is enough for one device.",
        ),
    ] = 0,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Say what label would do with the same options; write nothing.

    Example:  hqlabel plan --images photos/ --boxes boxes.json --checkpoint demo --sample 64
    """
    given = _given(
        config,
        set_,
        input__images=images,
        input__boxes=boxes,
        detector__name=detector,
        detector__prompts=parse_prompts(prompts),
        input__limit=limit,
        input__box_format=box_format,
        input__box_frame=box_frame,
        input__allow_roots=allow_root,
        input__allow_schemes=allow_scheme,
        input__allow_unmatched=allow_unmatched or None,
        model__checkpoint=checkpoint,
        output__uri=output,
        cluster__ray_address=ray_address,
    )
    settings = given.load()
    from jobs import plan as job

    return job.run(settings, interrupts, sample=sample, json=json)


@app.command(rich_help_panel="Labelling")
@command
def status(
    output: options.Output = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep looking until every unit is committed, or Ctrl-C.")
    ] = False,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Say how far a job is, from its output alone.

    Works from any machine that can read the output, during the run and after it.

    Example:  hqlabel status --output out --watch
    """
    settings = _given(config, set_, output__uri=output).load()
    from jobs import status as job

    return job.run(settings, json=json, watch=watch)


@app.command(rich_help_panel="Labelling")
@command
def retry(
    output: options.Output = None,
    code: Annotated[
        list[str] | None,
        typer.Option(
            "--code",
            help="Only images that failed with this code, such as not_found. May be repeated.",
            show_default=False,
        ),
    ] = None,
    ray_address: options.RayAddress = None,
    no_progress: options.NoProgress = False,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Do only the failed images again, once the cause is mended.

    All other rows keep every value.

    Example:  hqlabel retry --output out --code not_found
    """
    given = _given(config, set_, output__uri=output, cluster__ray_address=ray_address)
    given.load()  # what is wrong with the call is said before the imports below
    from jobs import retry as job

    how = job.Run(codes=tuple(code or ()), progress=not no_progress, json=json)
    return job.run(given, how, interrupts)


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
    given = _given(
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
        from jobs import merging

        return merging.run(given, [*merge, *(more or ())], json=json)
    if more:
        raise UsageError(
            f"publish {' '.join(more)}: wanted --output OUTPUT, or --merge before several outputs"
        )
    from jobs import publish as job

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
    settings = _given(config, set_, output__uri=output).load()
    from jobs import validate as job

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
    from jobs import inspect_image as job

    return job.run(_given(config, set_, output__uri=output), image_id, picture=picture, json=json)


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
    from jobs import report as job

    return job.run(_given(config, set_, output__uri=output), to=to, as_json=json)


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
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Write the masks for a trainer or an annotation tool.

    Example:  hqlabel export coco --output out --to out-coco --accepted-only

    Every format says what it leaves out and what it loses: coco, label-studio and hf keep each mask whole.
    """
    from jobs import export as job
    from jobs.selection import Selection

    how = job.How(
        format=format_,
        to=to,
        selection=Selection(accepted_only=accepted_only, where=where),
        per_file=per_file,
        tolerance_px=tolerance,
        image_prefix=image_prefix,
        json=json,
    )
    return job.run(_given(config, set_, output__uri=output), how)


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
    from jobs import evaluate as job
    from jobs.selection import Selection

    how = job.How(
        truth=truth,
        selection=Selection(accepted_only=accepted_only, where=where),
        score=score,
        class_agnostic=class_agnostic,
        max_per_image=max_per_image,
        json=json,
    )
    return job.run(_given(config, set_, output__uri=output), how)


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
    settings = _given(config, set_, output__uri=output).load()
    from jobs import clean as job

    return job.run(settings, interrupts, sure=yes, json=json)


@app.command(rich_help_panel="This machine")
@command
def doctor(
    checkpoint: options.Checkpoint = None,
    detector: options.Detector = None,
    prompts: options.Prompts = None,
    output: options.Output = None,
    ray_address: options.RayAddress = None,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Do not start or join Ray.")] = False,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Check this machine: versions, devices, weights, rights, Ray.

    Example:  hqlabel doctor --checkpoint demo --output s3://bucket/labels
    """
    given = _given(
        config,
        set_,
        model__checkpoint=checkpoint,
        detector__name=detector,
        detector__prompts=parse_prompts(prompts),
        output__uri=output,
        cluster__ray_address=ray_address,
    )
    settings = given.load()
    from jobs import doctor as job

    return job.run(settings, with_ray=not no_ray, json=json)


if __name__ == "__main__":
    sys.exit("run `python -m jobs` or `hqlabel`")


@app.command(rich_help_panel="This machine")
@command
def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PART]...",
            help="model, pipeline, job, planning; all when none is named.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: each part about a minute.")] = False,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            help="For model: random weights of this architecture, such as vit_b, in place of the checkpoint. "
            "May be repeated.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1000, help="For planning: images of the job.", show_default="1000000"),
    ] = None,
    checkpoint: options.Checkpoint = None,
    config: options.ConfigFile = None,
    set_: options.Sets = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> int:
    """Measure this machine, each part against a bare loop that does the same.

    Example:  hqlabel bench --quick

    Example:  hqlabel bench model --checkpoint weights.pth

    Uses the checkpoint demo when none is named. Nothing is kept.
    """
    settings = _given(config, set_, model__checkpoint=checkpoint).load()
    from jobs import bench as job

    how = job.How(parts=tuple(parts or ()), variants=tuple(variant or ()), quick=quick, rows=rows, json=json)
    return job.run(settings, how, interrupts)
