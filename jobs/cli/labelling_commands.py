"""The commands that make labels: `label`, `plan`, `status`, `retry`.

A command reads its options and calls the module of its name, which is imported when the command runs: Ray
and torch cost seconds, `--help` must not. `verbose` is read by the decorator (`app.command`).
"""
# ruff: noqa: ARG001 - `verbose` is read by the decorator

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli import options
from jobs.cli.app import app, command, given_of, interrupts
from jobs.config import parse_prompts
from jobs.job_setup.slices import parse_slice
from pipeline.errors import UsageError, clean_text


@app.command(rich_help_panel="Labelling", context_settings={"allow_extra_args": True})
@command
def label(
    ctx: typer.Context,
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
    _refuse_more(ctx.args)
    given = given_of(
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
    from jobs.commands import label as job

    how = job.Run(part=part, check_inputs=check_inputs, progress=not no_progress, json=json)
    return job.run(settings, how, interrupts)


@app.command(rich_help_panel="Labelling", context_settings={"allow_extra_args": True})
@command
def plan(
    ctx: typer.Context,
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
    _refuse_more(ctx.args)
    given = given_of(
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
    from jobs.commands import plan as job

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
    settings = given_of(config, set_, output__uri=output).load()
    from jobs.commands import status as job

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
    given = given_of(config, set_, output__uri=output, cluster__ray_address=ray_address)
    given.load()  # what is wrong with the call is said before the imports below
    from jobs.commands import retry as job

    how = job.Run(codes=tuple(code or ()), progress=not no_progress, json=json)
    return job.run(given, how, interrupts)


def _refuse_more(words: list[str]) -> None:
    """Raise UsageError for words that belong to no flag, often a pattern that the shell filled in."""
    if words:
        shown = clean_text(words[0]) + (f" and {len(words) - 1:,} more" if len(words) > 1 else "")
        raise UsageError(
            f"{shown}: no flag takes this; one place stands behind each, and a pattern of files goes in "
            "quotes, as in --images 'photos/*.jpg'"
        )
