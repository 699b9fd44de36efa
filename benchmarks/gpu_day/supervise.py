"""One call of a GPU day: the parts that are left, in a process beside this one, until the time is up.

This process imports no torch. It alone writes the state, and it outlives whatever a part does to its process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.gpu_day.day_file import DayFile
from benchmarks.gpu_day.parts import Part

ROOT = Path(__file__).resolve().parents[2]
ATTEMPTS = 3
"""A part that was begun that often and never ended kills its machine, or is too long for a call."""


RESTART = 3
"""Exit status of a process whose part has failed: the next part gets a new one."""


class DayRefused(Exception):
    """Nothing can be measured here."""


def work_through(
    day: DayFile,
    parts: Sequence[Part],
    *,
    deadline: float,
    rehearse: bool,
    after_each: Callable[[], object] = lambda: None,
    commit: str = "unknown",
) -> None:
    """Do what is left of the parts until `deadline` (of `time.time`), and call `after_each`.

    Raises:
        DayRefused: there is no device, or not the one that the state is of.
    """
    day.append("call", commit=commit, rehearse=rehearse, minutes=round((deadline - time.time()) / 60, 1))
    for name, times in day.unfinished().items():
        if times >= ATTEMPTS:
            day.append(
                "ended", part=name, seconds=0, rows=[],
                error=f"begun {times} times and never ended; see log.txt",
            )  # fmt: skip
    tried: set[str] = set()
    while time.time() < deadline:
        ended = day.ended()
        left = [part for part in parts if part.name not in ended and part.name not in tried]
        if not left:
            return
        if not _Worker(day, left, after_each, deadline=deadline, rehearse=rehearse).run(tried):
            return


class _Worker:
    """A process that does parts one after the other, and what it tells."""

    def __init__(
        self,
        day: DayFile,
        left: Sequence[Part],
        after_each: Callable[[], object],
        *,
        deadline: float,
        rehearse: bool,
    ) -> None:
        self._day, self._after_each = day, after_each
        self._deadline, self._rehearse = deadline, rehearse
        self._left = {part.name: part for part in left}
        self._begun: tuple[Part, float] | None = None

    def run(self, tried: set[str]) -> bool:
        """Return whether another process is to go on. `tried` gets what was begun: no call does it twice."""
        receive, send = Pipe(duplex=False)
        parts = [asdict(part) for part in self._left.values()]
        order = {"parts": parts, "deadline": self._deadline, "rehearse": self._rehearse}
        command = [sys.executable, "-m", "benchmarks.gpu_day.worker", str(send.fileno()), json.dumps(order)]
        with (self._day.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[send.fileno()], process_group=0,
            )  # fmt: skip
            send.close()
            try:
                killed = self._listen(receive, tried)
                if killed is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=30)
            finally:  # also when this process is interrupted
                _end(process)
        status = process.returncode
        if self._begun is None and status not in (0, RESTART, -signal.SIGKILL):
            raise DayRefused(f"the process of the parts ended with status {status}; see {log.name}")
        if self._begun is not None and killed != "deadline":
            part, began = self._begun
            reason = killed or f"its process ended with status {status}, see log.txt"
            self._ended(part.name, time.time() - began, [], error=reason)
        return killed != "deadline" and (status != 0 or killed is not None)

    def _listen(self, receive: Connection, tried: set[str]) -> str | None:
        """Return None when the process has ended, else why it is to be killed."""
        while True:
            limit = self._deadline
            if self._begun is not None:
                part, began = self._begun
                limit = min(limit, began + part.limit_s)
            if receive.poll(max(0.0, min(1.0, limit - time.time()))):
                try:
                    word, *values = receive.recv()
                except EOFError:
                    return None
                self._hear(word, values, tried)
            elif time.time() >= self._deadline:
                return "deadline"
            elif time.time() >= limit:
                return f"killed: it had not ended after {part.limit_s:.0f} s"

    def _hear(self, word: str, values: list[object], tried: set[str]) -> None:
        if word == "device":
            self._check_device(*values)
        elif word == "begun":
            (name,) = values
            assert isinstance(name, str)
            self._begun = self._left[name], time.time()
            tried.add(name)
            self._day.append("begun", part=name)
        elif word == "ended":
            name, seconds, rows, error, missing = values
            self._ended(name, seconds, rows, error=error, missing=missing)
            self._begun = None

    def _ended(
        self, name: object, seconds: object, rows: object, *, error: object, missing: object = None
    ) -> None:
        assert isinstance(seconds, float)
        self._day.append(
            "ended", part=name, seconds=round(seconds, 2), rows=rows, error=error, missing=missing
        )
        told = (
            f"FAILED: {str(error).splitlines()[0]}" if error else f"left out: {missing}" if missing else "ok"
        )
        print(f"{seconds:7.1f} s  {name}: {told}", flush=True)
        self._after_each()

    def _check_device(self, name: object, torch_version: object, missing: object) -> None:
        """Note the device, or raise DayRefused: figures of two devices do not belong in one table."""
        if name is None:
            raise DayRefused(
                "no CUDA device here; --rehearse runs every part on this processor, with small models"
            )
        known = self._day.device()
        if known is not None and (known["name"], known["torch"]) != (name, torch_version):
            raise DayRefused(
                f"{self._day.folder} holds figures of {known['name']} with torch {known['torch']}, and here "
                f"is {name} with torch {torch_version}; choose another --state"
            )
        self._day.append("device", name=name, torch=torch_version, missing=missing)
        print(f"device: {name}, torch {torch_version}", flush=True)
        assert isinstance(missing, dict)
        for module, parts in missing.items():
            print(f"missing: {module}, so left out: {', '.join(parts)}", flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
