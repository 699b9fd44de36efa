"""Pictures and box tables that the benchmarks make for themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

BOXES_PER_IMAGE = 3
BOX_TABLE = "boxes.parquet"
_DIFFERENT = 8


def write_pictures(folder: Path, images: int, size_hw: tuple[int, int]) -> list[Path]:
    """`images` JPEGs of this size in `folder`/images, of a few different contents, each its own file."""
    (folder / "images").mkdir(parents=True)
    bodies = [_jpeg(folder, seed, size_hw) for seed in range(min(_DIFFERENT, images))]
    paths = [folder / "images" / f"{number:06d}.jpg" for number in range(images)]
    for number, path in enumerate(paths):
        path.write_bytes(bodies[number % len(bodies)])
    return paths


def _jpeg(folder: Path, seed: int, size_hw: tuple[int, int]) -> bytes:
    """A picture with structure from coarse to fine, about as hard to compress as a photograph."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    total = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((4, 90), (16, 40), (64, 20), (256, 8)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight / 255 * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    total += rng.normal(0, 6, (height, width, 1))
    path = folder / "made.jpg"
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(path, "JPEG", quality=90)
    body = path.read_bytes()
    path.unlink()
    return body


def boxes_of(number: int, size_hw: tuple[int, int], count: int = BOXES_PER_IMAGE) -> np.ndarray:
    """float64 (count, 4) xyxy inside a picture of this size; the same for the same number."""
    rng = np.random.default_rng(number)
    extent = rng.uniform(0.15, 0.5, (count, 2)) * size_hw[::-1]
    start = rng.uniform(0, 1, (count, 2)) * (np.array(size_hw[::-1]) - extent)
    return np.concatenate([start, start + extent], axis=1)


def write_boxes(folder: Path, paths: list[Path], size_hw: tuple[int, int]) -> Path:
    """`folder`/boxes.parquet, one row a picture."""
    names = [str(path.relative_to(folder)) for path in paths]
    boxes = [boxes_of(number, size_hw).tolist() for number in range(len(paths))]
    pq.write_table(pa.table({"image_uri": names, "boxes": boxes}), folder / BOX_TABLE)
    return folder / BOX_TABLE


def write_many_boxes(folder: Path, images: int) -> Path:
    """`folder`/boxes.parquet, one row an image, in no order, of that many images that need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    total = images * BOXES_PER_IMAGE
    start = rng.uniform(0, 40, (total, 2))
    corners = np.concatenate([start, start + rng.uniform(2, 20, (total, 2))], axis=1)
    boxes = pa.ListArray.from_arrays(np.arange(total + 1, dtype=np.int32) * 4, pa.array(corners.ravel()))
    offsets = np.arange(images + 1, dtype=np.int32) * BOXES_PER_IMAGE
    columns = {
        "image_uri": pa.array([many_name(i) for i in rng.permutation(images).tolist()]),
        "boxes": pa.ListArray.from_arrays(offsets, boxes),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(rng.choice(["person", "car", "dog"], total))),
        "scores": pa.ListArray.from_arrays(offsets, pa.array(rng.random(total))),
    }
    pq.write_table(pa.table(columns), folder / BOX_TABLE)
    return folder / BOX_TABLE


def many_name(number: int) -> str:
    """The relative uri of an image of `write_many_boxes`; in the order of their numbers."""
    return f"photos/{number // 1000:04d}/img_{number:09d}.png"
