"""What is measured on run-length strings equals what is measured on decoded masks; marks follow rules."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from hqlabel.model.records import Instances
from hqlabel.pipeline.schema import UNIT_INSTANCE
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.tables.mask_quality import FLAGS, mark, measure, order_flags
from tests.model.plain_masks import random_masks


def counts_of(mask: np.ndarray) -> str:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode("ascii")


def instances_of(*masks: np.ndarray, flags: tuple[str, ...] = ()) -> Instances:
    counts = tuple(counts_of(m) for m in masks)
    rles = [{"size": list(m.shape), "counts": c} for m, c in zip(masks, counts, strict=True)]
    areas = [int(coco_mask.area(rle)) for rle in rles]  # a list of 256 or more overflows in pycocotools
    return Instances(
        size_hw=masks[0].shape,
        counts=counts,
        area=np.asarray(areas, dtype=np.int64),
        bbox_xywh=np.asarray(coco_mask.toBbox(rles), dtype=np.float32).reshape(-1, 4),
        predicted_iou=np.full(len(masks), 0.9, np.float32),
        stability_score=np.full(len(masks), 0.9, np.float32),
        flags=flags,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(1, 17), st.integers(1, 17)), max_size=6))
def test_masks_of_different_sizes_are_read_together_as_alone(seed: int, sizes_hw: list[tuple[int, int]]):
    images = [instances_of(*random_masks(seed + n, 3, *size)) for n, size in enumerate(sizes_hw)]
    boxes = [np.array([[1, 2, 9, 7]] * 3, np.float32)] * len(images)
    together = measure(images, boxes)
    for place, image in enumerate(images):
        alone, part = measure([image], boxes[:1]), together.of(slice(3 * place, 3 * place + 3))
        for name, values in vars(alone).items():
            np.testing.assert_equal(getattr(part, name), values, err_msg=name)


def test_thirty_thousand_runs_take_well_under_a_tenth_of_a_second():
    mask = np.zeros((3000, 4000), bool)
    mask[::100, ::2] = True  # 60,000 single pixels
    mask[50::100, 1::2] = True
    mask[:, :500] = np.arange(500) % 2 == 0  # and long columns
    one = instances_of(mask)
    boxes = np.array([[10, 10, 3000, 2000]], np.float32)
    measure([one], [boxes])
    started = time.perf_counter()
    measure([one], [boxes])
    assert time.perf_counter() - started < 0.5  # 0.05 s here; slack for a busy machine


def test_a_long_snake_is_one_component():
    mask = np.zeros((401, 401), bool)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    assert measure([instances_of(mask, mask.T)], [np.array([[0, 0, 9, 9]] * 2)]).num_components.tolist() == [
        1,
        1,
    ]


def test_measures_of_a_known_mask():
    mask = np.zeros((20, 30), bool)
    mask[5:15, 10:20] = True
    quality = measure([instances_of(mask)], [np.array([[10, 5, 25, 15]], np.float32)])
    assert quality.box_iou[0] == pytest.approx(100 / 150)
    assert quality.mask_in_box[0] == 1.0
    assert quality.num_components[0] == 1
    assert not quality.touches_border[0]
    assert quality.flags == ((),)


@pytest.mark.parametrize("edge", [np.s_[0, 5], np.s_[19, 5], np.s_[5, 0], np.s_[5, 29]])
def test_a_pixel_at_the_edge_touches_the_border(edge):
    mask = np.zeros((20, 30), bool)
    mask[edge] = True
    assert measure([instances_of(mask)], [np.array([[0, 0, 30, 20]])]).touches_border.tolist() == [True]


def test_flags_name_what_is_odd():
    def drawn(*boxes):
        mask = np.zeros((40, 60), bool)
        for x1, y1, x2, y2 in boxes:
            mask[y1:y2, x1:x2] = True
        return mask

    cases = {
        "empty": (drawn(), [0, 0, 9, 9]),
        "tiny": (drawn((5, 5, 8, 8)), [0, 0, 30, 30]),
        "fills_box": (drawn((5, 5, 15, 15)), [5, 5, 15, 15]),
        "leaks_box": (drawn((5, 5, 15, 15)), [5, 5, 10, 40]),
        "fragmented": (drawn(*((x, 5, x + 4, 15) for x in range(0, 50, 8))), [0, 0, 60, 40]),
    }
    quality = measure(
        [instances_of(*(m for m, _ in cases.values()))], [np.array([b for _, b in cases.values()])]
    )
    assert quality.flags == tuple((name,) for name in cases)
    assert quality.box_iou[0] == 0
    assert np.isnan(quality.mask_in_box[0])
    assert set(cases) <= set(FLAGS)


def test_a_prompt_without_a_box_has_no_box_measures():
    quality = measure([instances_of(np.ones((4, 4), bool))], [np.array([[np.nan] * 4])])
    assert np.isnan(quality.box_iou[0])
    assert np.isnan(quality.mask_in_box[0])
    assert quality.flags == ((),)


def test_ten_thousand_masks_are_measured_in_steps():
    mask = np.zeros((8, 8), bool)
    mask[2:5, 2:5] = True
    many = instances_of(*[mask] * 1000, *[~mask] * 1000)
    quality = measure([many], [np.tile(np.array([[2, 2, 5, 5]], np.float32), (2000, 1))])
    assert quality.mask_in_box[[0, 999, 1000, 1999]].tolist() == [1, 1, 0, 0]
    assert len(quality.flags) == 2000


def test_no_masks_give_no_measures():
    none = Instances(
        size_hw=(4, 4), counts=(), area=np.zeros(0), bbox_xywh=np.zeros((0, 4)),
        predicted_iou=np.zeros(0), stability_score=np.zeros(0),
    )  # fmt: skip
    assert measure([none], [np.zeros((0, 4))]).flags == ()
    assert measure([], []).flags == ()


def test_flags_are_ordered_and_closed():
    assert order_flags(["reduced_call_shape", "empty", "empty"]) == ["empty", "reduced_call_shape"]
    with pytest.raises(ValueError, match="unknown qc flags"):
        order_flags(["odd"])


# ---------------------------------------------------------------------------------------------
# Marks
# ---------------------------------------------------------------------------------------------


def rows_of(*rows: dict) -> pa.Table:
    """Instance rows with good defaults; `mask` (x1, y1, x2, y2) draws one."""
    full = []
    for n, row in enumerate(rows):
        row = dict(row)
        mask = np.zeros((50, 50), np.uint8)
        x1, y1, x2, y2 = row.pop("mask", (0, 0, 10, 10))
        mask[y1:y2, x1:x2] = 1
        base = {
            "image_index": 0, "instance_index": n, "area": int(mask.sum()),
            "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": {"size": [50, 50], "counts": counts_of(mask)},
            "predicted_iou": 0.9, "stability_score": 0.9, "box_iou": 0.9, "detector_score": 0.5,
            "qc_flags": [], "category_id": 1,
        }  # fmt: skip
        full.append(base | row)
    schema = pa.schema([pa.field("image_index", pa.int64()), *UNIT_INSTANCE])
    return pa.Table.from_pylist(full, schema=schema)


def reasons(table: pa.Table, **wanted) -> list[str | None]:
    accepted, reason = mark(table, FilterSettings(**wanted))
    assert accepted == [r is None for r in reason]
    return reason


def test_without_filters_only_boxes_without_a_mask_are_rejected():
    none = {"segmentation": None, "area": None, "bbox": None, "predicted_iou": None}
    table = rows_of(
        {},
        {"box_error": "box_empty", **none},
        {"box_error": "image_failed", **none},
        {"area": 0, "bbox": None},
        {"detector_score": None},
    )
    assert reasons(table) == [None, "box_empty", "image_failed", "empty", None]


@pytest.mark.parametrize(
    ("wanted", "column", "reason"),
    [
        ("min_detector_score", "detector_score", "detector_score"),
        ("min_predicted_iou", "predicted_iou", "predicted_iou"),
        ("min_stability_score", "stability_score", "stability_score"),
        ("min_box_iou", "box_iou", "box_iou"),
    ],
)
def test_thresholds_are_inclusive_and_nulls_pass(wanted, column, reason):
    table = rows_of({column: 0.89}, {column: 0.9}, {column: 0.91}, {column: None})
    assert reasons(table, **{wanted: 0.9}) == [reason, None, None, None]


def test_small_masks_are_marked_by_area():
    assert reasons(rows_of({"area": 9}, {"area": 10}), min_area_px=10) == ["area", None]


def test_the_first_rule_that_fails_is_the_reason():
    table = rows_of({"predicted_iou": 0.1, "stability_score": 0.1, "area": 1})
    bounds = {"min_predicted_iou": 0.5, "min_stability_score": 0.5, "min_area_px": 5}
    assert reasons(table, **bounds) == ["predicted_iou"]


def test_of_overlapping_masks_the_worse_is_marked_with_the_winner():
    table = rows_of(
        {"instance_index": 7, "detector_score": 0.5},
        {"instance_index": 8, "detector_score": 0.9, "mask": (0, 0, 10, 11)},
        {"instance_index": 9, "mask": (30, 30, 40, 40)},
    )
    assert reasons(table, nms_mode="all", nms_iou=0.7) == ["nms:8", None, None]
    assert reasons(table, nms_mode="all", nms_iou=0.95) == [None, None, None]
    assert reasons(table) == [None, None, None]


def test_the_detectors_score_decides_before_the_models() -> None:
    table = rows_of(
        {"detector_score": 0.6, "predicted_iou": 0.9}, {"detector_score": 0.7, "predicted_iou": 0.5}
    )
    assert reasons(table, nms_mode="all") == ["nms:1", None]


def test_nms_within_classes_leaves_other_classes_alone():
    table = rows_of({"category_id": 1}, {"category_id": 2}, {"category_id": 2, "detector_score": 0.4})
    assert reasons(table, nms_mode="class") == [None, None, "nms:1"]
    assert reasons(table, nms_mode="all") == [None, "nms:0", "nms:0"]


def test_nms_looks_at_masks_not_at_boxes():
    """Two diagonal halves of one square: equal boxes, disjoint masks."""
    lower = np.tril(np.ones((50, 50), np.uint8))
    halves = [lower, 1 - lower]
    table = rows_of(*(
        {
            "segmentation": {"size": [50, 50], "counts": counts_of(m)},
            "bbox": [0, 0, 50, 50],
            "area": int(m.sum()),
        }
        for m in halves
    ))  # fmt: skip
    assert reasons(table, nms_mode="all", nms_iou=0.3) == [None, None]


def test_nms_stays_within_an_image_and_skips_what_is_already_marked():
    table = rows_of({"image_index": 0}, {"image_index": 1}, {"image_index": 1, "predicted_iou": 0.1})
    assert reasons(table, nms_mode="all", min_predicted_iou=0.5) == [None, None, "predicted_iou"]


def test_without_detector_scores_the_better_prediction_wins_and_ties_go_to_the_first():
    table = rows_of(*({"detector_score": None, "predicted_iou": p} for p in (0.8, 0.9, 0.9)))
    assert reasons(table, nms_mode="all") == ["nms:1", None, "nms:1"]


def test_a_mask_that_lost_does_not_suppress_others():
    """a beats b; c overlaps b only, so c stays."""
    table = rows_of(
        {"detector_score": 0.9, "mask": (0, 0, 10, 10)},
        {"detector_score": 0.8, "mask": (4, 0, 14, 10)},
        {"detector_score": 0.7, "mask": (8, 0, 18, 10)},
    )
    assert reasons(table, nms_mode="all", nms_iou=0.4) == [None, "nms:0", None]


def test_an_empty_table_is_marked():
    assert mark(rows_of(), FilterSettings(nms_mode="all", min_area_px=1)) == ([], [])
