"""The pictures of a report: each instance in its whole picture and close by, and whole pictures; small JPEGs.

The picture is fetched and decoded anew, once an image, in the supervised decoder. An image that cannot
be read any more leaves its tiles without pictures, with the reason.
"""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from hqlabel.jobs.results.draw_overlays import Box, DrawnInstance, Tile, draw_overlay
from hqlabel.jobs.results.read_tables import ImageRows, Row
from hqlabel.jobs.results.render_images import (
    drawn_instance,
    drawn_rows,
    picture_decoder,
    say_missed,
    size_in_tables,
    upright_picture,
)
from hqlabel.pipeline.errors import HqlabelError
from hqlabel.pipeline.job_context import JobContext

_DECODED_PX, _SHOWN_PX, _PICTURE_PX = 1600, 360, 720
_WHOLE_SCALE, _CLOSE_SCALE = 4, 8  # how far a small picture is enlarged
_MARGIN = 0.25  # of the object's extent, around the close-up
_LEAST_PX = 24
_QUALITY = 80
_EDGE_PX, _PICTURE_EDGE_PX = (
    3,
    2,
)  # the page shows tiles at about a third of their size, and enlarges them on demand


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """JPEGs of an instance, or of an image (`whole` alone), as data uris; None, with `why`, without one."""

    whole: str | None
    close: str | None
    why: str = ""


_LEFT_OUT = Pictures(whole=None, close=None, why="left out for size")
PictureKey = tuple[str, int | None]
"""An instance; None: the image with all of them."""


def draw_tiles(
    context: JobContext, rows: Mapping[str, ImageRows], keys: Sequence[PictureKey], *, most_bytes: int
) -> dict[PictureKey, Pictures]:
    """Return these pictures, image by image until a page that shows each as often has `most_bytes`."""
    by_image: dict[str, list[PictureKey]] = defaultdict(list)
    shown = Counter(keys)
    for key in shown:
        by_image[key[0]].append(key)
    found: dict[PictureKey, Pictures] = {}
    made, missed = 0, list[tuple[Row, HqlabelError]]()
    with picture_decoder(context, _DECODED_PX) as child:
        for image_id, mine in by_image.items():
            if made > most_bytes:
                found.update(dict.fromkeys(mine, _LEFT_OUT))
                continue
            image = rows[image_id].image
            try:
                picture = upright_picture(context, image, child)
            except HqlabelError as error:
                missed.append((image, error))
                found.update(dict.fromkeys(mine, Pictures(whole=None, close=None, why=str(error))))
                continue
            draw = _Drawing(picture=picture, rows=rows[image_id], context=context)
            for key in mine:
                found[key] = _LEFT_OUT if made > most_bytes else draw.pictures(key[1])
                made += shown[key] * sum(len(text or "") for text in (found[key].whole, found[key].close))
    say_missed(missed, context.access)
    return found


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """The pictures of one image, which is `picture`."""

    picture: Image.Image
    rows: ImageRows
    context: JobContext

    @property
    def size_hw(self) -> tuple[int, int]:
        return size_in_tables(self.rows.image, self.picture)

    @cached_property
    def small(self) -> Image.Image:
        """Without masks, at the size of a tile: made once for all instances."""
        bare = Tile(picture=self.picture, size_hw=self.size_hw, instances=(), caption="")
        return draw_overlay(bare, longest_side=_SHOWN_PX, max_scale=_WHOLE_SCALE)

    def pictures(self, index: int | None) -> Pictures:
        """Return those of an instance; without one, the image with all its boxes and masks, larger."""
        if index is not None:
            return self._instance(index)
        drawn = [replace(self._drawn(row), text="") for row in drawn_rows(self.rows)]
        tile = Tile(picture=self.picture, size_hw=self.size_hw, instances=tuple(drawn), caption="")
        shown = draw_overlay(tile, longest_side=_PICTURE_PX, max_scale=_WHOLE_SCALE, edge_px=_PICTURE_EDGE_PX)
        return Pictures(whole=_jpeg(shown), close=None)

    def _instance(self, index: int) -> Pictures:
        """Return one instance in its whole picture, and close by."""
        row = self.rows.instance(index)
        drawn = replace(self._drawn(row), text="")
        whole = Tile(picture=self.small, size_hw=self.size_hw, instances=(drawn,), caption="")
        close = _close_up(self.picture, self.size_hw, drawn, row)
        return Pictures(
            whole=_drawn_jpeg(whole, max_scale=_WHOLE_SCALE),
            close=None if close is None else _drawn_jpeg(close, max_scale=_CLOSE_SCALE),
        )

    def _drawn(self, row: Row) -> DrawnInstance:
        return drawn_instance(row, self.context.box_rules.box_format)


def _drawn_jpeg(tile: Tile, *, max_scale: float) -> str:
    return _jpeg(draw_overlay(tile, longest_side=_SHOWN_PX, max_scale=max_scale, edge_px=_EDGE_PX))


def _close_up(picture: Image.Image, size_hw: tuple[int, int], drawn: DrawnInstance, row: Row) -> Tile | None:
    """Return the part of the picture around box and mask; None when neither has a place in it."""
    part = _window(size_hw, drawn.box_xyxy, row["bbox"])
    if part is None:
        return None
    left, top, right, bottom = part
    sx, sy = picture.width / size_hw[1], picture.height / size_hw[0]
    cut = picture.crop((round(left * sx), round(top * sy), round(right * sx), round(bottom * sy)))
    box = drawn.box_xyxy
    moved = replace(
        drawn,
        box_xyxy=None if box is None else (box[0] - left, box[1] - top, box[2] - left, box[3] - top),
        size_hw=(bottom - top, right - left),
        counts=None if drawn.counts is None else _cut_mask(drawn.counts, size_hw, part),
    )
    return Tile(picture=cut, size_hw=(bottom - top, right - left), instances=(moved,), caption="")


def _window(
    size_hw: tuple[int, int], box: Box | None, mask_xywh: Sequence[float] | None
) -> tuple[int, int, int, int] | None:
    corners = [] if box is None or not np.isfinite(box).all() else [box]
    if mask_xywh is not None:
        x, y, width, height = mask_xywh
        corners.append((x, y, x + width, y + height))
    if not corners:
        return None
    edges = np.array(corners)
    low, high = edges[:, :2].min(axis=0), edges[:, 2:].max(axis=0)
    margin = np.maximum(_MARGIN * (high - low), (_LEAST_PX - (high - low)) / 2)
    limit = np.array([size_hw[1], size_hw[0]])
    low = np.clip(np.floor(low - margin), 0, limit).astype(int)
    high = np.clip(np.ceil(high + margin), 0, limit).astype(int)
    if (high <= low).any():
        return None
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _cut_mask(counts: str, size_hw: tuple[int, int], part: tuple[int, int, int, int]) -> str:
    whole: Any = coco_mask.decode({"size": list(size_hw), "counts": counts})
    left, top, right, bottom = part
    cut = coco_mask.encode(np.asfortranarray(whole[top:bottom, left:right]))
    return str(cut["counts"].decode("ascii"))


def _jpeg(picture: Image.Image) -> str:
    body = io.BytesIO()
    picture.save(body, format="JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(body.getvalue()).decode("ascii")
