"""Which of overlapping masks stay: greedy non-maximum suppression of their boxes, and the edges of crops.

Boxes here are (x1, y1, x2, y2) of the first and the last pixel inside, as the original measures its masks:
a box of one pixel has no area. float32 throughout, or a pair of boxes near the threshold would be judged
otherwise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

NEAR_EDGE = 20.0
"""Pixels from a crop's edge within which a box counts as cut by it."""


def pixel_boxes(bbox_xywh: Float32Array) -> Float32Array:
    """Return boxes (N, 4) of first and last pixels from tight ones, end-exclusive; zeros of an empty mask."""
    return np.concatenate(
        [bbox_xywh[:, :2], bbox_xywh[:, :2] + np.maximum(bbox_xywh[:, 2:] - 1, 0)], axis=1, dtype=np.float32
    )


def keep_best(boxes_N4: Float32Array, scores_N: Float32Array, threshold: float) -> Int64Array:
    """Return the boxes that stay, highest score first; of equal scores the earlier one.

    A box goes when its IoU with one that stays and comes before is over `threshold`.
    """
    waiting = np.argsort(-scores_N, kind="stable")
    low_N2, high_N2 = boxes_N4[:, :2], boxes_N4[:, 2:]
    area_N = (high_N2 - low_N2).prod(axis=1)
    kept = []
    while len(waiting):
        best, waiting = waiting[0], waiting[1:]
        kept.append(best)
        sides = np.minimum(high_N2[waiting], high_N2[best]) - np.maximum(low_N2[waiting], low_N2[best])
        common = np.maximum(sides, 0).prod(axis=1)
        total = area_N[best] + area_N[waiting] - common
        # Two boxes without area: 0 / 0, which is over no threshold.
        iou = np.divide(common, total, out=np.zeros_like(common), where=total > 0)
        waiting = waiting[iou.astype(np.float64) <= threshold]
    return np.array(kept, dtype=np.int64)


def cut_by_crop(
    boxes_N4: Float32Array, crop_xyxy: tuple[int, int, int, int], size_hw: tuple[int, int]
) -> BoolArray:
    """Return which boxes, in upright pixels, lie at an edge of their crop that is none of the image's."""
    image_xyxy = np.array([0, 0, size_hw[1], size_hw[0]], dtype=np.float32)
    at_crop_N4 = np.abs(boxes_N4 - np.array(crop_xyxy, dtype=np.float32)) <= NEAR_EDGE
    at_image_N4 = np.abs(boxes_N4 - image_xyxy) <= NEAR_EDGE
    cut: BoolArray = (at_crop_N4 & ~at_image_N4).any(axis=1)
    return cut
