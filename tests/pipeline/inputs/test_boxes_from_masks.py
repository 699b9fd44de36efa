"""Boxes around masks: COCO's RLE and polygons, and YOLO's polygons, compared with pycocotools and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from hqlabel.pipeline.box_geometry import boxes_to_xyxy, denormalise_boxes
from hqlabel.pipeline.errors import JobRefused, UsageError
from hqlabel.pipeline.inputs.coco_boxes import boxes_around_masks
from hqlabel.pipeline.planning.make_plan import Plan, make_plan
from hqlabel.pipeline.settings import InputSettings

HEIGHT, WIDTH = 40, 60
TRIANGLE = [10.5, 5.25, 30.0, 5.25, 20.0, 25.75]


def some_masks(count: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    noise = rng.random((count, HEIGHT, WIDTH))
    masks = (noise < rng.random((count, 1, 1)) ** 6).astype(np.uint8)
    masks[:, 20, 30] = 1  # none is empty by chance
    masks[0] = 0
    masks[1] = 1
    masks[2], masks[3], masks[4] = 0, 0, 0
    masks[2, 7, 9] = masks[3, 0, 0] = masks[4, HEIGHT - 1, WIDTH - 1] = 1
    return list(masks)


def compressed(mask: np.ndarray) -> dict[str, Any]:
    found = coco_mask.encode(np.asfortranarray(mask))
    return {"size": found["size"], "counts": found["counts"].decode()}


def runs(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.reshape(-1, order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], ends, [len(flat)]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *lengths] if flat[0] else lengths}


def coco(folder: Path, segmentations: list[Any], **more: Any) -> Path:
    tree = {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": one, **more}
            for i, one in enumerate(segmentations)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "coco.json").write_text(json.dumps(tree))
    return folder / "coco.json"


def planned(path: Path, **settings: Any) -> Plan:
    return make_plan(InputSettings(boxes=str(path), boxes_from="masks", **settings))


def given(plan: Plan) -> list[list[float] | None]:
    return [box["given"] for row in plan.table.to_pylist() for box in row["boxes"]]


def test_boxes_of_rle_are_those_of_pycocotools_whatever_the_counts_are_written_as() -> None:
    masks = some_masks()
    expected = [coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask))).tolist() for mask in masks]

    for write in (compressed, runs):
        boxes, sizes_hw = boxes_around_masks([write(mask) for mask in masks])
        assert boxes[0] is None  # empty: pycocotools says [0, 0, 0, 0]
        assert expected[1:] == [list(box or ()) for box in boxes[1:]]
        assert {(HEIGHT, WIDTH)} == set(sizes_hw)
    assert [0.0, 0.0, WIDTH, HEIGHT] == expected[1]
    assert [9.0, 7.0, 1.0, 1.0] == expected[2]  # the pixel in column 9, row 7, from edge to edge


def test_boxes_of_polygons_are_their_extents_within_a_pixel_of_pycocotools() -> None:
    rng = np.random.default_rng(5)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    polygons = [[TRIANGLE]] + [
        [
            (
                rng.uniform((12, 12), (48, 28))
                + rng.uniform(3, 11) * np.stack([np.cos(angles), np.sin(angles)], 1)
            )
            .reshape(-1)
            .tolist()
            for _ in range(parts)
        ]
        for parts in (1, 2, 3) * 20
    ]

    boxes, _ = boxes_around_masks(polygons)

    assert boxes[0] == (10.5, 5.25, 19.5, 20.5)
    for polygon, box in zip(polygons, boxes, strict=True):
        points = np.concatenate([np.reshape(one, (-1, 2)) for one in polygon])
        assert box == (*points.min(axis=0), *np.ptp(points, axis=0))
        merged = coco_mask.merge(coco_mask.frPyObjects(polygon, HEIGHT, WIDTH))
        of_pixels = boxes_to_xyxy([coco_mask.toBbox(merged)], "xywh")
        assert np.abs(boxes_to_xyxy([box], "xywh") - of_pixels).max() <= 1
    assert boxes_around_masks([TRIANGLE])[0] == boxes[:1]  # without the list around it


def test_a_coco_file_is_prompted_by_its_masks_only_when_asked(tmp_path: Path) -> None:
    path = coco(tmp_path, [[TRIANGLE], compressed(some_masks()[2]), runs(some_masks()[1])])

    assert [[10.5, 5.25, 19.5, 20.5], [9.0, 7.0, 1.0, 1.0], [0.0, 0.0, WIDTH, HEIGHT]] == given(planned(path))
    plain = make_plan(InputSettings(boxes=str(path), box_format="xywh"))
    assert [[0.0, 0.0, 1.0, 1.0]] * 3 == given(plain)
    assert plain.sha256 != planned(path).sha256
    results = tmp_path / "results.json"
    results.write_text(json.dumps(json.loads(path.read_text())["annotations"]))
    assert given(planned(path)) == given(planned(results, images=str(path)))


@pytest.mark.parametrize(
    "segmentation",
    [
        *(
            [],
            None,
            [[]],
            [[1, 2, 3, 4]],
            [[1, 2, 3, 4, 5]],
            [[1, 2, 3, 4, 5, float("nan")]],
            "x",
            [["a"] * 6],
        ),
        *([TRIANGLE, None], {"size": [HEIGHT, WIDTH], "counts": "!"}, {"size": [4], "counts": [3]}, {}, 5),
        compressed(some_masks()[0]),
        compressed(some_masks()[1][:, :50]),
        {"size": [10**6, 10**6], "counts": "0"},
    ],
)
def test_a_mask_without_a_box_costs_its_own_row_and_is_said(tmp_path: Path, segmentation: Any) -> None:
    plan = planned(coco(tmp_path, [[TRIANGLE], segmentation, [TRIANGLE]]))

    assert [[10.5, 5.25, 19.5, 20.5], None, [10.5, 5.25, 19.5, 20.5]] == given(plan)
    assert "mask" in " ".join(plan.summary.warnings)


def test_yolo_polygons_become_boxes_and_a_score_behind_them_is_kept(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "img" / "a.png")
    (tmp_path / "labels").mkdir()
    shares = (np.reshape(TRIANGLE, (-1, 2)) / (WIDTH, HEIGHT)).reshape(-1)
    text = " ".join(map(repr, shares.tolist()))
    (tmp_path / "labels" / "a.txt").write_text(f"0 {text}\n3 {text} 0.5\n")
    images = str(tmp_path / "img")

    plan = planned(tmp_path / "labels", images=images)

    (row,) = plan.table.to_pylist()
    assert [(0, None), (3, 0.5)] == [(box["category_id"], box["score"]) for box in row["boxes"]]
    pixels = denormalise_boxes([box["given"] for box in row["boxes"]], (HEIGHT, WIDTH))
    corners = boxes_to_xyxy(pixels, "cxcywh")
    np.testing.assert_allclose(corners, [[10.5, 5.25, 30.0, 25.75]] * 2, rtol=0, atol=1e-12)
    with pytest.raises(JobRefused, match=r"input\.boxes_from=masks"):
        make_plan(InputSettings(boxes=str(tmp_path / "labels"), images=images))
    (tmp_path / "labels" / "a.txt").write_text(f"0 {text}\n0 0.5 0.5 0.1 0.1\n")
    said = " ".join(planned(tmp_path / "labels", images=images).summary.warnings)
    assert "line 2 has 5 numbers; wanted polygons" in said


def test_other_inputs_have_no_masks_to_take_boxes_from(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image_uri,x1,y1,x2,y2\na.jpg,1,2,3,4\n")

    with pytest.raises(UsageError, match=r"boxes_from=masks is for COCO files"):
        planned(tmp_path / "t.csv")
