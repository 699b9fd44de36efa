"""Tables -> WebDataset: tars of samples, each the JSON of an image with its masks, and its picture if asked.

A sample's files have its number as their name, not the image's: WebDataset cuts a name at its first dot, and
a tar's reader may write where a name points. By the ending it chooses a decoder, and those of `pyd` and `pth`
run code, so a picture has a picture's ending or `img`, which none decodes. The image's id and uri stand in
the JSON, masks as COCO's runs.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hqlabel.jobs.export.export_source import UNREADABLE, ExportSource
from hqlabel.jobs.results.read_tables import ImageRows
from hqlabel.pipeline.storage.output_store import Store

if TYPE_CHECKING:
    from hqlabel.jobs.export.image_files import ImageFiles

_MOST_BYTES = 256 * 2**20
_PICTURES = frozenset(
    (
        *("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jpeg", "jpg", "mpo"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
    )
)
_OF_IMAGE = ("image_id", "image_uri", "width", "height")
_OF_MASK = (
    *(
        "instance_index",
        "box_id",
        "category_id",
        "category_name",
        "bbox",
        "prompt_bbox",
        "area",
        "segmentation",
    ),
    *("detector_score", "predicted_iou", "stability_score", "accepted"),
)


def write_webdataset(
    source: ExportSource, place: Store, *, per_file: int, pictures: ImageFiles | None = None
) -> Iterator[str]:
    """Write shard-000000.tar and so on, at most `per_file` masks and about 256 MiB each, and classes.json.

    Yields the files' keys. `class` of a mask counts from 0; classes.json names them. `pictures`: each stands
    before its JSON. Memory: one file.
    """
    shard, written = _Shard(), 0
    for number, rows in enumerate(source.images()):
        picture = None
        if pictures is not None:
            picture = pictures.bytes_of(rows.image)
            if picture is None:
                source.skip(rows, UNREADABLE)
                continue
        if shard.is_full(len(rows.instances), per_file):
            yield _put(place, written, shard)
            shard, written = _Shard(), written + 1
        shard.add(f"{number:09d}", _sample(source, rows), picture, _ending(source.file_name(rows.image)))
        shard.masks += len(rows.instances)
    yield _put(place, written, shard)
    classes = [
        {
            "class": place_,
            "category_id": source.classes.given_id(number),
            "name": source.classes.names[number],
        }
        for number, place_ in source.classes.places().items()
    ]
    place.put("classes.json", json.dumps(classes, ensure_ascii=False, indent=1).encode())
    yield "classes.json"


class _Shard:
    """One tar as it grows. `masks`: in it so far. Equal samples give equal bytes: no times, no owner."""

    def __init__(self) -> None:
        self._body = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._body, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.masks = self.samples = 0

    def is_full(self, more: int, per_file: int) -> bool:
        """Return whether a sample with that many more masks belongs in the next shard."""
        too_many = self.masks + more > per_file or self.samples >= per_file
        return bool(self.samples) and (too_many or self._body.tell() > _MOST_BYTES)

    def add(self, key: str, sample: dict[str, Any], picture: bytes | None, ending: str) -> None:
        """Append a sample's files, one after the other, as WebDataset wants them."""
        files = [] if picture is None else [(ending, picture)]
        files.append(("json", json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode()))
        for name, data in files:
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self.samples += 1

    def finish(self) -> bytes:
        """Return the whole file."""
        self._tar.close()
        return self._body.getvalue()


def _put(place: Store, number: int, shard: _Shard) -> str:
    key = f"shard-{number:06d}.tar"
    place.put(key, shard.finish())
    return key


def _sample(source: ExportSource, rows: ImageRows) -> dict[str, Any]:
    places = source.classes.places()
    masks = [
        {name: row[name] for name in _OF_MASK} | {"class": places[source.classes.id_of(row)]}
        for row in rows.instances
    ]
    return {name: rows.image[name] for name in _OF_IMAGE} | {"masks": masks}


def _ending(name: str) -> str:
    """Return what a picture's name ends in, in small letters; `img` where that is no picture's ending."""
    ending = name.rpartition(".")[2].lower()
    return ending if ending in _PICTURES else "img"
