"""The model alone: milliseconds a picture, by variant, number format, and pictures and boxes a call.

    python -m benchmarks.call_shapes [--quick] [--checkpoint demo] [--variant vit_b ...] [--compile]

Next to it is the share of what the device multiplies at best: the arithmetic of a picture and its boxes
(`flops`) against a large product in the same number format.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.arithmetic import flops, matrix_peak
from benchmarks.made_inputs import boxes_of
from hqlabel.jobs.job_setup.check_models import read_checkpoint
from hqlabel.jobs.load_config import Config, ConfigSources
from hqlabel.jobs.terminal import console
from hqlabel.model.device import Dtype, multiplies_bfloat16, probe_dtype
from hqlabel.model.records import CallShape, Instances, PreparedImage, Prompts
from hqlabel.model.sam_config import PUBLISHED
from hqlabel.model.sam_hq import SamHQ
from hqlabel.model.segmenter import Segmenter
from hqlabel.pipeline.errors import UsageError
from hqlabel.pipeline.stages.load_model import load_model

_HEAD = (
    *("model", "dtype", "images a call", "boxes", "boxes a call"),
    *("ms an image", "images/s", "of the peak", "GPU memory MB"),
)
_ROUNDS = 3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes, about a minute")
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument(
        "--variant",
        nargs="+",
        default=[],
        choices=PUBLISHED,
        help="random weights in place of the checkpoint",
    )
    parser.add_argument("--compile", action="store_true", help="as CUDA graphs; needs a GPU")
    arguments = parser.parse_args()
    flags = {"model.checkpoint": arguments.checkpoint, "model.compile": arguments.compile}
    title, figures = measure(
        ConfigSources(flags=flags).load(), quick=arguments.quick, variants=arguments.variant
    )
    print(f"{title}\n{console.table(_HEAD, list(_texts(figures)))}")


def measure(config: Config, *, quick: bool, variants: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """A title, and figures of the configured checkpoint, or of random weights of these published variants.

    On a GPU where there is one. Quick: only the number format that `model.dtype=auto` takes, and few shapes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.model.compile and device == "cpu":
        raise UsageError("model.compile=true, and there is no GPU here; leave it out")
    native = probe_dtype(device)
    dtypes: list[Dtype] = [native] if quick or not multiplies_bfloat16(device) else ["bfloat16", "float32"]
    images_per_call = (1,) if device == "cpu" else (1, 4)
    boxes, boxes_per_call = ((1, 10), (4, 16)) if quick else ((1, 10, 50), (2, 4, 8, 16))
    figures = []
    for name, dtype in itertools.product(variants or [""], dtypes):
        called, model = _model(config, name)
        peak = matrix_peak(dtype, device)
        for images, call, count in itertools.product(images_per_call, boxes_per_call, boxes):
            shape = CallShape(images_per_call=images, boxes_per_call=call)
            segmenter = Segmenter(
                copy.deepcopy(model),
                call_shape=shape,
                dtype=dtype,
                device=device,
                compiled=config.model.compile,
            )
            seconds, memory_bytes = _measured(segmenter, count)
            figures.append(
                {
                    "model": called,
                    "dtype": dtype,
                    "images_per_call": images,
                    "boxes": count,
                    "boxes_per_call": call,
                    "ms_per_image": 1e3 * seconds / images,
                    "of_peak": images * flops(model.config, count) / seconds / peak,
                    "gpu_memory_mb": memory_bytes / 1e6,
                }
            )
    how = "compiled, as CUDA graphs" if config.model.compile else f"{torch.get_num_threads()} threads"
    title = f"the model alone on {device}, {how}, from a resized picture to runs"
    return title, figures


def _model(config: Config, variant: str) -> tuple[str, SamHQ]:
    """The name and the model: random weights of a variant, or the checkpoint for an empty name."""
    if variant:
        return f"{variant} (random)", SamHQ.from_config(PUBLISHED[variant], 0, position_std=0.02)
    weights = read_checkpoint(config)
    return weights.architecture, load_model(weights).model


def _measured(segmenter: Segmenter, boxes: int) -> tuple[float, int]:
    """Seconds of one call, the median of a few after one that does not count; bytes held on a GPU at most."""
    side = segmenter.input_side
    pixels = np.random.default_rng(0).integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
    size_hw = (3 * side // 2, 2 * side)
    image = PreparedImage(
        pixels_hwc=pixels, size_hw=size_hw, prompts=Prompts(boxes_xyxy=boxes_of(0, size_hw, boxes))
    )
    call = [image] * segmenter.call_shape.images_per_call
    on_gpu = segmenter.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(segmenter.device)
    times = []
    for _ in range(1 + _ROUNDS):
        began = time.perf_counter()
        answers = segmenter.segment_prepared(call)  # its runs lie on the host: nothing is left to wait for
        times.append(time.perf_counter() - began)
        assert all(isinstance(answer, Instances) for answer in answers), answers
    memory = torch.cuda.max_memory_allocated(segmenter.device) if on_gpu else 0
    return statistics.median(times[1:]), memory


def _texts(figures: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in figures:
        *texts, milliseconds, share, megabytes = row.values()
        memory = f"{megabytes:,.0f}" if megabytes else "-"
        yield (*map(str, texts), f"{milliseconds:,.0f}", f"{1e3 / milliseconds:.2f}", f"{share:.0%}", memory)


if __name__ == "__main__":
    main()
