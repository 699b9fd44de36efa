"""The frozen records of images, prompts and masks, and the step between their two frames: the one resize.

Frames: "upright" pixels are the pixels of the image as it is viewed (EXIF orientation applied, full size);
"model" pixels are those of the same image after the one resize to the checkpoint's input side, by the rule
of its family (`Fit`). x runs right,
y runs down; a box is (x1, y1, x2, y2). Coordinates are continuous: pixel (0, 0) covers [0, 1) x [0, 1), and a
box that covers a W x H image is (0, 0, W, H).

CPU workers import this file: torch would cost them 200 MB each.

Letters: B images, N prompts (all images of a call together), M masks a prompt, P points a prompt,
C channels, G the side of the encoder's token grid (64 for the published models), S = 16 G the input side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    import torch

Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]

Fit = Literal["pad", "stretch"]
"""How an image comes to the model's S x S input. `pad`: its long side becomes S, and what is left is padding
(HQ-SAM). `stretch`: both sides become S, each by its own factor (HQ-SAM 2)."""

MODEL_PROTOCOL = 3
"""Changes when equal weights and settings give other masks or scores; part of a job's identity."""


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

    `embedding_BCGG`: (B, 256, G, G). `features`: what else the model's decoder reads of each image, one row
    an image: of HQ-SAM the HQ features (B, 32, 4G, 4G), of HQ-SAM 2 its two finer maps. `sizes_hw`: upright
    (height, width) of each image. `resized_hw`: its size in model pixels; what is left of S x S is padding.
    """

    embedding_BCGG: torch.Tensor
    features: tuple[torch.Tensor, ...]
    sizes_hw: tuple[tuple[int, int], ...]
    resized_hw: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of one image: N of them, each giving one object. Coordinates in upright pixels.

    Any of the three may be None, but not all; those given agree on N. Lists and tensors on the host do
    as well as arrays.
    `boxes_xyxy`: (N, 4). `points_xy`: (N, P, 2), P from 1, with `point_labels` (N, P): 1 foreground,
    0 background, -1 padding. `mask_logits`: (N, 4G, 4G) float low-resolution logits in the model frame
    (what `mask_to_prompt` makes from a user's mask).
    """

    boxes_xyxy: np.ndarray | None = None
    points_xy: np.ndarray | None = None
    point_labels: np.ndarray | None = None
    mask_logits: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class MaskLogits:
    """Decoder output for N prompts over the images of one `ImageEmbedding`, in prompt order.

    `low_res_NMHW`: fp32 logits, (N, M, 4G, 4G), in the model frame; > 0 is inside.
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
    `stability_score`: float32 (N,); NaN means that the model's numbers for this prompt are not finite, and
    its mask, an empty one, is none. `flags`: names of what was out of the ordinary for the whole image
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
    """One upright image, already resized once to the model's input side, with its boxes.

    `pixels_hwc`: uint8 RGB (h, w, 3), as `fit_image` makes it.
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

    `layout`: `original`, `transformers` or `hq_sam2`. `architecture`: such as `vit_b` or `vit_192x6`.
    `ignored_keys`: tensors that were read and are known not to matter (`pixel_mean`, TinyViT's classifier,
    what HQ-SAM 2 needs for videos).
    `warnings`: sentences on what was found next to the weights and not followed.
    """

    sha256: str
    layout: str
    architecture: str
    license: str | None = None
    source: str = ""
    ignored_keys: Sequence[str] = field(default=())
    warnings: Sequence[str] = field(default=())


def check_image(image: UInt8Array) -> None:
    """Raise ValueError unless the array is a uint8 RGB image, (H, W, 3)."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"an image is a {type(image).__name__}; wanted a numpy array, (H, W, 3) uint8 RGB")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"an image has shape {image.shape} and dtype {image.dtype}; wanted (H, W, 3) uint8 RGB"
        )


def target_size_hw(size_hw: tuple[int, int], side: int, fit: Fit = "pad") -> tuple[int, int]:
    """Return the (height, width) in model pixels of an image of `size_hw` for a model of input side `side`.

    `pad`: each side is `int(x * side / max(h, w) + 0.5)`, as in the original predictor; floor differs from
    it in more than half of all sizes and moves every mask. The long side always comes out as `side`.
    `stretch`: both sides are `side`.

    Raises:
        ValueError: a side is below 1, or (`too_elongated`, with `pad`) the short side would round to 0.
    """
    height, width = size_hw
    if height < 1 or width < 1 or side < 1:
        raise ValueError(f"image size {height}x{width} with input side {side}: each must be at least 1")
    if fit == "stretch":
        return side, side
    scale = side / max(height, width)
    resized_hw = (int(height * scale + 0.5), int(width * scale + 0.5))
    if min(resized_hw) < 1:
        raise ValueError(
            f"too_elongated: an image of height {height} and width {width}, resized so that its long side "
            f"is {side}, would have a side of 0 pixels; cut it into pieces of at most {2 * side} to 1"
        )
    return resized_hw


def resize_longest_side(image_hwc: UInt8Array, side: int) -> UInt8Array:
    """Return `fit_image` of a model that pads: a new uint8 RGB image (h, w, 3) whose long side is `side`."""
    return fit_image(image_hwc, side, "pad")


def fit_image(image_hwc: UInt8Array, side: int, fit: Fit) -> UInt8Array:
    """Return a new uint8 RGB image (h, w, 3) of the size `target_size_hw`: the only resize in the product.

    Pillow's bilinear filter on uint8, which averages over the whole footprint when it shrinks; HQ-SAM was
    trained and published with it. An image that has the size already is copied.

    Raises:
        ValueError: not uint8 (H, W, 3), or `too_elongated` (see `target_size_hw`).
    """
    check_image(image_hwc)
    if target_size_hw(image_hwc.shape[:2], side, fit) == image_hwc.shape[:2]:
        return image_hwc.copy()
    return resize_image(Image.fromarray(np.ascontiguousarray(image_hwc)), side, fit=fit)


def resize_image(
    image: Image.Image, side: int, *, full_hw: tuple[int, int] | None = None, fit: Fit = "pad"
) -> UInt8Array:
    """Return the same of a Pillow image, mode RGB: at 12 megapixels two copies of 36 MB less.

    `full_hw`: its size before it was loaded reduced, from which the new one follows; None: as it is.

    Raises:
        ValueError: another mode, or `too_elongated`.
    """
    if image.mode != "RGB":
        raise ValueError(f"image has mode {image.mode}; wanted RGB")
    height, width = target_size_hw(full_hw or (image.height, image.width), side, fit)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    # np.array, not asarray: the result must own its memory and be writable (torch warns otherwise).
    return np.array(image)


def scale_points(
    points_xy: npt.ArrayLike, size_hw: tuple[int, int], resized_hw: tuple[int, int]
) -> Float32Array:
    """Return points (..., 2) as (x, y) in upright pixels in model pixels, float32.

    Two separate factors from the rounded sizes (they differ by up to half a pixel in the short side),
    multiplied in float64 and rounded once, as the original's `apply_coords` does.
    """
    factors_xy = np.array([resized_hw[1] / size_hw[1], resized_hw[0] / size_hw[0]], dtype=np.float64)
    return (np.asarray(points_xy, dtype=np.float64) * factors_xy).astype(np.float32)


def scale_boxes(
    boxes_xyxy: npt.ArrayLike, size_hw: tuple[int, int], resized_hw: tuple[int, int]
) -> Float32Array:
    """Return boxes (N, 4) as xyxy in upright pixels in model pixels, float32. See `scale_points`."""
    corners_xy = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 2, 2)
    return scale_points(corners_xy, size_hw, resized_hw).reshape(-1, 4)
