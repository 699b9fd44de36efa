import numpy as np
import pytest
import torch

from hqlabel.model.records import Prompts, resize_longest_side
from hqlabel.model.sam_config import vit_config
from hqlabel.model.sam_hq import SamHQ
from tests.parity.lively import SMALL_TINY, SMALL_VITS, boxes_in, lively, photo, pixels_of

SIZES = [(97, 140), (60, 60), (200, 70)]
COUNTS = [2, 0, 5]


@pytest.fixture(scope="module")
def model():
    return lively(SMALL_VITS["grid14-window7"])


@pytest.fixture(scope="module")
def images():
    return [photo(*size, seed=i) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def boxes():
    return [boxes_in(*size, count, seed=i) for i, (size, count) in enumerate(zip(SIZES, COUNTS, strict=True))]


@pytest.fixture(scope="module")
def embedding(model, images):
    return model.encode_images(images)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 5e-6 * b.abs().max())


def test_a_ragged_batch_gives_what_each_image_gives_alone(model, images, boxes, embedding):
    together = model.decode_boxes(embedding, boxes, boxes_per_call=4)
    alone = [model.decode_boxes(model.encode_images([i]), [b]) for i, b in zip(images, boxes, strict=True)]

    assert near(together.low_res_NMHW, torch.cat([a.low_res_NMHW for a in alone]))
    assert near(together.predicted_iou_NM, torch.cat([a.predicted_iou_NM for a in alone]))
    assert together.image_index_N.tolist() == [0, 0, 2, 2, 2, 2, 2]


def test_a_callers_autocast_changes_nothing(model, images, boxes, embedding):
    plain = model.decode_boxes(embedding, boxes).low_res_NMHW
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.decode_boxes(model.encode_images(images), boxes).low_res_NMHW

    assert torch.equal(cast, plain)


@pytest.mark.parametrize("boxes_per_call", [1, 2, 3, 7, 16])
def test_the_shape_of_a_call_changes_rounding_alone(model, boxes, embedding, boxes_per_call):
    reference = model.decode_boxes(embedding, boxes, boxes_per_call=7)
    other = model.decode_boxes(embedding, boxes, boxes_per_call=boxes_per_call)

    assert near(other.low_res_NMHW, reference.low_res_NMHW)


def test_what_fills_a_call_changes_no_bit_of_the_others(model, boxes, embedding):
    """The last call is filled up; its real boxes must come out as with other boxes beside them."""
    filled = model.decode_boxes(embedding, [boxes[0], [], boxes[2][:1]], boxes_per_call=4)
    full = model.decode_boxes(embedding, [boxes[0], [], boxes[2][:2]], boxes_per_call=4)

    assert torch.equal(filled.low_res_NMHW, full.low_res_NMHW[:3])
    assert torch.equal(filled.predicted_iou_NM, full.predicted_iou_NM[:3])


def test_masks_follow_their_boxes_when_these_are_reordered(model, boxes, embedding):
    order = [3, 0, 4, 2, 1]
    straight = model.decode_boxes(embedding, boxes).low_res_NMHW[2:]
    reordered = model.decode_boxes(embedding, [boxes[0], boxes[1], boxes[2][order]]).low_res_NMHW[2:]

    assert near(reordered, straight[order])


def test_zero_boxes_give_zero_masks(model, embedding):
    none = model.decode_boxes(embedding, [np.zeros((0, 4))] * 3)
    side = model.config.mask_size

    assert none.low_res_NMHW.shape == (0, 1, side, side)
    assert none.predicted_iou_NM.shape == (0, 1)
    assert none.image_index_N.tolist() == []
    assert model.decode_boxes(embedding, [np.zeros((0, 4))] * 3, multimask="three").low_res_NMHW.shape[1] == 3


def test_equal_input_gives_equal_bytes_whatever_came_between(model, images, boxes, embedding):
    first = model.decode_boxes(embedding, boxes)
    model.decode_boxes(model.encode_images(images[:1]), [boxes_in(*SIZES[0], 9, seed=5)])
    again = model.decode_boxes(model.encode_images(images), boxes)

    assert torch.equal(first.low_res_NMHW, again.low_res_NMHW)
    assert torch.equal(first.predicted_iou_NM, again.predicted_iou_NM)


def test_prepared_pictures_give_what_whole_pictures_give(model, images, embedding):
    prepared = [resize_longest_side(image, model.config.image_size) for image in images]
    other = model.encode_prepared(prepared, SIZES)

    assert torch.equal(other.embedding_BCGG, embedding.embedding_BCGG)
    assert torch.equal(other.features[0], embedding.features[0])
    assert (other.sizes_hw, other.resized_hw) == (embedding.sizes_hw, embedding.resized_hw)


def test_padding_is_zero_after_normalising(model):
    pixels = pixels_of(model, [photo(50, 100)])
    S = model.config.image_size

    assert pixels.shape == (1, 3, S, S)
    assert torch.count_nonzero(pixels[:, :, S // 2 :]) == 0
    assert torch.count_nonzero(pixels[:, :, : S // 2]) > 0.99 * 3 * S * S / 2


def test_prompts_of_different_kinds_come_back_in_order(model, images):
    rng = np.random.default_rng(4)
    side = model.config.mask_size
    kinds = [
        Prompts(boxes_xyxy=boxes_in(*SIZES[0], 2)),
        Prompts(points_xy=rng.random((3, 2, 2)) * 60, point_labels=np.array([[1, 0], [1, -1], [0, 1]])),
        Prompts(mask_logits=rng.normal(0, 5, (2, side, side)).astype(np.float32)),
        Prompts(
            boxes_xyxy=boxes_in(*SIZES[0], 1), points_xy=rng.random((1, 1, 2)), point_labels=np.array([[1]])
        ),
        Prompts(boxes_xyxy=np.zeros((0, 4))),
        Prompts(boxes_xyxy=boxes_in(*SIZES[0], 3, seed=9)),
    ]
    embedding = model.encode_images([images[0]] * 6)
    together = model.decode_prompts(embedding, kinds, prompts_per_call=2)
    one = model.encode_images([images[0]])
    alone = [model.decode_prompts(one, [prompt], prompts_per_call=2).low_res_NMHW for prompt in kinds]

    assert near(together.low_res_NMHW, torch.cat(alone))
    assert together.image_index_N.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 5, 5, 5]


def test_best_is_the_alternative_with_the_highest_score_and_three_are_sorted(model, boxes, embedding):
    single = model.decode_boxes(embedding, boxes)
    best = model.decode_boxes(embedding, boxes, multimask="best")
    three = model.decode_boxes(embedding, boxes, multimask="three")
    hq = model.decode_boxes(embedding, boxes, hq_token_only=True)

    assert three.predicted_iou_NM.diff(dim=1).le(0).all()
    assert near(best.low_res_NMHW, three.low_res_NMHW[:, :1])
    assert torch.equal(best.predicted_iou_NM, three.predicted_iou_NM[:, :1])
    assert not near(best.low_res_NMHW, single.low_res_NMHW)
    assert not near(hq.low_res_NMHW, single.low_res_NMHW)
    assert torch.equal(hq.predicted_iou_NM, single.predicted_iou_NM)


@pytest.mark.parametrize("multimask", ["single", "best", "three"])
@pytest.mark.parametrize("hq_token_only", [False, True])
@torch.no_grad()
def test_every_answer_is_a_sum_of_the_tokens_masks(model, multimask, hq_token_only):
    sparse, dense = model.prompt_encoder(boxes_N4=torch.tensor([[10.0, 20, 90, 100], [5, 5, 50, 60]]))
    features = model.image_encoder(pixels_of(model, [photo(97, 140)]))
    tokens = model.mask_decoder(
        embedding_BCGG=features.embedding_BCGG,
        features=(model.mask_decoder.hq_features(features),),
        image_index_N=torch.tensor([0, 0]),
        sparse_NTC=sparse,
        dense_BCGG=dense,
        image_pe_1CGG=model.prompt_encoder.image_pe(),
        mask_tokens=model.tokens_needed(multimask, hq_token_only),
    )
    masks, ious = model.choose_masks(tokens, multimask=multimask, hq_token_only=hq_token_only)

    for n in range(2):
        order = (
            [0]
            if multimask == "single"
            else (1 + tokens.predicted_iou_N4[n, 1:].argsort(descending=True)).tolist()
        )
        order = order[:1] if multimask != "three" else order
        for m, k in enumerate(order):
            needed = model.tokens_needed(multimask, hq_token_only)
            sam = 0 if hq_token_only else tokens.sam_NKHW[n, needed.index(k)]
            assert torch.equal(masks[n, m], sam + tokens.hq_NHW[n])
            assert ious[n, m] == tokens.predicted_iou_N4[n, k]


def test_bfloat16_keeps_positions_and_logits_in_float32_and_masks_nearly_the_same(images, boxes):
    model = lively(SMALL_VITS["grid14-window7"])
    exact = model.decode_boxes(model.encode_images(images), boxes)
    model.cast(torch.bfloat16)
    embedding = model.encode_images(images)
    rounded = model.decode_boxes(embedding, boxes)
    inter = ((exact.low_res_NMHW > 0) & (rounded.low_res_NMHW > 0)).sum()
    union = ((exact.low_res_NMHW > 0) | (rounded.low_res_NMHW > 0)).sum()

    assert model.dtype == embedding.embedding_BCGG.dtype == torch.bfloat16
    assert {p.dtype for p in model.prompt_encoder.parameters()} == {torch.float32}
    assert rounded.low_res_NMHW.dtype == rounded.predicted_iou_NM.dtype == torch.float32
    # Random weights: real ones have logits far from zero over most of a picture.
    assert inter / union > 0.95


def test_light_hq_sam_keeps_its_batch_norms_whole_in_bfloat16(images):
    model = lively(SMALL_TINY)
    boxes = [boxes_in(*SIZES[0], 3)]
    exact = model.decode_boxes(model.encode_images(images[:1]), boxes).low_res_NMHW
    model.cast(torch.bfloat16)
    rounded = model.decode_boxes(model.encode_images(images[:1]), boxes).low_res_NMHW
    stem = model.image_encoder.patch_embed.seq[0]
    norm = stem.bn

    assert stem.c.weight.dtype == torch.bfloat16
    assert norm.weight.dtype == norm.running_var.dtype == torch.float32
    assert ((exact > 0) & (rounded > 0)).sum() / ((exact > 0) | (rounded > 0)).sum() > 0.95


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_are_refused(model, dtype):
    with pytest.raises(ValueError, match=r"use torch\.float32 or"):
        model.cast(dtype)


def test_a_model_moved_to_half_precision_by_hand_is_refused(images):
    config = vit_config(
        embed_dim=32, depth=1, num_heads=1, global_attn_indexes=(0,), window_size=3, image_size=64
    )
    model = SamHQ.from_config(config, 0)

    for moved in (model.to(torch.bfloat16), model.half()):
        with pytest.raises(TypeError, match=r"Change it with SamHQ\.cast"):
            moved.encode_images(images[:1])


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_generator_alone():
    config = SMALL_VITS["grid14-window7"]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (SamHQ.from_config(config, seed).state_dict() for seed in (1, 1, 2))

    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["image_encoder.pos_embed"], other["image_encoder.pos_embed"])


def test_answers_carry_no_gradient_and_can_be_used_in_training_code(model, boxes, embedding):
    answer = model.decode_boxes(embedding, boxes)

    assert not answer.low_res_NMHW.requires_grad
    assert not answer.low_res_NMHW.is_inference()


def test_light_hq_sam_runs_at_other_sides(images):
    model = lively(SMALL_TINY)
    answer = model.decode_boxes(model.encode_images(images[:1]), [boxes_in(*SIZES[0], 2)])

    assert answer.low_res_NMHW.shape == (2, 1, 64, 64)
    assert answer.low_res_NMHW.isfinite().all()


def test_training_mode_is_refused(images):
    model = lively(SMALL_TINY).train()

    with pytest.raises(RuntimeError, match="call eval"):
        model.encode_images(images)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5), np.uint8), r"shape \(4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), r"shape \(4, 5, 4\)"),
        (np.zeros((4, 5, 3), np.float32), "float32"),
        ([[[0, 0, 0]]], "an image is a list; wanted a numpy array"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), "an image is a Tensor"),
        (np.zeros((1, 3000, 3), np.uint8), "too_elongated"),
    ],
)
def test_a_picture_that_is_not_one_is_refused(model, image, message):
    with pytest.raises(ValueError, match=message):
        model.encode_images([image])


def test_a_picture_may_lie_in_memory_as_it_likes(model, images, embedding):
    """Read-only, as what comes out of Arrow is; torch would warn of it, and warnings are errors here."""
    image = np.asfortranarray(images[0])
    image.setflags(write=False)
    prepared = np.asfortranarray(resize_longest_side(image, model.config.image_size))
    prepared.setflags(write=False)

    for other in (model.encode_images([image]), model.encode_prepared([prepared], SIZES[:1])):
        assert near(other.embedding_BCGG, embedding.embedding_BCGG[:1])
    assert not prepared.flags.writeable


@pytest.mark.parametrize("shape", [(4,), (8,), (4, 2), (2, 2, 2), (1, 2, 4), (2, 3), (0, 5)])
def test_boxes_of_another_shape_are_not_read_as_others(model, embedding, shape):
    with pytest.raises(ValueError, match=r"prompts of image 1: boxes_xyxy has shape .*wanted \(N, 4\)"):
        model.decode_boxes(embedding, [[], np.ones(shape), []])


def test_boxes_may_be_lists_whole_numbers_or_tensors(model, embedding):
    boxes = [[10, 20, 60, 70], [5, 6, 30, 40]]
    expected = model.decode_boxes(embedding, [np.array(boxes, np.float64), [], []]).low_res_NMHW
    for given in (boxes, np.array(boxes, np.uint8), np.array(boxes, np.float32), torch.tensor(boxes)):
        assert torch.equal(model.decode_boxes(embedding, [given, [], []]).low_res_NMHW, expected)


def test_no_picture_and_one_of_the_wrong_size_are_refused(model):
    with pytest.raises(ValueError, match="at least one"):
        model.encode_images([])
    with pytest.raises(ValueError, match=r"prepared as \(224, 100\); wanted \(224, 112\)"):
        model.encode_prepared([np.zeros((224, 100, 3), np.uint8)], [(50, 25)])


def test_prompts_for_another_number_of_images_are_refused(model, embedding):
    with pytest.raises(ValueError, match="prompts for 1 images; the embedding holds 3"):
        model.decode_boxes(embedding, [np.zeros((0, 4))])


def test_options_that_do_not_exist_are_refused(model, embedding, boxes):
    with pytest.raises(ValueError, match="multimask is 'all'"):
        model.decode_boxes(embedding, boxes, multimask="all")
    with pytest.raises(ValueError, match="prompts_per_call is 0"):
        model.decode_boxes(embedding, boxes, boxes_per_call=0)
