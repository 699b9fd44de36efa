"""Time and memory of planning: files to Arrow, join, sort, write, read back.

    python -m benchmarks.planning lists 1000000     Parquet, one row an image, three boxes each
    python -m benchmarks.planning rows 1000000      Parquet, one row a box, shuffled, three an image
    python -m benchmarks.planning coco 1000000      instances of so many images, results of five boxes each

Prints one line: seconds by the clock, seconds of CPU, and the peak memory of the process so far, after
planning, after writing and after reading back every unit. The inputs are made in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BOXES_PER_IMAGE = 3
RESULTS_PER_IMAGE = 5
NAMES = ["person", "car", "dog", "cat"]


def main() -> None:
    """Make the inputs, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=["lists", "rows", "coco"])
    parser.add_argument("images", type=int)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        MAKERS[arguments.kind](arguments.make, arguments.images)
        return
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "benchmarks.planning", arguments.kind, str(arguments.images)]
        subprocess.run([*command, "--make", name], check=True)
        measure(arguments.kind, arguments.images, Path(name))


def measure(kind: str, images: int, folder: Path) -> None:
    """One line of figures."""
    from hqlabel.pipeline.job_context import Place
    from hqlabel.pipeline.job_state.plan_files import iter_plan
    from hqlabel.pipeline.planning.make_plan import make_plan, write_plan
    from hqlabel.pipeline.settings import InputSettings
    from hqlabel.pipeline.storage.output_store import Store

    if kind == "coco":
        settings = InputSettings(images=str(folder / "instances.json"), boxes=str(folder / "results.json"))
    else:
        settings = InputSettings(boxes=str(folder / "boxes.parquet"))
    store = Store(Place(uri=str(folder / "out")))
    steps = [_now()]
    plan = make_plan(settings)
    steps.append(_now())
    write_plan(store, plan)
    steps.append(_now())
    read = sum(unit.num_rows for unit in iter_plan(store, plan.sha256))
    steps.append(_now())
    assert read == images == plan.summary.images
    figures = [
        f"{name} {after[0] - before[0]:.1f} s, CPU {after[1] - before[1]:.1f} s, peak {after[2]} MB"
        for name, before, after in zip(("plan", "write", "read"), steps, steps[1:], strict=False)
    ]
    print(f"{kind}: {images} images, {plan.summary.boxes} boxes: {'; '.join(figures)}")


def _now() -> tuple[float, float, int]:
    times = os.times()
    return (
        time.monotonic(),
        times.user + times.system,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    )


def _uris(numbers: np.ndarray) -> pa.Array:
    return pa.array([f"s3://bucket/photos/{i % 997:03d}/img_{i:09d}.jpg" for i in numbers.tolist()])


def make_lists(folder: Path, images: int) -> None:
    """boxes.parquet, one row an image, in no order."""
    rng = np.random.default_rng(0)
    total = images * BOXES_PER_IMAGE
    boxes = pa.ListArray.from_arrays(
        np.arange(total + 1, dtype=np.int32) * 4, pa.array(_corners(rng, total).ravel())
    )
    offsets = np.arange(images + 1, dtype=np.int32) * BOXES_PER_IMAGE
    columns = {
        "image_uri": _uris(rng.permutation(images)),
        "boxes": pa.ListArray.from_arrays(offsets, boxes),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(rng.choice(NAMES, total))),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(rng.random(total))),
    }
    pq.write_table(pa.table(columns), folder / "boxes.parquet")


def make_rows(folder: Path, images: int) -> None:
    """boxes.parquet, one row a box, the boxes of an image scattered over the whole file."""
    rng = np.random.default_rng(0)
    total = images * BOXES_PER_IMAGE
    owner = rng.permutation(np.repeat(np.arange(images), BOXES_PER_IMAGE))
    corners = dict(zip(("x1", "y1", "x2", "y2"), _corners(rng, total).T, strict=True))
    rest = {"label": rng.choice(NAMES, total), "score": rng.random(total)}
    uris = _uris(np.arange(images)).take(pa.array(owner))
    pq.write_table(pa.table({"image_uri": uris, **corners, **rest}), folder / "boxes.parquet")


def _corners(rng: np.random.Generator, count: int) -> np.ndarray:
    first = rng.uniform(0, 500, (count, 2))
    return np.concatenate([first, first + rng.uniform(2, 100, (count, 2))], axis=1)


def make_coco(folder: Path, images: int) -> None:
    """instances.json without annotations, results.json with the boxes of an image scattered over it."""
    with open(folder / "instances.json", "w", encoding="utf-8") as file:
        file.write('{"images": [')
        file.writelines(
            _parted(
                f'{{"id": {i}, "file_name": "train/{i:012d}.jpg", "width": 640, "height": 480}}'
                for i in range(images)
            )
        )
        file.write('], "annotations": [], "categories": [{"id": 1, "name": "person"}]}')
    with open(folder / "results.json", "w", encoding="utf-8") as file:
        file.write("[")
        file.writelines(_parted(_results(images)))
        file.write("]")


def _parted(records: Iterator[str]) -> Iterator[str]:
    yield next(records)
    for record in records:
        yield f", {record}"


def _results(images: int) -> Iterator[str]:
    rng = np.random.default_rng(1)
    total, step = images * RESULTS_PER_IMAGE, 100_000
    for start in range(0, total, step):
        count = min(total, start + step) - start
        owners = rng.integers(0, images, count).tolist()
        boxes = np.round(rng.uniform(1, 200, (count, 4)), 2).tolist()
        scores = np.round(rng.random(count), 5).tolist()
        for owner, box, score in zip(owners, boxes, scores, strict=True):
            yield f'{{"image_id": {owner}, "category_id": 1, "bbox": {box}, "score": {score}}}'


MAKERS = {"lists": make_lists, "rows": make_rows, "coco": make_coco}

if __name__ == "__main__":
    main()
