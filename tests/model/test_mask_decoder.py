import pytest
import torch

from hqlabel.model.kernels import TORCH_NORM_EPS, VIT_NORM_EPS
from hqlabel.model.mask_decoder import image_products
from hqlabel.model.transformer import Attention
from tests.model.plain_decoder import plain_decode
from tests.parity.lively import SMALL_VITS, lively


@pytest.fixture(scope="module")
def model():
    return lively(SMALL_VITS["grid14-window7"])


def inputs(model, index, *, with_masks=False):
    """Random features of three images and prompts on them."""
    generator = torch.Generator().manual_seed(1)
    G, width = model.config.vision.grid, model.config.mask_decoder.hidden_size
    N = len(index)
    masks = torch.randn(N, 4 * G, 4 * G, generator=generator) * 5 if with_masks else None
    boxes = torch.rand(N, 4, generator=generator) * model.config.image_size
    sparse, dense = model.prompt_encoder(boxes_N4=boxes, masks_NHW=masks)
    return {
        "embedding_BCGG": torch.randn(3, width, G, G, generator=generator),
        "features": (torch.randn(3, width // 8, 4 * G, 4 * G, generator=generator),),
        "image_index_N": torch.tensor(index),
        "sparse_NTC": sparse,
        "dense_BCGG": dense,
        "image_pe_1CGG": model.prompt_encoder.image_pe(),
    }


@pytest.mark.parametrize("index", [[0], [1], [0, 0, 2], [0, 1, 1, 1, 2], [2, 0, 1, 0]], ids=str)
@pytest.mark.parametrize("with_masks", [False, True])
@torch.no_grad()
def test_the_shortcuts_give_the_plain_definition(model, index, with_masks):
    given = inputs(model, index, with_masks=with_masks)
    ours, plain = model.mask_decoder(**given), plain_decode(model.mask_decoder, **given)

    for name in ("sam_NKHW", "hq_NHW", "predicted_iou_N4"):
        a, b = getattr(ours, name), getattr(plain, name)
        assert (a - b).abs().max() <= 5e-6 * b.abs().max(), name


@torch.no_grad()
def test_masks_not_asked_for_are_not_made_and_change_nothing(model):
    given = inputs(model, [0, 1])
    every = model.mask_decoder(**given)
    some = model.mask_decoder(**given, mask_tokens=(2, 0))
    none = model.mask_decoder(**given, mask_tokens=())

    assert torch.allclose(some.sam_NKHW, every.sam_NKHW[:, [2, 0]], atol=1e-5)
    assert torch.equal(some.hq_NHW, every.hq_NHW)
    assert none.sam_NKHW.shape == (2, 0, *every.hq_NHW.shape[1:])


@pytest.mark.parametrize("tokens", [1, 8, 23])
@torch.no_grad()
def test_few_tokens_asked_by_many_give_what_attention_gives(tokens):
    layer = Attention(32, 16, 4)
    torch.nn.init.normal_(layer.out_proj.bias)
    x, pe = torch.randn(3, 50, 32), torch.randn(1, 50, 16)
    k, v = torch.randn(2, 3, tokens, 16)
    plain = layer.attend(torch.nn.functional.linear(x, layer.q_proj.weight) + pe, k, v)

    assert torch.allclose(layer.add_attended_few(x, pe, k, v), x + plain, atol=1e-5)


def test_image_products_are_those_of_gathered_features():
    vectors, features = torch.randn(5, 4), torch.randn(3, 42, 4)
    index = torch.tensor([0, 0, 2, 2, 1])
    gathered = torch.einsum("nu,nlu->nl", vectors, features[index])

    assert torch.allclose(image_products(vectors, features, index), gathered, atol=1e-5)


def test_a_value_that_is_not_finite_stays_with_its_image():
    vectors, features = torch.randn(3, 4), torch.randn(2, 36, 4)
    features[1, 0, 0] = torch.nan
    out = image_products(vectors, features, torch.tensor([0, 0, 1]))

    assert out[:2].isfinite().all()
    assert out[2].isnan().any()


def test_every_norm_has_the_epsilon_the_weights_were_trained_with(model):
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.LayerNorm):
            continue
        in_transformer = name.startswith("mask_decoder.transformer.")
        assert module.eps == (TORCH_NORM_EPS if in_transformer else VIT_NORM_EPS), name
    assert (TORCH_NORM_EPS, VIT_NORM_EPS) == (1e-5, 1e-6)


def test_losses_on_mask_iou_and_hq_reach_every_weight(model):
    given = inputs(model, [0, 1, 1], with_masks=True)
    given["embedding_BCGG"].requires_grad_()
    given["features"][0].requires_grad_()
    out = model.mask_decoder(**given)
    (
        out.sam_NKHW.square().mean() + out.hq_NHW.square().mean() + out.predicted_iou_N4.square().mean()
    ).backward()

    # The HQ branches of the image are made by hq_features, which this call does not go through.
    untouched = {
        n
        for n, p in model.mask_decoder.named_parameters()
        if p.grad is None and not n.startswith(("compress_vit_feat", "embedding_encoder"))
    }
    assert untouched == set()
    assert given["embedding_BCGG"].grad is not None
    assert given["features"][0].grad is not None
    model.zero_grad()
