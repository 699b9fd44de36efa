import math

import numpy as np
import pytest
import torch

from hqlabel.model.prompt_encoder import check_prompts, group_prompts, mask_to_prompt
from hqlabel.model.records import Prompts
from tests.parity.lively import SMALL_VITS, lively, photo

BOX = np.array([[1.0, 2.0, 30.0, 40.0]])
POINTS, LABELS = np.ones((1, 2, 2)), np.array([[1, 0]])


@pytest.fixture(scope="module")
def encoder():
    return lively(SMALL_VITS["grid16-window5"]).prompt_encoder


def exact_encoding(encoder, xy):
    """The positional encoding in float64, of positions in pixels."""
    unit = (np.asarray(xy, np.float64) + 0.5) / encoder.side
    phase = 2 * math.pi * ((2 * unit - 1) @ encoder.pe_matrix.numpy().astype(np.float64))
    return np.concatenate([np.sin(phase), np.cos(phase)], axis=-1)


@torch.no_grad()
def test_corners_are_encoded_at_pixel_centres_to_a_hundred_thousandth(encoder):
    boxes = np.random.default_rng(0).random((50, 4)) * encoder.side
    tokens = encoder.embed_boxes(torch.tensor(boxes, dtype=torch.float32))
    expected = exact_encoding(encoder, boxes.astype(np.float32).reshape(50, 2, 2))
    corners = torch.cat([embedding.weight for embedding in encoder.point_embeddings[2:]]).numpy()

    assert tokens.shape == (50, 2, 256)
    assert np.abs(tokens.numpy() - (expected + corners)).max() < 1e-5


@torch.no_grad()
def test_cell_centres_are_encoded_x_first_to_a_hundred_thousandth(encoder):
    pe = encoder.image_pe()[0].numpy()
    row, column = 3, 11
    expected = exact_encoding(encoder, [16 * (column + 0.5) - 0.5, 16 * (row + 0.5) - 0.5])

    assert pe.shape == (256, 16, 16)
    assert np.abs(pe[:, row, column] - expected).max() < 1e-5


@torch.no_grad()
def test_positions_keep_their_precision_under_autocast(encoder):
    boxes = torch.rand(4, 4) * 256
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, image = encoder.embed_boxes(boxes), encoder.image_pe()

    assert torch.equal(inside, encoder.embed_boxes(boxes))
    assert torch.equal(image, encoder.image_pe())


@torch.no_grad()
def test_a_box_has_two_tokens_and_points_come_before_it(encoder):
    boxes, points = torch.rand(3, 4) * 256, torch.rand(3, 2, 2) * 256
    labels = torch.tensor([[1, 0]] * 3)
    box_alone, _ = encoder(boxes_N4=boxes)
    points_alone, _ = encoder(points_NP2=points, labels_NP=labels)
    both, dense = encoder(boxes_N4=boxes, points_NP2=points, labels_NP=labels)

    assert box_alone.shape == (3, 2, 256)
    assert points_alone.shape == (3, 3, 256)  # without a box a padding point follows
    assert torch.equal(both, torch.cat([points_alone[:, :2], box_alone], dim=1))
    assert torch.equal(points_alone[:, 2], encoder.not_a_point_embed.weight.expand(3, -1))
    assert dense.shape == (1, 256, 1, 1)


@torch.no_grad()
def test_labels_choose_the_embedding_and_a_padding_point_has_no_place(encoder):
    point = torch.full((1, 3, 2), 40.0)
    tokens = encoder.embed_points(point, torch.tensor([[1, 0, -1]]), pad=False)[0]
    place = encoder.pe_layer((point[0, 0] + 0.5) / encoder.side)

    assert torch.equal(tokens[0], place + encoder.point_embeddings[1].weight[0])
    assert torch.equal(tokens[1], place + encoder.point_embeddings[0].weight[0])
    assert torch.equal(tokens[2], encoder.not_a_point_embed.weight[0])


@torch.no_grad()
def test_a_mask_alone_has_no_tokens_and_a_dense_map_for_each_prompt(encoder):
    sparse, dense = encoder(masks_NHW=torch.randn(2, 64, 64))

    assert sparse.shape == (2, 0, 256)
    assert dense.shape == (2, 256, 16, 16)


def test_nothing_and_points_without_labels_are_refused(encoder):
    with pytest.raises(ValueError, match="a prompt needs a box"):
        encoder()
    with pytest.raises(ValueError, match="go together"):
        encoder(points_NP2=torch.zeros(1, 1, 2))


# Prompts on the host


def test_prompts_of_one_kind_are_worked_together_in_the_callers_order():
    prompts = [
        Prompts(boxes_xyxy=np.repeat(BOX, 2, 0)),
        Prompts(points_xy=POINTS, point_labels=LABELS),
        Prompts(boxes_xyxy=BOX),
    ]
    batches = group_prompts(prompts, [(50, 50)] * 3, [(64, 64)] * 3, mask_size=16)

    assert [b.place_N.tolist() for b in batches] == [[0, 1, 3], [2]]
    assert [b.image_N.tolist() for b in batches] == [[0, 0, 2], [1]]


def test_coordinates_are_scaled_by_two_separate_factors_of_the_rounded_sizes():
    batches = group_prompts([Prompts(boxes_xyxy=BOX)], [(97, 140)], [(44, 64)], mask_size=16)
    wide, high = 64 / 140, 44 / 97

    assert batches[0].boxes_N4.dtype == torch.float32
    assert np.allclose(batches[0].boxes_N4.numpy(), BOX * [wide, high, wide, high])


def test_chunks_have_one_size_and_the_last_is_filled_with_its_last_prompt():
    batches = group_prompts(
        [Prompts(boxes_xyxy=BOX + np.arange(5)[:, None])], [(9, 9)], [(9, 9)], mask_size=16
    )
    chunks = list(batches[0].chunks(3))

    assert [real for _, real in chunks] == [3, 2]
    assert [chunk.place_N.tolist() for chunk, _ in chunks] == [[0, 1, 2], [3, 4, 4]]
    assert chunks[1][0].boxes_N4[:, 0].tolist() == [4.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (Prompts(), "none of boxes_xyxy, points_xy and mask_logits is given"),
        (Prompts(points_xy=POINTS), "points_xy and point_labels go together"),
        (Prompts(boxes_xyxy=BOX, point_labels=LABELS), "points_xy and point_labels go together"),
        (Prompts(boxes_xyxy=BOX[0]), r"boxes_xyxy has shape \(4,\); wanted \(N, 4\)"),
        (Prompts(points_xy=POINTS[0], point_labels=LABELS[0]), r"points_xy has shape \(2, 2\)"),
        (Prompts(points_xy=POINTS, point_labels=LABELS[:, :1]), r"point_labels has shape \(1, 1\)"),
        (
            Prompts(mask_logits=np.zeros((1, 8, 8))),
            r"mask_logits has shape \(1, 8, 8\); wanted \(N, 16, 16\)",
        ),
        (Prompts(points_xy=POINTS[:, :0], point_labels=LABELS[:, :0]), r"shape \(1, 0, 2\).*with P from 1"),
        (Prompts(mask_logits=np.zeros((1, 16, 16), bool)), "dtype bool; wanted float logits .mask_to_prompt"),
        (Prompts(mask_logits=np.zeros((1, 16, 16), np.uint8)), "dtype uint8; wanted float logits"),
        (Prompts(boxes_xyxy=BOX.astype(str)), "boxes_xyxy has dtype <U"),
        (Prompts(boxes_xyxy=BOX * np.nan), "boxes_xyxy holds a value that is not finite"),
        (Prompts(boxes_xyxy=np.repeat(BOX, 2, 0), points_xy=POINTS, point_labels=LABELS), r"found \[1, 2\]"),
        (Prompts(points_xy=POINTS, point_labels=LABELS * 2), r"point labels \[2\]"),
        (Prompts(points_xy=POINTS, point_labels=LABELS - 10), r"point labels \[-10, -9\]"),
        (Prompts(points_xy=POINTS, point_labels=LABELS * 0.5), r"point labels \[0.5\]"),
    ],
)
def test_malformed_prompts_are_refused_by_name(prompts, message):
    with pytest.raises(ValueError, match=f"prompts of image 7: .*{message}"):
        check_prompts(prompts, 16, image=7)


def test_a_persons_mask_becomes_logits_in_the_padded_frame():
    mask = np.zeros((50, 100), bool)
    mask[:25, :50] = True  # the upper left quarter
    logits = mask_to_prompt(mask, side=64)

    assert logits.dtype == np.float32
    assert logits.shape == (16, 16)
    # The resize averages over the edge, which lies in row 4 and column 8.
    assert (logits[:3, :7] > 6.9).all()
    assert (logits[:, 9:] < -6.9).all()
    assert (logits[5:] < -6.9).all()
    assert (logits[:4, :8] > 0).all()
    assert logits.max() == pytest.approx(np.log(999), rel=1e-3)


def test_a_cell_half_covered_is_zero_and_probabilities_count_as_they_are():
    half = np.full((64, 64), 0.5)
    three_quarters = np.full((64, 64), 0.75, np.float32)

    assert np.allclose(mask_to_prompt(half, side=64), 0)
    assert np.allclose(mask_to_prompt(three_quarters, side=64), np.log(3), atol=1e-5)
    assert np.allclose(mask_to_prompt(np.ones((64, 64)), side=64, certainty=0.9), np.log(9), atol=1e-5)


def test_lists_tensors_and_arrays_that_must_not_be_written_to_are_prompts_like_any_other():
    labels = LABELS.astype(np.int64)
    labels.setflags(write=False)
    for points, their_labels in [
        (POINTS.tolist(), LABELS.tolist()),
        (torch.from_numpy(POINTS), torch.from_numpy(LABELS)),
        (np.asfortranarray(POINTS), labels),
    ]:
        (batch,) = group_prompts(
            [Prompts(points_xy=points, point_labels=their_labels)], [(9, 9)], [(9, 9)], mask_size=16
        )
        assert batch.points_NP2.tolist() == POINTS.tolist()
        assert batch.labels_NP.tolist() == LABELS.tolist()


def test_a_side_that_is_no_input_side_is_refused():
    with pytest.raises(ValueError, match="side is 100; wanted the model's input side"):
        mask_to_prompt(np.zeros((4, 4), bool), side=100)


@pytest.mark.parametrize(
    ("mask", "certainty", "message"),
    [
        (np.zeros((2, 4, 4), bool), 0.999, r"shape \(2, 4, 4\)"),
        (np.zeros((4, 4), np.uint8), 0.999, "dtype uint8"),
        (np.full((4, 4), 255.0), 0.999, "outside"),
        (np.full((4, 4), np.nan), 0.999, "outside"),
        (np.zeros((4, 4), bool), 1.0, "certainty is 1.0"),
        (np.zeros((1, 3000), bool), 0.999, "too_elongated"),
    ],
)
def test_what_is_not_a_mask_is_refused(mask, certainty, message):
    with pytest.raises(ValueError, match=message):
        mask_to_prompt(mask, side=64, certainty=certainty)


def test_a_persons_mask_moves_the_result():
    model = lively(SMALL_VITS["grid14-window7"])
    embedding = model.encode_images([photo(97, 140)])
    box = np.array([[20.0, 20, 120, 80]])
    left, right = np.zeros((2, 97, 140), bool)
    left[30:70, 25:65] = right[30:70, 75:115] = True
    answers = [
        model.decode_prompts(embedding, [Prompts(boxes_xyxy=box, mask_logits=prompt)]).low_res_NMHW
        for prompt in (None, *(mask_to_prompt(m, side=model.config.image_size)[None] for m in (left, right)))
    ]

    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert (answers[a] - answers[b]).abs().max() > 0.1
