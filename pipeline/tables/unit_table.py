"""The outcome of every image of a unit -> one Arrow table, schema.UNIT: rows in = rows out.

Nothing is decided here but names: an image is `labelled`, `no_boxes` or `failed` by what its
`ImageResult` holds, and every given box gets its row, with a mask or with the reason why not.
Columns are built whole, image after image, because a dict for each of thousands of boxes is slow.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hqlabel.model.records import Instances
from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import BOX_CODES, SKIP_CODES, box_code, clean_text, stage_of
from hqlabel.pipeline.image_result import ImageResult, ResolvedBoxes
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.storage.request_retries import shown_uri
from hqlabel.pipeline.tables.mask_quality import MaskQuality, measure, order_flags

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """How an image ended, and its masks when it ended well.

    `instances`: its masks, one for each of `rows`, places among the given boxes; `lost`: places of the usable
    boxes for which the model gave no finite numbers.
    """

    status: str
    code: str | None = None
    message: str | None = None
    instances: Instances | None = None
    rows: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    lost: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))


def build_unit_table(
    results: Sequence[ImageResult], context: JobContext, *, processed_at: dt.datetime | None = None
) -> pa.Table:
    """Return the unit's table, schema.UNIT, one row a result in the order given; measures every mask.

    Raises:
        ValueError: a result that contradicts itself, such as masks for other boxes than the usable
            ones. That is a bug, not a bad image.
    """
    now = processed_at or dt.datetime.now(dt.UTC)
    outcomes = [_outcome(result) for result in results]
    columns = _image_columns(results, outcomes, context.run_id, now)
    measured = _measured(results, outcomes)
    per_image = [_instance_columns(*one) for one in zip(results, outcomes, measured, strict=True)]
    offsets = np.cumsum([0, *(len(one["instance_index"]) for one in per_image)])
    kind = schema.UNIT.field("instances").type
    values = _struct_array(per_image)
    columns["instances"] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=kind)
    return pa.Table.from_arrays([columns[name] for name in schema.UNIT.names], schema=schema.UNIT)


def _outcome(result: ImageResult) -> _Outcome:
    planned = result.planned
    boxes = planned["boxes"]
    if planned["error_code"] is not None:
        return _failed(planned["error_code"], _naming_uri(planned))
    if result.error_code is not None:
        return _failed(result.error_code, result.error_message)
    if boxes is None:
        return _failed("boxes_missing", "the box list of this image is null")
    if not boxes:
        return _Outcome(status="no_boxes")
    if result.boxes is None:
        raise ValueError(
            f"{planned['image_id']!a}: neither an error nor resolved boxes; {len(boxes)} were given"
        )
    usable = int(np.count_nonzero(result.boxes.usable))
    if not usable:
        if any(box_code(reason) in SKIP_CODES for reason in result.boxes.error if reason):
            return _Outcome(status="no_boxes")  # nothing is wrong: the job's rules want no mask here
        return _failed("no_usable_box", _reasons(result.boxes.error))
    return _outcome_of_masks(result, usable)


def _naming_uri(planned: Mapping[str, Any]) -> str:
    """Return the message of a fault that planning found; of a refused uri, with that uri."""
    message = str(planned["error_message"])
    return (
        f"{shown_uri(planned['image_uri'])}: {message}" if planned["error_code"] == "uri_refused" else message
    )


def _outcome_of_masks(result: ImageResult, usable: int) -> _Outcome:
    instances = result.instances
    if instances is None or len(instances.counts) != usable:
        masks = "none" if instances is None else len(instances.counts)
        raise ValueError(f"{result.planned['image_id']!a}: {usable} usable boxes, masks: {masks}")
    assert result.boxes is not None, "the caller has checked"
    rows = np.flatnonzero(result.boxes.usable)
    sound = np.isfinite(np.stack([instances.predicted_iou, instances.stability_score])).all(axis=0)
    if not sound.any():
        return _failed("non_finite", f"the model's numbers are NaN or infinite for all {usable} usable boxes")
    return _Outcome(status="labelled", instances=_only(instances, sound), rows=rows[sound], lost=rows[~sound])


def _only(instances: Instances, sound: BoolArray) -> Instances:
    """Return some of the masks of an image."""
    if sound.all():
        return instances
    return replace(
        instances,
        counts=tuple(text for text, good in zip(instances.counts, sound, strict=True) if good),
        area=np.asarray(instances.area)[sound],
        bbox_xywh=np.asarray(instances.bbox_xywh)[sound],
        predicted_iou=instances.predicted_iou[sound],
        stability_score=instances.stability_score[sound],
    )


def _measured(results: Sequence[ImageResult], outcomes: Sequence[_Outcome]) -> list[MaskQuality]:
    """Return the quality of each image's masks, none where it has none; all of the unit are read together."""
    instances = [outcome.instances for outcome in outcomes]
    prompts = [
        result.boxes.prompt_xyxy[outcome.rows]
        for result, outcome in zip(results, outcomes, strict=True)
        if outcome.instances is not None and result.boxes is not None
    ]
    of_all = measure([masks for masks in instances if masks is not None], prompts)
    ends = np.cumsum([0, *(0 if masks is None else len(masks.counts) for masks in instances)]).tolist()
    return [of_all.of(slice(start, end)) for start, end in itertools.pairwise(ends)]


def _failed(code: str, message: str | None) -> _Outcome:
    return _Outcome(status="failed", code=code, message=clean_text(message or code))


def _reasons(errors: Sequence[str | None]) -> str:
    counted = Counter(error for error in errors if error)
    return f"{len(errors)} boxes: " + ", ".join(f"{n} {code}" for code, n in sorted(counted.items()))


def _image_columns(
    results: Sequence[ImageResult], outcomes: Sequence[_Outcome], run_id: str, now: dt.datetime
) -> dict[str, pa.Array]:
    sizes = [result.size_hw or (None, None) for result in results]
    stored = [result.stored_size_hw or (None, None) for result in results]
    lists: dict[str, list[Any]] = {
        **{name: [getattr(r, name) for r in results] for name in _OF_RESULT},
        **{name: [r.planned[name] for r in results] for name in ("image_id", "image_uri", "unit_id")},
        "height": [size[0] for size in sizes],
        "width": [size[1] for size in sizes],
        "orig_height": [size[0] for size in stored],
        "orig_width": [size[1] for size in stored],
        "status": [o.status for o in outcomes],
        "error_stage": [o.code and stage_of(o.code) for o in outcomes],
        "error_code": [o.code for o in outcomes],
        "error_message": [o.message for o in outcomes],
        "run_id": [run_id] * len(results),
        "processed_at": [now] * len(results),
    }
    return {name: pa.array(values, schema.UNIT.field(name).type) for name, values in lists.items()}


_OF_RESULT = {f.name for f in fields(ImageResult)} & set(schema.UNIT.names) - {"instances"}
"""Columns that a field of `ImageResult` fills as it is, unless something else here does."""


def _instance_columns(result: ImageResult, outcome: _Outcome, measured: MaskQuality) -> dict[str, Any]:
    """Return every column of schema.UNIT_INSTANCE for one image; arrays (n,) with NaN for null, or lists."""
    given = result.planned["boxes"] or []
    columns: dict[str, Any] = {
        "instance_index": np.arange(len(given), dtype=np.float64),
        "prompt_bbox_given": [box["given"] for box in given],
        **{name: [box[name] for box in given] for name in ("box_id", "category_id", "category_name")},
    }
    scores, bad_score = _scores(given)
    columns["detector_score"] = scores
    columns["prompt_bbox"] = _prompt_xywh(result.boxes, len(given))
    columns["box_error"] = _box_errors(result.boxes, outcome, len(given))
    flags = [["score_not_finite"] if bad else [] for bad in bad_score]
    if result.boxes is not None:
        flags = [[*mine, *theirs] for mine, theirs in zip(flags, result.boxes.flags, strict=True)]
    columns |= _mask_columns(outcome, measured, flags)
    return columns


def _scores(given: Sequence[Mapping[str, Any]]) -> tuple[Float64Array, npt.NDArray[np.bool_]]:
    """Return detector scores with NaN for null, and where one was given that is no float32 number."""
    raw = [box["score"] for box in given]
    with np.errstate(over="ignore"):
        scores = np.array([np.nan if s is None else s for s in raw], dtype=np.float64).astype(np.float32)
    bad = np.array([s is not None for s in raw], dtype=np.bool_) & ~np.isfinite(scores)
    return np.where(np.isfinite(scores), scores, np.nan).astype(np.float64), bad


def _prompt_xywh(boxes: ResolvedBoxes | None, count: int) -> Float64Array:
    if boxes is None:
        return np.full((count, 4), np.nan)
    xyxy = np.asarray(boxes.prompt_xyxy, dtype=np.float64).reshape(count, 4)
    return np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1)


def _box_errors(boxes: ResolvedBoxes | None, outcome: _Outcome, count: int) -> list[str | None]:
    """Return each box's own reason first; `image_failed` where the image is to blame; None with a mask."""
    lost = set(outcome.lost.tolist())
    own: Sequence[str | None] = [None] * count if boxes is None else boxes.error
    unknown = {box_code(code) for code in own if code} - set(BOX_CODES)
    if unknown:
        raise ValueError(f"unknown box error codes {sorted(unknown)}; add them to pipeline/errors.py")
    rest = "image_failed" if outcome.status == "failed" else None
    return [code or ("non_finite" if row in lost else rest) for row, code in enumerate(own)]


def _mask_columns(
    outcome: _Outcome,
    measured: MaskQuality,
    flags: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """Return the columns of the masks, spread over the given boxes; null where a box has none."""
    count, instances, rows = len(flags), outcome.instances, outcome.rows
    if instances is None:
        nulls = {name: np.full(count, np.nan) for name in _MASK_NUMBERS}
        nothing: dict[str, Any] = {"bbox": np.full((count, 4), np.nan), "segmentation": [None] * count}
        return nothing | nulls | {"qc_flags": [order_flags(names) for names in flags]}
    area = np.asarray(instances.area, dtype=np.float64)
    tight = np.where(area[:, None] > 0, np.asarray(instances.bbox_xywh, dtype=np.float64), np.nan)
    numbers = {
        "area": area,
        "predicted_iou": instances.predicted_iou,
        "stability_score": instances.stability_score,
        "box_iou": measured.box_iou,
        "mask_in_box": measured.mask_in_box,
        "num_components": measured.num_components,
        "touches_border": measured.touches_border,
    }
    columns: dict[str, Any] = {name: _spread(values, rows, count) for name, values in numbers.items()}
    columns["bbox"] = _spread(tight, rows, count)
    counts: list[str | None] = [None] * count
    all_flags = [list(names) for names in flags]
    for place, row in enumerate(rows):
        counts[row] = instances.counts[place]
        all_flags[row] += [*measured.flags[place], *instances.flags]
    height, width = instances.size_hw
    columns["segmentation"] = [c and {"size": [height, width], "counts": c} for c in counts]
    columns["qc_flags"] = [order_flags(names) for names in all_flags]
    return columns


_MASK_NUMBERS = (
    *("area", "predicted_iou", "stability_score", "box_iou", "mask_in_box"),
    *("num_components", "touches_border"),
)


def _spread(values: Any, rows: Int64Array, count: int) -> Float64Array:
    """Return `values` (M, ...) at their rows of (count, ...), NaN elsewhere."""
    values = np.asarray(values, dtype=np.float64)
    full = np.full((count, *values.shape[1:]), np.nan)
    full[rows] = values
    return full


def _struct_array(per_image: Sequence[Mapping[str, Any]]) -> pa.StructArray:
    arrays = []
    for column in schema.UNIT_INSTANCE:
        parts = [one[column.name] for one in per_image]
        if pa.types.is_fixed_size_list(column.type):
            # (n, 4) boxes of float32; a row with NaN is null, and zero below the null
            boxes = np.concatenate([np.zeros((0, 4)), *parts])
            missing = np.isnan(boxes).any(axis=1)
            values = pa.array(np.where(missing[:, None], 0, boxes).astype(np.float32).reshape(-1))
            mask = pa.array(missing)
            arrays.append(pa.FixedSizeListArray.from_arrays(values, type=column.type, mask=mask))
        elif parts and isinstance(parts[0], np.ndarray):
            # float64 holds every int of these columns exactly; NaN becomes null
            numbers = pa.array(np.concatenate(parts), pa.float64(), from_pandas=True)
            arrays.append(numbers.cast(column.type))
        else:
            arrays.append(pa.array([value for part in parts for value in part], column.type))
    return pa.StructArray.from_arrays(arrays, fields=list(schema.UNIT_INSTANCE))
