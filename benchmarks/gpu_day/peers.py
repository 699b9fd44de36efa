"""From a picture to RLE strings beside transformers: equal weights, one run, in turns."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_day.setting import Setting
from benchmarks.gpu_day.subjects import (
    fresh_model,
    instances,
    object_logits,
    prepared,
    segmenter_of,
    with_objects,
)
from benchmarks.model_speed import encode
from hqlabel.model.checkpoints import save_transformers
from hqlabel.model.records import PreparedImage, scale_boxes, target_size_hw
from hqlabel.model.sam_hq import SamHQ

Row = dict[str, Any]
Road = Callable[[], object]
_BOXES = 10


def beside_transformers(setting: Setting, *, variant: str) -> list[Row]:
    """One row a contender: milliseconds of one picture of 3 megapixels, the median of alternating rounds.

    transformers runs as its documentation has it, one picture a call, its masks resized on the device; of all
    contenders the masks are those of `give_objects`. It is timed with pycocotools' encoding of the masks on
    the host, and without: masks left on the device are no result yet.
    """
    model = fresh_model(setting, variant)
    ours = {
        f"hqlabel bf16, {images} a call": _ours(setting, variant, images) for images in (1, 4)
    }  # fmt: skip
    image = prepared(setting, segmenter_of(setting, variant, images_per_call=1, boxes_per_call=16), 0, _BOXES)
    theirs: dict[str, tuple[Road, int]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        masks = _transformers(model, dtype, image, setting.device)
        name = f"transformers {str(dtype).removeprefix('torch.')}"
        theirs[f"{name}, masks left on the device"] = masks, 1
        theirs[name] = lambda masks=masks: encode(masks().cpu()), 1
    times: dict[str, list[float]] = {}
    for _ in range(setting.fewer(6, 2)):
        for name, (road, images) in {**ours, **theirs}.items():
            began = setting.now()
            road()
            times.setdefault(name, []).append((setting.now() - began) / images)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    best = min(seconds for name, seconds in medians.items() if name in ours)
    return [
        {"variant": variant, "contender": name, "ms": 1e3 * seconds, "images_per_s": 1 / seconds,
         "ratio": seconds / best}
        for name, seconds in medians.items()
    ]  # fmt: skip


def _ours(setting: Setting, variant: str, images_per_call: int) -> tuple[Road, int]:
    segmenter = segmenter_of(
        setting, variant, images_per_call=images_per_call, boxes_per_call=16 if images_per_call == 1 else 40
    )
    images = [prepared(setting, segmenter, n, _BOXES) for n in range(4 * images_per_call)]
    return lambda: instances(segmenter.segment_prepared(images)), len(images)


def _transformers(
    model: SamHQ, dtype: torch.dtype, image: PreparedImage, device: str
) -> Callable[[], torch.Tensor]:
    """A function that makes the masks, bool (n, H, W) on the device."""
    from transformers import SamHQModel

    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        save_transformers(model, Path(folder))
        loaded = SamHQModel.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype)
    theirs = loaded.eval().to(device)
    side = model.config.image_size
    resized_hw = target_size_hw(image.size_hw, side)
    scaled = scale_boxes(image.prompts.boxes_xyxy, image.size_hw, resized_hw)
    boxes = torch.from_numpy(scaled)[None].to(device, dtype)
    blobs = object_logits(model)

    @torch.no_grad()
    def masks() -> torch.Tensor:
        pixels = model.preprocess([image.pixels_hwc]).to(dtype)
        low = theirs(pixel_values=pixels, input_boxes=boxes, multimask_output=False).pred_masks[0].float()
        padded = F.interpolate(with_objects(blobs, low), (side, side), mode="bilinear", align_corners=False)
        fitted = padded[..., : resized_hw[0], : resized_hw[1]]
        return F.interpolate(fitted, image.size_hw, mode="bilinear", align_corners=False)[:, 0] > 0

    return masks
