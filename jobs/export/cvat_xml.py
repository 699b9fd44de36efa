"""Tables -> CVAT for images 1.1: XML with a mask or a polygon for each object, and the labels of a task.

CVAT's runs share nothing with COCO's: within the mask's tight box, row by row, outside and inside by turns. A
task finds its frames by their names. Written image by image; memory: one file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from hqlabel.jobs.export.export_names import (
    NO_FILE,
    NOT_XML,
    can_be_a_file,
    labels_of,
)
from hqlabel.jobs.export.export_source import ExportSource, Loss, mask_of
from hqlabel.jobs.export.polygons import kept_iou, polygon_of
from hqlabel.jobs.results.read_tables import ImageRows, Row
from hqlabel.pipeline.storage.output_store import Store

if TYPE_CHECKING:
    from hqlabel.jobs.export.image_files import ImageFiles

NO_XML = "images whose names XML cannot hold (control characters)"
_LINE_ENDS = {"\r": "&#13;"}
_SCORES = ("predicted_iou", "stability_score", "detector_score")


def write_cvat(
    source: ExportSource,
    place: Store,
    loss: Loss,
    *,
    per_file: int,
    tolerance_px: float | None = None,
    pictures: ImageFiles | None = None,
) -> Iterator[str]:
    """Write annotations.xml, or annotations-00001.xml and so on (at most `per_file` masks each).

    Yields the files' keys. `tolerance_px`: polygons are written, whose outlines may move by so much; None:
    masks, without loss. `pictures`: they are put into images/.
    """
    labels = labels_of(source.classes)
    counts = source.manifest.counts
    name = "annotations-{:05d}.xml" if max(counts.masks, counts.images) > per_file else "annotations.xml"
    head = _head(labels).encode()
    body, shapes, images, written = bytearray(head), 0, 0, 0
    for number, rows in enumerate(_held(source, pictures)):
        if images and (shapes + len(rows.instances) > per_file or images >= per_file):
            written += 1
            yield _put(place, name.format(written), body)
            body, shapes, images = bytearray(head), 0, 0
        body += _image(source, rows, number, labels, loss, tolerance_px).encode()
        shapes, images = shapes + len(rows.instances), images + 1
    yield _put(place, name.format(written + 1), body)


def _put(place: Store, key: str, body: bytearray) -> str:
    body += b"</annotations>\n"
    place.put(key, bytes(body))
    return key


def _held(source: ExportSource, pictures: ImageFiles | None) -> Iterator[ImageRows]:
    """Yield the images whose names the format can hold, and whose pictures, if asked for, are there."""
    for rows in source.images():
        name = source.file_name(rows.image)
        if NOT_XML.search(name):
            source.skip(rows, NO_XML)
        elif pictures is None:
            yield rows
        elif not can_be_a_file(name):
            source.skip(rows, NO_FILE)
        elif pictures.beside(source, rows, f"images/{name}"):
            yield rows


def _head(labels: Mapping[int, str]) -> str:
    attributes = "".join(
        f"<attribute><name>{name}</name><mutable>False</mutable><input_type>text</input_type>"
        "<default_value></default_value><values></values></attribute>"
        for name in _SCORES
    )
    listed = "".join(
        f"<label><name>{escape(name, _LINE_ENDS)}</name><attributes>{attributes}</attributes></label>\n"
        for name in dict.fromkeys(labels.values())
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
        f"<meta><task><mode>annotation</mode><labels>\n{listed}</labels></task></meta>\n"
    )


def _image(
    source: ExportSource,
    rows: ImageRows,
    number: int,
    labels: Mapping[int, str],
    loss: Loss,
    tolerance_px: float | None,
) -> str:
    image = rows.image
    shapes = "".join(
        _shape(row, labels[source.classes.id_of(row)], loss, tolerance_px) for row in rows.instances
    )
    size = f'width="{image["width"]}" height="{image["height"]}"'
    return f'<image id="{number}" name={quoteattr(source.file_name(image))} {size}>\n{shapes}</image>\n'


def _shape(row: Row, label: str, loss: Loss, tolerance_px: float | None) -> str:
    scores = "".join(
        f'<attribute name="{name}">{row[name]:.9g}</attribute>' for name in _SCORES if row[name] is not None
    )
    common = f'label={quoteattr(label)} source="auto" occluded="0" z_order="0"'
    if tolerance_px is None:
        return f"<mask {common} {_runs(row)}>{scores}</mask>\n"
    polygon = polygon_of(mask_of(row), tolerance_px)
    loss.add(kept_iou(polygon, row["segmentation"]["counts"], tuple(row["segmentation"]["size"])))
    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in polygon.tolist())
    return f'<polygon {common} points="{points}">{scores}</polygon>\n'


def _runs(row: Row) -> str:
    """Return a mask's runs and their box as attributes."""
    x, y, width, height = (int(value) for value in row["bbox"])
    flat = mask_of(row)[y : y + height, x : x + width].ravel()
    stops = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    lengths = np.diff(stops, prepend=0).tolist()
    runs = ", ".join(map(str, [0, *lengths] if flat[0] else lengths))
    return f'rle="{runs}" left="{x}" top="{y}" width="{width}" height="{height}"'
