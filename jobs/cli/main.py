"""The command line: `hqlabel COMMAND`, also `python -m hqlabel COMMAND`.

The commands are in `labelling_commands` and `results_commands`, in the order of `--help`; importing those
files registers them.
"""

from __future__ import annotations

import os

from hqlabel.jobs.cli import labelling_commands, results_commands
from hqlabel.jobs.cli.app import app, command, end_interrupted, interrupts
from hqlabel.jobs.terminal.signals import Interrupted
from hqlabel.pipeline.worker.process_env import prepare_for_torch

__all__ = ["app", "command", "labelling_commands", "main", "results_commands"]


def main() -> None:
    """Run the command line of this process and end it with the command's exit code."""
    interrupts.install()
    # Ray's session folder and its logs hold uris and error texts and are else readable for all; the output
    # files on a shared disk are made by workers, which inherit this too.
    os.umask(0o077)
    prepare_for_torch(os.environ)  # no command has loaded torch yet
    try:
        app()
    except Interrupted:
        end_interrupted()
