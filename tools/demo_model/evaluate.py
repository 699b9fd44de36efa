"""Measures a checkpoint on held-out pictures: scenes whose seeds the training never saw, or cut-outs.

python -m tools.demo_model.evaluate --checkpoint model/weights/hqlabel-demo --scenes 500
python -m tools.demo_model.evaluate --checkpoint model/weights/hqlabel-demo --cutouts DIR --scenes 150

Prints mean IoU and boundary IoU of mask 0 of the SAM part, of the HQ token's mask alone and of their sum
(what `hqlabel` uses), the same of one click inside the object, the rank correlation of predicted and true
IoU, the time an image takes, and the figures of an ellipse in the box, which looks at no picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from hqlabel.model.checkpoints import load
from hqlabel.model.records import Prompts
from hqlabel.model.sam_hq import SamHQ
from tools.demo_model.cache import HELD_OUT_FIRST_SEED
from tools.demo_model.cutouts import cutout_scene, innermost
from tools.demo_model.scenes import Scene, jitter_boxes, make_scene

BOUNDARY_FRACTION = 0.02  # of the diagonal, as in the boundary IoU paper (arXiv 2103.16562)


def held_out_scene(index: int, side: int) -> tuple[Scene, np.ndarray]:
    """Scene `index` of the held-out set, and its jittered boxes."""
    seed = HELD_OUT_FIRST_SEED + index
    scene = make_scene(seed, side)
    return scene, jitter_boxes(np.random.default_rng(seed), scene.boxes_xyxy, scene.label_map_hw.shape)


def mask_iou(one: np.ndarray, other: np.ndarray) -> float:
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """The mask's pixels within 2% of the picture's diagonal of its edge (a square neighbourhood).

    The picture's border counts as an edge, as in the paper's code.
    """
    width = max(1, round(BOUNDARY_FRACTION * float(np.hypot(*mask.shape))))
    found = np.zeros_like(mask)
    if not mask.any():
        return found
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    outside = torch.from_numpy(~np.pad(mask[window], 1)).float()[None, None]
    for axis in ((2 * width + 1, 1), (1, 2 * width + 1)):
        outside = F.max_pool2d(outside, axis, 1, (axis[0] // 2, axis[1] // 2))
    found[window] = mask[window] & outside[0, 0, 1:-1, 1:-1].bool().numpy()
    return found


def ellipse_in(box: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    rows, columns = np.ogrid[: size_hw[0], : size_hw[1]]
    centre, reach = (box[:2] + box[2:]) / 2, np.maximum((box[2:] - box[:2]) / 2, 0.5)
    return ((columns + 0.5 - centre[0]) / reach[0]) ** 2 + ((rows + 0.5 - centre[1]) / reach[1]) ** 2 <= 1


def full_size(
    low_res_NHW: torch.Tensor, *, side: int, resized_hw: tuple[int, int], size_hw: tuple[int, int]
) -> np.ndarray:
    """Bool masks (N, h, w) of low-resolution logits, by the original's two bilinear steps."""
    padded = F.interpolate(low_res_NHW[:, None], (side, side), mode="bilinear")
    fitted = F.interpolate(padded[..., : resized_hw[0], : resized_hw[1]], size_hw, mode="bilinear")
    return (fitted[:, 0] > 0).numpy()


def predict(
    model: SamHQ, pixels: np.ndarray, boxes: np.ndarray, clicks: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    """Masks of "m0", "hq" and "sum", the predicted IoU, and the seconds that the product's way took.

    With clicks, (N, 2) as (x, y), one a mask, there are masks of "click" too: the sum's, without a box.
    """
    started = time.perf_counter()
    embedding = model.encode_images([pixels])
    both = model.decode_boxes(embedding, [boxes])
    size_hw, resized_hw, side = embedding.sizes_hw[0], embedding.resized_hw[0], model.config.image_size
    masks = {"sum": full_size(both.low_res_NMHW[:, 0], side=side, resized_hw=resized_hw, size_hw=size_hw)}
    seconds = time.perf_counter() - started
    alone = model.decode_boxes(embedding, [boxes], hq_token_only=True)
    found = {"hq": alone.low_res_NMHW, "m0": both.low_res_NMHW - alone.low_res_NMHW}
    if clicks is not None:
        labels = np.ones((len(clicks), 1), dtype=np.int64)
        prompts = Prompts(points_xy=clicks[:, None].astype(np.float32), point_labels=labels)
        found["click"] = model.decode_prompts(embedding, [prompts]).low_res_NMHW
    for name, logits in found.items():
        masks[name] = full_size(logits[:, 0], side=side, resized_hw=resized_hw, size_hw=size_hw)
    return masks, both.predicted_iou_NM[:, 0].numpy(), seconds


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, without correction for ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(ranks)[0, 1])


def evaluate(
    model: SamHQ, *, scenes: int, side: int, boundaries: bool = True, clicks: bool = False
) -> dict[str, float]:
    """The figures over the first `scenes` held-out scenes of `side` pixels, averaged over objects."""
    samples = (held_out_scene(index, side) for index in range(scenes))
    return measure(model, samples, boundaries=boundaries, clicks=clicks)


def measure(
    model: SamHQ,
    samples: Iterable[tuple[Scene, np.ndarray]],
    *,
    boundaries: bool = True,
    clicks: bool = False,
) -> dict[str, float]:
    """The figures over scenes with their boxes, averaged over objects; `clicks`: those of one click too."""
    found: dict[str, list[float]] = defaultdict(list)
    by_kind: dict[str, list[float]] = defaultdict(list)
    for scene, boxes in samples:
        truths = scene.masks()
        points = np.array([innermost(truth) for truth in truths]) if clicks else None
        masks, predicted, seconds = predict(model, scene.pixels_hwc, boxes, points)
        masks["ellipse_baseline"] = np.stack([ellipse_in(box, scene.label_map_hw.shape) for box in boxes])
        found["predicted_iou"] += predicted.tolist()
        found["seconds"].append(seconds)
        for name, predicted_masks in masks.items():
            for truth, mask, kind in zip(truths, predicted_masks, scene.kinds, strict=True):
                value = mask_iou(truth, mask)
                found[f"iou_{name}"].append(value)
                if boundaries:
                    found[f"boundary_iou_{name}"].append(mask_iou(boundary(truth), boundary(mask)))
                if name == "sum":
                    by_kind[kind].append(value)
    figures = {name: float(np.mean(values)) for name, values in found.items() if "iou" in name}
    figures["spearman"] = rank_correlation(np.array(found["predicted_iou"]), np.array(found["iou_sum"]))
    figures["ms_per_image"] = 1000 * float(np.median(found["seconds"]))
    figures["objects"] = len(found["iou_sum"])
    return figures | {f"iou_of_{kind}": float(np.mean(values)) for kind, values in sorted(by_kind.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=500, help="how many pictures")
    parser.add_argument("--cutouts", type=Path, help="a folder with photographs/ and cutouts/, for those")
    parser.add_argument("--side", type=int, help="of the scenes; default: the model's input side")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.checkpoint).model
    side = options.side or model.config.image_size
    if options.cutouts:
        samples = (cutout_scene(options.cutouts, index, side) for index in range(options.scenes))
        figures = measure(model, samples, clicks=True)
    else:
        figures = evaluate(model, scenes=options.scenes, side=side, clicks=True)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
