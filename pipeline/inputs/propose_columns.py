"""What columns a table of boxes may have, and which names of other programs are read as ours or proposed.

A name is read as ours where it can mean nothing else (`known_names`), and that is always printed. Where two
columns could be meant, or the four numbers of a box could mean two things, nothing is read: the refusal
proposes one option for all of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

import numpy as np
import pyarrow as pa

from hqlabel.pipeline.box_geometry import Float64Array, PixelFormat, boxes_to_xyxy
from hqlabel.pipeline.errors import JobRefused, clean_text
from hqlabel.pipeline.inputs.columns import (
    CORNER_NAMES,
    CORNERS,
    Kind,
    bare_name,
    can_be_pasted,
    locate,
    setting_of,
)
from hqlabel.pipeline.inputs.read_table import TableFile, inspect_tables, read_batches
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.settings import BoxFormat

_SAME_PX = 1.0  # some tools round corners in one column and not in another
LARGEST_SHARE = 1.5  # shares of a picture reach over 1 where a detector lets its boxes reach over the edge

KEYS = {"image_uri": Kind(0, "text"), "image_id": Kind(0, "key")}

# One row an image: every list has one entry a box.
IMAGE_ROWS: dict[str, Kind] = KEYS | {
    "boxes": Kind(2, "number"),
    "labels": Kind(1, "key"),
    "scores": Kind(1, "number"),
    "box_ids": Kind(1, "key"),
    "points": Kind(3, "number"),
    "point_labels": Kind(2, "integer"),
    "prompt_mask": Kind(1, "rle"),
    "iscrowd": Kind(1, "flag"),
}

BOX_ROWS: dict[str, Kind] = KEYS | {
    "bbox": Kind(1, "number"),
    **dict.fromkeys(CORNERS, Kind(0, "number")),
    "label": Kind(0, "key"),
    "category_id": Kind(0, "integer"),
    "score": Kind(0, "number"),
    "box_id": Kind(0, "key"),
    "points": Kind(2, "number"),
    "point_labels": Kind(1, "integer"),
    "prompt_mask": Kind(0, "rle"),
    "iscrowd": Kind(0, "flag"),
}


# Other names for our columns, as `bare_name` writes them.
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "image_uri": (
        *("imageuri", "uri", "url", "path", "filename", "file", "image", "imagepath", "filepath", "imgpath"),
        *("imagename", "imgname", "imagefile", "img", "imageurl", "fname"),
    ),
    "image_id": ("imageid", "imgid", "frameid", "photoid", "frame", "id"),
    "boxes": ("boxes", "bboxes", "detections", "objects", "predboxes", "boundingboxes"),
    "bbox": ("bbox", "box", "boundingbox", "rect"),
    "labels": ("labels", "classes", "categories", "categoryids", "names", "classids", "classnames", "label"),
    "label": ("label", "name", "classname", "labelname", "categoryname", "class", "category", "objectname"),
    "category_id": ("categoryid", "classid", "cls", "labelid", "class", "category"),
    "scores": ("scores", "confidences", "score", "confidence", "conf", "probabilities"),
    "score": ("score", "confidence", "conf", "probability", "prob", "scores"),
    "box_ids": ("boxids", "annotationids"),
    "box_id": ("boxid", "annotationid", "annid"),
    "iscrowd": ("iscrowd", "crowd"),
    "x1": ("x1", "xmin", "left", "x"),
    "y1": ("y1", "ymin", "top", "y"),
    "x2": ("x2", "xmax", "right", "w", "width"),
    "y2": ("y2", "ymax", "bottom", "h", "height"),
}

_CHOICES: dict[str, list[list[str]]] = {
    "boxes": [["scores"], ["labels"], ["box_ids"], ["iscrowd"]],
    "bbox": [["score"], ["label"], ["category_id"], ["box_id"], ["iscrowd"]],
}


@dataclass(frozen=True, kw_only=True)
class Unclear:
    """What two columns could be, as a part of a sentence, and our name -> theirs of the first of them."""

    text: str
    choice: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class KnownNames:
    """Columns of a table that are read as ours by their names.

    `mapping`: our name -> the table's, those that the user mapped included. `box_format`: what four columns
    mean by their names, or None. `unclear`: what could be meant by two columns.
    """

    mapping: Mapping[str, str]
    box_format: BoxFormat | None = None
    unclear: tuple[Unclear, ...] = ()


_URI_NAMES = (
    *("imageuri", "uri", "url", "path", "filename", "file", "image", "imagepath", "filepath", "imgpath"),
    *("imagename", "imgname", "imagefile", "imagefilename", "imagefilepath", "imgfilename", "img"),
    *("imageurl", "imgurl", "fname"),
)
_ID_NAMES = ("imageid", "imgid")
_WORDS = ("classname", "labelname", "categoryname", "objectname", "phrase", "textlabel", "detectedclass")
_NUMBERS = ("categoryid", "classid", "labelid", "cls", "clsid", "classidx")
_EITHER = ("class", "category", "label", "prediction")
_SCORES = (
    *("score", "confidence", "conf", "prob", "probability", "confidencescore", "detectionscore"),
    *("predscore", "predictionscore", "logit"),
)
_LIST_WORDS = (*(f"{name}s" for name in _WORDS), "names", "detectedclasses")
_LIST_NUMBERS = ("categoryids", "classids", "labelids", "clsids")
_LIST_EITHER = ("labels", "classes", "categories", "predictions", *_EITHER)
_LIST_SCORES = ("scores", "confidences", "confs", "probs", "probabilities", "logits", *_SCORES)
_CLASSES = {"label", "labels", "category_id"}
"""One column of them is enough."""
_BOX_NAMES = ("bbox", "box", "boundingbox", "bndbox", "rect", "xyxy")
_BOXES_NAMES = ("boxes", "bboxes", "boundingboxes", "predboxes")


def known_names(
    file: TableFile,
    mapping: Mapping[str, str],
    access: AccessRules,
    *,
    box_format: BoxFormat | None,
    needs_uri: bool,
) -> KnownNames:
    """Return `names_known` of a table's file, checked by its first rows where names alone do not tell.

    Words in a column of classes next to one of their names make both unclear. A table whose boxes are there
    twice, and not the same, is refused.
    """
    names, uri = file.all_names, file.uri
    known = names_known(
        names, mapping, uri=uri, box_format=box_format, corners=file.corners, needs_uri=needs_uri
    )
    found = known.mapping
    numbers = found.get("category_id", "")
    is_guess = "category_id" not in mapping and bare_name(numbers) in _EITHER
    if "category_id" not in mapping and "label" in names and _holds_numbers(uri, mapping, access):
        known = replace(known, mapping={ours: theirs for ours, theirs in found.items() if theirs != numbers})
    elif is_guess and _first_rows(uri, mapping, {"category_id": numbers}, access) is None:
        known = replace(known, mapping={ours: one for ours, one in found.items() if ours != "category_id"})
        if found["label"]:  # else the user has said that neither is read
            either = " or ".join(repr(clean_text(name)) for name in (numbers, found["label"]))
            doubt = Unclear(text=f"{either} could be label", choice={"label": found["label"]})
            known = replace(known, unclear=(*known.unclear, doubt))
    if not known.unclear:
        _refuse_two_kinds_of_boxes(file, mapping, known.mapping, access, box_format)
    return known


def _holds_numbers(uri: str, mapping: Mapping[str, str], access: AccessRules) -> bool:
    """Return whether our own column `label` holds the numbers of classes, by the first rows."""
    rows = _first_rows(uri, mapping, {"label": mapping.get("label", "label")}, access)
    if rows is None or "label" not in rows.column_names:
        return False
    labels = [one for one in rows.column("label").to_pylist() if one is not None]
    return bool(labels) and all(re.fullmatch(r"-?[0-9]+(\.0)?", str(one)) for one in labels)


def _refuse_two_kinds_of_boxes(
    file: TableFile,
    given: Mapping[str, str],
    mapping: Mapping[str, str],
    access: AccessRules,
    box_format: BoxFormat | None,
) -> None:
    """Refuse a table with `bbox` and four corners that differ from it, by its first rows.

    `given`: what the user mapped, which is a choice already; `mapping`: with what is known.
    """
    bbox = locate(file.all_names, {"bbox": BOX_ROWS["bbox"]}, mapping, uri=file.uri)
    others = corner_columns(file.all_names, {**mapping, **bbox})
    stated = box_format or "xyxy"
    if not bbox or "bbox" in given or others is None or others[1] == "xywh" or "-" in stated:
        return
    first = _first_rows(file.uri, mapping, bbox, access)
    second = _first_rows(file.uri, {}, others[0], access)
    if first is None or second is None or not first.num_rows:
        return
    boxes, corners = _comparable(first, second)
    named = boxes_to_xyxy(corners, cast(PixelFormat, others[1]))
    own = {base: boxes_to_xyxy(boxes, base) for base in get_args(PixelFormat)}
    same = [base for base, values in own.items() if np.abs(values - named).max(initial=0) <= _SAME_PX]
    if stated in same:
        return
    corner_names = shown_names(list(others[0].values()))
    differ = f"{clean_text(bbox['bbox'])!r}, read as {stated}, differs from {corner_names}"
    hint = (
        f"as {same[0]} it does not: --box-format {same[0]}"
        if same
        else (f"choose: {setting_of(bbox, given)}, or {setting_of({**others[0], 'bbox': ''}, given)}")
    )
    raise JobRefused(f"{file.uri}: the boxes are there twice, and {differ}; {hint}")


def _comparable(first: pa.Table, second: pa.Table) -> tuple[Float64Array, Float64Array]:
    """Return the boxes of those first rows that have four finite numbers in both tables."""
    lists = first.column("bbox").to_pylist()
    boxes = np.array([one if one and len(one) == 4 else [None] * 4 for one in lists], np.float64).reshape(
        -1, 4
    )
    corners = np.stack([second.column(name).to_numpy() for name in CORNERS], axis=1).astype(np.float64)
    rows = min(len(boxes), len(corners))
    boxes, corners = boxes[:rows], corners[:rows]
    sound = np.isfinite(boxes).all(axis=1) & np.isfinite(corners).all(axis=1)
    return boxes[sound], corners[sound]


def names_known(
    names: Sequence[str],
    mapping: Mapping[str, str],
    *,
    uri: str,
    box_format: BoxFormat | None,
    corners: Sequence[str] = (),
    needs_uri: bool = True,
) -> KnownNames:
    """Return which columns of a table of boxes are read as ours, each only where it can mean nothing else.

    `box_format`: as the user stated it. `corners`: columns of objects with four corners. `needs_uri`: the
    boxes say where the images are too, else an id is enough. A column of our own name stands before all
    others of its meaning; one that the user maps to "" is not read.
    """
    own = locate(names, IMAGE_ROWS | BOX_ROWS, mapping, uri=uri)
    free = _Free(names, {**mapping, **own})
    boxes, meaning = _known_boxes(own, free, box_format, corners)
    images = _known_image(free, own, needs_uri=needs_uri)
    found = {**boxes, **images}
    is_list = "boxes" in found or "boxes" in own
    found |= _known_classes(free, own, is_list=is_list)
    scores = "scores" if is_list else "score"
    found |= {} if scores in own else free.only(scores, _LIST_SCORES if is_list else _SCORES)
    allowed = {ours: theirs for ours, theirs in found.items() if mapping.get(ours) != ""}
    return KnownNames(
        mapping={**mapping, **allowed},
        box_format=meaning,
        unclear=tuple(doubt for ours, doubt in free.unclear.items() if mapping.get(ours) != ""),
    )


class _Free:
    """The columns of a table that nothing is read from yet, and what of them is unclear."""

    def __init__(self, names: Sequence[str], taken: Mapping[str, str]) -> None:
        self.unclear: dict[str, Unclear] = {}
        used = set(taken.values())
        self._names = [name for name in names if name not in used and can_be_pasted(name)]

    def named(self, others: Sequence[str]) -> list[str]:
        """Return the columns that are called one of `others`, as `bare_name` writes them."""
        return [name for name in self._names if bare_name(name) in others]

    def named_all(self) -> list[str]:
        """Return every free column; of two that are called alike, the first counts."""
        return self._names[::-1]

    def only(self, ours: str, others: Sequence[str]) -> dict[str, str]:
        """Return the one column of these names; where there are two, none, and what is unclear is noted."""
        found = self.named(others)
        if len(found) > 1:
            either = " or ".join(repr(clean_text(name)) for name in found)
            self.unclear[ours] = Unclear(text=f"{either} could be {ours}", choice={ours: found[0]})
        return {ours: found[0]} if len(found) == 1 else {}


def _known_image(free: _Free, own: Mapping[str, str], *, needs_uri: bool) -> dict[str, str]:
    """Return the column that names the image, where none of ours does or a uri is needed next to an id."""
    if "image_uri" in own or ("image_id" in own and not needs_uri):
        return {}
    if found := free.named(_URI_NAMES):
        return free.only("image_uri", _URI_NAMES) if "image_id" not in own or len(found) == 1 else {}
    return {} if "image_id" in own else free.only("image_id", _ID_NAMES)


def known_image_names(names: Sequence[str], mapping: Mapping[str, str], *, uri: str) -> KnownNames:
    """Return which column of a table of images is read as its uri."""
    own = locate(names, KEYS, mapping, uri=uri)
    free = _Free(names, {**mapping, **own})
    found = _known_image(free, own, needs_uri=True)
    return KnownNames(mapping={**mapping, **found}, unclear=tuple(free.unclear.values()))


def _known_boxes(
    own: Mapping[str, str], free: _Free, box_format: BoxFormat | None, corners: Sequence[str]
) -> tuple[dict[str, str], BoxFormat | None]:
    """Return the columns that are boxes, and how four columns are meant by their names."""
    if own.keys() & {"boxes", "bbox"} or set(CORNERS) <= own.keys():
        return {}, None
    if (found := _free_corners(free, own, box_format)) is not None:
        return found
    if box_format is not None:
        return free.only("bbox", _BOX_NAMES) or free.only("boxes", _BOXES_NAMES), None
    return free.only("bbox", [bare_name(name) for name in corners if bare_name(name) in _BOX_NAMES]), None


def _free_corners(
    free: _Free, own: Mapping[str, str], box_format: BoxFormat | None
) -> tuple[dict[str, str], BoxFormat] | None:
    """Return four columns that are boxes by their names, and the format; None where that is not certain.

    A corner with width and height may be a corner, a centre, or a corner next to the picture's size: it is
    read where the format is stated; `left, top, width, height` means one thing alone.
    """
    bare = {bare_name(name): name for name in (*free.named_all(), *(own[c] for c in CORNERS if c in own))}
    base = (box_format or "").removesuffix("-normalised")
    found = [
        ({ours: bare[name] for ours, name in zip(CORNERS, four, strict=True)}, meaning)
        for four, meaning in CORNER_NAMES
        if all(name in bare for name in four)
        and (meaning != "xywh" or four[:2] == ("left", "top") or base in ("xywh", "cxcywh"))
    ]
    if len(found) > 1 and found[0][1] == found[1][1]:
        either = " or ".join(shown_names(list(four.values())) for four, _ in found)
        free.unclear["x1"] = Unclear(text=f"{either} could be the boxes", choice=found[0][0])
        return None
    return found[0] if found else None


def _known_classes(free: _Free, own: Mapping[str, str], *, is_list: bool) -> dict[str, str]:
    """Return the columns of classes, where none of ours is there.

    Next to a column that can only hold words, `class` holds numbers (as YOLOv5 writes them); alone it may
    hold either. `name` is the class's where another column names the image.
    """
    if is_list:
        if "labels" in own:
            return {}
        tiers = (_LIST_WORDS, _LIST_EITHER, _LIST_NUMBERS)
        return next((free.only("labels", tier) for tier in tiers if free.named(tier)), {})
    if "category_id" in own:
        return {}
    if "label" in own:
        return free.only("category_id", _NUMBERS)
    words = free.only("label", (*_WORDS, "name"))
    if words:
        return words | free.only("category_id", (*_NUMBERS, *_EITHER))
    if free.named(_EITHER):
        words = free.only("label", _EITHER)
    return words | free.only("category_id", _NUMBERS)


def missing_column(
    uri: str, wanted: str, names: Sequence[str], mapping: Mapping[str, str] | None = None
) -> JobRefused:
    """Return the error for a table without a column it needs: names the nearest and how to map it.

    `wanted`: one of our names, or several of which one would do, parted by " or ". `mapping`: the names that
    are mapped already, which the proposal keeps.
    """
    message = f"{uri}: no column {wanted}; found {shown_names(names)}"
    near = near_columns([wanted.split(" or ")], names, mapping or {})
    if near:
        message += f". If {next(iter(near.values()))!r} is meant: {setting_of(near, mapping or {})}"
    elif names:
        message += called_otherwise(wanted)
    return JobRefused(message)


def called_otherwise(wanted: str) -> str:
    """Return the end of a sentence on a missing column for which no other could be meant by its name."""
    return f"; if it is called otherwise: --set input.columns.{wanted.split(' or ')[0]}=NAME"


def shown_names(names: Sequence[str], count: int = 20) -> str:
    """Return the first names of a list of columns, for a message."""
    shown = ", ".join(clean_text(name) for name in names[:count]) or "no columns at all"
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")


def near_columns(
    wanted: Sequence[Sequence[str]], names: Sequence[str], mapping: Mapping[str, str], *, exact: bool = False
) -> dict[str, str]:
    """Return our name -> the column that could be meant, for each choice of our names that has one.

    `exact`: known other names alone, none that is merely spelled alike. No column is proposed twice.
    """
    free = [name for name in names if name not in mapping.values() and can_be_pasted(name)]
    found: dict[str, str] = {}
    for choice in wanted:
        known = [(ours, name) for ours in choice if (name := _known(ours, free)) is not None]
        alike = [] if exact else [(ours, name) for ours in choice if (name := _alike(ours, free)) is not None]
        for ours, name in (known or alike)[:1]:
            found[ours] = name
            free.remove(name)
    return found


def corner_columns(
    names: Sequence[str], mapping: Mapping[str, str]
) -> tuple[dict[str, str], BoxFormat] | None:
    """Return our corners -> four columns that are boxes by their names, and the format; None without."""
    free = {bare_name(name): name for name in reversed(names) if name not in mapping.values()}
    for four, box_format in CORNER_NAMES:
        if all(name in free and can_be_pasted(free[name]) for name in four):
            found = {ours: free[name] for ours, name in zip(CORNERS, four, strict=True)}
            return found, box_format
    return None


def _known(ours: str, names: Sequence[str]) -> str | None:
    bare = {bare_name(name): name for name in reversed(names)}
    others = (re.sub("_", "", ours), *_OTHER_NAMES.get(ours, ()))
    return next((bare[other] for other in others if other in bare), None)


def _alike(ours: str, names: Sequence[str]) -> str | None:
    lowered = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(ours, lowered, n=1, cutoff=0.75)
    return lowered[near[0]] if near else None


def unread_note(file: TableFile, unused: Sequence[str], mapping: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence where columns that are not read are called like some that the table lacks."""
    there = {*file.names, *(_CLASSES if _CLASSES & file.names.keys() else ())}
    there |= {ours for ours, theirs in mapping.items() if not theirs}  # the person wants none
    choices = _CHOICES["boxes" if "boxes" in file.names else "bbox"]
    lacking = [choice for choice in choices if choice[0] not in there]
    near = near_columns(lacking, unused, mapping, exact=True)
    if not near:
        return ()
    meant = ", ".join(f"{clean_text(theirs)!r} as {ours}" for ours, theirs in near.items())
    return (f"{file.uri}: to read {meant} too: {setting_of(near, mapping)}",)


def unclear_columns(uri: str, mapping: Mapping[str, str], unclear: Sequence[Unclear]) -> JobRefused:
    """Return the error for a table of which two columns could be ours, with a setting that names one each."""
    choice = {ours: theirs for one in unclear for ours, theirs in one.choice.items()}
    none = f"; to read none of them: {setting_of(dict.fromkeys(choice, ''), mapping)}"
    return JobRefused(
        f"{uri}: {'; '.join(one.text for one in unclear)}. Choose, such as {setting_of(choice, mapping)}"
        f"{none if choice.keys() <= {'score', 'scores', *_CLASSES} else ''}"
    )


def missing_columns(
    uri: str,
    names: Sequence[str],
    mapping: Mapping[str, str],
    access: AccessRules,
    *,
    unclear: Sequence[Unclear] = (),
) -> JobRefused:
    """Return the error for a table that lacks columns: all of them, and one proposal for all.

    `unclear`: what else of the table could be meant by two columns.
    """
    lacking, near, box_format = _proposal(names, mapping, uri=uri)
    message = f"{uri}: no column {', no column '.join(lacking)}; found {shown_names(names)}"
    message += "".join(f"; {one.text}" for one in unclear)
    for one in unclear:
        near = {**one.choice, **near} if near else near
    rows = _first_rows(uri, mapping, near, access) if near else None
    if rows is None and "category_id" in near:  # `class` may hold words
        near = {ours: theirs for ours, theirs in near.items() if ours != "category_id"}
        rows = _first_rows(uri, mapping, near, access)
    if not near:
        is_headless = any(re.fullmatch(r"[+-]?[0-9.]+", name) for name in names)
        hint = "; the first line holds numbers: does it lack the names of its columns?"
        return JobRefused(message + (hint if is_headless else called_otherwise(lacking[0])))
    message += _unstated(near, box_format)
    if box_format is None and near.keys() & {"boxes", "bbox"}:
        box_format = "xyxy"
    if box_format is not None and _are_shares(rows):
        box_format = cast(BoxFormat, f"{box_format}-normalised")
    is_said = box_format is None or (box_format == "xyxy" and not near.keys() & {"boxes", "bbox"})
    flag = "" if is_said else f" --box-format {box_format}"
    without = [choice for choice in lacking if not set(choice.split(" or ")) & near.keys()]
    rest = (
        f"; nothing is called like {', nor like '.join(without)}{called_otherwise(without[0])}"
        if without
        else ""
    )
    meant = ", ".join(repr(name) for name in near.values())
    return JobRefused(
        f"{message}. If {meant} {'is' if len(near) == 1 else 'are'} meant: "
        f"{setting_of(near, mapping)}{flag}{rest}"
    )


def _unstated(near: Mapping[str, str], box_format: BoxFormat | None) -> str:
    """Return why the format of boxes must be stated, where their columns' names do not say it."""
    if one := next((near[name] for name in ("boxes", "bbox") if name in near), None):
        return f"; how the four numbers of {clean_text(one)!r} are meant is not stated (--box-format)"
    first, third = bare_name(near.get("x1", "")), bare_name(near.get("x2", ""))
    if box_format == "xywh" and first == "x":
        return "; x and y may be a corner (--box-format xywh) or the centre (cxcywh)"
    if box_format == "xywh" and first != "left" and third == "width":
        return "; width and height may be the box's (--box-format xywh) or the picture's"
    return ""


def _proposal(
    names: Sequence[str], mapping: Mapping[str, str], *, uri: str
) -> tuple[list[str], dict[str, str], BoxFormat | None]:
    """Return what a table lacks; our name -> the column that could be meant; the boxes' format, if known."""
    there = locate(names, KEYS | IMAGE_ROWS | BOX_ROWS, mapping, uri=uri)
    lacking: list[str] = []
    near: dict[str, str] = {}
    box_format: BoxFormat | None = None
    if not there.keys() & {"boxes", "bbox"} and not set(CORNERS) <= there.keys():
        corners = [name for name in CORNERS if name not in there]
        lacking += corners if len(corners) < len(CORNERS) else ["boxes or bbox or x1"]
        whole = near_columns([["boxes", "bbox"]], names, mapping, exact=True) if len(corners) == 4 else {}
        found = None if whole else corner_columns(names, mapping)
        near = whole or near_columns([[name] for name in corners], names, dict(mapping) | _own(there))
        if found is not None:
            near = {ours: theirs for ours, theirs in found[0].items() if there.get(ours) != theirs}
            box_format = found[1]
        elif not near and len(corners) == 4:
            near = near_columns([["boxes", "bbox"]], names, mapping)
        elif len(corners) == 4 and not whole:
            lacking = list(corners)
    taken = dict(mapping) | _own(there) | near
    if not there.keys() & KEYS.keys():
        lacking.append("image_uri or image_id")
        near |= near_columns([["image_uri", "image_id"]], names, taken)
    shape = "boxes" if "boxes" in near.keys() | there.keys() else "bbox"
    others = [choice for choice in _CHOICES[shape] if choice[0] not in there]
    return (
        lacking,
        near | near_columns(others, names, dict(mapping) | _own(there) | near, exact=True),
        box_format,
    )


def _own(there: Mapping[str, str]) -> dict[str, str]:
    """Return columns that have a meaning already, but corners, which may yet turn out to be another's."""
    return {ours: theirs for ours, theirs in there.items() if ours not in CORNERS}


def _first_rows(
    uri: str, mapping: Mapping[str, str], near: Mapping[str, str], access: AccessRules
) -> pa.Table | None:
    """Return the first rows of a table, read as proposed; None where they cannot be read so."""
    kinds = IMAGE_ROWS if "boxes" in near else BOX_ROWS
    wanted = {name: kinds[name] for name in (*CORNERS, *near) if name in kinds}
    try:
        (file,) = inspect_tables([uri], wanted, {**mapping, **near}, access)
        return next(read_batches(file, access), pa.table({}))
    except JobRefused:
        return None


def _are_shares(rows: pa.Table | None) -> bool:
    """Return whether the boxes of some rows lie within 0 to 1; False where there are none."""
    if rows is None or not set(CORNERS) <= set(rows.column_names):
        return False
    values = np.stack([rows.column(name).to_numpy() for name in CORNERS])
    return bool(np.isfinite(values).any()) and float(np.nanmax(np.abs(values))) <= LARGEST_SHARE
