"""The SQL behind the tables and charts of a report; the sections of tiles have their own (`sections`).

Written for DuckDB, once: `numbers` runs these queries over the columns that it loaded, and the page prints
them over the published files, for the user to run. Medians and times are exact here; the page takes them from
a sample when there are more than SAMPLE_ROWS rows.
"""

from __future__ import annotations

SAMPLE_ROWS = 200_000
SCORES = ("detector_score", "predicted_iou", "stability_score", "box_iou", "mask_in_box")
TIMES = ("fetch_ms", "decode_ms", "detect_ms", "segment_ms")
BINS, BINS_PER_DECADE = 40, 5
MOST_PARTS = 10
STEPS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
"""The lines whose share of kept masks a report shows."""
WHOLE_BOXES = 200
"""A picture with more boxes is not shown with all of them: nobody could tell them apart."""
SPANS = 60
"""The bars of the chart of images finished over time."""

CLASS_COUNTS = (
    "count(DISTINCT image_id) AS images, count(*) AS boxes,\n  count(*) FILTER (area > 0) AS masks, "
    "count(*) FILTER (accepted) AS accepted"
)
MEDIANS = ", ".join(f"median(CAST({name} AS DOUBLE)) AS {name}" for name in (*SCORES, "area"))
_PAIR_REACH = 16  # boxes after a box that are compared with it for overlap
_PAIR_BOX_IOU = 0.6
_MOST_PAIRS = 40
_WHOLE_PICTURES = 12


def queries(instances: str, images: str) -> dict[str, str]:
    """Return the SQL behind each table and chart by name; `instances`, `images`: what to select from."""
    names = ", ".join(SCORES)
    masks = f"SELECT accepted, {names} FROM {instances} WHERE area > 0"
    scores = f"(UNPIVOT ({masks})\n  ON {names} INTO NAME score VALUE value)"
    times = ", ".join(f"quantile_cont(CAST({name} AS DOUBLE), [0.5, 0.95]) AS {name}" for name in TIMES)
    steps = ",\n  ".join(f"avg(CAST(value >= CAST({step} AS FLOAT) AS INT)) AS '>= {step}'" for step in STEPS)
    counts = "count(*) AS masks, count(*) FILTER (accepted) AS accepted"
    return {
        "totals": "SELECT status, count(*) AS images, sum(num_boxes) AS boxes, sum(num_instances) AS masks, "
        f"sum(num_accepted) AS accepted,\n  sum(segment_ms) / 1000 AS model_s, sum(source_bytes) AS read\n"
        f"FROM {images} GROUP BY 1 ORDER BY 1;",
        "failures": f"SELECT error_stage, error_code, count(*) AS images, any_value(error_message)\n"
        f"FROM {images} WHERE status = 'failed' GROUP BY ALL ORDER BY images DESC;",
        "rejected": f"SELECT split_part(reject_reason, ':', 1) AS reason, count(*) AS boxes\n"
        f"FROM {instances} WHERE NOT accepted GROUP BY 1 ORDER BY boxes DESC;",
        "scores": f"SELECT score, greatest(0, least(floor(value * {BINS}), {BINS - 1})) / {BINS} AS bin, "
        f"{counts}\nFROM {scores}\nGROUP BY 1, 2 ORDER BY 1, 2;",
        "area": f"SELECT pow(10, floor(log10(area) * {BINS_PER_DECADE}) / {BINS_PER_DECADE}) AS from_px, "
        f"{counts}\nFROM {instances} WHERE area > 0 GROUP BY 1 ORDER BY 1;",
        "num_components": f"SELECT least(num_components, {MOST_PARTS}) AS parts, {counts}\n"
        f"FROM {instances} WHERE num_components > 0 GROUP BY 1 ORDER BY 1;",
        "boxes per image": f"SELECT least(num_boxes, {BINS - 1}) AS boxes, count(*) AS images\n"
        f"FROM {images} GROUP BY 1 ORDER BY 1;",
        "lines": f"SELECT score, {steps}\nFROM {scores} GROUP BY 1;",
        "classes": by_class(f"{CLASS_COUNTS}, {MEDIANS}", instances),
        "pace": _pace_query(images),
        "times": f"SELECT {times}\nFROM {images};",
        "pairs": _pairs_query(instances),
        "whole": f"SELECT image_id FROM {images}\nWHERE num_boxes BETWEEN 1 AND {WHOLE_BOXES}\n"
        f"ORDER BY md5(image_id), image_id LIMIT {_WHOLE_PICTURES};",
    }


def by_class(columns: str, instances: str) -> str:
    """Return the query of these aggregates, such as CLASS_COUNTS and MEDIANS, for each class."""
    return f"SELECT category_id, category_name, {columns}\nFROM {instances} GROUP BY 1, 2;"


def _pace_query(images: str) -> str:
    """Images finished in each of SPANS spans of a second or more: (start, span's seconds, number, images)."""
    return (
        f"WITH done AS (SELECT CAST(floor(epoch(processed_at)) AS BIGINT) AS since FROM {images}),\n"
        "  span AS (SELECT min(since) AS start, "
        f"greatest(1, (max(since) + 1 - min(since)) / {SPANS}) AS seconds FROM done)\n"
        "SELECT start, seconds, CAST(floor((since - start) / seconds) AS INT) AS span, count(*) AS images\n"
        "FROM done, span GROUP BY ALL ORDER BY span;"
    )


def _pairs_query(instances: str) -> str:
    """Pairs of unlike classes whose boxes overlap; masks are compared afterwards, which SQL cannot do."""
    corner = "b.box[{0}] + b.box[{1}], a.box[{0}] + a.box[{1}]"
    width, height = (
        f"greatest(0, least({corner.format(at, at + 2)}) - greatest(a.box[{at}], b.box[{at}]))"
        for at in (1, 2)
    )
    return (
        "WITH boxed AS (SELECT image_id, instance_index, category_id, category_name, "
        f"CAST(bbox AS DOUBLE[]) AS box\n  FROM {instances} WHERE area > 0)\n"
        "SELECT a.image_id, a.instance_index, b.instance_index AS other, a.category_name, "
        f"b.category_name AS other_name,\n  {width}\n  * {height} AS shared,\n"
        "  shared / (a.box[3] * a.box[4] + b.box[3] * b.box[4] - shared) AS box_overlap\n"
        "FROM boxed a JOIN boxed b ON a.image_id = b.image_id\n"
        f"  AND b.instance_index BETWEEN a.instance_index + 1 AND a.instance_index + {_PAIR_REACH}\n"
        "  AND (a.category_id, a.category_name) IS DISTINCT FROM (b.category_id, b.category_name)\n"
        f"WHERE box_overlap > {_PAIR_BOX_IOU}\n"
        f"ORDER BY box_overlap DESC, a.image_id, a.instance_index, other LIMIT {_MOST_PAIRS};"
    )


def published(output: str, table: str) -> str:
    """Return the published files of a table, for FROM."""
    return literal(f"{output}/{table}/*.parquet")


def literal(text: str) -> str:
    """Return the text between single quotes, as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"
