"""What is measured on finished masks, and which rows are marked: nothing here ever drops a row.

`measure` runs once, when a unit is built. `mark` runs at every publish, from stored columns alone, so
that new thresholds cost no model time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pycocotools import mask as coco_mask

from hqlabel.model import rle
from hqlabel.model.records import Instances
from hqlabel.pipeline.box_geometry import best_first, box_iou, boxes_to_xyxy, suppress
from hqlabel.pipeline.settings import FilterSettings

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

TINY_PX = 16
FILLS_BOX_SHARE = 0.98
LEAKS_BOX_SHARE = 0.80
FRAGMENTED_FROM = 5

# Every flag that qc_flags can hold, in its order.
FLAGS: dict[str, str] = {
    "empty": "the mask has no pixel",
    "tiny": f"the mask has fewer than {TINY_PX} pixels",
    "fills_box": f"the mask covers at least {FILLS_BOX_SHARE:.0%} of its box",
    "leaks_box": f"less than {LEAKS_BOX_SHARE:.0%} of the mask lies in its box",
    "fragmented": f"the mask has {FRAGMENTED_FROM} separate parts or more",
    "box_clipped": "the given box reached over the image and was cut to it",
    "score_not_finite": "the detector's score was NaN or infinite, and is null",
    "reduced_call_shape": "memory ran out; the image was redone with the fixed smaller call",
}


@dataclass(frozen=True, kw_only=True)
class MaskQuality:
    """Measurements of N masks, in their order.

    `box_iou`: float64 (N,), IoU of the prompt box and the mask's tight box; 0 for an empty mask.
    `mask_in_box`: float64 (N,), share of the mask's pixels whose centre lies in the prompt box; NaN
    for an empty mask. Both NaN where the prompt has no box. `num_components`: int64 (N,), 8 neighbours.
    `touches_border`: bool (N,). `flags`: names of FLAGS, in their order.
    """

    box_iou: Float64Array
    mask_in_box: Float64Array
    num_components: npt.NDArray[np.int64]
    touches_border: BoolArray
    flags: tuple[tuple[str, ...], ...]

    def of(self, part: slice) -> MaskQuality:
        """Return the measurements of some of the masks."""
        return MaskQuality(**{name: values[part] for name, values in vars(self).items()})


def measure(images: Sequence[Instances], prompts_xyxy: Sequence[npt.ArrayLike]) -> MaskQuality:
    """Return the quality of the masks of all these images, one after the other, against their prompt boxes.

    `prompts_xyxy`: for each image (n, 4) in its upright pixels, a row a mask; NaN: no box.

    Raises:
        ValueError: a run-length string is not a mask of its image's size.
    """
    boxes = _rows_of_four(prompts_xyxy)
    no_box = np.asarray(~np.isfinite(boxes).all(axis=1), dtype=np.bool_)
    boxes = np.where(no_box[:, None], 0.0, boxes)
    counts = [text for image in images for text in image.counts]
    sizes_hw = np.array([image.size_hw for image in images for _ in image.counts], np.int64).reshape(-1, 2)
    inside, components = _count(counts, sizes_hw, boxes)
    area = np.concatenate([np.zeros(0, np.int64), *[np.asarray(i.area, np.int64) for i in images]])
    empty = area == 0
    tight = _rows_of_four([image.bbox_xywh for image in images])
    overlap = box_iou(boxes, boxes_to_xyxy(tight, "xywh"))
    overlap = np.where(no_box, np.nan, np.where(empty, 0.0, overlap))
    mask_in_box = np.where(no_box | empty, np.nan, inside / np.maximum(area, 1))
    rules = {
        "empty": empty,
        "tiny": ~empty & (area < TINY_PX),
        "fills_box": ~empty & ~no_box & (inside >= FILLS_BOX_SHARE * _box_pixels(boxes)),
        "leaks_box": ~empty & ~no_box & (mask_in_box < LEAKS_BOX_SHARE),
        "fragmented": components >= FRAGMENTED_FROM,
    }
    flags = {name: np.asarray(rule, dtype=np.bool_) for name, rule in rules.items()}
    return MaskQuality(
        box_iou=overlap,
        mask_in_box=mask_in_box,
        num_components=components,
        touches_border=~empty & _touches_border(tight, sizes_hw),
        flags=tuple(
            tuple(name for name, holds in zip(flags, row, strict=True) if holds)
            for row in np.stack(list(flags.values()), axis=1).tolist()
        ),
    )


def _rows_of_four(parts: Sequence[npt.ArrayLike]) -> Float64Array:
    rows = [np.asarray(part, dtype=np.float64).reshape(-1, 4) for part in parts]
    return np.concatenate([np.zeros((0, 4)), *rows])


def order_flags(names: Sequence[str]) -> list[str]:
    """Return the flags without repeats, in the order of FLAGS; ValueError for a name not in the list."""
    unknown = set(names) - set(FLAGS)
    if unknown:
        raise ValueError(f"unknown qc flags {sorted(unknown)}; add them to pipeline/tables/mask_quality.py")
    return [name for name in FLAGS if name in names]


def _count(
    counts: Sequence[str], sizes_hw: npt.NDArray[np.int64], boxes: Float64Array
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    inside, components = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for step in rle.batches(counts):
        strips = rle.parse_strips(counts[step], sizes_hw[step])
        inside.append(rle.count_inside(strips, boxes[step]))
        components.append(rle.count_components(strips))
    return np.concatenate(inside), np.concatenate(components)


def _box_pixels(xyxy: Float64Array) -> Float64Array:
    """Return the pixels whose centre lies in each box, at least 1: what `inside` is counted against."""
    low, high = np.ceil(xyxy[:, :2] - 0.5), np.floor(xyxy[:, 2:] - 0.5) + 1
    pixels: Float64Array = np.maximum((high - low).prod(axis=1), 1)
    return pixels


def _touches_border(xywh: Float64Array, sizes_hw: npt.NDArray[np.int64]) -> BoolArray:
    far = xywh[:, :2] + xywh[:, 2:]
    near = np.concatenate([xywh[:, :2] <= 0, far >= sizes_hw[:, ::-1]], axis=1)
    return np.asarray(near.any(axis=1), dtype=np.bool_)


# ---------------------------------------------------------------------------------------------
# Marks
# ---------------------------------------------------------------------------------------------


def mark(instances: pa.Table, settings: FilterSettings) -> tuple[list[bool], list[str | None]]:
    """Return (accepted, reject_reason) of every row, from the stored columns of schema.UNIT_INSTANCE.

    `instances`: those columns and `image_index`, an integer that is equal within an image and does
    not fall; rows of an image in prompt order. The reason is the first of: the box's own error or
    `image_failed`, `empty`, `detector_score`, `predicted_iou`, `stability_score`, `box_iou`, `area`,
    `nms:<instance_index of the mask it lost to>`. Bounds are inclusive; a null detector score passes
    `min_detector_score`: there is nothing to judge.
    """
    reasons: list[str | None] = instances["box_error"].to_pylist()
    for name, failed in _threshold_rules(instances, settings):
        for row in np.flatnonzero(failed):
            reasons[row] = reasons[row] or name
    if settings.nms_mode != "none":
        _mark_overlaps(instances, settings, reasons)
    return [reason is None for reason in reasons], reasons


def _threshold_rules(table: pa.Table, settings: FilterSettings) -> list[tuple[str, BoolArray]]:
    bounds: dict[str, float | None] = {
        "detector_score": settings.min_detector_score,
        "predicted_iou": settings.min_predicted_iou,
        "stability_score": settings.min_stability_score,
        "box_iou": settings.min_box_iou,
        "area": settings.min_area_px,
    }
    rules = [("empty", _numbers(table, "area") == 0)]
    rules += [(name, _below(table, name, bound)) for name, bound in bounds.items() if bound is not None]
    return rules


def _below(table: pa.Table, name: str, bound: float) -> BoolArray:
    """Return the rows under a bound, which is rounded to the column's float32, or 0.9 would reject 0.9."""
    values = _numbers(table, name)
    rounded = float(np.float32(bound)) if pa.types.is_float32(table.schema.field(name).type) else bound
    below: BoolArray = values < rounded  # NaN, here null, is below nothing
    return below


def _numbers(table: pa.Table, name: str) -> Float64Array:
    """Return a column as float64, null as NaN."""
    column = table[name].cast(pa.float64()).combine_chunks()
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)


def _mark_overlaps(table: pa.Table, settings: FilterSettings, reasons: list[str | None]) -> None:
    alive = np.flatnonzero([reason is None for reason in reasons])
    image = table["image_index"].to_numpy()[alive]
    starts = np.flatnonzero(np.diff(image, prepend=-1))
    for rows in np.split(alive, starts[1:]):
        if len(rows) < 2:
            continue
        of_image = table.take(pa.array(rows))
        index = of_image["instance_index"].to_pylist()
        for loser, winner in _suppressed(of_image, settings):
            reasons[rows[loser]] = f"nms:{index[winner]}"


def _suppressed(table: pa.Table, settings: FilterSettings) -> list[tuple[int, int]]:
    """Return (loser, winner) pairs of one image's candidates."""
    masks: list[Any] = table["segmentation"].to_pylist()
    xyxy = boxes_to_xyxy(np.array(table["bbox"].to_pylist()), "xywh")
    low, high = xyxy[:, :2], xyxy[:, 2:]

    def mask_iou(winner: int, rivals: npt.NDArray[np.int64]) -> Float64Array:
        iou = np.zeros(len(rivals))
        meets = (low[rivals] < high[winner]).all(axis=1) & (high[rivals] > low[winner]).all(axis=1)
        if meets.any():
            met = [masks[rival] for rival in rivals[meets].tolist()]
            iou[meets] = np.asarray(coco_mask.iou(met, [masks[winner]], [0])).reshape(-1)
        return iou

    kinds: list[Any] = [None] * len(masks)
    if settings.nms_mode == "class":
        kinds = list(zip(table["category_id"].to_pylist(), table["category_name"].to_pylist(), strict=True))
    ranked = best_first(_numbers(table, "detector_score"), _numbers(table, "predicted_iou"))
    return suppress(ranked, kinds, mask_iou, settings.nms_iou)
