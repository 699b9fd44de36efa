"""`hqlabel bench`: what this machine does, part by part, each against the bare loop it is to be held to.

    model     the model alone: seconds an image by number format, boxes and boxes a call
    pipeline  the chain with a stub in the model's place, against processes that only read, decode and resize
    job       the chain with the model, against processes that read, decode and run the same model in a loop
    planning  planning, opening again and starting what is left of a job of very many images

Inputs are made in a temporary folder, and nothing of it stays. Figures of a machine that does other work at
the same time are worth little; the two sides of a comparison run one after the other, on the same cores.
"""

from __future__ import annotations

import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import bench_chain, bench_model, bench_planning
from benchmarks.command.bench_tables import Table
from jobs.cluster.ray_cluster import usable_cpus
from jobs.config import Config
from jobs.job_setup.open_job import code_version
from jobs.terminal import console
from jobs.terminal.signals import Interrupts
from model.config import PUBLISHED
from pipeline.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class How:
    """What to measure. `parts`: names of PARTS, none for all. `quick`: sizes that end within about a minute.

    `variants`: published architectures with random weights, in place of the checkpoint, for `model`.
    `rows`: images of `planning`.
    """

    parts: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    quick: bool = False
    rows: int | None = None
    json: bool = False


PARTS = ("model", "pipeline", "job", "planning")
ROWS, ROWS_QUICK = 1_000_000, 20_000


def run(config: Config, how: How, interrupts: Interrupts) -> int:
    """Measure the parts asked for, print a table for each, and return 0.

    Raises:
        UsageError: a part or a variant of no such name.
    """
    unknown = [name for name in how.parts if name not in PARTS]
    if unknown:
        raise UsageError(f"there is no part {unknown[0]!a}; wanted some of {', '.join(PARTS)}")
    unpublished = [name for name in how.variants if name not in PUBLISHED]
    if unpublished:
        raise UsageError(f"there is no variant {unpublished[0]!a}; wanted some of {', '.join(PUBLISHED)}")
    if config.model.checkpoint is None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"checkpoint": "demo"})})
    machine = machine_in_words()
    if not how.json:
        console.data(machine)
    found = {}
    for name in how.parts or PARTS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="hqlabel-bench-") as folder:
            table = measure(name, config, how, Path(folder), interrupts)
        found[name] = table.as_json()
        if not how.json:
            console.data(f"\n{name}: {table.title} ({console.duration(time.monotonic() - began)})")
            console.data(console.table(table.head, table.rows))
            for note in table.notes:
                console.data(f"  {note}")
    if how.json:
        console.data_json({"machine": machine, "parts": found})
    return 0


def measure(name: str, config: Config, how: How, folder: Path, interrupts: Interrupts) -> Table:
    """The figures of one part, made in an empty folder."""
    if name == "model":
        return bench_model.measure(config, quick=how.quick, variants=how.variants)
    if name == "planning":
        rows = how.rows or (ROWS_QUICK if how.quick else ROWS)
        return bench_planning.measure(config, folder, interrupts, rows=rows)
    chain = bench_chain.measure_stub if name == "pipeline" else bench_chain.measure_model
    return chain(config, folder, interrupts, quick=how.quick)


def machine_in_words() -> str:
    """Versions, cores and devices in one line."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["no GPU"]
    facts: list[Any] = [
        f"hqlabel {code_version()}",
        f"torch {torch.__version__}",
        f"{platform.system()} {platform.machine()}",
        console.count(usable_cpus(), "CPU core"),
        *devices,
    ]
    return ", ".join(facts)
