"""Sizes, boxes and points: plain arithmetic, and the one resize of an image.

Frames: "upright" pixels are those of the picture as a person sees it, "model" pixels those of the same
picture after the one resize to the checkpoint's input side. x runs right, y runs down. Coordinates are
continuous: pixel (0, 0) covers [0, 1) x [0, 1), and a box that covers a W x H picture is (0, 0, W, H).

Formats: xyxy is (x1, y1, x2, y2), xywh is (x1, y1, width, height), cxcywh is (centre x, centre y, width,
height). The format is in every name; one array holds one format.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
UInt8Array = npt.NDArray[np.uint8]


def target_size_hw(size_hw: tuple[int, int], side: int) -> tuple[int, int]:
    """The (height, width) in model pixels of a picture of `size_hw` whose long side becomes `side`.

    Each side is `int(x * side / max(h, w) + 0.5)`, as in the original predictor; floor differs from it
    in more than half of all sizes and moves every mask. The long side always comes out as `side`.

    Raises:
        ValueError: a side is below 1, or (`too_elongated`) the short side would round to 0.
    """
    height, width = size_hw
    if height < 1 or width < 1 or side < 1:
        raise ValueError(f"image size {height}x{width} with input side {side}: each must be at least 1")
    scale = side / max(height, width)
    resized_hw = (int(height * scale + 0.5), int(width * scale + 0.5))
    if min(resized_hw) < 1:
        raise ValueError(
            f"too_elongated: an image of height {height} and width {width}, resized so that its long side "
            f"is {side}, would have a side of 0 pixels; cut it into pieces of at most {2 * side} to 1"
        )
    return resized_hw


def resize_longest_side(image_hwc: UInt8Array, side: int) -> UInt8Array:
    """A new uint8 RGB image (h, w, 3) with its long side equal to `side`: the only resize in the product.

    Pillow's bilinear filter on uint8, which averages over the whole footprint when it shrinks; the
    original predictor was trained and published with it. An image that has the size already is copied.

    Raises:
        ValueError: not uint8 (H, W, 3), or `too_elongated` (see `target_size_hw`).
    """
    if image_hwc.dtype != np.uint8 or image_hwc.ndim != 3 or image_hwc.shape[2] != 3:
        raise ValueError(
            f"image has dtype {image_hwc.dtype} and shape {image_hwc.shape}; wanted uint8 RGB, "
            "shape (height, width, 3)"
        )
    if target_size_hw(image_hwc.shape[:2], side) == image_hwc.shape[:2]:
        return image_hwc.copy()
    return resize_picture(Image.fromarray(np.ascontiguousarray(image_hwc)), side)


def resize_picture(picture: Image.Image, side: int, *, full_hw: tuple[int, int] | None = None) -> UInt8Array:
    """The same of a picture that Pillow holds, mode RGB: at 12 megapixels two copies of 36 MB less.

    `full_hw`: its size before it was loaded reduced, by which the new one is reckoned; None: as it is.

    Raises:
        ValueError: another mode, or `too_elongated`.
    """
    if picture.mode != "RGB":
        raise ValueError(f"picture has mode {picture.mode}; wanted RGB")
    height, width = target_size_hw(full_hw or (picture.height, picture.width), side)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    # np.array, not asarray: the result must own its memory and be writable (torch warns otherwise).
    return np.array(picture)


def scale_points(
    points_xy: npt.ArrayLike, size_hw: tuple[int, int], resized_hw: tuple[int, int]
) -> Float32Array:
    """Points (..., 2) as (x, y) in upright pixels -> the same in model pixels, float32.

    Two separate factors from the rounded sizes (they differ by up to half a pixel in the short side),
    multiplied in float64 and rounded once, as the original's `apply_coords` does.
    """
    factors_xy = np.array([resized_hw[1] / size_hw[1], resized_hw[0] / size_hw[0]], dtype=np.float64)
    points = _last_axis(points_xy, 2, "points_xy")
    return (points * factors_xy).astype(np.float32)


def scale_boxes(
    boxes_xyxy: npt.ArrayLike, size_hw: tuple[int, int], resized_hw: tuple[int, int]
) -> Float32Array:
    """Boxes (N, 4) as xyxy in upright pixels -> the same in model pixels, float32. See `scale_points`."""
    boxes = _last_axis(boxes_xyxy, 4, "boxes_xyxy")
    corners_xy = scale_points(boxes.reshape(-1, 2, 2), size_hw, resized_hw)
    return corners_xy.reshape(boxes.shape)


def xywh_to_xyxy(boxes_xywh: npt.ArrayLike) -> Float64Array:
    """Boxes (N, 4) as xywh -> xyxy, float64, same frame."""
    boxes = _last_axis(boxes_xywh, 4, "boxes_xywh")
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def xyxy_to_xywh(boxes_xyxy: npt.ArrayLike) -> Float64Array:
    """Boxes (N, 4) as xyxy -> xywh, float64, same frame."""
    boxes = _last_axis(boxes_xyxy, 4, "boxes_xyxy")
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def cxcywh_to_xyxy(boxes_cxcywh: npt.ArrayLike) -> Float64Array:
    """Boxes (N, 4) as cxcywh -> xyxy, float64, same frame."""
    boxes = _last_axis(boxes_cxcywh, 4, "boxes_cxcywh")
    centre_xy, half_wh = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([centre_xy - half_wh, centre_xy + half_wh], axis=-1)


def xyxy_to_cxcywh(boxes_xyxy: npt.ArrayLike) -> Float64Array:
    """Boxes (N, 4) as xyxy -> cxcywh, float64, same frame."""
    boxes = _last_axis(boxes_xyxy, 4, "boxes_xyxy")
    centre_xy = (boxes[..., :2] + boxes[..., 2:]) / 2
    return np.concatenate([centre_xy, boxes[..., 2:] - boxes[..., :2]], axis=-1)


def boxes_to_xyxy(boxes: npt.ArrayLike, box_format: BoxFormat) -> Float64Array:
    """Boxes (N, 4) in `box_format` -> xyxy, float64, same frame.

    Raises:
        ValueError: a format that is not `xyxy`, `xywh` or `cxcywh`.
    """
    if box_format == "xyxy":
        return _last_axis(boxes, 4, "boxes_xyxy").copy()
    if box_format == "xywh":
        return xywh_to_xyxy(boxes)
    if box_format == "cxcywh":
        return cxcywh_to_xyxy(boxes)
    raise ValueError(f"box format {box_format!r} is not known; use xyxy, xywh or cxcywh")


def denormalise_boxes(boxes_normalised: npt.ArrayLike, size_hw: tuple[int, int]) -> Float64Array:
    """Boxes (N, 4) of any of the three formats in fractions of the picture -> pixels of a `size_hw` picture.

    Fractions are multiplied by the side they run along; the format stays what it was.
    """
    height, width = size_hw
    sides = np.array([width, height, width, height], dtype=np.float64)
    return _last_axis(boxes_normalised, 4, "boxes_normalised") * sides


def clip_boxes(boxes_xyxy: npt.ArrayLike, size_hw: tuple[int, int]) -> Float64Array:
    """Boxes (N, 4) as xyxy in the pixels of a `size_hw` picture, each corner moved into the picture.

    A box wholly outside comes back with no area (see `boxes_touch_image`); NaN stays NaN.
    """
    height, width = size_hw
    highest = np.array([width, height, width, height], dtype=np.float64)
    return np.clip(_last_axis(boxes_xyxy, 4, "boxes_xyxy"), 0.0, highest)


def box_areas(boxes_xyxy: npt.ArrayLike) -> Float64Array:
    """Area (N,) of xyxy boxes (N, 4), float64; 0 where a side is not positive."""
    boxes = _last_axis(boxes_xyxy, 4, "boxes_xyxy")
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return sides[..., 0] * sides[..., 1]


def boxes_are_valid(boxes_xyxy: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether each xyxy box (N, 4) is finite with x1 < x2 and y1 < y2; bool (N,)."""
    boxes = _last_axis(boxes_xyxy, 4, "boxes_xyxy")
    ordered = (boxes[..., 0] < boxes[..., 2]) & (boxes[..., 1] < boxes[..., 3])
    return np.isfinite(boxes).all(axis=-1) & ordered


def boxes_touch_image(boxes_xyxy: npt.ArrayLike, size_hw: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Whether each xyxy box (N, 4) shares some area with a `size_hw` picture; bool (N,). NaN gives False."""
    return box_areas(clip_boxes(boxes_xyxy, size_hw)) > 0


def box_iou(boxes_a_xyxy: npt.ArrayLike, boxes_b_xyxy: npt.ArrayLike) -> Float64Array:
    """Intersection over union of boxes pair by pair, (N, 4) and (N, 4) xyxy in one frame -> (N,) float64.

    Two boxes without area give 0.
    """
    boxes_a = _last_axis(boxes_a_xyxy, 4, "boxes_a_xyxy")
    boxes_b = _last_axis(boxes_b_xyxy, 4, "boxes_b_xyxy")
    overlap_xyxy = np.concatenate(
        [
            np.maximum(boxes_a[..., :2], boxes_b[..., :2]),
            np.minimum(boxes_a[..., 2:], boxes_b[..., 2:]),
        ],
        axis=-1,
    )
    overlap = box_areas(overlap_xyxy)
    union = box_areas(boxes_a) + box_areas(boxes_b) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def _last_axis(values: npt.ArrayLike, length: int, name: str) -> Float64Array:
    """`values` as float64 with a last axis of `length`; an empty list stands for no rows at all."""
    array: np.ndarray[Any, np.dtype[np.float64]] = np.asarray(values, dtype=np.float64)
    if array.shape == (0,):
        return array.reshape(0, length)
    if array.ndim == 0 or array.shape[-1] != length:
        raise ValueError(f"{name} has shape {array.shape}; its last axis must be {length} long")
    return array
