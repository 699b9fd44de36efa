"""The two-way transformer of SAM's mask decoder: tokens attend to the image, the image to the tokens.

What depends on the image alone is computed once for each image and shared by all its prompts: the first
layer's image-side projections, and the positional part of every later one (a projection is linear, so
W (keys + pe) + b = W keys + (W pe + b)). And where the 4096 image tokens attend to a prompt's few tokens,
their queries are never made (see `Attention.add_attended_few`). The results are those of the plain
definition up to rounding.

Letters: B images, N prompts, T tokens of a prompt, L = G * G image tokens, C width, I width inside attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from hqlabel.model.kernels import TORCH_NORM_EPS
from hqlabel.model.sam_config import ATTENTION_DOWNSAMPLE_RATE, DECODER_HEADS, MaskDecoderConfig


class Attention(nn.Module):
    """Multi-head attention with its own four projections; the inner width may be smaller than the outer."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def attend(self, q_NTI: torch.Tensor, k_NLI: torch.Tensor, v_NLI: torch.Tensor) -> torch.Tensor:
        """Return (N, T, C) from projected queries, keys and values."""
        q, k, v = (x.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for x in (q_NTI, k_NLI, v_NLI))
        attended = F.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out

    def add_attended_few(
        self, x_NLC: torch.Tensor, q_pe_1LI: torch.Tensor, k_NTI: torch.Tensor, v_NTI: torch.Tensor
    ) -> torch.Tensor:
        """Return `x + attend(W_q x + q_pe, k, v)`, (N, L, C), for few tokens T and many L.

        (W_q x) k' = x (W_q' k)', and W_o (weights v) = weights (W_o v): what is projected are the T tokens
        of each head and not the L queries: h T / I of the plain products, and no queries in memory. The
        weights of a head add up to 1, so each head's tokens bring their share of the bias along, and the last
        product is added onto x with one rounding.
        """
        width, inner = self.out_proj.out_features, self.out_proj.in_features
        k_NhTd, v_NhTd = (
            x.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for x in (k_NTI * self._scale, v_NTI)
        )
        query_NhTC = k_NhTd @ self.q_proj.weight.view(self.heads, -1, width)
        value_NhTC = v_NhTd @ self.out_proj.weight.t().view(self.heads, inner // self.heads, width)
        logits_NhTL = k_NhTd @ q_pe_1LI.view(-1, self.heads, inner // self.heads).permute(1, 2, 0)
        logits = torch.baddbmm(logits_NhTL.flatten(1, 2), query_NhTC.flatten(1, 2), x_NLC.transpose(1, 2))
        weights = logits.view(logits_NhTL.shape).softmax(2).flatten(1, 2)
        value_NhTC = value_NhTC + self.out_proj.bias / self.heads
        return torch.baddbmm(x_NLC, weights.transpose(1, 2), value_NhTC.flatten(1, 2))

    @property
    def _scale(self) -> float:
        return math.pow(self.out_proj.in_features // self.heads, -0.5)

    def forward(self, q_NTC: torch.Tensor, k_NLC: torch.Tensor, v_NLC: torch.Tensor) -> torch.Tensor:
        """Return (N, T, C)."""
        return self.attend(self.q_proj(q_NTC), self.k_proj(k_NLC), self.v_proj(v_NLC))


class ReluMLPBlock(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the input's shape."""
        out: torch.Tensor = self.lin2(F.relu(self.lin1(x)))
        return out


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """Image tokens with their projections for one layer: what the prompt's tokens attend to."""

    keys_NLC: torch.Tensor
    k_NLI: torch.Tensor
    v_NLI: torch.Tensor

    def select(self, index_N: torch.Tensor) -> ImageTokens:
        """Return the rows of `index_N` (an image for each prompt), copied."""
        return ImageTokens(
            keys_NLC=self.keys_NLC.index_select(0, index_N),
            k_NLI=self.k_NLI.index_select(0, index_N),
            v_NLI=self.v_NLI.index_select(0, index_N),
        )


@dataclass(frozen=True, kw_only=True)
class PositionTerms:
    """W pe + b of every projection that sees the image's positional encoding; constants of the weights.

    `t2i_k`, `i2t_q`: one (1, L, I) a layer. `final_k`: (1, L, I).
    """

    t2i_k: tuple[torch.Tensor, ...]
    i2t_q: tuple[torch.Tensor, ...]
    final_k: torch.Tensor


class TwoWayBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens; a norm after each."""

    def __init__(self, config: MaskDecoderConfig, *, first: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.hidden_size // ATTENTION_DOWNSAMPLE_RATE
        heads = DECODER_HEADS
        self.first = first
        self.self_attn = Attention(width, width, heads)
        self.cross_attn_token_to_image = Attention(width, inner, heads)
        self.cross_attn_image_to_token = Attention(width, inner, heads)
        self.mlp = ReluMLPBlock(width, config.mlp_dim)
        self.norm1 = nn.LayerNorm(width, eps=TORCH_NORM_EPS)
        self.norm2 = nn.LayerNorm(width, eps=TORCH_NORM_EPS)
        self.norm3 = nn.LayerNorm(width, eps=TORCH_NORM_EPS)
        self.norm4 = nn.LayerNorm(width, eps=TORCH_NORM_EPS)

    def project_image(self, keys_NLC: torch.Tensor, t2i_k_pe: torch.Tensor) -> ImageTokens:
        """Return the image tokens with this layer's image-side projections."""
        return ImageTokens(
            keys_NLC=keys_NLC,
            k_NLI=F.linear(keys_NLC, self.cross_attn_token_to_image.k_proj.weight) + t2i_k_pe,
            v_NLI=self.cross_attn_token_to_image.v_proj(keys_NLC),
        )

    def forward(
        self,
        queries_NTC: torch.Tensor,
        initial_NTC: torch.Tensor,
        image: ImageTokens,
        i2t_q_pe: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the updated tokens (N, T, C) and image tokens (N, L, C).

        `initial_NTC` are the tokens before the first layer; they are added again wherever a token is
        query or key, as its positional encoding.
        """
        if self.first:
            # No residual and no positional encoding here, in the first layer only.
            queries = self.self_attn(queries_NTC, queries_NTC, queries_NTC)
        else:
            q = queries_NTC + initial_NTC
            queries = queries_NTC + self.self_attn(q, q, queries_NTC)
        queries = self.norm1(queries)

        to_image = self.cross_attn_token_to_image
        q_NTI = to_image.q_proj(queries + initial_NTC)
        queries = self.norm2(queries + to_image.attend(q_NTI, image.k_NLI, image.v_NLI))
        queries = self.norm3(queries + self.mlp(queries))

        to_token = self.cross_attn_image_to_token
        k_NTI, v_NTI = to_token.k_proj(queries + initial_NTC), to_token.v_proj(queries)
        keys = self.norm4(to_token.add_attended_few(image.keys_NLC, i2t_q_pe, k_NTI, v_NTI))
        return queries, keys


class TwoWayTransformer(nn.Module):
    """The layers, and a last attention of the tokens to the image."""

    def __init__(self, config: MaskDecoderConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.hidden_size // ATTENTION_DOWNSAMPLE_RATE
        self.layers = nn.ModuleList(
            TwoWayBlock(config, first=i == 0) for i in range(config.num_hidden_layers)
        )
        self.final_attn_token_to_image = Attention(width, inner, DECODER_HEADS)
        self.norm_final_attn = nn.LayerNorm(width, eps=TORCH_NORM_EPS)

    def blocks(self) -> list[TwoWayBlock]:
        """Return the layers in order."""
        return [cast(TwoWayBlock, layer) for layer in self.layers]

    def position_terms(self, pe_1LC: torch.Tensor) -> PositionTerms:
        """Return the projections of the image's positional encoding, (1, L, C) in the weights' dtype."""
        return PositionTerms(
            t2i_k=tuple(block.cross_attn_token_to_image.k_proj(pe_1LC) for block in self.blocks()),
            i2t_q=tuple(block.cross_attn_image_to_token.q_proj(pe_1LC) for block in self.blocks()),
            final_k=self.final_attn_token_to_image.k_proj(pe_1LC),
        )

    def project_first(self, keys_BLC: torch.Tensor, terms: PositionTerms) -> ImageTokens:
        """Return the image tokens for the first layer, shared by every prompt of an image."""
        return self.blocks()[0].project_image(keys_BLC, terms.t2i_k[0])

    def forward(
        self, tokens_NTC: torch.Tensor, image: ImageTokens, terms: PositionTerms
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the final tokens (N, T, C) and the *updated* image tokens (N, L, C).

        `image`: the tokens for the first layer, one row a prompt. The second result is what is upscaled to
        masks; taking the image tokens from before the transformer instead gives wrong masks and right scores.
        """
        first, *later = self.blocks()
        queries, keys = first(tokens_NTC, tokens_NTC, image, terms.i2t_q[0])
        for i, block in enumerate(later, start=1):
            side = block.project_image(keys, terms.t2i_k[i])
            queries, keys = block(queries, tokens_NTC, side, terms.i2t_q[i])
        final = self.final_attn_token_to_image
        q_NTI = final.q_proj(queries + tokens_NTC)
        k_NLI = F.linear(keys, final.k_proj.weight) + terms.final_k
        queries = queries + final.attend(q_NTI, k_NLI, final.v_proj(keys))
        return self.norm_final_attn(queries), keys
