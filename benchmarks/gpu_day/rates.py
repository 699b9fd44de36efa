"""Images a second of the model alone, from resized pictures to RLE strings: what share of the device?"""

from __future__ import annotations

import statistics
from functools import lru_cache
from typing import Any

import torch

from benchmarks.arithmetic import flops, matrix_peak
from benchmarks.gpu_day.parity import mask_bytes, mask_iou
from benchmarks.gpu_day.setting import Setting, Wrong
from benchmarks.gpu_day.subjects import give_objects, instances, original_model, prepared, segmenter_of
from hqlabel.model.device import Dtype
from hqlabel.model.records import PreparedImage
from hqlabel.model.rle import parse_counts
from hqlabel.model.segmenter import Segmenter

Row = dict[str, Any]
_LEAST_S = 2.0
"""Rounds go on until they have taken this long together."""


def rate(
    setting: Setting,
    *,
    variant: str,
    images_per_call: int,
    boxes_per_call: int,
    boxes: int,
    dtype: Dtype = "bfloat16",
    megapixels: int = 3,
    rounds: int = 5,
    objects: bool = True,
) -> list[Row]:
    """One row: four calls' images given at once, the median of at least `rounds` rounds after the first."""
    original_model(setting, variant)  # so that it is no part of the peak
    held = setting.held_bytes()
    segmenter = segmenter_of(
        setting, variant, images_per_call=images_per_call, boxes_per_call=boxes_per_call, dtype=dtype,
        objects=objects,
    )  # fmt: skip
    told = {"variant": variant, "dtype": dtype, "megapixels": megapixels}
    return [told | measure(setting, segmenter, boxes, held=held, megapixels=megapixels, rounds=rounds)]


def measure(
    setting: Setting, segmenter: Segmenter, boxes: int, *, held: int, megapixels: int = 3, rounds: int = 5
) -> Row:
    """The figures of a segmenter. `held`: bytes on the device before it was made."""
    shape = segmenter.call_shape
    count = setting.fewer(4, 1) * shape.images_per_call
    images = [prepared(setting, segmenter, n, boxes, megapixels=megapixels) for n in range(count)]
    first_s, times, runs = timed(setting, segmenter, images, setting.fewer(rounds, 1))
    peak, reserved = setting.peak_bytes()
    seconds = statistics.median(times) / count
    work = flops(segmenter.model.config, boxes)
    return {
        "images_per_call": shape.images_per_call, "boxes_per_call": shape.boxes_per_call, "boxes": boxes,
        "images_per_s": 1 / seconds, "ms": 1e3 * seconds,
        "spread": (max(times) - min(times)) / statistics.median(times),
        "tflop_per_s": work / seconds / 1e12,
        "of_peak": work / seconds / _peak(setting, segmenter.model.dtype),
        "peak_mb": max(0, peak - held) / 1e6, "reserved_mb": reserved / 1e6, "first_s": first_s,
        "rounds": len(times), "runs_a_mask": runs,
    }  # fmt: skip


def timed(
    setting: Setting, segmenter: Segmenter, images: list[PreparedImage], rounds: int
) -> tuple[float, list[float], float]:
    """Seconds of the first round, of the others, and how many runs a mask has."""
    times: list[float] = []
    while len(times) <= rounds or sum(times[1:]) < setting.fewer(1, 0) * _LEAST_S:
        began = setting.now()
        answers = instances(segmenter.segment_prepared(images))
        times.append(setting.now() - began)
    one = answers[0]
    pixels = one.size_hw[0] * one.size_hw[1]
    runs = sum(len(parse_counts([text], pixels).lengths) for text in one.counts) / len(one.counts)
    return times[0], times[1:], runs


@lru_cache
def _peak(setting: Setting, dtype: torch.dtype) -> float:
    """The rate of a large product, measured in this process."""
    name: Dtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return matrix_peak(name, setting.device, side=setting.fewer(8192, 256))


def compiled(
    setting: Setting, *, variant: str, images_per_call: int, boxes_per_call: int, boxes: int
) -> list[Row]:
    """Two rows, plain and compiled; the second says how alike the masks are, and how long compiling took.

    Raises:
        Wrong: equal inputs gave other bytes.
    """
    if setting.rehearse:
        variant = "vit_tiny"  # a ViT's way on a CPU writes in place, as no compiler takes it
    original_model(setting, variant)  # so that it is no part of the peak
    rows: list[Row] = []
    masks: list[list[str]] = []
    for on in (False, True):
        held = setting.held_bytes()
        segmenter = segmenter_of(
            setting, variant, images_per_call=images_per_call, boxes_per_call=boxes_per_call, compiled=on,
            objects=False,
        )  # fmt: skip
        images = [prepared(setting, segmenter, n, boxes, megapixels=1) for n in range(images_per_call)]
        began = setting.now()
        once = mask_bytes(segmenter, images)
        compiling_s = setting.now() - began
        if mask_bytes(segmenter, images) != once:
            raise Wrong(f"compiled={on}: equal inputs gave other bytes", rows)
        masks.append([text for image in once for text in image[0]])
        give_objects(segmenter.model)
        row = measure(setting, segmenter, boxes, held=held)
        rows.append({"variant": variant, "compiled": on, **row, "compiling_s": compiling_s})
    pixels = images[0].size_hw
    ious = [mask_iou(a, b, pixels) for a, b in zip(*masks, strict=True)]
    equal = sum(a == b for a, b in zip(*masks, strict=True))
    rows[1] |= {
        "equal_masks": f"{equal} of {len(ious)}", "mask_iou": statistics.mean(ious),
        "gain": rows[0]["ms"] / rows[1]["ms"],
    }  # fmt: skip
    return rows
