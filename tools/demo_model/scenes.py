"""Synthetic scenes with exact masks: what the demo checkpoint is trained on and measured with.

`make_scene(seed, side)` is a pure function (for one version of numpy and Pillow). A scene is a textured
background with up to 12 overlapping objects, painted back to front with shadows, soft edges, shading, noise
and JPEG artefacts. The ground truth of an object is its *visible* part; its box is the tight box of that.
Objects that are nearly hidden or tiny are painted but not labelled.

`make_scene` is what the checkpoint is measured with: each object has one surface. `make_rich_scene` is what
it learns from: objects of several surfaces, backgrounds of several, and with a `Material` photographs and
cut-out pictures.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from tools.demo_model.parts import parts_paint, split
from tools.demo_model.photographs import Material
from tools.demo_model.shapes import SHAPES, random_kind
from tools.demo_model.textures import (
    BACKGROUND_FIELDS,
    OBJECT_FIELDS,
    near_colour,
    noise,
    random_colour,
    surface,
)

MIN_VISIBLE_FRACTION = (
    0.4  # of the object's painted area; less, and the box says too little about what is meant
)
MIN_AREA_FRACTION = 0.003  # of the picture
MIN_BOX_FRACTION = 1 / 25  # of the long side, for the shorter side of the box
SMALLEST_REACH = 0.11  # of the long side: an object's width and height before stretching
SMALLEST_RICH_REACH = 0.16  # parts of smaller objects would be a few pixels
SMALLEST_THIN_REACH = 0.22  # thin parts of smaller objects would be narrower than the mask's own pixels
THIN_KINDS = ("ribbon", "branching", "lettering")
SHIFT_FRACTION = 0.04
SCALE_FRACTION = 0.06
PHOTOGRAPH_SHARE = 0.6  # of the rich scenes stand on a photograph, where there is a Material
CUTOUT_SHARE = 0.4  # of their objects are cut-out pictures, likewise
SEVERAL_PARTS_SHARE = 0.8  # of their painted objects have several surfaces


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One picture and its objects.

        `pixels_hwc`: uint8 RGB, long side = the side asked for. `label_map_hw`: uint8, 0 background,
    k object k-1. `boxes_xyxy`: float32 (N, 4), tight, end-exclusive. `kinds`: the shape's name for each.
    `known_ground`: the background is one thing; a photograph has things of its own in it.
    """

    pixels_hwc: np.ndarray
    label_map_hw: np.ndarray
    boxes_xyxy: np.ndarray
    kinds: tuple[str, ...]
    known_ground: bool = True

    def masks(self) -> np.ndarray:
        """Bool (N, h, w): the visible pixels of each object; disjoint."""
        return self.label_map_hw[None] == np.arange(1, len(self.kinds) + 1, dtype=np.uint8)[:, None, None]


def jitter_boxes(rng: np.random.Generator, boxes_xyxy: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Boxes as a detector would give them, float32 (N, 4): no edge is off by more than 7% of the box's side.

    The centre moves by up to 4% and each side changes by up to 6%, uniformly; then clipped to the picture.
    """
    boxes = boxes_xyxy.astype(np.float64)
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = (boxes[:, 2:] + boxes[:, :2]) / 2 + sides * rng.uniform(
        -SHIFT_FRACTION, SHIFT_FRACTION, sides.shape
    )
    sides = sides * (1 + rng.uniform(-SCALE_FRACTION, SCALE_FRACTION, sides.shape))
    height, width = size_hw
    jittered = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    return np.clip(jittered, 0, [width, height, width, height]).astype(np.float32)


def make_scene(seed: int, side: int) -> Scene:
    """The scene of this seed with `side` pixels on its long side; equal arguments give equal arrays."""
    rng = np.random.default_rng([seed, side])
    height, width = _picture_size(rng, side)
    ground = random_colour(rng)
    canvas = surface(rng, height, width, fields=BACKGROUND_FIELDS, base=ground)
    labels = np.zeros((height, width), dtype=np.uint8)
    kinds: list[str] = []
    painted_areas: list[int] = []
    close_up = rng.random() < 0.25
    for _ in range(int(rng.integers(1, 5) if close_up else rng.integers(4, 13))):
        kind, area = _paint_object(rng, canvas, labels, len(kinds) + 1, close_up=close_up, ground=ground)
        if area:
            kinds.append(kind)
            painted_areas.append(area)
    labels, boxes, kept = _label_visible(labels, painted_areas, side)
    if not kept:
        return make_scene(seed + 2**40, side)  # everything was hidden or tiny: the next draw of the same seed
    pixels = _photograph(rng, canvas)
    return Scene(
        pixels_hwc=pixels, label_map_hw=labels, boxes_xyxy=boxes, kinds=tuple(kinds[i] for i in kept)
    )


def make_rich_scene(seed: int, side: int, material: Material | None = None) -> Scene:
    """As `make_scene`, of objects that have parts. Equal arguments and pictures give equal arrays."""
    rng = np.random.default_rng([seed, side, 1])
    height, width = _picture_size(rng, side)
    real = material is not None and rng.random() < PHOTOGRAPH_SHARE
    canvas = material.ground(rng, height, width) if material and real else _rich_ground(rng, height, width)
    labels = np.zeros((height, width), dtype=np.uint8)
    kinds: list[str] = []
    painted_areas: list[int] = []
    close_up = rng.random() < 0.3
    for _ in range(int(rng.integers(1, 4) if close_up else rng.integers(3, 9))):
        kind, area = _paint_rich_object(
            rng, canvas, labels, len(kinds) + 1, close_up=close_up, material=material
        )
        if area:
            kinds.append(kind)
            painted_areas.append(area)
    labels, boxes, kept = _label_visible(labels, painted_areas, side)
    if not kept:
        return make_rich_scene(seed + 2**40, side, material)
    return Scene(
        pixels_hwc=_photograph(rng, canvas),
        label_map_hw=labels,
        boxes_xyxy=boxes,
        kinds=tuple(kinds[i] for i in kept),
        known_ground=not real,
    )


def _rich_ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One surface, or several with edges between them that are no object's."""

    def paint() -> np.ndarray:
        return surface(rng, height, width, fields=BACKGROUND_FIELDS, base=random_colour(rng))

    canvas = paint()
    if rng.random() < 0.6:
        parts = split(rng, np.full((height, width), 255, dtype=np.uint8))
        for number in np.unique(parts)[1:]:
            canvas[parts == number] = paint()[parts == number]
    return canvas


def _paint_rich_object(
    rng: np.random.Generator,
    canvas: np.ndarray,
    labels: np.ndarray,
    label: int,
    *,
    close_up: bool,
    material: Material | None,
) -> tuple[str, int]:
    """Paints one object into `canvas` and `labels`; returns its kind and its area inside the picture."""
    cut_out = material is not None and bool(material.cutouts) and rng.random() < CUTOUT_SHARE
    kind = "cutout" if cut_out else random_kind(rng)
    smallest = SMALLEST_THIN_REACH if kind in THIN_KINDS else SMALLEST_RICH_REACH
    object_w, object_h = _object_size(rng, smallest, labels.shape, close_up=close_up)
    if material and cut_out:
        coverage, paint = material.cutout(rng, object_w, object_h)
    else:
        coverage, paint = SHAPES[kind][0](rng, object_w, object_h), None
    object_h, object_w = coverage.shape
    left = int(rng.uniform(-0.25 * object_w, labels.shape[1] - 0.75 * object_w))
    top = int(rng.uniform(-0.25 * object_h, labels.shape[0] - 0.75 * object_h))
    if paint is None and rng.random() < SEVERAL_PARTS_SHARE:
        rows = np.arange(top, top + object_h).clip(0, labels.shape[0] - 1)
        columns = np.arange(left, left + object_w).clip(0, labels.shape[1] - 1)
        under, photographed = canvas[rows][:, columns], material.ground if material else None
        paint = _light(rng, parts_paint(rng, coverage, under, photographed))
    elif paint is None:
        paint = _object_paint(rng, object_h, object_w, canvas.mean((0, 1)))
    coverage = _soften(rng, coverage)
    if rng.random() < 0.35:
        _cast_shadow(rng, canvas, left, top, coverage)
    return kind, _lay(canvas, labels, label, coverage=coverage, paint=paint, left=left, top=top)


def _picture_size(rng: np.random.Generator, side: int) -> tuple[int, int]:
    short = side if rng.random() < 0.5 else int(side * rng.uniform(0.6, 1.0))
    return (side, short) if rng.random() < 0.5 else (short, side)


def _paint_object(
    rng: np.random.Generator,
    canvas: np.ndarray,
    labels: np.ndarray,
    label: int,
    *,
    close_up: bool,
    ground: np.ndarray,
) -> tuple[str, int]:
    """Paints one object into `canvas` and `labels`; returns its kind and its area inside the picture."""
    height, width = labels.shape
    kind = random_kind(rng)
    smallest = SMALLEST_THIN_REACH if kind in THIN_KINDS else SMALLEST_REACH
    object_w, object_h = _object_size(rng, smallest, labels.shape, close_up=close_up)
    coverage = SHAPES[kind][0](rng, object_w, object_h)
    left = int(rng.uniform(-0.25 * object_w, width - 0.75 * object_w))
    top = int(rng.uniform(-0.25 * object_h, height - 0.75 * object_h))
    coverage = _soften(rng, coverage)
    if rng.random() < 0.35:
        _cast_shadow(rng, canvas, left, top, coverage)
    paint = _object_paint(rng, coverage.shape[0], coverage.shape[1], ground)
    return kind, _lay(canvas, labels, label, coverage=coverage, paint=paint, left=left, top=top)


def _lay(
    canvas: np.ndarray,
    labels: np.ndarray,
    label: int,
    *,
    coverage: np.ndarray,
    paint: np.ndarray,
    left: int,
    top: int,
) -> int:
    """Lays an object on the picture with its corner at (left, top); returns its area inside the picture."""
    rows, columns, inside = _clip_window(left, top, coverage, labels.shape)
    alpha = (coverage[inside].astype(np.float32) / 255)[..., None]
    window = canvas[rows, columns]
    window += alpha * (paint[inside] - window)
    covered = coverage[inside] > 127
    labels[rows, columns][covered] = label
    return int(covered.sum())


def _object_size(
    rng: np.random.Generator, smallest: float, size_hw: tuple[int, int], *, close_up: bool
) -> tuple[int, int]:
    """Width and height in pixels; `smallest`: the least reach."""
    height, width = size_hw
    reach = np.exp(
        rng.uniform(np.log(0.3), np.log(0.85)) if close_up else rng.uniform(np.log(smallest), np.log(0.55))
    )
    stretch = np.exp(rng.normal(0, 0.3))
    object_w = int(np.clip(reach * max(height, width) * np.sqrt(stretch), 10, 0.95 * width))
    object_h = int(np.clip(reach * max(height, width) / np.sqrt(stretch), 10, 0.95 * height))
    return object_w, object_h


def _soften(rng: np.random.Generator, coverage: np.ndarray) -> np.ndarray:
    if rng.random() < 0.75:
        return coverage
    blurred = Image.fromarray(coverage).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2.0))))
    return np.asarray(blurred)


def _clip_window(
    left: int, top: int, coverage: np.ndarray, size_hw: tuple[int, int]
) -> tuple[slice, slice, tuple[slice, slice]]:
    """Rows and columns of the picture under a patch at (left, top), and the part of the patch inside it."""
    y1, y2 = max(top, 0), min(top + coverage.shape[0], size_hw[0])
    x1, x2 = max(left, 0), min(left + coverage.shape[1], size_hw[1])
    y2, x2 = max(y1, y2), max(x1, x2)
    return slice(y1, y2), slice(x1, x2), (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left))


def _cast_shadow(
    rng: np.random.Generator, canvas: np.ndarray, left: int, top: int, coverage: np.ndarray
) -> None:
    extent = max(coverage.shape)
    soft = Image.fromarray(coverage).filter(ImageFilter.BoxBlur(float(rng.uniform(0.01, 0.05)) * extent))
    dark = np.asarray(soft, dtype=np.float32) * np.float32(rng.uniform(0.2, 0.6) / 255)
    shift_x, shift_y = rng.uniform(-0.12, 0.12, 2) * extent
    rows, columns, inside = _clip_window(left + int(shift_x), top + int(shift_y), dark, canvas.shape[:2])
    canvas[rows, columns] *= (1 - dark[inside])[..., None]


def _object_paint(rng: np.random.Generator, height: int, width: int, ground: np.ndarray) -> np.ndarray:
    base = near_colour(rng, ground, rng.uniform(18, 40)) if rng.random() < 0.15 else random_colour(rng)
    return _light(rng, surface(rng, height, width, fields=OBJECT_FIELDS, base=base))


def _light(rng: np.random.Generator, paint: np.ndarray) -> np.ndarray:
    """The paint, half of the time lit from one side."""
    if rng.random() < 0.5:
        height, width = paint.shape[:2]
        angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.45)
        rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.float32(np.sin(angle) * strength)
        columns = np.linspace(-1, 1, width, dtype=np.float32)[None] * np.float32(np.cos(angle) * strength)
        paint *= (1 + rows + columns)[..., None]
    return paint


def _label_visible(
    labels: np.ndarray, painted_areas: list[int], side: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Renumbers the objects that are worth a label; returns the map, the tight boxes and the kept indices."""
    visible = np.bincount(labels.ravel(), minlength=len(painted_areas) + 1)[1:]
    renumber = np.zeros(len(painted_areas) + 1, dtype=np.uint8)
    boxes: list[tuple[int, int, int, int]] = []
    kept: list[int] = []
    for index, (seen, painted) in enumerate(zip(visible, painted_areas, strict=True)):
        if seen < MIN_VISIBLE_FRACTION * painted or seen < MIN_AREA_FRACTION * labels.size:
            continue
        mask = labels == index + 1
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        if min(box[2] - box[0], box[3] - box[1]) < MIN_BOX_FRACTION * side:
            continue
        kept.append(index)
        renumber[index + 1] = len(kept)
        boxes.append(box)
    return renumber[labels], np.array(boxes, dtype=np.float32).reshape(-1, 4), kept


def _photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """What a camera and a file format do to the painting: light, blur, noise, JPEG. uint8 RGB."""
    height, width = canvas.shape[:2]
    if rng.random() < 0.4:
        light = noise(rng, height, width, max(height, width) / 2)
        canvas = canvas * (np.float32(0.7) + np.float32(0.6) * light)[..., None]
    if rng.random() < 0.5:
        canvas = (canvas - 128) * np.float32(rng.uniform(0.55, 1.2)) + np.float32(128 + rng.normal(0, 15))
        canvas = canvas * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    if rng.random() < 0.6:
        grid = rng.standard_normal((height, width, 1 if rng.random() < 0.5 else 3), dtype=np.float32)
        canvas = canvas + grid * np.float32(rng.uniform(1, 12))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    if rng.random() < 0.25:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.3))))
    if rng.random() < 0.5:
        stored = io.BytesIO()
        image.save(stored, "JPEG", quality=int(rng.integers(40, 96)))
        image = Image.open(stored)
    return np.asarray(image.convert("RGB"))
