"""Tables -> YOLO segmentation labels: one text file an image, one polygon a mask, and the IoU that costs.

Ultralytics finds a label file by the picture's path alone: the last `/images/` in it becomes `/labels/`, what
follows the last dot becomes `txt`; where there is no such file, it trains on the picture as background and
does not warn. Pictures are in `images/` under their names here, each label file where that rule finds it.

The format has one polygon an object and no scores. Parts and holes are bridged into it. It runs through the
centres of the outermost pixels, because Ultralytics draws it with OpenCV's `fillPoly`, edges too; how much of
a mask that gives back is measured on every line as it is written, and reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hqlabel.jobs.export.export_names import can_be_a_file, refuse_shared_files, shared_file, without_ending
from hqlabel.jobs.export.export_source import ExportSource, Loss, mask_of
from hqlabel.jobs.export.polygons import filled_iou, filled_polygon_of
from hqlabel.jobs.results.read_tables import Row
from hqlabel.pipeline.errors import UsageError
from hqlabel.pipeline.storage.output_store import Store

if TYPE_CHECKING:
    from hqlabel.jobs.export.image_files import ImageFiles

# What Ultralytics opens: by the end of the name, and by the shorter side in pixels.
ENDINGS = ("bmp", "dng", "jpeg", "jpg", "mpo", "png", "tif", "tiff", "webp", "pfm", "heic")
_LEAST_SIDE = 10
_UNFIT_NAMES = (
    "images whose names a list of Ultralytics or a disk cannot hold (line ends, ./, ../, //, a space at the "
    "end, more than 255 bytes)"
)
PASSED_OVER = "images that Ultralytics passes over"
IN_VALIDATION = "images held back for validation"


def write_yolo(
    source: ExportSource,
    place: Store,
    loss: Loss,
    *,
    tolerance_px: float,
    val: float = 0.0,
    pictures: ImageFiles | None = None,
) -> Iterator[str]:
    """Write the label files, data.yaml, images.txt and classes.json; yields their keys.

    Classes count from 0 without gaps, in the order of their ids; classes.json has the ids. An image
    without objects has an empty file. Images whose name no line of images.txt or no disk can hold are
    skipped.
    `tolerance_px`: how far an outline may move to save points. `val`: the share of images, chosen by their
    ids, that is listed in val.txt and not in train.txt. `pictures`: they are put into images/ too.

    Raises:
        UsageError: two images would share one label file, because they differ in their ending alone (or in
            what the file system there takes for equal), or one's would be a folder of the other's.
    """
    refuse_shared_files(source, lambda name: label_key(name) if _fits(name) else None)
    places = source.classes.places()
    lists: dict[bool, list[str]] = {False: [], True: []}
    for rows in source.images():
        name = source.file_name(rows.image)
        line, key = f"./images/{name}", label_key(name)
        if not _fits(name):
            source.skip(rows, _UNFIT_NAMES)
            continue
        if pictures is not None and not pictures.beside(source, rows, line.removeprefix("./")):
            continue
        lists[is_validation(str(rows.image["image_id"]), val)].append(line)
        source.tally[PASSED_OVER] += _is_passed_over(name, rows.image)
        text = [_line(row, places[source.classes.id_of(row)], loss, tolerance_px) for row in rows.instances]
        if not place.put_if_absent(key, "".join(text).encode()):
            raise UsageError(shared_file(None, name, key))
        yield key
    both = bool(lists[True] and lists[False])
    source.tally[IN_VALIDATION] += len(lists[True]) if both else 0
    files = {"images.txt": [*lists[False], *lists[True]]}
    if both:
        files |= {"train.txt": lists[False], "val.txt": lists[True]}
    for key, lines in files.items():
        place.put(key, "".join(f"{line}\n" for line in lines).encode())
    place.put("data.yaml", _data_yaml(source, split=both).encode())
    place.put("classes.json", json.dumps(_class_map(source), ensure_ascii=False, indent=1).encode())
    yield from (*files, "data.yaml", "classes.json")


def is_validation(image_id: str, share: float) -> bool:
    """Return whether an image is held back, of which `share` of all are: by the sha256 of its id alone."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8]) < share * 2**64


def _data_yaml(source: ExportSource, *, split: bool) -> str:
    names = [source.classes.names[number] for number in source.classes.places()]
    listing = "".join(f"  {place}: {yaml_text(name)}\n" for place, name in enumerate(names))
    named = f"names:\n{listing}" if listing else "names: {}\n"
    train, val = ("train.txt", "val.txt") if split else ("images.txt", "images.txt")
    # Without `path` the lists are expected next to data.yaml; `path: .` would be the current folder.
    return f"train: {train}\nval: {val}\n{named}"


def _fits(name: str) -> bool:
    """Return whether a list of Ultralytics, and a disk, can hold the name of an image."""
    line = f"./images/{name}"
    return _can_be_listed(line) and can_be_a_file(line.removeprefix("./")) and can_be_a_file(label_key(name))


def label_key(name: str) -> str:
    """Return where the label file of the picture `images/<name>` is expected, below the export's folder."""
    before, _, after = f"/images/{name}".rpartition("/images/")
    return f"{without_ending(f'{before}/labels/{after}')}.txt".removeprefix("/")


def _can_be_listed(line: str) -> bool:
    """Return whether a reader that cuts by `splitlines` and replaces every "./" reads the line as meant."""
    return line.splitlines() == [line] and line.strip() == line and "./" not in line[1:]


def _is_passed_over(name: str, image: Row) -> bool:
    small = min(image["width"], image["height"]) < _LEAST_SIDE
    return small or name.rpartition(".")[2].lower() not in ENDINGS


def yaml_text(text: str) -> str:
    """Return a YAML string that every reader gives back equal: quoted, and escaped but for what prints."""
    plain = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(plain)}"'


def _line(row: Row, place: int, loss: Loss, tolerance_px: float) -> str:
    height, width = row["segmentation"]["size"]
    mask = mask_of(row)
    polygon = filled_polygon_of(mask, tolerance_px)
    text = " ".join(f"{value:.6f}".rstrip("0").rstrip(".") for value in (polygon / [width, height]).ravel())
    as_read = np.array(text.split(" "), dtype=np.float32).reshape(-1, 2)
    as_read *= np.array([width, height], dtype=np.float32)
    loss.add(filled_iou(as_read.astype(np.float64), mask))
    return f"{place} {text}\n"


def _class_map(source: ExportSource) -> list[dict[str, object]]:
    return [
        {"class": place, "category_id": source.classes.given_id(number), "name": source.classes.names[number]}
        for number, place in source.classes.places().items()
    ]
