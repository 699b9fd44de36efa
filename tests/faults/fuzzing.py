"""Inputs that nobody would write by hand, and what may become of them: an outcome, or an error of the list.

A target takes what hypothesis draws and gives one word for what came of it. It raises for all else: an
exception that is no error of ours, a decoder that died, a message that does not name its file.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from pipeline.boxes import resolve_boxes, suspicions
from pipeline.decode_child import DecodeChild
from pipeline.errors import BOX_CODES, ImageError, JobRefused
from pipeline.inputs import InputSettings
from pipeline.plan import make_plan
from pipeline.records import BoxRules

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
            whose = (str(path), "not told apart", "empty string")
            assert any(word in refusal for word in whose), refusal
            assert len(refusal) < 4000, "the text is not bounded"
            assert refusal.isprintable(), repr(refusal)
            return "refused"
        for row in plan.table.to_pylist():
            assert row["error_code"] in (None, "uri_refused", "labels_mismatch", "boxes_missing")
            resolve_boxes(row["boxes"] or [], BoxRules(), upright_size_hw=(5, 9))
        return "planned"


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

    def measure(self, target: Callable[[Any], str], case: Any, *, bound_s: float, budget_mib: float) -> None:
        """None; the example is counted, and was within its bounds."""
        before = _reset_peak()
        began = time.perf_counter()
        outcome = target(case)
        seconds, grown = time.perf_counter() - began, _peak_mib() - before
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
