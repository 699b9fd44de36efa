"""Ground truth: a COCO instances file with masks, read record by record, every mask as compressed runs.

Other programs write such files, each with its own habits, and the C code of pycocotools checks nothing:
runs that stop early make it loop for ever, a point at 1e8 fills the memory, four numbers become a box. So
every number is checked here before any work, and docs/results.md states for each habit what becomes of it:
read as pycocotools reads it, read by a rule and counted, or refused with the record's id.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from hqlabel.model.rle import MASKS_PER_BATCH, SHORT_PIXELS, compress_lengths, rle_faults
from hqlabel.pipeline.errors import JobRefused, clean_text
from hqlabel.pipeline.inputs.json_records import Lines, TextDamage, refuse_other_bytes, split_arrays
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.storage.read_objects import open_input
from hqlabel.pipeline.storage.uri_rules import options_for

Box = tuple[float, float, float, float]
Record = Mapping[str, Any]
Float64Array = npt.NDArray[np.float64]

MAX_SIDE = 10_000_000
MAX_REACH = 10
"""How far a polygon's point may lie outside the picture, in lengths of the picture's longer side."""
MAX_OUTLINE = 4_000_000
"""Pixels, of an annotation's polygons from point to point. pycocotools walks them in steps of 0.2 pixels and
keeps every step: so long an outline takes it 0.6 s and 250 MB."""
MAX_AREA = 1e10
"""COCO's own largest: pycocotools passes over objects with a larger `area`, whatever their size."""

ODD_BOX_IOU = 0.5
"""Boxes that agree less well than this with their masks are counted: they decide which prompt is whose."""

_WANTED = "wanted a COCO instances file: an object with lists `images`, `annotations` and `categories`"
_WHOLE_TEXT = re.compile(r"(-?[0-9]{1,18})(?:\.0+)?")
_EXAMPLES = 3
_KINDS = 6
_SHOWN = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class TruthImage:
    """An image that the file lists; `size_hw`: pixels, as in the file.

    `size_hw` is None where the file has no size (null, 0 or no key); such an image has no objects.
    """

    image_id: str
    file_name: str
    size_hw: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TruthObject:
    """One annotated object. `bbox_xywh`, `area`: as in the file (COCO's sizes rest on its `area`).

    `counts`: the mask as COCO compressed runs, of the size of its image. `category_id`: one of the file's
    categories; None where classes do not count.
    """

    annotation_id: str
    image_id: str
    category_id: int | None
    bbox_xywh: Box
    area: float
    is_crowd: bool
    counts: str


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A whole file. `objects` by image id, in the order of the file; `categories`: id to name ("": none).

    `rules`: what was read by a rule of ours or may surprise, as text, and how often.
    """

    images: Mapping[str, TruthImage]
    objects: Mapping[str, tuple[TruthObject, ...]]
    categories: Mapping[int, str]
    rules: Mapping[str, int] = field(default_factory=dict)


def read_truth(uri: str, access: AccessRules, *, classes: bool = True) -> Truth:
    """Return the ground truth in a COCO instances file, local or in a store. Memory: that of the file's text.

    Args:
        uri: the file.
        access: how its store is reached.
        classes: False when classes do not count: categories are then neither needed nor read.

    Raises:
        JobRefused: no such file, no JSON of that shape, or records that cannot be used. Says of each kind of
            fault how many there are, and the ids of a few, so that a file can be fixed in one go.
    """
    lists = ("images", "annotations", *(("categories",) if classes else ()))
    lines: dict[str, list[Lines]] = {name: [] for name in lists}
    try:
        with open_input(uri, options_for(uri, access)) as stream:
            if refuse_other_bytes(stream).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                raise TextDamage("it is a list, as COCO results are: detections, not the truth")
            for block in split_arrays(stream, lists):
                lines[block.name].append(block)
    except TextDamage as error:
        raise JobRefused(f"{uri}: {clean_text(str(error))}; {_WANTED}") from error
    absent = [name for name, blocks in lines.items() if not blocks]
    if absent:
        way_out = ". To let classes not count: --class-agnostic" if absent == ["categories"] else ""
        raise JobRefused(f"{uri}: there is no list `{absent[0]}`; {_WANTED}{way_out}")
    rules: Counter[str] = Counter()
    images = _images(uri, lines["images"], rules)
    categories = _categories(uri, lines["categories"]) if classes else None
    objects = _objects(uri, lines["annotations"], images, categories, rules)
    return Truth(images=images, objects=objects, categories=categories or {}, rules=dict(rules))


# ---- Records that cannot be used ----


class _Wrong(Exception):
    """A record that cannot be used. `kind`: the fault, in the same words for all of a kind."""

    def __init__(self, kind: str, found: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.found = found


class _Wrongs:
    """The faults of one list, by kind: how many, and a few of the records."""

    def __init__(self, uri: str, noun: str, plural: str) -> None:
        self._uri = uri
        self._noun = noun
        self._plural = plural
        self._examples: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, which: str, wrong: _Wrong) -> None:
        """Count a fault of the record `which` (its id, or its place)."""
        self._counts[wrong.kind] += 1
        examples = self._examples.setdefault(wrong.kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(f"{which}: {wrong.found}" if wrong.found else which)

    def refuse(self) -> None:
        """Raise JobRefused, with the faults, when there were some."""
        if not self._counts:
            return
        faults = [
            f"{self._counts[kind]:,} {kind} ({self._noun} {'; '.join(examples)})"
            for kind, examples in self._examples.items()
        ]
        more = [f"{len(faults) - _KINDS} kinds of fault more"] if len(faults) > _KINDS else []
        what = ", ".join(faults[:_KINDS] + more)
        raise JobRefused(
            f"{self._uri}: {self._plural} that cannot be used: {what}. Fix them or take them out of the file"
        )


def _records(blocks: Sequence[Lines], wrongs: _Wrongs) -> Iterator[tuple[str, Record]]:
    """Yield every record of a list, with what to call it as long as its id is not known."""
    place = 0
    for block in blocks:
        for line in block.text.split(b"\n") if block.count else ():
            which = f"number {place} (from 0)"
            place += 1
            try:
                value = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                wrongs.add(which, _Wrong("that are no sound JSON", clean_text(str(error))[:80]))
                continue
            if isinstance(value, dict):
                yield which, value
            else:
                wrongs.add(which, _Wrong("that are no JSON object", _shown(value)))


def _shown(value: object) -> str:
    """Return the value as JSON, short and clean."""
    text = clean_text(json.dumps(value))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _key(record: Record, name: str) -> str:
    """Return an id as text: 7, 7.0 and "7" are one id."""
    value = record.get(name)
    if isinstance(value, str) and value:
        return value
    whole = None if isinstance(value, str) else _whole(value)
    if whole is None:
        raise _Wrong(f"without a whole number or text as `{name}`", _found(record, name))
    return str(whole)


def _whole(value: object) -> int | None:
    """Return a whole number as JSON writers write it (7, 7.0, "7", "7.0"), else None. True is none."""
    if isinstance(value, str):
        match = _WHOLE_TEXT.fullmatch(value)
        return int(match.group(1)) if match else None
    if type(value) is float and value.is_integer():
        return int(value)
    return value if type(value) is int else None


def _found(record: Record, name: str) -> str:
    return f"`{name}` is {_shown(record[name])}" if name in record else f"there is no `{name}`"


# ---- Images and categories ----


def _images(uri: str, blocks: Sequence[Lines], rules: Counter[str]) -> dict[str, TruthImage]:
    images: dict[str, TruthImage] = {}
    wrongs = _Wrongs(uri, "image", "images")
    for place, record in _records(blocks, wrongs):
        which = place
        try:
            which = _key(record, "id")
            image = _image(record)
            if image.image_id in images:
                raise _Wrong("with the id of an earlier one")
        except _Wrong as wrong:
            wrongs.add(_name(which), wrong)
            continue
        images[image.image_id] = image
        if "neg_category_ids" in record:
            rules["images of LVIS, where what was not looked for counts as wrong here: AP is COCO's"] += 1
    wrongs.refuse()
    return images


def _image(record: Record) -> TruthImage:
    # LVIS has no file_name; the last part of its coco_url is one.
    name = record.get("file_name") or record.get("coco_url") or ""
    if not isinstance(name, str):
        raise _Wrong("with a `file_name` that is no text", _found(record, "file_name"))
    return TruthImage(image_id=_key(record, "id"), file_name=name, size_hw=_size_hw(record))


def _size_hw(record: Record) -> tuple[int, int] | None:
    """Height and width; None where one is null, 0 or absent: some writers do not open the pictures."""
    given = [record.get(name) for name in ("height", "width")]
    sides = [0 if side is None else _whole(side) for side in given]
    height, width = sides
    what = f"with a size that is not 1 to {MAX_SIDE:,} whole pixels a side, {SHORT_PIXELS - 1:,} in all"
    if height is None or width is None or not (0 <= height <= MAX_SIDE and 0 <= width <= MAX_SIDE):
        raise _Wrong(what, f"height {_shown(given[0])}, width {_shown(given[1])}")
    if height * width >= SHORT_PIXELS:
        raise _Wrong(what, f"height {height}, width {width}")
    return (height, width) if height and width else None


def _categories(uri: str, blocks: Sequence[Lines]) -> dict[int, str]:
    """Category id to name, in the order of the file; a category may have no name."""
    names: dict[int, str] = {}
    wrongs = _Wrongs(uri, "category", "categories")
    for place, record in _records(blocks, wrongs):
        which = place
        try:
            number, name = _category_id(record, "id"), record.get("name")
            which = str(number)
            if name is not None and not isinstance(name, str):
                raise _Wrong("with a `name` that is no text", _found(record, "name"))
            if names.setdefault(number, name or "") != (name or ""):
                raise _Wrong("with two names", f"{_shown(names[number])} and {_shown(name)}")
        except _Wrong as wrong:
            wrongs.add(_name(which), wrong)
    wrongs.refuse()
    return names


def _category_id(record: Record, name: str) -> int:
    number = _whole(record.get(name))
    if number is None:
        raise _Wrong(f"with a `{name}` that is no whole number", _found(record, name))
    return number


# ---- Annotations ----


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draft:
    """An annotation whose runs are unchecked; area and box are None where the file has none.

    `counts`: as the file has them, or text when the mask was drawn here (`drawn`).
    """

    annotation_id: str
    image_id: str
    category_id: int | None
    size_hw: tuple[int, int]
    is_crowd: bool
    area: float | None
    bbox_xywh: Box | None
    counts: object
    drawn: bool


def _objects(
    uri: str,
    blocks: Sequence[Lines],
    images: Mapping[str, TruthImage],
    categories: Mapping[int, str] | None,
    rules: Counter[str],
) -> dict[str, tuple[TruthObject, ...]]:
    """Return every annotation, by image; `rules` are counted on."""
    wrongs = _Wrongs(uri, "annotation", "annotations")
    drafts = _drafts(_records(blocks, wrongs), images, categories, rules, wrongs)
    objects: dict[str, list[TruthObject]] = {}
    while some := list(islice(drafts, MASKS_PER_BATCH)):
        given = [one for one in some if not one.drawn]
        faults = iter(rle_faults([one.counts for one in given], [one.size_hw for one in given]))
        for draft in some:
            fault = None if draft.drawn else next(faults)
            if fault is None:
                objects.setdefault(draft.image_id, []).append(_finished(draft, rules))
            else:
                wrongs.add(_name(draft.annotation_id), _wrong_runs(draft.counts, fault))
    wrongs.refuse()
    return {image_id: tuple(mine) for image_id, mine in objects.items()}


def _drafts(
    records: Iterator[tuple[str, Record]],
    images: Mapping[str, TruthImage],
    categories: Mapping[int, str] | None,
    rules: Counter[str],
    wrongs: _Wrongs,
) -> Iterator[_Draft]:
    seen: set[str] = set()
    for place, record in records:
        which = place
        try:
            annotation_id = _key(record, "id")
            which = annotation_id
            if annotation_id in seen:
                raise _Wrong("with the id of an earlier one")
            seen.add(annotation_id)
            yield _draft(annotation_id, record, images, categories, rules)
        except _Wrong as wrong:
            wrongs.add(_name(which), wrong)


def _name(given_id: str) -> str:
    return clean_text(given_id)[:_SHOWN]


def _draft(
    annotation_id: str,
    record: Record,
    images: Mapping[str, TruthImage],
    categories: Mapping[int, str] | None,
    rules: Counter[str],
) -> _Draft:
    image_id = _key(record, "image_id")
    image = images.get(image_id)
    if image is None:
        raise _Wrong("of an image that the file does not list", f"image {_name(image_id)}")
    category_id = None if categories is None else _category_id(record, "category_id")
    if categories is not None and category_id not in categories:
        raise _Wrong("of a category that the file does not list", f"category {category_id}")
    if image.size_hw is None:
        raise _Wrong("of an image whose height and width the file does not say", f"image {_name(image_id)}")
    is_crowd = _is_crowd(record)
    if record.get("ignore") and not is_crowd:
        rules["annotations marked `ignore`, which counts for nothing, as in pycocotools"] += 1
    return _Draft(
        annotation_id=annotation_id,
        image_id=image_id,
        category_id=category_id,
        size_hw=image.size_hw,
        is_crowd=is_crowd,
        area=_area(record),
        bbox_xywh=_bbox(record),
        counts=_counts(record, image.size_hw, rules),
        drawn=isinstance(record["segmentation"], list),
    )


def _is_crowd(record: Record) -> bool:
    value = record.get("iscrowd")
    number = int(value) if isinstance(value, bool) else 0 if value is None else _whole(value)
    if number not in (0, 1):
        raise _Wrong("with an `iscrowd` that is neither 0 nor 1", _found(record, "iscrowd"))
    return number == 1


def _area(record: Record) -> float | None:
    value = record.get("area")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= MAX_AREA:
        raise _Wrong(f"with an `area` that is no number from 0 to {MAX_AREA:.0e}", _found(record, "area"))
    return float(value)


def _bbox(record: Record) -> Box | None:
    given = record.get("bbox")
    if given is None or given == []:
        return None
    box = _numbers(given)
    if box is None or len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) < 0:
        raise _Wrong("with a `bbox` that is not x, y, width, height, finite, sizes from 0", _shown(given))
    x, y, width, height = box.tolist()
    return (x, y, width, height)


def _numbers(value: object) -> Float64Array | None:
    """Return a flat list of numbers, float64 (n,), NaN and infinity among them; else None."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int, float}:
        return None
    try:
        return np.array(value, dtype=np.float64)
    except OverflowError:
        return np.full(len(value), math.inf)


def _finished(draft: _Draft, rules: Counter[str]) -> TruthObject:
    """Return the object of a draft whose runs are sound."""
    counts = str(draft.counts)
    rle = {"size": list(draft.size_hw), "counts": counts}
    area, bbox = draft.area, draft.bbox_xywh
    pixels = int(coco_mask.area(rle))
    tight = coco_mask.toBbox(rle)
    if pixels == 0:
        rules["annotations with a mask of no pixel, which nothing can find"] += 1
    elif bbox is not None and coco_mask.iou(np.array([bbox]), tight[None], [0])[0, 0] < ODD_BOX_IOU:
        rules["annotations whose `bbox` does not lie around the mask (other numbers? runs by rows?)"] += 1
    if pixels and area == 0:
        rules["annotations with an `area` of 0 beside a mask: small ones, as in pycocotools"] += 1
    if area is None:
        rules["annotations without `area`: that of the mask"] += 1
        area = float(pixels)
    if bbox is None:
        rules["annotations without `bbox`: that of the mask"] += 1
        x, y, width, height = tight.tolist()
        bbox = (x, y, width, height)
    return TruthObject(
        annotation_id=draft.annotation_id,
        image_id=draft.image_id,
        category_id=draft.category_id,
        bbox_xywh=bbox,
        area=area,
        is_crowd=draft.is_crowd,
        counts=counts,
    )


# ---- Masks ----


def _counts(record: Record, size_hw: tuple[int, int], rules: Counter[str]) -> object:
    """Return the mask as compressed runs: made from polygons or a list of runs, else as given, unchecked."""
    found = record.get("segmentation")
    if found in (None, [], {}):
        raise _Wrong("without a mask", _found(record, "segmentation"))
    if isinstance(found, list):
        return _counts_of_polygons(found, size_hw, rules)
    if not isinstance(found, dict) or "counts" not in found:
        raise _Wrong(
            "with a `segmentation` that is neither polygons nor runs", _found(record, "segmentation")
        )
    if found.get("size") != list(size_hw):
        raise _Wrong(
            "with runs whose `size` is not the image's [height, width]",
            f"{_shown(found.get('size'))}, wanted {list(size_hw)}",
        )
    counts = found["counts"]
    if not isinstance(counts, list):
        return counts
    try:
        return compress_lengths(counts)
    except ValueError as error:
        raise _Wrong("with damaged runs", str(error)) from None


def _wrong_runs(counts: object, fault: str) -> _Wrong:
    if isinstance(counts, str) and counts.startswith(("b'", 'b"')):
        return _Wrong('with runs written as Python\'s "b\'…\'"; write counts.decode("ascii")')
    return _Wrong("with damaged runs", fault)


def _counts_of_polygons(found: list[Any], size_hw: tuple[int, int], rules: Counter[str]) -> str:
    """Return the union of polygons, drawn by pycocotools' own frPyObjects, once it cannot fail there.

    It takes lists of four numbers for boxes, and a part of one or two points encloses no pixel: such a part
    is skipped, as detectron2 and MMDetection do, and counted.
    """
    if not isinstance(found[0], list | dict | str):
        found = [found]
        rules["annotations with one flat polygon, read as one part"] += 1
    sound = []
    for part in found:
        numbers = _numbers(part)
        if numbers is None:
            raise _Wrong("with a polygon that is no list x1, y1, x2, y2, … of numbers", _shown(part))
        sound.append(numbers)
    odd = next((part for part in sound if len(part) % 2), None)
    if odd is not None:
        raise _Wrong("with a polygon of an odd number of numbers", f"{len(odd)} numbers")
    whole = [part for part in sound if len(part) >= 6]
    if not whole:
        raise _Wrong("with polygons of fewer than three points", f"{max(map(len, sound))} numbers")
    if len(whole) < len(sound):
        rules["annotations with parts of one or two points, which enclose nothing: skipped"] += 1
    _check_reach(whole, size_hw)
    if all(part.min() >= 0 and part.max() <= 1 for part in whole):
        rules["annotations with polygons within 0 to 1 (shares of the picture? wanted: pixels)"] += 1
    height, width = size_hw
    rle = _union(coco_mask.frPyObjects([part.tolist() for part in whole], height, width))
    return bytes(rle["counts"]).decode("ascii")


def _check_reach(parts: Sequence[Float64Array], size_hw: tuple[int, int]) -> None:
    """Return when pycocotools can walk these outlines.

    Raises:
        _Wrong: a point is not finite or too far away, or the outline is too long.
    """
    numbers = np.concatenate(parts)
    longer, low, high = max(size_hw), float(numbers.min()), float(numbers.max())
    if not (low >= -MAX_REACH * longer and high <= (MAX_REACH + 1) * longer):
        if not np.isfinite(numbers).all():
            raise _Wrong("with a polygon point that is not finite")
        raise _Wrong(
            f"with a polygon point more than {MAX_REACH} times the picture's longer side outside",
            f"{low if -low > high else high:g}, the longer side is {longer}",
        )
    if len(numbers) * (high - low) <= 2 * MAX_OUTLINE:
        return  # no step is longer than the widest
    points = numbers.reshape(-1, 2)
    ends = np.cumsum([len(part) // 2 for part in parts])
    after = np.arange(1, len(points) + 1)
    after[ends - 1] = np.concatenate([[0], ends[:-1]])  # the last point of a part is joined to its first
    outline = np.abs(points[after] - points).max(axis=1).sum()
    if outline > MAX_OUTLINE:
        raise _Wrong(f"with polygons more than {MAX_OUTLINE:,} pixels around", f"{outline:,.0f}")


def _union(masks: list[Any]) -> dict[str, Any]:
    """Return the union of masks. pycocotools merges one after the other, so thousands go in groups."""
    while len(masks) > 1:
        step = MASKS_PER_BATCH
        masks = [coco_mask.merge(masks[start : start + step]) for start in range(0, len(masks), step)]
    return dict(masks[0])
