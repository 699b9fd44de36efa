"""The model alone: milliseconds a picture, by variant, number format, and pictures and boxes a call."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from jobs.bench_inputs import boxes_of
from jobs.bench_tables import Table
from jobs.config import Config
from jobs.weights import read_checkpoint
from model.config import PUBLISHED
from model.sam_hq import SamHQ
from model.segmenter import Dtype, Segmenter, probe_dtype
from model.structures import CallShape, Instances, PreparedImage, Prompts
from pipeline.weights import load_model

_HEAD = ("model", "dtype", "images a call", "boxes", "boxes a call", "ms an image", "images/s")
_ROUNDS = 3


def measure(config: Config, *, quick: bool, variants: Sequence[str]) -> Table:
    """Figures of the configured checkpoint, or of random weights of these published variants.

    On a GPU where there is one. Quick: only the number format that `model.dtype=auto` takes, and few shapes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    native = probe_dtype(device)
    dtypes: list[Dtype] = [native] if quick or native == "float32" else [native, "float32"]
    images_per_call = (1,) if device == "cpu" else (1, 4)
    boxes, boxes_per_call = ((1, 10), (4, 16)) if quick else ((1, 10, 50), (2, 4, 8, 16))
    figures = []
    for name, dtype in itertools.product(variants or [""], dtypes):
        called, model = _model(config, name)
        for images, call, count in itertools.product(images_per_call, boxes_per_call, boxes):
            shape = CallShape(images_per_call=images, boxes_per_call=call)
            segmenter = Segmenter(model, call_shape=shape, dtype=dtype, device=device)
            figures.append(
                {
                    "model": called,
                    "dtype": dtype,
                    "images_per_call": images,
                    "boxes": count,
                    "boxes_per_call": call,
                    "ms_per_image": 1e3 * _seconds(segmenter, count) / images,
                }
            )
    title = f"the model alone on {device}, {torch.get_num_threads()} threads, from a resized picture to runs"
    return Table(title=title, head=_HEAD, rows=list(_texts(figures)), figures=figures)


def _model(config: Config, variant: str) -> tuple[str, SamHQ]:
    """The name and the model: random weights of a variant, or the checkpoint for an empty name."""
    if variant:
        return f"{variant} (random)", SamHQ.from_config(PUBLISHED[variant], 0, position_std=0.02)
    weights = read_checkpoint(config)
    return weights.architecture, load_model(weights).model


def _seconds(segmenter: Segmenter, boxes: int) -> float:
    """Seconds of one call: the median of a few, after one that does not count."""
    side = segmenter.input_side
    pixels = np.random.default_rng(0).integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
    size_hw = (3 * side // 2, 2 * side)
    image = PreparedImage(
        pixels_hwc=pixels, size_hw=size_hw, prompts=Prompts(boxes_xyxy=boxes_of(0, size_hw, boxes))
    )
    call = [image] * segmenter.call_shape.images_per_call
    times = []
    for _ in range(1 + _ROUNDS):
        began = time.perf_counter()
        answers = segmenter.segment_prepared(call)  # its runs lie on the host: nothing is left to wait for
        times.append(time.perf_counter() - began)
        assert all(isinstance(answer, Instances) for answer in answers), answers
    return statistics.median(times[1:])


def _texts(figures: Sequence[dict[str, object]]) -> Iterator[tuple[str, ...]]:
    for row in figures:
        *texts, milliseconds = row.values()
        assert isinstance(milliseconds, float)
        yield (*map(str, texts), f"{milliseconds:,.0f}", f"{1e3 / milliseconds:.2f}")
