"""The real commands without Ray, in processes that stop at a fail point until they are told to go on.

`Race` holds one output. A command that sleeps (`stop`) has no heart meanwhile, as on a laptop that is shut,
and another may take its job; one that waits (`wait`) lives, and nobody may.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pandas  # noqa: F401, what a command imports on its way costs each child a second

from hqlabel.jobs.cluster.run_units import Work, working_context
from hqlabel.jobs.commands import clean, label, publish, retry, status, validate  # noqa: F401
from hqlabel.jobs.job_setup import open_job
from hqlabel.jobs.terminal.progress import CallCounts
from hqlabel.pipeline import failpoints
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.job_state.driver_lock import Owner
from hqlabel.pipeline.job_state.job_file import require_job
from hqlabel.pipeline.stages.rows_between_stages import UnitRow
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import read_manifest
from hqlabel.pipeline.tables.unit_files import list_committed
from hqlabel.pipeline.tables.verify_output import Finding, verify
from tests.faults import chain, stub_cli
from tests.table_digest import mask_columns_digest

Pause = Literal["stop", "wait"]
SILENT_S, BEAT_S = 0.6, 0.1
MARKS = {"accepted", "reject_reason", "num_accepted"}
OTHER_FILTER = ("--min-predicted-iou", "0.9")


def run_without_ray(
    work: Work,
    pending: Callable[[], Sequence[int]],
    *,
    total_images: int,
    done_images: int,
    kept_images: int = 0,
    generations: Mapping[int, int] | None = None,
    codes: tuple[str, ...] = (),
) -> CallCounts:
    """What `run_pending` does, one unit after the other."""
    del total_images, done_images, kept_images
    units = list(pending())
    context = working_context(work.job.context, "cpu")
    for unit_id in units:
        row = UnitRow(unit_id=unit_id)
        if generations is not None:
            row = replace(row, generation=generations[unit_id], redo_codes=codes)
        chain.do_unit(row, context, epoch=work.owner.number)
        if work.owner.lost.is_set():
            break
    work.owner.require("the rest of the work")
    return CallCounts(units=len(units))


def command(arguments: Sequence[str], folder: str, pause: Pause) -> None:
    """One call of the command line, which ends this process with its exit code. For a child."""
    label.run_pending = retry.run_pending = run_without_ray  # type: ignore[assignment]
    open_job.units_per_part = lambda **_: 2  # type: ignore[assignment]
    Owner.take.__func__.__kwdefaults__ = {"takeover_after_s": SILENT_S, "beat_every_s": BEAT_S}  # type: ignore[attr-defined]
    if pause == "wait":
        failpoints.os = SimpleNamespace(getpid=os.getpid, kill=lambda *_: wait(Path(folder)))  # type: ignore[attr-defined]
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["hqlabel", *arguments]
    stub_cli.main()


def wait(folder: Path) -> None:
    (folder / "reached").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)


@dataclass
class Sleeper:
    """A command that was started with a fail point; `reached`: whether it came to it before it ended."""

    process: Any
    folder: Path
    pause: Pause
    reached: bool = False

    def until_reached(self) -> bool:
        end = time.monotonic() + 60
        while not self.reached and self.process.exitcode is None:
            assert time.monotonic() < end, "neither the fail point nor the end came"
            self.reached = self._is_there()
            self.process.join(0.01)
        return self.reached

    def _is_there(self) -> bool:
        if self.pause == "wait":
            return (self.folder / "reached").exists()
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:
            return False

    def go_on(self) -> int:
        """Its exit code, after it went on to its end."""
        if self.reached and self.pause == "wait":
            (self.folder / "go").touch()
        elif self.reached:
            os.kill(self.process.pid, signal.SIGCONT)
        self.process.join(60)
        assert self.process.exitcode is not None, "it did not end"
        return int(self.process.exitcode)

    @property
    def said(self) -> str:
        return (self.folder / "err").read_text()


@dataclass
class Race:
    """One output and the pictures that it is made of; each command is a process."""

    place: Place
    pictures: Path
    folder: Path
    calls: int = 0

    @property
    def store(self) -> Store:
        return Store(self.place)

    def start(self, *arguments: str, failpoint: str = "", pause: Pause = "stop") -> Sleeper:
        self.calls += 1
        folder = self.folder / f"call-{self.calls}"
        folder.mkdir(parents=True)
        options = [f"--set=storage.s3.{k}={v}" for k, v in self.place.options.items()]
        call = [arguments[0], "--output", self.place.uri, *options, *arguments[1:]]
        process = chain.start_child(command, call, str(folder), pause, failpoint=failpoint)
        return Sleeper(process=process, folder=folder, pause=pause)

    def run(self, name: str, *extra: str) -> int:
        """The exit code of a command by its name in COMMANDS."""
        return self.start(*self.arguments(name), *extra).go_on()

    def arguments(self, name: str) -> tuple[str, ...]:
        if name == "retry":
            return (*COMMANDS[name], "--checkpoint", "stub", "--allow-root", str(self.pictures))
        if name != "label":
            return COMMANDS[name]
        inputs = ("--images", str(self.pictures), "--boxes", str(self.pictures.parent / "boxes.parquet"))
        return (*COMMANDS[name], *inputs)

    def mend(self) -> None:
        whole = (self.pictures.parent / "mended").read_bytes()
        (self.pictures / chain.BROKEN).write_bytes(whole)
        os.utime(self.pictures / chain.BROKEN, (len(whole), len(whole)))  # it is part of the version tag

    def copied_to(self, place: Place, folder: Path) -> Race:
        """This output as it is now, at another place, for a race of its own."""
        store = Store(place)
        for entry in self.store.list():
            if not entry.key.startswith("owner/"):
                store.put(entry.key, self.store.read(entry.key))
        return Race(place=place, pictures=self.pictures, folder=folder)

    def findings(self) -> list[Finding]:
        return verify(self.store, require_job(self.store)).findings

    def rows(self) -> tuple[str, str]:
        """Digests of the tables but for the filters' marks."""
        images, instances = (chain.read_table(self.store, name) for name in ("images", "instances"))
        volatile = {"attempts", "fetch_ms", "decode_ms", "detect_ms", "segment_ms", "run_id", "processed_at"}
        return tuple(mask_columns_digest(t, without=volatile | MARKS) for t in (images, instances))  # type: ignore[return-value]

    def newest_generations(self) -> dict[int, int]:
        """By unit, of tables and store together."""
        manifest = read_manifest(self.store)
        parts = manifest.parts if manifest else ()
        found = {u: part.generation_of(u) for part in parts for u in range(part.first_unit, part.stop_unit)}
        for unit in list_committed(self.store).values():
            found[unit.unit_id] = max(found.get(unit.unit_id, 0), unit.generation)
        return found


COMMANDS = {
    "label": (
        *("label", "--no-progress", "--checkpoint", "stub", "--set", "output.images_per_unit=3"),
        *("--set", "model.dtype=float32", "--set", "limits.max_failure_rate=1"),
    ),
    "publish": ("publish",),
    "filter": ("publish", *OTHER_FILTER),
    "retry": ("retry", "--no-progress"),
    "clean": ("clean", "--yes"),
    "validate": ("validate",),
    "status": ("status",),
}


def make_race(folder: Path, place: Place) -> Race:
    """A race over the pictures of a small job; one of them is cut, until `mend`."""
    made = chain.make_small_job(folder)
    made.write_broken(made.mended[:900])
    (folder / "mended").write_bytes(made.mended)
    return Race(place=place, pictures=made.pictures, folder=folder / "calls")
