"""The image encoders of SAM-HQ: a plain ViT (B, L, H and any smaller one of the same build), and TinyViT.

The ViT works on a G x G grid of 16 x 16 patches. Most blocks attend inside windows; a few attend over the
whole grid. The output of the first of those is the early feature of the HQ head.

TinyViT, of Light HQ-SAM (and MobileSAM): convolutions first, then windowed attention. It differs from the
ViT in what is easy to mix up: queries, keys and values are interleaved for each head, padding is added before
the norm (so that padding tokens are the norm's bias), the position bias is one table for each head and
symmetric, and every convolution is followed by a BatchNorm. After TinyViT (arXiv 2207.10666) as MobileSAM
(arXiv 2306.14289) changed it: the last merge has stride 1.

Letters: as in `records.py`; n windows (all images of a batch), W side of a window, L tokens of a window or
of the grid, h heads, d width of a head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from hqlabel.model import kernels
from hqlabel.model.kernels import TORCH_NORM_EPS, VIT_NORM_EPS, LayerNorm2d
from hqlabel.model.records import EncoderFeatures
from hqlabel.model.sam_config import PATCH_SIZE, TinyVisionConfig, VisionConfig


def neck(channels: int, out_channels: int) -> nn.Sequential:
    """Return 1x1 convolution, norm, 3x3 convolution, norm: from the backbone's width to the decoder's."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


class RelPosAttention(nn.Module):
    """Multi-head attention with decomposed relative position over squares of `side` x `side` tokens.

    The original's `image_encoder.Attention`. `forward` is the plain definition on squares; `attend_rows` is
    what inference takes.
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
        out = kernels.plain_attention(q, k, v, self.rel_pos_h, self.rel_pos_w)
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
        out = kernels.attend_squares(q, k, v, self.rel_pos_h, self.rel_pos_w)
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


def window_rows(
    images: int, grid: int, window: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the tokens of `to_windows` come from and where `from_windows` finds them; int64, flat.

    The first is (n * W * W,): rows of the images' tokens, and their number for padding. The second is
    (images * grid * grid,): places among the windows' tokens. Made once; constants for
    torch.compile (`compile_calls`).
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


class MLPBlock(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the input's shape."""
        return kernels.mlp(x, self.lin1, self.lin2)


class Block(nn.Module):
    """A pre-norm transformer block; `window` 0 attends over the whole grid."""

    def __init__(self, config: VisionConfig, *, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=VIT_NORM_EPS)
        self.attn = RelPosAttention(config.hidden_size, config.num_attention_heads, window or config.grid)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=VIT_NORM_EPS)
        self.mlp = MLPBlock(config.hidden_size, config.mlp_dim)

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
        if kernels.is_inference(x_BGGC.device):
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


class PatchEmbed(nn.Module):
    """Square patches of pixels to tokens, by one strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_SIZE, PATCH_SIZE)

    def forward(self, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        """Return the tokens, (B, G, G, C)."""
        # Contiguous, or every sum and norm that follows goes on in the convolution's order of memory.
        tokens: torch.Tensor = self.proj(pixels_B3SS).permute(0, 2, 3, 1).contiguous()
        return tokens


class ImageEncoderViT(nn.Module):
    """Pixels to image embedding and early feature, with a vision transformer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config.hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, config.hidden_size))
        self.blocks = nn.ModuleList(
            Block(config, window=0 if i in config.global_attn_indexes else config.window_size)
            for i in range(config.num_hidden_layers)
        )
        self.neck = neck(config.hidden_size, config.output_channels)
        self.early_block = min(config.global_attn_indexes)

    def forward(self, pixels_B3SS: torch.Tensor) -> EncoderFeatures:
        """Return the features of B normalised, zero-padded square images, (B, 3, S, S), in their dtype."""
        x = self.patch_embed(pixels_B3SS) + self.pos_embed
        early = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            early = x if i == self.early_block else early
        return EncoderFeatures(embedding_BCGG=self.neck(x.permute(0, 3, 1, 2)), early_BGGC=early)


# TinyViT

EXPAND = 4
"""Ratio of the hidden to the outer width, in MBConv and MLP alike."""


class Conv2dBN(nn.Module):
    """Convolution without bias, then BatchNorm."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=TORCH_NORM_EPS)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, out, H / stride, W / stride)."""
        out: torch.Tensor = self.bn(self.c(x_BCHW))
        return out


class Expand(nn.Module):
    """1x1, depthwise 3x3, 1x1, with GELU between: the body of MBConv and of the downsampling."""

    def __init__(self, channels: int, hidden: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv2dBN(channels, hidden)
        self.conv2 = Conv2dBN(hidden, hidden, 3, stride, groups=hidden)
        self.conv3 = Conv2dBN(hidden, out)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, out, H / stride, W / stride), without a last activation."""
        out: torch.Tensor = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x_BCHW)))))
        return out


class MBConv(Expand):
    """`Expand` with a shortcut; the GELU comes after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, EXPAND * channels, channels, stride=1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the input's shape."""
        return F.gelu(super().forward(x_BCHW) + x_BCHW)


class WindowAttention(nn.Module):
    """Norm, then attention in one window with a bias by (|dy|, |dx|) for each head."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.norm = nn.LayerNorm(width, eps=TORCH_NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))

    def bias(self) -> torch.Tensor:
        """Return the bias (h, L, L), read from the parameter on every call.

        The original keeps a copy made before weights are loaded, and so runs with zeros until `eval()` is
        called again.
        """
        step = torch.arange(self.window, device=self.attention_biases.device)
        apart = (step[:, None] - step[None, :]).abs()
        # (row, column) of the query, then of the key: |dy| * window + |dx|
        index = apart[:, None, :, None] * self.window + apart[None, :, None, :]
        return self.attention_biases[:, index.reshape(self.window**2, self.window**2)]

    def forward(self, x_nWWC: torch.Tensor) -> torch.Tensor:
        """Return the attended tokens, same shape (n, W, W, C)."""
        n, window, _, width = x_nWWC.shape
        qkv = self.qkv(self.norm(x_nWWC)).view(n, window * window, self.heads, 3, width // self.heads)
        # Outermost heads; then q, k, v; then the head's width.
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias())
        projected: torch.Tensor = self.proj(out.transpose(1, 2).reshape(n, window, window, width))
        return projected


class NormMlp(nn.Module):
    """Norm, linear, exact GELU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=TORCH_NORM_EPS)
        self.fc1 = nn.Linear(width, EXPAND * width)
        self.fc2 = nn.Linear(EXPAND * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the input's shape."""
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out


class TinyBlock(nn.Module):
    """Residual window attention, a depthwise convolution without residual or activation, residual MLP."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(width, heads, window)
        self.local_conv = Conv2dBN(width, width, 3, groups=width)
        self.mlp = NormMlp(width)

    def forward(self, x_BGGC: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the input's shape. The padding to whole windows is attended to."""
        windows = self.attn(to_windows(x_BGGC, self.window))
        x = x_BGGC + from_windows(windows, x_BGGC.shape[1])
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: torch.Tensor = x + self.mlp(x)
        return out


class ConvStage(nn.Module):
    """Stage 0: MBConv blocks, then the downsampling."""

    def __init__(self, width: int, out: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MBConv(width) for _ in range(depth))
        self.downsample = Expand(width, out, out, stride=2)

    def forward(self, x_BCGG: torch.Tensor) -> torch.Tensor:
        """Return (B, G / 2, G / 2, out): channels last, as the attention stages take it."""
        for block in self.blocks:
            x_BCGG = block(x_BCGG)
        out: torch.Tensor = self.downsample(x_BCGG).permute(0, 2, 3, 1)
        return out


class AttentionStage(nn.Module):
    """Stages 1 to 3: attention blocks, then the merge to the next width (the last stage has none)."""

    def __init__(self, width: int, out: int | None, depth: int, heads: int, window: int, stride: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TinyBlock(width, heads, window) for _ in range(depth))
        self.downsample = None if out is None else Expand(width, out, out, stride)

    def forward(self, x_BGGC: torch.Tensor) -> torch.Tensor:
        """Return (B, G / stride, G / stride, out), after the merge where there is one."""
        for block in self.blocks:
            x_BGGC = block(x_BGGC)
        if self.downsample is None:
            return x_BGGC
        out: torch.Tensor = self.downsample(x_BGGC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return out


class TinyPatchEmbed(nn.Module):
    """Two 3x3 convolutions of stride 2: pixels to a quarter of the input side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(Conv2dBN(3, width // 2, 3, 2), nn.GELU(), Conv2dBN(width // 2, width, 3, 2))

    def forward(self, pixels_B3SS: torch.Tensor) -> torch.Tensor:
        """Return (B, width, S / 4, S / 4)."""
        out: torch.Tensor = self.seq(pixels_B3SS)
        return out


class TinyViT(nn.Module):
    """Pixels to image embedding and early feature, with TinyViT."""

    def __init__(self, config: TinyVisionConfig) -> None:
        super().__init__()
        dims, depths = config.embed_dims, config.depths
        self.patch_embed = TinyPatchEmbed(dims[0])
        # The last merge has stride 1: the final grid is a sixteenth of the input, not a thirty-second.
        outs, strides = (dims[2], dims[3], None), (2, 1, 1)
        self.layers = nn.ModuleList([ConvStage(dims[0], dims[1], depths[0])])
        for i, (heads, window) in enumerate(zip(config.num_heads, config.window_sizes, strict=True)):
            self.layers.append(AttentionStage(dims[i + 1], outs[i], depths[i + 1], heads, window, strides[i]))
        self.neck = neck(dims[3], config.output_channels)

    def forward(self, pixels_B3SS: torch.Tensor) -> EncoderFeatures:
        """Return the features of B normalised, zero-padded square images, (B, 3, S, S), in their dtype."""
        convolutions, *stages = self.layers
        early = stages[0](convolutions(self.patch_embed(pixels_B3SS)))
        x = stages[2](stages[1](early))
        return EncoderFeatures(embedding_BCGG=self.neck(x.permute(0, 3, 1, 2)), early_BGGC=early)
