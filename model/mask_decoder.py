"""SAM's mask decoder with the HQ token, over the prompts of many images at once.

Its order of work: `hq_features` once per image when it is encoded; `share` once per image and decode call;
`decode` for each chunk of prompts. `forward` is `share` and `decode` together, for training.

Three identities keep the price down; each equals the plain definition up to rounding, as tests check:
- What depends on the image alone is not done again for each prompt (see `transformer.py`).
- The HQ features of an image are never copied for its prompts: h . (x + f) = h . x + h . f, and h . f is one
  matrix product an image.
- The last 3x3 convolution of the HQ branch is contracted with the HQ token's vector before it is applied:
  one output channel for each prompt in place of 32.

Letters: B images, N prompts, T prompt tokens, K mask tokens asked for, C width, U = C / 8 upscaled channels,
G grid, H = W = 4G mask side, L = G * G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from model.config import MaskDecoderConfig
from model.device import to_device
from model.layers import LayerNorm2d, ReluMLP
from model.records import EncoderFeatures
from model.transformer import ImageSide, PositionTerms, TwoWayTransformer

ALL_MASK_TOKENS = (0, 1, 2, 3)
"""Mask token 0 is the answer to an unambiguous prompt (a box); 1 to 3 are alternatives for a single point."""

STRIP_PIXELS = 16384
"""Pixels of the HQ branch's 64 channels that are worked through together on a CPU: 2 MiB in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class TokenMasks:
    """What each output token says of N prompts, before any choice or sum. All fp32.

    `sam_NKHW`: logits (N, K, 4G, 4G) of the mask tokens asked for, in their order. `hq_NHW`: the HQ
    token's, (N, 4G, 4G). `predicted_iou_N4`: SAM's estimate for mask tokens 0 to 3; there is none for HQ.
    """

    sam_NKHW: torch.Tensor
    hq_NHW: torch.Tensor
    predicted_iou_N4: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SharedImages:
    """What the decoder computes once for each of B images, whatever the number of prompts.

    `hq_features_BLU`: fp32, (B, H * W, U).
    """

    first: ImageSide
    terms: PositionTerms
    hq_features_BLU: torch.Tensor


class Upscale(nn.Module):
    """Two 2x2 transposed convolutions of stride 2 with norm and GELU between: G to 4G."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(channels, hidden, 2, 2)
        self.norm = LayerNorm2d(hidden)
        self.conv2 = nn.ConvTranspose2d(hidden, out, 2, 2)

    def forward(self, x_BCGG: torch.Tensor) -> torch.Tensor:
        """Return the plain definition, (B, out, 4G, 4G), without a last activation."""
        out: torch.Tensor = self.conv2(F.gelu(self.norm(self.conv1(x_BCGG))))
        return out

    def cells(self, x_RC: torch.Tensor) -> torch.Tensor:
        """Return (R, 2, 2, 2, 2, out): each token's 4 x 4 pixels, as row, column, row, column.

        At stride 2 the 2x2 patches do not overlap, so each convolution is one matrix product of tokens, and
        norm and activation in between care for no order of pixels. `cells_to_map` puts them in place.
        """
        hidden = F.gelu(F.layer_norm(self._product(self.conv1, x_RC), *norm_of(self.norm)))
        return self._product(self.conv2, hidden.flatten(0, 2)).view(len(x_RC), 2, 2, 2, 2, -1)

    @staticmethod
    def _product(conv: nn.ConvTranspose2d, x_RC: torch.Tensor) -> torch.Tensor:
        channels, out = conv.weight.shape[:2]
        weight = conv.weight.permute(2, 3, 1, 0).reshape(4 * out, channels)
        return F.linear(x_RC, weight, cast(torch.Tensor, conv.bias).repeat(4)).view(-1, 2, 2, out)


def norm_of(norm: nn.LayerNorm) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor, float]:
    """Return the arguments of `F.layer_norm` after its first."""
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps


def cells_to_map(cells: torch.Tensor, grid: int) -> torch.Tensor:
    """Return (B, U, 4G, 4G), channels last in memory, of the cells of B images' tokens in rows."""
    cells = cells.view(-1, grid, grid, *cells.shape[1:]).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return cells.reshape(-1, 4 * grid, 4 * grid, cells.shape[-1]).permute(0, 3, 1, 2)


class MaskFeature(nn.Module):
    """The two 3x3 convolutions that make the decoder's upscaled map into the HQ token's map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.norm = LayerNorm2d(2 * channels)
        self.conv2 = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, upscaled_NUHW: torch.Tensor) -> torch.Tensor:
        """Return the plain definition, (N, U, 4G, 4G). The decoder itself uses `dot`."""
        out: torch.Tensor = self.conv2(F.gelu(self.norm(self.conv1(upscaled_NUHW))))
        return out

    def dot(self, upscaled_NUHW: torch.Tensor, vector_NU: torch.Tensor) -> torch.Tensor:
        """Return vector . forward(upscaled) in fp32, (N, 4G, 4G), without making the U-channel map.

        vector . conv2 is a 3x3 convolution with one output channel and its own kernel for each prompt: nine
        products a pixel and prompt, then nine shifted sums. `fold` adds at the place the tap looks from,
        a convolution takes from where it looks to, hence the flip.
        """
        N, _, H, W = upscaled_NUHW.shape
        kernel, bias = self.conv2.weight.float().flip(2, 3), cast(torch.Tensor, self.conv2.bias).float()
        taps_N9C = torch.einsum("nu,ucyx->nyxc", vector_NU, kernel).reshape(N, 9, -1)
        # Like the pixels; oneDNN is a tenth slower with a kernel in PyTorch's own order.
        kernel_3x3 = self.conv1.weight.contiguous(memory_format=torch.channels_last)
        hidden = F.conv2d(upscaled_NUHW, kernel_3x3, self.conv1.bias, padding=1)
        hidden_NLC = hidden.permute(0, 2, 3, 1).flatten(1, 2)
        # In strips that a CPU's inner caches hold: what follows is otherwise a matter of memory, not of sums.
        strips = torch.split(hidden_NLC, STRIP_PIXELS if hidden_NLC.device.type == "cpu" else H * W, dim=1)
        products = [taps_N9C @ self._activate(strip).float().transpose(1, 2) for strip in strips]
        products_N9L = torch.cat(products, dim=2)
        bias_N = vector_NU @ bias
        return F.fold(products_N9L, (H, W), 3, padding=1)[:, 0] + bias_N[:, None, None]

    def _activate(self, hidden_NLC: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.layer_norm(hidden_NLC, *norm_of(self.norm)))


class MaskDecoder(nn.Module):
    """Prompt tokens and image embedding to mask logits and scores, token by token."""

    def __init__(self, config: MaskDecoderConfig) -> None:
        super().__init__()
        width, upscaled = config.hidden_size, config.hidden_size // 8
        masks = config.num_multimask_outputs + 1
        self.iou_token = nn.Parameter(torch.randn(1, width))
        self.mask_tokens = nn.Parameter(torch.randn(masks, width))
        self.hq_token = nn.Parameter(torch.randn(1, width))
        self.transformer = TwoWayTransformer(config)
        self.up = Upscale(width, width // 4, upscaled)
        self.hyper = nn.ModuleList(ReluMLP(width, width, width, upscaled) for _ in range(masks))
        self.hyper_hq = ReluMLP(width, width, width, upscaled)
        self.iou_head = ReluMLP(width, config.iou_head_hidden_dim, config.iou_head_hidden_dim, masks)
        self.hq_vit = Upscale(config.vit_dim, width, upscaled)
        self.hq_emb = Upscale(width, width // 4, upscaled)
        self.hq_mask = MaskFeature(upscaled)

    @property
    def tokens_of_a_box(self) -> int:
        """The tokens T of a prompt that is a box: predicted IoU, mask tokens, HQ token, two corners."""
        return 1 + len(self.mask_tokens) + 1 + 2

    def hq_features(self, features: EncoderFeatures) -> torch.Tensor:
        """Return the HQ features of B images, (B, U, 4G, 4G), from the embedding and the early feature."""
        embedding_BGGC = features.embedding_BCGG.permute(0, 2, 3, 1)
        cells = self.hq_emb.cells(embedding_BGGC.flatten(0, 2))
        cells = cells + self.hq_vit.cells(features.early_BGGC.flatten(0, 2))
        return cells_to_map(cells, embedding_BGGC.shape[1])

    def share(
        self,
        *,
        embedding_BCGG: torch.Tensor,
        hq_features_BCHW: torch.Tensor,
        dense_BCGG: torch.Tensor,
        image_pe_1CGG: torch.Tensor,
    ) -> SharedImages:
        """Return what all prompts of an image share.

        `dense_BCGG`: the prompt encoder's dense map: (1, C, 1, 1) without mask prompts. With them every
        prompt is its own image here: hand in one row of `embedding_BCGG` for each.
        `image_pe_1CGG`: the prompt encoder's `image_pe()`, fp32.
        """
        dtype = embedding_BCGG.dtype
        keys_BLC = (embedding_BCGG + dense_BCGG.to(dtype)).flatten(2).transpose(1, 2)
        pe_1LC = image_pe_1CGG.to(dtype).flatten(2).transpose(1, 2)
        terms = self.transformer.position_terms(pe_1LC)
        return SharedImages(
            first=self.transformer.project_first(keys_BLC, terms),
            terms=terms,
            hq_features_BLU=hq_features_BCHW.permute(0, 2, 3, 1).flatten(1, 2).float(),
        )

    def decode(
        self,
        shared: SharedImages,
        *,
        sparse_NTC: torch.Tensor,
        key_index_N: torch.Tensor,
        hq_index_N: torch.Tensor,
        mask_tokens: Sequence[int] = ALL_MASK_TOKENS,
    ) -> TokenMasks:
        """Return the masks of N prompts.

        `key_index_N`, `hq_index_N`: int64 on the host, the row of `shared.first` and of
        `shared.hq_features_BLU` that belongs to each prompt (they differ only with mask prompts).
        Equal neighbours in `hq_index_N` are worked together. `mask_tokens`: which of 0 to 3 to compute.
        """
        N = sparse_NTC.shape[0]
        dtype, device = shared.first.keys_NLC.dtype, shared.first.keys_NLC.device
        output_tokens = torch.cat([self.iou_token, self.mask_tokens, self.hq_token])
        tokens = torch.cat([output_tokens.expand(N, -1, -1), sparse_NTC.to(dtype)], dim=1)
        image = shared.first.select(to_device(key_index_N, device))
        sam, hq, hq_vector_NU, ious = self.answer(tokens, image, shared.terms, tuple(mask_tokens))
        of_image = image_products(hq_vector_NU, shared.hq_features_BLU, hq_index_N)
        return TokenMasks(sam_NKHW=sam, hq_NHW=hq + of_image.view_as(hq), predicted_iou_N4=ious)

    def answer(
        self, tokens_NTC: torch.Tensor, image: ImageSide, terms: PositionTerms, mask_tokens: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the tokens of N prompts say of their images; shapes in, shapes out, and no waiting.

        That is: the masks of `mask_tokens` (N, K, 4G, 4G); the HQ token's (N, 4G, 4G) but for the HQ
        features; its vector (N, U) for these; and the predicted IoU (N, 4). All fp32. `image`: one row a
        prompt.
        """
        out_NTC, keys_NLC = self.transformer(tokens_NTC, image, terms)
        hq_vector_NU = self.hyper_hq(out_NTC[:, 1 + len(self.hyper)]).float()
        sam_NKU = self._mask_vectors(out_NTC, mask_tokens)
        N, device = len(tokens_NTC), tokens_NTC.device
        # On a CPU the maps of one prompt stay in its caches, those of all do not.
        step = 1 if device.type == "cpu" and not torch.is_grad_enabled() else N
        parts = [
            self._masks(keys_NLC[n : n + step], sam_NKU[n : n + step], hq_vector_NU[n : n + step])
            for n in range(0, N, step)
        ]
        sam, hq = (torch.cat(part) for part in zip(*parts, strict=True))
        return sam, hq, hq_vector_NU, self.iou_head(out_NTC[:, 0]).float()

    def _mask_vectors(self, out_NTC: torch.Tensor, mask_tokens: Sequence[int]) -> torch.Tensor:
        if not mask_tokens:
            return torch.zeros(len(out_NTC), 0, out_NTC.shape[2] // 8, device=out_NTC.device)
        return torch.stack([self.hyper[k](out_NTC[:, 1 + k]) for k in mask_tokens], dim=1).float()

    def _masks(
        self, keys_NLC: torch.Tensor, sam_NKU: torch.Tensor, hq_NU: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks of mask tokens (N, K, H, W), and of the HQ token (N, H, W) but for the HQ features."""
        grid = math.isqrt(keys_NLC.shape[1])
        upscaled_NUHW = cells_to_map(F.gelu(self.up.cells(keys_NLC.flatten(0, 1))), grid)
        N, _, H, W = upscaled_NUHW.shape
        upscaled_NLU = upscaled_NUHW.permute(0, 2, 3, 1).flatten(1, 2).float()
        sam_NKHW = (sam_NKU @ upscaled_NLU.transpose(1, 2)).view(N, -1, H, W)
        return sam_NKHW, self.hq_mask.dot(upscaled_NUHW, hq_NU)

    def forward(
        self,
        *,
        embedding_BCGG: torch.Tensor,
        hq_features_BCHW: torch.Tensor,
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
            hq_features_BCHW=hq_features_BCHW,
            dense_BCGG=dense_BCGG,
            image_pe_1CGG=image_pe_1CGG,
        )
        return self.decode(
            shared,
            sparse_NTC=sparse_NTC,
            key_index_N=key_index_N,
            hq_index_N=image_index_N,
            mask_tokens=mask_tokens,
        )


def image_products(
    vector_NU: torch.Tensor, features_BLU: torch.Tensor, index_N: torch.Tensor
) -> torch.Tensor:
    """Return vector_NU[n] . features[index[n]], fp32 (N, L), without copying features for each prompt.

    `index_N` is on the host. Each run of equal indices costs one product of all N vectors with its image,
    of which the run's rows are kept: the product's shape stays the same whatever the mix of images, and so
    do its last bits. At N = 16 that is 67 MFLOP a run, against 85 GFLOP for the chunk.
    """
    images, counts = torch.unique_consecutive(index_N, return_counts=True)
    parts, start = [], 0
    for image, count in zip(images.tolist(), counts.tolist(), strict=True):
        products = vector_NU @ features_BLU[image].T
        parts.append(products[start : start + count])
        start += count
    return torch.cat(parts)
