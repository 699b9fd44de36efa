"""Training batches: cached scenes, cut, mirrored and recoloured, with jittered boxes and soft targets."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image

from hqlabel.model.prompt_encoder import BACKGROUND, FOREGROUND
from tools.demo_model.cache import UNKNOWN, SceneCache
from tools.demo_model.scenes import MIN_AREA_FRACTION, MIN_VISIBLE_FRACTION, jitter_boxes

PATCH = 16
FINE = 4  # pixels: the side of a cell of the mask, a quarter of a patch
TOKENS = {2: 0.6, 3: 0.2, 4: 0.2}  # of a step's prompts: how many tokens each has, and how often
BOXLESS_SHARE = 0.3  # of the prompts: clicks alone
NEGATIVE_SHARE = 0.35  # of the clicks after the first: what the object is not
PIXEL_MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float32)
PIXEL_STD = np.array([58.395, 57.12, 57.375], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B pictures and N = B * K objects.

    `pixels_B3SS`: normalised, zero-padded. `boxes_N4`: jittered, xyxy, model pixels. `image_index_N`: int64.
    Every prompt of a batch has T tokens: a box and T - 2 clicks, or where `boxless_N`, T - 1 clicks and the
    padding point. `points_NP2`: T - 1 clicks each, pixels (x, y); `point_labels_NP`: 1 on the object, else 0.
    `targets_NHW`: share of each target cell that the object covers, 0..1. `labels_BL`: uint8, the label at
    the centre of each of the encoder's cells; `labels_BHW`: of each cell of 4 pixels.
    """

    pixels_B3SS: torch.Tensor
    boxes_N4: torch.Tensor
    points_NP2: torch.Tensor
    point_labels_NP: torch.Tensor
    boxless_N: torch.Tensor
    image_index_N: torch.Tensor
    targets_NHW: torch.Tensor
    labels_BL: torch.Tensor
    labels_BHW: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def make_batch(
    cache: SceneCache, rng: np.random.Generator, *, side: int, images: int, boxes: int, cell: int
) -> Batch:
    """`images` pictures of `side` pixels with `boxes` prompts each; targets have cells of `cell` pixels."""
    clicks = int(rng.choice(list(TOKENS), p=list(TOKENS.values()))) - 1
    pixels = np.zeros((images, side, side, 3), dtype=np.float32)
    cell_labels = np.zeros((images, side, side), dtype=np.uint8)
    prompts, targets, points, point_labels = [], [], [], []
    for index in range(images):
        picture, labels, chosen = _draw_picture(cache, rng, side)
        height, width = labels.shape
        pixels[index, :height, :width] = (picture - PIXEL_MEAN) / PIXEL_STD
        cell_labels[index, :height, :width] = labels
        for label in rng.permutation(np.resize(rng.permutation(chosen), boxes)):
            mask = np.zeros((side, side), dtype=np.float32)
            mask[:height, :width] = labels == label
            tight = np.array([_tight_box(labels == label)], dtype=np.float32)
            prompts.append(jitter_boxes(rng, tight, (height, width))[0])
            at, on = _click(rng, labels == label, tight[0].astype(int), clicks)
            points.append(at)
            point_labels.append(on)
            targets.append(mask.reshape(side // cell, cell, side // cell, cell).mean((1, 3)))
    centres = cell_labels[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].reshape(images, -1)
    return Batch(
        labels_BL=torch.from_numpy(centres),
        labels_BHW=torch.from_numpy(cell_labels[:, FINE // 2 :: FINE, FINE // 2 :: FINE].copy()),
        pixels_B3SS=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        boxes_N4=torch.from_numpy(np.stack(prompts)),
        points_NP2=torch.from_numpy(np.stack(points)),
        point_labels_NP=torch.from_numpy(np.stack(point_labels)),
        boxless_N=torch.from_numpy(rng.random(len(prompts)) < BOXLESS_SHARE),
        image_index_N=torch.arange(images).repeat_interleave(boxes),
        targets_NHW=torch.from_numpy(np.stack(targets)),
    )


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _click(
    rng: np.random.Generator, mask: np.ndarray, box: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Clicks (count, 2) as pixels (x, y) and their labels: the first on the object, some others beside it."""
    left, top, right, bottom = box
    reach_x, reach_y = (right - left) // 5 + 2, (bottom - top) // 5 + 2
    y0, x0 = max(top - reach_y, 0), max(left - reach_x, 0)
    around = mask[y0 : bottom + reach_y, x0 : right + reach_x]
    on = rng.random(count) >= NEGATIVE_SHARE
    on[0] = True
    on |= bool(around.all())
    chosen = [rng.choice(np.flatnonzero(around == wanted)) for wanted in on]
    rows, columns = np.unravel_index(chosen, around.shape)
    labels = np.where(on, FOREGROUND, BACKGROUND).astype(np.int64)
    return np.stack([columns + x0, rows + y0], axis=1).astype(np.float32), labels


def _draw_picture(
    cache: SceneCache, rng: np.random.Generator, side: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture whose long side is at most `side`, its label map and the labels worth asking for."""
    while True:
        pixels, labels = cache[int(rng.integers(len(cache)))]
        before = np.bincount(labels.ravel(), minlength=256)
        pixels, labels = _cut(rng, pixels, labels, side)
        after = np.bincount(labels.ravel(), minlength=256)
        zoom = labels.size / max(before.sum(), 1)
        enough = (after >= MIN_AREA_FRACTION * labels.size) & (
            after >= MIN_VISIBLE_FRACTION * before * min(zoom, 1)
        )
        chosen = np.flatnonzero(enough[1:UNKNOWN]) + 1
        if len(chosen):
            return _recolour(rng, pixels), labels, chosen


def _cut(
    rng: np.random.Generator, pixels: np.ndarray, labels: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """A random part of the picture (all of it a quarter of the time), turned, with its long side = `side`.

    Parts are shown at 0.7 to 1.5 times their painted size, so that a small side means less picture and not
    smaller objects: what fills a 16-pixel patch stays alike at every side.
    """
    height, width = labels.shape
    share = min(1.0, side / max(height, width) / rng.uniform(0.7, 1.5))
    if share < 1 and rng.random() < 0.75:
        new_h, new_w = int(height * share), int(width * share)
        top, left = int(rng.integers(height - new_h + 1)), int(rng.integers(width - new_w + 1))
        pixels, labels = (
            pixels[top : top + new_h, left : left + new_w],
            labels[top : top + new_h, left : left + new_w],
        )
    if rng.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    if rng.random() < 0.2:  # seldom, as of the next: photographs have their ground below
        pixels, labels = pixels[::-1], labels[::-1]
    if rng.random() < 0.2:
        pixels, labels = pixels.transpose(1, 0, 2), labels.T
    scale = side / max(labels.shape)
    if scale == 1:
        return pixels, labels
    size = (max(int(labels.shape[1] * scale + 0.5), 1), max(int(labels.shape[0] * scale + 0.5), 1))
    picture = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(picture), np.asarray(Image.fromarray(np.ascontiguousarray(labels)).resize(size, 0))


def _recolour(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Float32 (h, w, 3): channels at times in another order, negative or grey, each with its own gain."""
    order = rng.permutation(3) if rng.random() < 0.4 else [0, 1, 2]
    coloured = pixels[..., order].astype(np.float32)
    if rng.random() < 0.08:
        coloured = 255 - coloured
    if rng.random() < 0.1:
        coloured = np.repeat(coloured.mean(2, keepdims=True), 3, axis=2)
    gain, lift = rng.uniform(0.8, 1.2, 3).astype(np.float32), rng.uniform(-15, 15, 3).astype(np.float32)
    return np.clip(coloured * gain + lift, 0, 255)


def random_boxes(rng: np.random.Generator, *, side: int, boxes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (N, 4) anywhere; the share of each 4-pixel cell that lies in them, (N, side / 4, side / 4)."""
    reach = side * (0.04 + 0.4 * rng.random((boxes, 2)) ** 1.5)
    centre = side * rng.random((boxes, 2))
    corners = np.clip(np.concatenate([centre - reach, centre + reach], axis=1), 0, side).astype(np.float32)
    edges = np.arange(0, side + 1, 4, dtype=np.float32)

    def covered(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        inside = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
        return np.clip(inside, 0, None) / 4

    across, down = covered(corners[:, 0], corners[:, 2]), covered(corners[:, 1], corners[:, 3])
    return torch.from_numpy(corners), torch.from_numpy(down[:, :, None] * across[:, None])
