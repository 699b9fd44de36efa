"""What a GPU day measures on: models with weights made on the spot, pictures and prompts."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_day.setting import Setting
from benchmarks.made_inputs import boxes_of
from hqlabel.model.device import Dtype, compile_calls
from hqlabel.model.hq_sam2.hiera_config import HIERA_SIZES, hq_sam2_config
from hqlabel.model.hq_sam2.hq_sam2 import family_of
from hqlabel.model.mask_decoder import TokenMasks
from hqlabel.model.records import (
    CallShape,
    Instances,
    PreparedImage,
    Prompts,
    SegmentFailure,
    fit_image,
    target_size_hw,
)
from hqlabel.model.sam_config import PUBLISHED, SamHQConfig
from hqlabel.model.sam_hq import SamHQ
from hqlabel.model.segmenter import REDUCED_CALL_SHAPE, Segmenter
from tests.parity import hq_sam2_recipe
from tests.parity.lively import SMALL_TINY, SMALL_VITS, enliven, photo

_BLOBS = 16


def config_of(setting: Setting, variant: str) -> SamHQConfig:
    """The architecture of this name; in a rehearsal a small one of its kind."""
    if not setting.rehearse:
        published = {**PUBLISHED, **{name: hq_sam2_config(size) for name, size in HIERA_SIZES.items()}}
        return published[variant]
    small = {
        "vit_b": SMALL_VITS["grid16-window5"],
        "vit_l": SMALL_VITS["grid14-window7"],
        "vit_h": SMALL_VITS["grid20-window14"],
        "vit_tiny": SMALL_TINY,
        "hiera_l": hq_sam2_config(hq_sam2_recipe.config_of(hq_sam2_recipe.SMALL)),
    }
    return small[variant]


@lru_cache(maxsize=1)
def original_model(setting: Setting, variant: str) -> SamHQ:
    """A model that nobody may change, with lively weights.

    Made on the device: 640 million random numbers take a CPU 15 s and a GPU next to nothing.
    """
    config = config_of(setting, variant)
    with torch.device(setting.device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family_of(config)(config)
    return enliven(model, 0).eval()


def fresh_model(setting: Setting, variant: str, *, device: str | None = None) -> SamHQ:
    """A model of the caller's own, float32, the same weights each time in this process."""
    return copy.deepcopy(original_model(setting, variant)).to(device or setting.device)


def segmenter_of(
    setting: Setting,
    variant: str,
    *,
    images_per_call: int,
    boxes_per_call: int,
    dtype: Dtype = "bfloat16",
    compiled: bool = False,
    objects: bool = True,
) -> Segmenter:
    """A `Segmenter` of a fresh model. `objects`: see `give_objects`."""
    shape = CallShape(images_per_call=images_per_call, boxes_per_call=boxes_per_call)
    model = fresh_model(setting, variant)
    if objects:
        give_objects(model)
    segmenter = Segmenter(
        model, call_shape=shape, dtype=dtype, device=setting.device, compiled=compiled and setting.on_gpu
    )
    if compiled and not setting.on_gpu:  # the same code with a compiler that changes no operation
        tokens = model.tokens_needed("single", False)
        compile_calls(model, shape, tokens, backend="eager", record=_run_again)
    return segmenter


def give_objects(model: SamHQ) -> None:
    """Put ellipses in the place of the network's logits, once it has computed them.

    Random weights give masks of noise with 50 times the runs of an object's, and tracing those is another
    work than jobs have. It adds two operations on the low-resolution logits.
    """
    own, blobs = model.choose_masks, object_logits(model)

    def choose_masks(tokens: TokenMasks, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, ious = own(tokens, **how)
        return with_objects(blobs, logits), ious

    model.choose_masks = choose_masks  # type: ignore[method-assign]


def object_logits(model: SamHQ) -> torch.Tensor:
    """Logits of some ellipses with a wavy edge, (_BLOBS, 1, 4G, 4G), on the model's device."""
    side = model.config.mask_size
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    angle = np.arctan2(y, x)
    radii = [0.3 + 0.4 * k / _BLOBS + 0.05 * np.sin((5 + k) * angle) for k in range(_BLOBS)]
    blobs = np.stack([20 * (radius - np.hypot(x, y)) for radius in radii])[:, None]
    return torch.tensor(blobs, dtype=torch.float32, device=model.device)


def with_objects(blobs: torch.Tensor, logits_NMHW: torch.Tensor) -> torch.Tensor:
    """The logits, a hundredth of each, with an ellipse under them."""
    repeats = -(-len(logits_NMHW) // len(blobs))
    return torch.add(blobs.repeat(repeats, 1, 1, 1)[: len(logits_NMHW)], logits_NMHW, alpha=0.01)


def _run_again(run: Any) -> Any:
    """A recording without a GPU: all of it is run again, into the same tensors."""
    outputs = run()

    def play() -> None:
        for kept, new in zip(outputs, run(), strict=True):
            kept.copy_(new)

    return outputs, play


@lru_cache(maxsize=8)
def _picture(height: int, width: int, seed: int) -> np.ndarray:
    return photo(height, width, seed)


def prepared(
    setting: Setting, segmenter: Segmenter, number: int, boxes: int, *, megapixels: int = 3
) -> PreparedImage:
    """An image as the pipeline hands it to the model: one of four pictures, with boxes of its own."""
    size_hw = setting.size_hw(megapixels)
    side = segmenter.input_side
    shape = (side, side) if segmenter.fit == "stretch" else target_size_hw(size_hw, side)
    pixels = fit_image(_picture(*shape, number % 4), side, segmenter.fit)
    prompts = Prompts(boxes_xyxy=boxes_of(number, size_hw, boxes))
    return PreparedImage(pixels_hwc=pixels, size_hw=size_hw, prompts=prompts)


def instances(answers: list[Instances | SegmentFailure]) -> list[Instances]:
    """The answers, each one whole and at the shape asked for, or an error."""
    found = []
    for answer in answers:
        if not isinstance(answer, Instances):
            raise RuntimeError(f"an image failed: {answer.code}: {answer.message}")
        if REDUCED_CALL_SHAPE in answer.flags:
            raise MemoryError("memory ran out at this call shape; the image was done at a smaller one")
        found.append(answer)
    return found
