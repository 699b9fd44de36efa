"""HQ-SAM 2 behind the interface that every family has: `Segmenter`, its prompts, bytes and one resize."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hqlabel.model.device import compile_calls
from hqlabel.model.hq_sam2.hq_sam2 import HQSam2, is_stable
from hqlabel.model.mask_decoder import TokenMasks
from hqlabel.model.masks import trace_masks, upsample_logits
from hqlabel.model.prompt_encoder import mask_to_prompt
from hqlabel.model.records import CallShape, Instances, PreparedImage, Prompts, fit_image, target_size_hw
from hqlabel.model.rle import rle_to_mask
from hqlabel.model.segmenter import Segmenter
from tests.model.plain_masks import coco_counts
from tests.parity.hq_sam2_recipe import SMALL, model_of, picture

SHAPE = CallShape(images_per_call=2, boxes_per_call=4)
SIZES_HW = [(180, 320), (97, 60), (256, 256), (40, 300)]


@pytest.fixture(scope="module")
def model() -> HQSam2:
    return model_of(SMALL, 9)


@pytest.fixture(scope="module")
def segmenter(model: HQSam2) -> Segmenter:
    return Segmenter(model, call_shape=SHAPE)


def boxes_in(size_hw: tuple[int, int], number: int, seed: int) -> np.ndarray:
    corners = np.random.default_rng(seed).random((number, 2, 2)) * [size_hw[1], size_hw[0]]
    return np.concatenate([corners.min(1), corners.max(1) + 1], axis=1)


def prepared(size_hw: tuple[int, int], prompts: Prompts, seed: int = 0) -> PreparedImage:
    pixels = fit_image(picture(*size_hw, seed), 256, "stretch")
    return PreparedImage(pixels_hwc=pixels, size_hw=size_hw, prompts=prompts)


def some_images() -> list[PreparedImage]:
    """Boxes of four images in calls of every filling, points alone, a box with points, and a mask."""
    counts = [5, 1, 0, 3]
    images = [
        prepared(size_hw, Prompts(boxes_xyxy=boxes_in(size_hw, count, i)), seed=i)
        for i, (size_hw, count) in enumerate(zip(SIZES_HW, counts, strict=True))
    ]
    size_hw = SIZES_HW[0]
    points = np.array([[[160.0, 90], [20, 20]], [[40.0, 50], [300, 170]]])
    labels = np.array([[1, 0], [1, 1]])
    inside = np.zeros(size_hw, bool)
    inside[40:120, 60:200] = True
    mask = mask_to_prompt(inside, side=256, fit="stretch")[None]
    more = [
        Prompts(points_xy=points, point_labels=labels),
        Prompts(boxes_xyxy=boxes_in(size_hw, 2, 7), points_xy=points, point_labels=labels),
        Prompts(boxes_xyxy=boxes_in(size_hw, 1, 8), mask_logits=mask),
        Prompts(mask_logits=mask),
    ]
    return images + [prepared(size_hw, prompts) for prompts in more]


def as_bytes(result: Any) -> tuple[Any, ...]:
    assert isinstance(result, Instances), result
    arrays = (result.area, result.bbox_xywh, result.predicted_iou, result.stability_score)
    return (result.size_hw, result.counts, result.flags, *[array.tobytes() for array in arrays])


def test_a_prepared_image_has_both_sides_and_no_padding(segmenter: Segmenter) -> None:
    assert (segmenter.input_side, segmenter.fit) == (256, "stretch")
    for size_hw in [(40, 900), (900, 40), (256, 256), (30, 40)]:
        assert target_size_hw(size_hw, 256, "stretch") == (256, 256)
        assert fit_image(picture(*size_hw, 0), 256, "stretch").shape == (256, 256, 3)
    padded = PreparedImage(
        pixels_hwc=np.zeros((144, 256, 3), np.uint8),
        size_hw=(180, 320),
        prompts=Prompts(boxes_xyxy=np.array([[0.0, 0, 9, 9]])),
    )
    with pytest.raises(ValueError, match=r"wanted \(256, 256\)"):
        segmenter.segment_prepared([padded])
    with pytest.raises(ValueError, match="each of its sides must be 256"):
        segmenter.model.preprocess([padded.pixels_hwc])


def test_a_strip_that_padding_would_leave_without_pixels_is_segmented(segmenter: Segmenter) -> None:
    image = np.random.default_rng(0).integers(0, 255, (2, 2000, 3), dtype=np.uint8)
    (result,) = segmenter.segment([image], [[[100, 0, 900, 2]]])
    assert isinstance(result, Instances)
    assert result.size_hw == (2, 2000)


@torch.no_grad()
def test_results_are_those_of_the_parts_put_together(model: HQSam2, segmenter: Segmenter) -> None:
    images = some_images()
    filled = 0
    for image, result in zip(images, segmenter.segment_prepared(images), strict=True):
        assert isinstance(result, Instances)
        if not result.counts:
            continue
        embedding = model.encode_prepared([image.pixels_hwc], [image.size_hw])
        decoded = model.decode_prompts(embedding, [image.prompts], prompts_per_call=4)
        logits = upsample_logits(decoded.low_res_NMHW[:, 0], None, image.size_hw)
        assert result.counts == coco_counts(logits > 0)
        np.testing.assert_array_equal(result.predicted_iou, decoded.predicted_iou_NM[:, 0])
        filled += int(((result.area > 0) & (result.area < logits[0].numel())).sum())
    assert filled >= 8


def test_an_image_has_the_same_bytes_in_any_company(segmenter: Segmenter) -> None:
    images = some_images()
    together = [as_bytes(result) for result in segmenter.segment_prepared(images)]
    alone = [as_bytes(segmenter.segment_prepared([image])[0]) for image in images]
    assert together == alone
    order = [3, 6, 0, 5, 2, 7, 1, 4]
    shuffled = segmenter.segment_prepared([images[i] for i in order])
    assert [as_bytes(result) for result in shuffled] == [together[i] for i in order]


@pytest.mark.parametrize("multimask", ["single", "best"])
@pytest.mark.parametrize("hq_token_only", [False, True])
def test_the_options_reach_the_masks(model: HQSam2, multimask: Any, hq_token_only: bool) -> None:
    images = some_images()[:1]
    options = {"multimask": multimask, "hq_token_only": hq_token_only}
    (result,) = Segmenter(model, call_shape=SHAPE, **options).segment_prepared(images)
    assert isinstance(result, Instances)
    embedding = model.encode_prepared([images[0].pixels_hwc], [images[0].size_hw])
    decoded = model.decode_prompts(embedding, [images[0].prompts], prompts_per_call=4, **options)
    logits = upsample_logits(decoded.low_res_NMHW[:, 0], None, images[0].size_hw)
    assert result.counts == coco_counts(logits > 0)
    np.testing.assert_array_equal(result.predicted_iou, decoded.predicted_iou_NM[:, 0])


def test_bfloat16_keeps_positions_and_logits_whole_and_masks_nearly_the_same() -> None:
    image = picture(180, 320, 11)
    boxes = boxes_in((180, 320), 3, 1)
    exact, rounded = model_of(SMALL, 9), model_of(SMALL, 9).cast(torch.bfloat16)
    ours, theirs = (
        one.decode_boxes(one.encode_images([image]), [boxes], multimask="three") for one in (rounded, exact)
    )
    assert {p.dtype for p in rounded.prompt_encoder.parameters()} == {torch.float32}
    assert rounded.image_encoder.no_mem_embed.dtype == torch.bfloat16
    assert ours.low_res_NMHW.dtype == ours.predicted_iou_NM.dtype == torch.float32
    same = ((ours.low_res_NMHW > 0) == (theirs.low_res_NMHW > 0)).float().mean()
    assert same > 0.97


def test_rounding_the_resized_image_to_8_bits_moves_few_pixels(model: HQSam2) -> None:
    image, boxes = picture(400, 250, 12), [boxes_in((400, 250), 4, 2)]
    floats = model.decode_boxes(model.encode_images([image]), boxes)
    embedding = model.encode_prepared([fit_image(image, 256, "stretch")], [(400, 250)])
    bytes_ = model.decode_boxes(embedding, boxes)
    differ = ((floats.low_res_NMHW > 0) != (bytes_.low_res_NMHW > 0)).float().mean()
    assert 0 < differ < 0.005


def test_a_mask_prompt_is_stretched_as_the_image_is(segmenter: Segmenter) -> None:
    inside = np.zeros((100, 50), np.uint8)
    inside[50:] = 1
    (counts,) = coco_counts([inside])
    logits = segmenter.mask_prompt(counts, (100, 50))
    assert logits.shape == (64, 64)
    assert (logits[:31] < 0).all()
    assert (logits[33:] > 0).all()


def some_tokens(token_0: torch.Tensor, ious: list[float]) -> TokenMasks:
    """Token 0's logits as given; of tokens 1 to 3, and of HQ, constants by which they are known."""
    others = [torch.full_like(token_0, 10.0 * k) for k in (1, 2, 3)]
    return TokenMasks(
        sam_NKHW=torch.stack([token_0, *others])[None],
        hq_NHW=torch.full_like(token_0, 100.0)[None],
        predicted_iou_N4=torch.tensor([ious]),
    )


def test_a_stable_token_0_is_the_single_mask_and_an_unstable_one_gives_way_to_the_best(model: HQSam2) -> None:
    stable = torch.full((10, 10), 3.0)
    unstable = stable.clone()
    unstable[0, :3] = 0.01  # 97 over +0.05, 100 over -0.05
    empty = torch.full((10, 10), -3.0)
    assert is_stable(torch.stack([stable, unstable, empty])).tolist() == [True, False, True]
    ious = [0.1, 0.7, 0.9, 0.9]

    def chosen(token_0: torch.Tensor, **options: Any) -> tuple[list[float], list[float]]:
        tokens = some_tokens(token_0, ious)
        needed = model.tokens_needed(options["multimask"], options["hq_token_only"])
        some = TokenMasks(
            sam_NKHW=tokens.sam_NKHW[:, list(needed)],
            hq_NHW=tokens.hq_NHW,
            predicted_iou_N4=tokens.predicted_iou_N4,
        )
        masks, scores = model.choose_masks(some, **options)
        return masks[0, :, -1, -1].tolist(), [round(x, 3) for x in scores[0].tolist()]

    single, best, three = ({"multimask": m, "hq_token_only": False} for m in ("single", "best", "three"))
    assert chosen(stable, **single) == ([103.0], [0.1])
    assert chosen(unstable, **single) == ([120.0], [0.9])  # of equal ones the first
    assert chosen(stable, **best) == ([120.0], [0.9])
    assert chosen(unstable, **three) == ([110.0, 120.0, 130.0], [0.7, 0.9, 0.9])
    single, three = ({"multimask": m, "hq_token_only": True} for m in ("single", "three"))
    assert chosen(stable, **single) == ([100.0], [0.1])
    assert chosen(unstable, **single) == ([100.0], [0.9])
    assert chosen(stable, **three) == ([100.0] * 3, [0.7, 0.9, 0.9])


@pytest.mark.parametrize("size_hw", [(180, 320), (97, 60), (33, 700), (64, 64), (1, 1), (1500, 900)])
def test_masks_are_traced_in_one_bilinear_step(size_hw: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    low = torch.nn.functional.interpolate(
        torch.randn(1, 3, 9, 9, generator=generator), (64, 64), mode="bicubic"
    )[0]
    noise = torch.randn(1, 64, 64, generator=generator)  # nearly every tile is crossed
    logits = torch.cat([low, noise])
    frames = upsample_logits(logits, None, size_hw)
    traced = trace_masks(logits, resized_hw=None, size_hw=size_hw)
    sure = (frames.abs() > 1e-4).numpy()
    masks = np.stack([rle_to_mask(text, size_hw) for text in traced.runs().counts()])
    assert ((masks == (frames > 0).numpy()) | ~sure).all()
    above, below = ((frames > x).sum((1, 2)) for x in (1.0, -1.0))
    np.testing.assert_allclose(traced.stability_score, above / below.clamp(min=1), atol=2e-3)


def answer(model: HQSam2) -> tuple[torch.Tensor, ...]:
    """The embedding of two pictures and what the decoder says of some boxes, on the model's device."""
    decoder, device = model.mask_decoder, model.device
    embedding, *features = model.embed(torch.zeros(2, 3, 256, 256, dtype=model.dtype, device=device))
    shared = decoder.share(
        embedding_BCGG=embedding,
        features=tuple(features),
        dense_BCGG=model.prompt_encoder.no_mask(),
        image_pe_1CGG=model.prompt_encoder.image_pe(),
    )
    sparse, _ = model.prompt_encoder(boxes_N4=torch.zeros(4, 4, device=device))
    tokens, image = decoder.tokens_and_images(shared, sparse, torch.tensor([0, 0, 1, 1]))
    assert tokens.shape[1] == decoder.tokens_of_a_box == 10
    finer = tuple(x[[0, 0, 1, 1]] for x in features)
    return embedding, *features, *decoder.decode_tokens(tokens, image, shared.terms, finer, (0, 1, 2, 3))


@torch.no_grad()
def test_whatever_is_no_cpu_computes_on_itself_alone_and_is_compiled_as_a_whole() -> None:
    """PyTorch's meta device has no values to wait for."""
    here = answer(model_of(SMALL, 9).cast(torch.bfloat16))
    there_model = model_of(SMALL, 9).cast(torch.bfloat16).to("meta")
    there = answer(there_model)
    assert [(x.shape, x.dtype) for x in there] == [(x.shape, x.dtype) for x in here]

    def again(run: Any) -> Any:
        return run(), lambda: None

    torch.compiler.reset()
    compile_calls(there_model, SHAPE, (0, 1, 2, 3), backend="aot_eager", record=again)
    assert {x.device.type for x in answer(there_model)} == {"meta"}
