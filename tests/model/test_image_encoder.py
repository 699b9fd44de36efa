import pytest
import torch

from hqlabel.model.image_encoder import RelPosAttention, WindowAttention, from_windows, to_windows
from hqlabel.model.kernels import TORCH_NORM_EPS, plain_attention
from hqlabel.model.sam_config import vit_config
from tests.parity.lively import SMALL_TINY, SMALL_VITS, lively


@pytest.mark.parametrize("head_width", [32, 64, 80])
def test_relative_position_is_the_unscaled_query_with_the_offset_from_key_to_query(head_width):
    side = 3
    q, k, v = torch.randn(3, 2, 2, side * side, head_width, dtype=torch.float64)
    table_h, table_w = torch.randn(2, 2 * side - 1, head_width, dtype=torch.float64) * 0.5
    logits = torch.zeros(2, 2, side * side, side * side, dtype=torch.float64)
    for a in range(side * side):
        for b in range(side * side):
            dy, dx = a // side - b // side, a % side - b % side
            position = table_h[dy + side - 1] + table_w[dx + side - 1]
            logits[:, :, a, b] = (q[:, :, a] * (k[:, :, b] * head_width**-0.5 + position)).sum(-1)
    expected = logits.softmax(-1) @ v

    assert torch.allclose(plain_attention(q, k, v, table_h, table_w), expected, atol=1e-12)


@pytest.mark.parametrize("head_width", [32, 64, 80])
@torch.no_grad()
def test_one_window_alone_gives_what_it_gives_in_a_batch(head_width):
    layer = RelPosAttention(2 * head_width, 2, 6)
    torch.nn.init.normal_(layer.rel_pos_h, std=0.5)
    x = torch.randn(5, 6, 6, 2 * head_width)

    assert torch.allclose(layer(x[:1]), layer(x)[:1], atol=1e-5)


@pytest.mark.parametrize(("grid", "window"), [(16, 5), (14, 7), (20, 14), (6, 5)])
def test_windows_come_back_as_the_grid(grid, window):
    x = torch.randn(2, grid, grid, 3)
    across = -(-grid // window)

    assert to_windows(x, window).shape == (2 * across**2, window, window, 3)
    assert torch.equal(from_windows(to_windows(x, window), grid), x)


def test_window_padding_is_zeros_at_the_right_and_the_bottom():
    windows = to_windows(torch.ones(1, 6, 6, 1), 5)

    assert [int(w.sum()) for w in windows] == [25, 5, 5, 1]
    assert windows[1, :, 0].sum() == 5


@torch.no_grad()
def test_the_padding_of_a_window_takes_part_in_the_attention():
    """The last window of a grid of 16 in fives holds one real token and 24 zeros, added after the norm."""
    block = lively(SMALL_VITS["grid16-window5"]).image_encoder.blocks[0]
    x = torch.randn(1, 16, 16, 64)
    window = torch.zeros(1, 5, 5, 64)
    window[0, 0, 0] = x[0, -1, -1]
    corner = block.attend(x)[0, -1, -1]
    itself_alone = block.attn.proj(block.attn.qkv(x[0, -1, -1])[128:])

    assert torch.allclose(corner, block.attn(window)[0, 0, 0], atol=1e-5)
    assert (corner - itself_alone).abs().max() > 0.1


@torch.no_grad()
def test_the_early_feature_is_the_output_of_the_first_global_block():
    encoder = lively(SMALL_VITS["grid16-window5"]).image_encoder
    outputs = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, given, out: outputs.append(out))
    features = encoder(torch.randn(1, 3, 256, 256))

    assert torch.equal(features.early_BGGC, outputs[1])
    assert not torch.equal(features.early_BGGC, outputs[3])


@pytest.mark.parametrize("size", [1, 2])
@torch.no_grad()
def test_an_image_alone_gives_what_it_gives_in_a_batch(size):
    encoder = lively(SMALL_VITS["grid20-window14"]).image_encoder
    pixels = torch.randn(3, 3, 320, 320)
    alone, batch = encoder(pixels[:size]), encoder(pixels)

    assert torch.allclose(alone.embedding_BCGG, batch.embedding_BCGG[:size], atol=1e-4)
    assert torch.allclose(alone.early_BGGC, batch.early_BGGC[:size], atol=1e-3)


def test_gradients_reach_every_weight_of_the_encoder():
    config = vit_config(
        embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=3, image_size=64
    )
    encoder = lively(config).image_encoder
    features = encoder(torch.randn(1, 3, 64, 64))
    (features.embedding_BCGG.square().mean() + features.early_BGGC.square().mean()).backward()

    assert {n for n, p in encoder.named_parameters() if p.grad is None} == set()


@torch.no_grad()
def test_tiny_vits_padding_is_the_norms_bias():
    """Padding is added before the norm, unlike in the ViT: a constant token becomes the norm's bias."""
    layer = WindowAttention(8, 2, 3)
    layer.norm.bias.normal_()
    zeros = layer(torch.zeros(1, 3, 3, 8))
    value = (layer.qkv(layer.norm.bias)).view(2, 3, 4)[:, 2].reshape(8)

    assert torch.allclose(zeros[0, 0, 0], layer.proj(value), atol=1e-6)


def test_tiny_vits_bias_is_by_absolute_row_and_column_offset():
    layer = WindowAttention(8, 2, 3)
    torch.nn.init.normal_(layer.attention_biases)
    bias = layer.bias()

    for a in range(9):
        for b in range(9):
            index = abs(a // 3 - b // 3) * 3 + abs(a % 3 - b % 3)
            assert torch.equal(bias[:, a, b], layer.attention_biases[:, index])


@torch.no_grad()
def test_tiny_vits_attention_takes_queries_keys_and_values_from_each_heads_own_part():
    layer = WindowAttention(8, 2, 3)
    x = torch.randn(1, 3, 3, 8)
    qkv = layer.qkv(layer.norm(x)).view(9, 2, 12)
    heads = []
    for h in range(2):
        q, k, v = qkv[:, h].split(4, dim=-1)
        heads.append((q @ k.T / 2 + layer.bias()[h]).softmax(-1) @ v)
    expected = layer.proj(torch.cat(heads, dim=-1))

    assert torch.allclose(layer(x).view(9, 8), expected, atol=1e-6)


def test_tiny_vits_norms_have_torchs_epsilon():
    encoder = lively(SMALL_TINY).image_encoder
    for name, module in encoder.named_modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.BatchNorm2d)) and not name.startswith("neck"):
            assert module.eps == TORCH_NORM_EPS, name
