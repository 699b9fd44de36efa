"""Time and memory of planning in partitions, on a private Ray: two tables, many Parquet files, no order.

    python -m benchmarks.partitioned_planning STATE --images 30000000     one row an image in both tables
    python -m benchmarks.partitioned_planning STATE --images 1000000 --boxes rows     one row a box
    ... --whole                the planner of one process, without Ray
    ... --cpus 1               with one core
    ... --other-order          the same files under other names, so that they are read in another order

Makes the inputs below STATE when they are not there, plans and writes the plan to an output that is removed
at the end. Prints the clock, the CPU of this process and of Ray's, and the most memory of the driver and of
the workers, by what they did: their own, and with the pages of Ray's object store that they have touched.
"""

from __future__ import annotations

import argparse
import atexit
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.partitioned_inputs import make_inputs


def main() -> None:
    """Make the inputs in a process of its own, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("--images", type=int, default=30_000_000)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--boxes", choices=["lists", "rows"], default="lists")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--store-mb", type=int, default=4096, help="Ray's object store; more is spilled")
    parser.add_argument("--partition", type=int, default=2_000_000, help="rows of a partition")
    parser.add_argument("--other-order", action="store_true")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    inputs = arguments.state / f"{arguments.boxes}-{arguments.images}-{arguments.files}"
    if arguments.make:
        make_inputs(inputs, arguments.images, arguments.files, rows=arguments.boxes == "rows")
        (inputs / "made").touch()
        return
    if not (inputs / "made").exists():
        shutil.rmtree(inputs, ignore_errors=True)
        command = [sys.executable, "-m", "benchmarks.partitioned_planning", *sys.argv[1:], "--make"]
        subprocess.run(command, check=True)
    with tempfile.TemporaryDirectory(dir=arguments.state) as scratch:
        if arguments.other_order:
            inputs = _renamed(inputs, Path(scratch) / "inputs")
        measure(arguments, inputs, Path(scratch))


def _renamed(inputs: Path, folder: Path) -> Path:
    for table in ("images", "boxes"):
        (folder / table).mkdir(parents=True)
        paths = sorted((inputs / table).iterdir())
        for number, path in enumerate(paths):
            os.link(path, folder / table / f"part-{number * 7919 % 100_003:06d}.parquet")
    return folder


def measure(arguments: argparse.Namespace, inputs: Path, scratch: Path) -> None:
    """Plan and write; print figures after each."""
    from hqlabel.pipeline.job_context import Place
    from hqlabel.pipeline.planning.make_plan import make_plan, write_plan
    from hqlabel.pipeline.planning.partitioned_plan import PlanInPartitions, Sizes, plan_of_any_size
    from hqlabel.pipeline.settings import InputSettings
    from hqlabel.pipeline.storage.output_store import Store

    settings = InputSettings(images=str(inputs / "images"), boxes=str(inputs / "boxes"))
    store = Store(Place(uri=str(scratch / "out")))
    watch = Watch()
    watch.start()
    if not arguments.whole:
        watch.say("begin", start_ray(arguments.cpus, arguments.store_mb))
    if arguments.whole:
        plan: Any = make_plan(settings)
    else:
        from hqlabel.pipeline.ray_execution.ray_tasks import RayTasks

        sizes = Sizes(piece=arguments.partition, partition=arguments.partition)
        plan = plan_of_any_size(settings, tasks=lambda _: RayTasks(), large_rows=0, sizes=sizes, tell=print)
    watch.say("plan", f"{plan.summary.images:,} images, {plan.summary.boxes:,} boxes, {plan.sha256[:16]}")
    if isinstance(plan, PlanInPartitions):
        plan.write(store)
    else:
        write_plan(store, plan)
    watch.say("write", f"{len(store.list('plan/'))} files")


def start_ray(cpus: int, store_mb: int) -> str:
    """Start a private Ray; return what it has, as text."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # a socket's path has at most 107 bytes
    token = Path(folder) / "token"
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    import ray

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(ray.shutdown)
    ray.init(
        address="local",
        num_cpus=cpus,
        object_store_memory=store_mb << 20,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    return f"Ray with {cpus} cores and {store_mb} MB of object store"


class Watch(threading.Thread):
    """Looks at this process and those that it started, once a second: cheaply, or it would be what costs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._cpu: dict[int, float] = {}
        self._peak: dict[str, tuple[int, int]] = {}
        self._began = time.monotonic()
        self._before = 0.0
        self._own = psutil.Process()

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            self.look()
            time.sleep(1)

    def look(self) -> None:
        """Look once."""
        for process in [self._own, *self._own.children(recursive=True)]:
            try:
                times, memory = process.cpu_times(), process.memory_info()
                name = "driver" if process == self._own else process.name()
            except psutil.Error:
                continue
            self._cpu[process.pid] = times.user + times.system
            kind = name if name == "driver" else name[5:] if name.startswith("ray::") else "of Ray"
            before = self._peak.get(kind, (0, 0))
            own = memory.rss - memory.shared
            self._peak[kind] = max(before[0], own >> 20), max(before[1], memory.rss >> 20)

    def say(self, step: str, what: str) -> None:
        """Print the figures since the last time, and the peaks so far."""
        self.look()
        wall, cpu = time.monotonic() - self._began, sum(self._cpu.values())
        print(
            f"{step}: {what}: {wall:.0f} s, CPU {cpu - self._before:.0f} s (driver "
            f"{sum(os.times()[:2]):.0f} so far), load {os.getloadavg()[0]:.1f}"
        )
        for kind, (own, rss) in sorted(self._peak.items(), key=lambda one: -one[1][0])[:6]:
            print(f"    {kind}: at most {own} MB of its own, {rss} MB with what it shares", flush=True)
        self._began, self._before, self._peak = time.monotonic(), cpu, {}


if __name__ == "__main__":
    main()
