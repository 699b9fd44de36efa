"""The records of one image that travel through all stages: its prompts, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hqlabel.model.records import Instances

BoolArray = npt.NDArray[np.bool_]
UInt8Array = npt.NDArray[np.uint8]
Pixels = UInt8Array | None
"""uint8 RGB (h, w, 3), read-only."""


@dataclass(frozen=True, kw_only=True)
class ResolvedBoxes:
    """The prompts of one image, one entry for each given box, in order.

    `prompt_xyxy`: float32 (N, 4) in upright pixels, inside the picture, x1 < x2 and y1 < y2; a row of NaN
    where there is no usable box; a crowd keeps its box here, which bounds the region. `usable`: bool (N,),
    the prompt goes to the model; without a box it has points or a mask. `error`: a code of BOX_CODES, or None
    when usable. `flags`: `box_clipped`.
    `points_xy`: float32 (P, 2) in upright pixels with `point_labels` int32 (P,) of 1, 0 or -1, or None.
    `prompt_mask`: compressed COCO runs of the upright picture, or None.
    """

    prompt_xyxy: npt.NDArray[np.float32]
    usable: BoolArray
    error: tuple[str | None, ...]
    flags: tuple[tuple[str, ...], ...]
    points_xy: tuple[npt.NDArray[np.float32] | None, ...]
    point_labels: tuple[npt.NDArray[np.int32] | None, ...]
    prompt_mask: tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """What became of one planned image. `planned`: its row of the plan (schema.PLAN) as a dict.

    Sizes are (height, width), None when the image was not decoded. `boxes`: the prompts of all its
    given boxes, None when they are not resolved. `instances`: masks of the usable boxes alone, in
    their order. `error_code`, `error_message`: of IMAGE_CODES, when it failed after planning.
    `attempts`: starts of this image, the successful one included. Times in milliseconds.
    `pixels_hwc`: the picture at the model's input side, None after the model and where it has no work.
    `detector_pixels_hwc`: the same for the detector, None also where it gets the model's own.

    A field that a column of schema.UNIT is named for fills that column.
    """

    planned: Mapping[str, Any]
    size_hw: tuple[int, int] | None = None
    stored_size_hw: tuple[int, int] | None = None
    exif_orientation: int | None = None
    boxes: ResolvedBoxes | None = None
    instances: Instances | None = None
    error_code: str | None = None
    error_message: str | None = None
    source_bytes: int | None = None
    source_etag: str | None = None
    attempts: int = 1
    fetch_ms: float | None = None
    decode_ms: float | None = None
    detect_ms: float | None = None
    segment_ms: float | None = None
    pixels_hwc: Pixels = None
    detector_pixels_hwc: Pixels = None
