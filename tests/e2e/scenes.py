"""Generated data sets for the whole way: pictures of mixed sizes with 0 to 60 boxes, and a small model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from hqlabel.model.checkpoints import save_transformers
from hqlabel.model.sam_config import vit_config
from tests.parity.lively import lively

SIZES_WH = ((97, 140), (160, 120), (200, 90), (64, 64), (320, 240), (61, 300))


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Where the pictures and the box table lie, and what they hold: boxes by image id."""

    images: Path
    boxes: Path
    boxes_by_id: dict[str, np.ndarray]

    @property
    def num_boxes(self) -> int:
        return sum(len(boxes) for boxes in self.boxes_by_id.values())


def small_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """The folder, with a random model of 128-pixel input whose masks are neither empty nor full."""
    config = vit_config(
        embed_dim=64, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=5, image_size=128,
        out_channels=64, mlp_dim=128,
    )  # fmt: skip
    save_transformers(lively(config, seed), folder)
    return folder


def picture(index: int) -> Image.Image:
    """A textured picture with a few shapes; the same for the same index."""
    rng = np.random.default_rng(index)
    width, height = SIZES_WH[index % len(SIZES_WH)]
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = rng.integers(0, width), rng.integers(0, height)
        size = int(rng.integers(8, 60))
        draw.ellipse((x, y, x + size, y + size), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return image


def boxes_of(index: int, *, most: int) -> np.ndarray:
    """0 to `most` boxes in pixels of picture `index`, some reaching over its edge."""
    rng = np.random.default_rng([index, 1])
    width, height = SIZES_WH[index % len(SIZES_WH)]
    count = 0 if index % 10 == 0 else int(rng.integers(1, most + 1))
    start = rng.uniform(0, (0.8 * width, 0.8 * height), (count, 2))
    extent = rng.uniform(4, (0.6 * width, 0.6 * height), (count, 2))
    return np.concatenate([start, start + extent], axis=1).astype(np.float32)


def make_data_set(folder: Path, *, images: int, most_boxes: int = 60) -> DataSet:
    """Pictures in sub-folders as JPEG and PNG, and boxes.parquet with one row an image (none for some)."""
    root = folder / "images"
    boxes_by_id = {}
    for index in range(images):
        name = f"{index % 7}/picture {index:05d}.{'png' if index % 4 == 0 else 'jpg'}"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(root / name, quality=90)
        boxes_by_id[name] = boxes_of(index, most=most_boxes)
    rows = [
        {"image_id": name, "boxes": boxes.tolist(), "scores": np.linspace(0.2, 0.9, len(boxes)).tolist(),
         "labels": [f"class {i % 3}" for i in range(len(boxes))]}
        for name, boxes in sorted(boxes_by_id.items(), reverse=True)
        if len(boxes)
    ]  # fmt: skip
    schema = pa.schema(
        [
            ("image_id", pa.string()),
            ("boxes", pa.list_(pa.list_(pa.float32()))),
            ("scores", pa.list_(pa.float64())),
            ("labels", pa.list_(pa.string())),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "boxes.parquet")
    return DataSet(images=root, boxes=folder / "boxes.parquet", boxes_by_id=boxes_by_id)


def write_coco(path: Path, data: DataSet) -> Path:
    """The same boxes as a COCO instances file, image ids counted from 1."""
    images, annotations = [], []
    for number, (name, boxes) in enumerate(sorted(data.boxes_by_id.items()), start=1):
        with Image.open(data.images / name) as image:
            width, height = image.size
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for x1, y1, x2, y2 in boxes.astype(float).tolist():
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0,
                 "bbox": [x1, y1, x2 - x1, y2 - y1]}
            )  # fmt: skip
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    path.write_text(json.dumps(coco))
    return path
