"""Images and boxes to masks: the parts put together, equal bytes in any company, no image lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from hqlabel.model import rle, segmenter
from hqlabel.model.device import Dtype, HostThread
from hqlabel.model.records import (
    CallShape,
    Instances,
    PreparedImage,
    Prompts,
    SegmentFailure,
    resize_longest_side,
    target_size_hw,
)
from hqlabel.model.sam_config import vit_config
from hqlabel.model.sam_hq import PromptDecoder, SamHQ
from hqlabel.model.segmenter import Segmenter
from tests.model.plain_masks import coco_counts, plain_masks
from tests.parity.lively import lively

CONFIG = vit_config(
    embed_dim=32,
    depth=2,
    num_heads=2,
    global_attn_indexes=(1,),
    window_size=5,
    image_size=256,
    out_channels=64,
    mlp_dim=64,
)
SHAPE = CallShape(images_per_call=2, boxes_per_call=4)
SIZES_HW = [(97, 140), (240, 200), (60, 300), (256, 256), (31, 17)]


@pytest.fixture(scope="module")
def model() -> SamHQ:
    return lively(CONFIG)


@pytest.fixture
def segment_all(model: SamHQ) -> Segmenter:
    return Segmenter(model, call_shape=SHAPE)


def picture(size_hw: tuple[int, int], seed: int) -> np.ndarray:
    """Smooth colours with noise; no pixel is pure red (see `marked`)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(size_hw)
    waves = [np.sin(rows / 20 + k + seed) * np.cos(columns / (15 + k)) for k in range(3)]
    colours = 128 + 80 * np.stack(waves, axis=-1) + rng.normal(0, 10, (*size_hw, 3))
    return colours.clip(1, 250).astype(np.uint8)


def boxes_in(size_hw: tuple[int, int], number: int, seed: int) -> np.ndarray:
    corners = np.random.default_rng(seed).random((number, 2, 2)) * [size_hw[1], size_hw[0]]
    return np.concatenate([corners.min(1), corners.max(1) + 1], axis=1)


def prepared(size_hw: tuple[int, int], number: int, seed: int) -> PreparedImage:
    return PreparedImage(
        pixels_hwc=resize_longest_side(picture(size_hw, seed), 256),
        size_hw=size_hw,
        prompts=Prompts(boxes_xyxy=boxes_in(size_hw, number, seed)),
    )


def some_images() -> list[PreparedImage]:
    """Seven images of five sizes with 0 to 9 boxes: calls of every filling."""
    numbers = [5, 1, 0, 9, 3, 4, 2]
    return [prepared(SIZES_HW[i % 5], number, i) for i, number in enumerate(numbers)]


def marked(image: PreparedImage) -> PreparedImage:
    """The same image with pure red in its corner, by which a hook knows it."""
    pixels = image.pixels_hwc.copy()
    pixels[0, 0] = [255, 0, 0]
    return PreparedImage(pixels_hwc=pixels, size_hw=image.size_hw, prompts=image.prompts)


def is_marked(pixels_b3ss: torch.Tensor) -> torch.Tensor:
    red = torch.tensor([255.0, 0.0, 0.0])
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    return ((pixels_b3ss[:, :, 0, 0] - (red - mean) / std).abs() < 1e-4).all(1)


def as_bytes(result: Instances | SegmentFailure) -> tuple[Any, ...]:
    assert isinstance(result, Instances), result
    arrays = (result.area, result.bbox_xywh, result.predicted_iou, result.stability_score)
    return (result.size_hw, result.counts, result.flags, *[(a.dtype, a.shape, a.tobytes()) for a in arrays])


@contextmanager
def hooked(module: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_against_parts(model: SamHQ, image: PreparedImage, result: Instances, **options: Any) -> None:
    """Encode, decode, plain masks, pycocotools: what `Segmenter` has to come to."""
    embedding = model.encode_prepared([image.pixels_hwc] * 2, [image.size_hw] * 2)
    nothing = Prompts(boxes_xyxy=np.zeros((0, 4)))
    decoded = model.decode_prompts(embedding, [image.prompts, nothing], prompts_per_call=4, **options)
    reference = plain_masks(
        decoded.low_res_NMHW[:, 0], resized_hw=target_size_hw(image.size_hw, 256), size_hw=image.size_hw
    )
    np.testing.assert_array_equal(result.predicted_iou, decoded.predicted_iou_NM[:, 0])
    assert result.counts == coco_counts(reference.masks_NHW)
    np.testing.assert_array_equal(result.area, reference.area_N)
    np.testing.assert_array_equal(result.bbox_xywh, reference.bbox_xywh_N4)
    np.testing.assert_allclose(result.stability_score, reference.stability_score_N, atol=1e-4)


def test_results_are_those_of_the_parts_put_together(model: SamHQ, segment_all: Segmenter) -> None:
    images = some_images()
    results = segment_all.segment_prepared(images)
    areas = []
    for image, result in zip(images, results, strict=True):
        assert isinstance(result, Instances)
        assert result.size_hw == image.size_hw
        assert len(result.counts) == len(image.prompts.boxes_xyxy)
        assert result.flags == ()
        if result.counts:
            check_against_parts(model, image, result)
        areas += (result.area / (image.size_hw[0] * image.size_hw[1])).tolist()
    # The masks must have something to get wrong.
    assert len(areas) == 24
    assert sum(0.01 < area < 0.99 for area in areas) >= 12


def test_types_of_the_result(segment_all: Segmenter) -> None:
    for image in (prepared((97, 140), 3, 0), prepared((97, 140), 0, 0)):
        (result,) = segment_all.segment_prepared([image])
        assert isinstance(result, Instances)
        n = len(result.counts)
        assert all(type(text) is str and text.isascii() for text in result.counts)
        for array, dtype, shape in [
            (result.area, np.int64, (n,)),
            (result.bbox_xywh, np.float32, (n, 4)),
            (result.predicted_iou, np.float32, (n,)),
            (result.stability_score, np.float32, (n,)),
        ]:
            assert type(array) is np.ndarray
            assert array.dtype == dtype
            assert array.shape == shape


def test_plain_entry_resizes_as_the_pipeline_does(segment_all: Segmenter) -> None:
    pictures = [picture(size_hw, i) for i, size_hw in enumerate(SIZES_HW)]
    boxes: list[Any] = [boxes_in(size_hw, 3, i) for i, size_hw in enumerate(SIZES_HW)]
    boxes[1] = []
    plainly = segment_all.segment(pictures, boxes)
    ready = [
        PreparedImage(
            pixels_hwc=resize_longest_side(image, 256),
            size_hw=(image.shape[0], image.shape[1]),
            prompts=Prompts(boxes_xyxy=np.asarray(each, dtype=np.float64).reshape(-1, 4)),
        )
        for image, each in zip(pictures, boxes, strict=True)
    ]
    assert [as_bytes(r) for r in plainly] == [as_bytes(r) for r in segment_all.segment_prepared(ready)]


def test_pixels_are_normalised_and_then_padded(model: SamHQ) -> None:
    for size_hw in [(427, 640), (333, 500), (2000, 333)]:
        pixels = resize_longest_side(picture(size_hw, 1), 256)
        height, width = target_size_hw(size_hw, 256)
        tensor = model.preprocess([pixels])
        mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
        expected = ((pixels.astype(np.float64) - mean) / std).transpose(2, 0, 1)
        assert tensor.shape == (1, 3, 256, 256)
        np.testing.assert_allclose(tensor[0, :, :height, :width], expected, atol=1e-6)
        assert not tensor[0, :, height:].any()
        assert not tensor[0, :, :, width:].any()
        assert height == 256 or tensor[0, :, height:].numel()


def test_an_image_has_the_same_bytes_in_any_company(segment_all: Segmenter) -> None:
    images = some_images()
    together = [as_bytes(r) for r in segment_all.segment_prepared(images)]
    alone = [as_bytes(segment_all.segment_prepared([image])[0]) for image in images]
    assert together == alone
    order = [3, 6, 0, 5, 2, 1, 4]
    shuffled = segment_all.segment_prepared([images[i] for i in order])
    assert [as_bytes(r) for r in shuffled] == [together[i] for i in order]
    again = [as_bytes(r) for r in segment_all.segment_prepared(images)]
    assert again == together


def test_in_bfloat16_an_image_has_the_same_bytes_in_any_company_and_on_any_threads() -> None:
    segmenter = Segmenter(lively(CONFIG), call_shape=SHAPE, dtype="bfloat16")
    images = some_images()
    together = [as_bytes(r) for r in segmenter.segment_prepared(images)]
    assert [as_bytes(segmenter.segment_prepared([image])[0]) for image in images] == together
    torch.set_num_threads(2)
    try:
        assert [as_bytes(r) for r in segmenter.segment_prepared(images)] == together
    finally:
        torch.set_num_threads(1)


def test_boxes_in_another_order_give_the_same_masks_in_that_order(segment_all: Segmenter) -> None:
    image = prepared((240, 200), 11, 3)
    (result,) = segment_all.segment_prepared([image])
    order = np.random.default_rng(0).permutation(11)
    moved = PreparedImage(
        pixels_hwc=image.pixels_hwc,
        size_hw=image.size_hw,
        prompts=Prompts(boxes_xyxy=image.prompts.boxes_xyxy[order]),
    )
    (permuted,) = segment_all.segment_prepared([moved])
    assert isinstance(result, Instances)
    assert isinstance(permuted, Instances)
    assert permuted.counts == tuple(result.counts[i] for i in order)
    np.testing.assert_array_equal(permuted.predicted_iou, result.predicted_iou[order])
    np.testing.assert_array_equal(permuted.stability_score, result.stability_score[order])


def test_threads_do_not_change_bytes(segment_all: Segmenter) -> None:
    images = some_images()[:2]
    one = [as_bytes(r) for r in segment_all.segment_prepared(images)]
    torch.set_num_threads(2)
    try:
        assert [as_bytes(r) for r in segment_all.segment_prepared(images)] == one
    finally:
        torch.set_num_threads(1)


def test_prompts_of_all_kinds_in_one_batch(model: SamHQ, segment_all: Segmenter) -> None:
    base = prepared((97, 140), 3, 0)
    points = np.array([[[10.0, 20.0], [100.0, 50.0]], [[70.0, 40.0], [5.0, 5.0]], [[60.0, 60.0], [1.0, 2.0]]])
    labels = np.array([[1, 0], [1, -1], [1, 1]])
    logits = np.random.default_rng(0).normal(0, 3, (3, 64, 64)).astype(np.float32)
    kinds = [
        base.prompts,
        Prompts(points_xy=points, point_labels=labels),
        Prompts(boxes_xyxy=base.prompts.boxes_xyxy, points_xy=points, point_labels=labels),
        Prompts(boxes_xyxy=base.prompts.boxes_xyxy, mask_logits=logits),
        Prompts(points_xy=points[:2, :1], point_labels=labels[:2, :1]),
    ]
    images = [
        PreparedImage(pixels_hwc=base.pixels_hwc, size_hw=base.size_hw, prompts=prompts) for prompts in kinds
    ]
    results = segment_all.segment_prepared(images)
    for image, result in zip(images, results, strict=True):
        assert isinstance(result, Instances)
        check_against_parts(model, image, result)
        assert as_bytes(result) == as_bytes(segment_all.segment_prepared([image])[0])
    assert len({as_bytes(result) for result in results}) == 5


@pytest.mark.parametrize(
    "options", [{"multimask": "best"}, {"hq_token_only": True}, {"multimask": "best", "hq_token_only": True}]
)
def test_other_modes_of_the_decoder(model: SamHQ, options: dict[str, Any]) -> None:
    image = prepared((97, 140), 6, 2)
    (result,) = Segmenter(model, call_shape=SHAPE, **options).segment_prepared([image])
    assert isinstance(result, Instances)
    check_against_parts(model, image, result, **options)
    (usual,) = Segmenter(model, call_shape=SHAPE).segment_prepared([image])
    assert as_bytes(usual) != as_bytes(result)


def test_the_stability_offset_reaches_the_masks(model: SamHQ) -> None:
    image = prepared((97, 140), 6, 2)
    results = [
        Segmenter(model, call_shape=SHAPE, **options).segment_prepared([image])[0]
        for options in ({}, {"stability_offset": 0.1})
    ]
    usual, closer = results
    assert isinstance(usual, Instances)
    assert isinstance(closer, Instances)
    assert closer.counts == usual.counts
    assert (closer.stability_score >= usual.stability_score).all()
    assert closer.stability_score.sum() > usual.stability_score.sum()


def test_images_without_boxes_never_reach_the_encoder(model: SamHQ, segment_all: Segmenter) -> None:
    calls: list[int] = []
    with hooked(model.image_encoder, lambda _, args, __: calls.append(len(args[0]))):
        empty = segment_all.segment_prepared([prepared((97, 140), 0, i) for i in range(5)])
        assert segment_all.segment_prepared([]) == []
        assert segment_all.segment([], []) == []
        assert calls == []
        mixed = segment_all.segment_prepared([prepared((97, 140), n, n) for n in (0, 1, 0, 2, 3)])
    assert [len(r.counts) for r in empty if isinstance(r, Instances)] == [0] * 5
    assert [len(r.counts) for r in mixed if isinstance(r, Instances)] == [0, 1, 0, 2, 3]
    # Three images with boxes, two a call, the second call filled up.
    assert calls == [2, 2]


def test_every_call_has_the_configured_shape_and_ends_in_runs_before_the_next(
    model: SamHQ, segment_all: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    trace = segmenter.trace_masks

    def record_trace(logits: torch.Tensor, **options: Any) -> Any:
        events.append(f"masks {len(logits)}")
        return trace(logits, **options)

    monkeypatch.setattr(segmenter, "trace_masks", record_trace)
    with (
        hooked(model.image_encoder, lambda _, args, __: events.append(f"encode {len(args[0])}")),
        hooked(
            model.mask_decoder.iou_prediction_head,
            lambda _, args, __: events.append(f"decode {len(args[0])}"),
        ),
    ):
        segment_all.segment_prepared([prepared((97, 140), 5, 0), prepared((240, 200), 6, 1)])
    assert events == [
        "encode 2",
        *["decode 4", "masks 4"],
        *["decode 4", "masks 1", "masks 3"],
        *["decode 4", "masks 3"],
    ]


def run_out(error: Callable[[], BaseException], when: Callable[[torch.Tensor], bool]) -> Callable[..., None]:
    """A hook of the image encoder that fails as an allocator does, when its call is such."""

    def hook(_: torch.nn.Module, args: Sequence[torch.Tensor], __: Any) -> None:
        if when(args[0]):
            raise error()

    return hook


def allocator_error() -> BaseException:
    try:
        torch.empty(10**15)
    except RuntimeError as error:
        return error
    raise AssertionError("a petabyte was allocated")


ERRORS = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    allocator_error,
    MemoryError,
]


@pytest.mark.parametrize("error", ERRORS)
def test_memory_that_runs_out_once_changes_nothing(
    model: SamHQ, segment_all: Segmenter, error: Callable[[], BaseException]
) -> None:
    images = some_images()
    expected = [as_bytes(r) for r in segment_all.segment_prepared(images)]
    calls = iter(range(100))
    with hooked(model.image_encoder, run_out(error, lambda _: next(calls) == 1)):
        results = segment_all.segment_prepared(images)
    assert [as_bytes(r) for r in results] == expected


@pytest.mark.parametrize("error", ERRORS)
def test_an_image_too_large_for_the_call_is_redone_smaller_and_flagged(
    model: SamHQ, segment_all: Segmenter, error: Callable[[], BaseException]
) -> None:
    images = some_images()
    images[3] = marked(images[3])
    expected = [as_bytes(r) for r in segment_all.segment_prepared(images)]
    reduced = CallShape(images_per_call=1, boxes_per_call=1)
    (smaller,) = Segmenter(model, call_shape=reduced).segment_prepared([images[3]])
    with hooked(model.image_encoder, run_out(error, lambda x: len(x) > 1 and bool(is_marked(x).any()))):
        results = segment_all.segment_prepared(images)
    flagged = results[3]
    assert isinstance(flagged, Instances)
    assert isinstance(smaller, Instances)
    assert flagged.flags == ("reduced_call_shape",)
    assert as_bytes(flagged)[1] == smaller.counts
    np.testing.assert_array_equal(flagged.predicted_iou, smaller.predicted_iou)
    for i in (0, 1, 2, 4, 5, 6):
        assert as_bytes(results[i]) == expected[i]


def test_memory_that_runs_out_while_decoding_is_redone_with_fewer_boxes(
    model: SamHQ, segment_all: Segmenter
) -> None:
    images = some_images()
    expected = [as_bytes(r) for r in segment_all.segment_prepared(images)]

    def hook(_: torch.nn.Module, args: Sequence[torch.Tensor], __: Any) -> None:
        if len(args[0]) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with hooked(model.mask_decoder.iou_prediction_head, hook):
        results = segment_all.segment_prepared(images)
    for i, result in enumerate(results):
        assert isinstance(result, Instances)
        assert result.flags == (("reduced_call_shape",) if len(result.counts) else ())
        if not len(result.counts):
            assert as_bytes(result) == expected[i]


def test_memory_that_never_suffices_fails_that_image_alone(model: SamHQ, segment_all: Segmenter) -> None:
    images = some_images()
    images[3] = marked(images[3])
    expected = [as_bytes(r) for r in segment_all.segment_prepared(images) if isinstance(r, Instances)]
    with hooked(model.image_encoder, run_out(ERRORS[0], lambda x: bool(is_marked(x).any()))):
        results = segment_all.segment_prepared(images)
    failure = results[3]
    assert isinstance(failure, SegmentFailure)
    assert failure.code == "out_of_memory"
    assert "256x256" in failure.message
    for i in (0, 1, 2, 4, 5, 6):
        assert as_bytes(results[i]) == expected[i]
    assert [as_bytes(r) for r in segment_all.segment_prepared(images)] == expected


def test_other_errors_are_not_taken_for_memory(model: SamHQ, segment_all: Segmenter) -> None:
    hook = run_out(lambda: RuntimeError("device-side assert triggered"), lambda _: True)
    with hooked(model.image_encoder, hook), pytest.raises(RuntimeError, match="device-side assert"):
        segment_all.segment_prepared(some_images())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_fail_that_image_alone(
    model: SamHQ, segment_all: Segmenter, poison: float
) -> None:
    images = some_images()
    images[3] = marked(images[3])
    expected = [as_bytes(r) for r in segment_all.segment_prepared(images)]

    def spoil(_: torch.nn.Module, args: Sequence[torch.Tensor], features: Any) -> None:
        features.embedding_BCGG[is_marked(args[0]), :, 3, 3] = poison

    with hooked(model.image_encoder, spoil):
        results = segment_all.segment_prepared(images)
    failure = results[3]
    assert isinstance(failure, SegmentFailure)
    assert failure.code == "non_finite"
    for i in (0, 1, 2, 4, 5, 6):
        assert as_bytes(results[i]) == expected[i]


def boxes_as_bytes(result: Instances | SegmentFailure, rows: Sequence[int]) -> list[tuple[Any, ...]]:
    assert isinstance(result, Instances)
    return [
        (
            result.counts[row],
            result.area[row],
            result.bbox_xywh[row].tobytes(),
            result.predicted_iou[row].tobytes(),
            result.stability_score[row].tobytes(),
        )
        for row in rows
    ]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["score", "one logit"])
def test_numbers_that_are_not_finite_fail_their_box_alone(
    model: SamHQ, segment_all: Segmenter, monkeypatch: pytest.MonkeyPatch, where: str, poison: float
) -> None:
    """Row 2 of every call of the decoder is spoilt: a box of the second image, not one of the first."""
    images = [prepared((97, 140), 2, 0), prepared((97, 140), 6, 1)]
    expected = segment_all.segment_prepared(images)
    calls = -(-8 // segment_all.call_shape.boxes_per_call)
    spoilt = [row for row in range(8) if row % segment_all.call_shape.boxes_per_call == 2]
    decode, seen = PromptDecoder.decode, list[int]()

    def spoil(self: PromptDecoder, chunk: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, scores = decode(self, chunk)
        seen.append(1)
        (scores if where == "score" else logits[:, :, 5, 7])[2, 0] = poison
        return logits, scores

    monkeypatch.setattr(PromptDecoder, "decode", spoil)
    found = segment_all.segment_prepared(images)

    assert len(seen) == calls
    assert spoilt
    for one, wanted, first in zip(found, expected, (0, 2), strict=True):
        assert isinstance(one, Instances)
        assert isinstance(wanted, Instances)
        bad = [row - first for row in spoilt if 0 <= row - first < len(one.counts)]
        good = [row for row in range(len(one.counts)) if row not in bad]
        assert np.flatnonzero(np.isnan(one.predicted_iou)).tolist() == bad
        assert boxes_as_bytes(one, good) == boxes_as_bytes(wanted, good)
        for row in bad:
            assert (one.area[row], one.stability_score[row]) == (0, 0)
            assert not rle.rle_to_mask(one.counts[row], one.size_hw).any()


def test_logits_whose_sum_alone_is_not_finite_are_sound(model: SamHQ, segment_all: Segmenter) -> None:
    low = torch.full((2, 64, 64), 3e38)
    low[0, :32] = -3e38
    found = segment_all._trace(low, torch.tensor([0.5, float("nan")]), (256, 256), (40, 40)).result()

    assert found.area.tolist() == [800, 0]
    assert np.isnan(found.predicted_iou).tolist() == [False, True]


def test_bfloat16_gives_nearly_the_masks_of_float32() -> None:
    images = some_images()
    results = {
        dtype: Segmenter(lively(CONFIG), call_shape=SHAPE, dtype=dtype).segment_prepared(images)
        for dtype in ("float32", "bfloat16")
    }
    ious = []
    for full, half in zip(results["float32"], results["bfloat16"], strict=True):
        assert isinstance(full, Instances)
        assert isinstance(half, Instances)
        for one, other in zip(full.counts, half.counts, strict=True):
            a, b = rle.rle_to_mask(one, full.size_hw), rle.rle_to_mask(other, full.size_hw)
            ious += [(a & b).sum() / (a | b).sum()] if a.any() else []
        assert half.predicted_iou.dtype == np.float32
    assert 0.9 < np.mean(ious) < 1


def test_what_cannot_be_right_is_refused_before_anything_runs(model: SamHQ, segment_all: Segmenter) -> None:
    good = prepared((97, 140), 2, 0)
    wrong_size = PreparedImage(pixels_hwc=good.pixels_hwc, size_hw=(140, 97), prompts=good.prompts)
    nan_box = PreparedImage(
        pixels_hwc=good.pixels_hwc,
        size_hw=good.size_hw,
        prompts=Prompts(boxes_xyxy=np.array([[0.0, 0.0, np.nan, 5.0]])),
    )
    calls: list[int] = []
    with hooked(model.image_encoder, lambda *_: calls.append(1)):
        with pytest.raises(ValueError, match=r"image 3 of upright size \(140, 97\).*wanted \(256, 177\)"):
            segment_all.segment_prepared([good, good, good, wrong_size])
        with pytest.raises(ValueError, match=r"prompts of image 1.*not finite"):
            segment_all.segment_prepared([good, nan_box])
        with pytest.raises(ValueError, match="too_elongated"):
            segment_all.segment([np.zeros((1, 600, 3), np.uint8)], [[[0, 0, 5, 1]]])
        with pytest.raises(ValueError, match="uint8"):
            segment_all.segment([np.zeros((30, 60), np.uint8)], [[[0, 0, 5, 1]]])
        with pytest.raises(ValueError, match="shape"):
            segment_all.segment([np.zeros((30, 60, 3), np.uint8)], [[[0, 0, 5]]])
        with pytest.raises(ValueError, match=r"shape \(0, 5\); wanted \(N, 4\)"):
            segment_all.segment([np.zeros((30, 60, 3), np.uint8)], [np.zeros((0, 5))])
    assert calls == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"multimask": "three"}, "'three'"),
        ({"stability_offset": 0.0}, "stability_offset"),
        ({"stability_offset": float("inf")}, "stability_offset"),
    ],
)
def test_settings_outside_their_range_are_refused(
    model: SamHQ, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Segmenter(model, call_shape=SHAPE, **settings)


@pytest.mark.parametrize("name", ["images_per_call", "boxes_per_call"])
def test_a_call_shape_is_at_least_1(name: str) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CallShape(**{name: 0})


def test_reduced_shape_is_one_image_and_a_quarter_of_the_boxes() -> None:
    for boxes, fewer in [(64, 16), (16, 4), (3, 1), (1, 1)]:
        shape = segmenter.reduced_shape(CallShape(images_per_call=4, boxes_per_call=boxes))
        assert shape == CallShape(images_per_call=1, boxes_per_call=fewer)


def test_runs_made_in_another_thread_are_the_same(segment_all: Segmenter, model: SamHQ) -> None:
    aside = Segmenter(model, call_shape=SHAPE)
    aside._host_thread = HostThread(own_thread=True)  # as on a GPU

    found = [as_bytes(result) for result in aside.segment_prepared(some_images())]

    assert found == [as_bytes(result) for result in segment_all.segment_prepared(some_images())]


def test_compiled_calls_are_refused_on_a_cpu(model: SamHQ) -> None:
    with pytest.raises(ValueError, match="compiled calls are for CUDA devices; the device is 'cpu'"):
        Segmenter(model, call_shape=SHAPE, compiled=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_cuda_an_image_has_the_same_bytes_in_any_company(dtype: Dtype) -> None:
    segment_all = Segmenter(lively(CONFIG), call_shape=SHAPE, device="cuda", dtype=dtype)
    images = some_images()
    together = [as_bytes(r) for r in segment_all.segment_prepared(images)]
    assert together == [as_bytes(segment_all.segment_prepared([image])[0]) for image in images]
    assert together[::-1] == [as_bytes(r) for r in segment_all.segment_prepared(images[::-1])]
