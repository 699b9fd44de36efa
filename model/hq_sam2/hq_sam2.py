"""HQ-SAM 2 for single images: the parts in which it differs from `SamHQ`.

Follows the original's `SAM2ImagePredictor` (folder sam-hq2 of SysCV/sam-hq). Images are stretched to the
input square and masks stretched back, each in one step. A single mask is token 0, or the best of the other
three where token 0 is unstable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from hqlabel.model import kernels
from hqlabel.model.device import to_device
from hqlabel.model.hq_sam2.hiera import HieraEncoder, HieraFeatures
from hqlabel.model.hq_sam2.hiera_config import HieraConfig
from hqlabel.model.hq_sam2.hq_sam2_decoder import HQSam2Decoder
from hqlabel.model.mask_decoder import ALL_MASK_TOKENS, MaskDecoder, TokenMasks
from hqlabel.model.prompt_encoder import PromptEncoder
from hqlabel.model.records import ImageEmbedding, check_image
from hqlabel.model.sam_config import SamHQConfig
from hqlabel.model.sam_hq import Multimask, SamHQ

STABILITY_OFFSET, STABILITY_THRESHOLD = 0.05, 0.98
"""Of the rule that decides on the single mask: the original's defaults."""


class HQSam2(SamHQ):
    """The whole model, for images: nothing of its memory for videos is here."""

    masks_of_a_point: Multimask = "three"
    lowest_iou_of_a_point: float = 0.8

    def make_parts(self, config: SamHQConfig) -> tuple[nn.Module, PromptEncoder, MaskDecoder]:
        """Return the image encoder, the prompt encoder and the mask decoder, with fresh weights."""
        prompt_encoder = PromptEncoder(config.prompt_encoder, pad_boxes=True)
        encoder = HieraEncoder(cast(HieraConfig, config.vision))
        return encoder, prompt_encoder, HQSam2Decoder(config.mask_decoder)

    def encode_images(self, images: Sequence[npt.NDArray[np.uint8]]) -> ImageEmbedding:
        """Return the embedding of upright RGB uint8 (H, W, 3) images of any sizes, in one encoder call.

        Resized in floats, as the original does. Pixels that were prepared as uint8 (`encode_prepared`, and so
        a job) are rounded once more, by half a level at most.

        Raises:
            ValueError: no image, or one that is not uint8 (H, W, 3).
        """
        if not images:
            raise ValueError("no images; wanted at least one")
        resized = [self.resize_in_floats(image) for image in images]
        return self.encode_batch(self.normalise(resized), [(x.shape[0], x.shape[1]) for x in images])

    def resize_in_floats(self, image_hwc: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return (3, S, S) in 0 to 255, fp32 on the model's device, averaged over the footprint."""
        check_image(image_hwc)
        pixels = torch.from_numpy(np.require(image_hwc, requirements=["C", "W"]))
        values_13HW = to_device(pixels, self.device).permute(2, 0, 1)[None].float()
        size = (self.config.image_size,) * 2
        return F.interpolate(values_13HW, size, mode="bilinear", align_corners=False, antialias=True)[0]

    def embed(self, batch_B3SS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the embedding (B, C, G, G), and what the decoder's upscaling adds of each image."""
        return kernels.prompt_by_prompt(self.embed_together, batch_B3SS)

    def embed_together(self, batch_B3SS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return `embed` of all images in one pass through the encoder."""
        features: HieraFeatures = self.image_encoder(batch_B3SS)
        decoder = cast(HQSam2Decoder, self.mask_decoder)
        return features.embedding_BCGG, *decoder.finer_features(features)

    def tokens_needed(self, multimask: Multimask, hq_token_only: bool) -> tuple[int, ...]:
        """Return the mask tokens whose logits the answer needs; of a single one's score, those of token 0."""
        if multimask == "single":
            return (0,) if hq_token_only else ALL_MASK_TOKENS
        return () if hq_token_only else (1, 2, 3)

    def choose_masks(
        self, tokens: TokenMasks, *, multimask: Multimask, hq_token_only: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mask logits (N, M, H, W) and predicted IoU (N, M); `three` come in the tokens' order."""
        ious_N4, hq_N1HW = tokens.predicted_iou_N4, tokens.hq_NHW[:, None]
        best_N1 = 1 + ious_N4[:, 1:].argmax(dim=1, keepdim=True)
        if multimask == "single":
            token_NM = torch.where(is_stable(tokens.sam_NKHW[:, 0])[:, None], 0, best_N1)
        elif multimask == "best":
            token_NM = best_N1
        else:
            token_NM = torch.arange(1, 4, device=best_N1.device).expand(len(best_N1), 3)
        ious_NM = ious_N4.gather(1, token_NM)
        if hq_token_only:
            return hq_N1HW.expand(-1, token_NM.shape[1], -1, -1), ious_NM
        place_NM = token_NM - self.tokens_needed(multimask, hq_token_only)[0]
        index = place_NM[:, :, None, None].expand(-1, -1, *hq_N1HW.shape[2:])
        return tokens.sam_NKHW.gather(1, index) + hq_N1HW, ious_NM


def family_of(config: SamHQConfig) -> type[SamHQ]:
    """Return the class of the models of a configuration."""
    return HQSam2 if isinstance(config.vision, HieraConfig) else SamHQ


def is_stable(logits_NHW: torch.Tensor) -> torch.Tensor:
    """Return whether the area of a mask hardly depends on its threshold, bool (N,)."""
    above_N, below_N = ((logits_NHW > x).sum((1, 2)) for x in (STABILITY_OFFSET, -STABILITY_OFFSET))
    return torch.where(below_N > 0, above_N / below_N, 1.0) >= STABILITY_THRESHOLD
