"""YOLO label folders: a `.txt` next to or for each picture, one line a box.

    class cx cy width height [score]

Shares of the upright picture, centre first; classes count from 0. A file belongs to the picture of the same
relative name without its ending; no file, or an empty one, means no boxes. Names of the classes come from
`classes.txt` (one a line), or from `names` in `data.yaml` or `dataset.yaml`, in the folder itself.

Lines with more numbers are polygons of YOLO segmentation, or turned boxes, and no boxes, unless the person
asks for the box around each: `class x1 y1 x2 y2 x3 y3 ... [score]`, at least three corners.

A line that is no box is one without a mask, a file that cannot be read fails its image; where most lines or
files are such, the folder is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import yaml

from hqlabel.pipeline.arrow_lists import to_lists
from hqlabel.pipeline.box_geometry import box_around
from hqlabel.pipeline.errors import ImageError, JobRefused, clean_text
from hqlabel.pipeline.inputs.box_tables import box_columns
from hqlabel.pipeline.inputs.columns import RowFaults
from hqlabel.pipeline.inputs.image_box_lists import NUMBERS, TEXT, BoxList, Groups, grouped_boxes
from hqlabel.pipeline.inputs.json_records import TextDamage
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.storage.backend import Entry
from hqlabel.pipeline.storage.read_objects import in_this_context, note_version, read_object
from hqlabel.pipeline.storage.uri_rules import options_for

READERS = 16
_FILE_BYTES = 16 * 2**20
_TIMEOUT_S = 120.0
_CLASSES, _YAML = "classes.txt", ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")
_POLYGON = "wanted polygons, `class x1 y1 x2 y2 x3 y3 ...`, or with a score behind"
_SHAPE = "wanted `class cx cy width height`, or with a score behind"


def label_files(folder: str, entries: Sequence[Entry]) -> list[str]:
    """Return the label files of a folder: every `.txt` that is not hidden, but the list of classes."""
    names = [entry.key for entry in entries if entry.key.lower().endswith(".txt")]
    shown = [
        key for key in names if not any(part.startswith(".") for part in key.removeprefix(folder).split("/"))
    ]
    return [key for key in shown if key != f"{folder}/{_CLASSES}"]


def read_yolo(
    folder: str, entries: Sequence[Entry], access: AccessRules, *, from_masks: bool = False
) -> BoxList:
    """Return the boxes of a folder's label files, each under the name of its file without ending.

    `from_masks`: the lines are polygons, and the box around each is wanted.

    Raises:
        JobRefused: most files cannot be read, or most lines are no boxes, naming the first one.
    """
    uris = label_files(folder, entries)
    read_line = _around_polygon if from_masks else _numbers
    lines, files = RowFaults(folder, "line"), RowFaults(folder, "file")
    with ThreadPoolExecutor(min(READERS, len(uris)) or 1) as pool:
        found = list(pool.map(in_this_context(lambda uri: _read(uri, access)), uris))
    unread = [reason for _, reason in found if reason is not None]
    files.tell("file", unread, len(uris))
    files.refuse_bad_columns()
    parts = [_boxes(uri, text, read_line, lines) for uri, (text, _) in zip(uris, found, strict=True)]
    lines.refuse_bad_columns()
    names = [uri.removeprefix(f"{folder}/")[: -len(".txt")] for uri in uris]
    lengths = np.array([len(part) for part in parts], np.int64)
    # (N, 6): class, four numbers, score; NaN for no score, and all NaN where a line is no box
    values = np.array([row for part in parts for row in part], np.float64).reshape(-1, 6)
    is_box, has_score = ~np.isnan(values[:, 0]), ~np.isnan(values[:, 5])
    given = to_lists(np.where(is_box, 4, 0), pa.array(values[is_box, 1:5].reshape(-1)), kind=NUMBERS)
    ids = np.where(is_box, values[:, 0], 0).astype(np.int64)
    columns: dict[str, pa.Array] = {"given": given, "category_id": pa.array(ids, mask=~is_box)}
    if has_score.any():
        columns["score"] = pa.array(values[:, 5], mask=~has_score)
    boxes = grouped_boxes(
        Groups(image_id=pa.array(names, TEXT), image_uri=None, lengths=lengths, rows=None),
        pa.table(box_columns(columns)),
        folder=folder,
        box_format="cxcywh-normalised",
        files=[f"{folder}/"],
        categories=_class_names(folder, entries, access),
    )
    notes = (
        *lines.notes("boxes get no mask (box_malformed)"),
        *files.notes("their images fail (labels_mismatch)"),
        *_notes(boxes),
    )
    error = pa.array([reason for _, reason in found], TEXT)
    return replace(boxes, error=error, by_stem=True, one_row_per_image=True, notes=notes)


def _read(uri: str, access: AccessRules) -> tuple[str, str | None]:
    """Return the text of a label file, or why it cannot be read."""
    try:
        return _text(uri, access), None
    except JobRefused as error:
        return "", str(error)


Line = Callable[[int, Sequence[str]], list[float]]


def _boxes(uri: str, text: str, read_line: Line, faults: RowFaults) -> list[list[float]]:
    """Return class, four numbers and score of each line that is not blank, all NaN where it is no box."""
    boxes, bad = [], []
    for at, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            boxes.append(read_line(at, line.split()))
        except TextDamage as error:
            boxes.append(_NO_BOX)
            bad.append(f"{uri}: {error}")
    faults.tell("line", bad, len(boxes))
    return boxes


_NO_BOX = [float("nan")] * 6


def _notes(boxes: BoxList) -> tuple[str, ...]:
    """Return a sentence where the folder does not name its classes; `data.yaml` is often one folder above."""
    if boxes.categories or not boxes.boxes.num_rows:
        return ()
    wanted = f"{_CLASSES}, {_YAML[0]} or {_YAML[1]}"
    return (f"{boxes.folder}: none of {wanted} is there, so classes have no names; copy one of them there",)


def _numbers(line: int, words: Sequence[str]) -> list[float]:
    text = clean_text(" ".join(words))
    if len(words) > 6:
        raise TextDamage(
            f"line {line} has {len(words)} numbers (a polygon or a turned box); {_SHAPE}; for the box "
            "around each polygon: --set input.boxes_from=masks"
        )
    if len(words) < 5:
        raise TextDamage(f"line {line} has {len(words)} numbers (too few): {text!r}; {_SHAPE}")
    return [*_floats(line, words, _SHAPE), float("nan")][:6]


def _around_polygon(line: int, words: Sequence[str]) -> list[float]:
    """Return class, centre, width, height and score of a line that is a polygon, with or without a score."""
    if len(words) < 7:
        raise TextDamage(
            f"line {line} has {len(words)} numbers; {_POLYGON} (input.boxes_from=masks); boxes and "
            "polygons in one folder are not told apart"
        )
    numbers = _floats(line, words, _POLYGON)
    corners, score = numbers[1:], float("nan")
    if len(corners) % 2:
        *corners, score = corners
    box = box_around(corners)
    if box is None:
        raise TextDamage(f"line {line} holds NaN or infinity; {_POLYGON}")
    x1, y1, x2, y2 = box
    return [numbers[0], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, score]


def _floats(line: int, words: Sequence[str], shape: str) -> list[float]:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise TextDamage(f"line {line} holds {clean_text(' '.join(words))!r}; {shape}") from None
    if not (numbers[0].is_integer() and 0 <= numbers[0] < 2**31):
        raise TextDamage(f"line {line}: the class is {words[0]}; wanted a whole number from 0 on")
    return numbers


def _class_names(folder: str, entries: Sequence[Entry], access: AccessRules) -> dict[int, str]:
    """Return class number -> name; empty where the folder does not name its classes."""
    there = {entry.key.removeprefix(f"{folder}/") for entry in entries}
    if _CLASSES in there:
        lines = _text(f"{folder}/{_CLASSES}", access).splitlines()
        return {at: line.strip() for at, line in enumerate(lines) if line.strip()}
    for name in _YAML:
        if name in there:
            return _names_in_yaml(f"{folder}/{name}", access)
    return {}


def _names_in_yaml(uri: str, access: AccessRules) -> dict[int, str]:
    try:
        names = (yaml.safe_load(_text(uri, access)) or {})["names"]
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        return {int(key): str(name) for key, name in pairs}
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise JobRefused(
            f"{uri}: no `names` of the classes in it ({type(error).__name__}); wanted a list, or number: name"
        ) from None


def _text(uri: str, access: AccessRules) -> str:
    try:
        deadline = time.monotonic() + _TIMEOUT_S
        body = read_object(uri, options_for(uri, access), max_bytes=_FILE_BYTES, deadline_monotonic=deadline)
        note_version(uri, body.etag)
        return body.data.decode("utf-8-sig")
    except (ImageError, UnicodeDecodeError) as error:
        raise JobRefused(f"{uri}: cannot be read: {clean_text(str(error))}") from error
