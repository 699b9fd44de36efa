"""Every object of an image: a mask for each point of a grid, and of those the good and different ones.

As the original's `SamAutomaticMaskGenerator` (HQ-SAM) and `SAM2AutomaticMaskGenerator` (HQ-SAM 2), mask by
mask, but the points of several images go through the decoder together at the fixed shapes of `CallShape`, a
mask is traced only when its predicted IoU suffices, and none ever is a picture: it is in runs from the start,
in which it is moved from its crop to the image and rid of small regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from hqlabel.model.device import HostThread
from hqlabel.model.everything.duplicate_boxes import cut_by_crop, keep_best, pixel_boxes
from hqlabel.model.everything.mask_edits import remove_small_regions, shift_masks
from hqlabel.model.everything.point_grid import Crop, PointGrid
from hqlabel.model.masks import TracedMasks, trace_masks
from hqlabel.model.records import CallShape, Instances, Prompts, SegmentFailure
from hqlabel.model.segmenter import REDUCED_CALL_SHAPE, Segmenter, none_without_memory, reduced_shape

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Everything:
    """The masks of one image, best first within a crop, crop after crop.

    `instances`: as of any prompts. `points_xy`: float64 (N, 2), the point of each in upright pixels.
    `crops_xyxy`: int64 (N, 4), the crop in which it was found.
    """

    instances: Instances
    points_xy: Float64Array
    crops_xyxy: Int64Array


@dataclass(frozen=True, kw_only=True)
class _Found:
    """N masks of one frame, a crop or the image: columns as in `Everything` and `Instances`."""

    counts: tuple[str, ...] = ()
    area: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    bbox_xywh: Float32Array = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    predicted_iou: Float32Array = field(default_factory=lambda: np.zeros(0, np.float32))
    stability_score: Float32Array = field(default_factory=lambda: np.zeros(0, np.float32))
    points_xy: Float64Array = field(default_factory=lambda: np.zeros((0, 2)))
    crops_xyxy: Int64Array = field(default_factory=lambda: np.zeros((0, 4), np.int64))

    def take(self, index: npt.NDArray[np.generic]) -> _Found:
        """Return some of them: indices in the wanted order, or bool (N,)."""
        places = np.arange(len(self.counts))[index].tolist()
        rows = {name: values[places] for name, values in vars(self).items() if name != "counts"}
        return _Found(counts=tuple(self.counts[place] for place in places), **rows)


def _join(parts: Sequence[_Found]) -> _Found:
    parts = [_Found(), *parts]
    columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    counts = tuple(text for texts in columns.pop("counts") for text in texts)
    return _Found(counts=counts, **{name: np.concatenate(values) for name, values in columns.items()})


class EverythingSegmenter:
    """A model asked for everything. It keeps no state between calls, and works on after an error."""

    def __init__(self, segmenter: Segmenter, grid: PointGrid) -> None:
        """Use the model, device and call shape of `segmenter`; a call's boxes are points here."""
        self.model, self.device = segmenter.model, segmenter.device
        self.call_shape, self.grid = segmenter.call_shape, grid
        self.hq_token_only = segmenter.hq_token_only
        self.pred_iou = self.model.lowest_iou_of_a_point if grid.pred_iou is None else grid.pred_iou
        self._host_thread = HostThread(own_thread=self.device.type == "cuda")

    def segment(self, images: Sequence[Sequence[Crop]]) -> list[Everything | SegmentFailure]:
        """Return everything in images, given as their crops (`cut_crops`), one result an image, in order.

        Crops of different images share encoder calls, and their points decoder calls. Where memory runs out,
        a crop is segmented alone, then at the smaller shape with the flag `reduced_call_shape`.
        """
        crops = [crop for image in images for crop in image]
        answers: list[_OfCrop | None] = []
        for start in range(0, len(crops), self.call_shape.images_per_call):
            answers += self._crops_or_none(crops[start : start + self.call_shape.images_per_call])
        first = np.cumsum([0, *[len(image) for image in images]]).tolist()
        return [
            self._of_image(answers[start:stop], image[0].image_hw)
            for image, start, stop in zip(images, first[:-1], first[1:], strict=True)
        ]

    def _crops_or_none(self, crops: Sequence[Crop]) -> list[_OfCrop | None]:
        answers = self._call_or_none(crops, self.call_shape, ())
        if answers is not None:
            return list(answers)
        return [self._alone_or_none(crop) for crop in crops]

    def _alone_or_none(self, crop: Crop) -> _OfCrop | None:
        smaller = reduced_shape(self.call_shape)
        for shape, flags in ((self.call_shape, ()), (smaller, (REDUCED_CALL_SHAPE,))):
            answers = self._call_or_none([crop], shape, flags)
            if answers is not None:
                return answers[0]
        return None

    def _call_or_none(
        self, crops: Sequence[Crop], shape: CallShape, flags: tuple[str, ...]
    ) -> list[_OfCrop] | None:
        return none_without_memory(lambda: self._segment_call(crops, shape, flags), self.device)

    @torch.no_grad()
    def _segment_call(self, crops: Sequence[Crop], shape: CallShape, flags: tuple[str, ...]) -> list[_OfCrop]:
        """Return what is in at most `shape.images_per_call` crops, with one encoder call."""
        padded = [*crops, *[crops[-1]] * (shape.images_per_call - len(crops))]
        embedding = self.model.encode_prepared(
            [crop.pixels_hwc for crop in padded], [crop.size_hw for crop in padded]
        )
        points = [self.grid.points_xy(crop.layer, crop.box_xyxy) for crop in crops]
        points += [np.zeros((0, 2))] * (len(padded) - len(crops))
        prompts = [
            Prompts(points_xy=xy[:, None], point_labels=np.ones((len(xy), 1), np.int64)) for xy in points
        ]
        all_points = np.concatenate(points)
        parts: list[list[Future[_Found]]] = [[] for _ in crops]
        any_finite = [not len(xy) for xy in points]
        for call in self.model.decode_calls(
            embedding,
            prompts,
            multimask=self.model.masks_of_a_point,
            hq_token_only=self.hq_token_only,
            prompts_per_call=shape.boxes_per_call,
        ):
            finite_NM = torch.isfinite(call.low_res_NMHW.sum((2, 3)) + call.predicted_iou_NM)
            good_NM = finite_NM & (call.predicted_iou_NM > self.pred_iou)
            for i in sorted(set(call.image_N.tolist())):
                of_crop_N = (call.image_N == i).to(self.device)
                any_finite[i] |= bool(finite_NM[of_crop_N].any())
                n, m = torch.nonzero(good_NM & of_crop_N[:, None], as_tuple=True)
                if len(n):
                    xy = all_points[call.place_N.numpy()[n.cpu().numpy()]]
                    resized_hw = None if self.model.fit == "stretch" else embedding.resized_hw[i]
                    logits, iou = call.low_res_NMHW[n, m], call.predicted_iou_NM[n, m]
                    parts[i].append(self._trace(logits, iou, xy, crops[i], resized_hw))
        return [
            _OfCrop(found=self._without_duplicates(parts[i], crop), flags=flags, any_finite=any_finite[i])
            for i, crop in enumerate(crops)
        ]

    def _trace(
        self,
        logits_NLL: torch.Tensor,
        iou_N: torch.Tensor,
        points_xy: Float64Array,
        crop: Crop,
        resized_hw: tuple[int, int] | None,
    ) -> Future[_Found]:
        """Return what is left of some masks of a crop after the rules that judge each by itself."""
        traced = trace_masks(
            logits_NLL,
            resized_hw=resized_hw,
            size_hw=crop.size_hw,
            stability_offset=self.grid.stability_offset,
        )
        iou = iou_N.float().cpu().numpy()
        return self._host_thread.submit(_stable_and_whole, traced, iou, points_xy, crop, self.grid.stability)

    def _without_duplicates(self, parts: Sequence[Future[_Found]], crop: Crop) -> _Found:
        """Return the masks of a crop, in the image's frame, of which no two have nearly the same box."""
        found = _join([part.result() for part in parts])
        boxes = pixel_boxes(found.bbox_xywh)
        found = found.take(keep_best(boxes, found.predicted_iou, self.grid.box_nms))
        x, y = crop.box_xyxy[:2]
        counts = found.counts
        if crop.size_hw != crop.image_hw:
            counts = shift_masks(counts, crop.size_hw, (x, y), crop.image_hw).counts()
        return replace(
            found,
            counts=counts,
            bbox_xywh=found.bbox_xywh + np.array([x, y, 0, 0], np.float32) * (found.area > 0)[:, None],
            points_xy=found.points_xy + np.array([x, y]),
            crops_xyxy=np.tile(np.array(crop.box_xyxy, np.int64), (len(counts), 1)),
        )

    def _of_image(
        self, crops: Sequence[_OfCrop | None], image_hw: tuple[int, int]
    ) -> Everything | SegmentFailure:
        """Return the masks of one image from those of its crops."""
        whole = [crop for crop in crops if crop is not None]
        what = f"an image of {image_hw[0]}x{image_hw[1]} pixels"
        if len(whole) < len(crops):
            return SegmentFailure(
                code="out_of_memory",
                message=f"memory on {self.device} did not suffice for {what}, alone and with fewer points a "
                "call; give the model more memory, or lower images_per_call and boxes_per_call",
            )
        if not any(crop.any_finite for crop in whole):
            return SegmentFailure(
                code="non_finite",
                message=f"the model's logits or scores are not finite for any point of {what}; check the "
                "weights, and whether float32 gives the same",
            )
        found = _join([crop.found for crop in whole])
        if len(whole) > 1:
            sides = found.crops_xyxy[:, 2:] - found.crops_xyxy[:, :2]
            smaller_first = (1 / sides.prod(axis=1)).astype(np.float32)
            boxes = pixel_boxes(found.bbox_xywh)
            found = found.take(keep_best(boxes, smaller_first, self.grid.crop_nms))
        if self.grid.min_region_area:
            found = self._without_small_regions(found, image_hw)
        return Everything(
            instances=Instances(
                size_hw=image_hw,
                counts=found.counts,
                area=found.area,
                bbox_xywh=found.bbox_xywh,
                predicted_iou=found.predicted_iou,
                stability_score=found.stability_score,
                flags=tuple(sorted({flag for crop in whole for flag in crop.flags})),
            ),
            points_xy=found.points_xy,
            crops_xyxy=found.crops_xyxy,
        )

    def _without_small_regions(self, found: _Found, image_hw: tuple[int, int]) -> _Found:
        """Return the masks without small parts and holes, and without the duplicates that this makes."""
        runs, changed = remove_small_regions(found.counts, image_hw, self.grid.min_region_area)
        found = replace(found, counts=runs.counts, area=runs.area, bbox_xywh=runs.bbox_xywh)
        threshold = max(self.grid.box_nms, self.grid.crop_nms)
        # Masks that were clean before win.
        return found.take(keep_best(pixel_boxes(found.bbox_xywh), (~changed).astype(np.float32), threshold))


@dataclass(frozen=True, kw_only=True)
class _OfCrop:
    """The masks of a crop, in the image's frame. `any_finite`: a point of it had finite numbers."""

    found: _Found
    flags: tuple[str, ...]
    any_finite: bool


def _stable_and_whole(
    traced: TracedMasks, iou_N: Float32Array, points_xy: Float64Array, crop: Crop, stability: float
) -> _Found:
    """Return the masks of a crop that are stable and not cut by its edges; the host's part of the work."""
    stable_N = traced.stability_score >= np.float32(stability)
    runs = traced.take(stable_N).runs()
    found = _Found(
        counts=runs.counts(),
        area=runs.areas(),
        bbox_xywh=runs.bboxes_xywh(),
        predicted_iou=iou_N[stable_N],
        stability_score=traced.stability_score[stable_N],
        points_xy=points_xy[stable_N],
        crops_xyxy=np.tile(np.array(crop.box_xyxy, np.int64), (int(stable_N.sum()), 1)),
    )
    x, y = crop.box_xyxy[:2]
    boxes = pixel_boxes(found.bbox_xywh) + np.array([x, y, x, y], np.float32)
    return found.take(~cut_by_crop(boxes, crop.box_xyxy, crop.image_hw))
