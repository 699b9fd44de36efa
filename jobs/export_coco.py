"""Tables -> COCO instances JSON: compressed runs, unchanged, as text; written and cut in bounded memory.

Ids of annotations count from 1 through all files, because COCO's own evaluation takes 0 for "no match".
`iscrowd` is always 0: runs say nothing about crowds, and trainers skip what is marked so. `area` is the
mask's, `bbox` the mask's tight box.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from jobs.exporting import Source, number_text
from jobs.tables import ImageRows, Row, row_groups
from pipeline import parquet, schema
from pipeline.storage import Store

_EXACT = 2**53  # above it, JavaScript and float64 readers round
_IDS_KEY = "image_ids.parquet"
_IDS = pa.schema([("id", pa.int64()), ("image_id", pa.string()), ("file_name", pa.string())])


def write_coco(source: Source, place: Store, *, per_file: int) -> Iterator[str]:
    """Write the files, at most `per_file` annotations each (an image is never cut); yields their keys.

    One file is `instances.json`, several are `instances-00001.json` and so on. Where ids of images had to
    be numbered, `image_ids.parquet` says which is which. Memory: one file.
    """
    keep_ids = _ids_are_numbers(source)
    counts = source.manifest.counts
    name = "instances-{:05d}.json" if max(counts.masks, counts.images) > per_file else "instances.json"
    frame = _Frame(source, keep_ids)
    ids = _Ids()
    body, written, annotation_id = _Body(), 0, 0
    for place_, rows in enumerate(source.images(), start=1):
        if body.is_full(len(rows.instances), per_file):
            written += 1
            place.put(name.format(written), frame.around(body))
            yield name.format(written)
            body = _Body()
        image_id = int(rows.image["image_id"]) if keep_ids else place_
        file_name = source.file_name(rows.image)
        body.images.add(_image(rows, image_id, file_name))
        ids.add(image_id, str(rows.image["image_id"]), file_name)
        for row in rows.instances:
            annotation_id += 1
            body.annotations.add(_annotation(row, annotation_id, image_id, source.classes.id_of(row)))
    place.put(name.format(written + 1), frame.around(body))
    yield name.format(written + 1)
    if not keep_ids:
        place.put(_IDS_KEY, ids.finish())
        yield _IDS_KEY


class _Records:
    """Records of JSON as they stand in a file, separated: one buffer, not an object for each."""

    def __init__(self) -> None:
        self.number = 0
        self._text = io.BytesIO()

    def add(self, text: str) -> None:
        """None; one record more."""
        self._text.write(b",\n" if self.number else b"")
        self._text.write(text.encode())
        self.number += 1

    def view(self) -> memoryview:
        """What is there so far, UTF-8; not a copy."""
        return self._text.getbuffer()


@dataclass(kw_only=True)
class _Body:
    """One file as it grows."""

    images: _Records = field(default_factory=_Records)
    annotations: _Records = field(default_factory=_Records)

    def is_full(self, more: int, per_file: int) -> bool:
        """Whether another image with so many annotations belongs into the next file."""
        too_many = self.annotations.number + more > per_file or self.images.number >= per_file
        return bool(self.images.number) and too_many


class _Frame:
    """What every file of an export has in common."""

    def __init__(self, source: Source, keep_ids: bool) -> None:
        categories = [{"id": number, "name": name} for number, name in source.classes.names.items()]
        self._info = json.dumps(_info(source, keep_ids), ensure_ascii=False)
        self._categories = json.dumps(categories, ensure_ascii=False)

    def around(self, body: _Body) -> bytes:
        """The whole file."""
        head = f'{{"info":{self._info},"images":[\n'.encode()
        tail = f'\n],"categories":{self._categories}}}\n'.encode()
        between = b'\n],"annotations":[\n'
        return b"".join([head, body.images.view(), between, body.annotations.view(), tail])


class _Ids:
    """The map from numbers to image ids, as Parquet."""

    def __init__(self) -> None:
        self._sink = parquet.ParquetSink(_IDS, {})
        self._waiting: list[tuple[int, str, str]] = []

    def add(self, number: int, image_id: str, file_name: str) -> None:
        """None; one image more."""
        self._waiting.append((number, image_id, file_name))
        if len(self._waiting) >= 8192:
            self._write()

    def finish(self) -> bytes:
        """The whole file."""
        self._write()
        return self._sink.finish()

    def _write(self) -> None:
        columns = [[row[place] for row in self._waiting] for place in range(len(_IDS))]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _IDS, strict=True)]
        self._sink.write(pa.Table.from_arrays(arrays, schema=_IDS))
        self._waiting = []


def _ids_are_numbers(source: Source) -> bool:
    """Whether every image_id is a plain decimal number, as it is when the job's input was COCO."""
    for part in source.manifest.parts:
        for group in row_groups(source.store, part.images, schema.IMAGES, ["image_id"]):
            for image_id in group["image_id"].to_pylist():
                plain = image_id.isascii() and image_id.isdigit() and str(int(image_id)) == image_id
                if not plain or int(image_id) >= _EXACT:
                    return False
    return True


def _info(source: Source, keep_ids: bool) -> dict[str, object]:
    lineage = source.manifest.lineage
    return {
        "description": "masks made by hqlabel (SAM-HQ) from given boxes",
        "run_id": source.manifest.run_id,
        "weights_sha256": lineage.get("weights_sha256", source.job.context.weights.sha256),
        "weights_license": source.job.context.weights.license,
        "image_root": source.folder,
        "frame": "upright: EXIF orientation is applied before boxes and masks are measured",
        "image_ids": "as given" if keep_ids else f"numbered from 1, see {_IDS_KEY}",
    }


def _image(rows: ImageRows, number: int, file_name: str) -> str:
    image = rows.image
    values = {"id": number, "file_name": file_name, "width": image["width"], "height": image["height"]}
    return json.dumps(values | {"image_uri": image["image_uri"]}, ensure_ascii=False)


def _annotation(row: Row, number: int, image: int, category: int) -> str:
    """One annotation; written by hand, because `json.dumps` of a dict each takes three times as long."""
    rle, (x, y, width, height) = row["segmentation"], (int(value) for value in row["bbox"])
    counts = rle["counts"].replace("\\", "\\\\")  # the only character of runs that JSON escapes
    box_id = "null" if row["box_id"] is None else json.dumps(row["box_id"])
    return (
        f'{{"id":{number},"image_id":{image},"category_id":{category},"iscrowd":0,"area":{row["area"]},'
        f'"bbox":[{x},{y},{width},{height}],'
        f'"segmentation":{{"size":[{rle["size"][0]},{rle["size"][1]}],"counts":"{counts}"}},'
        f'"instance_index":{row["instance_index"]},"box_id":{box_id},'
        f'"detector_score":{number_text(row["detector_score"])},'
        f'"predicted_iou":{number_text(row["predicted_iou"])},'
        f'"stability_score":{number_text(row["stability_score"])}}}'
    )
