"""hqlabel evaluate: how tables and truth find each other, and what is said of it."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.jobs.made_outputs import MadeImage, blob, make_output, write_truth
from tests.jobs.test_cli import run

SIZE = (60, 80)
NAMES = {3: "cat", 8: "dog"}


def truth_images(*names: str) -> list[dict]:
    return [
        {"id": n, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        for n, name in enumerate(names, start=1)
    ]


def figures(*arguments: str) -> dict:
    code, out, err = run("evaluate", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def eroded(mask: np.ndarray) -> np.ndarray:
    return mask & np.roll(mask, 1, 0) & np.roll(mask, 1, 1)


@pytest.fixture
def masks() -> list[np.ndarray]:
    return [blob(k, SIZE) for k in range(4)]


def test_boxes_of_the_truths_own_file_are_matched_by_their_ids(
    tmp_path: Path, masks: list[np.ndarray]
) -> None:
    """As `--boxes instances.json` leaves them: box_id is the annotation's id, there are no scores."""
    annotations = [
        {"image_id": 1 + k // 2, "category_id": 3, "mask": mask, "id": 100 + k}
        for k, mask in enumerate(masks)
    ]
    truth = write_truth(tmp_path / "truth.json", truth_images("a.jpg", "b.jpg"), annotations, NAMES)
    images = [
        MadeImage(image_id=str(n), masks=[masks[k], eroded(masks[k + 1])], boxes=[[0, 0, 80, 60]] * 2,
                  box_ids=[str(100 + k), str(101 + k)], categories=[(3, "cat")] * 2, uri=f"/p/{name}")
        for n, k, name in ((1, 0, "a.jpg"), (2, 2, "b.jpg"))
    ]  # fmt: skip
    out = make_output(tmp_path / "out", images)

    found = figures("--truth", truth, "--output", out)

    assert found["matched"]["images"] == "image_id is the truth's id"
    assert found["matched"]["objects"].startswith("by box_id")
    assert found["matched"]["score"] == "predicted_iou (the boxes have no detector_score)"
    expected = [1.0, eroded(masks[1]).sum() / masks[1].sum(), 1.0, eroded(masks[3]).sum() / masks[3].sum()]
    assert found["pairs"]["objects"] == 4
    assert found["pairs"]["mean_iou"] == pytest.approx(np.mean(expected))
    assert found["pairs"]["mean_boundary_iou"] < found["pairs"]["mean_iou"]
    for size, low, high in (("small", 0, 32**2), ("medium", 32**2, 96**2), ("large", 96**2, 1e9)):
        mine = [iou for iou, mask in zip(expected, masks, strict=True) if low <= mask.sum() < high]
        assert found["pairs"]["by_size"][size]["objects"] == len(mine)
        assert found["pairs"]["by_size"][size]["mean_iou"] == (pytest.approx(np.mean(mine)) if mine else None)
    [cat] = [one for one in found["categories"] if one["name"] == "cat"]
    assert (cat["objects"], cat["mean_iou"]) == (4, found["pairs"]["mean_iou"])
    assert json.loads((tmp_path / "out" / "report" / "evaluation.json").read_text()) == found


def test_a_detectors_boxes_are_matched_by_place_file_name_and_class_name(
    tmp_path: Path, masks: list[np.ndarray]
) -> None:
    annotations = [
        {"image_id": 1, "category_id": 3, "mask": masks[0]},
        {"image_id": 1, "category_id": 8, "mask": masks[1]},
        {"image_id": 2, "category_id": 8, "mask": masks[2]},
        {"image_id": 3, "category_id": 8, "mask": masks[3]},
    ]
    truth = write_truth(
        tmp_path / "truth.json", truth_images("val/a.jpg", "val/b.jpg", "val/c.jpg"), annotations, NAMES
    )
    images = [
        MadeImage(
            image_id="x/a.jpg", masks=masks[:2], categories=[(1, "cat"), (2, "dog")], scores=[0.9, 0.8]
        ),
        MadeImage(
            image_id="x/b.jpg", error="not_found", masks=[masks[2]], categories=[(2, "dog")], scores=[0.5]
        ),
        MadeImage(image_id="x/other.jpg", masks=[masks[0]], categories=[(1, "cat")], scores=[0.5]),
    ]
    out = make_output(tmp_path / "out", images)

    found = figures("--truth", truth, "--output", out)

    assert found["matched"]["images"] == "the image's file is named as in the truth"
    assert found["matched"]["classes"] == "by category_name"
    assert found["matched"]["objects"].startswith("by their boxes")
    assert found["matched"]["score"] == "detector_score x predicted_iou"
    assert found["images"] == 2
    assert found["left_out"] == {"images of the truth that the job does not have": 1}
    by_name = {one["name"]: one for one in found["categories"]}
    assert by_name["cat"]["mask_ap"] == pytest.approx(1)
    assert by_name["dog"]["mask_ap"] == pytest.approx(0.5, abs=0.01), "the failed image counts as missed"
    assert found["mask_ap"]["ap"] == pytest.approx((1 + by_name["dog"]["mask_ap"]) / 2)


def test_the_score_decides_the_order_and_only_the_one_asked_for(
    tmp_path: Path, masks: list[np.ndarray]
) -> None:
    truth = write_truth(
        tmp_path / "truth.json",
        truth_images("a.jpg"),
        [{"image_id": 1, "category_id": 3, "mask": masks[0]}],
        NAMES,
    )
    image = MadeImage(
        image_id="a.jpg", masks=[masks[0], masks[1]], categories=[(3, None)] * 2,
        scores=[0.4, 0.9], predicted_iou=[0.9, 0.2],
    )  # fmt: skip
    out = make_output(tmp_path / "out", [image])

    def ap(score: str) -> float:
        return figures("--truth", truth, "--output", out, "--score", score)["mask_ap"]["ap"]

    assert ap("predicted-iou") == ap("product") == pytest.approx(1)
    assert ap("detector") == pytest.approx(0.5)


def test_only_the_chosen_rows_are_judged(tmp_path: Path, masks: list[np.ndarray]) -> None:
    truth = write_truth(
        tmp_path / "truth.json",
        truth_images("a.jpg"),
        [{"image_id": 1, "category_id": 3, "mask": masks[0]}],
        NAMES,
    )
    image = MadeImage(image_id="a.jpg", masks=masks[:3], categories=[(3, None)] * 3, scores=[0.1, 0.5, 0.9])
    out = make_output(tmp_path / "out", [image])

    assert figures("--truth", truth, "--output", out, "--where", "detector_score < 0.2")["prompts"] == 1
    assert figures("--truth", truth, "--output", out)["prompts"] == 3


def test_boxes_without_classes_are_judged_as_one_class_and_it_is_said(
    tmp_path: Path, masks: list[np.ndarray]
) -> None:
    annotations = [{"image_id": 1, "category_id": number, "mask": masks[k]} for k, number in enumerate(NAMES)]
    truth = write_truth(tmp_path / "truth.json", truth_images("a.jpg"), annotations, NAMES)
    out = make_output(tmp_path / "out", [MadeImage(image_id="a.jpg", masks=masks[:2])])

    code, text, err = run("evaluate", "--truth", truth, "--output", out)

    assert code == 0, err
    assert "do not count: the boxes have none" in text
    assert "100.0" in text


@pytest.mark.parametrize(
    ("image", "arguments", "said"),
    [
        ({"image_id": "z.jpg"}, (), "no image of the truth is in the tables"),
        ({"size_hw": (80, 60)}, (), "of another size there"),
        ({"categories": [(1, "bird")]}, (), "To let classes not count: --class-agnostic"),
        ({}, ("--score", "detector"), "have no detector_score"),
        ({}, ("--score", "best"), "wanted one of product, detector"),
        ({}, ("--where", "no_such_column > 1"), "wanted an SQL condition over a row's columns"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_way_out(
    tmp_path: Path, image: dict, arguments: tuple[str, ...], said: str
) -> None:
    size = image.get("size_hw", SIZE)
    truth = write_truth(
        tmp_path / "truth.json",
        truth_images("a.jpg"),
        [{"image_id": 1, "category_id": 3, "mask": blob(0, SIZE)}],
        NAMES,
    )
    made = MadeImage(**{"image_id": "a.jpg", "masks": [blob(1, size)], "categories": [(3, "cat")]} | image)
    out = make_output(tmp_path / "out", [made])

    code, _, err = run("evaluate", "--truth", truth, "--output", out, *arguments)

    assert code == 2
    assert said in err


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make_output(tmp_path / "out", [MadeImage(image_id="a.jpg", masks=[blob(0)])])
    found = builtins.__import__

    def without(name, *rest):
        if name.startswith("faster_coco_eval"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.delitem(sys.modules, "faster_coco_eval", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)

    code, _, err = run("evaluate", "--truth", "none.json", "--output", out)

    assert code == 2
    assert "pip install 'hqlabel[eval]'" in err
