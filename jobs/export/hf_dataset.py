"""Tables -> a Hugging Face data set: Parquet, one row an image, its masks nested, features in the footer.

Pictures are referred to, not copied: `image` has a path and no bytes, and `datasets` opens it when asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hqlabel.jobs.export.export_source import ExportSource
from hqlabel.jobs.results.read_tables import ImageRows
from hqlabel.pipeline.errors import clean_text
from hqlabel.pipeline.storage.output_store import Store

_RLE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
_OBJECT = pa.struct(
    [
        ("instance_index", pa.int32()),
        ("box_id", pa.string()),
        ("category", pa.int64()),
        ("bbox", pa.list_(pa.float32(), 4)),
        ("prompt_bbox", pa.list_(pa.float32(), 4)),
        ("area", pa.int64()),
        ("segmentation", _RLE),
        ("detector_score", pa.float32()),
        ("predicted_iou", pa.float32()),
        ("stability_score", pa.float32()),
        ("accepted", pa.bool_()),
    ]
)
_ROWS = pa.schema(
    [
        ("image_id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("objects", pa.list_(_OBJECT)),
    ]
)
_ROW_GROUP_MASKS = 20_000


def write_hf(source: ExportSource, place: Store, *, per_file: int) -> Iterator[str]:
    """Write data/train-00001.parquet and so on (at most `per_file` masks each, an image is never cut) and
    README.md, the card; yields their keys. Memory: one file.
    """
    kind = _ROWS.with_metadata({"huggingface": json.dumps({"info": {"features": _features(source)}})})
    file, written = _File(kind), 0
    for rows in source.images():
        if file.masks and file.masks + len(rows.instances) > per_file:
            written += 1
            yield _put(place, written, file)
            file = _File(kind)
        file.add(_row(source, rows), len(rows.instances))
    yield _put(place, written + 1, file)
    place.put("README.md", _card(source).encode())
    yield "README.md"


class _File:
    """One Parquet file as it grows; row groups are written when they are full."""

    def __init__(self, kind: pa.Schema) -> None:
        self._kind = kind
        self._rows: list[dict[str, Any]] = []
        self._waiting = 0
        self._body = pa.BufferOutputStream()
        # Chunks cut by content: a later version that shares most rows shares most of its bytes too.
        self._writer = pq.ParquetWriter(
            self._body, kind, compression="zstd", use_content_defined_chunking=True, write_page_index=True
        )
        self.masks = 0

    def add(self, row: dict[str, Any], masks: int) -> None:
        self._rows.append(row)
        self.masks += masks
        self._waiting += masks + 1
        if self._waiting >= _ROW_GROUP_MASKS:
            self._write()

    def finish(self) -> bytes:
        self._write()
        self._writer.close()
        return bytes(self._body.getvalue())

    def _write(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._kind))
        self._rows, self._waiting = [], 0


def _put(place: Store, number: int, file: _File) -> str:
    key = f"data/train-{number:05d}.parquet"
    place.put(key, file.finish())
    return key


def _row(source: ExportSource, rows: ImageRows) -> dict[str, Any]:
    image, places = rows.image, source.classes.places()
    names = [field.name for field in _OBJECT if field.name != "category"]
    return {
        "image_id": image["image_id"],
        "image": {"bytes": None, "path": image["image_uri"]},
        "width": image["width"],
        "height": image["height"],
        "objects": [
            {**{name: row[name] for name in names}, "category": places[source.classes.id_of(row)]}
            for row in rows.instances
        ],
    }


def _features(source: ExportSource) -> dict[str, Any]:
    distinct = source.classes.distinct_names()  # `datasets` refuses two labels of one name
    names = [distinct[number] for number in source.classes.places()]

    def feature(kind: pa.DataType) -> Any:
        if pa.types.is_struct(kind):
            return {field.name: feature(field.type) for field in kind}
        if pa.types.is_fixed_size_list(kind):
            return {"feature": feature(kind.value_type), "length": kind.list_size, "_type": "List"}
        if pa.types.is_list(kind):
            return {"feature": feature(kind.value_type), "_type": "List"}
        return {"dtype": {"float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}

    features = {field.name: feature(field.type) for field in _ROWS}
    features["image"] = {"_type": "Image"}
    features["objects"]["feature"]["category"] = {"names": names, "_type": "ClassLabel"}
    return features


def _cell(text: str) -> str:
    """Return the text for a cell of a Markdown table."""
    return clean_text(text).replace("\\", "\\\\").replace("|", "\\|")


def _card(source: ExportSource) -> str:
    weights, classes_ = source.job.context.weights, source.classes
    names = classes_.distinct_names()
    classes = "\n".join(
        f"| {place} | {'' if classes_.given_id(number) is None else number} | {_cell(names[number])} |"
        for number, place in classes_.places().items()
    )
    return f"""---
task_categories: [image-segmentation]
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---

Instance masks made by hqlabel (SAM-HQ) from given boxes.

- masks: {source.tally["masks"]}, images: {source.tally["images"]}
- run: {source.manifest.run_id}
- weights: sha256 {weights.sha256}, licence {weights.license or "unknown"}
- boxes and masks are in upright pixels (EXIF orientation applied), boxes xywh
- `segmentation` is COCO compressed RLE: `pycocotools.mask.decode` takes it as it is
- scores: `detector_score` of the box's detector, `predicted_iou` and `stability_score` of the mask

| category | category_id | name |
|---|---|---|
{classes}
"""
