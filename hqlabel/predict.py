"""Masks of one image in Python: a checkpoint, an image, prompts.

    model = hqlabel.SamHQ.from_pretrained("demo")
    answer = model.predict("cat.jpg", boxes=[[50, 20, 400, 290]])
    answer.masks, answer.scores, answer.rle

Boxes and points are in pixels of the upright image (EXIF orientation applied), (x, y) or (x1, y1, x2, y2),
x to the right, y down. With the number format and the call shape of a job's device, masks and scores equal
the rows that a job writes, bit for bit.

Letters: N prompts (objects), P points of a prompt, M masks of a prompt: 1, or 3 for `multimask="three"`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from hqlabel.jobs.job_setup.resolve_settings import BOXES_PER_CALL
from hqlabel.model.checkpoints import DEMO_FOLDER, load
from hqlabel.model.device import Dtype, probe_dtype
from hqlabel.model.everything.everything import Everything, EverythingSegmenter
from hqlabel.model.everything.point_grid import Crop, PointGrid, cut_crops
from hqlabel.model.masks import trace_masks
from hqlabel.model.prompt_encoder import mask_to_prompt
from hqlabel.model.records import (
    CallShape,
    Fit,
    Instances,
    PreparedImage,
    Prompts,
    SegmentFailure,
    WeightsInfo,
    check_image,
    fit_image,
)
from hqlabel.model.rle import rle_to_mask
from hqlabel.model.sam_hq import SamHQ as SamHQModel
from hqlabel.model.segmenter import Segmenter
from hqlabel.pipeline.images.decode_upright import decode_image, measure_image
from hqlabel.pipeline.settings import DEMO, Limits

Float32Array = npt.NDArray[np.float32]
ImageLike = str | Path | bytes | Image.Image | npt.NDArray[np.uint8]
Multimask = Literal["single", "best", "three"]


class Rle(TypedDict):
    """A mask as COCO writes it: `size` is [height, width], `counts` the compressed runs."""

    size: list[int]
    counts: str


class FoundMask(TypedDict):
    """A mask of `generate`, with the keys of the original's `SamAutomaticMaskGenerator`.

    `bbox` and `crop_box`: xywh in upright pixels, tight and end-exclusive, as COCO has them (the original's
    `bbox` is one pixel narrower and lower). `point_coords`: [[x, y]], the point that was asked.
    """

    segmentation: Rle
    area: int
    bbox: list[float]
    predicted_iou: float
    point_coords: list[list[float]]
    stability_score: float
    crop_box: list[int]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The masks of one image, in the order of its prompts.

    `size_hw`: upright (height, width). `scores`: float32 (N,), the model's own estimate of each mask's IoU,
    with `multimask="three"` (N, 3), best first. `stability`: float32, same shape: the IoU of the mask at two
    thresholds around 0. `rle`: N of them, with `multimask="three"` N lists of three.
    """

    size_hw: tuple[int, int]
    scores: Float32Array
    stability: Float32Array
    rle: list[Any]

    @functools.cached_property
    def masks(self) -> npt.NDArray[np.bool_]:
        """Return the masks, bool (N, H, W), with `multimask="three"` (N, 3, H, W)."""
        flat = [one for entry in self.rle for one in (entry if isinstance(entry, list) else [entry])]
        masks = [rle_to_mask(one["counts"], self.size_hw) for one in flat]
        stacked = np.stack(masks) if masks else np.zeros((0, *self.size_hw), np.bool_)
        return stacked.reshape(*self.scores.shape, *self.size_hw)

    def __len__(self) -> int:
        """Return N."""
        return len(self.rle)


class SamHQ:
    """A loaded model on one device. It keeps no state between calls.

    `network`: the PyTorch module (`network.image_encoder` is the vision model). `weights`: where its
    weights came from. `dtype`: what it multiplies in.
    """

    def __init__(
        self,
        network: SamHQModel,
        weights: WeightsInfo,
        *,
        device: str = "cpu",
        dtype: Dtype = "float32",
        boxes_per_call: int | None = None,
    ) -> None:
        """Use `from_pretrained`; this takes a network that is there already."""
        self.network, self.weights = network, weights
        self.device, self.dtype = device, dtype
        self.boxes_per_call = boxes_per_call or BOXES_PER_CALL["cuda" if device.startswith("cuda") else "cpu"]
        self._segmenters: dict[tuple[str, bool], Segmenter] = {}
        self._segmenter("single", False)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = DEMO,
        *,
        device: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        boxes_per_call: int | None = None,
        revision: str | None = None,
    ) -> SamHQ:
        """Return the model of a checkpoint.

        Args:
            source: `demo` (ships with hqlabel, for trying things), a `.pth` or `.safetensors` file, a folder,
                or a hub id such as `syscv-community/sam-hq-vit-base`.
            device: such as `cpu` or `cuda:0`; None: a GPU if there is one.
            dtype: `auto` is the faster of the two on this device.
            boxes_per_call: prompts in one call of the decoder; it changes last bits. None: as in a job.
            revision: of a hub id.

        Raises:
            CheckpointError: nothing is there, or it is no SAM-HQ checkpoint; the message says what to do.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        number_format = probe_dtype(device) if dtype == "auto" else dtype
        loaded = load(DEMO_FOLDER if source == DEMO else source, device=device, revision=revision)
        return cls(
            loaded.model, loaded.weights, device=device, dtype=number_format, boxes_per_call=boxes_per_call
        )

    def predict(
        self,
        image: ImageLike,
        *,
        boxes: npt.ArrayLike | None = None,
        points: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        mask: npt.ArrayLike | None = None,
        multimask: Multimask = "single",
        hq_token_only: bool = False,
    ) -> Prediction:
        """Return one mask a prompt, or three with `multimask="three"`.

        Args:
            image: a path, the bytes of a picture file, a Pillow image, or uint8 RGB (H, W, 3). Orientation in
                EXIF is applied, but to an array.
            boxes: xyxy, (4,) for one object or (N, 4).
            points: (x, y), (P, 2) for one object or (N, P, 2). With boxes, points of the same objects.
            labels: of the points, (P,) or (N, P): 1 on the object, 0 beside it. None: all 1.
            mask: a rough mask of each object as a hint, bool (H, W) or (N, H, W), at the size of the upright
                image; or float logits (N, 4G, 4G) of an earlier answer of the network.
            multimask: `single` is made for boxes; `best` is the best of three alternatives, for a prompt that
                may mean several things, such as one point; `three` returns them all, best first.
            hq_token_only: the HQ token's mask alone, without SAM's own.

        Raises:
            ValueError: prompts that are missing, malformed or do not agree on N.
            ImageError: a picture that cannot be decoded.
            RuntimeError: memory ran out, or the model's numbers are not finite.
        """
        prepared = self._prepare(image)
        prompts = self._prompts(boxes, points, labels, mask, prepared.size_hw)
        prepared = PreparedImage(pixels_hwc=prepared.pixels_hwc, size_hw=prepared.size_hw, prompts=prompts)
        if multimask == "three":
            return self._predict_three(prepared, hq_token_only)
        (answer,) = self._segmenter(multimask, hq_token_only).segment_prepared([prepared])
        if isinstance(answer, SegmentFailure):
            raise RuntimeError(f"{answer.code}: {answer.message}")
        return Prediction(
            size_hw=answer.size_hw,
            scores=answer.predicted_iou,
            stability=answer.stability_score,
            rle=_rle(answer.counts, answer.size_hw),
        )

    def generate(
        self,
        image: ImageLike,
        points_per_side: int = 32,
        *,
        crop_layers: int = 0,
        crop_overlap: float = 512 / 1500,
        points_downscale: int = 1,
        pred_iou: float | None = None,
        stability: float = 0.95,
        stability_offset: float = 1.0,
        box_nms: float = 0.7,
        crop_nms: float = 0.7,
        min_region_area: int = 0,
    ) -> list[FoundMask]:
        """Return a mask of everything: of each point of a grid, the good and different ones.

        The settings, their defaults and the rules are those of the original's `SamAutomaticMaskGenerator`;
        with HQ-SAM 2 those of `SAM2AutomaticMaskGenerator`: three masks a point. Equal masks were shown on
        small pictures, not yet on whole photographs. Masks are never pictures.

        Args:
            image: as of `predict`.
            points_per_side: of the grid over the image.
            crop_layers: layer n also segments 2^n x 2^n crops, each with its own grid.
            crop_overlap: of crops, as a share of the short side, in layer 1; half of it in each further one.
            points_downscale: a crop of layer n has `points_per_side / points_downscale ** n` points a side.
            pred_iou: keeps masks over this predicted IoU. None: 0.88, of HQ-SAM 2 0.8.
            stability: keeps masks from this stability score on.
            stability_offset: distance of its two thresholds from 0.
            box_nms: IoU of boxes over which the mask of lower score goes.
            crop_nms: the same between crops, where the mask of the larger crop goes.
            min_region_area: removes separate parts and holes of fewer pixels.

        Raises:
            ValueError: a setting out of its range, or more than 20,000 points for the image.
            ImageError: a picture that cannot be decoded.
            RuntimeError: memory ran out, or the model's numbers are not finite.
        """
        grid = PointGrid(
            points_per_side=points_per_side,
            crop_layers=crop_layers,
            crop_overlap=crop_overlap,
            points_downscale=points_downscale,
            pred_iou=pred_iou,
            stability=stability,
            stability_offset=stability_offset,
            box_nms=box_nms,
            crop_nms=crop_nms,
            min_region_area=min_region_area,
        )
        segmenter = EverythingSegmenter(self._segmenter("single", False), grid)
        (answer,) = segmenter.segment([self._crops(image, grid)])
        if isinstance(answer, SegmentFailure):
            raise RuntimeError(f"{answer.code}: {answer.message}")
        return _found_masks(answer)

    def _crops(self, image: ImageLike, grid: PointGrid) -> tuple[Crop, ...]:
        """Return the crops of an image; the whole one is prepared as every other image."""
        if not grid.crop_layers:
            whole = self._prepare(image)
            height, width = whole.size_hw
            box = (0, 0, width, height)
            return (Crop(pixels_hwc=whole.pixels_hwc, image_hw=whole.size_hw, box_xyxy=box, layer=0),)
        return cut_crops(_full_pixels(image), grid, side=self.input_side, fit=self.fit)

    @property
    def input_side(self) -> int:
        """The side that images are resized to."""
        return self._segmenter("single", False).input_side

    @property
    def fit(self) -> Fit:
        """How images come to that side."""
        return self._segmenter("single", False).fit

    def segment_prepared(self, images: Sequence[PreparedImage]) -> list[Instances | SegmentFailure]:
        """Return the masks of images already resized; see `Segmenter.segment_prepared`."""
        return self._segmenter("single", False).segment_prepared(images)

    def _segmenter(self, multimask: Literal["single", "best"], hq_token_only: bool) -> Segmenter:
        key = (multimask, hq_token_only)
        if key not in self._segmenters:
            self._segmenters[key] = Segmenter(
                self.network,
                call_shape=CallShape(images_per_call=1, boxes_per_call=self.boxes_per_call),
                dtype=self.dtype,
                device=self.device,
                multimask=multimask,
                hq_token_only=hq_token_only,
            )
        return self._segmenters[key]

    @torch.no_grad()
    def _predict_three(self, image: PreparedImage, hq_token_only: bool) -> Prediction:
        """Return three masks a prompt, sorted by score, as the published model's `multimask_output`."""
        embedding = self.network.encode_prepared([image.pixels_hwc], [image.size_hw])
        answer = self.network.decode_prompts(
            embedding, [image.prompts], multimask="three", hq_token_only=hq_token_only
        )
        count, side = len(answer.predicted_iou_NM), answer.low_res_NMHW.shape[-1]
        scores, order_N3 = answer.predicted_iou_NM.sort(dim=1, descending=True, stable=True)
        index = order_N3[:, :, None, None].expand(-1, -1, side, side)
        traced = trace_masks(
            answer.low_res_NMHW.gather(1, index).flatten(0, 1),
            resized_hw=None if self.fit == "stretch" else embedding.resized_hw[0],
            size_hw=image.size_hw,
        )
        rle = _rle(traced.runs().counts(), image.size_hw)
        return Prediction(
            size_hw=image.size_hw,
            scores=scores.float().cpu().numpy(),
            stability=np.asarray(traced.stability_score).reshape(count, 3),
            rle=[rle[3 * n : 3 * n + 3] for n in range(count)],
        )

    def _prepare(self, image: ImageLike) -> PreparedImage:
        """Return the image at the model's input side, without prompts."""
        side = self.input_side
        none = Prompts(boxes_xyxy=np.zeros((0, 4)))
        if isinstance(image, str | Path):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            decoded = decode_image(image, max_pixels=Limits().max_image_pixels, side=side, fit=self.fit)
            return PreparedImage(pixels_hwc=decoded.pixels_hwc, size_hw=decoded.size_hw, prompts=none)
        pixels = as_pixels(image)
        return PreparedImage(
            pixels_hwc=fit_image(pixels, side, self.fit),
            size_hw=(pixels.shape[0], pixels.shape[1]),
            prompts=none,
        )

    def _prompts(
        self,
        boxes: npt.ArrayLike | None,
        points: npt.ArrayLike | None,
        labels: npt.ArrayLike | None,
        mask: npt.ArrayLike | None,
        size_hw: tuple[int, int],
    ) -> Prompts:
        if labels is not None and points is None:
            raise ValueError("labels without points")
        if boxes is None and points is None and mask is None:
            raise ValueError("no prompt; give boxes, points or a mask")
        points_xy = None if points is None else _with_prompt_axis(points, 3, "points", "(P, 2) or (N, P, 2)")
        if points_xy is not None and labels is None:
            labels = np.ones(points_xy.shape[:2], np.int64)
        return Prompts(
            boxes_xyxy=None if boxes is None else _with_prompt_axis(boxes, 2, "boxes", "(4,) or (N, 4)"),
            points_xy=points_xy,
            point_labels=None if labels is None else np.atleast_2d(np.asarray(labels)),
            mask_logits=None if mask is None else self._mask_prompts(mask, size_hw),
        )

    def _mask_prompts(self, mask: npt.ArrayLike, size_hw: tuple[int, int]) -> Float32Array:
        masks = _with_prompt_axis(mask, 3, "mask", "(H, W) or (N, H, W)")
        if np.issubdtype(masks.dtype, np.floating):
            return masks.astype(np.float32)
        if masks.shape[1:] != size_hw:
            raise ValueError(
                f"a mask has size {masks.shape[1]}x{masks.shape[2]}; wanted that of the upright image, "
                f"{size_hw[0]}x{size_hw[1]}"
            )
        side = self.input_side
        return np.stack([mask_to_prompt(one != 0, side=side, fit=self.fit) for one in masks])


def as_pixels(image: Image.Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return an image in memory as upright uint8 RGB (H, W, 3). Raises ValueError for another array."""
    if isinstance(image, Image.Image):
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    check_image(image)
    return image


def _full_pixels(image: ImageLike) -> npt.NDArray[np.uint8]:
    """Return an image as upright uint8 RGB (H, W, 3), at full size."""
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    if not isinstance(image, bytes):
        return as_pixels(image)
    max_pixels = Limits().max_image_pixels
    side = max(measure_image(image, max_pixels=max_pixels, side=1).size_hw)
    return decode_image(image, max_pixels=max_pixels, side=side).pixels_hwc


def _found_masks(answer: Everything) -> list[FoundMask]:
    masks = answer.instances
    x1, y1, x2, y2 = answer.crops_xyxy.T
    crops = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)
    return [
        FoundMask(
            segmentation=rle,
            area=int(masks.area[i]),
            bbox=masks.bbox_xywh[i].tolist(),
            predicted_iou=float(masks.predicted_iou[i]),
            point_coords=[answer.points_xy[i].tolist()],
            stability_score=float(masks.stability_score[i]),
            crop_box=crops[i].tolist(),
        )
        for i, rle in enumerate(_rle(masks.counts, masks.size_hw))
    ]


def _with_prompt_axis(
    values: npt.ArrayLike, dimensions: int, name: str, wanted: str
) -> npt.NDArray[np.generic]:
    array = np.asarray(values)
    if array.ndim == dimensions - 1:
        array = array[None]
    if array.ndim != dimensions:
        raise ValueError(f"{name} has shape {np.shape(values)}; wanted {wanted}")
    return array


def _rle(counts: Sequence[str], size_hw: tuple[int, int]) -> list[Rle]:
    return [Rle(size=list(size_hw), counts=text) for text in counts]
