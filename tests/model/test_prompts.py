import numpy as np
import pytest
import torch

from model.prompt_encoder import check_prompts, group_prompts, mask_to_prompt
from model.records import Prompts
from tests.parity.lively import SMALL_VITS, lively, photo

BOX = np.array([[1.0, 2.0, 30.0, 40.0]])
POINTS, LABELS = np.ones((1, 2, 2)), np.array([[1, 0]])


def test_prompts_of_one_kind_are_worked_together_in_the_callers_order():
    prompts = [
        Prompts(boxes_xyxy=np.repeat(BOX, 2, 0)),
        Prompts(points_xy=POINTS, point_labels=LABELS),
        Prompts(boxes_xyxy=BOX),
    ]
    batches, counts = group_prompts(prompts, [(50, 50)] * 3, [(64, 64)] * 3, mask_size=16)

    assert counts == [2, 1, 1]
    assert [b.place_N.tolist() for b in batches] == [[0, 1, 3], [2]]
    assert [b.image_N.tolist() for b in batches] == [[0, 0, 2], [1]]


def test_coordinates_are_scaled_by_two_separate_factors_of_the_rounded_sizes():
    batches, _ = group_prompts([Prompts(boxes_xyxy=BOX)], [(97, 140)], [(44, 64)], mask_size=16)
    wide, high = 64 / 140, 44 / 97

    assert batches[0].boxes_N4.dtype == torch.float32
    assert np.allclose(batches[0].boxes_N4.numpy(), BOX * [wide, high, wide, high])


def test_chunks_have_one_size_and_the_last_is_filled_with_its_last_prompt():
    batches, _ = group_prompts(
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
        (batch,), counts = group_prompts(
            [Prompts(points_xy=points, point_labels=their_labels)], [(9, 9)], [(9, 9)], mask_size=16
        )
        assert counts == [1]
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
