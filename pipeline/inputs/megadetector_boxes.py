"""MegaDetector's batch output: one JSON object with `images`, each with a `file` and its `detections`.

A box is x, y, width, height as shares of the upright picture; `conf` is its score; `category` a number as
text, named by `detection_categories`. An image with a `failure` has no detections: its boxes are missing, not
none. Streamed, like COCO files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.arrow_lists import first_null, list_lengths, null_mask, to_lists
from hqlabel.pipeline.errors import JobRefused, clean_text
from hqlabel.pipeline.inputs.box_tables import boxes_of_rows
from hqlabel.pipeline.inputs.columns import RowFaults
from hqlabel.pipeline.inputs.image_box_lists import NUMBERS, TEXT, BoxList
from hqlabel.pipeline.inputs.json_records import CUT_BYTES, first_byte, read_lines, split_arrays
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
    boxes = boxes_of_rows(
        ((uri, batch) for batch in _batches(uri, access)),
        _COLUMNS,
        RowFaults(uri),
        folder=folder,
        box_format="xywh-normalised",
    )
    return replace(boxes, categories=_categories(uri, access), files=(uri,))


def _batches(uri: str, access: AccessRules) -> Iterator[pa.Table]:
    with open_named(uri, "JSON", access) as stream:
        at = 0
        for lines in split_arrays(stream, {"images"}):
            yield _image_rows(read_lines(lines.text, lines.count, _IMAGES), uri, at)
            at += lines.count


def _image_rows(images: pa.Table, uri: str, first: int) -> pa.Table:
    """Return records of `images` as a table, one row an image; `first`: the number of the first record."""
    found = images.column("detections").combine_chunks()
    file = images.column("file").combine_chunks()
    if file.null_count:
        raise JobRefused(f"{uri}: image {first + first_null(file)} (from 0) has no file; {_SHAPE}")
    failed = images.column("failure").combine_chunks().is_valid().to_numpy(zero_copy_only=False)
    silent = null_mask(found) & ~failed
    if silent.any():
        at = first + int(silent.nonzero()[0][0])
        raise JobRefused(f"{uri}: image {at} (from 0) has neither detections nor a failure; {_SHAPE}")
    category, conf, bbox = found.flatten().flatten()
    values = dict(zip(_COLUMNS[1:], (bbox, _category_ids(category, uri), conf), strict=True))
    lengths, null = list_lengths(found), null_mask(found)
    columns = {n: to_lists(lengths, v, kind=pa.list_(v.type), null=null) for n, v in values.items()}
    return pa.table({"image_uri": file, **columns})


def _category_ids(category: pa.Array, uri: str) -> pa.Array:
    whole = pc.match_substring_regex(category, r"\A[0-9]{1,9}\z")
    wrong = pc.and_(category.is_valid(), pc.invert(whole)).to_numpy(zero_copy_only=False)
    if wrong.any():
        found = category[int(wrong.nonzero()[0][0])].as_py()
        raise JobRefused(
            f'{uri}: category {clean_text(found)!r} of a detection; wanted a number as text, such as "1"'
        )
    return pc.cast(category, pa.int64())


def _categories(uri: str, access: AccessRules) -> dict[int, str]:
    """Return number -> name from `detection_categories`, wherever it is; empty where there is none."""
    before, match = b"", None
    with open_input(uri, options_for(uri, access)) as stream:
        while match is None and (block := stream.read(CUT_BYTES)):
            match = _CATEGORIES.search(before + block)
            before = block[-(2**17) :]
    try:
        return {int(key): str(name) for key, name in json.loads(match[1]).items()} if match else {}
    except (ValueError, AttributeError) as error:
        raise JobRefused(
            f"{uri}: detection_categories is not a map of numbers to names ({clean_text(str(error))})"
        ) from None
