"""Masks against ground truth: average precision as COCO defines it, and the IoU of matched pairs.

AP and boundary AP come from faster-coco-eval, which agrees with pycocotools; an object counts as found
in boundary AP by the lesser of mask IoU and boundary IoU (arXiv 2103.16562). Mean IoU asks another
question: how good is the mask of a box that was given, whatever its score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from hqlabel.jobs.evaluate.ground_truth import Box, TruthObject
from hqlabel.pipeline.errors import UsageError

Float64Array = npt.NDArray[np.float64]

BOUNDARY_DILATION = 0.02
"""Of the image's diagonal: how far from its edge a mask's boundary reaches."""
SIZES: dict[str, tuple[float, float]] = {
    "all": (0, 1e10),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, 1e10),
}
"""COCO's sizes: the object's area in pixels."""
MATCH_IOU = 0.5
"""A prompt belongs to an object when their boxes agree at least so well."""
ANY_CLASS = 1
"""The one category where classes do not count."""

Match = Literal["box_id", "box_iou"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundMask:
    """A published instance that may match an object. `counts`: None when it has no mask.

    `box_xywh`: the prompt as used, None when it could not be used. `category_id`: the truth's number, which
    may be 0; None for a class that the truth does not have.
    """

    box_id: str | None
    category_id: int | None
    box_xywh: Box | None
    score: float
    counts: str | None


@dataclass(frozen=True, kw_only=True)
class EvaluatedImage:
    """One image with its objects and the masks that were made for it; both of one size."""

    size_hw: tuple[int, int]
    objects: tuple[TruthObject, ...]
    masks: tuple[FoundMask, ...]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Average precision over IoU 0.50 to 0.95; None where the truth has no object.

    `by_size`: for each name of SIZES. `by_category`: for each category of the truth.
    `ar`: the recall averaged over the same thresholds.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ar: float | None
    by_size: Mapping[str, float | None]
    by_category: Mapping[int, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """An object and the prompt that belongs to it. A prompt without mask has IoU 0 and `has_mask` False."""

    category_id: int | None
    area: float
    iou: float
    boundary_iou: float
    has_mask: bool


def require_library() -> None:
    """Raise UsageError, with what to install, when faster-coco-eval is missing."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError:
        raise UsageError("evaluate needs faster-coco-eval: pip install 'hqlabel[eval]'") from None


def average_precision(
    images: Sequence[EvaluatedImage], categories: Sequence[int], *, boundary: bool, max_per_image: int = 100
) -> Precision:
    """Mask AP, or boundary AP, of all masks of these images, ranked by their scores.

    `categories`: of the truth; masks of others are not judged, as in pycocotools. `max_per_image`: only
    that many masks of an image and category, the best-scored, count (COCO: 100; LVIS: 300).
    """
    require_library()
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(_coco(images, categories, _truth_annotations))
    found = COCO(_coco(images, categories, _mask_annotations))
    judge = COCOeval_faster(truth, found, iouType="boundary" if boundary else "segm")
    judge.boundary_dilation_ratio = BOUNDARY_DILATION
    judge.params.maxDets = [max_per_image]
    judge.params.areaRng = [list(bounds) for bounds in SIZES.values()]
    judge.params.areaRngLbl = list(SIZES)
    judge.evaluate()
    judge.accumulate()
    return _precision(judge.eval, judge.params.iouThrs, categories)


def _precision(result: Mapping[str, Any], thresholds: Float64Array, categories: Sequence[int]) -> Precision:
    precision: Float64Array = np.asarray(result["precision"])[..., -1]  # IoU, recall, category, size
    recall: Float64Array = np.asarray(result["recall"])[..., -1]  # IoU, category, size

    def at(iou: float) -> float | None:
        return _mean(precision[int(np.argmin(np.abs(thresholds - iou))), :, :, 0])

    return Precision(
        ap=_mean(precision[..., 0]),
        ap50=at(0.5),
        ap75=at(0.75),
        ar=_mean(recall[..., 0]),
        by_size={name: _mean(precision[..., place]) for place, name in enumerate(SIZES)},
        by_category={
            int(number): _mean(precision[:, :, place, 0]) for place, number in enumerate(categories)
        },
    )


def _mean(values: Float64Array) -> float | None:
    """Return the mean of what was measured; -1 means nothing to measure."""
    known = values[values > -1]
    return float(known.mean()) if known.size else None


_EMPTY_RLE = {"size": [1, 1], "counts": "1"}
"""The smallest mask, empty."""


def _truth_annotations(image: EvaluatedImage) -> Iterator[dict[str, Any]]:
    # Where no mask was made all objects are missed, whatever theirs are: none is decoded then, not even one
    # of an image that was too large to be opened.
    has_masks = any(mask.counts is not None for mask in image.masks)
    for one in image.objects:
        yield {
            "category_id": one.category_id,
            "segmentation": _rle(one.counts, image.size_hw) if has_masks else _EMPTY_RLE,
            "bbox": list(one.bbox_xywh),
            "area": one.area,
            "iscrowd": int(one.is_crowd),
        }


def _mask_annotations(image: EvaluatedImage) -> Iterator[dict[str, Any]]:
    for mask in image.masks:
        if mask.counts is not None:
            rle = _rle(mask.counts, image.size_hw)
            area = float(coco_mask.area(rle))
            yield {
                "category_id": mask.category_id,
                "segmentation": rle,
                "area": area,
                "score": mask.score,
                "iscrowd": 0,
            }


def _coco(
    images: Sequence[EvaluatedImage],
    categories: Sequence[int],
    annotations_of: Callable[[EvaluatedImage], Iterator[dict[str, Any]]],
) -> dict[str, Any]:
    """Return what the library reads. Ids of images, categories and annotations are places from 1.

    An id of a file may be 0, and 0 means "not matched" in there; or no int64.
    """
    place_of = {number: place for place, number in enumerate(categories, start=1)}
    annotations: list[dict[str, Any]] = []
    for place, image in enumerate(images, start=1):
        for one in annotations_of(image):
            if one["category_id"] in place_of:
                ids = {"id": len(annotations) + 1, "image_id": place}
                annotations.append({**one, **ids, "category_id": place_of[one["category_id"]]})
    return {
        "images": [
            {"id": place, "height": image.size_hw[0], "width": image.size_hw[1]}
            for place, image in enumerate(images, start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": place, "name": str(place)} for place in range(1, len(categories) + 1)],
    }


def choose_match(images: Sequence[EvaluatedImage]) -> Match:
    """Return `box_id` when every prompt's box_id is the id of an annotation of its image, each once.

    So it is when the boxes came from the ground truth's own file; else prompts are matched by their boxes.
    """
    for image in images:
        ids = [mask.box_id for mask in image.masks]
        known = {one.annotation_id for one in image.objects}
        if len(set(ids)) < len(ids) or any(one not in known for one in ids):
            return "box_iou"
    return "box_id" if any(image.masks for image in images) else "box_iou"


def pair_up(image: EvaluatedImage, match: Match) -> list[Pair]:
    """Return every object of the image, without crowds, that has a prompt, with the IoU of their masks.

    `box_iou`: prompt boxes and object boxes of one category, the best agreement first, each used once,
    down to MATCH_IOU. Scores and masks play no part in the choice.
    """
    objects = [one for one in image.objects if not one.is_crowd]
    if match == "box_id":
        by_id = {one.annotation_id: one for one in objects}
        chosen = [(by_id[mask.box_id], mask) for mask in image.masks if mask.box_id in by_id]
    else:
        chosen = _by_boxes(objects, [mask for mask in image.masks if mask.box_xywh is not None])
    return [_pair(one, mask, image.size_hw) for one, mask in chosen]


def _by_boxes(
    objects: Sequence[TruthObject], masks: Sequence[FoundMask]
) -> list[tuple[TruthObject, FoundMask]]:
    if not objects or not masks:
        return []
    truth = np.array([one.bbox_xywh for one in objects], dtype=np.float64)
    prompts = np.array([mask.box_xywh for mask in masks], dtype=np.float64)
    agreement = np.asarray(coco_mask.iou(prompts, truth, [0] * len(truth)), dtype=np.float64)
    kinds: dict[int | None, int] = {}  # ids are of any size, their places are not
    of_prompts = np.array([kinds.setdefault(mask.category_id, len(kinds)) for mask in masks])
    of_truth = np.array([kinds.setdefault(one.category_id, len(kinds)) for one in objects])
    agreement[of_prompts[:, None] != of_truth[None, :]] = 0
    pairs = []
    for place in np.argsort(-agreement, axis=None, kind="stable"):
        prompt, thing = np.unravel_index(place, agreement.shape)
        if not agreement[prompt, thing] >= MATCH_IOU:  # NaN for two boxes without area
            continue
        pairs.append((objects[int(thing)], masks[int(prompt)]))
        agreement[prompt, :] = agreement[:, thing] = 0
    return pairs


def _pair(one: TruthObject, mask: FoundMask, size_hw: tuple[int, int]) -> Pair:
    iou = boundary_iou = 0.0
    if mask.counts is not None:
        ours, truth = _rle(mask.counts, size_hw), _rle(one.counts, size_hw)
        iou, boundary_iou = rle_iou(ours, truth), rle_iou(boundary_of(ours), boundary_of(truth))
    has_mask = mask.counts is not None
    return Pair(
        category_id=one.category_id, area=one.area, iou=iou, boundary_iou=boundary_iou, has_mask=has_mask
    )


def boundary_of(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a mask within BOUNDARY_DILATION of the diagonal from its edge, as COCO runs.

    Distance is counted in steps to any of 8 neighbours; the picture's border is an edge too.
    """
    from faster_coco_eval.core.mask import rleToBoundary

    return dict(rleToBoundary(dict(rle), BOUNDARY_DILATION))


def rle_iou(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Intersection over union of two masks of one size; 0 for two empty ones."""
    return float(coco_mask.iou([one], [other], [0])[0, 0])


def _rle(counts: str, size_hw: tuple[int, int]) -> dict[str, Any]:
    return {"size": list(size_hw), "counts": counts}
