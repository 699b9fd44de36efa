"""Given boxes -> prompts in upright pixels: each box judged alone, none swapped, none lost.

A box is read in the job's format and frame, turned into the upright picture, and cut to it. One that
cannot be used keeps its place with the reason (a code of errors.BOX_CODES), and so does one that the job's
rules leave without a mask: too small, too low a score, too many, overlapping a better one.

Letters: N boxes of one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from hqlabel.model.rle import rle_faults
from hqlabel.pipeline.box_geometry import (
    PixelFormat,
    best_first,
    box_iou,
    boxes_to_xyxy,
    clip_boxes,
    denormalise_boxes,
    suppress,
)
from hqlabel.pipeline.image_result import ResolvedBoxes
from hqlabel.pipeline.job_context import BoxRules
from hqlabel.pipeline.settings import BoxFormat, BoxFrame

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

Codes = npt.NDArray[np.int8]

NORMALISED = "-normalised"
PROMPT_COLUMNS = ("points_xy", "point_labels", "prompt_mask")
"""Of a planned box, what it may have with or instead of its four numbers."""
MOST_POINTS = 256
"""Of one prompt. Each is a token that all of the picture attends to: on the demo model (input side 512, calls
of 16) 256 took 0.5 GiB more than one, 1,000 took 2, and 3,000 took 6."""


@dataclass(frozen=True, kw_only=True)
class _PictureFrame:
    """The picture that coordinates are measured in, and the orientation that makes it upright."""

    size_hw: tuple[int, int]
    orientation: int
    upright_size_hw: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class _Extra:
    """The points and the mask of one prompt; `sound`: they can be used."""

    points_xy: npt.NDArray[np.float32] | None = None
    point_labels: npt.NDArray[np.int32] | None = None
    mask: str | None = None
    sound: bool = True

    @property
    def is_prompt(self) -> bool:
        return self.points_xy is not None or self.mask is not None


def resolve_boxes(
    boxes: Sequence[Mapping[str, Any]],
    rules: BoxRules,
    *,
    upright_size_hw: tuple[int, int],
    stored_size_hw: tuple[int, int] | None = None,
    orientation: int | None = None,
) -> ResolvedBoxes:
    """Return the prompts of one image from its planned boxes (the `boxes` of a row of schema.PLAN).

    `orientation`: EXIF, 1 to 8, None for a picture without; `stored_size_hw`: before it is applied. Both
    matter only for boxes in the stored frame.

    Raises:
        ValueError: an orientation that does not exist, or sizes that do not belong to it.
    """
    frame = _frame(rules.box_frame, upright_size_hw, stored_size_hw, orientation)
    given = [box.get("given") for box in boxes]
    has_box = np.array([box is not None for box in given], dtype=np.bool_)
    prompt_N4, clipped, codes = _judge(given, rules.box_format, frame)
    faults = prompt_faults(boxes)
    extras = [_extra(box, fault, frame) for box, fault in zip(boxes, faults, strict=True)]
    without = ~has_box & np.array([extra.is_prompt or not extra.sound for extra in extras], dtype=np.bool_)
    codes[without] = 0
    _mark(codes, np.array([not extra.sound for extra in extras], dtype=np.bool_), "prompt_invalid")
    error = [_CODES[code] for code in codes.tolist()]
    _skip_by_rules(boxes, prompt_N4, has_box, rules, error)
    usable = np.array([reason is None for reason in error], dtype=np.bool_)
    region = (codes == 0) & np.array([reason == "crowd" for reason in error], dtype=np.bool_)
    is_kept = (usable | region) & has_box
    if rules.expand:
        expanded_N4 = _expanded(prompt_N4, rules.expand, upright_size_hw)
        prompt_N4 = np.where(region[:, None], prompt_N4, expanded_N4)
    return ResolvedBoxes(
        prompt_xyxy=np.where(is_kept[:, None], prompt_N4, np.float32("nan")).astype(np.float32),
        usable=usable,
        error=tuple(error),
        flags=tuple(("box_clipped",) if cut else () for cut in (is_kept & clipped).tolist()),
        points_xy=tuple(extra.points_xy for extra in extras),
        point_labels=tuple(extra.point_labels for extra in extras),
        prompt_mask=tuple(extra.mask for extra in extras),
    )


# 0 is a usable box; the first reason that holds is the one that is kept.
_CODES = (
    None,
    "box_malformed",
    "box_not_finite",
    "box_inverted",
    "box_empty",
    "box_outside",
    "prompt_invalid",
)


def _mark(codes: Codes, where: BoolArray, code: str) -> None:
    codes[where & (codes == 0)] = _CODES.index(code)


def any_of_row(where_NK: BoolArray) -> BoolArray:
    """Return True for the rows that have a True; bool (N,)."""
    return np.asarray(where_NK.any(axis=1))


def _judge(
    given: Sequence[Sequence[float | None] | None], box_format: BoxFormat, frame: _PictureFrame
) -> tuple[npt.NDArray[np.float32], BoolArray, Codes]:
    """Return boxes (N, 4) in the upright picture, whether each was cut to it, and each one's code."""
    sound = np.array([box is not None and len(box) == 4 and None not in box for box in given], dtype=np.bool_)
    given_N4 = np.full((len(given), 4), np.nan)
    given_N4[sound] = np.array([box for box, good in zip(given, sound, strict=True) if good]).reshape(-1, 4)
    codes = np.zeros(len(given), dtype=np.int8)
    _mark(codes, ~sound, "box_malformed")
    with np.errstate(over="ignore", invalid="ignore"):
        xyxy_N4 = _in_frame(given_N4, box_format, frame.size_hw)
        turned_N4 = _turn_boxes(xyxy_N4, frame)
        inside_N4 = clip_boxes(turned_N4, frame.upright_size_hw) + 0.0  # -0.0 becomes 0.0
    prompt_N4 = inside_N4.astype(np.float32)
    broken = any_of_row(~np.isfinite(given_N4) | np.isnan(xyxy_N4))
    _mark(codes, broken, "box_not_finite")
    _mark(codes, any_of_row(xyxy_N4[:, 2:] < xyxy_N4[:, :2]), "box_inverted")
    _mark(codes, any_of_row(xyxy_N4[:, 2:] == xyxy_N4[:, :2]), "box_empty")
    _mark(codes, any_of_row(inside_N4[:, 2:] <= inside_N4[:, :2]), "box_outside")
    _mark(codes, any_of_row(prompt_N4[:, 2:] <= prompt_N4[:, :2]), "box_empty")  # not in float32
    return prompt_N4, any_of_row(inside_N4 != turned_N4), codes


def _expanded(
    prompt_N4: npt.NDArray[np.float32], share: float, size_hw: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Return boxes with each side moved out by a share of the box's width or height, inside the picture."""
    margin = share * (prompt_N4[:, 2:] - prompt_N4[:, :2]).astype(np.float64)
    wide_N4 = np.concatenate([prompt_N4[:, :2] - margin, prompt_N4[:, 2:] + margin], axis=1)
    return clip_boxes(wide_N4, size_hw).astype(np.float32)


def _in_frame(given_N4: Float64Array, box_format: BoxFormat, size_hw: tuple[int, int]) -> Float64Array:
    """Return boxes as given as xyxy in pixels of the frame they were given in."""
    if box_format.endswith(NORMALISED):
        given_N4 = denormalise_boxes(given_N4, size_hw)
    return boxes_to_xyxy(given_N4, cast(PixelFormat, box_format.removesuffix(NORMALISED)))


def _frame(
    box_frame: BoxFrame,
    upright_size_hw: tuple[int, int],
    stored_size_hw: tuple[int, int] | None,
    orientation: int | None,
) -> _PictureFrame:
    turn = 1 if orientation is None else orientation
    if turn not in range(1, 9):
        raise ValueError(f"EXIF orientation {orientation} does not exist; wanted 1 to 8 or None")
    if box_frame == "upright":
        return _PictureFrame(size_hw=upright_size_hw, orientation=1, upright_size_hw=upright_size_hw)
    height, width = upright_size_hw
    stored = (width, height) if turn >= 5 else (height, width)
    if stored_size_hw is not None and stored_size_hw != stored:
        raise ValueError(
            f"a picture of upright size {upright_size_hw} and EXIF orientation {turn} is stored as {stored}, "
            f"not {stored_size_hw}"
        )
    return _PictureFrame(size_hw=stored, orientation=turn, upright_size_hw=upright_size_hw)


def _turn_boxes(xyxy_N4: Float64Array, frame: _PictureFrame) -> Float64Array:
    """Return boxes of the frame in the upright picture, each with its corners in order again."""
    if frame.orientation == 1:
        return xyxy_N4
    corners = _turn_points(xyxy_N4.reshape(-1, 2), frame).reshape(-1, 2, 2)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def _turn_points(points_xy: Float64Array, frame: _PictureFrame) -> Float64Array:
    """Return points (P, 2) of the frame in the upright picture.

    EXIF 2.32, tag 0x0112: 2 mirrored left to right, 3 upside down, 4 mirrored top to bottom, 6 and 8 to be
    turned clockwise and anticlockwise by a quarter, 5 and 7 the same mirrored.
    """
    height, width = frame.size_hw
    x, y = points_xy[:, 0], points_xy[:, 1]
    across, down = width - x, height - y
    turned = {
        1: (x, y),
        2: (across, y),
        3: (across, down),
        4: (x, down),
        5: (y, x),
        6: (down, x),
        7: (down, across),
        8: (y, across),
    }[frame.orientation]
    return np.stack(turned, axis=1)


def prompt_faults(boxes: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Return what is wrong with the points or the mask of each box, as text; None where nothing is.

    Only what is known without the picture: planning counts these, and each gets no mask (`prompt_invalid`).
    Nothing is raised, whatever the values are.
    """
    faults = [_points_fault(box.get("points_xy") or [], box.get("point_labels") or []) for box in boxes]
    masks = [(place, box["prompt_mask"]) for place, box in enumerate(boxes) if box.get("prompt_mask")]
    mask_faults = rle_faults([mask["counts"] for _, mask in masks], [mask["size"] for _, mask in masks])
    for (place, _), fault in zip(masks, mask_faults, strict=True):
        if fault is not None and faults[place] is None:
            mask = boxes[place]["prompt_mask"]
            is_mask = mask["size"] and mask["counts"]  # else it was read from something else
            faults[place] = f"its mask: {fault}" if is_mask else _NO_MASK
    return faults


_NO_MASK = (
    'its mask is not {"size": [height, width], "counts": ...} with the text or whole numbers of COCO\'s runs'
)


def _points_fault(flat: Sequence[float | None], labels: Sequence[int | None]) -> str | None:
    if len(flat) != 2 * len(labels):
        if len(flat) % 2:  # so reading a table leaves a point that is not two numbers
            return "a point that is not two numbers"
        return f"{len(flat)} coordinates for {len(labels)} point labels; wanted two for each"
    if len(labels) > MOST_POINTS:
        return f"{len(labels)} points; wanted at most {MOST_POINTS}"
    if not all(label in (1, 0, -1) for label in labels):
        return "a point label that is not 1, 0 or -1"
    if None in flat or not np.isfinite(np.array(flat, np.float64).reshape(-1, 2)[_is_point(labels)]).all():
        return "a point that is not two finite numbers"
    return None


def _is_point(labels: Sequence[int | None]) -> BoolArray:
    """Return which points are points: those labelled -1 are padding, and lie nowhere."""
    return np.array([label != -1 for label in labels], dtype=np.bool_)


def _extra(box: Mapping[str, Any], fault: str | None, frame: _PictureFrame) -> _Extra:
    """Return the points and the mask of a box's prompt, in the upright picture."""
    if fault is not None:
        return _Extra(sound=False)
    flat, labels, mask = box.get("points_xy"), box.get("point_labels"), box.get("prompt_mask")
    # A mask in another frame would have to be turned by its pixels; only upright ones are taken.
    fits = not mask or (tuple(mask["size"]) == frame.upright_size_hw and frame.orientation == 1)
    points = _turn_points(np.array(flat or [], dtype=np.float64).reshape(-1, 2), frame)
    is_point = _is_point(labels or [])
    height, width = frame.upright_size_hw
    inside = ((points >= 0) & (points <= [width, height])).all(axis=1)
    if not fits or not np.asarray(inside)[is_point].all():
        return _Extra(sound=False)
    return _Extra(
        points_xy=np.where(is_point[:, None], points, 0).astype(np.float32) if labels else None,
        point_labels=np.array(labels, dtype=np.int32) if labels else None,
        mask=mask["counts"] if mask else None,
    )


# ---------------------------------------------------------------------------------------------
# Boxes that the job's rules leave without a mask
# ---------------------------------------------------------------------------------------------


def _skip_by_rules(
    boxes: Sequence[Mapping[str, Any]],
    prompt_N4: npt.NDArray[np.float32],
    has_box: BoolArray,
    rules: BoxRules,
    error: list[str | None],
) -> None:
    """Write into `error` the reason of each box that a rule of the job skips.

    In this order: a crowd (whatever else is wrong with its box), too small, score too low, over `top_k`,
    `nms:<row of the better box>`. A rule sees only the boxes that the ones before it left usable. Better
    is the higher score (none last), then the earlier row.
    """
    scores = np.array([box.get("score") for box in boxes], dtype=np.float64)  # NaN for none
    scores[~np.isfinite(scores)] = np.nan

    def usable() -> npt.NDArray[np.int64]:
        return np.flatnonzero([reason is None for reason in error])

    def skip(rows: npt.NDArray[np.int64], reason: str) -> None:
        for row in rows.tolist():
            error[row] = reason

    def ranked(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return rows[best_first(scores[rows])]

    def iou(winner: int, rivals: npt.NDArray[np.int64]) -> Float64Array:
        return box_iou(prompt_N4[winner : winner + 1], prompt_N4[rivals])

    skip(np.flatnonzero([bool(box.get("iscrowd")) for box in boxes]), "crowd")
    if rules.min_side_px:
        sides = np.where(has_box, (prompt_N4[:, 2:] - prompt_N4[:, :2]).min(axis=1), np.inf)
        skip(usable()[sides[usable()] < rules.min_side_px], "box_small")
    if rules.min_score is not None:
        skip(usable()[scores[usable()] < rules.min_score], "box_score")  # NaN, no score, is below nothing
    if rules.top_k is not None:
        skip(ranked(usable())[rules.top_k :], "box_rank")
    if rules.nms_mode != "none":
        kinds: list[Any] = [None] * len(boxes)
        if rules.nms_mode == "class":
            kinds = [(box.get("category_id"), box.get("category_name")) for box in boxes]
        rows = usable()[has_box[usable()]]
        for loser, winner in suppress(ranked(rows), kinds, iou, rules.nms_iou):
            error[loser] = f"nms:{winner}"
