"""The TinyViT image encoder of Light HQ-SAM (and MobileSAM): convolutions first, then windowed attention.

It differs from the ViT in what is easy to mix up: queries, keys and values are interleaved for each head,
padding is added before the norm (so that padding tokens are the norm's bias), the position bias is one
table for each head and symmetric, and every convolution is followed by a BatchNorm.

After TinyViT (arXiv 2207.10666) as MobileSAM (arXiv 2306.14289) changed it: the last merge has stride 1.

Letters: as in `structures.py`; n windows, L tokens and W side of a window, h heads, G side of a stage's grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.config import TinyVisionConfig
from model.image_encoder import from_windows, to_windows
from model.layers import TORCH_NORM_EPS, Neck
from model.records import EncoderFeatures

EXPAND = 4
"""Ratio of the hidden to the outer width, in MBConv and MLP alike."""


class ConvBN(nn.Module):
    """Convolution without bias, then BatchNorm."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=TORCH_NORM_EPS)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Return (B, out, H / stride, W / stride)."""
        out: torch.Tensor = self.bn(self.conv(x_BCHW))
        return out


class Expand(nn.Module):
    """1x1, depthwise 3x3, 1x1, with GELU between: the body of MBConv and of the downsampling."""

    def __init__(self, channels: int, hidden: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, hidden)
        self.conv2 = ConvBN(hidden, hidden, 3, stride, groups=hidden)
        self.conv3 = ConvBN(hidden, out)

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
        self.local_conv = ConvBN(width, width, 3, groups=width)
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


class TinyViT(nn.Module):
    """Pixels to image embedding and early feature, with TinyViT."""

    def __init__(self, config: TinyVisionConfig) -> None:
        super().__init__()
        dims, depths = config.embed_dims, config.depths
        self.stem1 = ConvBN(3, dims[0] // 2, 3, 2)
        self.stem2 = ConvBN(dims[0] // 2, dims[0], 3, 2)
        self.conv_stage = ConvStage(dims[0], dims[1], depths[0])
        # The last merge has stride 1: the final grid is a sixteenth of the input, not a thirty-second.
        outs, strides = (dims[2], dims[3], None), (2, 1, 1)
        self.stages = nn.ModuleList(
            AttentionStage(
                dims[i + 1], outs[i], depths[i + 1], config.num_heads[i], config.window_sizes[i], strides[i]
            )
            for i in range(3)
        )
        self.neck = Neck(dims[3], config.output_channels)

    def forward(self, pixels_B3SS: torch.Tensor) -> EncoderFeatures:
        """Return the features of B normalised, zero-padded square pictures, (B, 3, S, S), in their dtype."""
        x = self.conv_stage(self.stem2(F.gelu(self.stem1(pixels_B3SS))))
        early = self.stages[0](x)
        x = self.stages[2](self.stages[1](early))
        return EncoderFeatures(embedding_BCGG=self.neck(x.permute(0, 3, 1, 2)), early_BGGC=early)
