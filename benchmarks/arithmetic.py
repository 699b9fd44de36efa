"""What a model multiplies, and how fast the device multiplies at best."""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from hqlabel.model.device import Dtype
from hqlabel.model.hq_sam2.hq_sam2 import family_of
from hqlabel.model.sam_config import SamHQConfig

_PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
_ROUNDS = 6


def flops(config: SamHQConfig, boxes: int) -> int:
    """Floating-point operations of one picture and its boxes, counted on shapes alone; two a product's term.

    The encoder's as it is defined, whatever path computes it; the decoder's as `MaskDecoder` shortens it.
    """
    with torch.device("meta"):
        model = family_of(config)(config)
    side, decoder = config.image_size, model.mask_decoder
    with torch.enable_grad(), FlopCounterMode(display=False) as image:  # with gradients: the definition
        embedding, *features = model.embed(torch.empty(1, 3, side, side, device="meta"))
        shared = decoder.share(
            embedding_BCGG=embedding,
            features=tuple(features),
            dense_BCGG=model.prompt_encoder.no_mask(),
            image_pe_1CGG=model.prompt_encoder.image_pe(),
        )
    tokens = torch.empty(1, decoder.tokens_of_a_box, decoder.mask_tokens.embedding_dim, device="meta")
    answered = model.tokens_needed("single", False)
    with torch.no_grad(), FlopCounterMode(display=False) as box:
        decoder.decode_tokens(tokens, shared.first_layer, shared.terms, (), answered)
    return int(image.get_total_flops() + boxes * box.get_total_flops())


def matrix_peak(dtype: Dtype, device: str, *, side: int | None = None) -> float:
    """Floating-point operations a second of one large matrix product, the best of a few."""
    side = side or _PRODUCT_SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(1 + _ROUNDS):
        began = time.perf_counter()
        product = a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    assert product.shape == (side, side)
    return 2 * side**3 / min(times[1:])
