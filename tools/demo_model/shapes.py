"""Random silhouettes for the synthetic scenes: each function returns an 8-bit coverage mask.

A silhouette is drawn in unit coordinates (a centre at 0, a reach of about 1), turned by a random angle,
scaled into its rectangle at twice the size and reduced, so that its edge is antialiased.
"""

from __future__ import annotations

import string
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SUPERSAMPLING = 2
SMOOTH_POINTS = 48
LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "&?@#"

Canvas = tuple[Image.Image, ImageDraw.ImageDraw, float, np.ndarray]


def _canvas(rng: np.random.Generator, width: int, height: int) -> Canvas:
    """A black canvas, its pen, a turn in radians and the affine map (scale, centre) from unit coordinates."""
    size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    image = Image.new("L", size, 0)
    frame = np.array([[size[0] * 0.48, size[1] * 0.48], [size[0] / 2, size[1] / 2]])
    return image, ImageDraw.Draw(image), float(rng.uniform(0, 2 * np.pi)), frame


def _place(points: np.ndarray, turn: float, frame: np.ndarray) -> list[tuple[float, float]]:
    """Turns unit points, fits them to the unit square and maps them to canvas pixels."""
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    turned = points @ rotation.T
    low, high = turned.min(0), turned.max(0)
    fitted = (turned - (low + high) / 2) / np.maximum((high - low).max() / 2, 1e-6)
    return [(float(x), float(y)) for x, y in fitted * frame[0] + frame[1]]


def _finish(image: Image.Image) -> np.ndarray:
    return np.asarray(image.reduce(SUPERSAMPLING))


def _ring_of_points(radii: np.ndarray, angles: np.ndarray, squeeze: float) -> np.ndarray:
    return np.stack([radii * np.cos(angles), squeeze * radii * np.sin(angles)], axis=1)


def convex(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """An ellipse, a rectangle or a polygon with all corners on an ellipse."""
    image, pen, turn, frame = _canvas(rng, width, height)
    kind = rng.integers(3)
    if kind == 0:
        angles = np.linspace(0, 2 * np.pi, SMOOTH_POINTS, endpoint=False)
    elif kind == 1:
        tilt = rng.uniform(0.3, 1.27)
        angles = np.array([tilt, np.pi - tilt, np.pi + tilt, 2 * np.pi - tilt])
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi / 1.15, rng.integers(3, 9)))
        angles = angles + np.linspace(0, 0.15 * 2 * np.pi, len(angles))
    points = _ring_of_points(np.ones(len(angles)), angles, rng.uniform(0.5, 1.0))
    pen.polygon(_place(points, turn, frame), fill=255)
    return _finish(image)


def blob(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A smooth closed curve: a circle whose radius is a short Fourier series of the angle."""
    image, pen, turn, frame = _canvas(rng, width, height)
    angles = np.linspace(0, 2 * np.pi, SMOOTH_POINTS * 2, endpoint=False)
    radii = np.ones(len(angles))
    strength = rng.uniform(0.15, 0.5)
    for order in range(2, 7):
        radii += strength / order * rng.normal() * np.cos(order * angles + rng.uniform(0, 2 * np.pi))
    pen.polygon(_place(_ring_of_points(np.clip(radii, 0.25, None), angles, 1.0), turn, frame), fill=255)
    return _finish(image)


def star(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A polygon with bays: a regular star, or corners at random distances."""
    image, pen, turn, frame = _canvas(rng, width, height)
    count = int(rng.integers(4, 9)) * 2
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    radii = np.ones(count)
    radii[1::2] = rng.uniform(0.35, 0.75)
    if rng.random() < 0.5:
        radii = rng.uniform(0.4, 1.0, count)
    pen.polygon(_place(_ring_of_points(radii, angles, rng.uniform(0.7, 1)), turn, frame), fill=255)
    return _finish(image)


def body(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Several ellipses and limbs that hang together, as animals, tools and furniture do."""
    image, pen, _, frame = _canvas(rng, width, height)
    scale, centre = frame
    trunk = np.array([rng.uniform(0.4, 0.75), rng.uniform(0.3, 0.6)])
    middle = rng.uniform(-0.2, 0.2, 2)
    parts = [(middle, trunk)]
    for _ in range(int(rng.integers(1, 4))):
        angle = rng.uniform(0, 2 * np.pi)
        parts.append((middle + trunk * [np.cos(angle), np.sin(angle)], rng.uniform(0.15, 0.4, 2)))
    for at, reach in parts:
        x1, y1, x2, y2 = *((at - reach) * scale + centre), *((at + reach) * scale + centre)
        draw = pen.ellipse if rng.random() < 0.75 else pen.rectangle
        draw((x1, y1, x2, y2), fill=255)
    for _ in range(int(rng.integers(0, 5))):
        root = middle + trunk * rng.uniform(-0.7, 0.7, 2)
        tip = root + rng.uniform(0.4, 0.9) * np.array([rng.normal(0, 0.3), rng.choice([-1, 1])])
        line = [tuple(p * scale + centre) for p in (root, np.clip(tip, -1, 1))]
        pen.line(line, fill=255, width=int(rng.uniform(0.08, 0.22) * scale.min()) + 2)
    return _finish(image)


def holed(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A ring, or a convex or smooth shape with one to three holes cut out."""
    outer = (convex if rng.random() < 0.5 else blob)(rng, width, height)
    image = Image.fromarray(outer).resize((width * SUPERSAMPLING, height * SUPERSAMPLING))
    pen = ImageDraw.Draw(image)
    centre, reach = np.array(image.size) / 2, np.array(image.size) * 0.48
    ring = rng.random() < 0.4
    for _ in range(1 if ring else int(rng.integers(1, 4))):
        at = centre + (rng.uniform(-0.05, 0.05, 2) if ring else rng.uniform(-0.35, 0.35, 2)) * reach
        hole = (rng.uniform(0.35, 0.55, 2) if ring else rng.uniform(0.12, 0.28, 2)) * reach
        pen.ellipse((*(at - hole), *(at + hole)), fill=0)
    return _finish(image)


def ribbon(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A bent band: a rod, a hook, a cable, a crescent."""
    image, pen, turn, frame = _canvas(rng, width, height)
    steps = np.linspace(0, 1, SMOOTH_POINTS // 2)
    bend = rng.uniform(-4, 4) if rng.random() < 0.7 else 0.0
    heading = np.cumsum(bend * np.sin(rng.uniform(0.5, 3) * np.pi * steps)) / len(steps) * 3
    middle = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0) / len(steps)
    normal = np.stack([-np.sin(heading), np.cos(heading)], axis=1)
    half = rng.uniform(0.03, 0.11) * (1 - rng.uniform(0, 0.7) * np.abs(2 * steps - 1) ** 2)[:, None]
    outline = np.concatenate([middle + normal * half, (middle - normal * half)[::-1]])
    pen.polygon(_place(outline, turn, frame), fill=255)
    return _finish(image)


def branching(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A small tree or coral: limbs that fork twice or three times and grow thinner."""
    image, pen, turn, frame = _canvas(rng, width, height)
    limbs = [(np.zeros(2), 0.0, 0.9, 0.0)]
    segments: list[tuple[np.ndarray, np.ndarray, float]] = []
    thickness = rng.uniform(0.09, 0.2)
    while limbs:
        start, angle, length, depth = limbs.pop()
        end = start + length * np.array([np.cos(angle), np.sin(angle)])
        segments.append((start, end, thickness * 0.68**depth))
        if depth < 3 and len(segments) < 24:
            spread = rng.uniform(0.35, 0.8)
            limbs += [
                (end, angle + side * spread + rng.normal(0, 0.2), length * rng.uniform(0.55, 0.85), depth + 1)
                for side in ((-1, 1) if rng.random() < 0.7 else (-1, 0, 1))
            ]
    placed = _place(np.array([p for a, b, _ in segments for p in (a, b)]), turn, frame * [[0.92], [1.0]])
    for index, (_, _, wide) in enumerate(segments):
        ends = placed[2 * index : 2 * index + 2]
        radius = max(wide * frame[0].min() * 0.6, 1.5)
        pen.line(ends, fill=255, width=int(2 * radius))
        for x, y in ends:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return _finish(image)


def lettering(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """One to three characters of Pillow's built-in face, with a stroke so that thin faces survive."""
    image, pen, _, _ = _canvas(rng, width, height)
    count = int(np.clip(round(1.4 * width / height), 1, 3))
    text = "".join(rng.choice(list(LETTERS), count))
    size = int(min(image.height * 0.95, image.width / count * 1.4))
    pen.text(
        (image.width / 2, image.height / 2),
        text,
        fill=255,
        anchor="mm",
        font=ImageFont.load_default(max(size, 8)),
        stroke_width=size * float(rng.uniform(0.01, 0.05)),
    )
    return _finish(image.rotate(float(rng.normal(0, 12)), Image.Resampling.BILINEAR))


Shape = Callable[[np.random.Generator, int, int], np.ndarray]
SHAPES: dict[str, tuple[Shape, float]] = {
    "convex": (convex, 0.22),
    "blob": (blob, 0.22),
    "body": (body, 0.20),
    "star": (star, 0.07),
    "holed": (holed, 0.09),
    "ribbon": (ribbon, 0.07),
    "branching": (branching, 0.06),
    "lettering": (lettering, 0.07),
}


def random_kind(rng: np.random.Generator) -> str:
    """The name of a kind, drawn by the weights of `SHAPES`."""
    names = list(SHAPES)
    weights = np.array([SHAPES[name][1] for name in names])
    return names[int(rng.choice(len(names), p=weights / weights.sum()))]
