"""hqlabel evaluate: how tables and truth find each other, and what is said of it."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hqlabel.jobs.evaluate import evaluate
from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.storage.output_store import Store
from tests.jobs.cli.test_cli import run
from tests.jobs.made_outputs import (
    MadeImage,
    blob,
    lengths_of,
    make_output,
    rle_of,
    tight_box,
    write_truth,
)

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
    assert found["left_out"] == {
        "images of the truth that the job does not have": 1,
        "images of the job that the truth does not have": 1,
    }
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


# ---------------------------------------------------------------------------------------------
# Numbers that may be 0
# ---------------------------------------------------------------------------------------------


def truth_text(annotations: list[dict], categories: str, images: str | None = None) -> str:
    """A truth of images 0 and up, a.jpg and on, as text; annotation ids count from 0 unless given."""
    names = "abcdefgh"
    listed = images or ", ".join(
        f'{{"id": {n}, "file_name": "{name}.jpg", "height": 60, "width": 80}}' for n, name in enumerate(names)
    )
    full = [{"id": number, "iscrowd": 0, **one} for number, one in enumerate(annotations)]
    return f'{{"annotations": {json.dumps(full)}, "images": [{listed}], "categories": [{categories}]}}'


def polygon_of(seed: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    centre, reach = rng.uniform([15, 15], [65, 45]), rng.uniform(8, 25)
    return [(centre + reach * np.stack([np.cos(angles), np.sin(angles)], 1)).round(1).ravel().tolist()]


def drawn(polygons: list[list[float]]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *SIZE)))


def annotations_of(seed: int, kinds: list[int]) -> tuple[list[dict], list[list[tuple[np.ndarray, int]]]]:
    """Polygons, runs and crowds on four images, and masks near them with their category."""
    rng = np.random.default_rng(seed)
    annotations, found = [], []
    for image in range(4):
        mine = []
        for _ in range(4):
            polygons, kind = polygon_of(int(rng.integers(10**6))), int(rng.choice(kinds))
            mask = drawn(polygons)
            form = rng.integers(3)
            segmentation = polygons if form == 0 else rle_of(mask)
            if form == 2:
                segmentation = {"size": list(SIZE), "counts": lengths_of(mask)}
            annotations.append(
                {"image_id": image, "category_id": kind, "segmentation": segmentation,
                 "iscrowd": int(rng.random() < 0.2), "area": int(mask.sum() * rng.choice([0, 1, 40])),
                 "bbox": coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask))).tolist()}
            )  # fmt: skip
            mine += [(np.roll(mask, int(rng.integers(0, 3)), 1), kind)] if rng.random() < 0.8 else []
        found.append([*mine, (blob(int(rng.integers(10**6)), SIZE), int(rng.choice(kinds)))])
    return annotations, found


def pycocotools_on_the_file(path: Path, results: list[dict]) -> list[float]:
    """The twelve figures of pycocotools, which reads the file and the masks by itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        for annotation in truth.dataset["annotations"]:
            annotation["id"] += 1  # it takes an object whose id is 0 for one that nothing was matched with
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_pycocotools_own_on_the_same_file_with_ids_of_0_and_crowds(
    tmp_path: Path, seed: int
) -> None:
    names = {0: "cat", 1: "dog", 7: "cow"}
    annotations, found = annotations_of(seed, list(names))
    categories = ", ".join(f'{{"id": {number}, "name": "{name}"}}' for number, name in names.items())
    path = tmp_path / "truth.json"
    path.write_text(truth_text(annotations, categories))
    scores = np.random.default_rng(seed).permutation(100) / 100
    scores[0] = 0
    images, results, place = [], [], 0
    for number, mine in enumerate(found):
        images.append(
            MadeImage(
                image_id=f"{'abcd'[number]}.jpg", masks=[*(mask for mask, _ in mine), blob(number, SIZE)],
                categories=[*((kind + 20, names[kind]) for _, kind in mine), (99, "another class")],
                scores=[*scores[place : place + len(mine)].tolist(), 0.99],
            )
        )  # fmt: skip
        for mask, kind in mine:
            score = float(np.float32(scores[place]))
            results.append(
                {"image_id": number, "category_id": kind, "segmentation": rle_of(mask), "score": score}
            )
            place += 1
    out = make_output(tmp_path / "out", images)

    ours = figures("--truth", str(path), "--output", out, "--score", "detector")

    assert ours["images"] == 4
    assert ours["left_out"]["masks of classes that the truth does not have"] == 4
    oracle = pycocotools_on_the_file(path, results)
    by_size = ours["mask_ap"]["by_size"]
    mine = [ours["mask_ap"][name] for name in ("ap", "ap50", "ap75")]
    mine += [-1 if by_size[size] is None else by_size[size] for size in ("small", "medium", "large")]
    assert mine == pytest.approx(oracle[:6], abs=1e-6)
    assert ours["mask_ap"]["ar"] == pytest.approx(oracle[8], abs=1e-6)
    assert 0.05 < mine[0] < 0.95, "a case that tells something"


def test_a_class_that_the_truth_does_not_have_is_not_taken_for_category_0(tmp_path: Path) -> None:
    good = [polygon_of(seed) for seed in (1, 2)]
    annotations = [{"image_id": 0, "category_id": 0, "segmentation": one} for one in good]
    path = tmp_path / "truth.json"
    path.write_text(truth_text(annotations, '{"id": 0, "name": "cat"}'))
    others = [blob(seed, SIZE) for seed in range(10)]
    masks = [*map(drawn, good), *others]
    out = make_output(
        tmp_path / "out",
        [
            MadeImage(
                image_id="a.jpg", masks=masks, scores=[0.5] * 2 + [0.9] * 10,
                categories=[(0, "cat")] * 2 + [(1, "bird")] * 10,
            )
        ],
    )  # fmt: skip

    by_name = figures("--truth", str(path), "--output", out)

    assert by_name["mask_ap"]["ap"] == pytest.approx(1)
    assert by_name["left_out"]["masks of classes that the truth does not have"] == 10


@pytest.mark.parametrize(
    ("ours", "theirs", "is_said"),
    [((0, 1), (1, 2), True), ((0, 1), (0, 1), False), ((1, 2), (1, 2), False), ((0, 5), (5, 7), False)],
)
def test_ids_that_count_from_0_here_and_from_1_there_are_said(
    ours: tuple[int, int], theirs: tuple[int, int], is_said: bool, tmp_path: Path
) -> None:
    """As YOLO's boxes without a classes.txt have them, and COCO's."""
    path = tmp_path / "truth.json"
    ids = ", ".join(f'{{"id": {number}, "name": "c{number}"}}' for number in theirs)
    path.write_text(
        truth_text([{"image_id": 0, "category_id": theirs[0], "segmentation": polygon_of(1)}], ids)
    )
    image = MadeImage(image_id="a.jpg", masks=[blob(1, SIZE)] * 2, categories=[(one, None) for one in ours])
    out = make_output(tmp_path / "out", [image])

    words = figures("--truth", str(path), "--output", out)["matched"]["classes"]

    assert words.startswith("by category_id")
    assert ("from 0, the truth from 1" in words) == is_said


def test_names_of_another_program_are_shown_as_they_are_with_what_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "truth.json"
    image = '{"id": 0, "file_name": "%s", "height": 60, "width": 80}'
    out = make_output(tmp_path / "out", [MadeImage(image_id="a.jpg", masks=[blob(1, SIZE)])])

    path.write_text(truth_text([], '{"id": 0, "name": "cat"}', image % "a_jpg.rf.0123.jpg"))
    code, _, err = run("evaluate", "--truth", str(path), "--output", out)
    assert code == 2
    assert "theirs id '0', file_name 'a_jpg.rf.0123.jpg'; ours image_id 'a.jpg'" in err
    assert "Wanted: the image_id as id or file_name there, or the same name of the file" in err

    path.write_text(truth_text([], '{"id": 0, "name": "cat"}', image % r"C:\\data\\a.jpg"))
    _, _, err = run("evaluate", "--truth", str(path), "--output", out)
    assert r"file_name 'C:\data\a.jpg'; ours" in err
    assert "backslashes" in err


def test_category_0_of_boxes_without_names_is_category_0_of_the_truth(tmp_path: Path) -> None:
    good = polygon_of(1)
    path = tmp_path / "truth.json"
    path.write_text(
        truth_text([{"image_id": 0, "category_id": 0, "segmentation": good}], '{"id": 0}, {"id": 1}')
    )
    image = MadeImage(
        image_id="a.jpg", masks=[drawn(good), blob(1, SIZE), blob(2, SIZE)], scores=[0.1, 0.9, 0.8],
        categories=[(0, None), (1, None), (5, None)],
    )  # fmt: skip
    out = make_output(tmp_path / "out", [image])

    found = figures("--truth", str(path), "--output", out)

    assert found["matched"]["classes"] == "by category_id"
    assert found["mask_ap"]["ap"] == pytest.approx(1)
    assert found["left_out"]["masks of classes that the truth does not have"] == 1
    assert [(one["id"], one["name"], one["objects"]) for one in found["categories"]] == [(0, "0", 1)]


# ---------------------------------------------------------------------------------------------
# Truth of other programs
# ---------------------------------------------------------------------------------------------


def test_what_would_stop_the_figures_is_refused_before_any_is_worked_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_, **__):
        raise AssertionError("nothing is to be worked out")

    monkeypatch.setattr(evaluate, "average_precision", never)
    monkeypatch.setattr(evaluate, "pair_up", never)
    path = tmp_path / "truth.json"
    path.write_text(
        truth_text([{"image_id": 0, "category_id": 77, "segmentation": polygon_of(1)}], '{"id": 0}')
    )  # fmt: skip
    out = make_output(tmp_path / "out", [MadeImage(image_id="a.jpg", masks=[blob(1, SIZE)])])

    code, _, err = run("evaluate", "--truth", str(path), "--output", out)

    assert code == 4
    assert "1 of a category that the file does not list (annotation 0: category 77)" in err


def test_what_was_read_by_a_rule_is_said_with_how_often(tmp_path: Path) -> None:
    flat = polygon_of(1)[0]
    path = tmp_path / "truth.json"
    path.write_text(
        truth_text([{"image_id": 0, "category_id": 0, "segmentation": flat}], '{"id": 0, "name": "cat"}')
    )
    out = make_output(tmp_path / "out", [MadeImage(image_id="a.jpg", masks=[drawn([flat])])])

    code, text, err = run("evaluate", "--truth", str(path), "--output", out)

    assert code == 0, err
    assert "1 annotations with one flat polygon, read as one part" in text
    rules = json.loads((tmp_path / "out" / "report" / "evaluation.json").read_text())["truth_rules"]
    assert rules["annotations with one flat polygon, read as one part"] == 1


def test_a_category_of_the_same_name_without_objects_as_roboflow_writes_it_is_not_in_the_way(
    tmp_path: Path,
) -> None:
    good = polygon_of(1)
    path = tmp_path / "truth.json"
    path.write_text(
        truth_text(
            [{"image_id": 0, "category_id": 1, "segmentation": good}],
            '{"id": 0, "name": "cats", "supercategory": "none"}, '
            '{"id": 1, "name": "cats", "supercategory": "cats"}',
        )
    )  # fmt: skip
    out = make_output(
        tmp_path / "out", [MadeImage(image_id="a.jpg", masks=[drawn(good)], categories=[(0, "cats")])]
    )

    found = figures("--truth", str(path), "--output", out)

    assert found["matched"]["classes"] == "by category_name"
    assert found["mask_ap"]["ap"] == pytest.approx(1)


TWO_CATS = '{"id": 0, "name": "cat"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}'


@pytest.mark.parametrize(
    ("ours", "code"),
    [
        ([(0, "cat"), (1, "cat")], 0),
        ([(0, "cat"), (99, "bird")], 0),
        ([(1, "cat"), (5, "cat")], 2),
        ([(1, "cat"), (0, "dog")], 2),
        ([(None, "cat"), (None, "cat")], 2),
    ],
)
def test_two_categories_of_one_name_are_told_apart_by_id_or_refused(
    tmp_path: Path, ours: list[tuple[int | None, str]], code: int
) -> None:
    polygons = [polygon_of(1), polygon_of(2)]
    annotations = [
        {"image_id": 0, "category_id": number, "segmentation": one} for number, one in enumerate(polygons)
    ]
    path = tmp_path / "truth.json"
    path.write_text(truth_text(annotations, TWO_CATS))
    masks = [drawn(one) for one in polygons]
    out = make_output(tmp_path / "out", [MadeImage(image_id="a.jpg", masks=masks, categories=ours)])

    found, text, err = run("evaluate", "--truth", str(path), "--output", out)

    assert found == code, err
    assert "2 categories of the truth are called 'cat' (0, 1)" in (err if code else text)
    assert code == 0 or "--class-agnostic" in err


def test_a_class_in_another_spelling_is_left_out_and_named(tmp_path: Path) -> None:
    good = polygon_of(1)
    path = tmp_path / "truth.json"
    annotations = [{"image_id": 0, "category_id": 0, "segmentation": good}]
    path.write_text(truth_text(annotations, '{"id": 0, "name": "Traffic Light"}, {"id": 1, "name": "cat"}'))
    masks = [drawn(good), blob(3, SIZE)]

    def said(*names: str) -> tuple[int, str]:
        image = MadeImage(image_id="a.jpg", masks=masks, categories=list(enumerate(names)))
        out = make_output(tmp_path / "-".join(names), [image])
        code, text, err = run("evaluate", "--truth", str(path), "--output", out)
        return code, text + err

    hint = "'traffic_light' is not in the truth, which has 'Traffic Light'"
    assert said("traffic_light", "cat")[0] == 0
    assert hint in said("traffic_light", "cat ")[1]
    assert said("traffic_light", "dog")[0] == 2
    assert "is not in the truth" not in said("Traffic Light", "dog")[1]


def test_without_categories_classes_may_still_not_count(tmp_path: Path) -> None:
    good = polygon_of(1)
    image = '{"id": 0, "file_name": "a.jpg", "height": 60, "width": 80}'
    path = tmp_path / "truth.json"
    path.write_text(
        f'{{"images": [{image}], "annotations": [{{"id": 0, "image_id": 0, "segmentation": {good}}}]}}'
    )
    out = make_output(
        tmp_path / "out", [MadeImage(image_id="a.jpg", masks=[drawn(good)], categories=[(3, "cat")])]
    )

    assert run("evaluate", "--truth", str(path), "--output", out)[0] == 4
    found = figures("--truth", str(path), "--output", out, "--class-agnostic")

    assert found["mask_ap"]["ap"] == found["pairs"]["mean_iou"] == pytest.approx(1)


def test_images_whose_size_the_truth_does_not_say_are_empty_ones_of_ours(tmp_path: Path) -> None:
    """A false find on such an image counts: 0 by 0 is how Datumaro writes a picture that it did not open."""
    good = polygon_of(1)
    images = (
        '{"id": 0, "file_name": "a.jpg", "height": 60, "width": 80}, '
        '{"id": 1, "file_name": "b.jpg", "height": 0, "width": 0}, {"id": 2, "file_name": "c.jpg"}'
    )
    path = tmp_path / "truth.json"
    annotations = [{"image_id": 0, "category_id": 0, "segmentation": good}]
    path.write_text(truth_text(annotations, '{"id": 0, "name": "cat"}', images))
    kinds = [(0, "cat")]
    out = make_output(
        tmp_path / "out",
        [
            MadeImage(image_id="a.jpg", masks=[drawn(good)], categories=kinds, scores=[0.5]),
            MadeImage(image_id="b.jpg", masks=[blob(1, SIZE)], categories=kinds, scores=[0.9]),
            MadeImage(image_id="c.jpg", masks=[blob(1)], categories=kinds, scores=[0.9], error="corrupt"),
        ],
    )  # fmt: skip

    found = figures("--truth", str(path), "--output", out)

    assert found["images"] == 3
    assert "left_out" not in found or not found["left_out"]
    assert found["mask_ap"]["ap"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("A.JPG", "a.jpg", "They differ in upper and lower case"),
        (r"photos\\a.jpg", "photos/a.jpg", "They differ in backslashes (Windows)"),
        (r"images\\1\\a.jpg", "val/a.jpg", "They differ in backslashes (Windows) and the folder"),
        ("a%20b.jpg", "a b.jpg", "They differ in percent-encoding (%20)"),
    ],
)
def test_image_names_in_another_spelling_get_the_hint_of_planning(
    tmp_path: Path, theirs: str, ours: str, said: str
) -> None:
    image = f'{{"id": "x", "file_name": "{theirs}", "height": 60, "width": 80}}'
    path = tmp_path / "truth.json"
    path.write_text(truth_text([], '{"id": 0, "name": "cat"}', image))
    found = '{"id": "y", "file_name": "here.jpg", "height": 60, "width": 80}'
    both = tmp_path / "both.json"
    both.write_text(truth_text([], '{"id": 0, "name": "cat"}', f"{image}, {found}"))
    masks = [blob(1, SIZE)]
    images = [MadeImage(image_id=name, masks=masks) for name in (ours, "here.jpg")]
    out = make_output(tmp_path / "out", images)

    code, _, err = run("evaluate", "--truth", str(path), "--output", out)
    some, text, _ = run("evaluate", "--truth", str(both), "--output", out)

    assert (code, some) == (2, 0)
    assert "no image of the truth is in the tables" in err
    assert said in err
    assert said in text, "where some images are found, too"


def test_file_names_that_two_images_have_are_said_to_tell_nothing(tmp_path: Path) -> None:
    image = '{"id": "ID", "file_name": "a.jpg", "height": 60, "width": 80}'
    path = tmp_path / "truth.json"
    both = ", ".join(image.replace("ID", number) for number in "12")
    path.write_text(truth_text([], '{"id": 0, "name": "cat"}', both))
    out = make_output(tmp_path / "out", [MadeImage(image_id="a.jpg", masks=[blob(1, SIZE)])])

    code, _, err = run("evaluate", "--truth", str(path), "--output", out)

    assert code == 2
    assert "Two images of the truth have one file_name" in err


@pytest.mark.parametrize("file_name", ["a.jpg", r"\ud800"])
def test_a_name_that_is_no_unicode_is_no_reason_to_break(tmp_path: Path, file_name: str) -> None:
    image = f'{{"id": "x", "file_name": "{file_name}", "height": 60, "width": 80}}'
    path = tmp_path / "truth.json"
    annotations = [{"image_id": "x", "category_id": 0, "segmentation": polygon_of(1)}]
    category = r'{"id": 0, "name": "\ud800\u001b[31m"}, {"id": 1, "name": "c"}'
    path.write_text(truth_text(annotations, category, image))
    made = MadeImage(image_id="a.jpg", masks=[blob(1, SIZE)], categories=[(1, "c")])
    out = make_output(tmp_path / "out", [made])

    code, text, err = run("evaluate", "--truth", str(path), "--output", out, "--json")

    if file_name == "a.jpg":
        assert code == 0, err
        assert [one["name"] for one in json.loads(text)["categories"]] == ["\ud800\x1b[31m"]
    else:
        assert code == 2
        assert "no image of the truth is in the tables" in err


@pytest.mark.parametrize("file_boxes", [True, False])
def test_boxes_of_crowds_are_passed_over(tmp_path: Path, file_boxes: bool) -> None:
    """They are no prompts without mask, and the truth's crowd is no missed object."""
    things = [polygon_of(1), polygon_of(2)]
    annotations = [
        {"image_id": 0, "category_id": 0, "segmentation": one, "iscrowd": number}
        for number, one in enumerate(things)
    ]
    path = tmp_path / "truth.json"
    path.write_text(truth_text(annotations, '{"id": 0, "name": "cat"}'))
    masks = [drawn(one) for one in things]
    image = MadeImage(
        image_id="a.jpg", masks=masks, categories=[(0, "cat")] * 2,
        boxes=[tight_box(masks[0]), [500, 500, 600, 600]],
        box_ids=["0", "1"] if file_boxes else None,
    )  # fmt: skip
    out = make_output(tmp_path / "out", [image])
    rewrite_reasons(tmp_path / "out", "box_outside", "crowd")

    found = figures("--truth", str(path), "--output", out)

    assert found["matched"]["objects"].startswith("by box_id" if file_boxes else "by their boxes")
    assert (found["objects"], found["prompts"], found["masks"]) == (1, 1, 1)
    assert found["pairs"]["without_mask"] == 0
    assert found["left_out"] == {
        "images of the truth that the job does not have": 7,
        "boxes of crowds, which are regions to pass over and got no mask": 1,
        "objects that the truth marks as crowds (iscrowd 1), which are regions to pass over": 1,
    }
    assert found["mask_ap"]["ap"] == found["pairs"]["mean_iou"] == pytest.approx(1)


def rewrite_reasons(out: Path, old: str, new: str) -> None:
    """Published tables as a job leaves them whose box file marks crowds."""
    changed = 0
    for path in (out / "instances").glob("*.parquet"):
        table = pq.read_table(path)
        at = table.schema.get_field_index("reject_reason")
        is_old = pc.fill_null(pc.equal(table["reject_reason"], old), False)
        reasons = pc.if_else(is_old, new, table["reject_reason"])
        pq.write_table(table.set_column(at, table.schema.field(at), reasons), path)
        changed += pc.sum(is_old).as_py()
    assert changed
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    for part in manifest["parts"]:
        file = out / part["instances"]["key"]
        part["instances"] |= {"bytes": file.stat().st_size, "seal": ""}
    path.write_text(json.dumps(manifest))


def test_figures_are_printed_even_when_they_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "truth.json"
    annotations = [{"image_id": 0, "category_id": 0, "segmentation": polygon_of(1)}]
    path.write_text(truth_text(annotations, '{"id": 0, "name": "cat"}'))
    out = make_output(tmp_path / "out", [MadeImage(image_id="a.jpg", masks=[blob(1, SIZE)])])

    def full(self, key, data):
        raise SystemicFault("disk", "no space")

    monkeypatch.setattr(Store, "put", full)
    code, text, _ = run("evaluate", "--truth", str(path), "--output", out)

    assert code == 5
    assert "mask AP" in text


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
