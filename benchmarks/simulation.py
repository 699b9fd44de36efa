"""A job of very many images through everything but pictures and model: plan, graph, commit, resume, publish.

    python -m benchmarks.simulation STATE --images 1000000 --seconds 450

The steps are the real ones: boxes from a Parquet file, the plan in the store, Ray Data's graph over units of
64 images, the checked and compressed Parquet file of each unit created if absent, the published tables,
`validate`. A stub stands in the workers at the level of the unit: pictures of a few kB are made in memory in
place of fetching and decoding, and the model answers with the runs of the boxes. One call works for
`--seconds` and is then killed (SIGKILL); the next one goes on, as a job does, and the kill is part of what is
measured. When all is done it prints the figures; `--print` prints those so far. `--without-ray` runs the
stages in one process, which says what they cost by themselves.

Units, seconds, CPU and peak memory are of the driver; the rest of the machine (Ray, workers) is `all CPU`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

IMAGES_PER_UNIT = 64
SIDE = 64
SIZE_HW = (480, 640)
BOXES = [[40.0, 50.0, 140.0, 120.0], [200.5, 10.0, 320.0, 300.25], [0.0, 300.0, 640.0, 480.0]]
NOTE_EVERY_S = 2.0
STEPS = ("inputs", "plan", "label", "publish", "validate")


def main() -> None:
    """Work on the next steps for so many seconds, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=450.0)
    parser.add_argument("--print", action="store_true", help="only say what was measured so far")
    parser.add_argument("--without-ray", action="store_true", help="the stages of all units in one process")
    parser.add_argument("--inside", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    state = State(arguments.state, arguments.images, with_ray=not arguments.without_ray)
    if arguments.inside:
        state.run(arguments.inside)
        return
    deadline = time.monotonic() + arguments.seconds
    while not arguments.print and state.next_step() and time.monotonic() < deadline - 5:
        work_until(deadline, state, arguments)
    print(state.report())


def work_until(deadline: float, state: State, arguments: argparse.Namespace) -> None:
    """The next step in a process of its own, which is killed at the deadline."""
    step = state.next_step()
    command = [sys.executable, "-m", "benchmarks.simulation", str(arguments.state)]
    command += ["--without-ray"] if arguments.without_ray else []
    child = subprocess.Popen([*command, "--images", str(arguments.images), "--inside", str(step)])
    try:
        code = child.wait(timeout=max(1.0, deadline - time.monotonic()))
        if code:
            raise SystemExit(f"the step {step} ended with {code}")
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        print(f"killed in the step {step}", flush=True)


class State:
    """The folder of one simulation: inputs, output, and a line of figures for each call of each step."""

    def __init__(self, folder: Path, images: int, *, with_ray: bool = True) -> None:
        self._folder, self._images, self._with_ray = folder, images, with_ray
        self._units = -(-images // IMAGES_PER_UNIT)
        folder.mkdir(parents=True, exist_ok=True)

    # -----------------------------------------------------------------------------------------
    # The record
    # -----------------------------------------------------------------------------------------

    def calls(self, step: str) -> list[dict[str, Any]]:
        """The figures of every call of a step; a killed one's are those of its last note."""
        files = sorted(self._folder.glob(f"{step}-*.json"), key=lambda file: int(file.stem.split("-")[1]))
        return [json.loads(file.read_text()) for file in files]

    def next_step(self) -> str | None:
        """The first step that is not done."""
        return next((s for s in STEPS if not any(call["done"] for call in self.calls(s))), None)

    def run(self, step: str) -> None:
        """Do a step, noting its figures from time to time and at its end."""
        file = self._folder / f"{step}-{len(self.calls(step))}.json"
        meter = Meter(file)
        with meter.noting():
            getattr(self, f"_{step}")(meter)
        meter.note(done=True)

    def report(self) -> str:
        """All figures as lines of text."""
        lines = [f"{self._images:,} images, {self._units:,} units"]
        for step in STEPS:
            for number, call in enumerate(self.calls(step)):
                words = [f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in call.items()]
                lines.append(f"{step} {number}: " + ", ".join(words))
        labels = [call for call in self.calls("label") if call.get("units")]
        if labels:
            units, seconds = sum(c["units"] for c in labels), sum(c["working s"] for c in labels)
            cpu = sum(c["CPU s"] for c in labels)
            lines.append(
                f"label in all: {units} units in {seconds:.0f} s, {units / seconds:.2f} units/s, "
                f"{IMAGES_PER_UNIT * units / seconds:.0f} images/s, "
                f"driver CPU {1000 * cpu / units:.1f} ms a unit"
            )
        return "\n".join(lines)

    # -----------------------------------------------------------------------------------------
    # The steps
    # -----------------------------------------------------------------------------------------

    def _inputs(self, meter: Meter) -> None:
        meter.figures["boxes"] = self._images * len(BOXES)
        names = [f"s3://bucket/photos/{n % 997:03d}/img_{n:09d}.jpg" for n in range(self._images)]
        offsets = np.arange(self._images + 1, dtype=np.int32) * len(BOXES)
        corners = pa.ListArray.from_arrays(
            np.arange(self._images * len(BOXES) + 1, dtype=np.int32) * 4,
            pa.array(np.tile(np.array(BOXES).ravel(), self._images)),
        )
        boxes = pa.ListArray.from_arrays(offsets, corners)
        pq.write_table(pa.table({"image_uri": names, "boxes": boxes}), self._folder / "boxes.parquet")

    def _plan(self, meter: Meter) -> None:
        from hqlabel.pipeline.job_context import BoxRules, JobContext, Weights
        from hqlabel.pipeline.job_state.job_file import Job, identity_of, open_job, units_per_part
        from hqlabel.pipeline.planning.make_plan import make_plan, write_plan
        from hqlabel.pipeline.settings import InputSettings, Limits, ModelSettings

        plan = make_plan(
            InputSettings(boxes=str(self._folder / "boxes.parquet")), images_per_unit=IMAGES_PER_UNIT
        )
        meter.figures["made s"] = meter.seconds()
        context = JobContext(
            output=self._store().place, plan_sha256=plan.sha256, images_per_unit=IMAGES_PER_UNIT,
            run_id="simulation",
            weights=Weights(source="none", sha256="0" * 64, architecture="stub", input_side=SIDE),
            model=ModelSettings(dtype="float32", boxes_per_call=16), box_rules=BoxRules(),
             access=plan.access, limits=Limits(),
        )  # fmt: skip
        boxes = self._images * len(BOXES)
        job = Job(
            identity=identity_of(context, inputs={}, limit=None, protocol=1),
            context=context,
            plan={"images": self._images, "boxes": boxes, "units": self._units},
            units_per_part=units_per_part(images=self._images, boxes=boxes, images_per_unit=IMAGES_PER_UNIT),
        )
        open_job(self._store(), job)
        write_plan(self._store(), plan)

    def _label(self, meter: Meter) -> None:
        from hqlabel.pipeline.job_state.driver_lock import Owner
        from hqlabel.pipeline.job_state.job_file import require_job

        with self._ray(), Owner.take(self._store()) as owner:
            meter.restart()
            job = require_job(self._store())
            pending = self._pending()
            meter.figures |= {"pending": len(pending), "to resume s": meter.seconds(), "units": 0}
            began = time.monotonic()

            def count(_: object) -> None:
                meter.figures["units"] += 1
                meter.figures["working s"] = time.monotonic() - began

            run = run_with_ray if self._with_ray else run_in_this_process
            run(pending, job.context, owner.number, count)
            assert not self._pending()

    def _publish(self, meter: Meter) -> None:
        from hqlabel.pipeline.job_state.driver_lock import Owner
        from hqlabel.pipeline.job_state.job_file import require_job
        from hqlabel.pipeline.ray_execution.ray_tasks import map_parts
        from hqlabel.pipeline.settings import FilterSettings
        from hqlabel.pipeline.tables.publish_tables import publish

        with self._ray(), Owner.take(self._store()) as owner:
            meter.restart()
            job = require_job(self._store())
            manifest = publish(
                self._store(), job, FilterSettings(), require_owner=owner.require,
                mapper=map_parts if self._with_ray else map,
            )  # fmt: skip
        assert (manifest.state, manifest.counts.images) == ("complete", self._images), manifest.counts
        size = sum(part.images.bytes + part.instances.bytes for part in manifest.parts)
        meter.figures |= {"parts": len(manifest.parts), "MB": size / 1e6}

    def _ray(self) -> contextlib.AbstractContextManager[None]:
        return private_ray() if self._with_ray else contextlib.nullcontext()

    def _validate(self, meter: Meter) -> None:
        from hqlabel.pipeline.job_state.job_file import require_job
        from hqlabel.pipeline.tables.verify_output import verify

        found = verify(self._store(), require_job(self._store()))
        assert found.findings == [], found.findings[:3]
        meter.figures |= {"images": found.images, "MB": found.bytes / 1e6}

    def _store(self) -> Any:
        from hqlabel.pipeline.job_context import Place
        from hqlabel.pipeline.storage.output_store import Store

        return Store(Place(uri=str(self._folder / "out")))

    def _pending(self) -> list[int]:
        from hqlabel.pipeline.tables.manifest import read_manifest
        from hqlabel.pipeline.tables.published_parts import finished_units
        from hqlabel.pipeline.tables.unit_files import list_committed

        store = self._store()
        done = finished_units(store, list(list_committed(store)), read_manifest(store))
        return [unit for unit in range(self._units) if unit not in done]


def run_with_ray(pending: Sequence[int], context: Any, driver: int, count: Callable[[object], None]) -> None:
    """The pending units through Ray Data's graph."""
    from hqlabel.pipeline.ray_execution.chain import run_units
    from hqlabel.pipeline.settings import ClusterSettings

    run_units(
        pending, context, ClusterSettings(actors=1, cpus_per_actor=0.5), epoch=driver, on_outcome=count,
        should_stop=lambda: False,
    )  # fmt: skip


def run_in_this_process(
    pending: Sequence[int], context: Any, driver: int, count: Callable[[object], None]
) -> None:
    """The pending units through the stages and what travels between them, one after the other."""
    from hqlabel.pipeline.stages.commit import commit_unit, read_outcome
    from hqlabel.pipeline.stages.rows_between_stages import UnitRow, pack, unpack
    from hqlabel.pipeline.storage.output_store import Store

    store, stub = Store(context.output), UnitStub(context, epoch=driver)
    for unit_id in pending:
        prepared, arena = made_unit(UnitRow(unit_id=unit_id), context, store, None)
        done = stub.run(unpack(pack(prepared, arena)))
        count(read_outcome(commit_unit(unpack(pack(done)), context, store)))


class Meter:
    """Seconds, CPU and memory of this process, written to a file every two seconds."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.figures: dict[str, Any] = {}
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._began, self._cpu = time.monotonic(), time.process_time()
        self._own = 0.0  # of the notes, which walk through all processes

    def seconds(self) -> float:
        """Seconds since the counting began."""
        return time.monotonic() - self._began

    def note(self, *, done: bool) -> None:
        """Write down what there is; a reader never sees half of it."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        began = time.thread_time()
        cpu = time.process_time() - self._cpu - self._own
        own = {"s": self.seconds(), "CPU s": cpu, "peak MiB": peak}
        family = psutil.Process().children(recursive=True)
        others = 0.0
        for process in family:
            with contextlib.suppress(psutil.Error):
                others += sum(process.cpu_times()[:2])
        line = {"done": done, **dict(self.figures), **own, "all CPU s": others + time.process_time()}
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(line))
        new.rename(self._file)
        self._own += time.thread_time() - began

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Notes in a thread until the block ends."""
        import threading

        over = threading.Event()

        def note() -> None:
            while not over.wait(NOTE_EVERY_S):
                self.note(done=False)

        thread = threading.Thread(target=note, daemon=True)
        thread.start()
        yield
        over.set()
        thread.join()


@contextlib.contextmanager
def private_ray() -> Iterator[None]:
    """A Ray of two cores whose workers have the stub."""
    root = str(Path(__file__).resolve().parent.parent)  # the workers look for the stub by its name
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path}
    os.environ |= {
        "RAY_idle_worker_killing_time_threshold_ms": "600000"
    }  # as `hqlabel.jobs.cluster.ray_cluster` asks for
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"worker_process_setup_hook": "benchmarks.simulation.put_stubs"},
    )  # fmt: skip
    yield
    ray.shutdown()


# ---------------------------------------------------------------------------------------------
# In the workers
# ---------------------------------------------------------------------------------------------


def put_stubs() -> None:
    """Run by Ray at the start of every worker: units are made instead of read and segmented."""
    import hqlabel.pipeline.ray_execution.chain as graph

    graph.prepare_unit = made_unit  # type: ignore[assignment]
    graph.SegmentWorker = UnitStub  # type: ignore[misc,assignment]


def made_unit(unit: Any, context: Any, store: Any, _child: object, _restart: object) -> tuple[Any, Any]:
    """The unit with its planned images, each a picture of a few kB; in place of `prepare_unit`."""
    from hqlabel.pipeline.image_result import ImageResult
    from hqlabel.pipeline.stages.prepare import planned_rows
    from hqlabel.pipeline.stages.rows_between_stages import PixelArena

    rows = planned_rows(unit, context, store)
    arena = PixelArena(len(rows), SIDE)
    picture = np.full((SIDE * 3 // 4, SIDE, 3), unit.unit_id % 251, np.uint8)
    images = tuple(
        ImageResult(
            planned=row, size_hw=SIZE_HW, stored_size_hw=SIZE_HW, source_bytes=100_000, source_etag="made",
            fetch_ms=1.0, decode_ms=1.0, pixels_hwc=arena.keep(picture),
        )
        for row in rows
    )  # fmt: skip
    return replace(unit, images=images), arena


class UnitStub:
    """The start of every unit is noted as ever, and every image has the same masks."""

    def __init__(self, context: Any, *, epoch: int, **_of_a_real_model: object) -> None:
        from hqlabel.pipeline.stages.crash_log import CrashLog
        from hqlabel.pipeline.storage.output_store import Store

        self._attempts = CrashLog(Store(context.output), epoch=epoch)

    def run(self, unit: Any) -> Any:
        """The unit with masks and without pixels."""
        start = self._attempts.note_start(unit.unit_id, unit.generation)
        images = tuple(
            replace(image, instances=_masks(), attempts=start.earlier + 1, segment_ms=1.0, pixels_hwc=None)
            for image in unit.images
        )
        return replace(unit, images=images)


@functools.cache
def _masks() -> Any:
    from hqlabel.model.records import PreparedImage, Prompts
    from tests.fakes import box_masks

    prompts = Prompts(boxes_xyxy=np.array(BOXES, np.float32))
    return box_masks(
        PreparedImage(pixels_hwc=np.zeros((SIDE, SIDE, 3), np.uint8), size_hw=SIZE_HW, prompts=prompts)
    )


if __name__ == "__main__":
    main()
