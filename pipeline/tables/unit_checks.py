"""What must hold of a unit's table: checked before it is written, and again by `hqlabel validate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pycocotools import mask as coco_mask

from hqlabel.model import rle
from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import BOX_CODES, IMAGE_CODES, SKIP_CODES, box_code


def check_against_plan(table: pa.Table, planned: pa.Table, *, detected: bool = False) -> None:
    """Raise ValueError unless the unit's table is sound and answers its plan rows.

    `detected`: the boxes are a detector's, and the plan does not know how many. The table was built by this
    process, so a fault is a bug here, and nothing must be committed.
    """
    faults = [*plan_faults(table, planned, detected=detected), *find_faults(table)]
    if faults:
        unit = planned["unit_id"][0].as_py() if planned.num_rows else "?"
        raise ValueError(f"unit {unit} is not fit to be committed: {'; '.join(faults[:5])}")


def plan_faults(table: pa.Table, planned: pa.Table, *, detected: bool = False) -> list[str]:
    """Return how a unit's table differs from its plan: count, order, ids, uris, boxes unless `detected`."""
    if table.num_rows != planned.num_rows:
        return [f"{table.num_rows} rows, planned {planned.num_rows}"]
    faults = []
    for name in ("image_id", "image_uri", "unit_id"):
        pairs = zip(table[name].to_pylist(), planned[name].to_pylist(), strict=True)
        faults += [f"{name} {one!a}, planned {plan!a}" for one, plan in pairs if one != plan][:3]
    if detected:
        return faults
    boxes = pc.list_value_length(table["instances"]).to_pylist()
    planned_boxes = pc.fill_null(pc.list_value_length(planned["boxes"]), 0).to_pylist()
    for image_id, count, plan in zip(table["image_id"].to_pylist(), boxes, planned_boxes, strict=True):
        if count != plan:
            faults.append(f"{image_id!a}: {count} boxes, planned {plan}")
    return faults


def find_faults(table: pa.Table, *, check_masks: bool = True) -> list[str]:
    """Return everything that is wrong with a unit's table by itself, as sentences; empty when it is sound.

    `check_masks`: read every run-length string, which costs about 0.1 ms a mask.
    """
    if not table.schema.equals(schema.UNIT, check_metadata=False):
        return [f"the columns are not those of schema.UNIT: {table.schema.names}"]
    faults = list(_value_faults(table))
    if faults:
        return faults
    rows = table.to_pylist()
    problems = [[*_status_faults(row), *_instance_faults(row)] for row in rows]
    if check_masks:
        sound = [place for place, faulty in enumerate(problems) if not faulty]
        for place, fault in _mask_faults(rows, sound):
            problems[place].append(fault)
    for row, of_row in zip(rows, problems, strict=True):
        faults += [f"{row['image_id']!a}: {problem}" for problem in of_row]
    return faults


def _leaves(name: str, array: pa.Array) -> Iterator[tuple[str, pa.Field, pa.Array]]:
    """Yield every child array of a nested one with its field; only values that are present."""
    kind = array.type
    if pa.types.is_struct(kind):
        for field, child in zip(kind, array.flatten(), strict=True):
            present = child.filter(array.is_valid())
            yield f"{name}.{field.name}", field, present
            yield from _leaves(f"{name}.{field.name}", present)
    elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        yield f"{name}[]", kind.value_field, array.flatten()
        yield from _leaves(f"{name}[]", array.flatten())


def _all_columns(table: pa.Table) -> Iterator[tuple[str, pa.Field, pa.Array]]:
    for field in table.schema:
        array = table[field.name].combine_chunks()
        yield field.name, field, array
        yield from _leaves(field.name, array)


def _value_faults(table: pa.Table) -> Iterator[str]:
    """Yield nulls where the schema allows none, and NaN and infinity anywhere but in the boxes as given."""
    for name, field, array in _all_columns(table):
        if not field.nullable and array.null_count:  # Arrow itself does not check
            yield f"{name} has {array.null_count} nulls, and may have none"
        if pa.types.is_floating(array.type) and "prompt_bbox_given" not in name:
            bad = len(array) - array.null_count - (pc.sum(pc.is_finite(array)).as_py() or 0)
            if bad:
                yield f"{name} has {bad} values that are NaN or infinite"


def _status_faults(row: Mapping[str, Any]) -> Iterator[str]:
    status, code = row["status"], row["error_code"]
    if status not in schema.STATUSES:
        yield f"unknown status {status!r}"
    if (status == "failed") != (code is not None):
        yield f"status {status} with error code {code}"
    if code is not None and code not in IMAGE_CODES:
        yield f"unknown error code {code!r}"
    masks = sum(instance["segmentation"] is not None for instance in row["instances"])
    if (status == "labelled") != (masks > 0):
        yield f"status {status} with {masks} masks"
    codes = {box_code(one["box_error"]) for one in row["instances"] if one["box_error"]}
    if status == "no_boxes" and row["instances"] and codes.isdisjoint(SKIP_CODES):
        yield f"status no_boxes with {len(row['instances'])} boxes"
    if status == "labelled" and None in (row["width"], row["height"]):
        yield "labelled without a size"


def _instance_faults(row: Mapping[str, Any]) -> Iterator[str]:
    for place, instance in enumerate(row["instances"]):
        error = instance["box_error"]
        if instance["instance_index"] != place:
            yield f"instance_index {instance['instance_index']} at place {place}"
        if (error is None) != (instance["segmentation"] is not None):
            yield f"instance {place}: mask and box_error {error} exclude each other"
        if error is not None and box_code(error) not in BOX_CODES:
            yield f"instance {place}: unknown box_error {error!r}"
        if instance["segmentation"] is None:
            continue
        missing = [n for n in ("area", "predicted_iou", "stability_score") if instance[n] is None]
        if missing:
            yield f"instance {place}: a mask without {', '.join(missing)}"
        if (instance["area"] == 0) != (instance["bbox"] is None):
            yield f"instance {place}: area {instance['area']} with bbox {instance['bbox']}"


def _mask_faults(rows: Sequence[Mapping[str, Any]], places: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield the masks whose string, size, area and box do not agree: the row's place and what is wrong.

    Judged by pycocotools and by rle.py, all masks together.
    """
    masks = []
    for place in places:
        row = rows[place]
        size = [row["height"], row["width"]]
        mine = [one for one in row["instances"] if one["segmentation"] is not None]
        odd = next((one for one in mine if one["segmentation"]["size"] != size), None)
        if odd is None:
            masks += [(place, one) for one in mine]
        else:
            index, mask_size = odd["instance_index"], odd["segmentation"]["size"]
            yield place, f"instance {index}: mask of size {mask_size}, image of {size}"
    for step in rle.batches([one["segmentation"]["counts"] for _, one in masks]):
        yield from _run_faults(masks[step])


def _run_faults(masks: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[int, str]]:
    rles = [one["segmentation"] for _, one in masks]
    try:
        rle.parse_strips([rle["counts"] for rle in rles], [rle["size"] for rle in rles])
        areas, boxes = coco_mask.area(rles), coco_mask.toBbox(rles)
    except ValueError as error:
        if len(masks) > 1:  # one by one, to name it
            for one in masks:
                yield from _run_faults([one])
        else:
            [(place, instance)] = masks
            reason = str(error).removeprefix("mask 0: ")
            yield place, f"instance {instance['instance_index']}: {reason}"
        return
    for (place, instance), area, box in zip(masks, areas, boxes, strict=True):
        name = f"instance {instance['instance_index']}"
        if instance["area"] != area:
            yield place, f"{name}: area {instance['area']}, the mask has {area}"
        if instance["bbox"] is not None and not np.array_equal(np.float32(instance["bbox"]), np.float32(box)):
            yield place, f"{name}: bbox {instance['bbox']}, the mask has {box.tolist()}"
