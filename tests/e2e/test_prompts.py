"""Points and masks beside and instead of boxes, through the whole job: the masks are the model's own."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from hqlabel.model import checkpoints, rle
from hqlabel.model.device import set_cpu_threads
from hqlabel.model.prompt_encoder import mask_to_prompt
from hqlabel.model.records import CallShape, Instances, PreparedImage, Prompts
from hqlabel.model.segmenter import Segmenter
from hqlabel.pipeline.images.decode_upright import decode_image
from tests.e2e import commands
from tests.e2e.scenes import picture
from tests.faults.fuzzing import MASK_MAKES
from tests.parity.hq_sam2_recipe import write_published
from tests.pipeline.made_formats import tar_of

SHAPE = CallShape(images_per_call=1, boxes_per_call=4)
SETTINGS = (
    "--set", "model.dtype=float32", "--set", f"model.boxes_per_call={SHAPE.boxes_per_call}",
    "--set", "output.images_per_unit=2", "--set", "cluster.actors=1", "--no-progress",
)  # fmt: skip
BOX, OTHER = [10.0, 20.0, 55.0, 60.0], [20.0, 15.0, 50.0, 60.0]
KINDS = ("boxes", "points", "point_labels", "prompt_mask")
TYPES = {
    "boxes": pa.list_(pa.list_(pa.float64())),
    "points": pa.list_(pa.list_(pa.list_(pa.float64()))),
    "point_labels": pa.list_(pa.list_(pa.int8())),
    "prompt_mask": pa.list_(pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),
}


def stored(index: int, *, orientation: int) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture(index).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def prompts_of(size_hw: tuple[int, int]) -> list[dict]:
    """One prompt of every kind, and one whose points and labels do not go together."""
    nothing = dict.fromkeys(KINDS)
    y, x = np.mgrid[: size_hw[0], : size_hw[1]]
    inside = ((x - 35) ** 2 + (y - 40) ** 2 < 600).astype(np.uint8)
    mask = {"size": list(size_hw), "counts": coco_mask.encode(np.asfortranarray(inside))["counts"].decode()}
    return [
        nothing | {"boxes": BOX},
        nothing | {"points": [[30.5, 40.0]], "point_labels": [1]},
        nothing | {"points": [[30.5, 40.0], [50.0, 20.0]], "point_labels": [1, 0]},
        nothing | {"boxes": OTHER, "points": [[30.0, 35.0]], "point_labels": [1]},
        nothing | {"prompt_mask": mask},
        nothing | {"boxes": BOX, "prompt_mask": mask},
        nothing | {"points": [[30.0, 40.0]], "point_labels": [1, 1]},
    ]


def alone(segmenter: Segmenter, data: bytes, one: dict) -> Instances:
    """The answer to one prompt, straight from the model."""
    side, fit = segmenter.input_side, segmenter.fit
    decoded = decode_image(data, max_pixels=10**8, side=side, fit=fit)
    logits = None
    if one["prompt_mask"] is not None:
        inside = rle.rle_to_mask(one["prompt_mask"]["counts"], decoded.size_hw)
        logits = mask_to_prompt(inside, side=side, fit=fit)[None]
    prompts = Prompts(
        boxes_xyxy=None if one["boxes"] is None else np.array([one["boxes"]]),
        points_xy=None if one["points"] is None else np.array([one["points"]]),
        point_labels=None if one["points"] is None else np.array([one["point_labels"]]),
        mask_logits=logits,
    )
    [found] = segmenter.segment_prepared(
        [PreparedImage(pixels_hwc=decoded.pixels_hwc, size_hw=decoded.size_hw, prompts=prompts)]
    )
    assert isinstance(found, Instances)
    return found


@pytest.fixture(params=["SAM-HQ", pytest.param("HQ-SAM 2", marks=pytest.mark.faults)])
def weights(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> Path:
    """A small checkpoint of each family, the second in the layout of its published file."""
    return checkpoint if request.param == "SAM-HQ" else write_published(tmp_path / "hq_sam2")


def test_points_and_masks_of_a_table_give_the_models_own_masks(weights: Path, tmp_path: Path) -> None:
    pictures = {f"{i}.png": stored(i, orientation=6 if i == 1 else 1) for i in range(3)}
    (tmp_path / "shard.tar").write_bytes(tar_of(pictures))
    sizes = {name: decode_image(data, max_pixels=10**8, side=128).size_hw for name, data in pictures.items()}
    prompts = {name: prompts_of(sizes[name]) for name in pictures}
    columns = {key: [[one[key] for one in some] for some in prompts.values()] for key in KINDS}
    rows = {"image_id": pa.array(prompts), **{key: pa.array(columns[key], TYPES[key]) for key in KINDS}}
    pq.write_table(pa.table(rows), tmp_path / "prompts.parquet")
    inputs = ["--images", str(tmp_path / "shard.tar"), "--boxes", str(tmp_path / "prompts.parquet")]
    output = tmp_path / "out"

    commands.label_here("label", *inputs, "--checkpoint", str(weights), "--output", str(output), *SETTINGS)

    set_cpu_threads(1)  # as the job's process does: the last bits of some sums follow their number
    segmenter = Segmenter(checkpoints.load(weights).model, call_shape=SHAPE, dtype="float32")
    instances = {
        (row["image_id"], row["instance_index"]): row for row in commands.tables(output)[1].to_pylist()
    }
    assert len(instances) == sum(map(len, prompts.values()))
    for name, data in pictures.items():
        for index, one in enumerate(prompts[name][:-1]):
            row, found = instances[name, index], alone(segmenter, data, one)
            assert row["segmentation"] == {"size": list(sizes[name]), "counts": found.counts[0]}
            assert row["predicted_iou"] == found.predicted_iou[0]
            assert row["stability_score"] == found.stability_score[0]
            assert (row["prompt_bbox"] is None) == (row["box_iou"] is None) == (one["boxes"] is None)
        masks = {instances[name, index]["segmentation"]["counts"] for index in range(6)}
        assert len(masks) == 6, "each kind of prompt changes the mask"
        refused = instances[name, 6]
        assert (refused["segmentation"], refused["reject_reason"]) == (None, "prompt_invalid")


def test_a_table_with_masks_that_are_none_is_labelled_to_the_end(checkpoint: Path, tmp_path: Path) -> None:
    """Every make of a mask beside a box, on one picture; nothing but such masks on another; a sound third."""
    (tmp_path / "images").mkdir()
    for index in range(3):
        (tmp_path / "images" / f"{index}.png").write_bytes(stored(index, orientation=1))
    size = list(decode_image(stored(0, orientation=1), max_pixels=10**8, side=128).size_hw)
    runs = [size[0] * 9, size[0] * 20, size[0] * (size[1] - 29)]
    makes = {name: make(size, runs) for name, make in MASK_MAKES.items()}
    broken = {"size": size, "counts": "PPYo1"}
    rows = [{"image_id": "0.png", "bbox": BOX, "prompt_mask": mask} for mask in makes.values()]
    rows += [{"image_id": "1.png", "bbox": None, "prompt_mask": broken}] * 2
    rows += [
        {"image_id": "2.png", "bbox": OTHER, "points": [[30.0, 35.0]], "point_labels": [label]}
        for label in (1, 2)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = ["--images", str(tmp_path / "images"), "--boxes", str(tmp_path / "prompts.jsonl")]
    output = tmp_path / "out"

    # One of three images has no prompt that can be used: more than limits.max_failure_rate.
    done = commands.label_here(
        "label", *inputs, "--checkpoint", str(checkpoint), "--output", str(output), *SETTINGS, code=3
    )

    images, instances = (table.to_pylist() for table in commands.tables(output))
    outcomes = [(row["image_id"], row["status"], row["error_code"]) for row in images]
    assert outcomes == [
        ("0.png", "labelled", None),
        ("1.png", "failed", "no_usable_box"),
        ("2.png", "labelled", None),
    ]
    used = {
        name for name, row in zip(makes, instances, strict=False) if row["reject_reason"] != "prompt_invalid"
    }
    assert used == {"sound", "uncompressed", "floats"}
    same = {
        row["segmentation"]["counts"] for row, name in zip(instances, makes, strict=False) if name in used
    }
    assert len(same) == 1
    assert [row["reject_reason"] for row in instances[len(makes) :]][:2] == ["prompt_invalid"] * 2
    assert instances[-1]["reject_reason"] == "prompt_invalid"
    # A mask whose runs fill another picture's size is found out when its own is opened.
    invalid = len(makes) - len(used | {"swapped"}) + 3
    assert "masks checked are of another size than their picture" in done.stderr
    assert f"{invalid} of {len(rows)} boxes have points or a mask that cannot be used" in done.stderr
