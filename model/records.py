"""The frozen records that pass between the files of `model/`, and out of it.

Nothing here computes. Frames: "upright" pixels are the pixels of the picture as a person sees it
(EXIF orientation applied, full size); "model" pixels are those of the same picture after the one
resize to the checkpoint's input side. x runs right, y runs down; a box is (x1, y1, x2, y2).

Letters: B images, N prompts (all images of a call together), M masks a prompt, P points a prompt,
C channels, G the side of the encoder's token grid (64 for the published models), S = 16 G the input side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # CPU workers of the pipeline import these records; torch would cost them 200 MB each
    import torch

MODEL_PROTOCOL = 3
"""Moves when equal weights and settings give other masks or scores than before; part of a job's identity."""


@dataclass(frozen=True, kw_only=True)
class EncoderFeatures:
    """What an image encoder returns for B images.

    `embedding_BCGG`: neck output, (B, 256, G, G).
    `early_BGGC`: the early feature for the HQ head, (B, G, G, C): the output of the first
    global-attention block (ViT), or of stage 1 after its downsampling (TinyViT).
    """

    embedding_BCGG: torch.Tensor
    early_BGGC: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ImageEmbedding:
    """Everything the decoder needs of B images; one object, so that no part can be forgotten.

    `embedding_BCGG`: (B, 256, G, G). `hq_features_BCHW`: (B, 32, 4G, 4G), the sum of the decoder's
    `embedding_encoder` and `compress_vit_feat` branches. `sizes_hw`: upright (height, width) of each
    image. `resized_hw`: its size in model pixels; the long side is S, the rest of S x S is padding.
    """

    embedding_BCGG: torch.Tensor
    hq_features_BCHW: torch.Tensor
    sizes_hw: tuple[tuple[int, int], ...]
    resized_hw: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one image: N of them, each giving one object. Coordinates in upright pixels.

    Any of the three may be None, but not all; those given agree on N. Lists and tensors on the host do
    as well as arrays.
    `boxes_xyxy`: (N, 4). `points_xy`: (N, P, 2), P from 1, with `point_labels` (N, P): 1 foreground,
    0 background, -1 padding. `mask_logits`: (N, 4G, 4G) float low-resolution logits in the padded model
    frame (what `mask_to_prompt` makes from a person's mask).
    """

    boxes_xyxy: np.ndarray | None = None
    points_xy: np.ndarray | None = None
    point_labels: np.ndarray | None = None
    mask_logits: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class MaskLogits:
    """Decoder output for N prompts over the images of one `ImageEmbedding`, in prompt order.

    `low_res_NMHW`: fp32 logits, (N, M, 4G, 4G), in the padded model frame; > 0 is inside.
    `predicted_iou_NM`: fp32, (N, M), SAM's own estimate; a regression, may leave [0, 1] a little.
    Both lie on the model's device. `image_index_N`: int64 (N,), on the host, the image of each prompt;
    non-decreasing.
    """

    low_res_NMHW: torch.Tensor
    predicted_iou_NM: torch.Tensor
    image_index_N: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Instances:
    """The finished masks of one image, in the order of its boxes; plain numpy, nothing on a device.

    `size_hw`: upright (height, width), the frame of every mask. `counts`: N COCO compressed RLE
    strings (ASCII, column-major). `area`: int64 (N,), mask pixels. `bbox_xywh`: float32 (N, 4), tight
    box of the mask, end-exclusive integers, zeros for an empty mask. `predicted_iou`,
    `stability_score`: float32 (N,); a NaN says that the model's numbers for this prompt are not finite, and
    that its mask, an empty one, is none. `flags`: names of what was out of the ordinary for the whole image
    (`reduced_call_shape` after an out-of-memory), empty when nothing was.
    """

    size_hw: tuple[int, int]
    counts: tuple[str, ...]
    area: np.ndarray
    bbox_xywh: np.ndarray
    predicted_iou: np.ndarray
    stability_score: np.ndarray
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """One upright picture, already resized once to the model's input side, with its boxes.

    `pixels_hwc`: uint8 RGB (h, w, 3), max(h, w) == S, as `geometry.resize_longest_side` makes it.
    `size_hw`: the upright size before that resize. `prompts`: in upright pixels.
    """

    pixels_hwc: np.ndarray
    size_hw: tuple[int, int]
    prompts: Prompts


@dataclass(frozen=True, kw_only=True)
class SegmentFailure:
    """Why an image has no `Instances`: `code` and `message`, one sentence.

    `non_finite`: no prompt of it has finite numbers; or `out_of_memory`.
    """

    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class CallShape:
    """The fixed shapes of model calls. Part of a job's identity: equal shapes give equal bytes.

    `images_per_call`, `boxes_per_call`: each at least 1; the last call is padded to them.
    """

    images_per_call: int = 1
    boxes_per_call: int = 16

    def __post_init__(self) -> None:
        """Raise ValueError unless both are at least 1."""
        if min(self.images_per_call, self.boxes_per_call) < 1:
            raise ValueError(f"{self}: both numbers must be at least 1")


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """Where weights came from. `sha256` is of the file's bytes (of all shards in name order), hex.

    `layout`: `original` or `transformers`. `architecture`: such as `vit_b` or `vit_192x6`.
    `ignored_keys`: tensors that were read and are known not to matter (`pixel_mean`, TinyViT's classifier).
    `warnings`: sentences on what was found beside the weights and not followed.
    """

    sha256: str
    layout: str
    architecture: str
    license: str | None = None
    source: str = ""
    ignored_keys: Sequence[str] = field(default=())
    warnings: Sequence[str] = field(default=())
