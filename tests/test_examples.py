"""The shipped photographs and boxes are whole, small, attributed, and worth showing."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageOps

PHOTOS = Path(__file__).resolve().parent.parent / "examples" / "photos"
BOXES = json.loads((PHOTOS / "boxes.json").read_text())
PICTURES = sorted(p.name for p in PHOTOS.iterdir() if p.suffix in (".jpg", ".png"))


def test_every_photograph_is_listed_with_its_upright_size() -> None:
    listed = {image["file_name"]: (image["width"], image["height"]) for image in BOXES["images"]}

    assert 6 <= len(PICTURES) <= 10
    assert sorted(listed) == PICTURES
    for name, size_wh in listed.items():
        with Image.open(PHOTOS / name) as picture:
            assert ImageOps.exif_transpose(picture).size == size_wh


def test_every_box_lies_in_its_picture_and_has_a_named_category() -> None:
    size_of = {image["id"]: (image["width"], image["height"]) for image in BOXES["images"]}
    categories = {category["id"] for category in BOXES["categories"]}

    for box in BOXES["annotations"]:
        (x, y, w, h), (width, height) = box["bbox"], size_of[box["image_id"]]
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        assert box["category_id"] in categories
    assert {box["image_id"] for box in BOXES["annotations"]} == set(size_of)
    assert len({box["id"] for box in BOXES["annotations"]}) == len(BOXES["annotations"])


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
