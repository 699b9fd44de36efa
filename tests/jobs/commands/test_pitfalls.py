"""Sixteen ways in which masks were damaged elsewhere on their way to people; each is shut here."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hqlabel.pipeline import schema
from tests.jobs.cli.test_cli import run
from tests.jobs.export.test_polygons import decode_brush
from tests.jobs.made_outputs import MadeImage, blob, make_output

SIZE = (60, 80)
BAD_BOXES = [
    (900.0, 900.0, 950.0, 950.0),
    (5.0, 5.0, 5.0, 9.0),
    (30.0, 5.0, 10.0, 9.0),
    (5.0, math.nan, 9.0, 9.0),
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_output(tmp_path_factory.mktemp("pitfalls") / "out", made_images())


def made_images() -> list[MadeImage]:
    plain = [blob(k, SIZE) for k in range(3)]
    kinds = [(0, "zero"), (13, "thirteen"), (90, "ninety")]
    empty = np.zeros(SIZE, np.uint8)
    return [
        MadeImage(image_id="a/1.jpg", masks=plain, categories=kinds, scores=[0.9, None, float("nan")],
                  predicted_iou=[1.02, 0.9, 0.8]),
        MadeImage(image_id="b/1.jpg", masks=[plain[1]], categories=kinds[:1], scores=[0.5]),
        MadeImage(image_id="b/1.png", masks=[empty, plain[2]], boxes=[[1, 1, 9, 9], [5, 5, 70, 50]],
                  categories=kinds[1:], scores=[0.5, 0.6]),
        MadeImage(image_id="c/turned.jpg", size_hw=(90, 40), masks=[blob(7, (90, 40))], exif=6,
                  categories=kinds[:1]),
        MadeImage(image_id="d/bad.jpg", masks=[plain[0]] * 5, boxes=[*BAD_BOXES, (5, 5, 70, 50)],
                  categories=[kinds[2]] * 5),
    ]  # fmt: skip


def instances(output: str) -> list[dict]:
    return pq.read_table(Path(output) / "instances").to_pylist()


def exported(output: str, kind: str, to: Path, *more: str) -> dict:
    code, out, err = run("export", kind, "--output", output, "--to", str(to), "--json", *more)
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def coco(output: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    to = tmp_path_factory.mktemp("coco") / "files"
    exported(output, "coco", to)
    return json.loads((to / "instances.json").read_text())


def self_ap(content: dict) -> float:
    """AP of an export judged by pycocotools against itself."""
    truth, found = COCO(), COCO()
    truth.dataset = content
    found.dataset = content | {"annotations": [one | {"score": 0.5} for one in content["annotations"]]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        judge = COCOeval(truth, found, "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0])


def test_01_counts_are_text_so_that_json_holds_them(output: str) -> None:
    masks = [row["segmentation"] for row in instances(output) if row["segmentation"]]

    assert all(isinstance(mask["counts"], str) for mask in masks)
    assert [coco_mask.area(json.loads(json.dumps(mask))) for mask in masks] == [
        row["area"] for row in instances(output) if row["segmentation"]
    ]


def test_02_runs_go_down_the_columns_and_the_brush_along_the_rows(output: str, tmp_path: Path) -> None:
    mask = made_images()[0].masks[0]
    exported(output, "label-studio", tmp_path / "ls")
    [task] = [
        t
        for t in json.loads((tmp_path / "ls" / "tasks-00001.json").read_text())
        if t["data"]["image_id"] == "a/1.jpg"
    ]
    flat = decode_brush(task["predictions"][0]["result"][0]["value"]["rle"])

    assert not np.array_equal(mask.ravel(), mask.ravel(order="F")), "a mask that can tell"
    assert np.array_equal(coco_mask.decode(instances(output)[0]["segmentation"]), mask)
    assert np.array_equal(flat[3::4] // 255, mask.ravel())


def test_03_size_is_height_and_width(output: str, coco: dict) -> None:
    picture = Image.fromarray(made_images()[0].masks[0])

    assert instances(output)[0]["segmentation"]["size"] == [picture.height, picture.width] == list(SIZE)
    assert (coco["images"][0]["height"], coco["images"][0]["width"]) == SIZE


def test_04_runs_are_no_crowd(coco: dict) -> None:
    crowd = coco | {"annotations": [one | {"iscrowd": 1} for one in coco["annotations"]]}

    assert {one["iscrowd"] for one in coco["annotations"]} == {0}
    assert self_ap(coco) == pytest.approx(1)
    assert self_ap(crowd) == -1, "what would have become of it"


def test_05_annotation_ids_count_from_1(coco: dict) -> None:
    alone = coco | {"annotations": coco["annotations"][:1]}
    from_0 = coco | {"annotations": [alone["annotations"][0] | {"id": 0}]}

    assert [one["id"] for one in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
    assert self_ap(alone) == pytest.approx(1)
    assert self_ap(from_0) == 0, "what would have become of it"


def test_06_category_ids_stay_and_are_renumbered_only_with_a_map(
    output: str, coco: dict, tmp_path: Path
) -> None:
    exported(output, "yolo-seg", tmp_path / "yolo", "--where", "image_id = 'a/1.jpg'")

    assert [(one["id"], one["name"]) for one in coco["categories"]] == [
        (0, "zero"), (13, "thirteen"), (90, "ninety"),
    ]  # fmt: skip
    lines = (tmp_path / "yolo" / "labels" / "a" / "1.txt").read_text().splitlines()
    classes = json.loads((tmp_path / "yolo" / "classes.json").read_text())
    assert [classes[int(line.split(" ")[0])]["category_id"] for line in lines] == [0, 13, 90]


def test_07_image_ids_are_small_integers_with_a_map_and_stems_may_collide(
    output: str, coco: dict, tmp_path: Path
) -> None:
    exported(output, "coco", tmp_path / "coco")
    ids = {
        row["id"]: row["image_id"]
        for row in pq.read_table(tmp_path / "coco" / "image_ids.parquet").to_pylist()
    }
    numbered = make_output(
        tmp_path / "numbered", [MadeImage(image_id=str(n), masks=[blob(n)]) for n in (9, 139, 42)]
    )
    exported(numbered, "coco", tmp_path / "kept")

    assert sorted(one["id"] for one in coco["images"]) == [1, 2, 3, 4, 5]
    assert sorted(ids.values()) == sorted(one.image_id for one in made_images())
    assert {one["id"]: one["file_name"] for one in coco["images"]} == ids
    kept = json.loads((tmp_path / "kept" / "instances.json").read_text())
    assert sorted(one["id"] for one in kept["images"]) == [9, 42, 139]


def test_08_sizes_are_upright_and_turned_pictures_are_said(output: str, coco: dict, tmp_path: Path) -> None:
    [row] = [r for r in pq.read_table(Path(output) / "images").to_pylist() if r["image_id"] == "c/turned.jpg"]
    [image] = [one for one in coco["images"] if one["file_name"] == "c/turned.jpg"]
    code, _, err = run("export", "coco", "--output", output, "--to", str(tmp_path / "coco"))

    assert (row["height"], row["width"], row["orig_height"], row["orig_width"]) == (90, 40, 40, 90)
    assert (image["height"], image["width"]) == (90, 40)
    assert code == 0
    assert "1 image is stored turned" in err


def test_09_an_empty_mask_keeps_its_row_and_goes_into_no_export(
    output: str, coco: dict, tmp_path: Path
) -> None:
    [empty] = [row for row in instances(output) if row["area"] == 0]
    left_out = exported(output, "coco", tmp_path / "coco")["left_out"]

    assert empty["qc_flags"] == ["empty"]
    assert (empty["accepted"], empty["reject_reason"], empty["bbox"]) == (False, "empty", None)
    assert min(one["area"] for one in coco["annotations"]) > 0
    assert left_out["rows without a mask"] == 1 + len(BAD_BOXES)


def test_10_area_is_the_masks_not_the_boxs(coco: dict) -> None:
    for one in coco["annotations"]:
        assert one["area"] == coco_mask.area(one["segmentation"]) < one["bbox"][2] * one["bbox"][3]


def test_11_boxes_that_cannot_be_prompts_are_named_and_normalised_ones_are_to_be_stated(
    output: str, tmp_path: Path
) -> None:
    bad = [row for row in instances(output) if row["image_id"] == "d/bad.jpg"]
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (80, 60)).save(photos / "a.jpg")
    (tmp_path / "boxes.csv").write_text("image_id,x1,y1,x2,y2\n" + "a.jpg,0.1,0.2,0.6,0.9\n" * 20)

    places = ("--images", str(photos), "--boxes", str(tmp_path / "boxes.csv"))
    code, _, error = run("plan", *places)

    assert [row["reject_reason"] for row in bad[:4]] == [
        "box_outside", "box_empty", "box_inverted", "box_not_finite",
    ]  # fmt: skip
    assert all(row["segmentation"] is None for row in bad[:4])
    assert bad[4]["segmentation"] is not None
    assert code == 4
    assert "--box-format xyxy-normalised" in error
    assert run("plan", *places, "--box-format", "xyxy-normalised")[0] == 0


def test_12_bbox_is_whole_pixels_and_ends_exclusive(output: str) -> None:
    for row in instances(output):
        if row["area"]:
            rows, columns = np.nonzero(coco_mask.decode(row["segmentation"]))
            x, y, width, height = row["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)


def test_13_a_big_json_is_cut(output: str, tmp_path: Path) -> None:
    exported(output, "coco", tmp_path / "coco", "--per-file", "3")

    files = sorted((tmp_path / "coco").glob("instances-*.json"))
    numbers = [len(json.loads(path.read_text())["annotations"]) for path in files]
    assert len(files) > 1
    assert max(numbers) <= 3


def test_14_an_unknown_score_is_null_never_nan_and_never_1(output: str, coco: dict) -> None:
    scores = [row["detector_score"] for row in instances(output) if row["image_id"] == "a/1.jpg"]
    written = [one["detector_score"] for one in coco["annotations"][:3]]

    assert scores[1:] == written[1:] == [None, None]
    assert np.float32(scores[0]) == np.float32(written[0]) == np.float32(0.9)
    assert "score_not_finite" in instances(output)[2]["qc_flags"]


def test_15_the_schema_does_not_depend_on_the_rows(output: str, tmp_path: Path) -> None:
    bare = make_output(tmp_path / "bare", [MadeImage(image_id="x.jpg"), MadeImage(image_id="y.jpg")])

    for table, kind in (("instances", schema.INSTANCES), ("images", schema.IMAGES)):
        for place in (output, bare):
            for path in (Path(place) / table).glob("*.parquet"):
                assert pq.read_schema(path).remove_metadata() == kind.remove_metadata()
    assert pq.read_table(Path(bare) / "instances").num_rows == 0
    assert not any(pa.types.is_null(field.type) for field in schema.INSTANCES)


def test_16_a_predicted_iou_above_1_is_kept_and_no_damage(output: str, coco: dict) -> None:
    code, _, err = run("validate", "--output", output, "--all-masks")

    assert instances(output)[0]["predicted_iou"] == pytest.approx(1.02)
    assert coco["annotations"][0]["predicted_iou"] == pytest.approx(1.02)
    assert code == 0, err
