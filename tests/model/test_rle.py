"""Runs and compressed strings: pycocotools, byte for byte."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from pycocotools import mask as coco_mask

from hqlabel.model import rle
from hqlabel.model.masks import runs_from_edges
from tests.model.plain_masks import bboxes_xywh, coco_counts, plain_components, random_masks


def edges_of(masks_nhw: np.ndarray) -> np.ndarray:
    """Where dense masks change, as `runs_from_edges` takes it."""
    num_masks, height, width = masks_nhw.shape
    columns = np.zeros((num_masks, width, height + 2), dtype=np.bool_)
    columns[:, :, 1:-1] = masks_nhw.transpose(0, 2, 1)
    n, x, y = np.nonzero(columns[:, :, 1:] ^ columns[:, :, :-1])
    return n * (height * width + 1) + x * height + y


def runs_of(masks_nhw: np.ndarray) -> rle.Runs:
    return runs_from_edges(edges_of(masks_nhw), len(masks_nhw), masks_nhw.shape[1:])


def assert_all_agree_with_pycocotools(masks_nhw: np.ndarray) -> None:
    size_hw = masks_nhw.shape[1:]
    runs = runs_of(masks_nhw)
    counts = runs.counts()
    assert counts == coco_counts(masks_nhw)
    assert all(type(text) is str for text in counts)
    np.testing.assert_array_equal(runs.areas(), masks_nhw.sum((1, 2)))
    np.testing.assert_array_equal(runs.bboxes_xywh(), bboxes_xywh(torch.from_numpy(masks_nhw)))
    for text, mask in zip(counts, masks_nhw, strict=True):
        np.testing.assert_array_equal(rle.rle_to_mask(text, size_hw), mask)
    parsed = rle.parse_counts(counts, size_hw[0] * size_hw[1])
    assert parsed.faults == {}
    np.testing.assert_array_equal(parsed.lengths, runs.lengths)
    np.testing.assert_array_equal(parsed.mask, np.repeat(np.arange(len(runs)), np.diff(runs.offsets)))


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
    assert len(runs_of(mask[None]).lengths) > 30_000
    assert len(runs_of(noise[None]).lengths) > 30_000
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
    runs = runs_of(np.zeros((0, 4, 5), np.bool_))
    assert (len(runs), runs.counts()) == (0, ())
    assert (runs.areas().shape, runs.bboxes_xywh().shape) == ((0,), (0, 4))


def test_edges_may_come_in_any_order() -> None:
    masks = np.random.default_rng(1).random((4, 30, 20)) < 0.4
    shuffled = np.random.default_rng(2).permutation(edges_of(masks))
    assert runs_from_edges(shuffled, 4, (30, 20)).counts() == coco_counts(masks)


def test_a_mask_is_encoded_alike_whatever_else_is_encoded() -> None:
    masks = np.stack(list(named_masks(40, 53).values()))
    together = runs_of(masks).counts()
    assert together == tuple(runs_of(mask[None]).counts()[0] for mask in masks)
    assert together[::-1] == runs_of(masks[::-1]).counts()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("d0\n", "outside the alphabet"),
        ("dé", "outside the alphabet"),
        ("d\ud800", "outside the alphabet"),
        ("dP", "ends inside a number"),  # the last character has 32 set: another follows
        ("PPPPPPPPP0", "too many characters"),
        ("d0", "runs of 20 pixels"),  # of a mask of 4 x 5, not of 5 x 5: pycocotools reads stray memory
        ("0d0d0", "runs of 40 pixels"),
        ("01O1", "a run of -1 pixels"),
    ],
)
def test_a_string_that_is_not_of_the_mask_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}.*, of a mask of 5 x 5"):
        rle.rle_to_mask(text, (5, 5))


def count_of(mask: np.ndarray) -> str:
    return coco_counts([mask])[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 17), st.integers(1, 17))
def test_strips_and_components_equal_plain_computation(seed: int, height: int, width: int):
    masks = random_masks(seed, 5, height, width)
    strips = rle.parse_strips([count_of(m) for m in masks], (height, width))
    drawn = np.zeros((5, height, width), dtype=bool)
    for n, x, top, bottom in zip(strips.mask, strips.x, strips.top, strips.bottom, strict=True):
        assert not drawn[n, top:bottom, x].any()
        drawn[n, top:bottom, x] = True
    np.testing.assert_array_equal(drawn, masks)
    assert rle.count_components(strips).tolist() == [plain_components(m) for m in masks]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(-3, 20), min_size=4, max_size=4))
def test_pixels_inside_a_box_are_counted_by_their_centre(seed: int, numbers: list[float]):
    (mask,) = random_masks(seed, 1, 11, 13)
    x1, x2 = sorted(numbers[:2])
    y1, y2 = sorted(numbers[2:])
    centre_x, centre_y = np.arange(13) + 0.5, np.arange(11)[:, None] + 0.5
    inside = (centre_x >= x1) & (centre_x <= x2) & (centre_y >= y1) & (centre_y <= y2)
    strips = rle.parse_strips([count_of(mask)], (11, 13))
    assert rle.count_inside(strips, np.array([[x1, y1, x2, y2]])).tolist() == [(mask & inside).sum()]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200_000), max_size=9), st.integers(0, 450))
def test_batches_cover_all_strings_in_order_and_stay_small(lengths: list[int], many: int):
    counts = ["0" * length for length in [*lengths, *[1] * many]]
    parts = [counts[step] for step in rle.batches(counts)]
    assert [text for part in parts for text in part] == counts
    assert all(0 < len(part) <= rle.MASKS_PER_BATCH for part in parts)
    assert all(len(part) == 1 or sum(map(len, part)) <= rle.TEXT_PER_BATCH for part in parts)


def test_large_run_lengths_are_read_like_pycocotools():
    mask = np.zeros((3000, 4000), bool)
    mask[100:2900, 50:3990] = True
    mask[5, 7] = True
    strips = rle.parse_strips([count_of(mask)], mask.shape)
    assert (strips.bottom - strips.top).sum() == mask.sum()


def test_runs_of_length_zero_do_not_split_a_component():
    # out 1, in 2, out 0, in 3, out 3: one vertical strip of a 9 x 1 image, written clumsily
    raw = coco_mask.frPyObjects({"size": [9, 1], "counts": [1, 2, 0, 3, 3]}, 9, 1)
    strips = rle.parse_strips([raw["counts"].decode()], (9, 1))
    assert rle.count_components(strips).tolist() == [1]


@pytest.mark.parametrize(
    ("counts", "words"),
    [("", "empty"), ("\x7f", "alphabet"), ("é", "alphabet"), ("5", "runs of 5"), ("o", "inside a number"),
     ("oooooooooo0", "too many characters"), ("O", "run of -1")],
)  # fmt: skip
def test_strings_that_are_no_mask_are_refused(counts: str, words: str):
    good = count_of(np.ones((2, 3), bool))
    with pytest.raises(ValueError, match=f"mask 1: .*{words}"):
        rle.parse_strips([good, counts, good], (2, 3))


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
    good = count_of(np.ones((2, 3), bool))
    faults = rle.rle_faults([good, text, good], [[2, 3], size, [2, 3]])
    assert (faults[0], faults[2]) == (None, None)
    if not edits and sum(lengths):
        assert faults[1] is None
    if faults[1] is None:
        strips = rle.parse_strips([text], size)
        dense = coco_mask.decode({"size": size, "counts": text.encode()})
        assert (strips.bottom - strips.top).sum() == dense.sum()
        assert sorted(strips.x.tolist()) == np.flatnonzero(dense[0]).tolist()
    else:
        with pytest.raises(ValueError, match="mask 0"):
            rle.parse_strips([text], size)
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
def test_faults_of_masks_of_users_are_named_and_never_raised(text, size, words) -> None:
    [fault] = rle.rle_faults([text], [size])
    assert re.search(words, fault)
    assert len(fault) < 100


def test_pycocotools_misreads_a_long_negative_number_and_we_refuse_it() -> None:
    short, long = "5b6d0iloooO", "5b6d0ilooooO"  # runs 5, 210, 20, 107: the same, one character longer
    assert rle.rle_faults([short], [[18, 19]]) == [None]
    assert int(coco_mask.area({"size": [18, 19], "counts": long.encode()})) != 210 + 107
    assert "too many characters" in rle.rle_faults([long], [[18, 19]])[0]


def test_uncompressed_runs_become_the_text_that_pycocotools_makes_of_them() -> None:
    lengths = [3, 0, 4, 70_000, 1, 2, 900_000]
    text = coco_mask.frPyObjects({"size": [1, sum(lengths)], "counts": lengths}, 1, sum(lengths))["counts"]
    assert rle.compress_lengths(lengths).encode() == text
    assert rle.compress_lengths([]) == ""
    for wrong in (-1, 1.5, "3", None, True, 2**31, 10**5000, [3]):
        with pytest.raises(ValueError, match="run 1 is no whole number"):
            rle.compress_lengths([1, wrong])
