"""Tables -> Label Studio tasks with brush predictions, which users correct there.

Masks go in its own brush encoding (jobs/export/brush_rle.py), without loss; `predicted_iou` becomes the
score of each region and the least of them the score of the task, so that doubtful ones can be sorted first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from hqlabel.jobs.export.brush_rle import encode_brush
from hqlabel.jobs.export.export_names import labels_of
from hqlabel.jobs.export.export_source import ExportSource, mask_of
from hqlabel.jobs.results.read_tables import ImageRows, Row
from hqlabel.pipeline.storage.output_store import Store

FROM_NAME, TO_NAME = "mask", "image"
_BUCKETS = ("s3://", "gs://", "azure-blob://")


def write_label_studio(
    source: ExportSource, place: Store, *, per_file: int, image_prefix: str | None
) -> Iterator[str]:
    """Write tasks-00001.json and so on (at most `per_file` tasks each) and config.xml; yields their keys.

    `image_prefix`: where Label Studio finds the images, put before their relative names, which are encoded as
    in its own urls; a bucket's uri is no url to it, and stays unencoded. By default the uris as they are.
    """
    labels = labels_of(source.classes)
    tasks: list[dict[str, Any]] = []
    written = 0
    for rows in source.images():
        tasks.append(_task(source, rows, labels, image_prefix))
        if len(tasks) == per_file:
            written += 1
            yield _put(place, written, tasks)
            tasks = []
    if tasks or not written:
        yield _put(place, written + 1, tasks)
    place.put("config.xml", _config(labels).encode())
    yield "config.xml"


def _put(place: Store, number: int, tasks: list[dict[str, Any]]) -> str:
    key = f"tasks-{number:05d}.json"
    place.put(key, json.dumps(tasks, ensure_ascii=False, separators=(",", ":")).encode())
    return key


def _task(
    source: ExportSource, rows: ImageRows, labels: Mapping[int, str], image_prefix: str | None
) -> dict[str, Any]:
    image = rows.image
    uri = image["image_uri"] if image_prefix is None else image_prefix + _encoded(image_prefix, source, image)
    scores = [row["predicted_iou"] for row in rows.instances]
    prediction = {
        "model_version": source.manifest.run_id,
        "score": min(scores, default=0.0),
        "result": [_region(row, labels[source.classes.id_of(row)]) for row in rows.instances],
    }
    return {"data": {TO_NAME: uri, "image_id": image["image_id"]}, "predictions": [prediction]}


def _encoded(image_prefix: str, source: ExportSource, image: Row) -> str:
    name = source.file_name(image)
    return name if image_prefix.startswith(_BUCKETS) else quote(name)


def _region(row: Row, label: str) -> dict[str, Any]:
    height, width = row["segmentation"]["size"]
    return {
        "id": f"i{row['instance_index']}",
        "type": "brushlabels",
        "from_name": FROM_NAME,
        "to_name": TO_NAME,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "score": row["predicted_iou"],
        "value": {
            "format": "rle",
            "rle": encode_brush(mask_of(row)),
            "brushlabels": [label],
        },
    }


def _config(labels: Mapping[int, str]) -> str:
    names = dict.fromkeys(labels.values())  # a label is its name
    listed = "\n".join(f"    <Label value={quoteattr(name)}/>" for name in names)
    return (
        f'<View>\n  <Image name="{TO_NAME}" value="${TO_NAME}" zoom="true"/>\n'
        f'  <BrushLabels name="{FROM_NAME}" toName="{TO_NAME}">\n{listed}\n  </BrushLabels>\n</View>\n'
    )
