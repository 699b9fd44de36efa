"""Masks and RLE from low-resolution logits: tracing against two-step upsampling plus pycocotools.

    python -m benchmarks.masks_rle [--masks 16] [--rounds 7]

One thread, in CPU time, so that other work on the machine disturbs little. Both ways get the same logits
(256 x 256, of objects with wavy outlines and some noise) in alternation; a figure is the median over the
rounds, in ms a mask. Tracing also counts stability, area and box; the other only makes the string.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from hqlabel.model.masks import trace_masks
from hqlabel.model.records import target_size_hw

SIZES_HW = [(480, 640), (1080, 1920), (1536, 2048)]
# Radius as a share of the long side. Noise alone is what random weights give: no outline to be fast on.
KINDS = {
    "small (2 to 8 %)": (0.02, 0.08),
    "mixed (3 to 30 %)": (0.03, 0.30),
    "large (30 to 60 %)": (0.30, 0.60),
    "noise": None,
}


def make_logits(number: int, size_hw: tuple[int, int], radii: tuple[float, float] | None) -> torch.Tensor:
    """(number, 256, 256) float32: objects that saturate at +-10, with noise of deviation 0.3."""
    generator = torch.Generator().manual_seed(0)
    if radii is None:
        return 5 * torch.randn(number, 256, 256, generator=generator)
    height, width = (side / 4 for side in target_size_hw(size_hw, 1024))
    y, x = torch.meshgrid(torch.arange(256) + 0.5, torch.arange(256) + 0.5, indexing="ij")
    logits = []
    for _ in range(number):
        u, v, share = torch.rand(3, generator=generator).tolist()
        radius = (radii[0] + share * (radii[1] - radii[0])) * max(height, width)
        dy, dx = y - u * height, x - v * width
        angle = torch.atan2(dy, dx)
        outline = radius * (1 + 0.15 * torch.sin(5 * angle) + 0.05 * torch.sin(23 * angle))
        logit = 10 * torch.tanh((outline - torch.hypot(dy, dx)) * 0.15)
        logits.append(logit + 0.3 * torch.randn(256, 256, generator=generator))
    return torch.stack(logits)


def two_step(low: torch.Tensor, resized_hw: tuple[int, int], size_hw: tuple[int, int]) -> tuple[str, ...]:
    """The usual way, mask by mask so that its memory stays small, which is also its fastest way here."""
    counts = []
    for one in low:
        model = F.interpolate(one[None, None], (1024, 1024), mode="bilinear", align_corners=False)
        model = model[:, :, : resized_hw[0], : resized_hw[1]]
        mask = F.interpolate(model, size_hw, mode="bilinear", align_corners=False)[0, 0] > 0
        columns = np.asfortranarray(mask.numpy().view(np.uint8))
        counts.append(coco_mask.encode(columns)["counts"].decode("ascii"))
    return tuple(counts)


def traced(low: torch.Tensor, resized_hw: tuple[int, int], size_hw: tuple[int, int]) -> tuple[str, ...]:
    """What `Segmenter` does with the logits of one call."""
    runs = trace_masks(low, resized_hw=resized_hw, size_hw=size_hw).runs()
    runs.areas()
    runs.bboxes_xywh()
    return runs.counts()


def seconds(encode: Callable[[], tuple[str, ...]]) -> tuple[float, tuple[str, ...]]:
    start = time.process_time()
    counts = encode()
    return time.process_time() - start, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=int, default=16, help="masks of a call")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {arguments.masks} masks a call, CPU ms a mask")
    print(
        f"{'size':>11} {'objects':<19} {'two-step + pycocotools':>22} {'traced':>8} {'ratio':>6} {'equal':>6}"
    )
    for size_hw in SIZES_HW:
        resized_hw = target_size_hw(size_hw, 1024)
        for kind, radii in KINDS.items():
            low = make_logits(arguments.masks, size_hw, radii)
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(arguments.rounds):
                slow, expected = seconds(lambda: two_step(low, resized_hw, size_hw))  # noqa: B023
                fast, counts = seconds(lambda: traced(low, resized_hw, size_hw))  # noqa: B023
                times[0].append(1e3 * slow / len(low))
                times[1].append(1e3 * fast / len(low))
            slow, fast = (statistics.median(each) for each in times)
            equal = sum(a == b for a, b in zip(expected, counts, strict=True))
            size = f"{size_hw[0]}x{size_hw[1]}"
            print(f"{size:>11} {kind:<19} {slow:22.2f} {fast:8.2f} {slow / fast:6.1f} {equal:>3}/{len(low)}")


if __name__ == "__main__":
    main()
