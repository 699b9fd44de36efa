"""A stub in the model's place: the boxes themselves as masks, so that what is measured is all around a model.

Named by `JobContext.segmenter` and imported by worker processes; no torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from model.records import CallShape, Instances, PreparedImage
from pipeline.settings import JobContext

NAME = "benchmarks.command.bench_stub:make"


@dataclass(frozen=True, kw_only=True)
class BoxModel:
    """See `pipeline.stages.segment.MaskModel`."""

    call_shape: CallShape

    def segment_prepared(self, images: Sequence[PreparedImage]) -> list[Instances]:
        """Every box as a mask."""
        return [_boxes_as_masks(image) for image in images]

    def mask_prompt(self, counts: str, size_hw: tuple[int, int]) -> npt.NDArray[np.float32]:
        """None ever: the benchmark's own inputs are boxes.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"the benchmark's stub answers boxes; found a mask of {size_hw}, {len(counts)} bytes"
        )


def make(context: JobContext, use_gpu: bool) -> BoxModel:  # noqa: ARG001 - every factory is called so
    """The stub, for any job."""
    return BoxModel(call_shape=context.masks.call_shape)


def _boxes_as_masks(image: PreparedImage) -> Instances:
    height, width = image.size_hw
    given = image.prompts.boxes_xyxy
    corners = np.rint(np.zeros((0, 4)) if given is None else given).astype(np.float64)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    encoded = coco_mask.frPyObjects(xywh, height, width) if len(xywh) else []
    ones = np.ones(len(xywh), np.float32)
    return Instances(
        size_hw=image.size_hw,
        counts=tuple(one["counts"].decode() for one in encoded),
        area=(xywh[:, 2] * xywh[:, 3]).astype(np.int64),
        bbox_xywh=xywh.astype(np.float32),
        predicted_iou=ones,
        stability_score=ones,
    )
