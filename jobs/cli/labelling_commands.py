"""The commands that make labels: `label`, `plan`, `status`, `retry`.

A command reads its options and calls the module of its name, which is imported when the command runs: Ray
and torch cost seconds, `--help` must not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hqlabel.jobs.cli import options
from hqlabel.jobs.cli.app import app, command, interrupts
from hqlabel.jobs.cli.options import CHECKPOINT, DETECTOR, DEVICE, JOB, OUTPUT, RAY_ADDRESS, ROOTS, WORKERS
from hqlabel.pipeline.errors import UsageError, clean_text

if TYPE_CHECKING:
    from hqlabel.jobs.load_config import ConfigSources


@app.command(rich_help_panel="Labelling", context_settings={"allow_extra_args": True})
@command(*JOB)
def label(
    given: ConfigSources,
    json: bool,
    *,
    ctx: typer.Context,
    slice_: options.Slice = None,
    check_inputs: options.CheckInputs = False,
    accept_changed_inputs: options.AcceptChangedInputs = False,
    no_progress: options.NoProgress = False,
) -> int:
    """Make masks for boxes; run it again to resume after any end.

    Example:  hqlabel label --images photos --boxes b.csv --checkpoint demo -o out

    Example:  hqlabel label --boxes s3://b/boxes.parquet --checkpoint hq.pth -o out

    Example:  hqlabel label --config job.yaml --limit 100
    """
    _refuse_more(ctx.args)
    settings = given.load()
    from hqlabel.jobs.job_setup.driver_slice import parse_slice

    part = parse_slice(slice_)  # before the slow imports below
    if accept_changed_inputs and slice_ is not None:
        raise UsageError("--accept-changed-inputs changes the plan of all slices: give it without --slice")
    from hqlabel.jobs.commands.label import LabelOptions, run

    chosen = LabelOptions(
        part=part,
        check_inputs=check_inputs or accept_changed_inputs,
        accept_changed_inputs=accept_changed_inputs,
        progress=not no_progress,
        json=json,
    )
    return run(settings, chosen, interrupts)


@app.command(rich_help_panel="Labelling", context_settings={"allow_extra_args": True})
@command(*JOB)
def plan(
    given: ConfigSources,
    json: bool,
    *,
    ctx: typer.Context,
    sample: Annotated[
        int,
        typer.Option(
            "--sample",
            min=0,
            help="Measure with that many images, end to end on this machine or cluster, and show hours, "
            "money (cost.usd_per_gpu_hour) and bytes for all. 64 is enough for one device.",
        ),
    ] = 0,
) -> int:
    """Show what label would do with the same options; write nothing.

    Example:  hqlabel plan --images photos/ --boxes boxes.json --checkpoint demo --sample 64
    """
    _refuse_more(ctx.args)
    settings = given.load()
    from hqlabel.jobs.commands.plan import run

    return run(settings, interrupts, sample=sample, json=json)


@app.command(rich_help_panel="Labelling")
@command(OUTPUT)
def status(
    given: ConfigSources,
    json: bool,
    *,
    place: options.OutputWord = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep watching until every unit is committed, or Ctrl-C.")
    ] = False,
) -> int:
    """Show how far a job is, from its output alone.

    Works from any machine that can read the output, during the run and after it.

    Example:  hqlabel status out --watch
    """
    given = options.with_output(given, place)
    from hqlabel.jobs.commands.status import run

    return run(given, json=json, watch=watch)


@app.command(rich_help_panel="Labelling")
@command(OUTPUT, CHECKPOINT, *DETECTOR, *ROOTS, DEVICE, WORKERS, RAY_ADDRESS)
def retry(
    given: ConfigSources,
    json: bool,
    *,
    place: options.OutputWord = None,
    code: Annotated[
        list[str] | None,
        typer.Option(
            "--code", help="Only images that failed with this code, such as not_found. May be repeated."
        ),
    ] = None,
    no_progress: options.NoProgress = False,
) -> int:
    """Do only the failed images again, once the cause is fixed.

    All other rows keep every value. Where weights and images are is never taken from the output: name them.

    Example:  hqlabel retry out --checkpoint hq.pth --allow-root photos --code not_found
    """
    given = options.with_output(given, place)
    given.load()  # report what is wrong with the call before the slow imports below
    from hqlabel.jobs.commands.retry import RetryOptions, run

    chosen = RetryOptions(codes=tuple(code or ()), progress=not no_progress, json=json)
    return run(given, chosen, interrupts)


@app.command("config", rich_help_panel="Labelling")
@command()
def show_config(given: ConfigSources, json: bool) -> int:
    """Print a configuration to start from: every setting, its meaning and default.

    Example:  hqlabel config > job.yaml
    """
    from hqlabel.jobs.commands.config_template import run

    return run(given, json=json)


def _refuse_more(words: list[str]) -> None:
    """Raise UsageError for words that belong to no flag, often a pattern that the shell filled in."""
    if words:
        rest = clean_text(words[0]) + (f" and {len(words) - 1:,} more" if len(words) > 1 else "")
        raise UsageError(
            f"{rest}: no flag takes this; each flag takes one place, and a pattern of files goes in "
            "quotes, as in --images 'photos/*.jpg'"
        )
