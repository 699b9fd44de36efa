"""Large made inputs for planning: a table of images and one of boxes, both in many Parquet files, shuffled.

The numbers of the images are permuted by a product modulo their count, another one for each table, so that
a file can be made by itself and no file holds neighbours.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BOXES_PER_IMAGE = 3
NAMES = ["person", "car", "dog", "cat"]
_GROUP_ROWS = 100_000


def make_inputs(folder: Path, images: int, files: int, *, rows: bool = False) -> None:
    """Write `images/` and `boxes/` below `folder`, `files` together: a third of them images.

    `rows`: one row a box instead of one row an image.
    """
    of_images = max(1, files // 3)
    for name, count, multiplier, maker in (
        ("images", of_images, 7_368_787, _images),
        ("boxes", files - of_images, 2_750_159, _box_rows if rows else _box_lists),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        edges = np.linspace(0, images, count + 1).astype(np.int64)
        assert math.gcd(multiplier, images) == 1, f"choose a number of images without the factor {multiplier}"
        for index in range(count):
            numbers = np.arange(edges[index], edges[index + 1], dtype=np.int64) * multiplier % images
            path = folder / name / f"part-{index:05d}.parquet"
            pq.write_table(maker(numbers, index), path, row_group_size=_GROUP_ROWS)


def _ids(numbers: np.ndarray) -> pa.Array:
    return pa.array([f"img_{number:010d}" for number in numbers.tolist()])


def _images(numbers: np.ndarray, _: int) -> pa.Table:
    uris = [f"s3://bucket/photos/{number % 997:03d}/img_{number:010d}.jpg" for number in numbers.tolist()]
    return pa.table({"image_id": _ids(numbers), "image_uri": pa.array(uris)})


def _numbers(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first_N2 = rng.uniform(0, 500, (count, 2))
    corners_N4 = np.concatenate([first_N2, first_N2 + rng.uniform(2, 100, (count, 2))], axis=1)
    return corners_N4, rng.integers(0, len(NAMES), count), rng.random(count)


def _box_lists(numbers: np.ndarray, seed: int) -> pa.Table:
    total = len(numbers) * BOXES_PER_IMAGE
    corners_N4, label, score = _numbers(total, seed)
    offsets = pa.array(np.arange(len(numbers) + 1, dtype=np.int32) * BOXES_PER_IMAGE)
    fours = pa.ListArray.from_arrays(np.arange(total + 1, dtype=np.int32) * 4, pa.array(corners_N4.ravel()))
    columns = {
        "image_id": _ids(numbers),
        "boxes": pa.ListArray.from_arrays(offsets, fours),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(NAMES).take(pa.array(label))),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(score)),
    }
    return pa.table(columns)


def _box_rows(numbers: np.ndarray, seed: int) -> pa.Table:
    owner = np.random.default_rng(seed).permutation(np.repeat(numbers, BOXES_PER_IMAGE))
    corners_N4, label, score = _numbers(len(owner), seed)
    corners = dict(zip(("x1", "y1", "x2", "y2"), corners_N4.T, strict=True))
    labels = pa.array(NAMES).take(pa.array(label))
    return pa.table({"image_id": _ids(owner), **corners, "label": labels, "score": pa.array(score)})
