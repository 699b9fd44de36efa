"""What is measured on run-length strings equals what is measured on decoded masks; marks follow rules."""

from __future__ import annotations

import re
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from model.records import Instances
from pipeline import rle_strips as runs
from pipeline.schema import UNIT_INSTANCE
from pipeline.settings import FilterSettings
from pipeline.tables.mask_quality import FLAGS, mark, measure, order_flags


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


def plain_components(mask: np.ndarray) -> int:
    """Flood fill over 8 neighbours, pixel by pixel."""
    todo = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    found = 0
    while todo:
        found += 1
        stack = [todo.pop()]
        while stack:
            y, x = stack.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            stack += near
    return found


def random_masks(seed: int, n: int, height: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    densities = rng.choice([0.0, 0.05, 0.3, 0.5, 0.8, 1.0], n)
    return [rng.random((height, width)) < d for d in densities]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 17), st.integers(1, 17))
def test_strips_and_components_equal_plain_computation(seed: int, height: int, width: int):
    masks = random_masks(seed, 5, height, width)
    strips = runs.read_strips([counts_of(m) for m in masks], (height, width))
    drawn = np.zeros((5, height, width), dtype=bool)
    for n, x, top, bottom in zip(strips.mask, strips.x, strips.top, strips.bottom, strict=True):
        assert not drawn[n, top:bottom, x].any()
        drawn[n, top:bottom, x] = True
    np.testing.assert_array_equal(drawn, masks)
    assert runs.count_components(strips).tolist() == [plain_components(m) for m in masks]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(-3, 20), min_size=4, max_size=4))
def test_pixels_inside_a_box_are_counted_by_their_centre(seed: int, numbers: list[float]):
    (mask,) = random_masks(seed, 1, 11, 13)
    x1, x2 = sorted(numbers[:2])
    y1, y2 = sorted(numbers[2:])
    centre_x, centre_y = np.arange(13) + 0.5, np.arange(11)[:, None] + 0.5
    inside = (centre_x >= x1) & (centre_x <= x2) & (centre_y >= y1) & (centre_y <= y2)
    strips = runs.read_strips([counts_of(mask)], (11, 13))
    assert runs.count_inside(strips, np.array([[x1, y1, x2, y2]])).tolist() == [(mask & inside).sum()]


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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200_000), max_size=9), st.integers(0, 450))
def test_steps_cover_all_strings_in_order_and_stay_small(lengths: list[int], many: int):
    counts = ["0" * length for length in [*lengths, *[1] * many]]
    parts = [counts[step] for step in runs.steps(counts)]
    assert [text for part in parts for text in part] == counts
    assert all(0 < len(part) <= runs.MASKS_PER_STEP for part in parts)
    assert all(len(part) == 1 or sum(map(len, part)) <= runs.TEXT_PER_STEP for part in parts)


def test_large_run_lengths_are_read_like_pycocotools():
    mask = np.zeros((3000, 4000), bool)
    mask[100:2900, 50:3990] = True
    mask[5, 7] = True
    strips = runs.read_strips([counts_of(mask)], mask.shape)
    assert (strips.bottom - strips.top).sum() == mask.sum()


def test_runs_of_length_zero_do_not_split_a_component():
    # out 1, in 2, out 0, in 3, out 3: one vertical strip of a 9 x 1 image, written clumsily
    raw = coco_mask.frPyObjects({"size": [9, 1], "counts": [1, 2, 0, 3, 3]}, 9, 1)
    strips = runs.read_strips([raw["counts"].decode()], (9, 1))
    assert runs.count_components(strips).tolist() == [1]


@pytest.mark.parametrize(
    ("counts", "words"),
    [("", "empty"), ("\x7f", "alphabet"), ("é", "alphabet"), ("5", "runs of 5"), ("o", "inside a number"),
     ("oooooooooo0", "too many characters"), ("O", "run of -1")],
)  # fmt: skip
def test_strings_that_are_no_mask_are_refused(counts: str, words: str):
    good = counts_of(np.ones((2, 3), bool))
    with pytest.raises(ValueError, match=f"mask 1: .*{words}"):
        runs.read_strips([good, counts, good], (2, 3))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from([*"0NPo\x7f é\ud800", ""])), max_size=2),
    st.booleans(),
)
def test_what_has_no_fault_is_read_alike_by_pycocotools(
    lengths: list[int], edits: list[tuple[int, str]], pad: bool
) -> None:
    size = [1, max(1, sum(lengths))]
    text = str(coco_mask.frPyObjects({"size": size, "counts": lengths}, *size)["counts"], "ascii")
    for at, piece in edits:
        text = text[: at % (len(text) + 1)] + piece + text[at % (len(text) + 1) + pad :]
    good = counts_of(np.ones((2, 3), bool))
    faults = runs.faults_of([good, text, good], [[2, 3], size, [2, 3]])
    assert (faults[0], faults[2]) == (None, None)
    if not edits and sum(lengths):
        assert faults[1] is None
    if faults[1] is None:
        strips = runs.read_strips([text], size)
        dense = coco_mask.decode({"size": size, "counts": text.encode()})
        assert (strips.bottom - strips.top).sum() == dense.sum()
        assert sorted(strips.x.tolist()) == np.flatnonzero(dense[0]).tolist()
    else:
        with pytest.raises(ValueError, match="mask 0"):
            runs.read_strips([text], size)
        assert faults[1].isprintable()


@pytest.mark.parametrize(
    ("text", "size", "words"),
    [
        (b"04", [2, 2], "type bytes"), (None, [2, 2], "type NoneType"), ([0, 4], [2, 2], "type list"),
        ("04", None, "two whole numbers"), ("04", [2], "two whole numbers"), ("04", [2.0, 2.0], "two whole"),
        ("04", ["2", "2"], "two whole"), ("04", [True, 4], "two whole"), ("04", [2, None], "two whole"),
        ("04", [-2, -2], "out of range"), ("04", [0, 4], "out of range"), ("04", [2**70, 1], "out of range"),
        ("04", [2, 3], "runs of 4 pixels in all, wanted 6"), ("PPPPPPP04", [2, 2], "too many characters"),
        ("b'04'", [2, 2], "alphabet"), ("MDQ=", [2, 2], "runs of|a run of|inside"), ("", [2, 2], "empty"),
        ("o" * 1_000_000, [2, 2], "inside a number"), ("0" * 1_000_000, [2, 2], "runs of 0 pixels"),
    ],
)  # fmt: skip
def test_faults_of_masks_that_people_bring_are_named_and_never_raised(text, size, words) -> None:
    [fault] = runs.faults_of([text], [size])
    assert re.search(words, fault)
    assert len(fault) < 100


def test_pycocotools_misreads_a_long_negative_number_and_we_refuse_it() -> None:
    short, long = "5b6d0iloooO", "5b6d0ilooooO"  # runs 5, 210, 20, 107: the same, one character longer
    assert runs.faults_of([short], [[18, 19]]) == [None]
    assert int(coco_mask.area({"size": [18, 19], "counts": long.encode()})) != 210 + 107
    assert "too many characters" in runs.faults_of([long], [[18, 19]])[0]


def test_uncompressed_runs_become_the_text_that_pycocotools_makes_of_them() -> None:
    lengths = [3, 0, 4, 70_000, 1, 2, 900_000]
    text = coco_mask.frPyObjects({"size": [1, sum(lengths)], "counts": lengths}, 1, sum(lengths))["counts"]
    assert runs.text_of_lengths(lengths).encode() == text
    assert runs.text_of_lengths([]) == ""
    for wrong in (-1, 1.5, "3", None, True, 2**31, 10**5000, [3]):
        with pytest.raises(ValueError, match="run 1 is no whole number"):
            runs.text_of_lengths([1, wrong])


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
