"""Photographs and cut-out pictures from a folder, for scenes that are not painted alone.

The folder has `photographs/` (JPEG or PNG) and may have `cutouts/` (PNG whose alpha is the object). None of
them are in this repository: docs/dev/demo-model.md names the packages that they come from.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

SOLID = 127  # alpha above this is the object


class Material:
    """The pictures of one folder, in the order of their names, so that a seed chooses the same ones."""

    def __init__(self, folder: Path) -> None:
        self.photographs = sorted((folder / "photographs").iterdir())
        cutouts = folder / "cutouts"
        self.cutouts = sorted(cutouts.iterdir()) if cutouts.exists() else []
        if not self.photographs:
            raise ValueError(f"{folder / 'photographs'} is empty; wanted at least one JPEG or PNG")

    def ground(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """A part of a photograph, at least 40% of it on one side, float32 (height, width, 3)."""
        photograph = read_picture(self.photographs[int(rng.integers(len(self.photographs)))], "RGB")
        most = min(photograph.width / width, photograph.height / height)
        share = most * rng.uniform(0.4, 1.0)
        left = rng.uniform(0, photograph.width - share * width)
        top = rng.uniform(0, photograph.height - share * height)
        box = (left, top, left + share * width, top + share * height)
        cut = photograph.resize((width, height), Image.Resampling.BILINEAR, box=box, reducing_gap=2)
        pixels = np.asarray(cut, dtype=np.float32)
        return np.ascontiguousarray(pixels[:, ::-1] if rng.random() < 0.5 else pixels)

    def cutout(self, rng: np.random.Generator, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """A cut-out turned, mirrored and fitted into the size: coverage (h, w) uint8, paint (h, w, 3)."""
        picture = read_picture(self.cutouts[int(rng.integers(len(self.cutouts)))], "RGBA")
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.4:
            picture = picture.rotate(float(rng.normal(0, 25)), Image.Resampling.BILINEAR, expand=True)
        return fit(picture, width, height)


def fit(picture: Image.Image, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """An RGBA picture's object, scaled to fit into the size: coverage (h, w) uint8, colours float32."""
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > SOLID)).getbbox()
    picture = picture.crop(box) if box else picture
    scale = min(width / picture.width, height / picture.height)
    size = (max(round(picture.width * scale), 2), max(round(picture.height * scale), 2))
    small = np.asarray(picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=3))
    return small[..., 3], small[..., :3].astype(np.float32)


@lru_cache(maxsize=256)
def read_picture(path: Path, mode: str) -> Image.Image:
    """The picture at `path`, its long side at most 1024."""
    with Image.open(path) as stored:
        picture = stored.convert(mode)
    picture.thumbnail((1024, 1024), Image.Resampling.BILINEAR)
    return picture
