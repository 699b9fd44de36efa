"""What columns a table of boxes may have, and what could be meant where it has others.

Names that other programs use for our columns are proposed in messages, each with the option that maps it;
they are never used without that.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pyarrow as pa

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
    classes = {"label", "category_id"}  # one column of classes is enough
    there = {*file.names, *(classes if classes & file.names.keys() else ())}
    choices = _CHOICES["boxes" if "boxes" in file.names else "bbox"]
    lacking = [choice for choice in choices if choice[0] not in there]
    near = near_columns(lacking, unused, mapping, exact=True)
    if not near:
        return ()
    meant = ", ".join(f"{clean_text(theirs)!r} as {ours}" for ours, theirs in near.items())
    return (f"{file.uri}: to read {meant} too: {setting_of(near, mapping)}",)


def missing_columns(
    uri: str, names: Sequence[str], mapping: Mapping[str, str], access: AccessRules
) -> JobRefused:
    """Return the error for a table that lacks columns: all of them, and one proposal for all."""
    lacking, near, box_format = _proposal(names, mapping, uri=uri)
    message = f"{uri}: no column {', no column '.join(lacking)}; found {shown_names(names)}"
    rows = _first_rows(uri, mapping, near, access) if near else None
    if rows is None and "category_id" in near:  # `class` may hold words
        near = {ours: theirs for ours, theirs in near.items() if ours != "category_id"}
        rows = _first_rows(uri, mapping, near, access)
    if not near:
        is_headless = any(re.fullmatch(r"[+-]?[0-9.]+", name) for name in names)
        hint = "; the first line holds numbers: does it lack the names of its columns?"
        return JobRefused(message + (hint if is_headless else called_otherwise(lacking[0])))
    if box_format is not None and _are_shares(rows):
        box_format = cast(BoxFormat, f"{box_format}-normalised")
    flag = f" --box-format {box_format}" if box_format not in (None, "xyxy") else ""
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
