"""Formats, clipping and overlap of boxes."""

from __future__ import annotations

import numpy as np
import pytest

from hqlabel.pipeline import box_geometry


def test_no_boxes_stay_no_boxes() -> None:
    for empty in ([], np.zeros((0, 4))):
        assert box_geometry.clip_boxes(empty, (10, 10)).shape == (0, 4)
        assert box_geometry.boxes_to_xyxy(empty, "xywh").shape == (0, 4)
        assert box_geometry.box_areas(empty).shape == (0,)


@pytest.mark.parametrize("box_format", ["xyxy", "xywh", "cxcywh"])
def test_every_format_describes_the_same_box(box_format: box_geometry.PixelFormat) -> None:
    in_format = {"xyxy": [10, 20, 40, 26], "xywh": [10, 20, 30, 6], "cxcywh": [25, 23, 30, 6]}[box_format]
    np.testing.assert_array_equal(box_geometry.boxes_to_xyxy([in_format], box_format), [[10, 20, 40, 26]])


def test_an_unknown_format_is_an_error() -> None:
    with pytest.raises(ValueError, match="'yxyx' is not known"):
        box_geometry.boxes_to_xyxy([[0, 0, 1, 1]], "yxyx")  # type: ignore[arg-type]


def test_normalised_boxes_become_pixels() -> None:
    pixels = box_geometry.denormalise_boxes([[0.5, 0.25, 1.0, 0.75]], (200, 400))
    np.testing.assert_array_equal(pixels, [[200, 50, 400, 150]])


def test_clipping_keeps_what_lies_in_the_image() -> None:
    given = [[-5, -5, 5, 5], [90, 40, 200, 200], [10, 10, 20, 20]]
    np.testing.assert_array_equal(
        box_geometry.clip_boxes(given, (50, 100)), [[0, 0, 5, 5], [90, 40, 100, 50], [10, 10, 20, 20]]
    )


def test_a_box_that_only_touches_the_image_has_no_area_in_it() -> None:
    clipped = box_geometry.clip_boxes([[100, 0, 110, 5], [0, 0, np.inf, 1]], (50, 100))
    assert box_geometry.box_areas(clipped).tolist() == [0, 100]


def test_box_iou_of_overlap_containment_distance_and_nothing() -> None:
    boxes_a = [[0, 0, 2, 2], [0, 0, 4, 4], [0, 0, 1, 1], [3, 3, 3, 3]]
    boxes_b = [[1, 0, 3, 2], [1, 1, 3, 3], [5, 5, 6, 6], [3, 3, 3, 3]]
    np.testing.assert_allclose(box_geometry.box_iou(boxes_a, boxes_b), [1 / 3, 0.25, 0, 0])


def test_a_wrong_last_axis_is_named() -> None:
    with pytest.raises(ValueError, match=r"boxes have shape \(2, 3\)"):
        box_geometry.boxes_to_xyxy(np.zeros((2, 3)), "xyxy")


def test_the_best_come_first_then_the_second_score_then_the_earlier() -> None:
    first = np.array([0.5, np.nan, 0.9, 0.5, 0.5, np.nan])
    second = np.array([0.1, 0.2, 0.0, 0.3, 0.1, np.nan])

    assert box_geometry.best_first(first).tolist() == [2, 0, 3, 4, 1, 5]
    assert box_geometry.best_first(first, second).tolist() == [2, 3, 0, 4, 1, 5]
    assert box_geometry.best_first(np.zeros(0)).tolist() == []


def test_suppression_is_greedy_within_a_kind_and_a_loser_takes_no_other_with_it() -> None:
    """Places 0, 1, 2 overlap like a chain; 3 lies where 0 lies, and is of another kind; 4 takes no part."""
    overlaps = np.eye(5)
    for one, other in ((0, 1), (1, 2), (0, 3), (0, 4)):
        overlaps[one, other] = overlaps[other, one] = 0.8
    ranked = np.array([1, 0, 3, 2])
    kinds = [(1, "a"), (1, "a"), (1, "a"), (1, None), (1, "a")]

    def iou(winner, rivals):
        return overlaps[winner, rivals]

    assert box_geometry.suppress(ranked, kinds, iou, 0.7) == [(0, 1), (2, 1)]
    assert box_geometry.suppress(ranked[1:], kinds, iou, 0.7) == []
    assert box_geometry.suppress(ranked[1:], [None] * 5, iou, 0.7) == [(3, 0)]
    assert box_geometry.suppress(ranked, kinds, iou, 0.8) == []
    assert box_geometry.suppress(np.zeros(0, np.int64), [], iou, 0.7) == []
