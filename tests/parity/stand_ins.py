"""Small stand-ins for torchvision and timm, so that `segment-anything-hq` imports without either.

The package needs only a few names of them. Of these, `resize` and `to_pil_image` are on the road that the
tests compare; torchvision does with Pillow images just what is written here. The others are never called,
or only build modules that do nothing at inference.
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


def not_called(*args, **kwargs):
    raise AssertionError("the parity tests are not meant to come here")


MODULES = {
    "torchvision": {},
    "torchvision.ops": {},
    "torchvision.ops.boxes": {"batched_nms": not_called, "box_area": not_called},
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
