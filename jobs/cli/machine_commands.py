"""The command about this machine: `doctor`.

A command reads its options and calls the module of its name, which is imported when the command runs: Ray
and torch cost seconds, `--help` must not. `verbose` is read by the decorator (`app.command`).
"""
# ruff: noqa: ARG001 - `verbose` is read by the decorator

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli import options
from jobs.cli.app import app, command, given_of
from jobs.config import parse_prompts


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
    given = given_of(
        config,
        set_,
        model__checkpoint=checkpoint,
        detector__name=detector,
        detector__prompts=parse_prompts(prompts),
        output__uri=output,
        cluster__ray_address=ray_address,
    )
    settings = given.load()
    from jobs.commands import doctor as job

    return job.run(settings, with_ray=not no_ray, json=json)
