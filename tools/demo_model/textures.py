"""Random surfaces for the synthetic scenes: each call returns float32 RGB in 0..255."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Field = Callable[[np.random.Generator, int, int], np.ndarray]


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """A colour, float32 (3,), with greys and dull tones as common as bright ones."""
    hue, saturation, value = rng.random(), rng.random() ** 1.3, rng.uniform(0.08, 1.0)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255


def near_colour(rng: np.random.Generator, colour: np.ndarray, distance: float) -> np.ndarray:
    """A colour about `distance` grey levels away from `colour` in each channel."""
    return np.clip(colour + rng.normal(0, distance, 3), 0, 255).astype(np.float32)


def noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise in 0..1, float32 (height, width), whose features are about `cell` pixels wide."""
    rows, columns = int(height / cell) + 2, int(width / cell) + 2
    grid = Image.fromarray(rng.integers(0, 256, (rows, columns), dtype=np.uint8))
    smooth = grid.resize((width, height), Image.Resampling.BICUBIC, box=(0.5, 0.5, columns - 0.5, rows - 0.5))
    return np.asarray(smooth, dtype=np.float32) / 255


def axis(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Distance along a random direction, in pixels, float32 (height, width)."""
    angle = rng.uniform(0, 2 * np.pi)
    rows = np.arange(height, dtype=np.float32)[:, None] - height / 2
    columns = np.arange(width, dtype=np.float32)[None] - width / 2
    return np.float32(np.sin(angle)) * rows + np.float32(np.cos(angle)) * columns


def flat(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.full((height, width), rng.random(), dtype=np.float32)


def gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    along = axis(rng, height, width) / max(height, width)
    return np.clip(0.5 + along * np.float32(rng.uniform(0.6, 1.4)), 0, 1)


def octaves(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    cell = float(np.exp(rng.uniform(np.log(3), np.log(max(height, width) / 2 + 4))))
    field = noise(rng, height, width, cell)
    if cell > 6:
        field = field * 0.65 + noise(rng, height, width, cell / 3) * 0.35
    sharpness = np.float32(rng.uniform(1.0, 4.0))
    return np.clip((field - 0.5) * sharpness + 0.5, 0, 1)


def grain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return noise(rng, height, width, rng.uniform(1.0, 2.5))


def stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    period = float(np.exp(rng.uniform(np.log(5), np.log(50))))
    phase = axis(rng, height, width) * np.float32(2 * np.pi / period)
    if rng.random() < 0.5:
        phase = phase + noise(rng, height, width, max(period, 16)) * np.float32(rng.uniform(1, 7))
    wave = np.sin(phase) * np.float32(rng.choice([0.5, 2.0]))
    return np.clip(wave + 0.5, 0, 1)


def checks(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    period = np.float32(np.exp(rng.uniform(np.log(8), np.log(60))))
    across = np.sin(axis(rng, height, width) * (2 * np.pi / period))
    down = np.sin(axis(rng, height, width) * (2 * np.pi / period))
    return np.clip(across * down * np.float32(rng.choice([1.0, 4.0])) + 0.5, 0, 1)


def patches(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Overlapping ellipses, rectangles and lines of different tones."""
    image = Image.new("L", (width, height), int(rng.integers(256)))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 16))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        reach_x, reach_y = rng.uniform(0.03, 0.3, 2) * (width, height)
        tone, kind = int(rng.integers(256)), rng.integers(3)
        if kind == 0:
            pen.ellipse((x - reach_x, y - reach_y, x + reach_x, y + reach_y), fill=tone)
        elif kind == 1:
            pen.rectangle((x - reach_x, y - reach_y, x + reach_x, y + reach_y), fill=tone)
        else:
            pen.line(
                (x, y, rng.uniform(0, width), rng.uniform(0, height)),
                fill=tone,
                width=int(rng.integers(1, 8)),
            )
    return np.asarray(image, dtype=np.float32) / 255


OBJECT_FIELDS: tuple[tuple[Field, float], ...] = (
    (flat, 0.24),
    (gradient, 0.2),
    (octaves, 0.22),
    (grain, 0.08),
    (stripes, 0.1),
    (checks, 0.06),
    (patches, 0.1),
)
BACKGROUND_FIELDS: tuple[tuple[Field, float], ...] = (
    (flat, 0.06),
    (gradient, 0.16),
    (octaves, 0.34),
    (grain, 0.06),
    (stripes, 0.12),
    (checks, 0.08),
    (patches, 0.18),
)


def surface(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    fields: tuple[tuple[Field, float], ...],
    base: np.ndarray,
) -> np.ndarray:
    """A random field of `fields` painted from `base` towards a second colour, float32 (height, width, 3)."""
    weights = np.array([weight for _, weight in fields])
    field = fields[int(rng.choice(len(fields), p=weights / weights.sum()))][0](rng, height, width)
    contrast = rng.uniform(12, 45) if rng.random() < 0.6 else rng.uniform(45, 110)
    other = near_colour(rng, base, contrast)
    painted = base.astype(np.float32) + field[..., None] * (other - base).astype(np.float32)
    if rng.random() < 0.35:
        painted += (noise(rng, height, width, rng.uniform(1.5, 8)) - 0.5)[..., None] * np.float32(
            rng.uniform(8, 40)
        )
    return painted
