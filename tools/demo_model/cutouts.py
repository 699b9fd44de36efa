"""Held-out pictures nearer to photographs: each one cut-out of a real thing, pasted on a real photograph.

The pictures are in a folder as `photographs.Material` reads it, and not in this repository;
docs/dev/demo-model.md says which ones they were. Training uses none of them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from tools.demo_model.photographs import SOLID, Material, fit, read_picture
from tools.demo_model.scenes import Scene, jitter_boxes

ORDER_SEED = 7  # of the cut-outs, so that the first few are of every kind
SMALLEST, LARGEST = 0.35, 0.85  # of the picture's sides: the space that the cut-out is fitted into


@cache
def material_in(folder: Path) -> Material:
    """The folder's pictures, listed once."""
    return Material(folder)


def cutout_scene(folder: Path, index: int, side: int) -> tuple[Scene, np.ndarray]:
    """Cut-out `index` in the set's order on a photograph, with `side` pixels on the long side; its box.

    Raises:
        ValueError: the folder has no more cut-outs.
    """
    material = material_in(folder)
    if index >= len(material.cutouts):
        raise ValueError(f"{folder} has {len(material.cutouts)} cut-outs; there is no number {index}")
    rng = np.random.default_rng([ORDER_SEED, index])
    path = material.cutouts[np.random.default_rng(ORDER_SEED).permutation(len(material.cutouts))[index]]
    height, width = (side, int(side * rng.uniform(0.6, 1.0)))[:: 1 if rng.random() < 0.3 else -1]
    canvas = material.ground(rng, height, width)
    space = rng.uniform(SMALLEST, LARGEST)
    coverage, paint = fit(read_picture(path, "RGBA"), int(space * width), int(space * height))
    top = int(rng.integers(height - coverage.shape[0] + 1))
    left = int(rng.integers(width - coverage.shape[1] + 1))
    window = np.s_[top : top + coverage.shape[0], left : left + coverage.shape[1]]
    canvas[window] += (coverage[..., None] / np.float32(255)) * (paint - canvas[window])
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[window] = coverage > SOLID
    rows, columns = np.flatnonzero(labels.any(1)), np.flatnonzero(labels.any(0))
    box = np.array([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=np.float32)
    scene = Scene(
        pixels_hwc=np.clip(canvas, 0, 255).astype(np.uint8),
        label_map_hw=labels,
        boxes_xyxy=box,
        kinds=(path.stem.split("-")[0],),
        known_ground=False,
    )
    return scene, jitter_boxes(rng, box, (height, width))


def innermost(mask: np.ndarray) -> tuple[int, int]:
    """A pixel (x, y) deep inside the mask: where somebody would click."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    reach = min(rows[-1] - rows[0], columns[-1] - columns[0]) / 4 + 1
    blurred = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(float(reach)))
    depth = np.where(mask, np.asarray(blurred, dtype=np.int32), -1)
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(column), int(row)
