"""A GPU's numbers beside a CPU's, with equal weights; and one image's beside its own in other company."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_day.setting import Setting, Wrong
from benchmarks.gpu_day.subjects import fresh_model, instances, prepared, segmenter_of
from hqlabel.model.device import Dtype, multiplies_bfloat16
from hqlabel.model.records import CallShape, Instances, PreparedImage
from hqlabel.model.rle import rle_to_mask
from hqlabel.model.segmenter import Segmenter

Row = dict[str, Any]
_BOXES = 6
LIMITS = {"float32": 1e-3, "bfloat16": 0.08}
"""Of the logits' error over their size. Expected with these weights: 1e-6 to 1e-4 in float32, from sums in
another order, and 1e-2 with TF32; 0.01 to 0.03 in bfloat16, as on a CPU (ViT-B: 0.016)."""


def parity(setting: Setting, *, variant: str, dtype: Dtype) -> list[Row]:
    """Logits, predicted IoU and masks of a few boxes against a CPU's in float32.

    Where this CPU multiplies bfloat16, a row of its own bfloat16 stands beside the GPU's.

    Raises:
        Wrong: the numbers are further apart than rounding explains.
    """
    reference = _on_cpu(setting, variant, "float32")
    found = _answers(setting, variant, dtype, setting.device)
    rows = [_compared(found, reference, variant=variant, dtype=dtype, where=setting.device)]
    if dtype == "bfloat16" and variant in ("vit_b", "vit_tiny") and multiplies_bfloat16("cpu"):
        own = _on_cpu(setting, variant, dtype)
        rows.append(_compared(own, reference, variant=variant, dtype=dtype, where="cpu"))
    error = rows[0]["logits_error"]
    if not error < LIMITS[dtype]:
        raise Wrong(f"the logits are off by {error:.2g}; wanted less than {LIMITS[dtype]}", rows)
    return rows


@lru_cache(maxsize=2)
def _on_cpu(setting: Setting, variant: str, dtype: Dtype) -> dict[str, Any]:
    return _answers(setting, variant, dtype, "cpu")


@torch.no_grad()
def _answers(setting: Setting, variant: str, dtype: Dtype, device: str) -> dict[str, Any]:
    """What a model says of one picture and its boxes, on the host, with the seconds of the masks."""
    model = fresh_model(setting, variant, device=device)
    segmenter = Segmenter(model, call_shape=CallShape(boxes_per_call=_BOXES), dtype=dtype, device=device)
    image = prepared(setting, segmenter, 0, _BOXES, megapixels=1)
    embedding = model.encode_prepared([image.pixels_hwc], [image.size_hw])
    logits = model.decode_boxes(embedding, [image.prompts.boxes_xyxy], boxes_per_call=_BOXES)
    began = time.perf_counter()
    (masks,) = instances(segmenter.segment_prepared([image]))
    return {
        "embedding": embedding.embedding_BCGG.float().cpu(),
        "logits": logits.low_res_NMHW.cpu(),
        "iou": logits.predicted_iou_NM.float().cpu(),
        "masks": masks,
        "seconds": time.perf_counter() - began,
    }


def _compared(found: dict[str, Any], reference: dict[str, Any], **told: Any) -> Row:
    counts = list(zip(found["masks"].counts, reference["masks"].counts, strict=True))
    size_hw = found["masks"].size_hw
    ious = [mask_iou(a, b, size_hw) for a, b in counts]
    differ = [np.mean(rle_to_mask(a, size_hw) != rle_to_mask(b, size_hw)) for a, b in counts]
    return {
        **told,
        "embedding_error": _error(found["embedding"], reference["embedding"]),
        "logits_error": _error(found["logits"], reference["logits"]),
        "iou_off": float((found["iou"] - reference["iou"]).abs().max()),
        "mask_iou": float(np.mean(ious)),
        "least_mask_iou": min(ious),
        "pixels_differ": float(np.mean(differ)),
        "cpu_s": reference["seconds"],
    }


def mask_iou(a: str, b: str, size_hw: tuple[int, int]) -> float:
    """Of two masks as runs; 1 of two empty ones."""
    one, other = rle_to_mask(a, size_hw), rle_to_mask(b, size_hw)
    union = int((one | other).sum())
    return float((one & other).sum()) / union if union else 1.0


def _error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """The norm of the difference over the norm of the reference."""
    return float((found.double() - reference.double()).norm() / reference.double().norm())


def company(setting: Setting, *, variant: str, dtype: Dtype) -> list[Row]:
    """Whether an image has the same bytes alone, with others, in another order, and again.

    Raises:
        Wrong: it has not.
    """
    segmenter = segmenter_of(
        setting, variant, images_per_call=4, boxes_per_call=16, dtype=dtype, objects=False
    )
    images = [prepared(setting, segmenter, n, 3 + 4 * n, megapixels=1) for n in range(5)]
    together = mask_bytes(segmenter, images)
    ways = {
        "again": mask_bytes(segmenter, images),
        "in the other order": mask_bytes(segmenter, images[::-1])[::-1],
        "alone": [mask_bytes(segmenter, [image])[0] for image in images],
    }
    rows = [
        {"variant": variant, "dtype": dtype, "way": way, "images": len(images),
         "equal": sum(a == b for a, b in zip(found, together, strict=True))}
        for way, found in ways.items()
    ]  # fmt: skip
    if any(row["equal"] < len(images) for row in rows):
        raise Wrong("equal inputs gave other bytes", rows)
    return rows


def mask_bytes(segmenter: Segmenter, images: list[PreparedImage]) -> list[tuple[Any, ...]]:
    """All that a segmenter says of each image, its runs first."""
    found: list[Instances] = instances(segmenter.segment_prepared(images))
    return [(one.counts, one.predicted_iou.tobytes(), one.stability_score.tobytes()) for one in found]
