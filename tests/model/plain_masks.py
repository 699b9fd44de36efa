"""Masks by their plain definition: whole frames, two bilinear steps, pycocotools.

What `model/masks.py` and `model/rle.py` are held to; takes 20 bytes a pixel a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from hqlabel.model.masks import stability, upsample_logits


@dataclass(frozen=True, kw_only=True)
class PlainMasks:
    masks_NHW: torch.Tensor
    stability_score_N: torch.Tensor
    area_N: torch.Tensor
    bbox_xywh_N4: torch.Tensor


def plain_masks(
    low_res_NLL: torch.Tensor,
    *,
    resized_hw: tuple[int, int],
    size_hw: tuple[int, int],
    stability_offset: float = 1.0,
) -> PlainMasks:
    logits_NHW = upsample_logits(low_res_NLL, resized_hw, size_hw)
    masks_NHW = logits_NHW > 0
    above_N = (logits_NHW > stability_offset).sum((1, 2))
    below_N = (logits_NHW > -stability_offset).sum((1, 2))
    return PlainMasks(
        masks_NHW=masks_NHW,
        stability_score_N=stability(above_N, below_N),
        area_N=masks_NHW.sum((1, 2)),
        bbox_xywh_N4=bboxes_xywh(masks_NHW),
    )


def bboxes_xywh(masks_NHW: torch.Tensor) -> torch.Tensor:
    """The tight boxes of dense masks, float32 (N, 4); zeros for an empty mask."""
    spans = []
    for axis in (1, 2):  # reducing the rows leaves the columns, and the other way round
        touched = masks_NHW.any(axis).to(torch.uint8)
        first = touched.argmax(1)
        spans += [(first, touched.shape[1] - touched.flip(1).argmax(1) - first)]
    (x, width), (y, height) = spans
    boxes = torch.stack([x, y, width, height], dim=1)
    return torch.where(masks_NHW.any(2).any(1)[:, None], boxes, 0).float()


def coco_counts(masks_NHW: Any) -> tuple[str, ...]:
    """The string that pycocotools makes of each dense mask."""
    columns = (np.asfortranarray(np.asarray(mask).astype(np.uint8)) for mask in masks_NHW)
    return tuple(coco_mask.encode(mask)["counts"].decode("ascii") for mask in columns)


def plain_components(mask: np.ndarray) -> int:
    """Flood fill over 8 neighbours, pixel by pixel."""
    todo = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    found = 0
    while todo:
        found += 1
        stack = [todo.pop()]
        while stack:
            y, x = stack.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            stack += near
    return found


def random_masks(seed: int, n: int, height: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    densities = rng.choice([0.0, 0.05, 0.3, 0.5, 0.8, 1.0], n)
    return [rng.random((height, width)) < d for d in densities]
