"""Outlines, polygons and brush strokes hold the mask they were made from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hqlabel.jobs.export.brush_rle import encode_brush
from hqlabel.jobs.export.polygons import kept_iou, outline_rings, polygon_of, simplify
from tests.jobs.made_outputs import blob, rle_of

masks = arrays(
    np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14), elements=st.integers(0, 1)
)


@settings(max_examples=150)
@given(masks.filter(lambda mask: mask.any()))
def test_an_unsimplified_polygon_is_the_mask_whatever_its_parts_and_holes(mask: np.ndarray) -> None:
    assert kept_iou(polygon_of(mask, 0), rle_of(mask)["counts"], mask.shape) == 1


def test_outlines_enclose_as_many_pixels_as_the_mask_has() -> None:
    mask = blob(5, (80, 90))

    def area(ring: np.ndarray) -> float:
        x, y = ring.T
        return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)

    assert sum(area(ring) for ring in outline_rings(mask)) == mask.sum()
    assert min(area(ring) for ring in outline_rings(mask)) < 0, (
        "the blob has a hole, which runs the other way"
    )


@pytest.mark.parametrize("tolerance", [0.5, 1.0, 3.0])
def test_simplified_outlines_keep_within_the_tolerance_and_lose_what_is_said(tolerance: float) -> None:
    mask = blob(1, (200, 260))
    for ring in outline_rings(mask):
        kept = simplify(ring, tolerance)
        closed = np.concatenate([kept, kept[:1]])
        start, along = closed[:-1], np.diff(closed, axis=0)
        offset = ring[:, None, :] - start[None]
        share = np.clip((offset * along).sum(2) / np.maximum((along**2).sum(1), 1e-12), 0, 1)
        distance = np.hypot(*np.moveaxis(offset - share[..., None] * along, 2, 0)).min(axis=1)
        assert distance.max() <= tolerance + 1e-9

    coarse = polygon_of(mask, tolerance)
    assert len(coarse) <= len(polygon_of(mask, 0))
    assert 0.9 < kept_iou(coarse, rle_of(mask)["counts"], mask.shape) <= 1


def decode_brush(rle: list[int]) -> np.ndarray:
    """The bytes of a brush, after @thi.ng/rle-pack, which Label Studio's front end uses."""
    bits = "".join(f"{byte:08b}" for byte in rle)
    place = 0

    def read(size: int) -> int:
        nonlocal place
        place += size
        return int(bits[place - size : place], 2)

    number, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    out: list[int] = []
    while len(out) < number:
        repeats = read(1)
        length = read(sizes[read(2)]) + 1
        out += [read(word)] * length if repeats else [read(word) for _ in range(length)]
    return np.array(out, np.uint8)


@settings(max_examples=80)
@given(masks)
def test_a_brush_is_read_back_by_label_studios_format(mask: np.ndarray) -> None:
    pixels = decode_brush(encode_brush(mask)).reshape(*mask.shape, 4)

    assert np.array_equal(pixels, np.repeat(mask[..., None] * 255, 4, axis=2))


def test_a_run_longer_than_any_field_is_cut() -> None:
    mask = np.zeros((300, 400), np.uint8)
    mask[299, 399] = 1

    assert np.array_equal(decode_brush(encode_brush(mask)).reshape(300, 400, 4)[..., 3], mask * 255)
