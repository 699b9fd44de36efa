"""Tables -> labelme: a JSON file for each picture, beside it, with a mask or a polygon for each object.

A mask is a PNG of its tight box, without loss; a polygon can be edited by its corners, and other readers of
labelme's files know it alone. labelme draws a polygon with Pillow, and so its loss is measured.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from hqlabel.jobs.export.export_names import (
    can_be_a_file,
    refuse_shared_files,
    shared_file,
    without_ending,
)
from hqlabel.jobs.export.export_source import ExportSource, Loss, mask_of
from hqlabel.jobs.export.polygons import filled_polygon_of
from hqlabel.jobs.results.read_tables import ImageRows, Row
from hqlabel.pipeline.errors import UsageError
from hqlabel.pipeline.storage.output_store import Store

if TYPE_CHECKING:
    from hqlabel.jobs.export.image_files import ImageFiles

UNFIT = "images whose names labelme or a disk cannot hold (\\, ./, ../, //, more than 255 bytes, .json)"
_VERSION = "5.5.0"  # of the files: masks are known since 5.3


def write_labelme(
    source: ExportSource,
    place: Store,
    loss: Loss,
    *,
    tolerance_px: float | None = None,
    pictures: ImageFiles | None = None,
) -> Iterator[str]:
    """Write a file for each image, named as the picture but `.json`; yields their keys.

    `tolerance_px`: polygons are written, whose outlines may move by so much; None: masks. `pictures`: they
    are put beside the files, where labelme looks for them.

    Raises:
        UsageError: two images would share a file.
    """
    refuse_shared_files(source, _key)
    for rows in source.images():
        name = source.file_name(rows.image)
        key = _key(name)
        if key is None:
            source.skip(rows, UNFIT)
            continue
        if pictures is not None and not pictures.beside(source, rows, name):
            continue
        body = json.dumps(_file(source, rows, loss, tolerance_px), ensure_ascii=False).encode()
        if not place.put_if_absent(key, body):
            raise UsageError(shared_file(None, name, key))
        yield key


def _key(name: str) -> str | None:
    """Return the file of an image; None where labelme, which reads \\ as /, cannot hold its name."""
    key = f"{without_ending(name)}.json"
    fits = can_be_a_file(name) and can_be_a_file(key) and "\\" not in name and key != name
    return key if fits else None


def _file(source: ExportSource, rows: ImageRows, loss: Loss, tolerance_px: float | None) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "flags": {},
        "shapes": [_shape(source, row, loss, tolerance_px) for row in rows.instances],
        "imagePath": source.file_name(rows.image).rpartition("/")[2],
        "imageData": None,
        "imageHeight": rows.image["height"],
        "imageWidth": rows.image["width"],
    }


def _shape(source: ExportSource, row: Row, loss: Loss, tolerance_px: float | None) -> dict[str, Any]:
    more = {name: row[name] for name in ("box_id", "detector_score", "predicted_iou", "stability_score")}
    shape: dict[str, Any] = {
        "label": source.classes.names[source.classes.id_of(row)],
        "group_id": None,
        "description": "",
        "flags": {},
    }
    drawn = _mask(row) if tolerance_px is None else _polygon(row, loss, tolerance_px)
    return shape | drawn | {name: value for name, value in more.items() if value is not None}


def _mask(row: Row) -> dict[str, Any]:
    x, y, width, height = (int(value) for value in row["bbox"])
    body = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask_of(row)[y : y + height, x : x + width])).save(body, "PNG")
    return {
        "shape_type": "mask",
        "points": [[x, y], [x + width - 1, y + height - 1]],  # the last pixel's corner, as labelme cuts it
        "mask": base64.b64encode(body.getvalue()).decode("ascii"),
    }


def _polygon(row: Row, loss: Loss, tolerance_px: float) -> dict[str, Any]:
    mask = mask_of(row)
    points = [
        [math.floor(100 * x) / 100, math.floor(100 * y) / 100]
        for x, y in filled_polygon_of(mask, tolerance_px)
    ]
    drawn = Image.new("L", mask.shape[::-1])
    ImageDraw.Draw(drawn).polygon([(x, y) for x, y in points], fill=1, outline=1)
    loss.add(float((np.asarray(drawn) & mask).sum() / (np.asarray(drawn) | mask).sum()))
    return {"shape_type": "polygon", "points": points}
