"""The paths that only a GPU takes, as far as a machine without one can test them, and on one the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hqlabel.model import image_encoder
from hqlabel.model.device import Recorded, compile_calls
from hqlabel.model.records import CallShape, Instances, Prompts
from hqlabel.model.segmenter import Segmenter
from hqlabel.model.transformer import ImageTokens
from tests.parity.lively import SMALL_TINY, SMALL_VITS, boxes_in, lively, photo

CONFIGS = {**SMALL_VITS, "tiny": SMALL_TINY}
SHAPE = CallShape(images_per_call=2, boxes_per_call=4)


def again(run):
    """A recording without a GPU: all of it is run again, into the same tensors."""
    outputs = run()

    def play():
        for kept, new in zip(outputs, run(), strict=True):
            kept.copy_(new)

    return outputs, play


def answer(model, boxes=4, mask_tokens=(0,)):
    """The embedding of two pictures and what the decoder says of some boxes, on the model's device."""
    device, side = model.device, model.config.image_size
    embedding, hq = model.embed(torch.zeros(2, 3, side, side, dtype=model.dtype, device=device))
    shared = model.mask_decoder.share(
        embedding_BCGG=embedding,
        features=(hq,),
        dense_BCGG=model.prompt_encoder.no_mask(),
        image_pe_1CGG=model.prompt_encoder.image_pe(),
    )
    sparse, _ = model.prompt_encoder(boxes_N4=torch.zeros(boxes, 4, device=device))
    image = shared.first_layer.select(torch.zeros(boxes, dtype=torch.int64, device=device))
    width = model.mask_decoder.mask_tokens.embedding_dim
    tokens = torch.zeros(boxes, model.mask_decoder.tokens_of_a_box, width, dtype=model.dtype, device=device)
    assert tokens.shape[1] == 6 + sparse.shape[1]
    return embedding, hq, *model.mask_decoder.decode_tokens(tokens, image, shared.terms, (), mask_tokens)


class OneDevice(TorchDispatchMode):
    """Refuses an operation, but for copies, on tensors of several devices; the meta device lets some pass."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if operation not in copies:
            assert len({x.device for x in tensors}) <= 1, operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_whatever_is_no_cpu_computes_on_itself_alone_and_is_never_waited_for(config, dtype):
    """PyTorch's meta device has no values to ask for."""
    model = lively(config).cast(dtype).to("meta")
    image_encoder._window_rows.cache_clear()  # made under our eyes
    with OneDevice():
        there = answer(model)
    here = answer(lively(config).cast(dtype))

    assert {x.device.type for x in there} == {"meta"}
    assert [(x.shape, x.dtype) for x in there] == [(x.shape, x.dtype) for x in here]


@torch.no_grad()
def test_the_path_of_a_gpu_is_compiled_as_a_whole():
    model = lively(SMALL_VITS["grid16-window5"]).cast(torch.bfloat16).to("meta")
    torch.compiler.reset()
    compile_calls(model, SHAPE, (0,), backend="aot_eager", record=again)

    assert {x.device.type for x in answer(model)} == {"meta"}


@pytest.fixture
def pair():
    """A model twice, the second compiled (by a compiler that changes no operation), on the CPU; a TinyViT,
    because the way of a ViT on a CPU writes in place, as no compiler takes it."""
    torch.compiler.reset()
    plain, compiled = (Segmenter(lively(SMALL_TINY), call_shape=SHAPE) for _ in range(2))
    compile_calls(compiled.model, SHAPE, (0,), backend="aot_eager", record=again)
    return plain, compiled


def segment(segmenter, counts):
    pictures = [photo(150 + 20 * i, 200) for i in range(len(counts))]
    boxes = [boxes_in(*picture.shape[:2], count, seed=i) for i, (picture, count) in
             enumerate(zip(pictures, counts, strict=True))]  # fmt: skip
    results = segmenter.segment(pictures, boxes)
    assert all(isinstance(result, Instances) for result in results)
    return [(r.counts, r.predicted_iou.tolist(), r.stability_score.tolist()) for r in results]


def test_compiled_calls_give_the_masks_of_the_others(pair, monkeypatch):
    plain, compiled = pair
    own: list[Any] = []
    for owner, name in (compiled.model, "embed"), (compiled.model.mask_decoder, "decode_tokens"):
        monkeypatch.setattr(getattr(owner, name), "_own", lambda *_, name=name: own.append(name))

    assert segment(compiled, [3, 0, 9]) == segment(plain, [3, 0, 9])
    assert segment(compiled, [5]) == segment(plain, [5]), "played back over what was recorded"
    assert own == [], "every call had the one shape"


def test_calls_of_another_shape_go_the_models_own_way(pair, monkeypatch):
    plain, compiled = pair
    fixed = compiled.model.mask_decoder.decode_tokens
    monkeypatch.setattr(fixed, "_fast", lambda *_: pytest.fail("compiled for another shape"))
    embedding = [one.model.encode_images([photo(100, 200)]) for one in pair]
    prompts = Prompts(points_xy=np.full((4, 1, 2), 50.0), point_labels=np.ones((4, 1)))

    ours, theirs = (
        one.model.decode_prompts(e, [prompts]) for one, e in zip((compiled, plain), embedding, strict=True)
    )

    assert torch.equal(ours.low_res_NMHW, theirs.low_res_NMHW)


def test_what_was_played_back_is_the_callers_own():
    def double(image, more):
        return image.keys_NLC * 2, more[0] + 1

    recorded = Recorded(double, again)
    ones = torch.ones(1, 2, 3)

    def call(value):
        side = ImageTokens(keys_NLC=ones * value, k_NLI=ones, v_NLI=ones)
        return recorded(side, (ones * value,))

    first = call(1)
    second = call(5)

    assert [x.unique().tolist() for x in first] == [[2.0], [2.0]]
    assert [x.unique().tolist() for x in second] == [[10.0], [6.0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpus_graphs_give_nearly_the_masks_of_its_plain_calls(dtype):
    plain, compiled = (
        Segmenter(
            lively(SMALL_VITS["grid14-window7"]), call_shape=SHAPE, dtype=dtype, device="cuda", compiled=on
        )
        for on in (False, True)
    )
    ours, theirs = segment(compiled, [3, 0, 9]), segment(plain, [3, 0, 9])

    for (_, iou, stability), (_, wanted_iou, wanted_stability) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(iou, wanted_iou, atol=2e-2)
        np.testing.assert_allclose(stability, wanted_stability, atol=5e-2)
    assert segment(compiled, [3, 0, 9]) == ours, "equal inputs, equal bytes"
