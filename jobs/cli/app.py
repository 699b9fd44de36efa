"""The frame of the command line: the application, and how a command ends.

Stdout is data, stderr is for the user. Exit codes: 0 complete, 1 a bug, 2 usage or configuration,
3 complete but over the failure budget, 4 refused before work, 5 stopped by a fault of the
surroundings, 6 damage found, 130 interrupted. After 5 and 130 the same command goes on.
"""

from __future__ import annotations

import functools
import inspect
import os
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from hqlabel.jobs.cli.options import HELP_ALL, SHARED, Flag
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.signals import Interrupted, Interrupts, end_now
from hqlabel.pipeline.errors import HqlabelError
from hqlabel.pipeline.worker.process_env import refuse_to_start

if TYPE_CHECKING:
    from hqlabel.jobs.load_config import ConfigSources

EXIT_BUG = 1
_EPILOG = (
    "Exit codes: 0 complete, 2 usage, 3 over the failure budget, 4 refused before work, 5 stopped by a fault "
    "(start again: it resumes), 6 damage found, 130 interrupted (start again: it resumes)."
)

app = typer.Typer(
    name="hqlabel",
    help="Detector boxes in, SAM-HQ masks out: a job that can be killed and simply started again.\n\n"
    "Begin with:  hqlabel label --images photos --boxes b.csv --checkpoint demo -o out",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
interrupts = Interrupts()


def _show_version(wanted: bool) -> None:
    if wanted:
        console.data(console.code_version())
        raise typer.Exit


@app.callback()
def _of_all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Hold the options before a command's name."""


def command(*flags: Flag) -> Callable[[Callable[..., int]], Callable[..., None]]:
    """Make a command of a function whose result is its exit code, called with `given` and `json` first.

    `flags` go into `given`; the command also has the function's further parameters and the options of every
    command. Every error becomes a sentence and a code.
    """

    def decorate(function: Callable[..., int]) -> Callable[..., None]:
        # The class of `given` is imported for type checkers alone: it brings what --help does not need.
        kinds = get_type_hints(function, localns={"ConfigSources": object}, include_extras=True)
        own = [
            one.replace(annotation=kinds[one.name])
            for one in list(inspect.signature(function).parameters.values())[2:]
        ]
        parameters = [
            *(flag.parameter for flag in flags),
            *own,
            *(flag.parameter for flag in SHARED),
            HELP_ALL,
        ]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            verbose = values.pop("verbose")
            values.pop("help_all", None)  # has ended the command
            try:
                refuse_to_start(os.environ)
                given = _given(flags, values)
                code = function(given, values.pop("json"), **values)
            except Interrupted:
                end_interrupted()
            except HqlabelError as error:
                code = _explain(error, verbose)
            except Exception as error:
                code = _report_bug(error)
            raise typer.Exit(code)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _given(flags: Sequence[Flag], values: dict[str, Any]) -> ConfigSources:
    """Take what belongs to these flags, `--config` and `--set` out of `values`."""
    from hqlabel.jobs.load_config import ConfigSources  # brings what --help does not need

    found = {}
    for flag in flags:
        value = values.pop(flag.parameter.name)
        found[flag.setting] = flag.read(value) if flag.read else value
    return ConfigSources(path=values.pop("config"), flags=found, sets=tuple(values.pop("set") or ()))


def end_interrupted() -> None:
    """Report that the job was interrupted, release its lock, and end this process with 130."""
    interrupts.give_back()
    console.say("interrupted; what is committed is safe, the same command goes on from there")
    end_now()


def _explain(error: HqlabelError, verbose: bool) -> int:
    interrupts.wait_if_ending()
    if verbose:
        console.say("".join(traceback.format_exception(error)).rstrip())
    console.say_error(error)
    return error.exit_code


def _report_bug(error: Exception) -> int:
    interrupts.wait_if_ending()
    console.say("".join(traceback.format_exception(error)).rstrip())
    console.say("hqlabel: this is a bug in hqlabel; what is committed is safe. Please report the lines above")
    return EXIT_BUG
