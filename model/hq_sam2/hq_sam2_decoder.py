"""HQ-SAM 2's mask decoder: that of HQ-SAM, with finer maps of the image in its upscaling.

The HQ token reads the upscaled map, which already holds these, and nothing else of the image. One more token,
of whether there is an object at all, is the first.

Letters: as in `mask_decoder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hqlabel.model import kernels
from hqlabel.model.device import to_device
from hqlabel.model.hq_sam2.hiera import HieraFeatures
from hqlabel.model.mask_decoder import ALL_MASK_TOKENS, MLP, MaskDecoder, SharedImages, TokenMasks
from hqlabel.model.sam_config import MaskDecoderConfig


class HQSam2Decoder(MaskDecoder):
    """Prompt tokens and image embedding to mask logits and scores, token by token."""

    first_mask_token = 2

    def add_image_layers(self, config: MaskDecoderConfig) -> None:
        """Make the layers of `finer_features`, and those of the object token."""
        width = config.hidden_size
        self.obj_score_token = nn.Embedding(1, width)
        # Loaded with the rest, and not read: only in a video does it take masks away.
        self.pred_obj_score_head = MLP(width, width, width, 1)
        self.conv_s0 = nn.Conv2d(width, width // 8, 1)
        self.conv_s1 = nn.Conv2d(width, width // 4, 1)

    @property
    def tokens_of_a_box(self) -> int:
        """The number T of tokens of a box prompt: the learned ones, two corners, padding."""
        return len(self.output_tokens()) + 3

    def output_tokens(self) -> torch.Tensor:
        """Return the learned tokens in their order: object, predicted IoU, mask tokens, HQ token."""
        return torch.cat([self.obj_score_token.weight, super().output_tokens()])

    def finer_features(self, features: HieraFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the upscaling adds of B images, in the order of `kernels.map_to_cells`."""
        grid = features.embedding_BCGG.shape[-1]
        half = kernels.convolve_1x1(self.conv_s1, features.half_BHWC)
        full = kernels.convolve_1x1(self.conv_s0, features.full_BHWC)
        return kernels.map_to_cells(half, grid), kernels.map_to_cells(full, grid)

    def feature_rows(self, features: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return an embedding's features as they are."""
        return features

    def scores(self, out_NTC: torch.Tensor) -> torch.Tensor:
        """Return the predicted IoU of mask tokens 0 to 3, fp32 (N, 4), in 0 to 1."""
        return super().scores(out_NTC).float().sigmoid()

    def decode(
        self,
        shared: SharedImages,
        *,
        sparse_NTC: torch.Tensor,
        key_index_N: torch.Tensor,
        image_index_N: torch.Tensor,
        mask_tokens: Sequence[int] = ALL_MASK_TOKENS,
    ) -> TokenMasks:
        """Return the masks of N prompts; see `MaskDecoder.decode`."""
        tokens, image = self.tokens_and_images(shared, sparse_NTC, key_index_N)
        finer = tuple(rows_of(x, image_index_N) for x in shared.features)
        sam, hq, _, ious = self.decode_tokens(tokens, image, shared.terms, finer, tuple(mask_tokens))
        return TokenMasks(sam_NKHW=sam, hq_NHW=hq, predicted_iou_N4=ious)


def rows_of(x_B: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    """Return the rows of `index_N`, which is on the host; without a copy where it names one row alone."""
    if len(index_N) and bool((index_N == index_N[0]).all()):
        return x_B[int(index_N[0])].expand(len(index_N), *x_B.shape[1:])
    return x_B.index_select(0, to_device(index_N, x_B.device))
