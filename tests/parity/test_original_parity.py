"""Our masks against those of the original package, with the same random weights.

What is compared are mask logits, not scores: a decoder that upscales the wrong tensor has right scores.
"""

import numpy as np
import pytest
import torch

from hqlabel.model.masks import upsample_logits
from hqlabel.model.records import Prompts, resize_longest_side
from hqlabel.model.sam_config import PUBLISHED, vit_config
from hqlabel.model.sam_hq import SamHQ
from tests.parity.lively import SMALL_TINY, SMALL_VITS, TINY, boxes_in, lively, photo, pixels_of
from tests.parity.oracle import original_of, predict_boxes, predictor_of

LOGITS = 2e-5  # of the largest reference logit
IOU = 1e-5
NEAR_ZERO = 1e-4

SIZES = [(97, 140), (140, 97), (333, 500), (2000, 333), (333, 2000)]


@pytest.fixture(scope="module", params=list(SMALL_VITS))
def small(request):
    model = lively(SMALL_VITS[request.param])
    return model, predictor_of(model)


def compare(model: SamHQ, predictor, image: np.ndarray, boxes: np.ndarray, tolerance: float = LOGITS) -> None:
    """Low-resolution logits, IoU and full-resolution masks of one image against the original's."""
    full, iou, low = predict_boxes(predictor, image, boxes)
    embedding = model.encode_images([image])
    ours = model.decode_boxes(embedding, [boxes])
    ours_full = upsample_logits(ours.low_res_NMHW[:, 0], embedding.resized_hw[0], embedding.sizes_hw[0])

    close(ours.low_res_NMHW, low, tolerance)
    assert (ours.predicted_iou_NM - iou).abs().max() <= IOU
    differing = ((ours_full > 0) != (full[:, 0] > 0)) & (full[:, 0].abs() > NEAR_ZERO)
    assert int(differing.sum()) == 0


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = LOGITS) -> None:
    assert ours.shape == reference.shape
    largest, difference = reference.abs().max().item(), (ours - reference).abs().max().item()
    assert difference <= tolerance * largest, f"differ by {difference:.2e}, largest logit {largest:.2f}"


@pytest.mark.parametrize("size_hw", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_three_boxes_give_the_originals_masks(small, size_hw):
    model, predictor = small

    compare(model, predictor, photo(*size_hw), boxes_in(*size_hw, 3))


@pytest.mark.parametrize("size_hw", [(97, 140), (140, 97)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_one_box_gives_the_originals_mask(small, size_hw):
    model, predictor = small

    compare(model, predictor, photo(*size_hw), boxes_in(*size_hw, 1))


@pytest.mark.parametrize("size_hw", [(97, 140), (2000, 333)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_seventy_boxes_give_the_originals_masks(size_hw):
    model = lively(SMALL_VITS["grid16-window5"])

    compare(model, predictor_of(model), photo(*size_hw), boxes_in(*size_hw, 70))


def test_the_comparison_would_see_a_box_in_another_place(small):
    model, _ = small
    image, boxes = photo(97, 140), boxes_in(97, 140, 2)
    embedding = model.encode_images([image])
    here = model.decode_boxes(embedding, [boxes]).low_res_NMHW
    moved = model.decode_boxes(embedding, [boxes + 0.25]).low_res_NMHW

    assert (here - moved).abs().max() > 50 * LOGITS * here.abs().max()
    assert 0.02 < (here > 0).float().mean() < 0.98


def test_a_window_larger_than_the_grid_gives_the_originals_masks():
    """As in a model for small pictures whose window was left at its default."""
    model = lively(
        vit_config(
            embed_dim=64, depth=3, num_heads=2, global_attn_indexes=(1,), window_size=14, image_size=128
        )
    )

    compare(model, predictor_of(model), photo(97, 140), boxes_in(97, 140, 3))


@pytest.mark.parametrize("name", list(SMALL_VITS))
def test_faint_activations_give_the_originals_masks_too(name):
    """With weights of 0.02 the variances are so small that a wrong epsilon in a norm shows."""
    model = SamHQ.from_config(SMALL_VITS[name], seed=3, position_std=0.5)

    compare(model, predictor_of(model), photo(97, 140), boxes_in(97, 140, 3), tolerance=5e-6)


@pytest.mark.parametrize("hq_token_only", [False, True])
@pytest.mark.parametrize("multimask", ["single", "best"])
def test_output_options_give_the_originals_masks(small, multimask, hq_token_only):
    model, predictor = small
    image, boxes = photo(97, 140), boxes_in(97, 140, 3)
    _, iou, low = predict_boxes(
        predictor, image, boxes, multimask_output=multimask == "best", hq_token_only=hq_token_only
    )
    ours = model.decode_boxes(
        model.encode_images([image]), [boxes], multimask=multimask, hq_token_only=hq_token_only
    )

    close(ours.low_res_NMHW, low)
    assert (ours.predicted_iou_NM - iou).abs().max() <= IOU


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("with_box", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_points_boxes_and_masks_give_the_originals_masks(small, count, with_box, with_mask):
    model, predictor = small
    image, rng = photo(140, 97), np.random.default_rng(1)
    points, labels = rng.random((count, 2)) * [97, 140], np.array([1, 0, -1, 1, 0])[:count]
    box = boxes_in(140, 97, 1)[0] if with_box else None
    mask = rng.normal(0, 5, (model.config.mask_size,) * 2).astype(np.float32) if with_mask else None
    predictor.set_image(image)
    _, iou, low = predictor.predict(
        points, labels, box, mask if mask is None else mask[None], multimask_output=False
    )
    prompts = Prompts(
        points_xy=points[None],
        point_labels=labels[None],
        boxes_xyxy=box if box is None else box[None],
        mask_logits=mask if mask is None else mask[None],
    )
    ours = model.decode_prompts(model.encode_images([image]), [prompts])

    close(ours.low_res_NMHW[0], torch.from_numpy(low))
    assert abs(ours.predicted_iou_NM[0, 0].item() - iou[0]) <= IOU


@pytest.mark.parametrize("hq_token_only", [False, True])
@pytest.mark.parametrize("multimask", ["single", "best"])
def test_several_prompts_of_several_points_give_the_originals_masks(small, multimask, hq_token_only):
    """The rows of a call differ in labels and padding; each has its own box or mask in the second call."""
    model, predictor = small
    image, rng = photo(90, 131), np.random.default_rng(5)
    points, boxes = rng.random((3, 5, 2)) * [131, 90], boxes_in(90, 131, 3)
    labels = np.array([[1, 0, -1, 1, 0], [1, 1, 0, -1, -1], [0, -1, 1, 0, 1]])
    masks = rng.normal(0, 6, (3, model.config.mask_size, model.config.mask_size)).astype(np.float32)
    predictor.set_image(image)
    embedding = model.encode_images([image])
    scale = predictor.transform
    scaled = torch.tensor(scale.apply_coords(points, image.shape[:2]), dtype=torch.float)
    scaled_boxes = torch.tensor(scale.apply_boxes(boxes, image.shape[:2]), dtype=torch.float)
    for with_box, with_mask in [(False, False), (True, True)]:
        _, iou, low = predictor.predict_torch(
            scaled,
            torch.from_numpy(labels),
            scaled_boxes if with_box else None,
            torch.from_numpy(masks)[:, None] if with_mask else None,
            multimask_output=multimask == "best",
            hq_token_only=hq_token_only,
        )
        prompts = Prompts(
            points_xy=points,
            point_labels=labels,
            boxes_xyxy=boxes if with_box else None,
            mask_logits=masks if with_mask else None,
        )
        ours = model.decode_prompts(embedding, [prompts], multimask=multimask, hq_token_only=hq_token_only)

        close(ours.low_res_NMHW, low)
        assert (ours.predicted_iou_NM - iou).abs().max() <= IOU


def test_a_mask_alone_gives_the_originals_mask(small):
    model, predictor = small
    image, side = photo(140, 97), model.config.mask_size
    mask = np.random.default_rng(2).normal(0, 5, (1, side, side)).astype(np.float32)
    predictor.set_image(image)
    _, _, low = predictor.predict(mask_input=mask, multimask_output=False)
    ours = model.decode_prompts(model.encode_images([image]), [Prompts(mask_logits=mask)])

    close(ours.low_res_NMHW[0], torch.from_numpy(low))


@torch.no_grad()
def test_the_encoders_two_outputs_are_the_originals(small):
    model, predictor = small
    image = photo(333, 200)
    predictor.set_image(image)
    ours = model.image_encoder(pixels_of(model, [image]))

    close(ours.embedding_BCGG, predictor.features)
    close(ours.early_BGGC, predictor.interm_features[0])


@pytest.mark.parametrize(
    "size_hw", [(427, 640), (333, 500), (2000, 333), (97, 140)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_the_encoder_sees_bit_for_bit_what_the_originals_does(size_hw):
    model = lively(SMALL_VITS["grid16-window5"])
    predictor, image = predictor_of(model), photo(*size_hw)
    resized = predictor.transform.apply_image(image)
    reference = predictor.model.preprocess(torch.as_tensor(resized).permute(2, 0, 1)[None])
    ours = model.preprocess([resize_longest_side(image, model.config.image_size)])

    assert torch.equal(ours, reference)


@pytest.fixture(scope="module")
def light():
    model = lively(TINY)
    return model, predictor_of(model)


@pytest.mark.parametrize(
    "size_hw",
    [pytest.param((97, 140), marks=pytest.mark.faults), (2000, 333)],
    ids=lambda s: f"{s[0]}x{s[1]}",
)
def test_light_hq_sam_gives_the_originals_masks(light, size_hw):
    model, predictor = light

    compare(model, predictor, photo(*size_hw), boxes_in(*size_hw, 2))


@torch.no_grad()
def test_light_hq_sams_early_feature_is_stage_1_after_its_downsampling(light):
    model, predictor = light
    predictor.set_image(photo(97, 140))
    ours = model.image_encoder(pixels_of(model, [photo(97, 140)]))

    close(ours.early_BGGC, predictor.interm_features[0])
    close(ours.embedding_BCGG, predictor.features)


@torch.no_grad()
def test_attention_biases_of_light_hq_sam_are_read_from_the_weights():
    """The original keeps a copy of them from before loading; ours must not."""
    model = lively(SMALL_TINY)
    image = photo(97, 140)
    before = model.image_encoder(pixels_of(model, [image])).embedding_BCGG
    biases = {n: torch.zeros_like(t) for n, t in model.state_dict().items() if n.endswith("attention_biases")}
    model.load_state_dict(biases, strict=False)

    assert (model.image_encoder(pixels_of(model, [image])).embedding_BCGG - before).abs().max() > 0.1


TWO_BLOCKS = vit_config(embed_dim=768, depth=2, num_heads=12, global_attn_indexes=(1,))


@pytest.mark.timeout(900)  # the whole one: about a minute and 4 GiB on a core of its own
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TWO_BLOCKS, id="a window and a global block"),
        pytest.param(PUBLISHED["vit_b"], id="all twelve", marks=pytest.mark.faults),
    ],
)
def test_blocks_of_vit_bs_size_give_the_originals_masks(config):
    model = lively(config)
    predictor = predictor_of(model)

    compare(model, predictor, photo(333, 500), boxes_in(333, 500, 3), tolerance=1e-4)


def test_the_original_is_not_a_copy_of_ours():
    """Guards the tests: the reference must not share tensors with the model it is compared to."""
    model = lively(SMALL_VITS["grid16-window5"])
    ours = {t.data_ptr() for t in model.state_dict().values()}

    assert not ours & {t.data_ptr() for t in original_of(model).state_dict().values()}
