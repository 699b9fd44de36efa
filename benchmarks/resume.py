"""A job of very many images that need not exist: planning it, opening it again, starting what is left.

    python -m benchmarks.resume [--rows 1000000]

Nine tenths of the units are stand-ins; a table of seconds, CPU and the driver's peak memory by step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.chain import STUB_NAME
from benchmarks.made_inputs import many_name, write_many_boxes
from hqlabel.jobs.cluster.ray_session import Machine
from hqlabel.jobs.cluster.run_units import working_context
from hqlabel.jobs.commands.label import pending_units
from hqlabel.jobs.job_setup.driver_slice import WHOLE
from hqlabel.jobs.job_setup.open_job import open_or_create
from hqlabel.jobs.load_config import Config, ConfigSources
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.pipeline.errors import count
from hqlabel.pipeline.job_context import JobContext, UnitOutcome
from hqlabel.pipeline.job_state.plan_files import iter_plan
from hqlabel.pipeline.planning.make_plan import write_plan
from hqlabel.pipeline.tables.unit_files import unit_key

_DONE = 0.9
_HEAD = ("step", "seconds", "CPU s", "driver's peak MB")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="images of the job, at least 1000")
    rows = parser.parse_args().rows
    config = ConfigSources(flags={"model.checkpoint": "demo"}).load()
    with tempfile.TemporaryDirectory(prefix="hqlabel-bench-") as folder:
        title, laps = measure(config, Path(folder), Interrupts(), rows=rows)
    print(f"{title}\n{console.table(_HEAD, [_texts(lap) for lap in laps])}")


def measure(
    config: Config, folder: Path, interrupts: Interrupts, *, rows: int
) -> tuple[str, list[dict[str, Any]]]:
    """A title; seconds of each step and the driver's memory after it, for `rows` images of three boxes."""
    boxes = _written_elsewhere(folder, rows)
    config = config.model_copy(
        update={
            "input": config.input.model_copy(update={"images": None, "boxes": str(boxes)}),
            "output": config.output.model_copy(update={"uri": str(folder / "out")}),
        }
    )
    watch = _Watch()
    with Machine(config, interrupts) as machine:
        open_job = partial(
            open_or_create,
            config,
            check_inputs=False,
            dtype=machine.dtype,
            device=machine.device,
        )
        opened = open_job()
        assert opened.plan is not None
        watch.lap("plan: read, join, sort, number, hash")
        write_plan(opened.store, opened.plan)
        watch.lap("write the plan")
        units = opened.job.units
        del opened
        _pretend_done(folder / "out", range(int(_DONE * units)))
        _write_pictures(folder, int(_DONE * units) * config.output.images_per_unit, rows)
        watch.lap("(stand-ins for the committed units)")
        opened = open_job()
        pending = pending_units(opened.store, opened.job, WHOLE)
        assert opened.resumed
        watch.lap("resume: open, compare, list, subtract")
        machine.start()
        watch.lap("(Ray starts)")
        _first_outcome(config, opened.job.context, machine, pending)
        watch.lap("resume: the first unit is committed")
        read = sum(table.num_rows for table in iter_plan(opened.store, opened.job.context.plan_sha256))
        assert read == rows
        watch.lap("read the whole plan back")
    title = f"{rows:,} images, {units:,} units, {len(pending):,} of them left"
    return title, watch.laps


def _written_elsewhere(folder: Path, rows: int) -> Path:
    """The table of boxes, made in another process: its memory is no part of the driver's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(write_many_boxes, (folder, rows))


def _first_outcome(config: Config, context: JobContext, machine: Machine, pending: list[int]) -> None:
    from hqlabel.pipeline.ray_execution.chain import run_units

    seen: list[UnitOutcome] = []
    run_units(
        pending,
        replace(working_context(context, machine.device()), segmenter=STUB_NAME),
        config.cluster,
        epoch=1,
        on_outcome=seen.append,
        should_stop=lambda: bool(seen),
    )
    assert seen[0].failed == 0, seen[0]


def _pretend_done(output: Path, units: range) -> None:
    """Files by the names of committed units; resuming reads their names and sizes, never what is in them."""
    (output / "units").mkdir()
    for unit in units:
        (output / unit_key(unit, 0)).write_bytes(b"a stand-in of the benchmark")


def _write_pictures(folder: Path, first: int, rows: int) -> None:
    """Pictures for the units that will be worked on before the first outcome comes."""
    body = folder / "made.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(body)
    for number in range(first, min(rows, first + 16 * 64)):
        place = folder / many_name(number)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(body, place)


class _Watch:
    """Seconds from lap to lap."""

    def __init__(self) -> None:
        self.laps: list[dict[str, Any]] = []
        self._last = self._now()

    def lap(self, step: str) -> None:
        """Note the end of a step."""
        now = self._now()
        self.laps.append(
            {
                "step": step,
                "seconds": now[0] - self._last[0],
                "cpu_s": now[1] - self._last[1],
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
        console.say(f"{step}: {self.laps[-1]['seconds']:.1f} s")
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.monotonic(), time.process_time()


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    return row["step"], f"{row['seconds']:.1f}", f"{row['cpu_s']:.1f}", count(round(row["peak_mb"]))


if __name__ == "__main__":
    main()
