"""The mask decoder by its plain definition: everything for every prompt, nothing shared, nothing contracted.

It reads the weights of a `MaskDecoder` and is what that module's shortcuts are held to.
"""

import torch

from hqlabel.model.mask_decoder import MaskDecoder, TokenMasks


def attention(layer, q, k, v):
    def heads(x):
        return x.reshape(*x.shape[:2], layer.heads, -1).transpose(1, 2)

    q, k, v = heads(layer.q_proj(q)), heads(layer.k_proj(k)), heads(layer.v_proj(v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return layer.out_proj((weights @ v).transpose(1, 2).flatten(2))


def transformer(module, tokens, keys, pe):
    queries = tokens
    for i, layer in enumerate(module.layers):
        if i == 0:
            queries = attention(layer.self_attn, queries, queries, queries)
        else:
            q = queries + tokens
            queries = queries + attention(layer.self_attn, q, q, queries)
        queries = layer.norm1(queries)
        queries = layer.norm2(
            queries + attention(layer.cross_attn_token_to_image, queries + tokens, keys + pe, keys)
        )
        queries = layer.norm3(queries + layer.mlp(queries))
        keys = layer.norm4(
            keys + attention(layer.cross_attn_image_to_token, keys + pe, queries + tokens, queries)
        )
    queries = queries + attention(module.final_attn_token_to_image, queries + tokens, keys + pe, keys)
    return module.norm_final_attn(queries), keys


def plain_decode(
    decoder: MaskDecoder,
    *,
    embedding_BCGG,
    features,
    image_index_N,
    sparse_NTC,
    dense_BCGG,
    image_pe_1CGG,
) -> TokenMasks:
    """As `MaskDecoder.forward`, with copies of every image for each of its prompts."""
    N, G = len(image_index_N), embedding_BCGG.shape[-1]
    tokens = torch.cat([decoder.output_tokens().expand(N, -1, -1), sparse_NTC], dim=1)
    images = embedding_BCGG[image_index_N] + dense_BCGG
    out, keys = transformer(
        decoder.transformer,
        tokens,
        images.flatten(2).transpose(1, 2),
        image_pe_1CGG.flatten(2).transpose(1, 2),
    )
    upscaled = decoder.output_upscaling(keys.transpose(1, 2).reshape(N, -1, G, G))
    upscaled_hq = decoder.embedding_maskfeature(upscaled) + features[0][image_index_N]
    vectors = torch.stack(
        [mlp(out[:, 1 + k]) for k, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1
    )
    return TokenMasks(
        sam_NKHW=torch.einsum("nku,nuhw->nkhw", vectors, upscaled),
        hq_NHW=torch.einsum("nu,nuhw->nhw", decoder.hf_mlp(out[:, 5]), upscaled_hq),
        predicted_iou_N4=decoder.iou_prediction_head(out[:, 0]),
    )
