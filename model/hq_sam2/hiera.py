"""HQ-SAM 2's image encoder: a Hiera of four stages (arXiv 2306.00989, 2408.00714) and a feature pyramid.

Tokens start as a grid of S / 4 and are pooled by 2 at the first block of each later stage. Blocks attend in
windows of their stage, a few over the whole grid; there is no relative position, so attention is PyTorch's
own. What is easy to get wrong: a block that pools works in windows of the stage *before*; its shortcut comes
from the normalised tokens and is projected before it is pooled; only its queries are pooled, inside each
window; padding is zeros after the norm and takes part in the attention.

Letters: as in `records.py`; H = W the side of a stage's grid, n windows (of all images), w tokens along one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from hqlabel.model import kernels
from hqlabel.model.hq_sam2.hiera_config import HieraConfig
from hqlabel.model.image_encoder import from_windows, to_windows
from hqlabel.model.kernels import VIT_NORM_EPS

STRIP_TOKENS = 4096
"""Tokens that go through the attention of a block together on a CPU, in whole windows, so that their queries,
keys and values stay near the core; those of a whole image are 226 MB in the largest size."""

MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class HieraFeatures:
    """What the encoder returns for B images.

    `embedding_BCGG`: the pyramid's level of stride 16, (B, C, G, G), with `no_mem_embed` on it.
    `half_BHWC`, `full_BHWC`: its levels of stride 8 and 4, (B, 2G, 2G, C) and (B, 4G, 4G, C).
    """

    embedding_BCGG: torch.Tensor
    half_BHWC: torch.Tensor
    full_BHWC: torch.Tensor


def pool(x_nHWC: torch.Tensor) -> torch.Tensor:
    """Return the largest of each 2 x 2 tokens, (n, H / 2, W / 2, C)."""
    rows = torch.maximum(x_nHWC[:, 0::2], x_nHWC[:, 1::2])
    return torch.maximum(rows[:, :, 0::2], rows[:, :, 1::2])


class PoolingAttention(nn.Module):
    """Multi-head attention inside squares of tokens; `pools`: with one query for each 2 x 2 tokens."""

    def __init__(self, width: int, out: int, heads: int, *, pools: bool) -> None:
        super().__init__()
        self.heads = heads
        self.pools = pools
        self.qkv = nn.Linear(width, 3 * out)
        self.proj = nn.Linear(out, out)

    def forward(self, x_nWWC: torch.Tensor) -> torch.Tensor:
        """Return (n, w, w, out) of squares of tokens, (n, w / 2, w / 2, out) where it pools."""
        n, side = len(x_nWWC), x_nWWC.shape[1] // (2 if self.pools else 1)
        # Outermost q, k, v; then heads; then the head's width.
        q, k, v = self.qkv(x_nWWC).chunk(3, dim=-1)
        q = pool(q) if self.pools else q
        width = q.shape[-1]
        q, k, v = (x.reshape(n, -1, self.heads, width // self.heads).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        projected: torch.Tensor = self.proj(out.reshape(n, side, side, width))
        return projected


class GeluMLP(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the input's shape."""
        first, second = (cast(nn.Linear, layer) for layer in self.layers)
        return kernels.mlp(x, first, second)


class HieraBlock(nn.Module):
    """A pre-norm transformer block; `window` 0 attends over the whole grid."""

    def __init__(self, width: int, out: int, heads: int, *, window: int, pools: bool) -> None:
        super().__init__()
        self.window = window
        self.pools = pools
        self.norm1 = nn.LayerNorm(width, eps=VIT_NORM_EPS)
        self.attn = PoolingAttention(width, out, heads, pools=pools)
        self.norm2 = nn.LayerNorm(out, eps=VIT_NORM_EPS)
        self.mlp = GeluMLP(out, MLP_RATIO * out)
        if pools:
            self.proj = nn.Linear(width, out)

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        """Return the block's output: (B, H, W, C), or (B, H / 2, W / 2, 2 C) where it pools."""
        normed = self.norm1(x_BHWC)
        shortcut = pool(self.proj(normed)) if self.pools else x_BHWC
        x = shortcut + self.attend(normed)
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out

    def attend(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        """Return the attention's output, of the block's output's shape."""
        grid = x_BHWC.shape[1]
        windows = to_windows(x_BHWC, self.window or grid)
        in_cache = max(1, STRIP_TOKENS // windows.shape[1] ** 2)
        strip = in_cache if windows.device.type == "cpu" else len(windows)
        attended = torch.cat([self.attn(part) for part in torch.split(windows, strip)])
        return from_windows(attended, grid // 2 if self.pools else grid)


class PatchConvolution(nn.Module):
    """Overlapping patches of pixels to tokens: 7 x 7 at every fourth pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 7, 4, 3)

    def forward(self, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        """Return the tokens, (B, S / 4, S / 4, C)."""
        tokens: torch.Tensor = self.proj(pixels_B3SS).permute(0, 2, 3, 1).contiguous()
        return tokens


class HieraTrunk(nn.Module):
    """Pixels to the tokens of each stage."""

    def __init__(self, config: HieraConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.grid = config.image_size // 4
        self.patch_embed = PatchConvolution(width)
        self.pos_embed = nn.Parameter(torch.zeros(1, width, *(config.background_side,) * 2))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, width, *(config.window_spec[0],) * 2))
        self.blocks = nn.ModuleList(
            HieraBlock(
                (width << stage) >> pools,
                width << stage,
                config.num_heads << stage,
                window=window,
                pools=pools,
            )
            for stage, window, pools in config.blocks()
        )
        self.ends = {sum(config.stages[: stage + 1]) - 1 for stage in range(len(config.stages))}

    def position(self) -> torch.Tensor:
        """Return the position of each token, fp32 (1, S / 4, S / 4, C): a coarse table, and one of a window.

        The first is resized, bicubic; the second is repeated.
        """
        tile = self.pos_embed_window.float()
        coarse = F.interpolate(self.pos_embed.float(), (self.grid, self.grid), mode="bicubic")
        times = self.grid // tile.shape[-1]
        return (coarse + tile.repeat(1, 1, times, times)).permute(0, 2, 3, 1)

    def forward(self, pixels_B3SS: torch.Tensor) -> list[torch.Tensor]:
        """Return the output of each stage, (B, H, W, C), finest first, of normalised images (B, 3, S, S)."""
        tokens = self.patch_embed(pixels_B3SS)
        x = tokens + self.position().to(tokens.dtype)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                outputs.append(x)
        return outputs


class Pyramid(nn.Module):
    """The stages' outputs brought to one width; stride 16 alone gets a coarser level added, that of 32."""

    def __init__(self, config: HieraConfig) -> None:
        super().__init__()
        # The first is of the coarsest stage.
        widths = [config.embed_dim << stage for stage in reversed(range(len(config.stages)))]
        self.convs = nn.ModuleList(
            nn.Sequential(OrderedDict(conv=nn.Conv2d(width, config.output_channels, 1))) for width in widths
        )

    def forward(self, stages: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the levels of stride 4, 8 and 16, (B, H, W, C) each."""
        convs = [cast(nn.Conv2d, cast(nn.Sequential, level)[0]) for level in reversed(self.convs)]
        full, half, embedding, coarse = map(kernels.convolve_1x1, convs, stages)
        nearest = coarse.float().repeat_interleave(2, 1).repeat_interleave(2, 2)
        return [full, half, (embedding.float() + nearest).to(embedding.dtype)]


class HieraEncoder(nn.Module):
    """Pixels to the three feature maps that the mask decoder reads."""

    def __init__(self, config: HieraConfig) -> None:
        super().__init__()
        self.trunk = HieraTrunk(config)
        self.neck = Pyramid(config)
        # It stands for the memory of earlier frames, of which a single image has none.
        self.no_mem_embed = nn.Parameter(torch.zeros(1, 1, config.output_channels))

    def forward(self, pixels_B3SS: torch.Tensor) -> HieraFeatures:
        """Return the features of B normalised images, (B, 3, S, S), in their dtype."""
        full, half, embedding = self.neck(self.trunk(pixels_B3SS))
        embedding = embedding + self.no_mem_embed
        return HieraFeatures(embedding_BCGG=embedding.permute(0, 3, 1, 2), half_BHWC=half, full_BHWC=full)
