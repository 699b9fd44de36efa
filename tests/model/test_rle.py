"""Runs and compressed strings: pycocotools, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from pycocotools import mask as coco_mask

from model import rle


def coco_strings(masks_nhw: np.ndarray) -> tuple[str, ...]:
    """What pycocotools makes of each mask."""
    columns = (np.asfortranarray(mask.astype(np.uint8)) for mask in masks_nhw)
    return tuple(coco_mask.encode(mask)["counts"].decode("ascii") for mask in columns)


def assert_all_agree_with_pycocotools(masks_nhw: np.ndarray) -> None:
    size_hw = masks_nhw.shape[1:]
    runs = rle.runs_from_masks(torch.from_numpy(masks_nhw))
    counts = rle.compress(runs)
    assert counts == coco_strings(masks_nhw)
    assert all(type(text) is str for text in counts)
    np.testing.assert_array_equal(rle.run_areas(runs), masks_nhw.sum((1, 2)))
    np.testing.assert_array_equal(rle.rle_area(counts, size_hw), masks_nhw.sum((1, 2)))
    np.testing.assert_array_equal(rle.run_bboxes_xywh(runs), rle.rle_bbox_xywh(counts, size_hw))
    for text, mask in zip(counts, masks_nhw, strict=True):
        np.testing.assert_array_equal(rle.decode_rle(text, size_hw), mask)
    back = rle.decompress(counts, size_hw)
    np.testing.assert_array_equal(back.lengths, runs.lengths)
    np.testing.assert_array_equal(back.offsets, runs.offsets)


def named_masks(height: int, width: int) -> dict[str, np.ndarray]:
    masks = {
        name: np.zeros((height, width), dtype=np.bool_)
        for name in (
            "empty",
            "full",
            "first pixel",
            "last pixel",
            "one pixel",
            "all four borders",
            "top",
            "bottom",
        )
    }
    masks["full"][:] = True
    masks["first pixel"][0, 0] = True
    masks["last pixel"][-1, -1] = True
    masks["one pixel"][height // 2, width // 3] = True
    masks["all four borders"][[0, -1]] = True
    masks["all four borders"][:, [0, -1]] = True
    masks["top"][0] = True
    masks["bottom"][-1] = True
    masks["whole columns"] = np.tile(np.arange(width) % 5 < 2, (height, 1))
    masks["ends where the next starts"] = ~masks["empty"]
    masks["ends where the next starts"][1:-1, :] = False
    masks["checkerboard"] = (np.indices((height, width)).sum(0) % 2).astype(np.bool_)
    return masks


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 9), (9, 1), (2, 2), (40, 53), (300, 200)])
def test_strings_of_named_masks(size_hw: tuple[int, int]) -> None:
    assert_all_agree_with_pycocotools(np.stack(list(named_masks(*size_hw).values())))


def test_masks_of_thirty_thousand_runs() -> None:
    mask = named_masks(300, 200)["checkerboard"]
    noise = np.random.default_rng(0).random((400, 300)) < 0.5
    assert len(rle.runs_from_masks(torch.from_numpy(mask[None])).lengths) > 30_000
    assert len(rle.runs_from_masks(torch.from_numpy(noise[None])).lengths) > 30_000
    assert_all_agree_with_pycocotools(mask[None])
    assert_all_agree_with_pycocotools(noise[None])


def test_runs_so_long_that_their_differences_need_every_length_of_number() -> None:
    mask = np.zeros((2000, 1100), dtype=np.bool_)
    position = 0
    for length in (1, 15, 16, 17, 511, 512, 513, 16_383, 16_384, 524_288, 3, 600_000, 2):
        position += 7 + length
        mask.T.reshape(-1)[position : position + length] = True
        position += length
    assert_all_agree_with_pycocotools(np.stack([mask, ~mask]))


@given(
    masks=hypothesis_numpy.arrays(
        np.bool_, hypothesis_numpy.array_shapes(min_dims=3, max_dims=3, max_side=9), elements=st.booleans()
    )
)
def test_any_small_masks(masks: np.ndarray) -> None:
    assert_all_agree_with_pycocotools(masks)


def test_no_masks_give_no_strings() -> None:
    assert rle.encode_masks(torch.zeros((0, 4, 5), dtype=torch.bool)) == ()
    assert rle.rle_area([], (4, 5)).shape == (0,)
    assert rle.rle_bbox_xywh([], (4, 5)).shape == (0, 4)
    assert rle.rle_iou([], ["d0"], (4, 5)).shape == (0, 1)


def test_edges_may_come_in_any_order() -> None:
    masks = np.random.default_rng(1).random((4, 30, 20)) < 0.4
    columns = np.zeros((4, 20, 32), dtype=np.bool_)
    columns[:, :, 1:-1] = masks.transpose(0, 2, 1)
    n, x, y = np.nonzero(columns[:, :, 1:] ^ columns[:, :, :-1])
    edges = n * (30 * 20 + 1) + x * 30 + y
    shuffled = np.random.default_rng(2).permutation(edges)
    assert rle.compress(rle.runs_from_edges(shuffled, 4, (30, 20))) == coco_strings(masks)


def test_a_mask_is_encoded_alike_whatever_stands_beside_it() -> None:
    masks = torch.from_numpy(np.stack(list(named_masks(40, 53).values())))
    together = rle.encode_masks(masks)
    assert together == tuple(rle.encode_masks(mask[None])[0] for mask in masks)
    assert together[::-1] == rle.encode_masks(masks.flip(0))


def test_parts_join_in_order() -> None:
    masks = torch.from_numpy(np.stack(list(named_masks(40, 53).values())))
    parts = [rle.runs_from_masks(masks[:3]), rle.runs_from_masks(masks[3:3]), rle.runs_from_masks(masks[3:])]
    joined = rle.concatenate(parts)
    assert len(joined) == len(masks)
    assert rle.compress(joined) == rle.encode_masks(masks)


def test_iou_of_every_pair() -> None:
    masks = named_masks(40, 53)
    left, both = np.zeros((40, 53), np.bool_), np.zeros((40, 53), np.bool_)
    left[10:20, 10:20] = True
    both[10:20, 10:40] = True
    counts = rle.encode_masks(torch.from_numpy(np.stack([left, both, masks["empty"]])))
    iou = rle.rle_iou(counts, counts[:2], (40, 53))
    np.testing.assert_allclose(iou, [[1, 1 / 3], [1 / 3, 1], [0, 0]])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("d0\n", "outside the alphabet"),
        ("dé", "outside the alphabet"),
        ("d\ud800", "outside the alphabet"),
        ("dP", "ends inside a number"),  # the last character says that another follows
        ("PPPPPPPPP0", "too many characters"),
        ("d0", "runs of 20 pixels"),  # of a mask of 4 x 5, not of 5 x 5: pycocotools reads stray memory
        ("0d0d0", "runs of 40 pixels"),
        ("01O1", "a run of -1 pixels"),
    ],
)
def test_a_string_that_is_not_of_the_mask_is_refused(text: str, reason: str) -> None:
    for read in (rle.rle_area, rle.rle_bbox_xywh, rle.decompress):
        with pytest.raises(ValueError, match=reason):
            read([text], (5, 5))
    with pytest.raises(ValueError, match=reason):
        rle.decode_rle(text, (5, 5))
    with pytest.raises(ValueError, match=reason):
        rle.rle_iou(["i0"], [text], (5, 5))


def test_masks_must_be_boolean() -> None:
    with pytest.raises(ValueError, match=r"wanted bool \(N, H, W\)"):
        rle.encode_masks(torch.zeros((1, 4, 5)))


def test_more_masks_than_pycocotools_takes_at_once_are_measured():
    counts = rle.encode_masks(torch.ones((300, 2, 3), dtype=torch.bool))
    assert rle.rle_area(counts, (2, 3)).tolist() == [6] * 300
    assert rle.rle_bbox_xywh(counts, (2, 3)).shape == (300, 4)
