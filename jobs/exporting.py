"""What every export format is given: images with their selected masks, the classes, a place to write.

    published tables -> selection -> what the format can hold -> the format's own file

What is left out is counted here, so that each format says the same of it. Nothing is guessed about an
image that the tables do not know: a failed one is no picture without objects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from pycocotools import mask as coco_mask

from jobs.selection import Selection, selected_images
from jobs.tables import ImageRows, Row, row_groups
from pipeline import schema
from pipeline.errors import UsageError
from pipeline.ledger import Job
from pipeline.manifest import Manifest
from pipeline.storage import Store

INSTANCE_COLUMNS = (
    *("instance_index", "box_id", "category_id", "category_name", "prompt_bbox", "bbox"),
    *("segmentation", "area", "detector_score", "predicted_iou", "stability_score", "accepted"),
)
_NO_CLASS_NAME = "object"


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of the tables: names by id, ids as the input gave them (they may have gaps).

    `of_unnamed`: the id that instances without any class are given, None when there are none.
    """

    names: Mapping[int, str]
    of_unnamed: int | None

    def id_of(self, instance: Row) -> int:
        """The class of a row of `instances`."""
        number = instance["category_id"]
        if number is None:
            assert self.of_unnamed is not None, "find_classes saw every row"
            return self.of_unnamed
        return int(number)

    def places(self) -> dict[int, int]:
        """Each id's place among the sorted ids: numbers from 0 without gaps."""
        return {number: place for place, number in enumerate(sorted(self.names))}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The tables of a job as an export reads them. `tally`: what was counted while it was read."""

    store: Store
    job: Job
    manifest: Manifest
    selection: Selection
    classes: Classes
    folder: str
    """What all image uris begin with, ending in "/", or ""."""
    tally: Counter[str] = field(default_factory=Counter)

    def images(self) -> Iterator[ImageRows]:
        """Every image that can be handed on, with its selected masks; empty masks and failures are not.

        Under a filter, an image whose instances all fell to it is left out: it is no picture without
        objects. One without boxes stays, unless an SQL condition chose.
        """
        for rows in selected_images(self.store, self.manifest, self.selection, INSTANCE_COLUMNS):
            masks = tuple(row for row in rows.instances if row["area"])
            if not self._belongs(rows.image, masks):
                continue
            self.tally["images"] += 1
            self.tally["masks"] += len(masks)
            self.tally["rows without a mask"] += len(rows.instances) - len(masks)
            self.tally["masks that the filters did not accept"] += sum(not row["accepted"] for row in masks)
            self.tally["images turned by EXIF"] += rows.image["exif_orientation"] not in (None, 1)
            yield ImageRows(image=rows.image, instances=masks)

    def _belongs(self, image: Row, masks: Sequence[Row]) -> bool:
        why = None
        if image["status"] == "failed":
            why = "images that failed"
        elif image["width"] is None:
            why = "images without boxes, which were never opened, so that their size is unknown"
        elif image["status"] == "no_boxes" and image["num_boxes"]:
            why = "images whose boxes were all left without a mask by the job's rules"
        elif not masks and not self.selection.is_all:
            empty_by_itself = image["status"] == "no_boxes" and self.selection.where is None
            why = None if empty_by_itself else "images of which nothing was selected"
        if why is not None:
            self.tally[why] += 1
        return why is None

    def file_name(self, image: Row) -> str:
        """A relative path for the image: its id where the uri ends in it, else the uri without `folder`."""
        uri, image_id = str(image["image_uri"]), str(image["image_id"])
        if uri.endswith("/" + image_id):
            return image_id
        return uri.removeprefix(self.folder).replace("://", "/").lstrip("/")


def open_source(store: Store, job: Job, manifest: Manifest, selection: Selection) -> Source:
    """The tables, after one look at all classes and uris."""
    return Source(
        store=store,
        job=job,
        manifest=manifest,
        selection=selection,
        classes=find_classes(store, manifest),
        folder=_common_folder(store, manifest),
    )


def find_classes(store: Store, manifest: Manifest) -> Classes:
    """Every class that a published row has. UsageError when one id has two names, or a name no id."""
    names: dict[int, str] = {}
    unnamed = False
    for part in manifest.parts:
        for group in row_groups(store, part.instances, schema.INSTANCES, ["category_id", "category_name"]):
            for row in group.group_by(["category_id", "category_name"]).aggregate([]).to_pylist():
                number, name = row["category_id"], row["category_name"]
                if number is None and name is not None:
                    raise UsageError(f"the class {name!a} has no category_id, which every format needs")
                if number is None:
                    unnamed = True
                elif names.setdefault(number, name or str(number)) != (name or str(number)):
                    raise UsageError(f"category_id {number} has two names: {names[number]!a} and {name!a}")
    of_unnamed = max([0, *names]) + 1 if unnamed else None
    if of_unnamed is not None:
        names[of_unnamed] = _NO_CLASS_NAME
    return Classes(names=dict(sorted(names.items())), of_unnamed=of_unnamed)


def _common_folder(store: Store, manifest: Manifest) -> str:
    common: str | None = None
    for part in manifest.parts:
        for group in row_groups(store, part.images, schema.IMAGES, ["image_uri"]):
            ends = pc.min_max(group["image_uri"]).as_py()  # the least and greatest share most
            for uri in (ends["min"], ends["max"]):
                if uri is not None:
                    folder = uri[: uri.rfind("/") + 1]
                    common = folder if common is None else _shared(common, folder)
    return common or ""


def _shared(one: str, other: str) -> str:
    """The folder that both are in, ending in "/", or ""."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return one[: one.rfind("/", 0, same) + 1]


def mask_of(instance: Row) -> npt.NDArray[np.uint8]:
    """The mask of a row, uint8 (H, W), 1 inside."""
    rle = instance["segmentation"]
    return np.asarray(coco_mask.decode({"size": rle["size"], "counts": rle["counts"].encode("ascii")}))


def number_text(value: float | None) -> str:
    """A float32 as JSON with all it holds, `null` for none."""
    return "null" if value is None else f"{value:.9g}"
