"""The shipped photographs and boxes are whole, small, attributed, and worth showing."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageOps

PHOTOS = Path(__file__).resolve().parent.parent / "examples" / "photos"
ROWS = [json.loads(line) for line in (PHOTOS / "boxes.jsonl").read_text().splitlines()]
PICTURES = sorted(p.name for p in PHOTOS.iterdir() if p.suffix in (".jpg", ".png"))


def test_every_photograph_has_its_line_of_boxes() -> None:
    assert 6 <= len(PICTURES) <= 10
    assert [row["image_uri"] for row in ROWS] == PICTURES
    assert all(row["boxes"] for row in ROWS)


def test_every_box_lies_in_its_upright_picture_and_has_a_label() -> None:
    for row in ROWS:
        with Image.open(PHOTOS / row["image_uri"]) as picture:
            width, height = ImageOps.exif_transpose(picture).size
        assert len(row["boxes"]) == len(row["labels"])
        for x1, y1, x2, y2 in row["boxes"]:
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height


def test_one_photograph_is_stored_turned_and_one_is_grey() -> None:
    orientations, modes = set(), set()
    for name in PICTURES:
        with Image.open(PHOTOS / name) as picture:
            orientations.add(picture.getexif().get(0x0112, 1))
            modes.add(picture.mode)

    assert orientations - {1}, "the demo should show that EXIF is heeded"
    assert {"RGB", "L"} <= modes


def test_every_photograph_is_attributed_with_a_licence() -> None:
    rows = [line for line in (PHOTOS / "ATTRIBUTION.md").read_text().splitlines() if line.startswith("| `")]
    listed = {row.split("`")[1]: row for row in rows}

    assert sorted(listed) == PICTURES
    for row in listed.values():
        assert any(word in row for word in ("CC0-1.0", "CC BY 2.0", "public domain", "no known copyright"))


def test_they_are_small() -> None:
    assert sum((PHOTOS / name).stat().st_size for name in PICTURES) < 2_000_000
    for name in PICTURES:
        with Image.open(PHOTOS / name) as picture:
            assert max(picture.size) <= 1024
