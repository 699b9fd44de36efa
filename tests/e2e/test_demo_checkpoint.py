"""Known masks through the whole job: JPEGs of every EXIF orientation in, RLE out, as good as the model alone.

A box scaled wrongly, swapped axes, a lost half pixel or a bad resize on the way shows as a lower IoU.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from hqlabel.model.checkpoints import DEMO_FOLDER, load
from tests.e2e import commands
from tools.demo_model.evaluate import evaluate, held_out_scene, mask_iou
from tools.demo_model.scenes import Scene

SCENES = 5
SIDE = 512
AGREEMENT = 0.02
# What was done to the upright picture before it was stored; EXIF says how to undo it.
STORED_BY: dict[int, Image.Transpose | None] = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
ORIENTATION_TAG = 0x0112


def store(scene: Scene, path: Path, orientation: int) -> None:
    image, how = Image.fromarray(scene.pixels_hwc), STORED_BY[orientation]
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    (image if how is None else image.transpose(how)).save(path, quality=95, subsampling=0, exif=exif)


def ious_by_orientation(folder: Path) -> dict[int, list[float]]:
    """IoU of every object by EXIF orientation, after the scenes went through `hqlabel label`."""
    (folder / "images").mkdir()
    scenes = [held_out_scene(index, SIDE) for index in range(SCENES)]
    rows = []
    for orientation in STORED_BY:
        for index, (scene, boxes) in enumerate(scenes):
            name = f"{index}-{orientation}.jpg"
            store(scene, folder / "images" / name, orientation)
            rows.append({"image_id": name, "boxes": boxes.tolist()})
    schema = pa.schema([("image_id", pa.string()), ("boxes", pa.list_(pa.list_(pa.float32())))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "boxes.parquet")
    commands.label_here(
        "label", "--images", str(folder / "images"), "--boxes", str(folder / "boxes.parquet"),
        "--checkpoint", "demo", "--output", str(folder / "out"),
    )  # fmt: skip
    images, instances = commands.tables(folder / "out")
    assert {row["image_id"]: row["exif_orientation"] for row in images.to_pylist()} == {
        row["image_id"]: int(row["image_id"][-5]) for row in rows
    }
    found: dict[int, list[float]] = {orientation: [] for orientation in STORED_BY}
    for row in instances.to_pylist():
        index, orientation = (int(part) for part in row["image_id"].removesuffix(".jpg").split("-"))
        truth = scenes[index][0].masks()[row["instance_index"]]
        found[orientation].append(mask_iou(truth, coco_mask.decode(row["segmentation"]).astype(bool)))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_known_masks_come_out_as_good_as_the_model_in_every_orientation(tmp_path: Path) -> None:
    found = ious_by_orientation(tmp_path)
    torch.set_num_threads(1)
    alone = evaluate(load(DEMO_FOLDER).model, scenes=SCENES, side=SIDE, boundaries=False)

    assert {len(values) for values in found.values()} == {alone["objects"]}
    means = {orientation: float(np.mean(values)) for orientation, values in found.items()}
    assert abs(np.mean(list(means.values())) - alone["iou_sum"]) <= AGREEMENT, means
    assert max(means.values()) - min(means.values()) <= AGREEMENT, means


def test_every_output_says_that_the_demo_model_made_it(tmp_path: Path) -> None:
    scene, boxes = held_out_scene(0, SIDE)
    (tmp_path / "images").mkdir()
    store(scene, tmp_path / "images" / "a.jpg", 1)
    (tmp_path / "boxes.jsonl").write_text(json.dumps({"image_id": "a.jpg", "boxes": boxes.tolist()}) + "\n")
    done = commands.label_here(
        "label", "--images", str(tmp_path / "images"), "--boxes", str(tmp_path / "boxes.jsonl"),
        "--checkpoint", "demo", "--output", str(tmp_path / "out"),
    )  # fmt: skip
    words = "for trying the pipeline and for its tests, not for labelling your data"
    assert words in done.stderr
    for part in (tmp_path / "out").glob("*/part-*.parquet"):
        footer = pq.read_metadata(part).metadata
        assert any(words in value.decode() for key, value in footer.items() if key.startswith(b"hqlabel."))
