"""Polygons drawn as OpenCV draws them, and polygons made so that it gives the mask back."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hqlabel.jobs.export.fill_polygon import fill_polygon
from hqlabel.jobs.export.polygons import filled_iou, filled_polygon_of, outline_rings
from tests.jobs.made_outputs import blob

SIZE = (14, 17)
masks = arrays(
    np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=st.integers(0, 1)
).filter(lambda mask: mask.any())
corners = st.tuples(st.floats(0, SIZE[1] - 0.01), st.floats(0, SIZE[0] - 0.01))


def by_the_rule(polygon: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """The rule pixel by pixel: within by even-odd, or the nearest to an edge on a step of its longer side."""
    drawn = np.zeros(size_hw, np.uint8)
    points = [(int(x), int(y)) for x, y in polygon]
    for (x1, y1), (x2, y2) in pairwise([*points, points[0]]):
        (x1, y1), (x2, y2) = (
            sorted([(x1, y1), (x2, y2)], key=lambda p: p[0]) if x1 != x2 else ((x1, y1), (x2, y2))
        )
        steps = max(abs(x2 - x1), abs(y2 - y1))
        for step in range(steps + 1):
            share = [
                (abs(d) * step * 2 + steps - 1) // (2 * steps) if steps else 0 for d in (x2 - x1, y2 - y1)
            ]
            drawn[y1 + share[1] * (1 if y2 > y1 else -1), x1 + share[0]] = 1
    for y, x in np.ndindex(size_hw):
        crossed = 0
        for (x1, y1), (x2, y2) in pairwise([*points, points[0]]):
            if (y1 <= y) != (y2 <= y):
                crossed += (x - x1) * abs(y2 - y1) > (y - y1) * (x2 - x1) * (1 if y2 > y1 else -1)
        drawn[y, x] |= crossed % 2
    return drawn


@settings(max_examples=150)
@given(st.lists(corners, min_size=1, max_size=12))
def test_a_polygon_is_drawn_by_the_rule(points: list[tuple[float, float]]) -> None:
    polygon = np.array(points, np.float64)
    assert np.array_equal(fill_polygon(polygon, SIZE), by_the_rule(polygon, SIZE))


def test_opencv_draws_the_same_pixels() -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    rng = np.random.default_rng(0)
    for number in range(2000):
        height, width = rng.integers(1, 90, 2)
        polygon = rng.uniform(0, 1, (rng.integers(1, 40 if number % 2 else 7), 2)) * [width, height]
        drawn = np.zeros((height, width), np.uint8)
        cv2.fillPoly(drawn, [polygon.astype(np.int32)], 1)
        assert np.array_equal(drawn, fill_polygon(polygon, (height, width))), polygon.astype(int).tolist()


@settings(max_examples=200)
@given(masks, st.sampled_from([0.0, 0.5]))
def test_a_mask_in_one_piece_comes_back_whole_whatever_its_holes(mask: np.ndarray, tolerance: float) -> None:
    polygon = filled_polygon_of(mask, tolerance)
    assert len(polygon) >= 3
    assert (np.ptp(polygon, axis=0) > 0).all(), "readers drop an object whose box has no area"
    assert (polygon > 0).all()
    assert (polygon < mask.shape[::-1]).all()
    if is_one_piece(mask):
        assert np.array_equal(fill_polygon(polygon, mask.shape), mask)


def is_one_piece(mask: np.ndarray) -> bool:
    """Whether one outline runs the outer way: from the top left corner of its first row to the right."""
    return sum(area > 0 for area in map(signed_area, outline_rings(mask))) == 1


def signed_area(ring: np.ndarray) -> float:
    x, y = ring.T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def test_a_far_speck_is_left_out_and_a_near_part_is_not() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[5:25, 5:25] = 1
    mask[10:14, 28:34] = 1  # 24 pixels behind a gap of 3
    mask[35, 55] = 1  # 1 pixel, far off
    drawn = fill_polygon(filled_polygon_of(mask, 0.5), mask.shape)
    assert drawn[10:14, 28:34].all()
    assert drawn[35, 55] == 0
    assert drawn.sum() == mask.sum() - 1 + 3


def test_points_are_saved_below_half_a_pixel_without_a_loss() -> None:
    mask = blob(6, (300, 400))
    mask[:, 200:] = 0
    exact, saved, coarse = (filled_polygon_of(mask, tolerance) for tolerance in (0, 0.5, 3))
    assert filled_iou(saved, mask) == filled_iou(exact, mask) > 0.99
    assert len(coarse) < len(saved) < 0.7 * len(exact)
