"""Points and masks from a table, beside and instead of boxes: the job's masks are the model's own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from hqlabel.model import checkpoints, rle
from hqlabel.model.prompt_encoder import mask_to_prompt
from hqlabel.model.records import CallShape, PreparedImage, Prompts
from hqlabel.model.segmenter import Segmenter
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.images.decode_upright import decode_image
from hqlabel.pipeline.job_context import BoxRules, JobContext, Place, Weights
from hqlabel.pipeline.planning.make_plan import make_plan, write_plan
from hqlabel.pipeline.settings import InputSettings, Limits, ModelSettings
from hqlabel.pipeline.stages.commit import commit_unit, read_outcome
from hqlabel.pipeline.stages.prepare import prepare_unit
from hqlabel.pipeline.stages.rows_between_stages import UnitRow, pack, unpack
from hqlabel.pipeline.stages.segment import SegmentWorker
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.unit_files import list_committed, read_committed
from tests.e2e.scenes import picture, small_checkpoint

BOX, OTHER = [10.0, 20.0, 90.0, 110.0], [40.0, 40.0, 70.0, 130.0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("weights") / "small")


def mask_of(image: Image.Image) -> dict:
    """A round mask of the upright picture, as COCO's runs."""
    height, width = image.height, image.width
    y, x = np.mgrid[:height, :width]
    inside = (x - 50) ** 2 + (y - 60) ** 2 < 900
    encoded = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": [height, width], "counts": encoded["counts"].decode()}


def prompts_of(image: Image.Image) -> list[dict]:
    """One prompt of every kind; of some kinds two, and two that cannot be used."""
    nothing = dict.fromkeys(("box", "points", "point_labels", "prompt_mask"))
    mask = mask_of(image)
    return [
        nothing | {"box": BOX},
        nothing | {"points": [[50.0, 60.0]], "point_labels": [1]},
        nothing | {"box": OTHER, "points": [[55.5, 80.0], [45.0, 50.0]], "point_labels": [1, 0]},
        nothing | {"prompt_mask": mask},
        nothing | {"box": BOX, "prompt_mask": mask},
        nothing | {"points": [[50.0, 60.0]], "point_labels": [1, 1]},
        nothing | {"box": OTHER, "points": [[55.5, 80.0]], "point_labels": [1], "prompt_mask": mask},
        nothing | {"points": [[500.0, 60.0]], "point_labels": [1]},
        nothing | {"points": [[30.0, 30.0]], "point_labels": [1]},
    ]


def write_rows(folder: Path, prompts: list[dict], name: str) -> Path:
    """A table with one row an image, as JSON lines or as CSV."""
    columns = {
        "boxes": [one["box"] for one in prompts],
        **{key: [one[key] for one in prompts] for key in ("points", "point_labels", "prompt_mask")},
    }
    if name.endswith(".jsonl"):
        (folder / name).write_text(json.dumps({"image_id": "a.png", **columns}) + "\n")
        return folder / name
    with open(folder / name, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", *columns])
        writer.writerow(["a.png", *map(json.dumps, columns.values())])
    return folder / name


def write_row_each(folder: Path, prompts: list[dict]) -> Path:
    """A CSV with one row a prompt."""
    with open(folder / "each.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "bbox", "points", "point_labels", "prompt_mask"])
        for one in prompts:
            cells = (one[key] for key in ("box", "points", "point_labels", "prompt_mask"))
            writer.writerow(["a.png", *("" if cell is None else json.dumps(cell) for cell in cells)])
    return folder / "each.csv"


def labelled(settings: InputSettings, output: Path, checkpoint: Path) -> list[dict]:
    """The instances of the one image, through every stage."""
    plan = make_plan(settings)
    loaded = checkpoints.load(checkpoint)
    context = JobContext(
        output=Place(uri=str(output)),
        plan_sha256=plan.sha256,
        images_per_unit=64,
        run_id="run",
        weights=Weights(source=str(checkpoint), sha256=loaded.weights.sha256, input_side=128),
        model=ModelSettings(dtype="float32", boxes_per_call=16),
        box_rules=BoxRules(box_frame=plan.summary.box_frame),
        access=plan.access,
        limits=Limits(),
    )
    store = Store(context.output)
    write_plan(store, plan)
    child = DecodeChild(Limits(), 128)
    ready = unpack(pack(*prepare_unit(UnitRow(unit_id=0), context, store, child)))
    child.close()
    done = unpack(pack(SegmentWorker(context, epoch=1, use_gpu=False).run(ready)))
    read_outcome(commit_unit(done, context, store))
    [row] = read_committed(store, list_committed(store)[0]).to_pylist()
    assert row["status"] == "labelled", row["error_message"]
    return row["instances"]


def alone(one: dict, data: bytes, checkpoint: Path) -> tuple[str, float]:
    """Runs and score of one prompt, straight from the model."""
    model = checkpoints.load(checkpoint).model
    segmenter = Segmenter(model, call_shape=CallShape(), dtype="float32")
    decoded = decode_image(data, max_pixels=10**8, side=128)
    mask, points = one["prompt_mask"], one["points"]
    logits = None
    if mask is not None:
        inside = rle.rle_to_mask(mask["counts"], decoded.size_hw)
        logits = mask_to_prompt(inside, side=128)[None]
    prompts = Prompts(
        boxes_xyxy=None if one["box"] is None else np.array([one["box"]]),
        points_xy=None if points is None else np.array([points]),
        point_labels=None if points is None else np.array([one["point_labels"]]),
        mask_logits=logits,
    )
    image = PreparedImage(pixels_hwc=decoded.pixels_hwc, size_hw=decoded.size_hw, prompts=prompts)
    [found] = segmenter.segment_prepared([image])
    return found.counts[0], float(found.predicted_iou[0])


def test_every_kind_of_prompt_gives_the_models_own_mask(tmp_path, checkpoint):
    images = tmp_path / "images"
    images.mkdir()
    picture(0).save(images / "a.png")
    data, prompts = (images / "a.png").read_bytes(), prompts_of(picture(0))
    tables = [
        write_rows(tmp_path, prompts, "boxes.jsonl"),
        write_rows(tmp_path, prompts, "boxes.csv"),
        write_row_each(tmp_path, prompts),
    ]
    plans = [make_plan(InputSettings(images=str(images), boxes=str(table))) for table in tables]

    rows = labelled(InputSettings(images=str(images), boxes=str(tables[0])), tmp_path / "out", checkpoint)

    assert len({plan.sha256 for plan in plans}) == 1
    reasons = [one["box_error"] for one in rows]
    assert reasons == [None, None, None, None, None, "prompt_invalid", None, "prompt_invalid", None]
    masks = [one["segmentation"] and one["segmentation"]["counts"] for one in rows]
    for row, one in zip(rows, prompts, strict=True):
        if row["box_error"] is None:
            counts, score = alone(one, data, checkpoint)
            assert row["segmentation"]["counts"] == counts
            assert row["predicted_iou"] == pytest.approx(score, abs=1e-6)
            assert (row["prompt_bbox"] is None) == (one["box"] is None)
            assert (row["box_iou"] is None) == (one["box"] is None)
    told_apart = {masks[row] for row in (0, 1, 2, 3, 4, 6, 8)}
    assert len(told_apart) == 7, "each kind of prompt changes the mask"


def test_points_of_a_turned_picture_are_turned_with_its_boxes_and_its_masks_are_not(tmp_path, checkpoint):
    images = tmp_path / "images"
    images.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = picture(0)
    stored.save(images / "a.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(images / "a.png"))
    height = stored.height
    stored_prompts = [
        dict.fromkeys(("box", "prompt_mask")) | {"points": [[20.0, 30.0]], "point_labels": [1]},
        dict.fromkeys(("points", "point_labels")) | {"box": BOX, "prompt_mask": mask_of(upright)},
    ]
    turned = {"box": None, "prompt_mask": None, "points": [[height - 30.0, 20.0]], "point_labels": [1]}
    table = write_rows(tmp_path, stored_prompts, "boxes.jsonl")
    settings = InputSettings(images=str(images), boxes=str(table))

    rows = labelled(settings.model_copy(update={"box_frame": "stored"}), tmp_path / "out", checkpoint)

    assert rows[0]["segmentation"]["counts"] == alone(turned, (images / "a.png").read_bytes(), checkpoint)[0]
    assert [row["box_error"] for row in rows] == [None, "prompt_invalid"]
