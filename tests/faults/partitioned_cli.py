"""The command of `stub_cli` that plans everything in partitions of a few rows.

DIE_ONCE names a folder: every kind of task kills its process (SIGKILL) at its first call, and leaves a file.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hqlabel.jobs.cluster.ray_session import Machine
from hqlabel.pipeline.planning import partitioned_plan
from hqlabel.pipeline.planning.partitioned_plan import Tasks
from tests.faults import stub_cli


def die_once(folder: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        (Path(folder) / function.__name__).touch(exist_ok=False)
    except FileExistsError:
        return function(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)


def dying_tasks(machine: Machine, uris: Sequence[str]) -> Tasks | None:
    tasks = PLANNING_TASKS(machine, uris)
    assert tasks is not None
    start = tasks.start

    def start_named(function: Callable[..., Any], *arguments: Any, returns: int = 1) -> Any:
        named = functools.partial(die_once, os.environ["DIE_ONCE"], function)
        named.__name__ = function.__name__  # type: ignore[attr-defined]
        return start(named, *arguments, returns=returns)

    tasks.start = start_named  # type: ignore[method-assign]
    return tasks


PLANNING_TASKS = Machine.planning_tasks


def main() -> None:
    partitioned_plan.LARGE_ROWS = 0
    partitioned_plan.SIZES = partitioned_plan.Sizes(piece=20, partition=30, bucket=10)
    if "DIE_ONCE" in os.environ:
        Machine.planning_tasks = dying_tasks  # type: ignore[method-assign]
    stub_cli.main()


if __name__ == "__main__":
    main()
