"""Every Arrow schema that is written, and the version they carry.

One place for a column: its type, null rule and hints here, the field of `unit.ImageResult` that fills it, its
meaning in docs/schema.md. Plain signed types only: no unsigned, half, nanosecond or Arrow-dictionary types,
because Spark, BigQuery and Trino each trip over one of them.
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = 1
"""Moves when a published column changes; part of a job's identity."""

STATUSES = ("labelled", "no_boxes", "failed")

VOLATILE: set[str] = set()
"""Columns that may differ between two runs of one job; all others are equal, byte for byte."""
REPEATING: set[str] = set()
"""Columns with few distinct values: Parquet writes them with a dictionary, in every table with a column of
that name. Counts and floats are larger with a dictionary than without."""


def _column(
    name: str, kind: pa.DataType, *, required: bool = False, repeats: bool = False, volatile: bool = False
) -> pa.Field:
    """Return a column's field, null allowed unless `required`; note whether it repeats or is volatile."""
    if repeats:
        REPEATING.add(name)
    if volatile:
        VOLATILE.add(name)
    return pa.field(name, kind, nullable=not required)


def _list(kind: pa.DataType, length: int = -1) -> pa.DataType:
    """Return a list whose elements are never null."""
    return pa.list_(pa.field("element", kind, nullable=False), length)


_BOX = _list(pa.float32(), 4)
_RLE = pa.struct(
    [
        _column("size", _list(pa.int32()), required=True, repeats=True),
        _column("counts", pa.string(), required=True),
    ]
)
_STRINGS = _list(pa.string())
_DOUBLES = pa.list_(pa.field("element", pa.float64()))

# One box as the input gave it. `given` is untouched: wrong length, nulls, NaN and all.
PLAN_BOX = pa.struct(
    [
        _column("given", _DOUBLES),
        _column("box_id", pa.string()),
        _column("category_id", pa.int32()),
        _column("category_name", pa.string()),
        _column("score", pa.float64()),
        _column("points_xy", _DOUBLES),  # x, y, x, y, ...
        _column("point_labels", pa.list_(pa.field("element", pa.int32()))),
        _column("prompt_mask", _RLE),
        _column("iscrowd", pa.bool_()),  # true for a region of many objects; else null, never false
    ]
)

# One planned image; units are runs of `images_per_unit` rows, one Parquet row group each.
# boxes: null = the input's list was null (failed, boxes_missing); empty = no boxes.
PLAN = pa.schema(
    [
        _column("unit_id", pa.int32(), required=True),
        _column("image_id", pa.string(), required=True),
        _column("image_uri", pa.string(), required=True),
        _column("boxes", _list(PLAN_BOX)),
        _column("error_code", pa.string()),  # found while planning, for example labels_mismatch
        _column("error_message", pa.string()),
        # of a picture inside another file: that file's version tag, which workers compare
        _column("source_version", pa.string(), repeats=True),
    ]
)
PLAN_BEFORE = PLAN.remove(PLAN.get_field_index("source_version"))
"""The plan as earlier versions wrote it, which is still read."""

_PROMPT_COLUMNS = [
    _column("instance_index", pa.int32(), required=True, repeats=True),
    _column("box_id", pa.string()),
]
_CATEGORY_COLUMNS = [
    _column("category_id", pa.int32(), repeats=True),
    _column("category_name", pa.string(), repeats=True),
    _column("prompt_bbox_given", _DOUBLES),
    _column("prompt_bbox", _BOX),
]
_MASK_COLUMNS = [
    _column("bbox", _BOX),
    _column("segmentation", _RLE),
    _column("area", pa.int64()),
    _column("detector_score", pa.float32()),
    _column("predicted_iou", pa.float32()),
    _column("stability_score", pa.float32()),
    _column("box_iou", pa.float32()),
    _column("mask_in_box", pa.float32()),
    _column("num_components", pa.int32(), repeats=True),
    _column("touches_border", pa.bool_()),
    _column("qc_flags", _STRINGS, required=True, repeats=True),
]

# One instance inside a unit row. `box_error` is one of errors.BOX_CODES, or null.
UNIT_INSTANCE = pa.struct(
    [*_PROMPT_COLUMNS, *_CATEGORY_COLUMNS, *_MASK_COLUMNS, _column("box_error", pa.string(), repeats=True)]
)

_IMAGE_KEY = [
    _column("image_id", pa.string(), required=True),
    _column("image_uri", pa.string(), required=True, repeats=True),
    _column("status", pa.string(), required=True, repeats=True),
]
_IMAGE_FRAME = [
    _column("width", pa.int32()),
    _column("height", pa.int32()),
    _column("orig_width", pa.int32()),
    _column("orig_height", pa.int32()),
    _column("exif_orientation", pa.int32(), repeats=True),
]
_IMAGE_REST = [
    _column("source_bytes", pa.int64()),
    _column("source_etag", pa.string()),
    _column("error_stage", pa.string(), repeats=True),
    _column("error_code", pa.string(), repeats=True),
    _column("error_message", pa.string()),
    _column("attempts", pa.int32(), required=True, repeats=True, volatile=True),
    _column("fetch_ms", pa.float32(), volatile=True),
    _column("decode_ms", pa.float32(), volatile=True),
    _column("detect_ms", pa.float32(), volatile=True),
    _column("segment_ms", pa.float32(), volatile=True),
    _column("unit_id", pa.int32(), required=True, repeats=True),
    _column("run_id", pa.string(), required=True, repeats=True, volatile=True),
    _column("processed_at", pa.timestamp("us", tz="UTC"), required=True, repeats=True, volatile=True),
]

# The working truth, units/<unit>.g<generation>.parquet: one row an image, instances nested.
UNIT = pa.schema(
    [
        *_IMAGE_KEY,
        *_IMAGE_FRAME,
        *_IMAGE_REST,
        _column("instances", _list(UNIT_INSTANCE), required=True),
    ]
)

# Published: one row per box given, always.
INSTANCES = pa.schema(
    [
        _column("image_id", pa.string(), required=True),
        *_PROMPT_COLUMNS,
        _column("image_uri", pa.string(), required=True, repeats=True),
        *_CATEGORY_COLUMNS,
        *_MASK_COLUMNS,
        _column("accepted", pa.bool_(), required=True),
        _column("reject_reason", pa.string(), repeats=True),
        _column("run_id", pa.string(), required=True, repeats=True, volatile=True),
    ]
)

# Published: one row per image, always.
IMAGES = pa.schema(
    [
        *_IMAGE_KEY,
        *_IMAGE_FRAME,
        _column("num_boxes", pa.int32(), required=True),
        _column("num_instances", pa.int32(), required=True),
        _column("num_accepted", pa.int32(), required=True),
        *_IMAGE_REST,
    ]
)
