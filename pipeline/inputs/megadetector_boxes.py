"""MegaDetector's batch output: one JSON object with `images`, each with a `file` and its `detections`.

A box is x, y, width, height as shares of the upright picture; `conf` is its score; `category` a number as
text, named by `detection_categories`. An image with a `failure` has no detections: its boxes are missing, not
none. Streamed, like COCO files; an entry that cannot be read costs its image alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import list_lengths, null_mask, to_lists
from hqlabel.pipeline.errors import JobRefused, clean_text
from hqlabel.pipeline.inputs.box_tables import boxes_of_rows
from hqlabel.pipeline.inputs.columns import Found, RowFaults
from hqlabel.pipeline.inputs.image_box_lists import NUMBERS, TEXT, BoxList, examples
from hqlabel.pipeline.inputs.json_records import (
    CUT_BYTES,
    TextDamage,
    first_byte,
    readable_lines,
    split_arrays,
)
from hqlabel.pipeline.inputs.read_table import open_named
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.storage.read_objects import open_input
from hqlabel.pipeline.storage.uri_rules import options_for

_DETECTION = pa.struct([("category", TEXT), ("conf", pa.float64()), ("bbox", NUMBERS)])
_IMAGES = pa.schema([("file", TEXT), ("detections", pa.list_(_DETECTION)), ("failure", TEXT)])
_CATEGORIES = re.compile(rb'"detection_categories"\s*:\s*(\{[^{}]{0,65536}\})')
_COLUMNS = ("image_uri", "boxes", "labels", "scores")
_SHAPE = "wanted MegaDetector: an object with a list `images`, each with `file` and `detections`"


def is_megadetector(uri: str, access: AccessRules) -> bool:
    """Return whether a JSON file is MegaDetector's: its first image has a `file`, not a `file_name`."""
    with open_named(uri, "JSON", access) as stream:
        if first_byte(stream) != "{":
            return False
        for lines in split_arrays(stream, {"images"}):
            try:
                first = json.loads(lines.text.split(b"\n", 1)[0] or b"null")
            except (ValueError, RecursionError):
                return False  # the COCO reader reports what is wrong
            return isinstance(first, dict) and "file" in first and "file_name" not in first
    return False


def read_megadetector(uri: str, access: AccessRules, *, folder: str) -> BoxList:
    """Return the boxes of the file, and every image that it names; uris as written.

    Raises:
        JobRefused: not a sound file of this kind.
    """
    faults = RowFaults(uri)
    boxes = boxes_of_rows(
        ((uri, batch) for batch in _batches(uri, access, faults)),
        _COLUMNS,
        faults,
        folder=folder,
        box_format="xywh-normalised",
    )
    categories, notes = _categories(uri, access)
    return replace(boxes, categories=categories, files=(uri,), notes=(*boxes.notes, *notes))


def _batches(uri: str, access: AccessRules, faults: RowFaults) -> Iterator[pa.Table]:
    with open_named(uri, "JSON", access) as stream:
        at = counted = 0
        for lines in split_arrays(stream, {"images"}):
            for images, found in readable_lines(lines.text, _IMAGES) if lines.count else ():
                yield faults.add(_image_rows(images, found), found, first_row=at)
                at += images.num_rows
            counted += lines.count
            if at != counted:
                raise TextDamage(f"{counted} records were counted, {at} can be read")


def _image_rows(images: pa.Table, found: Found) -> pa.Table:
    """Return records of `images` as a table, one row an image; `found` gets those that cannot be used."""
    detections = images.column("detections").combine_chunks()
    file = images.column("file").combine_chunks()
    failed = images.column("failure").combine_chunks().is_valid().to_numpy(zero_copy_only=False)
    read = np.ones(len(file), dtype=np.bool_)
    read[[row for rows in found.values() for row in rows]] = False
    lacking = np.flatnonzero(null_mask(file) & read).tolist()
    silent = np.flatnonzero(null_mask(detections) & ~null_mask(file) & ~failed & read).tolist()
    found["file"] = found.get("file", {}) | dict.fromkeys(lacking, f"it has no file; {_SHAPE}")
    silence = f"it has neither detections nor a failure; {_SHAPE}"
    found["detections"] = found.get("detections", {}) | dict.fromkeys(silent, silence)
    lengths, null = list_lengths(detections), null_mask(detections)
    category, conf, bbox = detections.flatten().flatten()
    ids, odd = _category_ids(category)
    ends = np.cumsum(lengths)
    found["category"] = {int(np.searchsorted(ends, at, side="right")): text for at, text in odd.items()}
    values = dict(zip(_COLUMNS[1:], (bbox, ids, conf), strict=True))
    columns = {n: to_lists(lengths, v, kind=pa.list_(v.type), null=null) for n, v in values.items()}
    return pa.table({"image_uri": file, **columns})


def _category_ids(category: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """Return the numbers of the categories, null for text that is none, and which are so and why."""
    whole = pc.match_substring_regex(category, r"\A[0-9]{1,9}\z")
    wrong = pc.fill_null(pc.invert(whole), False).to_numpy(zero_copy_only=False)
    odd = {
        at: f'category {category[at].as_py()!r} of a detection; wanted a number as text, such as "1"'
        for at in np.flatnonzero(wrong).tolist()
    }
    return pc.cast(pc.if_else(whole, category, pa.scalar(None, category.type)), pa.int64()), odd


def _categories(uri: str, access: AccessRules) -> tuple[dict[int, str], tuple[str, ...]]:
    """Return number -> name from `detection_categories`, wherever it is, and a sentence on other keys."""
    before, match = b"", None
    with open_input(uri, options_for(uri, access)) as stream:
        while match is None and (block := stream.read(CUT_BYTES)):
            match = _CATEGORIES.search(before + block)
            before = block[-(2**17) :]
    what = f"{uri}: detection_categories is not a map of numbers to names"
    try:
        pairs = json.loads(match[1]) if match else {}
    except ValueError as error:
        raise JobRefused(f"{what} ({clean_text(str(error))})") from None
    odd = [key for key in pairs if not re.fullmatch("[0-9]{1,9}", key)]
    if 2 * len(odd) > len(pairs):
        raise JobRefused(f"{what}: {examples(odd)}")
    names = {int(key): str(name) for key, name in pairs.items() if key not in odd}
    return names, (f"{what}, so these are left out: {examples(odd)}",) if odd else ()
