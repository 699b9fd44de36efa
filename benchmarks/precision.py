"""The masks in bfloat16 against those in float32, of the same weights on the same pictures.

    python -m benchmarks.precision [--scenes 100] [--first 0]     the demo checkpoint on held-out scenes
    python -m benchmarks.precision --random 3                     random weights, pictures without objects

Both by `Segmenter`, as jobs run it. Prints the mean and the least IoU of the two masks of a box, the share of
boxes under 0.99 and 0.95, and the share of pixels that differ. On random weights the logits are noise about
0, so that the share of pixels is the figure to read.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hqlabel.model.checkpoints import DEMO_FOLDER, load
from hqlabel.model.records import CallShape, Instances
from hqlabel.model.rle import rle_to_mask
from hqlabel.model.sam_hq import SamHQ
from hqlabel.model.segmenter import Segmenter
from tests.parity.lively import SMALL_VITS, boxes_in, lively, photo
from tools.demo_model.evaluate import held_out_scene

SHAPE = CallShape(boxes_per_call=4)
Picture = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of one picture. `ious`: one a box. `differing`, `pixels`: over all of its masks."""

    ious: list[float]
    differing: int
    pixels: int


def compare(model: SamHQ, pictures: Iterator[Picture]) -> list[Agreement]:
    """One record a picture."""
    exact = Segmenter(copy.deepcopy(model), call_shape=SHAPE, dtype="float32")
    rounded = Segmenter(model, call_shape=SHAPE, dtype="bfloat16")
    found = []
    for image, boxes in pictures:
        (one,), (other,) = exact.segment([image], [boxes]), rounded.segment([image], [boxes])
        assert isinstance(one, Instances), one
        assert isinstance(other, Instances), other
        pairs = [
            (rle_to_mask(a, one.size_hw), rle_to_mask(b, one.size_hw))
            for a, b in zip(one.counts, other.counts, strict=True)
        ]
        ious = [float((a & b).sum() / max(1, (a | b).sum())) for a, b in pairs]
        differing = sum(int((a != b).sum()) for a, b in pairs)
        found.append(Agreement(ious=ious, differing=differing, pixels=len(pairs) * int(np.prod(one.size_hw))))
    return found


def scenes(first: int, count: int, side: int) -> Iterator[Picture]:
    """Held-out scenes with the boxes of a detector that is off by a little."""
    for index in range(first, first + count):
        scene, boxes = held_out_scene(index, side)
        yield scene.pixels_hwc, boxes


def print_line(name: str, found: list[Agreement]) -> None:
    """The figures."""
    ious = np.array([iou for one in found for iou in one.ious])
    flipped = sum(one.differing for one in found) / sum(one.pixels for one in found)
    print(
        f"{name}: {len(found)} pictures, {len(ious)} masks: "
        f"IoU mean {ious.mean():.4f}, least {ious.min():.4f}, "
        f"{100 * (ious < 0.99).mean():.1f} % under 0.99, {100 * (ious < 0.95).mean():.1f} % under 0.95; "
        f"{100 * flipped:.4f} % of pixels differ"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first held-out scene")
    parser.add_argument("--random", type=int, default=0, metavar="PICTURES", help="random weights instead")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.random:
        for name, config in SMALL_VITS.items():
            pictures = (
                (photo(480, 640, seed), boxes_in(480, 640, 8, seed)) for seed in range(options.random)
            )
            print_line(f"random {name}", compare(lively(config), pictures))
        return
    model = load(DEMO_FOLDER).model
    found = compare(model, scenes(options.first, options.scenes, model.config.image_size))
    print_line("demo checkpoint", found)


if __name__ == "__main__":
    main()
