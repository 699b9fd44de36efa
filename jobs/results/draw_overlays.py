"""Pictures of results: prompts and masks drawn over an image, and a contact sheet of several.

The prompt box is a thin line, the mask an edge with a light fill, so that the picture under it stays
visible and one sees at once whether they agree. A box without a mask is dashed. Drawn at the size of
the tile, not of the image: a mask is decoded once and shrunk.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

from hqlabel.pipeline.errors import clean_text

_PALETTE = (  # after Okabe and Ito: distinct with the common colour blindnesses, and on photographs
    (0, 158, 255),
    (255, 140, 0),
    (0, 200, 120),
    (240, 60, 140),
    (240, 228, 66),
    (150, 90, 255),
    (120, 220, 255),
    (255, 90, 40),
)
_NO_MASK = (255, 80, 80)
_PAPER, _INK, _FAINT = (24, 26, 30), (235, 236, 238), (158, 163, 170)
Box = tuple[float, float, float, float]
Corners = tuple[int, int, int, int]
Colour = tuple[int, int, int]
_FILL = 0.26
_TEXT_PX, _HEAD_PX = 13, 20
_MOST_ENLARGED = 4.0
_MOST_LABELS = 40
"""More scores than this on one picture cover it; the caption still has their range."""


@dataclass(frozen=True, kw_only=True)
class DrawnInstance:
    """One prompt and its mask, as drawn. Boxes in upright pixels; None where there is none.

    `box_xyxy`: the prompt as used, or as given when it could not be used. `size_hw`, `counts`: the
    mask as COCO compressed RLE. `text`: the text at the box, such as `cat 0.93`.
    """

    box_xyxy: Box | None
    size_hw: tuple[int, int] | None = None
    counts: str | None = None
    text: str = ""
    accepted: bool = True


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One picture of a contact sheet. `picture` is upright RGB at any size; captions are single lines."""

    picture: Image.Image
    size_hw: tuple[int, int]
    instances: tuple[DrawnInstance, ...]
    caption: str
    remark: str = ""


def draw_overlay(tile: Tile, *, longest_side: int, max_scale: float = 1.0, edge_px: int = 1) -> Image.Image:
    """Return the picture with all its prompts and masks, RGB, its longer side at most `longest_side` pixels.

    Smaller pictures keep their size, or grow up to `max_scale` times. `edge_px`: how wide a mask's edge is,
    inwards; more than 1 for pictures that are shown smaller than they are drawn.
    """
    height, width = tile.size_hw
    scale = min(max_scale, longest_side / max(height, width))
    drawn_wh = (max(1, round(width * scale)), max(1, round(height * scale)))
    smooth = Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC
    canvas = tile.picture.convert("RGB").resize(drawn_wh, smooth)
    for index, instance in enumerate(tile.instances):
        if instance.counts is not None and instance.size_hw is not None:
            _draw_mask(canvas, _shrunk_mask(instance, drawn_wh), _colour(index), edge_px)
    for index, instance in enumerate(tile.instances):
        _draw_box(canvas, instance, _colour(index), drawn_wh[0] / width, drawn_wh[1] / height)
    if len(tile.instances) <= _MOST_LABELS:
        for instance in tile.instances:
            _draw_label(canvas, instance, drawn_wh[0] / width, drawn_wh[1] / height)
    return canvas


def contact_sheet(
    tiles: Sequence[Tile], *, title: str, notes: Sequence[str] = (), columns: int = 4, tile_px: int = 480
) -> Image.Image:
    """Return a sheet with a heading and the tiles in rows, RGB; 1 to 12 tiles read well.

    Args:
        tiles: at least one.
        title: the first line, large.
        notes: smaller lines under it.
        columns: tiles in a row, fewer when there are fewer tiles.
        tile_px: width of a tile; pictures are fitted into 4:3, small ones enlarged.
    """
    columns = min(columns, len(tiles))
    gap, picture_h, line_h = 14, tile_px * 3 // 4, _TEXT_PX + 6
    cell_h = picture_h + 2 * line_h + gap
    head_h = gap + _HEAD_PX + 8 + line_h * len(notes) + gap
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (gap + columns * (tile_px + gap), head_h + rows * cell_h), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _write_line(pen, (gap, gap), title, _HEAD_PX, _INK, sheet.width - 2 * gap)
    for index, note in enumerate(notes):
        _write_line(
            pen, (gap, gap + _HEAD_PX + 8 + index * line_h), note, _TEXT_PX, _FAINT, sheet.width - 2 * gap
        )
    for index, tile in enumerate(tiles):
        left = gap + index % columns * (tile_px + gap)
        top = head_h + index // columns * cell_h
        side = _fitting_side(tile.size_hw, tile_px, picture_h)
        fitted = draw_overlay(tile, longest_side=side, max_scale=_MOST_ENLARGED)
        sheet.paste(fitted, (left + (tile_px - fitted.width) // 2, top + (picture_h - fitted.height) // 2))
        _write_line(pen, (left, top + picture_h + 4), tile.caption, _TEXT_PX, _INK, tile_px)
        _write_line(pen, (left, top + picture_h + 4 + line_h), tile.remark, _TEXT_PX, _FAINT, tile_px)
    return sheet


def png_bytes(picture: Image.Image) -> bytes:
    """Return the picture as PNG."""
    body = io.BytesIO()
    picture.save(body, format="PNG")
    return body.getvalue()


def _fitting_side(size_hw: tuple[int, int], width: int, height: int) -> int:
    """Return the longer side at which a picture of `size_hw` fits into `width` x `height`."""
    scale = min(width / size_hw[1], height / size_hw[0])
    return max(1, int(scale * max(size_hw)))


def _colour(index: int) -> Colour:
    return _PALETTE[index % len(_PALETTE)]


def _shrunk_mask(instance: DrawnInstance, drawn_wh: tuple[int, int]) -> Image.Image:
    """Return the mask at the drawn size, mode L, 0 or 255; what covers a quarter of a pixel shows."""
    assert instance.size_hw is not None
    assert instance.counts is not None
    full: npt.NDArray[np.uint8] = coco_mask.decode({"size": instance.size_hw, "counts": instance.counts})
    shrunk = Image.fromarray(full * np.uint8(255)).resize(drawn_wh, Image.Resampling.BOX)
    return shrunk.point([255 if level >= 64 else 0 for level in range(256)])


def _draw_mask(canvas: Image.Image, mask: Image.Image, colour: Colour, edge_px: int) -> None:
    paint = Image.new("RGB", canvas.size, colour)
    canvas.paste(paint, mask=mask.point([round(_FILL * level) for level in range(256)]))
    canvas.paste(paint, mask=_edge(mask, edge_px))


def _edge(mask: Image.Image, edge_px: int) -> Image.Image:
    """Return what of a mask of 0 and 255 lies within `edge_px` of its outside, corner to corner."""
    inside = np.pad(np.asarray(mask) > 0, edge_px)  # what leaves the picture has an edge there as well
    # A square is a column of rows. A minimum filter over it took 40 times as long, most of a report.
    side, (width, height) = range(2 * edge_px + 1), mask.size
    rows = np.logical_and.reduce([inside[at : at + height] for at in side])
    inner = np.logical_and.reduce([rows[:, at : at + width] for at in side])
    return Image.fromarray((inside[edge_px:-edge_px, edge_px:-edge_px] & ~inner) * np.uint8(255))


def _draw_box(canvas: Image.Image, instance: DrawnInstance, colour: Colour, sx: float, sy: float) -> None:
    corners = _drawable(instance.box_xyxy, sx, sy, canvas.size)
    if corners is None:
        return
    pen = ImageDraw.Draw(canvas)
    if instance.counts is None:
        _dashed(pen, corners, _NO_MASK)
    elif instance.accepted:
        pen.rectangle(corners, outline=colour, width=1)
    else:
        _dashed(pen, corners, colour)


def _draw_label(canvas: Image.Image, instance: DrawnInstance, sx: float, sy: float) -> None:
    corners = _drawable(instance.box_xyxy, sx, sy, canvas.size)
    if corners is None or not instance.text:
        return
    pen, font = ImageDraw.Draw(canvas, "RGBA"), _font(_TEXT_PX - 1)
    text = clean_text(instance.text)
    text_w, text_h = round(font.getlength(text)) + 4, _TEXT_PX + 3
    left = min(corners[0], max(0, canvas.width - text_w))
    top = corners[1] - text_h if corners[1] >= text_h else corners[1] + 1
    pen.rectangle((left, top, left + text_w, top + text_h - 1), fill=(*_PAPER, 190))
    pen.text((left + 2, top + 1), text, font=font, fill=_INK if instance.counts else _NO_MASK)


def _drawable(box_xyxy: Box | None, sx: float, sy: float, size_wh: tuple[int, int]) -> Corners | None:
    """Return the box in whole pixels of the canvas, clipped to it; None when it has no place there."""
    if box_xyxy is None or not np.isfinite(box_xyxy).all():
        return None
    x1, y1, x2, y2 = np.multiply(box_xyxy, (sx, sy, sx, sy)).tolist()
    width, height = size_wh
    if x2 < max(x1, 0) or y2 < max(y1, 0) or x1 > width or y1 > height:
        return None
    left, right = np.clip((x1, x2 - 1), 0, width - 1).round().astype(int).tolist()
    top, bottom = np.clip((y1, y2 - 1), 0, height - 1).round().astype(int).tolist()
    return left, top, max(left, right), max(top, bottom)


def _dashed(pen: ImageDraw.ImageDraw, corners: Corners, colour: Colour) -> None:
    left, top, right, bottom = corners
    dash, period = 5, 9
    for x in range(left, right + 1, period):
        end = min(x + dash, right)
        pen.line((x, top, end, top), fill=colour)
        pen.line((x, bottom, end, bottom), fill=colour)
    for y in range(top, bottom + 1, period):
        end = min(y + dash, bottom)
        pen.line((left, y, left, end), fill=colour)
        pen.line((right, y, right, end), fill=colour)


def _write_line(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, px: int, colour: Colour, width: int
) -> None:
    pen.text(at, _fitted(clean_text(text), px, width), font=_font(px), fill=colour)


def _fitted(text: str, px: int, width: int) -> str:
    """Return `text` with its middle cut until it is at most `width` pixels wide."""
    font = _font(px)
    kept = len(text)
    while kept > 1 and font.getlength(_shortened(text, kept)) > width:
        kept -= 1
    return _shortened(text, kept)


def _shortened(text: str, kept: int) -> str:
    return text if kept >= len(text) else f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def _font(px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(px)
