"""Masks against truth: the arithmetic, with pycocotools and plain numpy as judges."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hqlabel.jobs.evaluate.average_precision import (
    EvaluatedImage,
    FoundMask,
    average_precision,
    boundary_of,
    choose_match,
    pair_up,
)
from hqlabel.jobs.evaluate.ground_truth import TruthObject
from tests.jobs.made_outputs import blob, rle_of, tight_box

SIZE = (120, 160)
CATEGORIES = (1, 5, 90)


def shifted(mask: np.ndarray, by: int) -> np.ndarray:
    return np.roll(mask, by, axis=1)


def as_object(mask: np.ndarray, number: int, **fields) -> TruthObject:
    x1, y1, x2, y2 = tight_box(mask)
    values = {
        "annotation_id": str(number), "image_id": "i", "category_id": 1,
        "bbox_xywh": (x1, y1, x2 - x1, y2 - y1),
        "area": float(mask.sum()), "is_crowd": False, "counts": rle_of(mask)["counts"],
    }  # fmt: skip
    return TruthObject(**(values | fields))


def as_found(mask: np.ndarray | None, **fields) -> FoundMask:
    box = None if mask is None else tight_box(mask)
    values = {
        "box_id": None, "category_id": 1, "score": 0.5,
        "box_xywh": None if box is None else (box[0], box[1], box[2] - box[0], box[3] - box[1]),
        "counts": None if mask is None else rle_of(mask)["counts"],
    }  # fmt: skip
    return FoundMask(**(values | fields))


def random_images(seed: int, count: int = 12) -> list[EvaluatedImage]:
    """Images of many objects with crowds, misses, doubles, false finds and classes the truth has not."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        truth = [blob(1000 * seed + 10 * number + k, SIZE) for k in range(int(rng.integers(0, 5)))]
        kinds = [int(rng.choice(CATEGORIES)) for _ in truth]
        crowd = [bool(rng.random() < 0.15) for _ in truth]
        scales = rng.choice([0.02, 0.3, 4.0], len(truth))  # so that all three sizes occur
        objects = tuple(
            as_object(mask, k, category_id=kind, is_crowd=c, area=float(mask.sum() * scale))
            for k, (mask, kind, c, scale) in enumerate(zip(truth, kinds, crowd, scales, strict=True))
        )
        found = [
            (shifted(mask, int(rng.integers(0, 4))), kind) for mask, kind in zip(truth, kinds, strict=True)
        ]
        found += [(blob(int(rng.integers(10**6)), SIZE), int(rng.choice([*CATEGORIES, 7]))) for _ in range(3)]
        masks = tuple(as_found(m, category_id=kind, score=float(rng.random())) for m, kind in found)
        masks += (as_found(None, score=0.9),)
        images.append(EvaluatedImage(size_hw=SIZE, objects=objects, masks=masks))
    return images


class BoundaryJudge(COCOeval):
    """pycocotools with IoU as boundary AP defines it, and boundaries by plain erosion."""

    def computeIoU(self, imgId, catId):
        gt, dt = self._gts[imgId, catId], self._dts[imgId, catId]
        if not gt or not dt:
            return []
        dt = [dt[i] for i in np.argsort([-d["score"] for d in dt], kind="mergesort")][
            : self.params.maxDets[-1]
        ]
        crowd = [int(g["iscrowd"]) for g in gt]
        whole = coco_mask.iou([d["segmentation"] for d in dt], [g["segmentation"] for g in gt], crowd)
        edges = coco_mask.iou(
            [plain_boundary(d["segmentation"]) for d in dt],
            [plain_boundary(g["segmentation"]) for g in gt],
            crowd,
        )
        return np.where(np.array(crowd, bool)[None, :], whole, np.minimum(whole, edges))


def plain_boundary(rle: dict) -> dict:
    mask = coco_mask.decode(rle)
    width = max(1, round(0.02 * float(np.hypot(*mask.shape))))
    inner = np.pad(mask, 1)
    for _ in range(width):
        padded = np.pad(inner, 1)
        inner = np.min(
            [padded[y : y + inner.shape[0], x : x + inner.shape[1]] for y in range(3) for x in range(3)],
            axis=0,
        )
    return coco_mask.encode(np.asfortranarray(mask - inner[1:-1, 1:-1]))


def pycocotools_says(images: list[EvaluatedImage], judge: type[COCOeval]) -> COCOeval:
    sizes = [{"id": n, "height": SIZE[0], "width": SIZE[1]} for n in range(1, len(images) + 1)]
    categories = [{"id": number} for number in CATEGORIES]
    truth, found = COCO(), COCO()
    truth.dataset = {"images": sizes, "categories": categories, "annotations": []}
    found.dataset = {"images": sizes, "categories": categories, "annotations": []}
    for number, image in enumerate(images, start=1):
        for one in image.objects:
            rle = {"size": list(SIZE), "counts": one.counts.encode()}
            truth.dataset["annotations"].append(
                {"image_id": number, "category_id": one.category_id, "segmentation": rle, "area": one.area,
                 "iscrowd": int(one.is_crowd), "bbox": list(one.bbox_xywh)}
            )  # fmt: skip
        for one in image.masks:
            if one.counts is not None:
                rle = {"size": list(SIZE), "counts": one.counts.encode()}
                found.dataset["annotations"].append(
                    {"image_id": number, "category_id": one.category_id, "segmentation": rle,
                     "area": int(coco_mask.area(rle)), "score": one.score, "iscrowd": 0}
                )  # fmt: skip
    for coco in (truth, found):
        for number, annotation in enumerate(coco.dataset["annotations"], start=1):
            annotation["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        result = judge(truth, found, "segm")
        result.evaluate()
        result.accumulate()
        result.summarize()
    return result


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("boundary", "judge"), [(False, COCOeval), (True, BoundaryJudge)])
def test_average_precision_is_that_of_pycocotools(seed: int, boundary: bool, judge: type[COCOeval]) -> None:
    images = random_images(seed)
    oracle = pycocotools_says(images, judge)

    ours = average_precision(images, CATEGORIES, boundary=boundary)

    figures = [ours.ap, ours.ap50, ours.ap75, *(ours.by_size[s] for s in ("small", "medium", "large"))]
    assert [-1 if f is None else f for f in figures] == pytest.approx(oracle.stats[:6].tolist(), abs=1e-6)
    assert ours.ar == pytest.approx(oracle.stats[8], abs=1e-6)
    assert 0.03 < ours.ap < 0.95, "a case that tells something"
    for place, number in enumerate(CATEGORIES):
        precision = oracle.eval["precision"][:, :, place, 0, 2]
        expected = precision[precision > -1].mean() if (precision > -1).any() else None
        assert ours.by_category[number] == pytest.approx(expected, abs=1e-6)


def test_the_truth_against_itself_is_1_and_nothing_is_found_without_masks() -> None:
    masks = [blob(k, SIZE) for k in range(3)]
    objects = tuple(as_object(mask, k) for k, mask in enumerate(masks))
    perfect = EvaluatedImage(size_hw=SIZE, objects=objects, masks=tuple(as_found(mask) for mask in masks))
    missed = EvaluatedImage(size_hw=SIZE, objects=objects, masks=())

    for boundary in (False, True):
        assert average_precision([perfect], [1], boundary=boundary).ap == pytest.approx(1)
        assert average_precision([missed], [1], boundary=boundary).ap == 0
    assert average_precision([perfect], [1, 2], boundary=False).by_category[2] is None


@pytest.mark.parametrize("boundary", [False, True])
def test_categories_may_have_any_numbers_in_any_order(boundary: bool) -> None:
    """0 is a category, None is none, and no number goes to the library as it is."""
    rng = np.random.default_rng(1)
    renamed = dict(zip(CATEGORIES, (10**30, 0, -4), strict=True))
    images = random_images(1)
    others = [
        dataclasses.replace(
            image,
            objects=tuple(dataclasses.replace(o, category_id=renamed[o.category_id]) for o in image.objects),
            masks=tuple(dataclasses.replace(m, category_id=renamed.get(m.category_id)) for m in image.masks),
        )
        for image in images
    ]
    order = [renamed[number] for number in rng.permutation(CATEGORIES)]

    ours, expected = (
        average_precision(others, order, boundary=boundary),
        average_precision(images, CATEGORIES, boundary=boundary),
    )

    assert ours.ap == pytest.approx(expected.ap)
    assert {k: ours.by_category[renamed[k]] for k in CATEGORIES} == pytest.approx(expected.by_category)
    assert sum(len(pair_up(image, "box_iou")) for image in others) == sum(
        len(pair_up(image, "box_iou")) for image in images
    )


def test_objects_of_an_image_without_masks_are_missed_and_not_taken_apart() -> None:
    """One that was never opened may be of any size: its boundaries would take gigabytes."""
    size_hw = (20_000, 25_000)
    square = coco_mask.frPyObjects([[10, 10, 19_000, 10, 19_000, 19_000, 10, 19_000]], *size_hw)[0]
    objects = tuple(
        TruthObject(
            annotation_id=str(number), image_id="i", category_id=1, bbox_xywh=(10, 10, 18_990, 18_990),
            area=3.6e8, is_crowd=False, counts=square["counts"].decode(),
        )
        for number in range(20)
    )  # fmt: skip
    unopened = EvaluatedImage(size_hw=size_hw, objects=objects, masks=(as_found(None),))
    mask = blob(1, SIZE)
    found = EvaluatedImage(size_hw=SIZE, objects=(as_object(mask, 1),), masks=(as_found(mask),))
    began = time.perf_counter()

    ours = average_precision([unopened, found], [1], boundary=True)

    assert time.perf_counter() - began < 2
    assert ours.ar == pytest.approx(1 / 21)


def test_boxes_of_no_size_belong_to_nothing() -> None:
    mask = blob(1, SIZE)
    for box in ((0.0, 0.0, 0.0, 0.0), (5.0, 5.0, 0.0, 9.0), (0.0, 0.0, 1e308, 1e308)):
        image = EvaluatedImage(
            size_hw=SIZE, objects=(as_object(mask, 1, bbox_xywh=box),),
            masks=(as_found(mask, box_xywh=box),),
        )  # fmt: skip

        assert pair_up(image, "box_iou") == []


@pytest.mark.parametrize("boundary", [False, True])
def test_without_objects_or_categories_there_is_no_figure(boundary: bool) -> None:
    mask = blob(1, SIZE)
    image = EvaluatedImage(size_hw=SIZE, objects=(), masks=(as_found(mask),))

    assert average_precision([image], [1], boundary=boundary).ap is None
    assert average_precision([image], [], boundary=boundary).ap is None
    assert average_precision([], [1], boundary=boundary).ap is None


def test_of_each_image_and_class_only_so_many_of_the_best_scored_masks_count() -> None:
    masks = [blob(k, SIZE) for k in range(4)]
    found = [as_found(mask, score=0.9 - 0.1 * k) for k, mask in enumerate(masks)]  # the right one is last
    image = EvaluatedImage(size_hw=SIZE, objects=(as_object(masks[3], 1),), masks=tuple(found))

    assert average_precision([image], [1], boundary=False).ap == pytest.approx(1 / 4)
    assert average_precision([image], [1], boundary=False, max_per_image=3).ap == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size_hw", [(120, 160), (7, 9), (300, 41)])
def test_a_boundary_is_what_erosion_leaves(seed: int, size_hw: tuple[int, int]) -> None:
    rle = coco_mask.encode(np.asfortranarray(blob(seed, size_hw)))

    found = coco_mask.decode(boundary_of(rle))

    assert np.array_equal(found, coco_mask.decode(plain_boundary(rle)))


def test_prompts_go_to_the_objects_whose_ids_they_carry_wherever_their_boxes_lie() -> None:
    masks = [blob(k, SIZE) for k in range(3)]
    objects = tuple(as_object(mask, 10 + k) for k, mask in enumerate(masks))
    found = (as_found(masks[2], box_id="12"), as_found(masks[1], box_id="10"), as_found(None, box_id="11"))
    image = EvaluatedImage(size_hw=SIZE, objects=objects, masks=found)

    assert choose_match([image]) == "box_id"
    pairs = {pair.area: pair for pair in pair_up(image, "box_id")}

    assert pairs[objects[2].area].iou == 1
    intersection, union = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
    assert pairs[objects[0].area].iou == pytest.approx(intersection / union)
    assert pairs[objects[1].area].iou == 0
    assert not pairs[objects[1].area].has_mask


@pytest.mark.parametrize("box_ids", [(None, None), ("10", "99"), ("10", "10")])
def test_ids_of_something_else_are_not_taken_for_annotation_ids(
    box_ids: tuple[str | None, str | None],
) -> None:
    masks = [blob(k, SIZE) for k in range(2)]
    objects = tuple(as_object(mask, 10 + k) for k, mask in enumerate(masks))
    found = tuple(as_found(mask, box_id=box_id) for mask, box_id in zip(masks, box_ids, strict=True))

    image = EvaluatedImage(size_hw=SIZE, objects=objects, masks=found)

    assert choose_match([image]) == "box_iou"


def test_by_boxes_each_object_has_its_best_prompt_once_and_only_of_its_class() -> None:
    object_mask, other = np.zeros((2, *SIZE), np.uint8)
    object_mask[20:60, 20:60] = 1
    other[80:100, 100:140] = 1
    objects = (as_object(object_mask, 1), as_object(other, 2, category_id=5))
    near, nearer = shifted(object_mask, 6), shifted(object_mask, 2)
    found = (as_found(near, score=0.99), as_found(nearer), as_found(other, category_id=1))
    image = EvaluatedImage(size_hw=SIZE, objects=objects, masks=found)

    [pair] = pair_up(image, "box_iou")

    assert pair.iou == pytest.approx((object_mask & nearer).sum() / (object_mask | nearer).sum())


def test_a_crowd_is_no_object_of_mean_iou() -> None:
    mask = blob(1, SIZE)
    image = EvaluatedImage(
        size_hw=SIZE, objects=(as_object(mask, 1, is_crowd=True),), masks=(as_found(mask),)
    )

    assert pair_up(image, "box_iou") == []
