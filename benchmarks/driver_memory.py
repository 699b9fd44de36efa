"""Peak memory of the driver against the number of planned images, with a model that takes no time.

    python -m benchmarks.driver_memory 1000 10000 100000
    python -m benchmarks.driver_memory 62500 --images-per-unit 4    (the units of 1,000,000 images)

Every image is the same small PNG under another name, with two boxes; each size runs in a process of its
own with a private Ray of two cores. Prints one line a size: units, seconds, units a second, the
driver's memory before the first unit, after each fifth of them and at its peak, and the CPU time it spent a
unit.
"""

from __future__ import annotations

import argparse
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGES_PER_FOLDER = 1000
SIDE = 64


def main() -> None:
    """Run one process for every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=int, nargs="+")
    parser.add_argument("--images-per-unit", type=int, default=64)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(measure(arguments.images[0], arguments.images_per_unit), flush=True)
        return
    for images in arguments.images:
        size = [str(images), "--images-per-unit", str(arguments.images_per_unit)]
        subprocess.run([sys.executable, "-m", "benchmarks.driver_memory", "--inside", *size], check=True)


def measure(images: int, images_per_unit: int) -> str:
    """One line of figures for a job of so many images."""
    import ray

    from hqlabel.pipeline.job_context import BoxRules, JobContext, Place, UnitOutcome, Weights
    from hqlabel.pipeline.planning.make_plan import make_plan, write_plan
    from hqlabel.pipeline.ray_execution.chain import run_units
    from hqlabel.pipeline.settings import ClusterSettings, InputSettings, Limits, ModelSettings
    from hqlabel.pipeline.storage.output_store import Store

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_inputs(folder, images)
        plan = make_plan(InputSettings(boxes=str(folder / "boxes.parquet")), images_per_unit=images_per_unit)
        context = JobContext(
            output=Place(uri=str(folder / "out")),
            plan_sha256=plan.sha256,
            images_per_unit=images_per_unit,
            run_id="bench",
            weights=Weights(source="none", sha256="0" * 64, architecture="stub", input_side=SIDE),
            model=ModelSettings(dtype="float32", boxes_per_call=16),
            box_rules=BoxRules(),
            access=plan.access,
            limits=Limits(),
            segmenter="tests.fakes:box_segmenter",
        )
        write_plan(Store(context.output), plan)
        units = plan.summary.units
        del plan
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
        process = psutil.Process()
        before, began, cpu = process.memory_info().rss, time.monotonic(), time.process_time()
        seen: list[int] = []
        held: list[int] = []

        def note(outcome: UnitOutcome) -> None:
            seen.append(outcome.images)
            if len(seen) % max(1, units // 5) == 0:
                held.append(process.memory_info().rss >> 20)

        run_units(
            range(units),
            context,
            ClusterSettings(),
            epoch=1,
            on_outcome=note,
            should_stop=lambda: False,
        )
        seconds = time.monotonic() - began
        ray.shutdown()
    assert sum(seen) == images
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        f"{images:>9} images {units:>6} units {seconds:8.1f} s {units / seconds:6.1f} units/s  driver "
        f"{before / 2**20:5.0f} MiB before, {', '.join(map(str, held))} on the way, "
        f"{peak / 2**20:5.0f} MiB at its peak, "
        f"{1000 * (time.process_time() - cpu) / units:5.1f} ms CPU a unit"
    )


def _write_inputs(folder: Path, images: int) -> None:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    names = [f"{number // IMAGES_PER_FOLDER:04d}/{number:08d}.png" for number in range(images)]
    for at, name in enumerate(names):
        if at % IMAGES_PER_FOLDER == 0:
            (folder / name).parent.mkdir()
        (folder / name).write_bytes(buffer.getvalue())
    boxes = [[4.0, 5.0, 14.0, 12.0], [0.0, 0.0, 12.0, 9.0]]
    columns = {"image_id": names, "image_uri": names, "boxes": [boxes] * images}
    pq.write_table(pa.table(columns), folder / "boxes.parquet")


if __name__ == "__main__":
    main()
