"""Likely mistakes in boxes, seen before any work: another format, or another frame, than was set."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from hqlabel.pipeline.box_geometry import PixelFormat, boxes_to_xyxy
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.inputs.propose_columns import LARGEST_SHARE
from hqlabel.pipeline.job_context import BoxRules
from hqlabel.pipeline.settings import BoxFormat
from hqlabel.pipeline.stages.box_prompts import NORMALISED, any_of_row

Float64Array = npt.NDArray[np.float64]

SUSPICIOUS_SHARE = 0.1
"""Of the checked boxes; real detectors stay far below, a wrong format far above."""


def suspicions(
    given_N4: Float64Array,
    rules: BoxRules,
    *,
    upright_size_hw: npt.NDArray[np.int64] | None = None,
    stored_size_hw: npt.NDArray[np.int64] | None = None,
) -> tuple[str, ...]:
    """Return sentences on boxes that seem to be read in the wrong format or frame, with the flag to set.

    `given_N4`: boxes as given, of any images; rows with NaN or infinity are skipped. `upright_size_hw`,
    `stored_size_hw`: int64 (N, 2), the sizes of the pictures they lie in, where known; 0 where not.
    """
    boxes_N4 = given_N4[np.isfinite(given_N4).all(axis=1)]
    if not len(boxes_N4):
        return ()
    base = rules.box_format.removesuffix(NORMALISED)
    with np.errstate(over="ignore", invalid="ignore"):  # boxes of 1e308 are as wrong as they seem
        sentences = [sentence for _, sentence in _wrong_format(boxes_N4, rules.box_format, base)]
    if upright_size_hw is None:
        return tuple(sentences)
    return (*sentences, *suspicions_of_place(given_N4, rules, upright_size_hw, stored_size_hw))


def refuse_other_format(given_N4: Float64Array, rules: BoxRules, uri: str) -> None:
    """Refuse shares that are read as pixels, or pixels as shares, where nobody stated the format.

    Either makes a mask of something else. Boxes that end before they begin have none, and a warning.

    Arguments as of `suspicions`; `uri`: for the message. Boxes of four zeros, which fill up, do not count.

    Raises:
        JobRefused: naming the format that they seem to have, and how to say that they are right as they are.
    """
    boxes_N4 = given_N4[np.isfinite(given_N4).all(axis=1) & given_N4.any(axis=1)]
    if not len(boxes_N4):
        return
    base = rules.box_format.removesuffix(NORMALISED)
    with np.errstate(over="ignore", invalid="ignore"):
        found = _wrong_format(boxes_N4, rules.box_format, base)
    if any(is_unit for is_unit, _ in found):
        sentences = [sentence for _, sentence in found]
        raise JobRefused(
            f"{uri}: {'; '.join(sentences)}; if they are right as they are: --box-format {rules.box_format}"
        )


def suspicions_of_place(
    given_N4: Float64Array,
    rules: BoxRules,
    upright_size_hw: npt.NDArray[np.int64],
    stored_size_hw: npt.NDArray[np.int64] | None,
) -> tuple[str, ...]:
    """Return those sentences of `suspicions` that the sizes of the pictures give; arguments as there."""
    finite = np.isfinite(given_N4).all(axis=1)
    base = rules.box_format.removesuffix(NORMALISED)
    if rules.box_format != base or not finite.any():
        return ()
    upright = upright_size_hw[finite]
    stored = None if stored_size_hw is None else stored_size_hw[finite]
    with np.errstate(over="ignore", invalid="ignore"):
        xyxy_N4 = boxes_to_xyxy(given_N4[finite], cast(PixelFormat, base))
        sentence = _too_far(xyxy_N4, base, upright) or _wrong_frame(xyxy_N4, rules, upright, stored)
    return (sentence,) if sentence else ()


def _wrong_format(boxes_N4: Float64Array, box_format: BoxFormat, base: str) -> list[tuple[bool, str]]:
    """Return what the numbers alone give, each with whether it is about pixels and shares.

    Both sentences name the one format that fixes both.
    """
    largest_N = np.abs(boxes_N4).max(axis=1)
    shares = float((largest_N <= LARGEST_SHARE).mean())
    ends_early = float((boxes_N4[:, 2:] <= boxes_N4[:, :2]).any(axis=1).mean()) if base == "xyxy" else 0.0
    is_wrong_corners = ends_early > SUSPICIOUS_SHARE
    right_base = "xywh" if is_wrong_corners else base
    sentences = []
    if box_format == base and shares > 0.9:
        text = (
            f"{shares:.0%} of the boxes lie within 0 to 1, which as pixels is a corner of one pixel; "
            f"if they are shares of the picture: --box-format {right_base}{NORMALISED}"
        )
        sentences.append((True, text))
    if box_format != base and np.median(largest_N) > 2:
        text = (
            f"the boxes are read as shares of the picture, but reach {largest_N.max():g}; "
            f"if they are pixels: --box-format {right_base}"
        )
        sentences.append((True, text))
    if is_wrong_corners:
        unit = NORMALISED if (box_format != base) != bool(sentences) else ""
        text = (
            f"{ends_early:.0%} of the boxes, read as x1, y1, x2, y2, end before they begin; "
            f"if they are x, y, width, height (centre first: cxcywh{unit}): --box-format xywh{unit}"
        )
        sentences.append((False, text))
    return sentences


def _too_far(xyxy_N4: Float64Array, base: str, size_hw: npt.NDArray[np.int64]) -> str | None:
    if base == "xyxy":
        return None
    known = (size_hw > 0).all(axis=1)
    beyond = any_of_row(xyxy_N4[known, 2:] > size_hw[known][:, ::-1] * 1.01)
    share = float(beyond.mean()) if len(beyond) else 0.0
    if share <= SUSPICIOUS_SHARE:
        return None
    return (
        f"{share:.0%} of the boxes, read as {base}, reach over the right or lower edge of their picture; "
        "if they are x1, y1, x2, y2: --box-format xyxy"
    )


def _wrong_frame(
    xyxy_N4: Float64Array,
    rules: BoxRules,
    upright_size_hw: npt.NDArray[np.int64],
    stored_size_hw: npt.NDArray[np.int64] | None,
) -> str | None:
    if stored_size_hw is None:
        return None
    is_upright = rules.box_frame == "upright"
    read, other = (upright_size_hw, stored_size_hw)[:: 1 if is_upright else -1]
    turned = any_of_row(upright_size_hw != stored_size_hw)
    outside = any_of_row(xyxy_N4[turned, 2:] > read[turned][:, ::-1] * 1.01)
    fits = ~any_of_row(xyxy_N4[turned, 2:] > other[turned][:, ::-1] * 1.01)
    share = float((outside & fits).mean()) if turned.any() else 0.0
    if share <= SUSPICIOUS_SHARE:
        return None
    if is_upright:
        return (
            f"{share:.0%} of the boxes on turned photographs fit the picture as stored, not upright; "
            "if the detector ignored EXIF: --box-frame stored"
        )
    return (
        f"{share:.0%} of the boxes on turned photographs fit the picture upright, not as stored; "
        "if the detector applied EXIF: --box-frame upright"
    )
