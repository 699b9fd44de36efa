"""Everything in photographs: images/s beside the original's `SamAutomaticMaskGenerator`, with equal weights.

    python -m benchmarks.everything [--points 16] [--rounds 3] [--threads 1] [--weights demo|random]

Both on the CPU, in turn, picture by picture; medians of the rounds. `random` is a model with a small encoder
and random weights, whose masks are noise over the whole picture: the most runs that masks can have. Neither
side is given fewer masks: thresholds are 0.3, and the stability offset 0.1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hqlabel.model.checkpoints import DEMO_FOLDER, load
from hqlabel.model.everything.everything import Everything, EverythingSegmenter
from hqlabel.model.everything.point_grid import PointGrid, cut_crops
from hqlabel.model.records import CallShape
from hqlabel.model.segmenter import Segmenter
from tests.parity.lively import SMALL_VITS, lively
from tests.parity.oracle import original_of
from tests.parity.stand_ins import import_original

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"


def main() -> None:
    """Time both on each photograph, and print one line for each and one for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--per-call", type=int, default=2)
    parser.add_argument("--weights", choices=("demo", "random"), default="demo")
    parser.add_argument("--photos", nargs="+", default=["cat.jpg", "coffee.jpg", "flower.jpg"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    demo = args.weights == "demo"
    model = load(DEMO_FOLDER).model if demo else lively(SMALL_VITS["grid16-window5"], seed=3)
    grid = PointGrid(points_per_side=args.points, pred_iou=0.3, stability=0.3, stability_offset=0.1)
    generator = import_original().SamAutomaticMaskGenerator(
        original_of(model),
        points_per_side=args.points,
        pred_iou_thresh=0.3,
        stability_score_thresh=0.3,
        stability_score_offset=0.1,
        output_mode="coco_rle",
    )
    shape = CallShape(boxes_per_call=args.per_call)
    everything = EverythingSegmenter(Segmenter(model, call_shape=shape), grid)

    def ours(image: np.ndarray) -> int:
        crops = cut_crops(image, grid, side=model.config.image_size, fit=model.fit)
        (answer,) = everything.segment([crops])
        assert isinstance(answer, Everything)
        return len(answer.instances.counts)

    sides = {"hqlabel": ours, "original": lambda image: len(generator.generate(image))}
    totals = dict.fromkeys(sides, 0.0)
    for name in args.photos:
        image = np.array(Image.open(PHOTOS / name).convert("RGB"))
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        masks = {}
        for _ in range(args.rounds):
            for side, work in sides.items():
                start = time.perf_counter()
                masks[side] = work(image)
                seconds[side].append(time.perf_counter() - start)
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        for side, median in medians.items():
            totals[side] += median
        print(f"{name} {image.shape[1]}x{image.shape[0]}: masks {masks}", medians, flush=True)
    for side, total in totals.items():
        print(f"{side}: {len(args.photos) / total:.3f} images/s")
    print(f"ratio {totals['original'] / totals['hqlabel']:.2f}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
