"""The prompts of one image: resolved from its planned boxes, and grouped by kind as the model takes them.

A call of the model needs prompts of one kind: the same parts, and the same number of points. Nearly
every image has boxes alone and so one group. Where kinds are mixed, the picture is encoded once a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hqlabel.model.records import Instances, Prompts
from hqlabel.model.rle import compress_lengths
from hqlabel.pipeline.image_result import ImageResult, ResolvedBoxes
from hqlabel.pipeline.job_context import BoxRules
from hqlabel.pipeline.stages.box_prompts import resolve_boxes

MaskPrompt = Callable[[str, tuple[int, int]], npt.NDArray[np.float32]]
"""Compressed runs and their (height, width) -> low-resolution logits for `Prompts.mask_logits`."""


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """Prompts of one kind, and which of the image's usable boxes they answer, ascending.

    Boxes that are equal to the last bit are one prompt: `row_of` is the prompt's row for each of `places`.
    """

    places: npt.NDArray[np.int64]
    row_of: npt.NDArray[np.int64]
    prompts: Prompts

    def __len__(self) -> int:
        """Return the number of prompts."""
        return int(self.row_of.max()) + 1


def with_boxes(image: ImageResult, rules: BoxRules) -> ImageResult:
    """Return the image with its boxes resolved, where its size is known and it has boxes at all.

    Prepare, segment and commit each do this anew: it is arithmetic on the plan, the same in every stage.
    """
    if image.size_hw is None or not image.planned["boxes"]:
        return image
    boxes = resolve_boxes(
        image.planned["boxes"],
        rules,
        upright_size_hw=image.size_hw,
        stored_size_hw=image.stored_size_hw,
        orientation=image.exif_orientation,
    )
    return replace(image, boxes=boxes)


def group_by_kind(
    boxes: ResolvedBoxes, size_hw: tuple[int, int], mask_prompt: MaskPrompt
) -> list[PromptGroup]:
    """Return the usable prompts in groups of one kind; together they are every usable box once."""
    rows = np.flatnonzero(boxes.usable)
    kinds: dict[tuple[bool, int, bool], list[int]] = {}
    for place, row in enumerate(rows):
        kinds.setdefault(_kind(boxes, int(row)), []).append(place)
    groups = []
    for (has_box, num_points, has_mask), places in kinds.items():
        chosen, row_of = rows[places], np.arange(len(places))
        if has_box and not num_points and not has_mask:
            _, first, row_of = np.unique(
                boxes.prompt_xyxy[chosen], axis=0, return_index=True, return_inverse=True
            )
            order = np.argsort(first)  # in the order in which the boxes were given
            chosen, row_of = chosen[first[order]], np.argsort(order)[row_of.reshape(-1)]
        points = [p for p in (boxes.points_xy[row] for row in chosen) if p is not None]
        labels = [p for p in (boxes.point_labels[row] for row in chosen) if p is not None]
        masks = [m for m in (boxes.prompt_mask[row] for row in chosen) if m is not None]
        prompts = Prompts(
            boxes_xyxy=boxes.prompt_xyxy[chosen] if has_box else None,
            points_xy=np.stack(points) if num_points else None,
            point_labels=np.stack(labels) if num_points else None,
            mask_logits=np.stack([mask_prompt(m, size_hw) for m in masks]) if has_mask else None,
        )
        groups.append(PromptGroup(places=np.array(places, np.int64), row_of=row_of, prompts=prompts))
    return groups


def _kind(boxes: ResolvedBoxes, row: int) -> tuple[bool, int, bool]:
    points = boxes.points_xy[row]
    has_box = bool(np.isfinite(boxes.prompt_xyxy[row]).all())
    return has_box, 0 if points is None else len(points), boxes.prompt_mask[row] is not None


def without_numbers(group: PromptGroup, size_hw: tuple[int, int]) -> Instances:
    """Return empty masks without scores, for a group of prompts without a finite number from the model."""
    count = len(group)
    empty = compress_lengths([size_hw[0] * size_hw[1]])
    return Instances(
        size_hw=size_hw,
        counts=(empty,) * count,
        area=np.zeros(count, np.int64),
        bbox_xywh=np.zeros((count, 4), np.float32),
        predicted_iou=np.full(count, np.nan, np.float32),
        stability_score=np.zeros(count, np.float32),
    )


def join(groups: list[PromptGroup], answers: list[Instances]) -> Instances:
    """Return the masks of all groups of one image, one a usable box, in order; flags of any are kept."""
    first, *others = groups
    if not others and np.array_equal(first.row_of, np.arange(len(answers[0].counts))):
        return answers[0]
    places = np.concatenate([group.places for group in groups])
    begins = np.cumsum([0, *(len(answer.counts) for answer in answers)])
    rows = np.concatenate([begin + group.row_of for begin, group in zip(begins, groups, strict=False)])
    order = rows[np.argsort(places, kind="stable")]
    counts = [text for answer in answers for text in answer.counts]
    return Instances(
        size_hw=answers[0].size_hw,
        counts=tuple(counts[i] for i in order),
        area=np.concatenate([answer.area for answer in answers])[order],
        bbox_xywh=np.concatenate([answer.bbox_xywh for answer in answers])[order],
        predicted_iou=np.concatenate([answer.predicted_iou for answer in answers])[order],
        stability_score=np.concatenate([answer.stability_score for answer in answers])[order],
        flags=tuple(dict.fromkeys(flag for answer in answers for flag in answer.flags)),
    )
