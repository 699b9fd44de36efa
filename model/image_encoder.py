"""The ViT image encoder of SAM: B, L, H and any smaller one of the same build.

A plain vision transformer on a G x G grid of 16 x 16 patches. Most blocks attend inside windows; a few
attend over the whole grid. The output of the first of those is the early feature of the HQ head.

Letters: as in `structures.py`; n windows (all images of a batch), W side of a window, L tokens of a
window or of the grid, h heads, d width of a head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from model.attention import blocked_attention, folded_attention, plain_attention
from model.config import VisionConfig
from model.layers import VIT_NORM_EPS, Neck, is_inference
from model.records import EncoderFeatures


class Attention(nn.Module):
    """Multi-head attention with decomposed relative position over squares of `side` x `side` tokens.

    `forward` is the plain definition on squares; `attend_rows` is what inference takes.
    """

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
        out = plain_attention(q, k, v, self.rel_pos_h, self.rel_pos_w)
        projected: torch.Tensor = self.proj(out.transpose(1, 2).reshape(n, side, side, width))
        return projected

    def attend_rows(
        self, x_RC: torch.Tensor, squares: int, gather_T: torch.Tensor | None, back_R: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the attended tokens, (R, C), of R tokens in any order, without gradients.

        `gather_T`: for each token of each square the row of it, R for a token of padding (`window_rows`).
        `back_R`: for each row its place among the tokens of the squares. None: the rows are the squares.
        A token of zeros is projected to the bias, so the padding needs no matrix work.
        """
        rows, width = x_RC.shape
        qkv = x_RC.new_empty(rows + 1, 3 * width)
        torch.addmm(self.qkv.bias, x_RC, self.qkv.weight.t(), out=qkv[:rows])
        qkv[rows] = self.qkv.bias
        parts = qkv.view(rows + 1, 3 * self.heads, -1).transpose(0, 1)
        parts = parts[:, :rows].contiguous() if gather_T is None else parts.contiguous()
        if gather_T is not None:
            parts = parts.index_select(1, gather_T)
        q, k, v = parts.view(3, self.heads, squares, -1, width // self.heads).unbind(0)
        if x_RC.device.type != "cpu":
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            out = folded_attention(q, k, v, self.rel_pos_h, self.rel_pos_w).transpose(1, 2).flatten(2)
        else:
            out = blocked_attention(q, k, v, self.rel_pos_h, self.rel_pos_w)
        out_TC = out.reshape(-1, width)
        projected: torch.Tensor = self.proj(out_TC if back_R is None else out_TC.index_select(0, back_R))
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def window_rows(
    images: int, grid: int, window: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the tokens of `to_windows` come from and where `from_windows` finds them; int64, flat.

    The first is (n * W * W,): rows of the images' tokens, and their number for padding. The second is
    (images * grid * grid,): places among the windows' tokens. Made once; constants for torch.compile.
    """
    return _window_rows(images, grid, window, device)


@lru_cache(maxsize=64)
def _window_rows(
    images: int, grid: int, window: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(images * grid * grid, dtype=torch.float64).view(images, grid, grid, 1)
    gather = to_windows(rows + 1, window).flatten().long() - 1
    places = torch.arange(len(gather)).view(-1, window, window, 1)
    gather[gather < 0] = images * grid * grid
    return gather.to(device), from_windows(places, grid).flatten().to(device)


STRIP_TOKENS = 512
"""Tokens that go through an `Mlp` together on a CPU: their hidden values, 3 MiB in bfloat16 for ViT-B, stay
in a core's share of the caches; those of a whole picture go out to memory and back twice."""


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the input's shape."""
        if x.device.type != "cpu" or not is_inference(x.device):
            whole: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
            return whole
        rows_RC = x.flatten(0, -2)
        out_RC = torch.empty_like(rows_RC)
        parts = zip(*(torch.split(x, STRIP_TOKENS) for x in (rows_RC, out_RC)), strict=True)
        for part_RC, out in parts:
            torch.addmm(self.fc2.bias, F.gelu(self.fc1(part_RC)), self.fc2.weight.t(), out=out)
        return out_RC.view(x.shape)


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
        masks it. The published weights were trained so. With gradients, and under autocast, which casts
        some products and not others, this is the plain definition.
        """
        if is_inference(x_BGGC.device):
            return self._attend_fast(x_BGGC)
        if self.window == 0:
            out: torch.Tensor = self.attn(x_BGGC)
            return out
        windows = self.attn(to_windows(x_BGGC, self.window))
        return from_windows(windows, x_BGGC.shape[1])

    def _attend_fast(self, x_BGGC: torch.Tensor) -> torch.Tensor:
        images, grid = x_BGGC.shape[:2]
        squares, gather, back = images, None, None
        if self.window:
            gather, back = window_rows(images, grid, self.window, x_BGGC.device)
            squares = len(gather) // self.window**2
        return self.attn.attend_rows(x_BGGC.flatten(0, 2), squares, gather, back).view(x_BGGC.shape)


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
        # Contiguous, or every sum and norm that follows goes on in the convolution's order of memory.
        x = self.patch_embed(pixels_B3SS).permute(0, 2, 3, 1).contiguous() + self.pos_embed
        early = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            early = x if i == self.early_block else early
        return EncoderFeatures(embedding_BCGG=self.neck(x.permute(0, 3, 1, 2)), early_BGGC=early)
