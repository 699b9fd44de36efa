"""Ground truth: a COCO instances file with masks, read record by record, every mask as compressed runs.

Polygons and uncompressed runs become compressed runs by pycocotools, as its own evaluation does it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pycocotools import mask as coco_mask

from pipeline.errors import JobRefused, clean_text
from pipeline.json_arrays import JsonDamage, split_arrays
from pipeline.records import AccessRules
from pipeline.storage import open_input, options_for

Box = tuple[float, float, float, float]
_WANTED = "wanted a COCO instances file: an object with lists `images`, `annotations` and `categories`"


@dataclass(frozen=True, kw_only=True, slots=True)
class TruthImage:
    """An image that the file names; `size_hw` in pixels, as the file says."""

    image_id: str
    file_name: str
    size_hw: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TruthObject:
    """One annotated object. `bbox_xywh`, `area`: as the file says (COCO's sizes rest on its `area`).

    `counts`: the mask as COCO compressed runs, of the size of its image.
    """

    annotation_id: str
    image_id: str
    category_id: int
    bbox_xywh: Box
    area: float
    is_crowd: bool
    counts: str


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A whole file. `objects` by image id, in the order of the file; `categories`: id to name."""

    images: Mapping[str, TruthImage]
    objects: Mapping[str, tuple[TruthObject, ...]]
    categories: Mapping[int, str]


def read_truth(uri: str, access: AccessRules) -> Truth:
    """The ground truth in a COCO instances file, local or in a store. Memory: its masks, as runs.

    Raises:
        JobRefused: no such file, no JSON of that shape, or an annotation without a mask; says which.
    """
    lines: dict[str, list[bytes]] = {}
    try:
        with open_input(uri, options_for(uri, access)) as stream:
            for block in split_arrays(stream, ("images", "annotations", "categories")):
                lines.setdefault(block.name, []).append(block.text)
        images = {image.image_id: image for image in map(_image, _records(lines, "images"))}
        objects: dict[str, list[TruthObject]] = {}
        for record in _records(lines, "annotations"):
            one = _object(record, images)
            objects.setdefault(one.image_id, []).append(one)
        names = {int(record["id"]): str(record["name"]) for record in _records(lines, "categories")}
    except (JsonDamage, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise JobRefused(f"{uri}: {clean_text(_said(error))}; {_WANTED}") from error
    return Truth(images=images, objects={k: tuple(v) for k, v in objects.items()}, categories=names)


def _said(error: Exception) -> str:
    return f"a record has no {error.args[0]}" if isinstance(error, KeyError) else str(error)


def _records(lines: Mapping[str, list[bytes]], name: str) -> Iterator[Any]:
    if name not in lines:
        raise ValueError(f"there is no list `{name}`")
    for text in lines[name]:
        yield from (json.loads(line) for line in text.split(b"\n") if line.strip())


def _image(record: Mapping[str, Any]) -> TruthImage:
    return TruthImage(
        image_id=str(record["id"]),
        file_name=str(record.get("file_name", "")),
        size_hw=(int(record["height"]), int(record["width"])),
    )


def _object(record: Mapping[str, Any], images: Mapping[str, TruthImage]) -> TruthObject:
    image = images.get(str(record["image_id"]))
    if image is None:
        raise ValueError(f"annotation {record['id']} is of image {record['image_id']}, which is not listed")
    counts = _runs(record, image.size_hw)
    rle = {"size": list(image.size_hw), "counts": counts.encode("ascii")}
    bbox = record.get("bbox") or coco_mask.toBbox(rle).tolist()
    area = record.get("area")
    return TruthObject(
        annotation_id=str(record["id"]),
        image_id=image.image_id,
        category_id=int(record["category_id"]),
        bbox_xywh=(float(bbox[0]), float(bbox[1]), float(bbox[2]), float(bbox[3])),
        area=float(coco_mask.area(rle)) if area is None else float(area),
        is_crowd=bool(record.get("iscrowd", 0)),
        counts=counts,
    )


def _runs(record: Mapping[str, Any], size_hw: tuple[int, int]) -> str:
    """The mask of an annotation: polygons, uncompressed runs or compressed runs."""
    found = record.get("segmentation")
    what = f"annotation {record['id']}"
    if not found:
        raise ValueError(f"{what} has no segmentation; masks cannot be compared with boxes")
    height, width = size_hw
    if isinstance(found, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(found, height, width))
    elif isinstance(found["counts"], list):
        rle = coco_mask.frPyObjects(found, height, width)
    else:
        rle = {"size": found["size"], "counts": found["counts"].encode("ascii")}
        coco_mask.area(rle)  # raises for a string that is none
    if list(rle["size"]) != [height, width]:
        raise ValueError(f"{what} has a mask of size {rle['size']}; its image is {[height, width]}")
    return bytes(rle["counts"]).decode("ascii")
