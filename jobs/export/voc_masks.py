"""Tables -> indexed PNGs as Pascal VOC has them: one picture of classes and one of objects for each image.

A pixel has one value, so masks that overlap are drawn from the largest to the smallest (of equal ones the
later one over the earlier): a small object in front of or within a large one stays whole. What that hides is
measured. 0 is the background, 255 stays free (VOC's void), colours are VOC's.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from hqlabel.jobs.export.export_names import (
    can_be_a_file,
    labels_of,
    refuse_shared_files,
    shared_file,
    without_ending,
)
from hqlabel.jobs.export.export_source import ExportSource, Loss, mask_of
from hqlabel.jobs.results.read_tables import ImageRows
from hqlabel.pipeline.errors import UsageError
from hqlabel.pipeline.storage.output_store import Store

if TYPE_CHECKING:
    from hqlabel.jobs.export.image_files import ImageFiles

UNFIT = "images whose names a list of Pascal VOC or a disk cannot hold (line ends, #, ./, ../, //, 255 bytes)"
TOO_MANY = "images with more than 254 masks, which a PNG of one byte a pixel cannot tell apart"
_MOST = 254
_LIST = "ImageSets/Segmentation/default.txt"
# A line of labelmap.txt is name:colour:parts:actions; spaces around it and a # before it go, 0 has this name.
_NOT_IN_LABELMAP = re.compile(r"\A\s|\s\Z|\A#|[:\x00-\x1f\x7f\x85\u2028\u2029]|\Ab(?=ackground\Z)")


def write_png(
    source: ExportSource, place: Store, loss: Loss, *, pictures: ImageFiles | None = None
) -> Iterator[str]:
    """Write SegmentationClass/, SegmentationObject/, the list of images, labelmap.txt and classes.json.

    Yields the files' keys. `pictures`: they are put into JPEGImages/.

    Raises:
        UsageError: more than 254 classes, or two images would share a file.
    """
    numbers = {number: place_ + 1 for number, place_ in source.classes.places().items()}
    if len(numbers) > _MOST:
        raise UsageError(
            f"export png: {len(numbers)} classes; a PNG of one byte a pixel tells {_MOST} apart; wanted "
            "another format, such as coco, or boxes with fewer classes"
        )
    labels = labels_of(source.classes, _NOT_IN_LABELMAP, distinct=True)
    refuse_shared_files(source, _stem)
    listed: list[str] = []
    for rows in source.images():
        name = source.file_name(rows.image)
        stem = _stem(name)
        if stem is None or len(rows.instances) > _MOST:
            source.skip(rows, UNFIT if stem is None else TOO_MANY)
            continue
        if pictures is not None and not pictures.beside(source, rows, f"JPEGImages/{name}"):
            continue
        listed.append(stem)
        of_classes, of_objects = _painted(source, rows, numbers, loss)
        for key, values in (
            (f"SegmentationClass/{stem}.png", of_classes),
            (f"SegmentationObject/{stem}.png", of_objects),
        ):
            if not place.put_if_absent(key, _png(values)):
                raise UsageError(shared_file(None, name, key))
            yield key
    place.put(_LIST, "".join(f"{stem}\n" for stem in listed).encode())
    place.put("labelmap.txt", _label_map(labels, numbers).encode())
    place.put("classes.json", json.dumps(_class_map(source, numbers), ensure_ascii=False, indent=1).encode())
    yield from (_LIST, "labelmap.txt", "classes.json")


def _stem(name: str) -> str | None:
    """Return an image's line in the list; None where a list or a disk cannot hold it."""
    stem = without_ending(name)
    fits = stem.splitlines() == [stem] and stem.strip() == stem and not stem.startswith("#")
    return stem if fits and can_be_a_file(name) and can_be_a_file(f"SegmentationObject/{stem}.png") else None


def _painted(
    source: ExportSource, rows: ImageRows, numbers: Mapping[int, int], loss: Loss
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    size = (rows.image["height"], rows.image["width"])
    of_classes, of_objects = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    order = sorted(range(len(rows.instances)), key=lambda at: (-rows.instances[at]["area"], at))
    for at in order:
        row = rows.instances[at]
        inside = mask_of(row) == 1
        of_classes[inside] = numbers[source.classes.id_of(row)]
        of_objects[inside] = at + 1
    seen = np.bincount(of_objects.ravel(), minlength=_MOST + 1)
    for at, row in enumerate(rows.instances):
        loss.add(float(seen[at + 1] / row["area"]))
    return of_classes, of_objects


def palette() -> npt.NDArray[np.uint8]:
    """Return Pascal VOC's 256 colours, (256, 3): the bits of an index, three by three, from the top down."""
    index = np.arange(256)
    colours = np.zeros((256, 3), np.int64)
    for shift in range(8):
        bits = index >> (3 * shift)
        colours |= np.stack([(bits >> channel & 1) << (7 - shift) for channel in range(3)], axis=1)
    return colours.astype(np.uint8)


def _png(values: npt.NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(values).convert("L")
    picture.putpalette(palette().tobytes())
    body = io.BytesIO()
    picture.save(body, "PNG")
    return body.getvalue()


def _label_map(labels: Mapping[int, str], numbers: Mapping[int, int]) -> str:
    colours = palette().tolist()
    lines = [("background", 0), *((labels[number], place) for number, place in numbers.items())]
    rows = (f"{name}:{','.join(map(str, colours[place]))}::\n" for name, place in lines)
    return f"# label:color_rgb:parts:actions\n{''.join(rows)}"


def _class_map(source: ExportSource, numbers: Mapping[int, int]) -> list[dict[str, object]]:
    classes = source.classes
    return [
        {"value": place, "category_id": classes.given_id(number), "name": classes.names[number]}
        for number, place in numbers.items()
    ]
