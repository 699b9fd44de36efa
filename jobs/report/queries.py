"""The SQL behind the tables and charts of a report; sections of tiles have their own (report_sections).

Written for DuckDB. A test compares each answer with what the page shows. Medians and times are exact here;
the page takes them from a sample when there are more rows than SAMPLE_ROWS.
"""

from __future__ import annotations

from jobs.report.numbers import PAIR_BOX_IOU, SCORES, TIMES
from jobs.report.sections import quoted

STEPS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
"""The lines whose share of kept masks a report shows."""


def queries(output: str) -> dict[str, str]:
    """By name, the SQL behind each table and chart of the page, over the tables under `output`."""
    instances, images = (f"'{quoted(output)}/{name}/*.parquet'" for name in ("instances", "images"))
    medians = ", ".join(f"median({name}) AS {name}" for name in (*SCORES, "area"))
    names = ", ".join(SCORES)
    masks = f"SELECT accepted, {names} FROM {instances} WHERE area > 0"
    scores = f"(UNPIVOT ({masks})\n  ON {names} INTO NAME score VALUE value)"
    times = ", ".join(f"quantile_cont({name}, [0.5, 0.95]) AS {name}" for name in TIMES)
    steps = ",\n  ".join(f"avg(CAST(value >= CAST({step} AS FLOAT) AS INT)) AS '>= {step}'" for step in STEPS)
    return {
        "totals": "SELECT status, count(*) AS images, sum(num_boxes) AS boxes, sum(num_instances) AS masks, "
        f"sum(num_accepted) AS accepted,\n  sum(segment_ms) / 1000 AS model_s, sum(source_bytes) AS read\n"
        f"FROM {images} GROUP BY 1 ORDER BY 1;",
        "failures": f"SELECT error_stage, error_code, count(*) AS images, any_value(error_message)\n"
        f"FROM {images} WHERE status = 'failed' GROUP BY ALL ORDER BY images DESC;",
        "rejected": f"SELECT split_part(reject_reason, ':', 1) AS reason, count(*) AS boxes\n"
        f"FROM {instances} WHERE NOT accepted GROUP BY 1 ORDER BY boxes DESC;",
        "scores": "SELECT score, greatest(0, least(floor(value * 40), 39)) / 40 AS bin, count(*) AS masks, "
        f"count(*) FILTER (accepted) AS accepted\nFROM {scores}\nGROUP BY 1, 2 ORDER BY 1, 2;",
        "area": "SELECT pow(10, floor(log10(area) * 5) / 5) AS from_px, count(*) AS masks, "
        f"count(*) FILTER (accepted) AS accepted\nFROM {instances} WHERE area > 0 GROUP BY 1 ORDER BY 1;",
        "num_components": "SELECT least(num_components, 10) AS parts, count(*) AS masks, "
        "count(*) FILTER (accepted) AS accepted\n"
        f"FROM {instances} WHERE num_components > 0 GROUP BY 1 ORDER BY 1;",
        "boxes per image": f"SELECT least(num_boxes, 39) AS boxes, count(*) AS images\n"
        f"FROM {images} GROUP BY 1 ORDER BY 1;",
        "lines": f"SELECT score, {steps}\nFROM {scores} GROUP BY 1;",
        "classes": "SELECT category_id, category_name, count(DISTINCT image_id) AS images, "
        "count(*) AS boxes,\n  count(*) FILTER (area > 0) AS masks, count(*) FILTER (accepted) AS accepted, "
        f"{medians}\n"
        f"FROM {instances} GROUP BY 1, 2 ORDER BY boxes DESC;",
        "pace": f"SELECT CAST(date_trunc('minute', processed_at) AS VARCHAR) AS minute, count(*) AS images\n"
        f"FROM {images} GROUP BY 1 ORDER BY 1;",
        "times": f"SELECT {times}\nFROM {images};",
        "pairs": _pairs_query(instances),
    }


def _pairs_query(instances: str) -> str:
    """Pairs whose boxes overlap; masks are compared afterwards, which SQL cannot do."""
    corner = "b.bbox[{0}] + b.bbox[{1}], a.bbox[{0}] + a.bbox[{1}]"
    width, height = (
        f"greatest(0, least({corner.format(at, at + 2)}) - greatest(a.bbox[{at}], b.bbox[{at}]))"
        for at in (1, 2)
    )
    return (
        "SELECT a.image_id, a.instance_index, b.instance_index AS other, a.category_name, "
        f"b.category_name AS other_name,\n  {width}\n  * {height} AS shared,\n"
        "  shared / (a.bbox[3] * a.bbox[4] + b.bbox[3] * b.bbox[4] - shared) AS box_overlap\n"
        f"FROM {instances} a JOIN {instances} b\n"
        "  ON a.image_id = b.image_id AND a.instance_index < b.instance_index\n"
        "  AND (a.category_id, a.category_name) IS DISTINCT FROM (b.category_id, b.category_name)\n"
        f"WHERE a.area > 0 AND b.area > 0 AND box_overlap > {PAIR_BOX_IOU}\n"
        "ORDER BY box_overlap DESC, a.image_id, a.instance_index;"
    )
