"""SAM-HQ: images to embeddings, embeddings and prompts to mask logits. No state between calls.

`encode_images` (resize, normalise, pad, encoder, HQ features) gives an `ImageEmbedding`; `decode_boxes` or
`decode_prompts` give `MaskLogits` at low resolution for any number of prompts of each image. `masks.py`
makes full-resolution masks of them.

`SamHQ` is what `Segmenter` and the rest know of any family of models; HQ-SAM 2 (`hq_sam2/hq_sam2.py`) is one
of it, with other parts and rules.

Follows the original's `Sam` and `SamPredictor` (`segment-anything-hq`, arXiv 2306.01567); tests compare with
their answers. A suffix of a tensor's name is its shape, with the letters of `records.py` and
`mask_decoder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hqlabel.model.device import to_device
from hqlabel.model.image_encoder import ImageEncoderViT, TinyViT, window_rows
from hqlabel.model.mask_decoder import MaskDecoder, SharedImages, TokenMasks
from hqlabel.model.prompt_encoder import PromptBatch, PromptEncoder, box_rows, check_prompts, group_prompts
from hqlabel.model.records import (
    EncoderFeatures,
    Fit,
    ImageEmbedding,
    MaskLogits,
    Prompts,
    check_image,
    fit_image,
    target_size_hw,
)
from hqlabel.model.sam_config import PIXEL_MEAN, PIXEL_STD, SamHQConfig, TinyVisionConfig, VisionConfig

Multimask = Literal["single", "best", "three"]
"""`single`: mask token 0. `best`: of tokens 1 to 3 the one with the highest predicted IoU (the original's
`multimask_output=True`). `three`: tokens 1 to 3, highest predicted IoU first (transformers'). HQ-SAM 2 has
rules of its own for `single` and for the order of `three`."""

SizeHW = tuple[int, int]
UInt8Array = npt.NDArray[np.uint8]

DTYPES = (torch.float32, torch.bfloat16)

PROMPTS_PER_CALL = 16
"""Default number of prompts in one decoder call; 16 need about 1.3 GiB in fp32 at S = 1024."""


class SamHQ(nn.Module):
    """The whole model. Build it with `from_config` (fresh weights) or `checkpoints.load`.

    The parts `image_encoder`, `prompt_encoder` and `mask_decoder` are plain differentiable modules; the
    methods of this class run without gradients, in evaluation mode.
    """

    # Marked when calls are compiled; as decorators the marks bring the compiler (1.2 s) to every import.
    compile_constants: ClassVar[tuple[Callable[..., Any], ...]] = (window_rows,)
    """Functions of the parts whose results are constants for torch.compile."""
    masks_of_a_point: Multimask = "best"
    """Which masks of a point "segment everything" looks at, as the family's own generator."""
    lowest_iou_of_a_point: float = 0.88
    """The predicted IoU over which it keeps them, by default."""

    def __init__(self, config: SamHQConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder, self.prompt_encoder, self.mask_decoder = self.make_parts(config)

    def make_parts(self, config: SamHQConfig) -> tuple[nn.Module, PromptEncoder, MaskDecoder]:
        """Return the image encoder, the prompt encoder and the mask decoder, with fresh weights."""
        vision = config.vision
        if isinstance(vision, VisionConfig):
            encoder: nn.Module = ImageEncoderViT(vision)
        elif isinstance(vision, TinyVisionConfig):
            encoder = TinyViT(vision)
        else:
            raise TypeError(f"{type(self).__name__} has no encoder for a {type(vision).__name__}")
        return encoder, PromptEncoder(config.prompt_encoder), MaskDecoder(config.mask_decoder)

    @classmethod
    def from_config(cls, config: SamHQConfig, seed: int, *, position_std: float = 0.0) -> Self:
        """Return a model with fresh weights, in evaluation mode on the CPU, fp32; the same for the same seed.

        Linear weights and the absolute position are drawn from a normal of deviation 0.02 cut at two
        deviations, convolutions as PyTorch does, output tokens and prompt embeddings from N(0, 1).
        `position_std`: deviation of the relative-position tables and attention biases. They start at 0
        for training; a test needs them otherwise, or it would not see them misread.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config)
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                    nn.init.zeros_(module.bias)
            for name, parameter in model.named_parameters():
                if name.endswith("pos_embed"):
                    nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
                if position_std and name.endswith(("rel_pos_h", "rel_pos_w", "attention_biases")):
                    nn.init.normal_(parameter, std=position_std)
        return model.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.prompt_encoder.pe_matrix.device

    @property
    def dtype(self) -> torch.dtype:
        """What the encoder and the decoder multiply in."""
        return self.mask_decoder.iou_token.weight.dtype

    @property
    def fit(self) -> Fit:
        """How an image comes to the model's input side."""
        return self.config.fit

    def cast(self, dtype: torch.dtype) -> Self:
        """Return self with encoder and decoder weights in `dtype`: float32 or bfloat16.

        The prompt encoder stays fp32, as do TinyViT's BatchNorms, whose rounded statistics would shift
        whole channels; mask logits come out as fp32 always. What bfloat16 rounded stays rounded.

        Raises:
            ValueError: any other dtype. float16 overflows in the encoders of the published weights and
                gives masks of noise without an error.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype} is not supported; use torch.float32 or torch.bfloat16")
        for part in (self.image_encoder, self.mask_decoder):
            for module in part.modules():
                if not isinstance(module, nn.BatchNorm2d):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.to(dtype)
        return self

    # Images to embeddings

    def preprocess(self, pixels: Sequence[UInt8Array]) -> torch.Tensor:
        """Return (B, 3, S, S) in the model's dtype, on its device, from resized RGB uint8 (h, w, 3) images.

        Mean and deviation first, then zeros at the right and the bottom: padding is 0 *after*
        normalising, not black.

        Raises:
            ValueError: not a uint8 RGB image, or one whose long side (`stretch`: either side) is not S.
        """
        S = self.config.image_size
        for image in pixels:
            check_image(image)
            height, width = image.shape[:2]
            if max(height, width) != S or (self.fit == "stretch" and min(height, width) != S):
                sides = "its long side" if self.fit == "pad" else "each of its sides"
                raise ValueError(f"a prepared image is {height}x{width}; {sides} must be {S}")
        on_device = (
            to_device(torch.from_numpy(np.require(image, requirements=["C", "W"])), self.device)
            for image in pixels
        )
        return self.normalise([image_hwc.permute(2, 0, 1) for image_hwc in on_device])

    def normalise(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return (B, 3, S, S) in the model's dtype from (3, h, w) in 0 to 255; see `preprocess`."""
        S = self.config.image_size
        batch = torch.zeros(len(pixels), 3, S, S, device=self.device)
        mean, std = (torch.tensor(x, device=self.device).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
        for row, values in zip(batch, pixels, strict=True):
            row[:, : values.shape[1], : values.shape[2]] = (values - mean) / std
        return batch.to(self.dtype)

    @torch.no_grad()
    def encode_images(self, images: Sequence[UInt8Array]) -> ImageEmbedding:
        """Return the embedding of upright RGB uint8 (H, W, 3) images of any sizes, in one encoder call.

        Raises:
            ValueError: no image, one that is not uint8 (H, W, 3), or one so elongated that its short
                side would be resized to nothing.
        """
        prepared = [fit_image(image, self.config.image_size, self.fit) for image in images]
        return self.encode_prepared(prepared, [(x.shape[0], x.shape[1]) for x in images])

    @torch.no_grad()
    def encode_prepared(self, pixels: Sequence[UInt8Array], sizes_hw: Sequence[SizeHW]) -> ImageEmbedding:
        """Return the embedding of images resized by `records.fit_image`, in one encoder call.

        `sizes_hw`: the upright (height, width) of each before that resize.

        Raises:
            ValueError: no image, or one whose size does not follow from its upright size.
        """
        if not pixels or len(pixels) != len(sizes_hw):
            raise ValueError(
                f"{len(pixels)} images and {len(sizes_hw)} sizes; wanted one size each, and at least one"
            )
        resized_hw = [target_size_hw(size_hw, self.config.image_size, self.fit) for size_hw in sizes_hw]
        for image, size_hw, expected_hw in zip(pixels, sizes_hw, resized_hw, strict=True):
            if image.shape[:2] != expected_hw:
                raise ValueError(
                    f"an image of upright size {size_hw} was prepared as {image.shape[:2]}; "
                    f"wanted {expected_hw}"
                )
        return self.encode_batch(self.preprocess(pixels), sizes_hw)

    def encode_batch(self, batch_B3SS: torch.Tensor, sizes_hw: Sequence[SizeHW]) -> ImageEmbedding:
        """Return the embedding of a normalised batch of images of these upright sizes."""
        self._check_ready()
        with torch.no_grad(), self._without_autocast():
            embedding, *features = self.embed(batch_B3SS)
        side = self.config.image_size
        return ImageEmbedding(
            embedding_BCGG=embedding,
            features=tuple(features),
            sizes_hw=tuple((int(h), int(w)) for h, w in sizes_hw),
            resized_hw=tuple(target_size_hw(size_hw, side, self.fit) for size_hw in sizes_hw),
        )

    def embed(self, batch_B3SS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the embedding (B, C, G, G) and the decoder's features of each image of a normalised batch.

        Here one, the HQ features (B, U, 4G, 4G).
        """
        features: EncoderFeatures = self.image_encoder(batch_B3SS)
        return features.embedding_BCGG, self.mask_decoder.hq_features(features)

    # Embeddings and prompts to masks

    def decode_boxes(
        self,
        embedding: ImageEmbedding,
        boxes_xyxy: Sequence[npt.ArrayLike],
        *,
        boxes_per_call: int = PROMPTS_PER_CALL,
        multimask: Multimask = "single",
        hq_token_only: bool = False,
    ) -> MaskLogits:
        """Return one mask for each box, in the order of the images and of the boxes of each.

        `boxes_xyxy`: for each image (n_i, 4) in upright pixels, n_i from 0. See `decode_prompts`.
        """
        prompts = [Prompts(boxes_xyxy=box_rows(boxes)) for boxes in boxes_xyxy]
        return self.decode_prompts(
            embedding,
            prompts,
            multimask=multimask,
            hq_token_only=hq_token_only,
            prompts_per_call=boxes_per_call,
        )

    @torch.no_grad()
    def decode_prompts(
        self,
        embedding: ImageEmbedding,
        prompts: Sequence[Prompts],
        *,
        multimask: Multimask = "single",
        hq_token_only: bool = False,
        prompts_per_call: int = PROMPTS_PER_CALL,
    ) -> MaskLogits:
        """Return the masks of all prompts, in the order of the images and of the prompts of each.

        One `Prompts` for each image of `embedding`. Prompts of one kind go through the decoder together,
        whatever their image, `prompts_per_call` at a time; the last call is padded with copies of its last
        prompt, and their masks are dropped. M is 1, or 3 with `multimask="three"`. The HQ token's logits
        are added to each mask at low resolution; with `hq_token_only` they are the answer alone (M equal
        masks) and only the predicted IoU, which does not depend on them, depends on `multimask`.

        Raises:
            ValueError: a prompt with nothing in it, with parts of another shape or of unlike lengths, with
                a label other than 1, 0 and -1, or with a coordinate or logit that is not finite.
        """
        side = self.config.mask_size
        counts = [check_prompts(one, side, image=i) for i, one in enumerate(prompts)]
        N, M = sum(counts), 3 if multimask == "three" else 1
        masks = torch.zeros(N, M, side, side, device=self.device)
        ious = torch.zeros(N, M, device=self.device)
        for call in self.decode_calls(
            embedding,
            prompts,
            multimask=multimask,
            hq_token_only=hq_token_only,
            prompts_per_call=prompts_per_call,
        ):
            place = call.place_N.to(self.device)
            masks[place], ious[place] = call.low_res_NMHW, call.predicted_iou_NM
        image_index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        return MaskLogits(low_res_NMHW=masks, predicted_iou_NM=ious, image_index_N=image_index)

    def decode_calls(
        self,
        embedding: ImageEmbedding,
        prompts: Sequence[Prompts],
        *,
        multimask: Multimask,
        hq_token_only: bool,
        prompts_per_call: int,
    ) -> Iterator[DecodedCall]:
        """Yield the masks of all prompts, one decoder call after another; see `decode_prompts`."""
        self._check_ready()
        if prompts_per_call < 1:
            raise ValueError(f"prompts_per_call is {prompts_per_call}; it must be at least 1")
        if multimask not in ("single", "best", "three"):
            raise ValueError(f"multimask is {multimask!r}; wanted 'single', 'best' or 'three'")
        if len(prompts) != len(embedding.sizes_hw):
            raise ValueError(
                f"prompts for {len(prompts)} images; the embedding holds {len(embedding.sizes_hw)}"
            )
        batches = group_prompts(
            prompts, embedding.sizes_hw, embedding.resized_hw, mask_size=self.config.mask_size
        )
        decoder = PromptDecoder(self, embedding, multimask=multimask, hq_token_only=hq_token_only)
        for batch in batches:
            for chunk, real in batch.chunks(prompts_per_call):
                with torch.no_grad(), self._without_autocast():
                    masks, ious = decoder.decode(chunk)
                yield DecodedCall(
                    place_N=chunk.place_N[:real],
                    image_N=chunk.image_N[:real],
                    low_res_NMHW=masks[:real],
                    predicted_iou_NM=ious[:real],
                )

    def tokens_needed(self, multimask: Multimask, hq_token_only: bool) -> tuple[int, ...]:
        """Return the mask tokens whose logits the answer needs."""
        if hq_token_only:
            return ()
        return (0,) if multimask == "single" else (1, 2, 3)

    def choose_masks(
        self, tokens: TokenMasks, *, multimask: Multimask, hq_token_only: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mask logits (N, M, H, W) and predicted IoU (N, M) of the tokens that `tokens_needed` names.

        Of equal scores the lower token comes first.
        """
        hq_N1HW = tokens.hq_NHW[:, None]
        if multimask == "single":
            ious = tokens.predicted_iou_N4[:, :1]
            return (hq_N1HW if hq_token_only else tokens.sam_NKHW + hq_N1HW), ious
        ious, order_N3 = tokens.predicted_iou_N4[:, 1:].sort(dim=1, descending=True, stable=True)
        M = 1 if multimask == "best" else 3
        if hq_token_only:
            return hq_N1HW.expand(-1, M, -1, -1), ious[:, :M]
        index = order_N3[:, :M, None, None].expand(-1, -1, *hq_N1HW.shape[2:])
        return tokens.sam_NKHW.gather(1, index) + hq_N1HW, ious[:, :M]

    def _without_autocast(self) -> torch.autocast:
        """Turn a caller's autocast off: `cast` alone decides what runs in which dtype."""
        return torch.autocast(self.device.type, enabled=False)

    def _check_ready(self) -> None:
        if self.training:
            raise RuntimeError("the model is in training mode; call eval() before encoding or decoding")
        positions = self.prompt_encoder.pe_matrix.dtype
        if positions != torch.float32 or self.dtype not in DTYPES:
            raise TypeError(
                f"the model is {self.dtype} and its positional matrix {positions}; the matrix must be "
                "torch.float32 and the rest torch.float32 or torch.bfloat16. Change it with SamHQ.cast"
            )


@dataclass(frozen=True, kw_only=True)
class DecodedCall:
    """The masks of one decoder call, without those of the copies that pad it.

    `place_N`, `image_N`: int64 on the host, the place among all prompts and the image of each.
    `low_res_NMHW`, `predicted_iou_NM`: as in `MaskLogits`.
    """

    place_N: torch.Tensor
    image_N: torch.Tensor
    low_res_NMHW: torch.Tensor
    predicted_iou_NM: torch.Tensor


class PromptDecoder:
    """Decodes chunks of prompts of one embedding; what the prompts of an image share is computed once."""

    def __init__(
        self, model: SamHQ, embedding: ImageEmbedding, *, multimask: Multimask, hq_token_only: bool
    ) -> None:
        self.model = model
        self.embedding = embedding
        self.multimask: Multimask = multimask
        self.hq_token_only = hq_token_only
        self.mask_tokens = model.tokens_needed(multimask, hq_token_only)

    @cached_property
    def image_pe(self) -> torch.Tensor:
        """The positional encoding of the embedding's cells."""
        return self.model.prompt_encoder.image_pe()

    @cached_property
    def shared(self) -> SharedImages:
        """What the decoder computes once for each image; only without mask prompts."""
        return self._share(self.embedding.embedding_BCGG, self.model.prompt_encoder.no_mask())

    def decode(self, chunk: PromptBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mask logits (N, M, 4G, 4G) and predicted IoU (N, M) of a chunk."""
        sparse, dense = self.model.prompt_encoder(
            boxes_N4=self._move(chunk.boxes_N4),
            points_NP2=self._move(chunk.points_NP2),
            labels_NP=self._move(chunk.labels_NP),
            masks_NHW=self._move(chunk.masks_NHW),
        )
        if chunk.masks_NHW is None:
            shared, key_index = self.shared, chunk.image_N
        else:
            # A mask prompt is added to the image's tokens: each prompt has its own.
            images = self.embedding.embedding_BCGG
            shared = self._share(images.index_select(0, chunk.image_N.to(images.device)), dense)
            key_index = torch.arange(len(chunk.image_N))
        tokens = self.model.mask_decoder.decode(
            shared,
            sparse_NTC=sparse,
            key_index_N=key_index,
            image_index_N=chunk.image_N,
            mask_tokens=self.mask_tokens,
        )
        return self.model.choose_masks(tokens, multimask=self.multimask, hq_token_only=self.hq_token_only)

    def _move(self, part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else to_device(part, self.model.device)

    def _share(self, embedding_BCGG: torch.Tensor, dense: torch.Tensor) -> SharedImages:
        return self.model.mask_decoder.share(
            embedding_BCGG=embedding_BCGG,
            features=self.embedding.features,
            dense_BCGG=dense,
            image_pe_1CGG=self.image_pe,
        )
