"""Boxes, points and masks to the tokens and maps that the mask decoder reads.

Coordinates arrive in model pixels (the frame of the S x S input). Everything here is fp32 whatever the
rest of the model runs in: bf16 rounds a corner by up to 2 px, and the positional encoding by 0.01 rms.

The prompt encoder of Segment Anything (arXiv 2304.02643), which HQ-SAM leaves as it is.

Letters: as in `structures.py`; T prompt tokens, C width of the decoder (256).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from model.config import PromptEncoderConfig
from model.layers import LayerNorm2d

BACKGROUND, FOREGROUND, PADDING = 0, 1, -1
"""Point labels. A padding point has no position: it stands for "no point here"."""


class MaskEmbedding(nn.Module):
    """Low-resolution mask logits to a dense map: two strided convolutions, then a 1x1."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, hidden // 4, 2, 2)
        self.norm1 = LayerNorm2d(hidden // 4)
        self.conv2 = nn.Conv2d(hidden // 4, hidden, 2, 2)
        self.norm2 = LayerNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, width, 1)

    def forward(self, logits_N1HW: torch.Tensor) -> torch.Tensor:
        """Return (N, C, G, G) from (N, 1, 4G, 4G)."""
        x = F.gelu(self.norm1(self.conv1(logits_N1HW)))
        x = F.gelu(self.norm2(self.conv2(x)))
        out: torch.Tensor = self.conv3(x)
        return out


class PromptEncoder(nn.Module):
    """Prompts in model pixels to sparse tokens and a dense map."""

    pe_matrix: torch.Tensor

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.side = config.image_size
        self.grid = config.grid
        self.register_buffer("pe_matrix", torch.randn(2, width // 2))
        # background, foreground, top-left corner, bottom-right corner
        self.point_embed = nn.ParameterList(torch.randn(1, width) for _ in range(4))
        self.not_a_point = nn.Parameter(torch.randn(1, width))
        self.no_mask = nn.Parameter(torch.randn(1, width))
        self.mask = MaskEmbedding(config.mask_input_channels, width)

    def encode_unit(self, xy: torch.Tensor) -> torch.Tensor:
        """Return the positional encoding (..., C) of fp32 positions (..., 2): (x, y), 1 is the input side.

        [sin, cos] of 2 pi (2 xy - 1) G with the checkpoint's Gaussian matrix G (Fourier features, arXiv
        2006.10739). Written as products and one sum, not as a matrix product: those may be rounded to
        TF32 or bf16 by a setting of the caller's.
        """
        if xy.dtype != torch.float32 or self.pe_matrix.dtype != torch.float32:
            raise TypeError(
                f"positions are {xy.dtype} and the positional matrix {self.pe_matrix.dtype}; both must be "
                "torch.float32 (change the model's dtype with SamHQ.cast, which leaves them alone)"
            )
        c = 2 * xy - 1
        phase = 2 * math.pi * (c[..., :1] * self.pe_matrix[0] + c[..., 1:] * self.pe_matrix[1])
        return torch.cat([phase.sin(), phase.cos()], dim=-1)

    def image_pe(self) -> torch.Tensor:
        """Return the positional encoding of the cell centres, (1, C, G, G), fp32."""
        centre = (
            torch.arange(self.grid, device=self.pe_matrix.device, dtype=torch.float32) + 0.5
        ) / self.grid
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        return self.encode_unit(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]

    def embed_boxes(self, boxes_N4: torch.Tensor) -> torch.Tensor:
        """Return two tokens a box, (N, 2, C), from fp32 (x1, y1, x2, y2). No padding point, no clipping."""
        corners_N22 = boxes_N4.reshape(-1, 2, 2)
        return self.encode_unit((corners_N22 + 0.5) / self.side) + torch.cat(
            [self.point_embed[2], self.point_embed[3]]
        )

    def embed_points(self, points_NP2: torch.Tensor, labels_NP: torch.Tensor, *, pad: bool) -> torch.Tensor:
        """Return one token a point, (N, P, C), and with `pad` one padding token after them, (N, P + 1, C).

        `points_NP2`: fp32 (x, y). `labels_NP`: int64; 1 foreground, 0 background, -1 padding (its
        position is ignored). `pad` is for points without a box: the published weights know no other way.
        """
        if pad:
            points_NP2 = F.pad(points_NP2, (0, 0, 0, 1))
            labels_NP = F.pad(labels_NP, (0, 1), value=PADDING)
        labels_NP1 = labels_NP[..., None]
        kind = torch.where(labels_NP1 == FOREGROUND, self.point_embed[1], self.point_embed[0])
        token = self.encode_unit((points_NP2 + 0.5) / self.side) + kind
        return torch.where(labels_NP1 == PADDING, self.not_a_point, token)

    def embed_masks(self, logits_NHW: torch.Tensor) -> torch.Tensor:
        """Return the dense map (N, C, G, G) of fp32 low-resolution logits (N, 4G, 4G)."""
        out: torch.Tensor = self.mask(logits_NHW[:, None])
        return out

    def forward(
        self,
        *,
        boxes_N4: torch.Tensor | None = None,
        points_NP2: torch.Tensor | None = None,
        labels_NP: torch.Tensor | None = None,
        masks_NHW: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sparse tokens (N, T, C), points before boxes, and the dense map.

        The map is (N, C, G, G), or (1, C, 1, 1) without masks. A mask alone gives T = 0.

        Raises:
            ValueError: none of the three is given, or points without labels.
        """
        tokens: list[torch.Tensor] = []
        if (points_NP2 is None) != (labels_NP is None):
            raise ValueError("points_NP2 and labels_NP go together; one of them is missing")
        if points_NP2 is not None and labels_NP is not None:
            tokens.append(self.embed_points(points_NP2, labels_NP, pad=boxes_N4 is None))
        if boxes_N4 is not None:
            tokens.append(self.embed_boxes(boxes_N4))
        if masks_NHW is None:
            if not tokens:
                raise ValueError(
                    "a prompt needs a box, points with labels, or mask logits; it has none of them"
                )
            return torch.cat(tokens, dim=1), self.no_mask.view(1, -1, 1, 1)
        if not tokens:
            tokens.append(self.no_mask.new_zeros(masks_NHW.shape[0], 0, self.no_mask.shape[1]))
        return torch.cat(tokens, dim=1), self.embed_masks(masks_NHW)
