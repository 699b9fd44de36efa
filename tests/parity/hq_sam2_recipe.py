"""Weights and pictures of HQ-SAM 2's goldens: frozen numpy streams, so equal on every machine.

The goldens were computed with the original code (folder sam-hq2 of SysCV/sam-hq) on these. A tensor depends
on its name in the published file, its shape and a seed, on nothing else. `RandomState` is the generator that
numpy promises never to change.
"""

from __future__ import annotations

import json
import re
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hqlabel.model.hq_sam2.hiera_config import HieraConfig, hq_sam2_config
from hqlabel.model.hq_sam2.hq_sam2 import HQSam2
from hqlabel.model.hq_sam2.hq_sam2_names import name_in_file

HERE = Path(__file__).parent
GOLDENS, LAYOUTS = HERE / "hq_sam2_goldens", HERE / "hq_sam2_layouts"

TABLE = re.compile(r"(_tokens?|_embed|point_embeddings\.\d)\.weight$")  # rows of numbers, no matrix
UPSCALE = re.compile(r"output_upscaling\.[03]\.weight$")  # transposed convolutions: (in, out, 2, 2)

SMALL = {
    "embed_dim": 16, "num_heads": 1, "stages": [1, 2, 3, 1], "global_att_blocks": [4],
    "window_pos_embed_bkg_spatial_size": [7, 7], "window_spec": [8, 4, 6, 3],
    "d_model": 32, "image_size": 256,
}  # fmt: skip
"""The configuration of goldens `a`, in the words of the original's own files: windows of stages 3, 4 pad."""


def tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One tensor by its name in the published file, float32."""
    x = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode())).standard_normal(shape)
    if name.endswith(".bias"):
        x = 0.2 * x
    elif name.endswith(".weight") and len(shape) == 1:
        x = 1 + 0.1 * x
    elif name.endswith(".weight") and not TABLE.search(name):
        x = 1.5 * x / np.sqrt(shape[0] if UPSCALE.search(name) else np.prod(shape[1:]))
    else:
        x = 0.5 * x
    return x.astype(np.float32)


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """An upright RGB picture, uint8 (H, W, 3), of integer arithmetic alone."""
    stream = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width].astype(np.int64)
    planes = [x * 160 // width, y * 160 // height, (x + y) * 160 // (width + height)]
    image = np.stack(planes, axis=-1)
    for _ in range(4):
        cy, cx = stream.randint(height), stream.randint(width)
        ry, rx = 8 + stream.randint(height // 4), 8 + stream.randint(width // 4)
        inside = ((y - cy) * rx) ** 2 + ((x - cx) * ry) ** 2 <= (ry * rx) ** 2
        image[inside] = stream.randint(0, 220, size=3)
    return (image + stream.randint(0, 36, size=image.shape)).astype(np.uint8)


def config_of(words: dict[str, Any]) -> HieraConfig:
    """The encoder of a configuration in the original's words."""
    return HieraConfig(
        embed_dim=words["embed_dim"],
        num_heads=words["num_heads"],
        stages=tuple(words["stages"]),
        global_att_blocks=tuple(words["global_att_blocks"]),
        window_spec=tuple(words["window_spec"]),
        background_side=words["window_pos_embed_bkg_spatial_size"][0],
        output_channels=words["d_model"],
        image_size=words["image_size"],
    )


def model_of(words: dict[str, Any], seed: int) -> HQSam2:
    """The model of a configuration with the recipe's weights, in evaluation mode."""
    with torch.device("meta"):
        model = HQSam2(hq_sam2_config(config_of(words)))
    weights = {
        name: torch.from_numpy(tensor(name_in_file(name), tuple(empty.shape), seed))
        for name, empty in model.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    return model.eval()


def layout_of(size: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and use (image or video) of every tensor of a published size's file, by name."""
    rows = [line.split("\t") for line in (LAYOUTS / f"{size}.tsv").read_text().splitlines()[1:]]
    return {name: (tuple(map(int, shape.split("x"))), use) for name, shape, use in rows}


def published_tensors(model: HQSam2, *, videos: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of a file as it is published: the model's under the file's names, and the video part's."""
    tensors = {name_in_file(name): value for name, value in model.state_dict().items()}
    video = [name for name, (_, use) in layout_of("hiera_l").items() if use == "video" and videos]
    return tensors | {name: torch.zeros(2) for name in video}


def write_published(folder: Path, words: dict[str, Any] = SMALL, seed: int = 9) -> Path:
    """A folder with a file in the published layout, and next to it what no shape tells of a small model."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": published_tensors(model_of(words, seed))}, folder / "pytorch_model.bin")
    stated = {"model_type": "hq_sam2", **words}
    (folder / "config.json").write_text(json.dumps(stated))
    return folder


@cache
def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a golden file, and what they were computed with."""
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        held = {key: arrays[key] for key in arrays.files}
    return held, json.loads(str(held.pop("meta")))
