"""Tables -> COCO instances JSON: compressed runs, unchanged, as text; written and cut in bounded memory.

Ids of annotations count from 1 through all files, because COCO's own evaluation takes 0 for "no match".
`iscrowd` of a mask is 0: runs do not mark crowds, and trainers skip what is marked so. Boxes that came
with `iscrowd` 1 have no mask; they are written with it, their box filled, as the region that readers ignore.
`area` is the mask's, `bbox` the mask's tight box. `score` is what ranks masks for AP by default:
`predicted_iou`, times `detector_score` where there is one; crowds have none.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
from pycocotools import mask as coco_mask

from hqlabel.jobs.export.export_names import NO_FILE, can_be_a_file
from hqlabel.jobs.export.export_source import Classes, ExportSource, is_crowd
from hqlabel.jobs.results.read_tables import ImageRows, Row, row_groups
from hqlabel.pipeline import schema
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.output_store import Store

if TYPE_CHECKING:
    from hqlabel.jobs.export.image_files import ImageFiles

_EXACT = 2**53  # above it, JavaScript and float64 readers round
_IDS_KEY = "image_ids.parquet"
_CATEGORIES_KEY = "category_ids.json"
_IDS = pa.schema([("id", pa.int64()), ("image_id", pa.string()), ("file_name", pa.string())])


def category_numbers(classes: Classes, *, from_1: bool) -> dict[int, int]:
    """Return the number of each category in the file, by its id: the id itself, or its place from 1 on."""
    return {number: place + 1 if from_1 else number for number, place in classes.places().items()}


def write_coco(
    source: ExportSource,
    place: Store,
    *,
    per_file: int,
    categories_from_1: bool = False,
    subset: str | None = None,
    pictures: ImageFiles | None = None,
) -> Iterator[str]:
    """Write the files, at most `per_file` annotations each (an image is never cut); yields their keys.

    One file is `instances.json`, several are `instances-00001.json` and so on. A `subset` is one file,
    `annotations/instances_<subset>.json`, as Datumaro and CVAT import it, and `pictures` go into
    `images/<subset>/`; several are subsets of their own, `<subset>-00001` and so on. Where ids of images had
    to be numbered, `image_ids.parquet` maps them; where categories were to be, `category_ids.json` does.
    Memory: one file.
    """
    keep_ids = _ids_are_numbers(source)
    numbers = category_numbers(source.classes, from_1=categories_from_1)
    counts = source.manifest.counts
    annotations = counts.masks + counts.rejected.get("crowd", 0)
    cut = "-{:05d}" if max(annotations, counts.images) > per_file else ""
    name = f"instances{cut}.json" if subset is None else f"annotations/instances_{subset}{cut}.json"
    categories = [{"id": new, "name": source.classes.names[number]} for number, new in numbers.items()]
    file, ids = _InstancesFile(_info(source, keep_ids, numbers), categories), _Ids()
    written = annotation_id = 0
    for place_, rows in enumerate(source.images(), start=1):
        if file.is_full(len(rows.instances), per_file):
            written += 1
            place.put(name.format(written), file.body())
            yield name.format(written)
            file.clear()
        folder = f"images/{subset}{cut}".format(written + 1)
        if pictures is not None and not _has_picture(source, rows, pictures, folder):
            continue
        image_id = int(rows.image["image_id"]) if keep_ids else place_
        file_name = source.file_name(rows.image)
        file.images.add(_image(rows, image_id, file_name))
        ids.add(image_id, str(rows.image["image_id"]), file_name)
        for row in rows.instances:
            annotation_id += 1
            shown = _region(row, rows.image) if is_crowd(row) else row
            number = numbers[source.classes.id_of(row)]
            file.annotations.add(_annotation(shown, annotation_id, image_id, number))
    place.put(name.format(written + 1), file.body())
    yield name.format(written + 1)
    if not keep_ids:
        place.put(_IDS_KEY, ids.finish())
        yield _IDS_KEY
    if categories_from_1:
        place.put(_CATEGORIES_KEY, json.dumps(_category_map(source, numbers), ensure_ascii=False).encode())
        yield _CATEGORIES_KEY


def _has_picture(source: ExportSource, rows: ImageRows, pictures: ImageFiles, folder: str) -> bool:
    """Return whether the picture is below the folder now; an image without it is counted as left out."""
    name = source.file_name(rows.image)
    if not can_be_a_file(name):
        source.skip(rows, NO_FILE)
        return False
    return pictures.beside(source, rows, f"{folder}/{name}")


def _category_map(source: ExportSource, numbers: Mapping[int, int]) -> list[dict[str, object]]:
    classes = source.classes
    return [
        {"id": new, "category_id": classes.given_id(number), "name": classes.names[number]}
        for number, new in numbers.items()
    ]


class _Records:
    """Records of JSON as they are in a file, separated: one buffer, not an object for each."""

    def __init__(self) -> None:
        self.number = 0
        self._text = io.BytesIO()

    def add(self, text: str) -> None:
        """Append a record."""
        self._text.write(b",\n" if self.number else b"")
        self._text.write(text.encode())
        self.number += 1

    def view(self) -> memoryview:
        """Return the text so far, UTF-8; not a copy."""
        return self._text.getbuffer()


class _InstancesFile:
    """One file as it grows, around its images and annotations what all files of an export have in common."""

    def __init__(self, info: Mapping[str, object], categories: Sequence[Mapping[str, object]]) -> None:
        self._info = json.dumps(info, ensure_ascii=False)
        self._categories = json.dumps(categories, ensure_ascii=False)
        self.clear()

    def clear(self) -> None:
        """Begin the next file."""
        self.images, self.annotations = _Records(), _Records()

    def is_full(self, more: int, per_file: int) -> bool:
        """Return whether an image with that many more annotations belongs in the next file."""
        too_many = self.annotations.number + more > per_file or self.images.number >= per_file
        return bool(self.images.number) and too_many

    def body(self) -> bytes:
        """Return the whole file."""
        head = f'{{"info":{self._info},"images":[\n'.encode()
        tail = f'\n],"categories":{self._categories}}}\n'.encode()
        between = b'\n],"annotations":[\n'
        return b"".join([head, self.images.view(), between, self.annotations.view(), tail])


class _Ids:
    """The map from numbers to image ids, as Parquet."""

    def __init__(self) -> None:
        self._sink = checksummed_parquet.ParquetSink(_IDS, {})
        self._waiting: list[dict[str, object]] = []

    def add(self, number: int, image_id: str, file_name: str) -> None:
        """Append an image."""
        self._waiting.append({"id": number, "image_id": image_id, "file_name": file_name})
        if len(self._waiting) >= 8192:
            self._write()

    def finish(self) -> bytes:
        """Return the whole file."""
        self._write()
        return self._sink.finish()

    def _write(self) -> None:
        self._sink.write(pa.Table.from_pylist(self._waiting, schema=_IDS))
        self._waiting = []


def _ids_are_numbers(source: ExportSource) -> bool:
    """Return whether every image_id is a plain decimal number, as it is when the job's input was COCO."""
    for part in source.manifest.parts:
        for group in row_groups(source.store, part.images, schema.IMAGES, ["image_id"]):
            for image_id in group["image_id"].to_pylist():
                plain = image_id.isascii() and image_id.isdigit() and str(int(image_id)) == image_id
                if not plain or int(image_id) >= _EXACT:
                    return False
    return True


def _info(source: ExportSource, keep_ids: bool, numbers: Mapping[int, int]) -> dict[str, object]:
    lineage = source.manifest.lineage
    as_given = all(number == new for number, new in numbers.items())
    return {
        "description": "masks made by hqlabel (SAM-HQ) from given boxes",
        "run_id": source.manifest.run_id,
        "weights_sha256": lineage.get("weights_sha256", source.job.context.weights.sha256),
        "weights_license": source.job.context.weights.license,
        "image_root": source.root,
        "frame": "upright: EXIF orientation is applied before boxes and masks are measured",
        "image_ids": "as given" if keep_ids else f"numbered from 1, see {_IDS_KEY}",
        "category_ids": "as given" if as_given else f"numbered from 1, see {_CATEGORIES_KEY}",
    }


def _image(rows: ImageRows, number: int, file_name: str) -> str:
    image = rows.image
    values = {"id": number, "file_name": file_name, "width": image["width"], "height": image["height"]}
    return json.dumps(values | {"image_uri": image["image_uri"]}, ensure_ascii=False)


def _region(row: Row, image: Row) -> Row:
    """Return the row of a crowd with its box as a filled mask, widened to whole pixels of the picture."""
    height, width = image["height"], image["width"]
    x, y, box_width, box_height = row["prompt_bbox"]
    x1, y1 = max(0, math.floor(x)), max(0, math.floor(y))
    x2, y2 = min(width, math.ceil(x + box_width)), min(height, math.ceil(y + box_height))
    inside, outside = y2 - y1, height - (y2 - y1)
    columns = [outside, inside] * (x2 - x1)  # column-major: a gap before each column of the region
    columns[0] = x1 * height + y1
    counts = [*columns, height * width - (x2 - 1) * height - y2]
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    segmentation = {"size": [height, width], "counts": rle["counts"].decode("ascii")}
    tight = [x1, y1, x2 - x1, y2 - y1]
    return {**row, "segmentation": segmentation, "bbox": tight, "area": (x2 - x1) * inside}


def _annotation(row: Row, number: int, image: int, category: int) -> str:
    """Return an annotation; written by hand, because `json.dumps` of a dict takes three times as long."""
    rle, (x, y, width, height) = row["segmentation"], (int(value) for value in row["bbox"])
    counts = rle["counts"].replace("\\", "\\\\")  # the only character of runs that JSON escapes
    box_id = "null" if row["box_id"] is None else json.dumps(row["box_id"])
    return (
        f'{{"id":{number},"image_id":{image},"category_id":{category},'
        f'"iscrowd":{int(is_crowd(row))},"area":{row["area"]},'
        f'"bbox":[{x},{y},{width},{height}],'
        f'"segmentation":{{"size":[{rle["size"][0]},{rle["size"][1]}],"counts":"{counts}"}},'
        f'"instance_index":{row["instance_index"]},"box_id":{box_id},'
        f'"detector_score":{_number(row["detector_score"])},'
        f'"predicted_iou":{_number(row["predicted_iou"])},'
        f'"stability_score":{_number(row["stability_score"])}{_score(row)}}}'
    )


def _score(row: Row) -> str:
    if row["predicted_iou"] is None:
        return ""
    detected = 1.0 if row["detector_score"] is None else row["detector_score"]
    return f',"score":{_number(row["predicted_iou"] * detected)}'


def _number(value: float | None) -> str:
    """Return a float32 as JSON with all it holds, `null` for none."""
    return "null" if value is None else f"{value:.9g}"
