"""The parts of "everything" beside their plain definitions, HQ-SAM 2's rule, settings and bad numbers."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from hqlabel.model.everything.duplicate_boxes import keep_best, pixel_boxes
from hqlabel.model.everything.everything import Everything, EverythingSegmenter
from hqlabel.model.everything.mask_edits import remove_small_regions, shift_masks
from hqlabel.model.everything.point_grid import PointGrid, crop_boxes, cut_crops
from hqlabel.model.masks import trace_masks, upsample_logits
from hqlabel.model.records import CallShape, Prompts, SegmentFailure
from hqlabel.model.rle import rle_to_mask
from hqlabel.model.segmenter import Segmenter
from tests.parity.hq_sam2_recipe import SMALL, model_of, picture
from tests.parity.lively import SMALL_VITS, lively, photo
from tests.parity.stand_ins import batched_nms, connected_components_with_stats

SHAPE = CallShape(images_per_call=2, boxes_per_call=4)


def counts_of(masks: np.ndarray) -> list[str]:
    return [coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode() for mask in masks]


def specks(count: int, height: int, width: int, seed: int) -> np.ndarray:
    """Masks of parts and holes of every size, a full and an empty one among them."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((count, height, width)) < rng.uniform(0.2, 0.8, (count, 1, 1))
    masks = np.repeat(np.repeat(coarse, 2, axis=1), 3, axis=2)[:, :height, :width]
    masks ^= rng.random(masks.shape) < 0.03
    masks[0], masks[1] = True, False
    return masks


def without_small_regions(mask: np.ndarray, smallest: int) -> tuple[np.ndarray, bool]:
    """By the definition, with labels of pixels: holes first, then parts, the largest of which stays."""
    _, labels, areas, _ = connected_components_with_stats((~mask).astype(np.uint8), 8)
    small = 1 + np.flatnonzero(areas[1:, -1] < smallest)
    filled = mask | np.isin(labels, small)
    _, labels, areas, _ = connected_components_with_stats(filled.astype(np.uint8), 8)
    large = 1 + np.flatnonzero(areas[1:, -1] >= smallest)
    changed = len(small) > 0 or len(large) < len(areas) - 1
    if not len(large) and len(areas) > 1:
        return np.isin(labels, large) if len(large) else labels > 0, changed
    return np.isin(labels, large), changed


@pytest.mark.parametrize("smallest", [3, 9, 10_000])
def test_small_regions_go_as_by_labelling_pixels(smallest: int) -> None:
    masks = specks(12, 14, 19, seed=smallest)
    cleaned, changed = remove_small_regions(counts_of(masks), (14, 19), smallest)
    for i, mask in enumerate(masks):
        expected, expected_change = without_small_regions(mask, smallest)
        found = rle_to_mask(cleaned.counts[i], (14, 19))
        assert changed[i] == expected_change
        assert cleaned.area[i] == found.sum()
        if smallest < 10_000:
            np.testing.assert_array_equal(found, expected)
        else:  # every part is small: one part, the largest, is left
            parts = connected_components_with_stats(expected.astype(np.uint8), 8)[2][1:, -1]
            assert found.sum() == parts.max(initial=0)
            assert not (found & ~expected).any()


def test_no_masks_have_no_small_regions() -> None:
    cleaned, changed = remove_small_regions([], (5, 6), 3)
    assert (cleaned.counts, len(cleaned.area), len(changed)) == ((), 0, 0)


def test_masks_of_a_crop_come_to_their_place_in_the_image() -> None:
    masks = specks(6, 9, 7, seed=1)
    for x, y, full_hw in ((0, 0, (9, 7)), (3, 2, (20, 31)), (24, 11, (20, 31)), (0, 11, (20, 7))):
        full = np.zeros((6, *full_hw), np.bool_)
        full[:, y : y + 9, x : x + 7] = masks
        assert list(shift_masks(counts_of(masks), (9, 7), (x, y), full_hw).counts()) == counts_of(full)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7, 1.0])
def test_duplicates_go_by_the_definition(threshold: float) -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 12, (200, 2, 2)), axis=1).reshape(200, 4).astype(np.float32)
    scores = rng.integers(0, 40, 200).astype(np.float32)  # many are equal, and some boxes have no area
    expected = batched_nms(torch.from_numpy(corners), torch.from_numpy(scores), torch.zeros(200), threshold)
    kept = keep_best(corners, scores, threshold)
    np.testing.assert_array_equal(kept, expected.numpy())
    assert 3 < len(kept) < 200 or threshold == 1.0


def test_boxes_of_pixels_of_an_empty_mask_are_zeros() -> None:
    boxes = pixel_boxes(np.array([[2, 3, 4, 5], [0, 0, 0, 0]], np.float32))
    np.testing.assert_array_equal(boxes, [[2, 3, 5, 7], [0, 0, 0, 0]])


def test_some_traced_masks_have_the_runs_that_all_of_them_have() -> None:
    logits = torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0))
    logits[1] = 1.0  # inside up to the last pixel
    traced = trace_masks(logits, resized_hw=(64, 50), size_hw=(33, 26))
    for kept in ([1, 0, 1, 1, 0], [0, 1, 0, 0, 1], [0] * 5, [1] * 5):
        keep = np.array(kept, dtype=np.bool_)
        texts = tuple(text for text, stays in zip(traced.runs().counts(), kept, strict=True) if stays)
        assert traced.take(keep).runs().counts() == texts


def test_an_image_of_a_few_pixels_has_no_empty_crops() -> None:
    for size_hw in ((1, 1), (1, 9), (3, 2)):
        boxes = [box for _, box in crop_boxes(size_hw, PointGrid(points_per_side=2, crop_layers=2))]
        assert all(x2 > x1 and y2 > y1 for x1, y1, x2, y2 in boxes)
        assert boxes[0] == (0, 0, size_hw[1], size_hw[0])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"points_per_side": 0}, "points_per_side is 0"),
        ({"points_per_side": 8.0}, "points_per_side is 8.0"),
        ({"crop_layers": -1}, "crop_layers is -1"),
        ({"crop_overlap": 1}, "crop_overlap is 1"),
        ({"pred_iou": float("nan")}, "pred_iou is nan"),
        ({"box_nms": 70}, "box_nms is 70"),
        ({"stability_offset": 0}, "stability_offset is 0"),
        ({"crop_layers": 3}, "87,040 points an image; wanted 20,000 at most"),
        ({"points_per_side": 10**6}, "points an image"),
        ({"crop_layers": 10**9, "points_downscale": 10**9}, "5 layers"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PointGrid(**settings)


def test_hq_sam_2_keeps_each_of_three_masks_of_a_point_by_its_own_scores() -> None:
    """By `SAM2AutomaticMaskGenerator`'s rule; every mask is judged at full size, as a picture."""
    model, image = model_of(SMALL, 9), picture(60, 88, 4)
    with torch.no_grad():
        segmenter = Segmenter(model, call_shape=SHAPE)
    grid = PointGrid(points_per_side=3, pred_iou=0.1, stability=0.6, stability_offset=0.3, box_nms=1.0)
    (answer,) = EverythingSegmenter(segmenter, grid).segment(
        [cut_crops(image, grid, side=model.config.image_size, fit=model.fit)]
    )
    assert isinstance(answer, Everything)

    points = grid.points_xy(0, (0, 0, 88, 60))
    prompts = Prompts(points_xy=points[:, None], point_labels=np.ones((9, 1), np.int64))
    crop = cut_crops(image, grid, side=model.config.image_size, fit=model.fit)[0]
    embedding = model.encode_prepared([crop.pixels_hwc], [(60, 88)])
    logits = model.decode_prompts(embedding, [prompts], multimask="three", prompts_per_call=4)
    full = upsample_logits(logits.low_res_NMHW.flatten(0, 1), None, (60, 88))
    iou = logits.predicted_iou_NM.flatten()
    stability = (full > 0.3).sum((1, 2)) / (full > -0.3).sum((1, 2))
    keep = (iou > 0.1) & (stability >= 0.6)
    order = iou[keep].argsort(descending=True, stable=True)

    assert 0 < len(order) < 27
    one = answer.instances
    np.testing.assert_allclose(one.predicted_iou, iou[keep][order].numpy(), atol=1e-6)
    np.testing.assert_allclose(one.stability_score, stability[keep][order].numpy(), atol=1e-5)
    np.testing.assert_array_equal(answer.points_xy, points.repeat(3, axis=0)[keep.numpy()][order.numpy()])
    for text, pixels in zip(one.counts, (full[keep][order] > 0).numpy(), strict=True):
        assert (rle_to_mask(text, (60, 88)) != pixels).sum() <= 1
    assert EverythingSegmenter(segmenter, PointGrid()).pred_iou == 0.8


def test_numbers_that_are_not_finite_cost_their_image_alone() -> None:
    model = lively(SMALL_VITS["grid16-window5"], seed=3)
    grid = PointGrid(points_per_side=2, pred_iou=0.0, stability=0.0, box_nms=1.0)
    images = [cut_crops(photo(40, 50, seed), grid, side=256, fit="pad") for seed in (0, 1)]
    everything = EverythingSegmenter(Segmenter(model, call_shape=SHAPE), grid)
    before = everything.segment(images)
    assert all(isinstance(answer, Everything) and answer.instances.counts for answer in before)
    encode = model.encode_prepared

    def broken(*args: object) -> object:
        embedding = encode(*args)  # type: ignore[arg-type]
        embedding.embedding_BCGG[1] = torch.nan
        return embedding

    model.encode_prepared = broken  # type: ignore[method-assign,assignment]
    first, second = everything.segment(images)
    assert isinstance(first, Everything)
    assert first.instances.counts == before[0].instances.counts
    assert isinstance(second, SegmentFailure)
    assert second.code == "non_finite"


def test_memory_that_runs_out_reduces_the_call_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(SMALL_VITS["grid16-window5"], seed=3)
    grid = PointGrid(points_per_side=2, pred_iou=0.0, stability=0.0, box_nms=1.0)
    images = [cut_crops(photo(40, 50, seed), grid, side=256, fit="pad") for seed in (0, 1)]
    everything = EverythingSegmenter(Segmenter(model, call_shape=SHAPE), grid)
    decode = model.decode_calls
    most = 1

    def short(*args: object, prompts_per_call: int, **options: object) -> object:
        if prompts_per_call > most:
            raise MemoryError
        return decode(*args, prompts_per_call=prompts_per_call, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "decode_calls", short)
    for answer in everything.segment(images):
        assert isinstance(answer, Everything)
        assert answer.instances.flags == ("reduced_call_shape",)
    most = 0
    for failed in everything.segment(images):
        assert isinstance(failed, SegmentFailure)
        assert failed.code == "out_of_memory"
