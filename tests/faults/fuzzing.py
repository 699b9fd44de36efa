"""Inputs that nobody would write by hand, and what may become of them: an outcome, or an error of the list.

A target takes what hypothesis draws and gives one word for what came of it. It raises for all else: an
exception that is no error of ours, a decoder that died, a message that does not name its file.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from hqlabel.jobs.evaluate.evaluate import EvaluateOptions
from hqlabel.jobs.evaluate.evaluate import run as evaluate_truth
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.results.select_rows import Selection
from hqlabel.model.checkpoints import load
from hqlabel.model.segmenter import Segmenter
from hqlabel.pipeline.errors import BOX_CODES, ImageError, JobRefused, UsageError
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.job_context import BoxRules, JobContext, Place, Weights
from hqlabel.pipeline.planning.make_plan import Plan, make_plan, write_plan
from hqlabel.pipeline.planning.suspicious_boxes import suspicions
from hqlabel.pipeline.settings import InputSettings, Limits, ModelSettings
from hqlabel.pipeline.stages.box_prompts import prompt_faults, resolve_boxes
from hqlabel.pipeline.stages.commit import commit_unit, read_outcome
from hqlabel.pipeline.stages.load_model import load_segmenter
from hqlabel.pipeline.stages.prepare import prepare_unit
from hqlabel.pipeline.stages.rows_between_stages import UnitRow, pack, unpack
from hqlabel.pipeline.stages.segment import SegmentWorker
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.unit_files import list_committed, read_committed
from tests.jobs.evaluate.test_ground_truth import RUNS, WRITTEN
from tests.jobs.made_outputs import MadeImage, blob, make_output

FORMATS = [f"{a}{b}" for a, b in itertools.product(("xyxy", "xywh", "cxcywh"), ("", "-normalised"))]
FRAMES = ["upright", "stored"]

# ---------------------------------------------------------------------------------------------
# Changes to good bytes
# ---------------------------------------------------------------------------------------------

TOKENS = (
    *(b"null", b"NaN", b"-Infinity", b"[", b"]", b"{", b"}", b'"', b"\\", b",", b":", b"\n", b"\r", b"-"),
    *(b"\xff", b"\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"1e999", b"9" * 30, b"true"),
)

cuts = st.integers(0, 2**20)
pieces = st.binary(max_size=4) | st.sampled_from(TOKENS)
changes = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "cut", "copy", "flip"]), cuts, pieces),
    min_size=1,
    max_size=6,
)


def changed(body: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    """`body` after a few edits, each at a place that is taken modulo its length."""
    for kind, place, piece in edits:
        at = place % (len(body) + 1)
        if kind == "set":
            body = body[:at] + piece + body[at + len(piece) :]
        elif kind == "insert":
            body = body[:at] + piece + body[at:]
        elif kind == "delete":
            body = body[:at] + body[at + 1 + place % 97 :]
        elif kind == "cut":
            body = body[:at]
        elif kind == "copy":
            body = body[:at] + body[at // 2 : at // 2 + 1 + place % 97] + body[at:]
        elif at < len(body):
            body = body[:at] + bytes([body[at] ^ (1 << place % 8)]) + body[at + 1 :]
    return body


# ---------------------------------------------------------------------------------------------
# Boxes
# ---------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0, -0.0, 64, 640, 1e-300, 1e308])
likely = st.tuples(st.floats(-50, 400), st.floats(-50, 400), st.floats(0, 900), st.floats(0, 900)).map(list)
lists = likely | st.none() | st.lists(st.none() | numbers, max_size=6) | st.tuples(*[numbers] * 4).map(list)
extras = st.fixed_dictionaries(
    {},
    optional={
        "points_xy": st.none() | st.lists(st.none() | numbers, max_size=5),
        "iscrowd": st.none() | st.booleans(),
        "point_labels": st.none() | st.lists(st.none() | st.integers(-2, 2), max_size=3),
    },
)
box_cases = st.fixed_dictionaries(
    {
        "boxes": st.lists(st.tuples(lists, extras), max_size=5),
        "rules": st.builds(BoxRules, box_format=st.sampled_from(FORMATS), box_frame=st.sampled_from(FRAMES)),
        "size_hw": st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)),
        "orientation": st.none() | st.integers(1, 8),
    }
)


def judge_boxes(case: Mapping[str, Any]) -> str:
    """`usable`, `mixed`, `unusable` or `none`: every box keeps its place, with a prompt or a listed code."""
    boxes = [{"given": given, **extra} for given, extra in case["boxes"]]
    rules, (height, width) = case["rules"], case["size_hw"]
    found = resolve_boxes(boxes, rules, upright_size_hw=case["size_hw"], orientation=case["orientation"])
    assert len(boxes) == len(found.error) == len(found.usable) == len(found.prompt_xyxy) == len(found.flags)
    for box, xyxy, usable, error in zip(
        boxes, found.prompt_xyxy.tolist(), found.usable, found.error, strict=True
    ):
        assert usable == (error is None)
        assert error is None or error in BOX_CODES
        assert (error == "crowd") == bool(box.get("iscrowd"))
        is_region = error == "crowd" and not math.isnan(xyxy[0])  # its box is sound
        if (usable or is_region) and box["given"] is not None:
            assert 0 <= xyxy[0] < xyxy[2] <= width
            assert 0 <= xyxy[1] < xyxy[3] <= height
        else:
            assert all(map(math.isnan, xyxy))
    _suspect(boxes, rules, case["size_hw"])
    if not boxes:
        return "none"
    return "usable" if found.usable.all() else "mixed" if found.usable.any() else "unusable"


def _suspect(boxes: list[dict[str, Any]], rules: BoxRules, size_hw: tuple[int, int]) -> None:
    whole = [box["given"] for box in boxes if box["given"] and len(box["given"]) == 4]
    given_N4 = np.array(whole, dtype=np.float64).reshape(-1, 4)
    upright = np.tile(np.array(size_hw, np.int64), (len(given_N4), 1))
    assert all(
        sentence.isprintable()
        for sentence in suspicions(given_N4, rules, upright_size_hw=upright, stored_size_hw=upright[:, ::-1])
    )


# ---------------------------------------------------------------------------------------------
# Tables and COCO files
# ---------------------------------------------------------------------------------------------

BOX = [1.0, 2.0, 3.0, 4.0]
_LISTS = {
    "image_uri": [f"s3://b/{i}.jpg" for i in range(12)],
    "boxes": [[BOX] * (i % 3) if i % 5 else None for i in range(12)],
    "labels": [["x"] * (i % 3) if i % 4 else None for i in range(12)],
}


def _parquet(columns: Any, **options: Any) -> bytes:
    body = io.BytesIO()
    pq.write_table(pa.table(columns), body, **options)
    return body.getvalue()


_CHECKED = {"compression": "zstd", "write_page_checksum": True, "write_page_index": True}
TABLES: dict[str, bytes] = {
    "plain.parquet": _parquet(_LISTS),
    "checked.parquet": _parquet(_LISTS, **_CHECKED),
    "rows.csv": b"image_uri,x1,y1,x2,y2,label\n" + b's3://b/1.jpg,1,2,3.5,4,"c,at"\n' * 5,
    "lists.csv": b'image_uri,boxes,labels\ns3://b/1.jpg,"[[1,2,3,4],[5,6,7,8]]","[""a"",""b""]"\n',
    "lists.jsonl": b"".join(
        b'{"image_uri": "s3://b/%d", "boxes": [[1, 2, 3, 4]], "labels": [1], "scores": [0.5]}\n' % i
        for i in range(5)
    ),
}
_INSTANCES = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 5, "height": 9} for i in range(5)],
    "annotations": [{"id": i, "image_id": i % 5, "bbox": BOX, "category_id": i % 3} for i in range(9)],
    "categories": [{"id": i, "name": "é"} for i in range(3)],
}
COCO: dict[str, bytes] = {
    "instances.json": json.dumps(_INSTANCES).encode(),
    "spread.json": json.dumps(_INSTANCES, indent=1).encode(),
}

table_cases = st.tuples(st.sampled_from(sorted(TABLES)), changes)

words = st.text(max_size=6) | st.sampled_from(["a.jpg", "0", "../x", "s3://b/k", "é", "\0", "=1+1"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
box_like = st.lists(st.integers(-9, 9) | st.floats(), min_size=4, max_size=4) | anything
ids = st.integers(0, 3) | words | anything


def _records(**kinds: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(st.fixed_dictionaries({}, optional=kinds) | anything, max_size=5)


trees = st.fixed_dictionaries(
    {},
    optional={
        "images": _records(id=ids, file_name=words | anything, width=anything, height=anything) | anything,
        "annotations": _records(
            image_id=ids, bbox=box_like, category_id=ids, score=anything, id=ids, segmentation=anything
        )
        | anything,
        "categories": _records(id=ids, name=words | anything) | anything,
    },
)
coco_cases = st.tuples(st.sampled_from(sorted(COCO)), changes) | trees


class Inputs:
    """Plans from one file after another, written under one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def plan_table(self, case: tuple[str, list[tuple[str, int, bytes]]]) -> str:
        """`planned` or `refused`; the refusal names the file."""
        name, edits = case
        return self.plan(name, changed(TABLES[name], edits))

    def plan_coco(self, case: Any) -> str:
        """The same for a COCO file, changed or made up."""
        if isinstance(case, tuple):
            name, edits = case
            return self.plan(name, changed(COCO[name], edits))
        return self.plan("made.json", json.dumps(case).encode())

    def plan(self, name: str, body: bytes) -> str:
        """`planned` or `refused`, for a file of boxes with these bytes."""
        path = self._folder / name
        path.write_bytes(body)
        plan, refusal = None, ""
        try:
            plan = make_plan(InputSettings(boxes=str(path)))
        except JobRefused as error:
            refusal = str(error)
        if plan is None:
            whose = (str(path), "not distinguished", "empty string")
            assert any(word in refusal for word in whose), refusal
            assert len(refusal) < 4000, "the text is not bounded"
            assert refusal.isprintable(), repr(refusal)
            return "refused"
        for row in plan.table.to_pylist():
            assert row["error_code"] in (None, "uri_refused", "labels_mismatch", "boxes_missing")
            resolve_boxes(row["boxes"] or [], BoxRules(), upright_size_hw=(5, 9))
        return "planned"


# ---------------------------------------------------------------------------------------------
# Prompts, from a table through every stage to committed rows
# ---------------------------------------------------------------------------------------------

# Pictures as they stand upright, (height, width); the turned one is stored the other way.
PROMPTED_HW = {"a.png": (97, 140), "dot.png": (1, 1), "line.png": (2, 150), "turned.jpg": (60, 48)}
SIDE = 128
PROMPTS_A_TABLE = 10
KINDS = [kind for kind in itertools.product((True, False), repeat=3) if any(kind)]  # box, points, mask
TABLE_KINDS = ("rows.jsonl", "lists.jsonl", "rows.csv", "rows.parquet")


def _text(lengths: list[int]) -> str:
    """Compressed runs, by pycocotools, which takes them from whoever asks."""
    return str(
        coco_mask.frPyObjects({"size": [1, sum(lengths)], "counts": lengths}, 1, sum(lengths))["counts"],
        "ascii",
    )


# What other programs, and people, make of a sound mask's size and runs.
MASK_MAKES: dict[str, Callable[[list[int], list[int]], Any]] = {
    "sound": lambda size, runs: {"size": size, "counts": _text(runs)},
    "uncompressed": lambda size, runs: {"size": size, "counts": runs},
    "swapped": lambda size, runs: {"size": size[::-1], "counts": _text(runs)},
    "floats": lambda size, runs: {"size": [float(side) for side in size], "counts": _text(runs)},
    "half": lambda size, runs: {"size": [side + 0.5 for side in size], "counts": _text(runs)},
    "strings": lambda size, runs: {"size": [str(side) for side in size], "counts": _text(runs)},
    "negative": lambda size, runs: {"size": [-side for side in size], "counts": _text(runs)},
    "huge": lambda size, runs: {"size": [2**31 - 1, 2**31 - 1], "counts": _text(runs)},
    "too huge": lambda size, runs: {"size": [2**70, 2**63], "counts": _text(runs)},
    "a side": lambda size, runs: {"size": size[:1], "counts": _text(runs)},
    "no size": lambda size, runs: {"size": None, "counts": _text(runs)},
    "other size": lambda size, runs: {"size": [size[0] + 1, size[1]], "counts": _text(runs)},
    "bytes": lambda size, runs: {"size": size, "counts": str(_text(runs).encode())},
    "base64": lambda size, runs: {"size": size, "counts": base64.b64encode(_text(runs).encode()).decode()},
    "cut": lambda size, runs: {"size": size, "counts": _text(runs)[:-1]},
    "longer": lambda size, runs: {"size": size, "counts": _text([*runs, 1])},
    "padded": lambda size, runs: {"size": size, "counts": "PPPPPPP0" + _text(runs)},
    "a negative run": lambda size, runs: {"size": size, "counts": [-1, *runs, 1]},
    "a long run": lambda size, runs: {"size": size, "counts": [2**40]},
    "float runs": lambda size, runs: {"size": size, "counts": [float(run) for run in runs]},
    "null": lambda size, runs: {"size": size, "counts": None},
    "empty": lambda size, runs: {"size": size, "counts": ""},
    "open": lambda size, runs: {"size": size, "counts": "o" * 5000},
    "zeros": lambda size, runs: {"size": size, "counts": "0" * 50_000 + _text(runs)},
    "letters": lambda size, runs: {"size": size, "counts": "Ä\ud800\x00\u202e"},
    "nothing": lambda size, runs: {},
    "polygon": lambda size, runs: [[0, 0, 5, 0, 5, 5]],
    "a word": lambda size, runs: _text(runs),
    "a number": lambda size, runs: 7,
}
far = st.sampled_from([math.nan, math.inf, -math.inf, 1e300, -1e308, 1e9, -0.5, "7", None, [1], True])
MANY = 5000


@st.composite
def _masks(draw: st.DrawFn, size_hw: tuple[int, int]) -> Any:
    pixels = size_hw[0] * size_hw[1]
    cuts_at = sorted(draw(st.lists(st.integers(0, pixels), max_size=6)))
    runs = [b - a for a, b in itertools.pairwise([0, *cuts_at, pixels])]
    make = draw(st.just("sound") | st.sampled_from(sorted(MASK_MAKES)))
    mask = MASK_MAKES[make](list(size_hw), runs)
    if isinstance(mask, dict) and draw(st.integers(0, 9)) == 0:
        mask["counts"] = draw(st.text(max_size=8) | st.text("0123456789PONMLo", max_size=20) | anything)
    return mask


@st.composite
def _points(draw: st.DrawFn, size_hw: tuple[int, int]) -> tuple[Any, Any]:
    height, width = size_hw
    near = st.tuples(st.floats(0, width), st.floats(0, height)).map(list)
    points: Any = draw(st.lists(near, min_size=1, max_size=4))
    labels: Any = draw(st.lists(st.sampled_from([1, 1, 0, -1]), min_size=len(points), max_size=len(points)))
    harm = draw(st.integers(0, 24))
    if harm == 0:
        points[0][0] = draw(far)
    elif harm == 1:
        labels[0] = draw(st.sampled_from([2, None, 1.0, "1", 2**40, -2, True]))
    elif harm == 2:
        points, labels = "MANY", None  # in short, for the sake of what is printed of a find
    elif harm == 3:
        points, labels = draw(
            st.sampled_from([([], []), (points, None), (None, labels), (points, labels[1:])])
        )
    elif harm == 4:
        points = draw(st.sampled_from([[1.0, 2.0], [[1.0]], [[1.0, 2.0, 3.0]], "1,2", [[[1.0, 2.0]]]]))
    elif harm == 5:
        labels = [0] * len(points)
    return points, labels


@st.composite
def _prompts(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(sorted(PROMPTED_HW)))
    has_box, has_points, has_mask = draw(st.sampled_from(KINDS))
    height, width = size_hw = PROMPTED_HW[name]
    box = [draw(st.floats(0, width / 2)), draw(st.floats(0, height / 2)), float(width), float(height)]
    if draw(st.integers(0, 7)) == 0:
        box = draw(lists)
    points, labels = draw(_points(size_hw)) if has_points else (None, None)
    return {
        "image_id": name,
        "bbox": box if has_box else None,
        "points": points,
        "point_labels": labels,
        "prompt_mask": draw(_masks(size_hw)) if has_mask else None,
        "score": draw(st.none() | numbers),
        "box_id": draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)),
    }


prompt_cases = st.tuples(
    st.sampled_from(TABLE_KINDS), st.lists(_prompts(), min_size=PROMPTS_A_TABLE, max_size=2 * PROMPTS_A_TABLE)
)


def _written(kind: str, rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Writes the table as other programs do: text with whatever is in a row, Parquet with typed columns.

    Returns the rows that then stand in it.
    """
    many = {"points": [[1.0, 0.5]] * MANY, "point_labels": [1] * MANY}
    rows = given = [row | many if row["points"] == "MANY" else row for row in rows]
    if kind == "lists.jsonl":
        by_image: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_image.setdefault(row["image_id"], []).append(row)
        plural = {"bbox": "boxes", "score": "scores", "box_id": "box_ids"}
        rows = [
            {"image_id": name}
            | {plural.get(key, key): [one[key] for one in some] for key in list(rows[0])[1:]}
            for name, some in by_image.items()
        ]
    if kind.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind.endswith(".csv"):
        with path.open("w", newline="", errors="replace") as file:
            writer = csv.writer(file)
            writer.writerow(rows[0])
            for row in rows:
                cells = (
                    v if isinstance(v, str) else "" if v is None else json.dumps(v) for v in row.values()
                )
                writer.writerow(cells)
    else:
        counts = next(
            (
                type(m["counts"])
                for row in rows
                if isinstance(m := row["prompt_mask"], dict) and m.get("counts")
            ),
            str,
        )
        kinds = _PARQUET | {
            "prompt_mask": _mask_type(pa.list_(pa.int64()) if counts is list else pa.string())
        }
        typed = [{n: _typed(row[n], kind) for n, kind in kinds.items()} for row in rows]
        table = pa.Table.from_pylist(typed, schema=pa.schema(list(kinds.items())))
        pq.write_table(table, path)
        given = table.to_pylist()  # Arrow makes 1 of 1.5
    return given


def _mask_type(counts: pa.DataType) -> pa.DataType:
    return pa.struct([("size", pa.list_(pa.int64())), ("counts", counts)])


_PARQUET = {
    "image_id": pa.string(),
    "bbox": pa.list_(pa.float64()),
    "points": pa.list_(pa.list_(pa.float64())),
    "point_labels": pa.list_(pa.int64()),
    "score": pa.float64(),
    "box_id": pa.string(),
}


def _typed(value: Any, kind: pa.DataType) -> Any:
    """The value, null where a column of that type cannot hold it."""
    try:
        pa.array([value], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None
    return value


_MODELS: dict[str, Segmenter] = {}


def shared_segmenter(context: JobContext, use_gpu: bool) -> Segmenter:
    """The job's real model; for `JobContext.segmenter`. Loaded once in a process."""
    source = context.weights.source
    if source not in _MODELS:
        _MODELS[source] = load_segmenter(context, use_gpu)
    return _MODELS[source]


def _holds_nothing(row: Mapping[str, Any]) -> bool:
    """Whether a row names its image alone, as a left join writes an image without boxes."""
    corners, score = row["bbox"], row["score"]
    return (
        (corners is None or all(corner is None for corner in corners))
        and (score is None or score != score)
        and all(row[name] is None for name in ("points", "point_labels", "prompt_mask", "box_id"))
    )


@dataclass(kw_only=True)
class PromptStages:
    """Tables of prompts through planning, decoding, the real model and the commit.

    `rows`: what came of the prompts, by the reason why a box has no mask.
    """

    folder: Path
    checkpoint: Path
    child: DecodeChild
    rows: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        (self.folder / "images").mkdir()
        for name, (height, width) in PROMPTED_HW.items():
            exif = Image.Exif()
            turned = name.startswith("turned")
            if turned:
                exif[0x0112] = 6
            shape = (width, height, 3) if turned else (height, width, 3)
            pixels = np.random.default_rng(height).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(self.folder / "images" / name, exif=exif)
        self._weights = Weights(
            source=str(self.checkpoint), sha256=load(self.checkpoint).weights.sha256, input_side=SIDE
        )

    def run(self, case: tuple[str, list[dict[str, Any]]]) -> str:
        """`planned` or `refused`; every row of a plan ends with a mask or with a listed reason."""
        kind, rows = case
        path, output = self.folder / f"boxes-{kind}", self.folder / "out"
        rows = _written(kind, rows, path)
        try:
            plan = make_plan(InputSettings(images=str(self.folder / "images"), boxes=str(path)))
        except JobRefused as error:
            text = str(error)
            assert str(path) in text, text
            assert len(text) < 4000, "the text is not bounded"
            assert text.isprintable(), repr(text)
            self.rows["(refused with its file)"] += len(rows)
            return "refused"
        try:
            self._check(rows, plan, self._committed(plan, output))
        finally:
            shutil.rmtree(output, ignore_errors=True)
        return "planned"

    def _committed(self, plan: Plan, output: Path) -> list[dict[str, Any]]:
        context = JobContext(
            output=Place(uri=str(output)),
            plan_sha256=plan.sha256,
            images_per_unit=64,
            run_id="fuzz",
            weights=self._weights,
            model=ModelSettings(dtype="float32", images_per_call=2, boxes_per_call=4),
            box_rules=BoxRules(box_frame=plan.summary.box_frame),
            access=plan.access,
            limits=Limits(),
            segmenter="tests.faults.fuzzing:shared_segmenter",
        )
        store = Store(context.output)
        write_plan(store, plan)
        ready = unpack(pack(*prepare_unit(UnitRow(unit_id=0), context, store, self.child)))
        done = unpack(pack(SegmentWorker(context, epoch=1, use_gpu=False, end_process=_died).run(ready)))
        read_outcome(commit_unit(done, context, store))
        found: list[dict[str, Any]] = read_committed(store, list_committed(store)[0]).to_pylist()
        return found

    def _check(self, given: list[dict[str, Any]], plan: Plan, found: list[dict[str, Any]]) -> None:
        assert {row["image_id"] for row in found} == set(PROMPTED_HW)
        invalid = 0
        for row in found:
            assert row["error_code"] in (None, "no_usable_box", "labels_mismatch"), row["error_message"]
            mine = [one for one in given if one["image_id"] == row["image_id"]]
            if row["error_code"] == "labels_mismatch":  # a value in its lists cannot be read
                assert not any(one["segmentation"] for one in row["instances"])
                self.rows["(of a failed image)"] += len(mine)
                continue
            if len(row["instances"]) < len(mine):  # rows of a left join are no boxes
                mine = [one for one in mine if not _holds_nothing(one)]
            assert len(mine) == len(row["instances"])
            for one, instance in zip(mine, row["instances"], strict=True):
                reason = instance["box_error"]
                self.rows[reason or "mask"] += 1
                invalid += reason == "prompt_invalid"
                assert reason is None or reason in BOX_CODES
                assert (reason is None) == (instance["segmentation"] is not None)
                if reason is None and one["prompt_mask"] is not None:
                    assert _is_mask_of(one["prompt_mask"], PROMPTED_HW[row["image_id"]]), one
        planned = [box for row in plan.table.to_pylist() for box in row["boxes"] or ()]
        assert plan.summary.invalid_prompts == sum(fault is not None for fault in prompt_faults(planned))
        said = [line for line in plan.summary.warnings if "prompt_invalid" in line]
        assert len(said) == bool(plan.summary.invalid_prompts)
        assert all(line.isprintable() and len(line) < 1000 for line in said)


def _is_mask_of(mask: Any, size_hw: tuple[int, int]) -> bool:
    """Whether a mask that was used is one, by a plain reading of its runs."""
    if not isinstance(mask, dict) or [*mask["size"]] != [*size_hw]:
        return False
    runs = mask["counts"] if isinstance(mask["counts"], list) else plain_runs(mask["counts"])
    return min(runs) >= 0 and sum(runs) == size_hw[0] * size_hw[1]


def plain_runs(text: str) -> list[int]:
    """The runs in a compressed text, letter by letter, as cocoapi's rleFrString says."""
    runs: list[int] = []
    number = shift = 0
    for letter in text:
        code = ord(letter) - 48
        number |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        number -= (1 << shift) if code & 16 else 0
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    return runs


def _died(status: int) -> None:
    raise AssertionError(f"the model process ended itself with {status}")


# Ground truth
# ---------------------------------------------------------------------------------------------

TRUTHS = {program: text.replace("RUNS", RUNS) for program, text in sorted(WRITTEN.items())}
_ODD_NUMBERS = (
    0,
    1,
    2,
    -1,
    0.5,
    4800,
    4801,
    60,
    80,
    1e8,
    -1e8,
    1e308,
    2**31,
    2**32 + 5,
    2**63,
    10**30,
    math.nan,
)
_ODD_WORDS = ("", "0", "1", "60", "b'0'", "PPP", "0n0n0", "eJwz0DEAAAKgAQ==", "\ud800", "cat", "NaN")

numbers_of_any_kind = st.sampled_from(_ODD_NUMBERS) | st.integers(-100, 5000) | st.floats()
coordinates = st.floats(-700, 800) | st.integers(-10, 90) | numbers_of_any_kind
polygons = st.lists(st.lists(coordinates, max_size=14), max_size=4)
run_lists = st.lists(st.integers(-2, 900) | numbers_of_any_kind, max_size=30)
run_texts = st.text(st.characters(min_codepoint=44, max_codepoint=115), max_size=40)
rles = st.fixed_dictionaries(
    {}, optional={"size": st.just([60, 80]) | anything, "counts": run_lists | run_texts | anything}
)
odd_values = (
    numbers_of_any_kind | st.sampled_from(_ODD_WORDS) | st.booleans() | st.none() | polygons | rles | anything
)
node_edits = st.lists(
    st.tuples(st.sampled_from(["set", "set", "set", "delete", "again"]), cuts, odd_values),
    min_size=1,
    max_size=4,
)
points = st.tuples(st.floats(-790, 870) | st.integers(-10, 90), st.floats(-590, 650) | st.integers(-10, 70))
sound_polygons = st.lists(
    st.lists(points, min_size=3, max_size=8).map(lambda found: [float(v) for point in found for v in point]),
    min_size=1,
    max_size=4,
)
sound_runs = st.lists(st.integers(0, 1600), max_size=30).map(
    lambda runs: {"size": [60, 80], "counts": np.diff(np.minimum(np.cumsum([0, *runs, 4800]), 4800)).tolist()}
)


def _drawn(masks: st.SearchStrategy[Any], **keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Files of one image and one category, whose annotations have masks and keys like these."""
    annotation = st.fixed_dictionaries({"segmentation": masks}, optional=keys)
    return st.lists(annotation, max_size=5).map(
        lambda found: {
            "images": [{"id": 0, "file_name": "a.jpg", "height": 60, "width": 80}],
            "annotations": [{"id": n, "image_id": 0, "category_id": 0, **one} for n, one in enumerate(found)],
            "categories": [{"id": 0, "name": "cat"}],
        }
    )


sound_truths = _drawn(
    sound_polygons | sound_runs,
    iscrowd=st.sampled_from([0, 1, True, False, None]),
    area=st.sampled_from([0, 0.5, 900, 1e10, None]),
    bbox=st.none() | st.tuples(*[st.floats(-1e6, 1e6)] * 2, *[st.floats(0, 1e6)] * 2),
    ignore=st.integers(0, 1),
)
odd_truths = _drawn(
    sound_polygons | sound_runs | polygons | rles,
    iscrowd=odd_values,
    area=numbers_of_any_kind,
    bbox=st.lists(coordinates, min_size=3, max_size=4),
)
truth_cases = st.one_of(
    st.tuples(st.sampled_from(list(TRUTHS)), changes),
    st.tuples(st.sampled_from(list(TRUTHS)), node_edits),
    odd_truths,
    sound_truths.map(lambda tree: ("sound", tree)),
    trees,
)


def truth_body(case: Any) -> bytes:
    """The bytes of a file of ground truth: a program's text with bytes or values changed, or made up."""
    if not isinstance(case, tuple):
        return json.dumps(case).encode()
    program, edits = case
    if program == "sound":
        return json.dumps(edits).encode()
    if edits[0][0] in ("set", "delete", "again") and not isinstance(edits[0][2], bytes):
        return json.dumps(_with_odd_values(json.loads(TRUTHS[program]), edits)).encode()
    return changed(TRUTHS[program].encode(), edits)


def _with_odd_values(tree: Any, edits: list[tuple[str, int, Any]]) -> Any:
    """The tree after each edit, at a place that is taken modulo the number of values in it."""
    for kind, place, value in edits:
        slots = list(_slots(tree))
        inside, key = slots[place % len(slots)]
        if kind == "set":
            inside[key] = value
        elif kind == "delete":
            del inside[key]
        elif isinstance(inside, list):
            inside.append(inside[key])
        if not list(_slots(tree)):
            break
    return tree


def _slots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree of lists and objects where a value stands."""
    if isinstance(tree, list | dict):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _slots(tree[key])


class TruthJudge:
    """`hqlabel evaluate` of one file after another, in a process of its own: its C code may hang or die.

    `most_mib`: what one file made that process grow by.
    """

    def __init__(self, folder: Path, *, bound_s: float, budget_mib: float) -> None:
        self._folder = folder
        self._bound_s = bound_s
        self._budget_mib = budget_mib
        masks, kinds = [blob(1), blob(2)], [(0, "cat"), (3, "dog")]
        images = [MadeImage(image_id=name, masks=masks, categories=kinds) for name in ("0", "1", "2", "7")]
        make_output(folder / "out", images)
        self.most_mib = 0.0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_judge_truths, args=(self._folder, theirs), daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.recv() == "ready"

    def judge(self, case: Any) -> str:
        """`judged`, or `refused` by a message that is one line, of bounded length, and names the file."""
        outcome = self.judge_bytes(truth_body(case))
        assert outcome == "judged" or not isinstance(case, tuple) or case[0] != "sound", case
        return outcome

    def judge_bytes(self, body: bytes) -> str:
        """The same for the bytes of a file."""
        (self._folder / "truth.json").write_bytes(body)
        self._pipe.send("judge")
        try:
            said = self._pipe.recv() if self._pipe.poll(self._bound_s) else None
        except (EOFError, OSError):
            said = None
        if said is None:
            how = "hung" if self._process.is_alive() else f"died ({self._process.exitcode})"
            self.close()
            self._start()
            raise AssertionError(f"evaluate {how} over {body!r}")
        outcome, words, grown_mib = said
        self.most_mib = max(self.most_mib, grown_mib)
        assert outcome in ("judged", "refused"), f"{words}: {body!r}"
        assert grown_mib < self._budget_mib, f"{grown_mib:.0f} MiB: {body!r}"
        if outcome == "refused":
            assert words.isprintable()
            assert len(words) < 4000
            assert "truth" in words, words
        return str(outcome)

    def close(self) -> None:
        """None; the process is gone."""
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _judge_truths(folder: Path, pipe: Any) -> None:
    """The process of a TruthJudge: for each word, (outcome, message or traceback, MiB that it grew by)."""
    given = ConfigSources(flags={"output.uri": str(folder / "out")})
    options = EvaluateOptions(truth=str(folder / "truth.json"), selection=Selection(), json=True)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # of pycocotools 2.0.11
    pipe.send("ready")
    while True:
        try:
            pipe.recv()
        except (EOFError, OSError):  # the tests are over
            return
        before = _reset_peak()
        outcome, words = "judged", ""
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                evaluate_truth(given, options)
        except (JobRefused, UsageError) as error:
            outcome, words = "refused", str(error)
        except BaseException:
            outcome, words = "broke", traceback.format_exc()
        pipe.send((outcome, words, _peak_mib() - before))


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def _picture(mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((40, 28), Image.Resampling.BICUBIC).convert(mode)


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    body = io.BytesIO()
    picture.copy().save(body, kind, **options)
    return body.getvalue()


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    return exif


def _frames() -> dict[str, Any]:
    """Options for a second frame; made anew each time, because saving leaves its settings in a picture."""
    return {"save_all": True, "append_images": [_picture("L").convert("RGB")]}


def _pictures() -> dict[str, bytes]:
    rgb = _picture()
    return {
        "jpeg": _encoded(rgb, "JPEG", quality=90, exif=_exif()),
        "jpeg progressive": _encoded(rgb, "JPEG", progressive=True, icc_profile=b"\x13" * 60),
        "jpeg cmyk": _encoded(_picture("CMYK"), "JPEG", restart_marker_blocks=2),
        "mpo": _encoded(rgb, "MPO", **_frames()),
        "png": _encoded(rgb, "PNG", exif=_exif()),
        "png palette": _encoded(rgb.quantize(9), "PNG", transparency=1),
        "png grey alpha": _encoded(_picture("LA"), "PNG"),
        "png 16": _encoded(Image.fromarray(np.arange(1120, dtype=np.uint16).reshape(28, 40)), "PNG"),
        "apng": _encoded(rgb, "PNG", **_frames()),
        "webp": _encoded(rgb, "WEBP", quality=80, exif=_exif()),
        "webp lossless": _encoded(_picture("RGBA"), "WEBP", lossless=True),
        "webp animated": _encoded(rgb, "WEBP", **_frames()),
        "tiff": _encoded(rgb, "TIFF"),
        "tiff lzw": _encoded(rgb, "TIFF", compression="tiff_lzw", exif=_exif()),
        "tiff jpeg": _encoded(rgb, "TIFF", compression="jpeg"),
        "tiff deflate": _encoded(_picture("L"), "TIFF", compression="tiff_adobe_deflate"),
        "tiff fax": _encoded(_picture("1"), "TIFF", compression="group4"),
        "tiff pages": _encoded(rgb, "TIFF", **_frames()),
        "gif": _encoded(rgb.quantize(16), "GIF"),
        "gif animated": _encoded(rgb.quantize(16), "GIF", save_all=True, append_images=[rgb.quantize(4)]),
        "bmp": _encoded(rgb, "BMP"),
    }


PICTURES = _pictures()
picture_cases = st.tuples(st.sampled_from(sorted(PICTURES)), changes)


def decode_picture(child: DecodeChild, case: tuple[str, list[tuple[str, int, bytes]]]) -> str:
    """`decoded`, or the code of the error; a decoder that died or hung is a find, not an outcome."""
    name, edits = case
    return decode_bytes(child, changed(PICTURES[name], edits))


def decode_bytes(child: DecodeChild, data: bytes) -> str:
    failure: ImageError | None = None
    try:
        found = child.decode(data)
    except ImageError as error:
        failure = error
    if failure is None:
        assert max(found.pixels_hwc.shape[:2]) == 64
        return "decoded"
    assert failure.code not in ("crashed", "timeout"), f"{failure}: {data.hex()}"
    assert failure.message.isprintable()
    return failure.code


# ---------------------------------------------------------------------------------------------
# Measured
# ---------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Tally:
    """What came of all examples of a target, the longest time and the largest growth of this process."""

    outcomes: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    most_mib: float = 0.0

    def measure(
        self,
        target: Callable[[Any], str],
        case: Any,
        *,
        bound_s: float,
        budget_mib: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """None; the example is counted, and was within its bounds."""
        before = _reset_peak()
        began = clock()
        outcome = target(case)
        seconds, grown = clock() - began, _peak_mib() - before
        self.outcomes[outcome] += 1
        self.longest_s = max(self.longest_s, seconds)
        self.most_mib = max(self.most_mib, grown)
        assert seconds < bound_s, f"{outcome} took {seconds:.1f} s"
        assert grown < budget_mib, f"{outcome} took {grown:.0f} MiB"

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count:,}" for name, count in self.outcomes.most_common())
        total = sum(self.outcomes.values())
        return f"{total:,} examples, longest {self.longest_s:.2f} s, most {self.most_mib:.0f} MiB: {counts}"


def _reset_peak() -> float:
    """What this process holds now, in MiB; its peak is counted from here on (Linux)."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _peak_mib() -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10
