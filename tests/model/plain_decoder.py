"""The mask decoder by its plain definition: everything for every prompt, nothing shared, nothing contracted.

It reads the weights of a `MaskDecoder` and is what that module's shortcuts are held to.
"""

import torch
import torch.nn.functional as F

from model.mask_decoder import MaskDecoder, TokenMasks


def attention(layer, q, k, v):
    def heads(x):
        return x.reshape(*x.shape[:2], layer.heads, -1).transpose(1, 2)

    q, k, v = heads(layer.q(q)), heads(layer.k(k)), heads(layer.v(v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return layer.out((weights @ v).transpose(1, 2).flatten(2))


def transformer(module, tokens, keys, pe):
    queries = tokens
    for i, layer in enumerate(module.layers):
        if i == 0:
            queries = attention(layer.self_attn, queries, queries, queries)
        else:
            q = queries + tokens
            queries = queries + attention(layer.self_attn, q, q, queries)
        queries = layer.norm1(queries)
        queries = layer.norm2(queries + attention(layer.t2i, queries + tokens, keys + pe, keys))
        queries = layer.norm3(queries + layer.fc2(F.relu(layer.fc1(queries))))
        keys = layer.norm4(keys + attention(layer.i2t, keys + pe, queries + tokens, queries))
    queries = queries + attention(module.final_attn, queries + tokens, keys + pe, keys)
    return module.norm_final(queries), keys


def plain_decode(
    decoder: MaskDecoder,
    *,
    embedding_BCGG,
    hq_features_BCHW,
    image_index_N,
    sparse_NTC,
    dense_BCGG,
    image_pe_1CGG,
) -> TokenMasks:
    """As `MaskDecoder.forward`, with copies of every image for each of its prompts."""
    N, G = len(image_index_N), embedding_BCGG.shape[-1]
    output = torch.cat([decoder.iou_token, decoder.mask_tokens, decoder.hq_token])
    tokens = torch.cat([output.expand(N, -1, -1), sparse_NTC], dim=1)
    images = embedding_BCGG[image_index_N] + dense_BCGG
    out, keys = transformer(
        decoder.transformer,
        tokens,
        images.flatten(2).transpose(1, 2),
        image_pe_1CGG.flatten(2).transpose(1, 2),
    )
    upscaled = F.gelu(decoder.up(keys.transpose(1, 2).reshape(N, -1, G, G)))
    upscaled_hq = decoder.hq_mask(upscaled) + hq_features_BCHW[image_index_N]
    vectors = torch.stack([mlp(out[:, 1 + k]) for k, mlp in enumerate(decoder.hyper)], dim=1)
    return TokenMasks(
        sam_NKHW=torch.einsum("nku,nuhw->nkhw", vectors, upscaled),
        hq_NHW=torch.einsum("nu,nuhw->nhw", decoder.hyper_hq(out[:, 5]), upscaled_hq),
        predicted_iou_N4=decoder.iou_head(out[:, 0]),
    )
