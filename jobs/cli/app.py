"""The frame of the command line: the application, and how a command ends.

Stdout is data, stderr is for people. Exit codes: 0 complete, 1 a bug, 2 usage or configuration,
3 complete but over the failure budget, 4 refused before work, 5 stopped by a fault of the
surroundings, 6 damage found, 130 interrupted. After 5 and 130 the same command goes on.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec

import typer

from jobs.config import Given
from jobs.terminal import console
from jobs.terminal.environment import refuse_dangerous_switches
from jobs.terminal.signals import Interrupted, Interrupts, end_now
from pipeline.errors import HqlabelError

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


def command(function: Callable[P, int]) -> Callable[P, None]:
    """A command whose result is its exit code, with every error turned into a sentence and a code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        verbose = bool(kwargs.get("verbose"))
        try:
            refuse_dangerous_switches(os.environ)
            code = function(*args, **kwargs)
        except Interrupted:
            end_interrupted()
        except HqlabelError as error:
            code = _explain(error, verbose)
        except Exception as error:
            code = _report_bug(error)
        raise typer.Exit(code)

    return run


def end_interrupted() -> None:
    """Never comes back: says that the job was interrupted, lets go of its mark, ends with 130."""
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


def given_of(path: str | None, sets: list[str] | None, **flags: Any) -> Given:
    """What was given, with flags named by their setting, `__` in place of the dot."""
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return Given(path=path, flags=named, sets=tuple(sets or ()))
