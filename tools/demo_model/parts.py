"""Objects of several surfaces, as things have: a car's windows, a cup's rim, a shirt's stripe.

An object with one surface teaches that an object ends where its texture does. Here it is split by bands,
smooth noise, rings or inlaid shapes; the edges inside are often stronger than the one around it, and a part
may look like the background.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from tools.demo_model.shapes import SHAPES
from tools.demo_model.textures import OBJECT_FIELDS, axis, near_colour, noise, random_colour, surface

MOST_PARTS = 4
INLAYS = ("convex", "convex", "blob", "body", "holed", "star")
LIKE_GROUND_SHARE = 0.6  # of the objects with several parts: one part has nearly the background's colour
SAME_SURFACE_SHARE = 0.35  # of those parts: it is the background's own surface, a little lighter or darker
NEAR_COLOURS_SHARE = 0.25  # of the other parts: shades of one colour, as of a thing lit from one side

PHOTOGRAPHED_SHARE = 0.3  # of the other parts, where there are photographs: their surface is cut from one

Photographed = Callable[[np.random.Generator, int, int], np.ndarray]
Split = Callable[[np.random.Generator, np.ndarray, int], np.ndarray]


def _by_quantiles(
    field: np.ndarray, coverage: np.ndarray, rng: np.random.Generator, count: int
) -> np.ndarray:
    """Part 0..count-1 of every pixel: the field cut at random shares of the object's own pixels."""
    inside = field[coverage > 127]
    if not len(inside):
        return np.zeros(field.shape, dtype=np.uint8)
    shares = np.sort(rng.dirichlet(np.full(count, 3.0)).cumsum()[:-1])
    return np.digitize(field, np.quantile(inside, shares)).astype(np.uint8)


def bands(rng: np.random.Generator, coverage: np.ndarray, count: int) -> np.ndarray:
    """Parts one after the other along a random direction, with straight or wavy borders."""
    height, width = coverage.shape
    field = axis(rng, height, width)
    if rng.random() < 0.5:
        extent = max(height, width)
        field = field + noise(rng, height, width, extent / 3) * np.float32(rng.uniform(0.05, 0.4) * extent)
    return _by_quantiles(field, coverage, rng, count)


def islands(rng: np.random.Generator, coverage: np.ndarray, count: int) -> np.ndarray:
    """Parts of smooth noise, as on fur, maps and camouflage."""
    height, width = coverage.shape
    cell = max(height, width) * float(np.exp(rng.uniform(np.log(0.15), np.log(0.6))))
    return _by_quantiles(noise(rng, height, width, cell), coverage, rng, count)


def rings(rng: np.random.Generator, coverage: np.ndarray, count: int) -> np.ndarray:
    """Parts one inside the other: a rim, a tyre, an outline, a target."""
    height, width = coverage.shape
    padded = Image.fromarray(np.pad(coverage, 2))
    blur = ImageFilter.BoxBlur(max(height, width) * float(rng.uniform(0.04, 0.25)))
    depth = np.asarray(padded.filter(blur), dtype=np.float32)[2:-2, 2:-2]
    return _by_quantiles(depth + noise(rng, height, width, 16), coverage, rng, count)


def inlays(rng: np.random.Generator, coverage: np.ndarray, count: int) -> np.ndarray:
    """One to four shapes laid into the first part: windows, labels, eyes, buttons."""
    height, width = coverage.shape
    parts = np.zeros(coverage.shape, dtype=np.uint8)
    for index in range(1, count):
        kind = INLAYS[int(rng.integers(len(INLAYS)))]
        for _ in range(int(rng.integers(1, 5)) if rng.random() < 0.4 else 1):
            inlay_w, inlay_h = (max(int(size * rng.uniform(0.15, 0.7)), 4) for size in (width, height))
            top = int(rng.integers(height - min(inlay_h, height) + 1))
            left = int(rng.integers(width - min(inlay_w, width) + 1))
            shape = SHAPES[kind][0](rng, inlay_w, inlay_h)[: height - top, : width - left]
            parts[top : top + shape.shape[0], left : left + shape.shape[1]][shape > 127] = index
    return parts


SPLITS: tuple[tuple[Split, float], ...] = ((bands, 0.3), (islands, 0.2), (rings, 0.15), (inlays, 0.35))


def split(rng: np.random.Generator, coverage: np.ndarray) -> np.ndarray:
    """Two to four parts of a silhouette, uint8 (h, w) of 0, 1, ...; sometimes one split inside another."""
    weights = np.array([weight for _, weight in SPLITS])

    def once(count: int) -> np.ndarray:
        return SPLITS[int(rng.choice(len(SPLITS), p=weights / weights.sum()))][0](rng, coverage, count)

    if rng.random() < 0.3:
        return 2 * once(2) + once(2)
    return once(int(rng.integers(2, MOST_PARTS + 1)))


def parts_paint(
    rng: np.random.Generator,
    coverage: np.ndarray,
    under: np.ndarray,
    photographed: Photographed | None = None,
) -> np.ndarray:
    """The object's colours, float32 (h, w, 3).

    `under`: the picture where it will stand, same size. `photographed`: gives surfaces cut from photographs.
    """
    height, width = coverage.shape
    parts = split(rng, coverage)
    numbers = np.unique(parts)
    like_ground = rng.choice(numbers) if rng.random() < LIKE_GROUND_SHARE else -1
    first = random_colour(rng)
    painted = np.empty((height, width, 3), dtype=np.float32)
    for number in numbers:
        where = parts == number
        painted[where] = (
            _ground_paint(rng, under)
            if number == like_ground
            else _own_paint(rng, height, width, first, photographed)
        )[where]
    return painted


def _ground_paint(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    height, width = under.shape[:2]
    if rng.random() < SAME_SURFACE_SHARE:
        lighter = np.float32(rng.choice([-1, 1]) * rng.uniform(6, 25))
        return under[::-1, ::-1] + lighter
    base = near_colour(rng, under.mean((0, 1)), rng.uniform(8, 25))
    return surface(rng, height, width, fields=OBJECT_FIELDS, base=base)


def _own_paint(
    rng: np.random.Generator, height: int, width: int, first: np.ndarray, photographed: Photographed | None
) -> np.ndarray:
    if photographed and rng.random() < PHOTOGRAPHED_SHARE:
        return photographed(rng, height, width)
    near = rng.random() < NEAR_COLOURS_SHARE
    base = near_colour(rng, first, rng.uniform(15, 50)) if near else random_colour(rng)
    return surface(rng, height, width, fields=OBJECT_FIELDS, base=base)
