"""Small stand-ins for torchvision and timm, so that `segment-anything-hq` imports without either.

The package needs only a few names of them. Of these, `resize`, `to_pil_image`, `batched_nms`, `box_area` and
OpenCV's `connectedComponentsWithStats` are on the road that the tests compare, and are written here by their
definitions. The others only build modules that do nothing at inference.
"""

import sys
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import nn


class DropPath(nn.Module):
    def __init__(self, drop_prob=None):
        super().__init__()
        self.drop_prob = drop_prob


def to_2tuple(x):
    return x if isinstance(x, tuple) else (x, x)


def register_model(function):
    return function


def to_pil_image(array):
    return Image.fromarray(np.ascontiguousarray(array))


def resize(picture, size_hw):
    return picture.resize((size_hw[1], size_hw[0]), Image.Resampling.BILINEAR)


def box_area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def batched_nms(boxes, scores, idxs, iou_threshold):
    """By the definition, box after box; of one category, which is all that the generator has."""
    assert not idxs.any()
    areas, kept = box_area(boxes), []
    for i in scores.argsort(descending=True, stable=True).tolist():
        rivals = torch.tensor(kept, dtype=torch.long)
        low, high = boxes[rivals, :2].maximum(boxes[i, :2]), boxes[rivals, 2:].minimum(boxes[i, 2:])
        common = (high - low).clamp(min=0).prod(1)
        if not (common / (areas[i] + areas[rivals] - common) > iou_threshold).any():
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long)


def connected_components_with_stats(mask, connectivity):
    """OpenCV's answer: labels, and the area of each as the last column; pixel after pixel."""
    assert connectivity == 8
    labels, areas = np.zeros(mask.shape, np.int32), [int((mask == 0).sum())]
    waiting = set(zip(*map(list, np.nonzero(mask)), strict=True))
    for start in sorted(waiting):
        if start not in waiting:
            continue
        waiting.remove(start)
        part = [start]
        for y, x in part:
            near = {(y + b, x + a) for b in (-1, 0, 1) for a in (-1, 0, 1)} & waiting
            waiting -= near
            part += near
        labels[tuple(np.array(part).T)] = len(areas)
        areas.append(len(part))
    return len(areas), labels, np.array(areas)[:, None], None


MODULES = {
    "torchvision": {},
    "torchvision.ops": {},
    "torchvision.ops.boxes": {"batched_nms": batched_nms, "box_area": box_area},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {"resize": resize, "to_pil_image": to_pil_image},
    "timm": {},
    "timm.models": {},
    "timm.models.layers": {
        "DropPath": DropPath,
        "to_2tuple": to_2tuple,
        "trunc_normal_": torch.nn.init.trunc_normal_,
    },
    "timm.models.registry": {"register_model": register_model},
}


def import_original():
    """Import and return `segment_anything_hq`, with stand-ins in place only while it is imported."""
    if "segment_anything_hq" in sys.modules:
        return sys.modules["segment_anything_hq"]
    before = {name: sys.modules.get(name) for name in MODULES}
    for name, contents in MODULES.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        sys.modules[name] = module
    try:
        import segment_anything_hq
        import segment_anything_hq.modeling

        return segment_anything_hq
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
