import math

import numpy as np
import pytest
import torch

from tests.parity.lively import SMALL_VITS, lively


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
