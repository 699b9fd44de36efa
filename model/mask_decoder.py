"""SAM's mask decoder with the HQ token, over the prompts of many images at once.

`MaskDecoderHQ` of the original, its `predict_masks` in three steps: `hq_features` once per image when it is
encoded; `share` once per image and decode call; `decode` for each chunk of prompts. `forward` is `share` and
`decode` together, for training.

Three identities reduce the cost; each equals the plain definition up to rounding, as tests check:
- What depends on the image alone is not done again for each prompt (see `transformer.py`).
- The HQ features of an image are never copied for its prompts: h . (x + f) = h . x + h . f, and h . f is one
  matrix product an image.
- The last 3x3 convolution of the HQ branch is contracted with the HQ token's vector before it is applied:
  one output channel for each prompt in place of 32.

Letters: B images, N prompts, T tokens of a prompt (learned and sparse), K mask tokens to compute, C width,
U = C / 8 upscaled channels, G grid, H = W = 4G mask side, L tokens of an image (G * G), or its pixels (H * W)
next to U.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from hqlabel.model import kernels
from hqlabel.model.device import to_device
from hqlabel.model.kernels import LayerNorm2d
from hqlabel.model.records import EncoderFeatures
from hqlabel.model.sam_config import NUM_MULTIMASK_OUTPUTS, MaskDecoderConfig
from hqlabel.model.transformer import ImageTokens, PositionTerms, TwoWayTransformer

ALL_MASK_TOKENS = (0, 1, 2, 3)
"""Mask token 0 is the answer to an unambiguous prompt (a box); 1 to 3 are alternatives for a single point."""


@dataclass(frozen=True, kw_only=True)
class TokenMasks:
    """What each output token gives for N prompts, before any choice or sum. All fp32.

    `sam_NKHW`: logits (N, K, 4G, 4G) of the mask tokens to compute, in their order. `hq_NHW`: the HQ
    token's, (N, 4G, 4G). `predicted_iou_N4`: SAM's estimate for mask tokens 0 to 3; there is none for HQ.
    """

    sam_NKHW: torch.Tensor
    hq_NHW: torch.Tensor
    predicted_iou_N4: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SharedImages:
    """What the decoder computes once for each of B images, whatever the number of prompts.

    `features`: what else of each image the masks are made of, one row an image; here the HQ features, fp32
    (B, H * W, U).
    """

    first_layer: ImageTokens
    terms: PositionTerms
    features: tuple[torch.Tensor, ...]


class MLP(nn.Module):
    """Linear layers with ReLU between them: hypernetworks, the IoU head and the HQ token's head.

    `widths` are those of input, hidden layers and output, so that three layers need four numbers.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., widths[-1]) from (..., widths[0])."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        out: torch.Tensor = last(x)
        return out


def upscaling(channels: int, hidden: int, out: int, *last: nn.Module) -> nn.Sequential:
    """Return two 2x2 transposed convolutions of stride 2 with norm and GELU between: G to 4G."""
    return nn.Sequential(
        nn.ConvTranspose2d(channels, hidden, 2, 2),
        LayerNorm2d(hidden),
        nn.GELU(),
        nn.ConvTranspose2d(hidden, out, 2, 2),
        *last,
    )


class MaskDecoder(nn.Module):
    """Prompt tokens and image embedding to mask logits and scores, token by token."""

    first_mask_token = 1
    """Place of mask token 0 among the output tokens: the IoU token is before it, the HQ token after all."""

    def __init__(self, config: MaskDecoderConfig) -> None:
        super().__init__()
        width, upscaled = config.hidden_size, config.hidden_size // 8
        masks = 1 + NUM_MULTIMASK_OUTPUTS
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(masks, width)
        self.hf_token = nn.Embedding(1, width)
        self.transformer = TwoWayTransformer(config)
        self.output_upscaling = upscaling(width, width // 4, upscaled, nn.GELU())
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(width, width, width, upscaled) for _ in range(masks)
        )
        self.hf_mlp = MLP(width, width, width, upscaled)
        hidden = config.iou_head_hidden_dim
        self.iou_prediction_head = MLP(width, hidden, hidden, masks)
        self.add_image_layers(config)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(upscaled, 2 * upscaled, 3, padding=1),
            LayerNorm2d(2 * upscaled),
            nn.GELU(),
            nn.Conv2d(2 * upscaled, upscaled, 3, padding=1),
        )

    def add_image_layers(self, config: MaskDecoderConfig) -> None:
        """Make the layers of `hq_features`."""
        width, upscaled = config.hidden_size, config.hidden_size // 8
        self.compress_vit_feat = upscaling(config.vit_dim, width, upscaled)
        self.embedding_encoder = upscaling(width, width // 4, upscaled)

    @property
    def tokens_of_a_box(self) -> int:
        """The number T of tokens of a box prompt: predicted IoU, mask tokens, HQ token, two corners."""
        return len(self.output_tokens()) + 2

    def output_tokens(self) -> torch.Tensor:
        """Return the learned tokens in their order: predicted IoU, mask tokens, HQ token."""
        return torch.cat([self.iou_token.weight, self.mask_tokens.weight, self.hf_token.weight])

    def hq_features(self, features: EncoderFeatures) -> torch.Tensor:
        """Return the HQ features of B images, (B, U, 4G, 4G): the sum of two upscaled maps.

        They are of the embedding and of the early feature; the paper's fusion of global and local features.
        """
        embedding_BGGC = features.embedding_BCGG.permute(0, 2, 3, 1)
        cells = kernels.upscale_cells(self.embedding_encoder, embedding_BGGC.flatten(0, 2))
        cells = cells + kernels.upscale_cells(self.compress_vit_feat, features.early_BGGC.flatten(0, 2))
        return kernels.cells_to_map(cells, embedding_BGGC.shape[1])

    def share(
        self,
        *,
        embedding_BCGG: torch.Tensor,
        features: tuple[torch.Tensor, ...],
        dense_BCGG: torch.Tensor,
        image_pe_1CGG: torch.Tensor,
    ) -> SharedImages:
        """Return what all prompts of an image share.

        `features`: those of an `ImageEmbedding`. `dense_BCGG`: the prompt encoder's dense map: (1, C, 1, 1)
        without mask prompts. With them every prompt is its own image here: pass one row of
        `embedding_BCGG` for each. `image_pe_1CGG`: the prompt encoder's `image_pe()`, fp32.
        """
        dtype = embedding_BCGG.dtype
        keys_BLC = (embedding_BCGG + dense_BCGG.to(dtype)).flatten(2).transpose(1, 2)
        pe_1LC = image_pe_1CGG.to(dtype).flatten(2).transpose(1, 2)
        terms = self.transformer.position_terms(pe_1LC)
        return SharedImages(
            first_layer=self.transformer.project_first(keys_BLC, terms),
            terms=terms,
            features=self.feature_rows(features),
        )

    def feature_rows(self, features: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return an embedding's features as `decode` reads them."""
        (hq_features_BCHW,) = features
        return (hq_features_BCHW.permute(0, 2, 3, 1).flatten(1, 2).float(),)

    def decode(
        self,
        shared: SharedImages,
        *,
        sparse_NTC: torch.Tensor,
        key_index_N: torch.Tensor,
        image_index_N: torch.Tensor,
        mask_tokens: Sequence[int] = ALL_MASK_TOKENS,
    ) -> TokenMasks:
        """Return the masks of N prompts.

        `key_index_N`, `image_index_N`: int64 on the host, the row of `shared.first_layer` and of
        `shared.features` that belongs to each prompt (they differ only with mask prompts). Equal neighbours
        in `image_index_N` are computed together. `mask_tokens`: which of 0 to 3 to compute.
        """
        tokens, image = self.tokens_and_images(shared, sparse_NTC, key_index_N)
        sam, hq, hq_vector_NU, ious = self.decode_tokens(tokens, image, shared.terms, (), tuple(mask_tokens))
        of_image = image_products(hq_vector_NU, shared.features[0], image_index_N)
        return TokenMasks(sam_NKHW=sam, hq_NHW=hq + of_image.view_as(hq), predicted_iou_N4=ious)

    def tokens_and_images(
        self, shared: SharedImages, sparse_NTC: torch.Tensor, key_index_N: torch.Tensor
    ) -> tuple[torch.Tensor, ImageTokens]:
        """Return the learned and sparse tokens of each prompt, (N, T, C), and the image tokens of each."""
        dtype, device = shared.first_layer.keys_NLC.dtype, shared.first_layer.keys_NLC.device
        learned = self.output_tokens().expand(len(sparse_NTC), -1, -1)
        tokens = torch.cat([learned, sparse_NTC.to(dtype)], dim=1)
        return tokens, shared.first_layer.select(to_device(key_index_N, device))

    def decode_tokens(
        self,
        tokens_NTC: torch.Tensor,
        image: ImageTokens,
        terms: PositionTerms,
        finer: tuple[torch.Tensor, ...],
        mask_tokens: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the tokens of N prompts give for their images; the host waits for nothing.

        These are: the masks of `mask_tokens` (N, K, 4G, 4G); the HQ token's (N, 4G, 4G) without the
        HQ features; its vector (N, U) for these; and the predicted IoU (N, 4). All fp32. `image`, `finer`:
        one row a prompt; see `masks_of_vectors`.
        """
        out_NTC, keys_NLC = self.transformer(tokens_NTC, image, terms)
        sam_NKU, hq_vector_NU, ious_N4 = self.vectors_and_scores(out_NTC, mask_tokens)
        sam, hq = kernels.prompt_by_prompt(self.masks_of_vectors, sam_NKU, hq_vector_NU, keys_NLC, *finer)
        return sam, hq, hq_vector_NU, ious_N4

    def vectors_and_scores(
        self, out_NTC: torch.Tensor, mask_tokens: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the vectors of mask tokens (N, K, U) and of the HQ token (N, U), and the IoU (N, 4)."""
        first, mlps = self.first_mask_token, self.output_hypernetworks_mlps
        vectors = [mlps[k](out_NTC[:, first + k]) for k in mask_tokens]
        none_N0U = out_NTC.new_zeros(len(out_NTC), 0, out_NTC.shape[2] // 8)
        sam_NKU = torch.stack(vectors, dim=1) if vectors else none_N0U
        hq_NU, ious_N4 = self.hf_mlp(out_NTC[:, first + len(mlps)]), self.scores(out_NTC)
        return sam_NKU.float(), hq_NU.float(), ious_N4.float()

    def scores(self, out_NTC: torch.Tensor) -> torch.Tensor:
        """Return the predicted IoU of mask tokens 0 to 3, (N, 4)."""
        ious: torch.Tensor = self.iou_prediction_head(out_NTC[:, self.first_mask_token - 1])
        return ious

    def masks_of_vectors(
        self, sam_NKU: torch.Tensor, hq_NU: torch.Tensor, keys_NLC: torch.Tensor, *finer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return masks of mask tokens (N, K, H, W), and the HQ token's (N, H, W) without the HQ features.

        `finer`: what `upscale_cells` adds, one row a prompt; nothing here.
        """
        added = [x.flatten(0, 1) for x in finer]
        cells = kernels.upscale_cells(self.output_upscaling, keys_NLC.flatten(0, 1), added)
        upscaled_NUHW = kernels.cells_to_map(cells, math.isqrt(keys_NLC.shape[1]))
        N, _, H, W = upscaled_NUHW.shape
        upscaled_NLU = upscaled_NUHW.permute(0, 2, 3, 1).flatten(1, 2).float()
        sam_NKHW = (sam_NKU @ upscaled_NLU.transpose(1, 2)).view(N, -1, H, W)
        return sam_NKHW, kernels.dot_maskfeature(self.embedding_maskfeature, upscaled_NUHW, hq_NU)

    def forward(
        self,
        *,
        embedding_BCGG: torch.Tensor,
        features: tuple[torch.Tensor, ...],
        image_index_N: torch.Tensor,
        sparse_NTC: torch.Tensor,
        dense_BCGG: torch.Tensor,
        image_pe_1CGG: torch.Tensor,
        mask_tokens: Sequence[int] = ALL_MASK_TOKENS,
    ) -> TokenMasks:
        """Return the masks of N prompts over B images in one call; differentiable.

        `image_index_N`: int64 on the host, the image of each prompt. `sparse_NTC`, `dense_BCGG`: as the
        prompt encoder returns them; a dense map of N rows (mask prompts) is added to each prompt's image.
        """
        key_index_N = image_index_N
        if dense_BCGG.shape[2] > 1:
            embedding_BCGG = embedding_BCGG.index_select(0, image_index_N.to(embedding_BCGG.device))
            key_index_N = torch.arange(len(image_index_N))
        shared = self.share(
            embedding_BCGG=embedding_BCGG,
            features=features,
            dense_BCGG=dense_BCGG,
            image_pe_1CGG=image_pe_1CGG,
        )
        return self.decode(
            shared,
            sparse_NTC=sparse_NTC,
            key_index_N=key_index_N,
            image_index_N=image_index_N,
            mask_tokens=mask_tokens,
        )


def image_products(
    vector_NU: torch.Tensor, features_BLU: torch.Tensor, index_N: torch.Tensor
) -> torch.Tensor:
    """Return vector_NU[n] . features[index[n]], fp32 (N, L), without copying features for each prompt.

    `index_N` is on the host. Each run of equal indices costs one product of all N vectors with its image,
    of which its own rows are kept: the product's shape stays the same whatever the mix of images, and so do
    its last bits. At N = 16 that is 67 MFLOP a stretch, against 85 GFLOP for the chunk.
    """
    images, counts = torch.unique_consecutive(index_N, return_counts=True)
    parts, start = [], 0
    for image, count in zip(images.tolist(), counts.tolist(), strict=True):
        products = vector_NU @ features_BLU[image].T
        parts.append(products[start : start + count])
        start += count
    return torch.cat(parts)
