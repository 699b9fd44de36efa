"""Every Arrow schema that is written or crosses a Ray stage, and the version they carry.

One place for a column: its type and null rule here, the record that fills it in `units.py`
(working truth) and `publish.py` (published tables), its meaning in docs/schema.md. Plain signed
types only: no unsigned, half, nanosecond or Arrow-dictionary types, because Spark, BigQuery and
Trino each trip over one of them.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1
"""Moves when a published column changes; part of a job's identity."""

STATUSES = ("labelled", "no_boxes", "failed")

_BOX = pa.list_(pa.field("element", pa.float32(), nullable=False), 4)
_RLE = pa.struct(
    [
        pa.field("size", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("counts", pa.string(), nullable=False),
    ]
)
_STRINGS = pa.list_(pa.field("element", pa.string(), nullable=False))
_DOUBLES = pa.list_(pa.field("element", pa.float64()))


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


# One box as the input gave it. `given` is untouched: wrong length, nulls, NaN and all.
PLAN_BOX = pa.struct(
    [
        pa.field("given", _DOUBLES),
        pa.field("box_id", pa.string()),
        pa.field("category_id", pa.int32()),
        pa.field("category_name", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("points_xy", _DOUBLES),  # x, y, x, y, ...
        pa.field("point_labels", pa.list_(pa.field("element", pa.int32()))),
        pa.field("prompt_mask", _RLE),
        pa.field("iscrowd", pa.bool_()),  # true for a region of many objects; else null, never false
    ]
)

# One planned image; units are runs of `images_per_unit` rows, one Parquet row group each.
# boxes: null = the input's list was null (failed, boxes_missing); empty = no boxes.
PLAN = pa.schema(
    [
        _required("unit_id", pa.int32()),
        _required("image_id", pa.string()),
        _required("image_uri", pa.string()),
        pa.field("boxes", pa.list_(pa.field("element", PLAN_BOX, nullable=False))),
        pa.field("error_code", pa.string()),  # found while planning, for example labels_mismatch
        pa.field("error_message", pa.string()),
    ]
)

_PROMPT_COLUMNS = [
    _required("instance_index", pa.int32()),
    pa.field("box_id", pa.string()),
]
_CATEGORY_COLUMNS = [
    pa.field("category_id", pa.int32()),
    pa.field("category_name", pa.string()),
    pa.field("prompt_bbox_given", _DOUBLES),
    pa.field("prompt_bbox", _BOX),
]
_MASK_COLUMNS = [
    pa.field("bbox", _BOX),
    pa.field("segmentation", _RLE),
    pa.field("area", pa.int64()),
    pa.field("detector_score", pa.float32()),
    pa.field("predicted_iou", pa.float32()),
    pa.field("stability_score", pa.float32()),
    pa.field("box_iou", pa.float32()),
    pa.field("mask_in_box", pa.float32()),
    pa.field("num_components", pa.int32()),
    pa.field("touches_border", pa.bool_()),
    _required("qc_flags", _STRINGS),
]

# One instance inside a unit row. `box_error` is one of errors.BOX_CODES, or null.
UNIT_INSTANCE = pa.struct(
    [*_PROMPT_COLUMNS, *_CATEGORY_COLUMNS, *_MASK_COLUMNS, pa.field("box_error", pa.string())]
)

_IMAGE_KEY = [
    _required("image_id", pa.string()),
    _required("image_uri", pa.string()),
    _required("status", pa.string()),
]
_IMAGE_FRAME = [
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("orig_width", pa.int32()),
    pa.field("orig_height", pa.int32()),
    pa.field("exif_orientation", pa.int32()),
]
_IMAGE_REST = [
    pa.field("source_bytes", pa.int64()),
    pa.field("source_etag", pa.string()),
    pa.field("error_stage", pa.string()),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
    _required("attempts", pa.int32()),
    pa.field("fetch_ms", pa.float32()),
    pa.field("decode_ms", pa.float32()),
    pa.field("detect_ms", pa.float32()),
    pa.field("segment_ms", pa.float32()),
    _required("unit_id", pa.int32()),
    _required("run_id", pa.string()),
    _required("processed_at", pa.timestamp("us", tz="UTC")),
]

# The working truth, units/<unit>.g<generation>.parquet: one row an image, instances nested.
UNIT = pa.schema(
    [
        *_IMAGE_KEY,
        *_IMAGE_FRAME,
        *_IMAGE_REST,
        _required("instances", pa.list_(pa.field("element", UNIT_INSTANCE, nullable=False))),
    ]
)

# Published: one row per box given, always.
INSTANCES = pa.schema(
    [
        _required("image_id", pa.string()),
        *_PROMPT_COLUMNS,
        _required("image_uri", pa.string()),
        *_CATEGORY_COLUMNS,
        *_MASK_COLUMNS,
        _required("accepted", pa.bool_()),
        pa.field("reject_reason", pa.string()),
        _required("run_id", pa.string()),
    ]
)

# Published: one row per image, always.
IMAGES = pa.schema(
    [
        *_IMAGE_KEY,
        *_IMAGE_FRAME,
        _required("num_boxes", pa.int32()),
        _required("num_instances", pa.int32()),
        _required("num_accepted", pa.int32()),
        *_IMAGE_REST,
    ]
)
