import numpy as np
import pytest

from tools.demo_model.evaluate import boundary, ellipse_in, mask_iou, rank_correlation


def test_the_boundary_is_a_band_inside_the_mask() -> None:
    mask = np.zeros((300, 400), dtype=bool)  # diagonal 500: a band of 10
    mask[50:150, 100:300] = True
    band = boundary(mask)
    inner = np.zeros_like(mask)
    inner[60:140, 110:290] = True
    assert np.array_equal(band, mask & ~inner)


def test_the_border_of_the_picture_and_a_hole_count_as_edges() -> None:
    mask = np.ones((300, 400), dtype=bool)
    mask[150, 200] = False
    band = boundary(mask)
    assert band[0, 200]
    assert band[141, 200]
    assert not band[100, 200]
    assert not boundary(np.zeros((30, 40), dtype=bool)).any()


def test_iou_of_nothing_with_nothing_is_one() -> None:
    nothing, half = np.zeros((4, 4), dtype=bool), np.arange(16).reshape(4, 4) < 8
    assert mask_iou(nothing, nothing) == 1
    assert mask_iou(half, nothing) == 0
    assert mask_iou(half, half | (np.arange(16).reshape(4, 4) < 12)) == pytest.approx(8 / 12)


def test_the_ellipse_fills_its_box_by_a_quarter_of_pi() -> None:
    inside = ellipse_in(np.array([10.0, 20.0, 110.0, 80.0]), (100, 120))
    assert inside.sum() == pytest.approx(np.pi / 4 * 100 * 60, rel=0.01)
    assert not inside[:20].any()


def test_rank_correlation_sees_order_alone() -> None:
    values = np.array([0.1, 0.5, 0.2, 0.9])
    assert rank_correlation(values, np.exp(5 * values)) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
