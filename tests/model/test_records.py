"""Sizes, the one resize, prompts in model pixels: against the original predictor's arithmetic."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hqlabel.model import records

SIZES_HW = [
    (97, 140),
    (427, 640),
    (333, 500),
    (333, 2000),
    (2000, 333),
    (1536, 2048),
    (61, 1000),
    (1024, 1024),
]
sides = st.integers(min_value=1, max_value=6000)


def gradient_with_noise(height: int, width: int) -> np.ndarray:
    """A uint8 picture whose pixels are the same on every machine: no random generator, no trigonometry."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.int64)
    red = rows * 255 // max(height - 1, 1)
    green = columns * 255 // max(width - 1, 1)
    blue = (rows * rows * 31 + columns * 17 + rows * columns * 7) % 256
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("size_hw", "expected_hw"),
    [
        ((427, 640), (683, 1024)),  # 683.2
        ((333, 500), (682, 1024)),  # 681.98: floor says 681
        ((2000, 333), (1024, 170)),  # 170.496
        ((97, 140), (709, 1024)),  # 709.49
        ((1365, 1365), (1024, 1024)),
        ((1, 2048), (1, 1024)),  # exactly one half rounds up
    ],
)
def test_target_size_rounds_half_up(size_hw: tuple[int, int], expected_hw: tuple[int, int]) -> None:
    assert records.target_size_hw(size_hw, 1024) == expected_hw


@given(height=sides, width=sides, side=st.sampled_from([64, 256, 1024]))
def test_long_side_is_the_input_side_and_the_short_side_within_half_a_pixel(
    height: int, width: int, side: int
) -> None:
    try:
        resized_hw = records.target_size_hw((height, width), side)
    except ValueError:
        assert min(height, width) * side / max(height, width) < 0.5
        return
    assert max(resized_hw) == side
    exact_short = min(height, width) * side / max(height, width)
    assert abs(min(resized_hw) - exact_short) <= 0.5


def test_a_side_that_would_vanish_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"too_elongated.*height 1 and width 3000"):
        records.target_size_hw((1, 3000), 1024)
    with pytest.raises(ValueError, match="at least 1"):
        records.target_size_hw((0, 10), 1024)


@pytest.mark.parametrize("size_hw", SIZES_HW)
def test_resize_is_pillow_bilinear_on_uint8(size_hw: tuple[int, int]) -> None:
    image = gradient_with_noise(*size_hw)
    resized = records.resize_longest_side(image, 1024)
    height, width = records.target_size_hw(size_hw, 1024)
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resized, expected)
    assert resized.dtype == np.uint8
    assert resized.flags.writeable
    assert resized.flags.c_contiguous


def test_resize_averages_over_the_footprint_when_it_shrinks() -> None:
    stripes = np.zeros((1024, 4096, 3), dtype=np.uint8)
    stripes[:, ::4] = 255
    resized = records.resize_longest_side(stripes, 1024)
    # Every fourth column is white: antialiased, all is near 64; sampled, it would be black or white.
    assert abs(int(resized[100:150, 100:900].min()) - 64) <= 1
    assert abs(int(resized[100:150, 100:900].max()) - 64) <= 1


@pytest.mark.parametrize(
    ("size_hw", "sha256_start"),
    [((427, 640), "b317093fda8ddd8e"), ((333, 500), "a26c7c58a9ab71db"), ((2000, 333), "847886a85849d1cb")],
)
def test_resized_pixels_do_not_change_between_releases(size_hw: tuple[int, int], sha256_start: str) -> None:
    resized = records.resize_longest_side(gradient_with_noise(*size_hw), 1024)
    assert hashlib.sha256(resized.tobytes()).hexdigest()[:16] == sha256_start


def test_an_image_of_the_right_size_is_copied_untouched() -> None:
    image = gradient_with_noise(64, 40)
    resized = records.resize_longest_side(image, 64)
    np.testing.assert_array_equal(resized, image)
    assert not np.shares_memory(resized, image)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)]
)
def test_anything_but_rgb_bytes_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"wanted \(H, W, 3\) uint8 RGB"):
        records.resize_longest_side(image, 64)


def test_boxes_scale_by_two_factors_of_the_rounded_sizes() -> None:
    size_hw, resized_hw = (333, 500), (682, 1024)
    boxes = np.array([[10.25, 20.5, 400.75, 300.125], [0, 0, 500, 333]], dtype=np.float32)
    scaled = records.scale_boxes(boxes, size_hw, resized_hw)
    expected = boxes.astype(np.float64)
    expected[:, 0::2] *= 1024 / 500
    expected[:, 1::2] *= 682 / 333
    np.testing.assert_array_equal(scaled, expected.astype(np.float32))
    assert scaled.dtype == np.float32
    # One factor for both axes would put the corner at 681.98.
    np.testing.assert_array_equal(scaled[1], [0, 0, 1024, 682])


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), data=st.data())
def test_boxes_go_to_model_pixels_and_back(height: int, width: int, data: st.DataObject) -> None:
    if max(height, width) > 2000 * min(height, width):
        return
    resized_hw = records.target_size_hw((height, width), 1024)
    x = sorted(data.draw(st.tuples(st.floats(0, width), st.floats(0, width))))
    y = sorted(data.draw(st.tuples(st.floats(0, height), st.floats(0, height))))
    box = np.array([[x[0], y[0], x[1], y[1]]])
    there = records.scale_boxes(box, (height, width), resized_hw)
    back = records.scale_boxes(there, resized_hw, (height, width))
    np.testing.assert_allclose(back, box, rtol=1e-6, atol=1e-6)


def test_points_scale_as_the_corners_of_boxes_do() -> None:
    points = np.array([[[3.5, 9.0], [0.0, 1.0]]])
    scaled = records.scale_points(points, (100, 50), (64, 32))
    assert scaled.shape == (1, 2, 2)
    np.testing.assert_allclose(scaled, points * 0.64, rtol=1e-6)


def test_no_boxes_stay_no_boxes() -> None:
    for empty in ([], np.zeros((0, 4))):
        assert records.scale_boxes(empty, (10, 10), (64, 64)).shape == (0, 4)
