"""The ViT image encoder of SAM: B, L, H and any smaller one of the same build.

A plain vision transformer on a G x G grid of 16 x 16 patches. Most blocks attend inside windows; a few
attend over the whole grid. The output of the first of those is the early feature of the HQ head.

Letters: as in `structures.py`; n windows (all images of a batch), W side of a window, L tokens of a
window or of the grid, h heads, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.config import VisionConfig
from model.layers import VIT_NORM_EPS, Neck
from model.structures import EncoderFeatures


def relative_position_attention(
    q_nhLd: torch.Tensor,
    k_nhLd: torch.Tensor,
    v_nhLd: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
) -> torch.Tensor:
    """Return softmax(q k' / sqrt(d) + rel_h + rel_w) v over a square of L = side * side tokens, (n, h, L, d).

    rel_h[q, k] = q . table_h[row(q) - row(k) + side - 1], with the *unscaled* q; rel_w the same with
    columns. The tables are (2 side - 1, d) and shared by the heads. Decomposed relative position, from
    MViTv2 (arXiv 2112.01526), as SAM uses it.

    This is the plain road: it holds the (L, L) logits of every head, 0.8 GiB in fp32 for one image in
    a global block of ViT-B.
    """
    n, h, length, d = q_nhLd.shape
    side = (table_h.shape[0] + 1) // 2
    offset = torch.arange(side, device=q_nhLd.device)
    offset = offset[:, None] - offset[None, :] + side - 1
    q_grid = q_nhLd.reshape(n, h, side, side, d)
    rel_h = torch.einsum("nhyxd,ykd->nhyxk", q_grid, table_h[offset])
    rel_w = torch.einsum("nhyxd,xkd->nhyxk", q_grid, table_w[offset])
    logits = ((q_nhLd * d**-0.5) @ k_nhLd.transpose(-2, -1)).view(n, h, side, side, side, side)
    # In place: each copy of the logits costs as much memory again. Nothing needs them without the terms.
    logits += rel_h[..., :, None]
    logits += rel_w[..., None, :]
    weights: torch.Tensor = logits.view(n, h, length, length).softmax(-1)
    return weights @ v_nhLd


class Attention(nn.Module):
    """Multi-head attention with decomposed relative position over squares of `side` x `side` tokens."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x_nWWC: torch.Tensor) -> torch.Tensor:
        """Return the attended tokens, same shape (n, side, side, C)."""
        n, side, _, width = x_nWWC.shape
        # Outermost q, k, v; then heads; then the head's width.
        qkv = self.qkv(x_nWWC).view(n, side * side, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = relative_position_attention(q, k, v, self.rel_pos_h, self.rel_pos_w)
        projected: torch.Tensor = self.proj(out.transpose(1, 2).reshape(n, side, side, width))
        return projected


def to_windows(x_BGGC: torch.Tensor, window: int) -> torch.Tensor:
    """Return (n, W, W, C): the grid, zero-padded at the right and the bottom, cut into windows row by row."""
    B, G, _, C = x_BGGC.shape
    across = -(-G // window)
    pad = across * window - G
    x = F.pad(x_BGGC, (0, 0, 0, pad, 0, pad))
    x = x.view(B, across, window, across, window, C).transpose(2, 3)
    return x.reshape(-1, window, window, C)


def from_windows(x_nWWC: torch.Tensor, grid: int) -> torch.Tensor:
    """Return (B, G, G, C): the inverse of `to_windows`, padding dropped."""
    _, window, _, C = x_nWWC.shape
    across = -(-grid // window)
    x = x_nWWC.view(-1, across, across, window, window, C).transpose(2, 3)
    return x.reshape(-1, across * window, across * window, C)[:, :grid, :grid]


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the input's shape."""
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block; `window` 0 attends over the whole grid."""

    def __init__(self, config: VisionConfig, *, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=VIT_NORM_EPS)
        self.attn = Attention(config.hidden_size, config.num_attention_heads, window or config.grid)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=VIT_NORM_EPS)
        self.mlp = Mlp(config.hidden_size, config.mlp_dim)

    def forward(self, x_BGGC: torch.Tensor) -> torch.Tensor:
        """Return the block's output, (B, G, G, C)."""
        x_BGGC = x_BGGC + self.attend(self.norm1(x_BGGC))
        out: torch.Tensor = x_BGGC + self.mlp(self.norm2(x_BGGC))
        return out

    def attend(self, x_BGGC: torch.Tensor) -> torch.Tensor:
        """Return the attention's output, (B, G, G, C).

        The windows' padding is added after the norm, as zeros, and takes part in the attention: nothing
        masks it. The published weights were trained so.
        """
        if self.window == 0:
            out: torch.Tensor = self.attn(x_BGGC)
            return out
        windows = self.attn(to_windows(x_BGGC, self.window))
        return from_windows(windows, x_BGGC.shape[1])


class ImageEncoderViT(nn.Module):
    """Pixels to image embedding and early feature, with a vision transformer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, config.hidden_size))
        self.blocks = nn.ModuleList(
            Block(config, window=0 if i in config.global_attn_indexes else config.window_size)
            for i in range(config.num_hidden_layers)
        )
        self.neck = Neck(config.hidden_size, config.output_channels)
        self.early_block = min(config.global_attn_indexes)

    def forward(self, pixels_B3SS: torch.Tensor) -> EncoderFeatures:
        """Return the features of B normalised, zero-padded square pictures, (B, 3, S, S), in their dtype."""
        x = self.patch_embed(pixels_B3SS).permute(0, 2, 3, 1) + self.pos_embed
        early = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            early = x if i == self.early_block else early
        return EncoderFeatures(embedding_BCGG=self.neck(x.permute(0, 3, 1, 2)), early_BGGC=early)
