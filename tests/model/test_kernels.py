"""The fast paths of inference against their plain definitions."""

import pytest
import torch

from hqlabel.model import kernels
from hqlabel.model.image_encoder import from_windows, to_windows, window_rows
from hqlabel.model.kernels import (
    LayerNorm2d,
    blocked_attention,
    cells_to_map,
    dot_maskfeature,
    folded_attention,
    plain_attention,
    upscale_cells,
)
from hqlabel.model.mask_decoder import upscaling
from tests.parity.lively import SMALL_VITS, lively

# Squares, heads, side, width of a head: small sides are folded, large ones go strip by strip.
SHAPES = [(3, 2, 5, 32), (2, 2, 14, 80), (1, 3, 20, 32), (2, 1, 24, 16)]


def squares(shape, dtype=torch.float32):
    n, heads, side, width = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, n, heads, side * side, width, generator=generator).to(dtype)
    tables = torch.randn(2, 2 * side - 1, width, generator=generator).mul(0.3).to(dtype)
    return q, k, v, *tables


def blocked(q, k, v, table_h, table_w):
    """`blocked_attention` with the arguments and the result of `plain_attention`."""
    q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    return blocked_attention(q, k, v, table_h, table_w).unflatten(2, (q.shape[0], -1)).transpose(1, 2)


@pytest.mark.parametrize("path", [blocked, folded_attention])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_gives_the_plain_definition(path, shape):
    given = squares(shape)

    assert torch.allclose(path(*given), plain_attention(*given), atol=2e-5)


@pytest.mark.parametrize("strip_bytes", [1, 12_000, 400_000])
@pytest.mark.parametrize("attend", ["_attend_masked", "_attend_in_strips", "_attend_folded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strips_of_any_size_give_the_plain_definition(monkeypatch, strip_bytes, attend, shape):
    monkeypatch.setattr(kernels, "STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(kernels, "_attend_masked", getattr(kernels, attend))  # what float32 takes
    given = squares(shape)

    assert torch.allclose(blocked(*given), plain_attention(*given), atol=2e-5)


@pytest.mark.parametrize("path", [blocked, folded_attention])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_bfloat16_no_path_is_further_from_the_truth_than_the_plain_one(path, shape):
    given = squares(shape, torch.bfloat16)
    exact = plain_attention(*(x.double() for x in given))
    theirs, plain = (f(*given).double().sub(exact).square().mean().sqrt() for f in (path, plain_attention))

    assert theirs <= 1.1 * plain


@pytest.mark.parametrize(("images", "grid", "window"), [(1, 16, 5), (2, 14, 7), (3, 6, 5)])
def test_window_rows_are_the_windows_and_the_way_back(images, grid, window):
    x = torch.randn(images, grid, grid, 4)
    gather, back = window_rows(images, grid, window, x.device)
    rows = torch.cat([x.flatten(0, 2), torch.zeros(1, 4)])
    windows = rows[gather].view(-1, window, window, 4)

    assert torch.equal(windows, to_windows(x, window))
    assert torch.equal(windows.flatten(0, 2)[back].view_as(x), from_windows(windows, grid))


@pytest.mark.parametrize("name", list(SMALL_VITS))
def test_every_block_attends_as_it_does_with_gradients(name):
    """With gradients a block takes the plain definition: pads, cuts windows, projects the padding too."""
    encoder = lively(SMALL_VITS[name]).image_encoder
    grid = encoder.pos_embed.shape[1]
    x = torch.randn(2, grid, grid, encoder.pos_embed.shape[3])
    for block in encoder.blocks:
        plain = block.attend(x)
        with torch.no_grad():
            fast = block.attend(x)
        assert plain.requires_grad
        assert (fast - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_a_channel_norm_is_over_channels_with_the_biased_variance():
    x, norm = torch.randn(2, 5, 3, 4, dtype=torch.float64), LayerNorm2d(5).double()
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()

    assert torch.allclose(norm(x), expected)


@torch.no_grad()
def test_upscaling_by_matrix_products_is_upscaling_by_transposed_convolutions():
    x_BGGC = torch.randn(3, 6, 6, 12)
    for layers in (upscaling(12, 8, 5), upscaling(12, 8, 5, torch.nn.GELU())):
        mapped = cells_to_map(upscale_cells(layers, x_BGGC.flatten(0, 2)), 6)

        assert torch.allclose(mapped, layers(x_BGGC.permute(0, 3, 1, 2)), atol=1e-5)


@torch.no_grad()
def test_a_contracted_convolution_is_the_dot_product_with_its_output():
    feature = lively(SMALL_VITS["grid14-window7"]).mask_decoder.embedding_maskfeature
    x, vector = torch.randn(3, 16, 12, 10), torch.randn(3, 16)
    plain = torch.einsum("nu,nuhw->nhw", vector, feature(x))

    assert torch.allclose(dot_maskfeature(feature, x, vector), plain, atol=1e-4)
