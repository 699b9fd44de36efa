"""What every export format is given: images with their selected masks, the classes, a place to write.

    published tables -> selection -> what the format can hold -> the format's own file

What is skipped is counted here, so that each format reports the same. Nothing is guessed about an
image that the tables do not know: a failed one is no picture without objects.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from hqlabel.jobs.results.read_tables import ImageRows, Row, row_groups
from hqlabel.jobs.results.select_rows import Selection, selected_images
from hqlabel.model.rle import rle_to_mask
from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import DamageFound, count
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.storage.archive_uris import parse_archive_uri
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import Manifest

INSTANCE_COLUMNS = (
    *("instance_index", "box_id", "category_id", "category_name", "prompt_bbox", "bbox"),
    *("segmentation", "area", "detector_score", "predicted_iou", "stability_score", "accepted"),
    "reject_reason",
)
_NO_CLASS_NAME = "object"
UNREADABLE = "images that could not be read"
INSIDE_OTHERS = "images inside other files"
_LOW = 0.95


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of the tables: names by id, ids as the input gave them (they may have gaps).

    `lone`: the ids of names that some rows have without an id. `of_unnamed`: the id that instances without
    any class are given, None when there are none. `numbered_here`: ids that the tables do not have.
    `several_names`: ids that have other names in some rows than in `names`.
    """

    names: Mapping[int, str]
    lone: Mapping[str, int] = field(default_factory=dict)
    of_unnamed: int | None = None
    numbered_here: frozenset[int] = frozenset()
    several_names: frozenset[int] = frozenset()

    def id_of(self, instance: Row) -> int:
        """Return the class of a row of `instances`."""
        number, name = instance["category_id"], instance["category_name"]
        if number is not None:
            return int(number)
        if name:
            return self.lone[name]
        assert self.of_unnamed is not None, "find_classes saw every row"
        return self.of_unnamed

    def given_id(self, number: int) -> int | None:
        """Return the id as the tables have it; None for a class that is numbered here alone."""
        return None if number in self.numbered_here else number

    def places(self) -> dict[int, int]:
        """Return each id's place among the sorted ids: numbers from 0 without gaps."""
        return {number: place for place, number in enumerate(sorted(self.names))}

    def doubled(self) -> list[str]:
        """Return the names that several ids have."""
        return sorted(name for name, times in Counter(self.names.values()).items() if times > 1)

    def distinct_names(self) -> dict[int, str]:
        """Return names by id, those that several ids have with the id behind, for formats of names alone."""
        found, taken, doubled = dict(self.names), set(self.names.values()), set(self.doubled())
        for number, name in self.names.items():
            if name not in doubled:
                continue
            found[number] = f"{name} ({number})"
            while found[number] in taken:
                found[number] += "'"
            taken.add(found[number])
        return found


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """The tables of a job as an export reads them.

    `columns`: of instances. `tally`: what was counted while it was read.
    """

    store: Store
    job: Job
    manifest: Manifest
    selection: Selection
    classes: Classes
    columns: Sequence[str] = INSTANCE_COLUMNS
    folder: str
    """What all image uris begin with, ending in "/", or ""."""
    named_by_id: bool
    """Whether every uri ends in its image's id. Some alone would not do: two images could get one name."""
    root: str | None
    """What is before every file name in the uris; None where that differs."""
    tally: Counter[str] = field(default_factory=Counter)
    roots: set[str | None] = field(default_factory=set)
    """What is before the file names in the uris of the images so far; None for an image without that."""

    def images(self) -> Iterator[ImageRows]:
        """Yield every image that can be handed on, with its selected masks; empty masks and failures are not.

        With `selection.with_crowds` crowd regions are among the masks, marked by their reject_reason.

        Under a filter, an image whose instances all fell to it is skipped: it is no picture without
        objects. One without boxes stays, unless an SQL condition chose.
        """
        for rows in selected_images(self.store, self.manifest, self.selection, self.columns):
            crowds = sum(is_crowd(row) for row in rows.instances)
            chosen = tuple(row for row in rows.instances if row["area"] or self._is_region(row))
            if not self._belongs(rows.image, chosen):
                continue
            regions = sum(is_crowd(row) for row in chosen)
            self.tally["crowd regions (iscrowd 1), which are no objects"] += crowds - regions
            self.tally["rows without a mask"] += len(rows.instances) - len(chosen) - (crowds - regions)
            one = ImageRows(image=rows.image, instances=chosen)
            self._count(one, 1)
            yield one

    def skip(self, rows: ImageRows, why: str) -> None:
        """Count an image that `images` yielded as skipped: this format cannot hold it."""
        self._count(rows, -1)
        self.tally[why] += 1

    def _count(self, rows: ImageRows, sign: int) -> None:
        masks = [row for row in rows.instances if not is_crowd(row)]
        self.tally["images"] += sign
        self.tally["masks"] += sign * len(masks)
        self.tally["crowds"] += sign * (len(rows.instances) - len(masks))
        self.tally["masks that the filters did not accept"] += sign * sum(
            not row["accepted"] for row in masks
        )
        nameless = sum(row["category_id"] is None and not row["category_name"] for row in masks)
        self.tally["masks without a class"] += sign * nameless
        self.tally["images turned by EXIF"] += sign * (rows.image["exif_orientation"] not in (None, 1))
        uri = str(rows.image["image_uri"])
        self.tally[INSIDE_OTHERS] += sign * (parse_archive_uri(uri) is not None)
        if sign > 0 and len(self.roots) < 2:
            self.roots.add(self._root(rows.image))

    def _root(self, image: Row) -> str | None:
        uri, name = str(image["image_uri"]), self.file_name(image)
        return uri.removesuffix(name) if uri.endswith("/" + name) and parse_archive_uri(uri) is None else None

    def _is_region(self, row: Row) -> bool:
        return self.selection.with_crowds and is_crowd(row) and row["prompt_bbox"] is not None

    def _belongs(self, image: Row, chosen: Sequence[Row]) -> bool:
        why = None
        masks = [row for row in chosen if not is_crowd(row)]
        # Regions and nothing else: what is in the picture is known.
        all_known = bool(chosen) and not masks and len(chosen) == image["num_boxes"]
        if image["status"] == "failed":
            why = "images that failed"
        elif image["width"] is None:
            why = "images without boxes, which were never opened, so that their size is unknown"
        elif image["status"] == "no_boxes" and image["num_boxes"] and not all_known:
            why = "images whose boxes were all left without a mask: crowds, or by the job's rules"
        elif not masks and not all_known and not self.selection.is_all:
            empty_by_itself = image["status"] == "no_boxes" and self.selection.where is None
            why = None if empty_by_itself else "images of which nothing was selected"
        if why is not None:
            self.tally[why] += 1
        return why is None

    def file_name(self, image: Row) -> str:
        """Return a relative path that no other image has: its id, or the uri without `folder`."""
        if self.named_by_id:
            return str(image["image_id"])
        uri = str(image["image_uri"])
        return uri.removeprefix(self.folder).replace("://", "/").lstrip("/")


@dataclass(kw_only=True)
class Loss:
    """The IoU of every mask with what was written of it: their sum, least, how many are low, and how many 0.

    `what`: the beginning of the sentence about it.
    """

    what: str = "polygons keep"
    number: int = 0
    total: float = 0.0
    least: float = 1.0
    low: int = 0
    gone: int = 0

    def add(self, iou: float) -> None:
        """Count one mask."""
        self.number += 1
        self.total += iou
        self.least = min(self.least, iou)
        self.low += iou < _LOW
        self.gone += iou == 0

    @property
    def mean(self) -> float | None:
        """Return the mean IoU, None for no mask."""
        return self.total / self.number if self.number else None

    def sentence(self) -> str:
        """Return what the format costs, as text."""
        if self.mean is None:
            return "no mask was written"
        low = f"{count(self.low, 'mask')} below {_LOW:g}"
        gone = f", {self.gone:,} of them lost wholly" if self.gone else ""
        return f"{self.what} IoU {self.mean:.4f} on average, {self.least:.3f} at worst, {low}{gone}"


def open_source(store: Store, job: Job, manifest: Manifest, selection: Selection) -> ExportSource:
    """Return the tables, after one pass over all classes and uris."""
    folder = _common_folder(store, manifest)
    named_by_id, root = _naming(store, manifest, folder)
    return ExportSource(
        store=store,
        job=job,
        manifest=manifest,
        selection=selection,
        classes=find_classes(store, manifest),
        folder=folder,
        named_by_id=named_by_id,
        root=root,
    )


def find_classes(store: Store, manifest: Manifest) -> Classes:
    """Return every class that a published row has.

    An id that some rows name and others do not has that name; a name without an id has the id that other
    rows give it, if they give it one alone, else a new one behind all others.
    Of several names of one id the first by its bytes is taken.
    """
    pairs: set[tuple[int | None, str | None]] = set()
    for part in manifest.parts:
        for group in row_groups(store, part.instances, schema.INSTANCES, ["category_id", "category_name"]):
            for row in group.group_by(["category_id", "category_name"]).aggregate([]).to_pylist():
                pairs.add((row["category_id"], row["category_name"] or None))
    names: dict[int, str] = {}
    several: set[int] = set()
    both = [(number, name) for number, name in pairs if number is not None and name is not None]
    for number, name in sorted(both, key=lambda pair: (pair[0], pair[1].encode())):
        if names.setdefault(number, name) != name:
            several.add(number)
    names |= {number: str(number) for number, _ in pairs if number is not None and number not in names}
    by_name = {name: number for number, name in names.items()}
    ambiguous = {name for name, times in Counter(names.values()).items() if times > 1}
    lone: dict[str, int] = {}
    for name in sorted({name for number, name in pairs if number is None and name}, key=str.encode):
        known = None if name in ambiguous else by_name.get(name)
        lone[name] = max([0, *names]) + 1 if known is None else known
        names[lone[name]] = name
    of_unnamed = max([0, *names]) + 1 if (None, None) in pairs else None
    if of_unnamed is not None:
        names[of_unnamed] = _NO_CLASS_NAME
    return Classes(
        names=dict(sorted(names.items())),
        lone=lone,
        of_unnamed=of_unnamed,
        numbered_here=frozenset(names) - {number for number, _ in pairs if number is not None},
        several_names=frozenset(several),
    )


def _common_folder(store: Store, manifest: Manifest) -> str:
    """Return the folder that all uris are in, ending in "/", or ""."""
    ends: list[str] = []
    for part in manifest.parts:
        for group in row_groups(store, part.images, schema.IMAGES, ["image_uri"]):
            uris = pc.min_max(group["image_uri"]).as_py()  # the least and the greatest have least in common
            ends += [uri for uri in uris.values() if uri is not None]
            ends = [os.path.commonprefix(ends)] if ends else []  # noqa: RUF071, cut at a "/" below
    return ends[0][: ends[0].rfind("/") + 1] if ends else ""


def _naming(store: Store, manifest: Manifest, folder: str) -> tuple[bool, str | None]:
    """Return whether images are named by their ids, and what is before every name in the uris."""
    roots: set[str] = set()
    for part in manifest.parts:
        for group in row_groups(store, part.images, schema.IMAGES, ["image_uri", "image_id"]):
            pairs = zip(group["image_uri"].to_pylist(), group["image_id"].to_pylist(), strict=True)
            for uri, image_id in pairs:
                if not uri.endswith(f"/{image_id}"):
                    return False, folder or None
                if len(roots) < 2:
                    roots.add(uri.removesuffix(image_id))
    return True, roots.pop() if len(roots) == 1 else None


def is_crowd(instance: Row) -> bool:
    """Return whether a row is a region of many objects, which has no mask."""
    return bool(instance["reject_reason"] == "crowd")


def mask_of(instance: Row) -> npt.NDArray[np.uint8]:
    """Return the mask of a row, uint8 (H, W), 1 inside.

    Raises:
        DamageFound: its runs are none.
    """
    rle = instance["segmentation"]
    try:
        # Not pycocotools, which reads memory that it has not written where the runs end early.
        return rle_to_mask(rle["counts"], (rle["size"][0], rle["size"][1])).view(np.uint8)
    except ValueError as error:
        raise DamageFound(
            f"the stored runs of instance {instance['instance_index']} of an image cannot be decoded "
            f"({error}); `hqlabel validate` names all such, then publish again"
        ) from error
