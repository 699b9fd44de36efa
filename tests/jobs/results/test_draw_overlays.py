"""What is drawn: a thin prompt box, an edge and a light fill for the mask, dashes where there is none."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from hqlabel.jobs.results.draw_overlays import DrawnInstance, Tile, contact_sheet, draw_overlay, png_bytes

GREY = (100, 100, 100)


def rle(mask_hw: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask_hw.astype(np.uint8)))
    return {"size_hw": tuple(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def square(height: int = 60, width: int = 80) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[20:40, 30:50] = True
    return mask


def tile(*instances: DrawnInstance, size: tuple[int, int] = (80, 60), caption: str = "") -> Tile:
    picture = Image.new("RGB", size, GREY)
    return Tile(picture=picture, size_hw=(size[1], size[0]), instances=instances, caption=caption)


def changed(before: Tile, longest_side: int = 80) -> np.ndarray:
    drawn = np.asarray(draw_overlay(before, longest_side=longest_side)).astype(int)
    return np.abs(drawn - 100).sum(axis=2)


def test_the_mask_has_an_edge_and_a_light_fill_and_nothing_outside_changes() -> None:
    difference = changed(tile(DrawnInstance(box_xyxy=None, **rle(square()))))
    assert (difference > 0).sum() == 20 * 20
    assert difference[20, 40] > 2 * difference[30, 40] > 0


def test_a_mask_that_leaves_the_picture_has_an_edge_there_too() -> None:
    mask = np.ones((60, 80), dtype=bool)
    difference = changed(tile(DrawnInstance(box_xyxy=None, **rle(mask))))
    assert difference[0, 40] > difference[30, 40]
    assert difference[59, 40] > difference[30, 40]


def test_an_edge_can_be_wider_and_grows_inwards_alone() -> None:
    given = tile(DrawnInstance(box_xyxy=None, **rle(square())))
    drawn = np.asarray(draw_overlay(given, longest_side=80, edge_px=3)).astype(int)
    difference = np.abs(drawn - 100).sum(axis=2)
    assert (difference > 0).sum() == 20 * 20
    assert (difference == difference[20, 40]).sum() == 20 * 20 - 14 * 14


def test_an_edge_is_every_pixel_whose_square_neighbourhood_leaves_the_mask() -> None:
    """Counted pixel by pixel, on a ragged mask that reaches all four borders."""
    mask = (np.random.default_rng(3).random((23, 31)) > 0.06).astype(np.uint8)
    ringed = np.pad(mask, 2)
    expected = [(y, x) for y, x in np.argwhere(mask) if not ringed[y : y + 5, x : x + 5].all()]

    given = tile(DrawnInstance(box_xyxy=None, **rle(mask)), size=(31, 23))
    drawn = np.asarray(draw_overlay(given, longest_side=31, edge_px=2)).astype(int)

    difference = np.abs(drawn - 100).sum(axis=2)
    assert np.argwhere(difference == difference.max()).tolist() == [[int(y), int(x)] for y, x in expected]
    assert 0 < len(expected) < mask.sum()


def test_a_hole_stays_open() -> None:
    mask = square()
    mask[28:32, 38:42] = False
    difference = changed(tile(DrawnInstance(box_xyxy=None, **rle(mask))))
    assert (difference[28:32, 38:42] == 0).all()


def test_the_prompt_box_is_one_pixel_thin_where_it_belongs() -> None:
    difference = changed(tile(DrawnInstance(box_xyxy=(10, 5, 60, 50), **rle(square()))))
    column = difference[12, :20]
    assert np.flatnonzero(column).tolist() == [10]
    assert np.flatnonzero(difference[:10, 55]).tolist() == [5]
    assert difference[49, 20] > 0
    assert difference[20, 59] > 0


def test_a_box_without_a_mask_is_dashed() -> None:
    difference = changed(tile(DrawnInstance(box_xyxy=(10, 5, 60, 50))))
    top = difference[5, 10:60] > 0
    assert top.any()
    assert not top.all()


@pytest.mark.parametrize(
    "box",
    [
        (float("nan"), 0, 1, 1),
        (1e30, 0, 2e30, 1),
        (-90, -90, -50, -50),
        (50, 50, 10, 10),
        (-1e9, -1e9, 1e9, 1e9),
    ],
)
def test_an_odd_box_never_breaks_a_picture(box: tuple[float, float, float, float]) -> None:
    assert draw_overlay(tile(DrawnInstance(box_xyxy=box, text="x")), longest_side=80).size == (80, 60)


def test_boxes_and_masks_shrink_together() -> None:
    large = np.zeros((600, 800), dtype=bool)
    large[200:400, 300:500] = True
    given = tile(DrawnInstance(box_xyxy=(300, 200, 500, 400), **rle(large)), size=(800, 600))
    difference = changed(given, longest_side=80)
    rows, columns = np.nonzero(difference)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 39, 30, 49)


def test_a_picture_is_enlarged_only_when_that_is_asked() -> None:
    assert draw_overlay(tile(), longest_side=4000).size == (80, 60)
    assert draw_overlay(tile(), longest_side=4000, max_scale=2).size == (160, 120)
    assert draw_overlay(tile(), longest_side=100, max_scale=2).size == (100, 75)


def test_the_sheet_holds_every_tile_inside_its_frame() -> None:
    tiles = [tile(size=(80 + 40 * i, 60), caption=f"picture {i} " + "x" * 300) for i in range(5)]
    sheet = contact_sheet(tiles, title="out", notes=["a note"], columns=4, tile_px=100)
    assert sheet.width == 14 + 4 * 114
    assert sheet.height > 2 * 75
    body = png_bytes(sheet)
    assert Image.open(io.BytesIO(body)).size == sheet.size


def test_one_tile_makes_a_sheet_of_one_column() -> None:
    assert contact_sheet([tile()], title="t", tile_px=100).width == 14 + 114


def test_texts_from_outside_are_drawn_escaped() -> None:
    contact_sheet(
        [tile(DrawnInstance(box_xyxy=(0, 0, 9, 9), text="\n\x00猫"), caption="a\nb\x1b")], title="\n"
    )
