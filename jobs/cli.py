"""The command line: `hqlabel COMMAND`, also `python -m jobs COMMAND`.

The commands stand in `cli_labelling`, `cli_results` and `cli_this_machine`, in the order of `--help`;
importing those files is what makes them known.
"""

from __future__ import annotations

import os

from jobs import cli_labelling, cli_results, cli_this_machine
from jobs.app import app, command, end_interrupted, interrupts
from jobs.environment import make_private
from jobs.interrupts import Interrupted
from pipeline.native import prepare_for_torch

__all__ = ["app", "cli_labelling", "cli_results", "cli_this_machine", "command", "main"]


def main() -> None:
    """Run the command line of this process and end it with the command's exit code."""
    interrupts.install()
    make_private()
    prepare_for_torch(os.environ)  # no command has loaded torch yet
    try:
        app()
    except Interrupted:
        end_interrupted()
