"""The command line: `hqlabel COMMAND`, also `python -m hqlabel COMMAND`.

The commands are in `labelling_commands` and `results_commands`, in the order of `--help`; importing those
files registers them.
"""

from __future__ import annotations

import atexit
import os
import sys

from hqlabel.jobs.cli import labelling_commands, results_commands
from hqlabel.jobs.cli.app import app, command, end_interrupted, interrupts
from hqlabel.jobs.terminal.signals import Interrupted
from hqlabel.pipeline.worker.process_env import prepare_for_torch

__all__ = ["app", "command", "labelling_commands", "main", "results_commands"]


def main() -> None:
    """Run the command line of this process and end it with the command's exit code."""
    interrupts.install()
    # The umask stays as it is: the person decides who reads results, exports and reports. What holds a token
    # or Ray's logs is closed by itself (`hqlabel.jobs.cluster.ray_cluster`).
    prepare_for_torch(os.environ)  # no command has loaded torch yet
    try:
        app()
    except Interrupted:
        end_interrupted()
    except SystemExit as ended:
        _end_soon(ended)


def _end_soon(ended: SystemExit) -> None:
    """End this process once all is written, without taking Ray and torch apart, which takes seconds."""
    if isinstance(ended.code, str):
        raise ended
    sys.stdout.flush()  # what cannot be written ends the process as Python does, with a word
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(ended.code or 0)
