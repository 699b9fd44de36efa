"""Published rows drawn over their images: the contact sheet of a job, and one image for `inspect`.

The rows come from the tables, the picture is fetched and decoded anew, in the supervised decoder: what
is drawn is what users will read, and a hostile file costs its own tile alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast, get_args

import numpy as np
from PIL import Image

from hqlabel.jobs.results.draw_overlays import (
    Box,
    DrawnInstance,
    Tile,
    contact_sheet,
    draw_overlay,
    png_bytes,
)
from hqlabel.jobs.results.read_tables import ImageRows, Row, sample_labelled, spread
from hqlabel.jobs.terminal import console
from hqlabel.pipeline.box_geometry import PixelFormat, boxes_to_xyxy
from hqlabel.pipeline.errors import HqlabelError, clean_text, count
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.images.fetch import fetch_object
from hqlabel.pipeline.job_context import AccessRules, JobContext
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.storage.archive_uris import container_of, parse_archive_uri
from hqlabel.pipeline.storage.list_folders import allow_root
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.uri_rules import is_inside, split_scheme
from hqlabel.pipeline.tables.manifest import Manifest
from hqlabel.pipeline.worker.image_guard import charge

CONTACT_SHEET_KEY = "report/contact_sheet.png"
_TILES = 12
_TILE_PX = 480
SHEET_S = 60.0
"""A store that has become slow or silent holds up the end of a job no longer than this, and one image."""

_MOST_DRAWN, _LEAST_DRAWN, _MOST_DECODED_PIXELS = 500, 50, 2**32
_LEGEND = (
    "thin line: the prompt box · edge and fill: the mask · number: predicted IoU · "
    "dashes: not accepted, in red: no mask"
)


def write_contact_sheet(store: Store, job: Job, manifest: Manifest, *, again: bool) -> str | None:
    """Return the key of the contact sheet; None when there is nothing to show.

    Drawn when it is not there yet, or `again` (new masks were made). An image that cannot be read any more
    is skipped with a note on stderr: the labels are complete without its picture.
    """
    if not again and store.head(CONTACT_SHEET_KEY) is not None:
        return CONTACT_SHEET_KEY
    with picture_decoder(job.context, _TILE_PX) as child:
        tiles = list(_tiles(job.context, sample_labelled(store, manifest, _TILES), child))
    if not tiles:
        return None
    labelled = manifest.counts.status.get("labelled", 0)
    title = f"{len(tiles)} of {count(labelled, 'labelled image')} in {store.place.uri}"
    notes = [_LEGEND, *([job.context.weights.note] if job.context.weights.note else [])]
    store.put(CONTACT_SHEET_KEY, png_bytes(contact_sheet(tiles, title=title, notes=notes, tile_px=_TILE_PX)))
    return CONTACT_SHEET_KEY


def overlay_png(context: JobContext, rows: ImageRows, *, longest_side: int) -> bytes:
    """Return one image with its prompts and masks, as PNG.

    Raises:
        ImageError: it cannot be fetched or decoded.
    """
    image_side = max(int(rows.image["width"] or 1024), int(rows.image["height"] or 1024))
    with picture_decoder(context, min(longest_side, image_side)) as child:
        tile = _tile(rows, upright_picture(context, rows.image, child), context)
    return png_bytes(draw_overlay(tile, longest_side=longest_side))


@contextlib.contextmanager
def picture_decoder(context: JobContext, side: int) -> Iterator[DecodeChild]:
    """Yield the supervised decoder, making pictures whose longer side is at most `side`."""
    child = DecodeChild(context.limits, side)
    try:
        yield child
    finally:
        child.close()


def _tiles(context: JobContext, sample: Sequence[ImageRows], child: DecodeChild) -> Iterator[Tile]:
    missed: list[tuple[Row, HqlabelError]] = []
    began_s = time.monotonic()
    for place, rows in enumerate(sample):
        if time.monotonic() - began_s > SHEET_S:
            rest = count(len(sample) - place, "more image")
            console.say(f"note: {rest} could be on the contact sheet, but {SHEET_S:g} s are over")
            break
        try:
            picture = upright_picture(context, rows.image, child)
        except HqlabelError as error:
            missed.append((rows.image, error))
            continue
        yield _tile(rows, picture, context)
    say_missed(missed, context.access)


def say_missed(missed: Sequence[tuple[Row, HqlabelError]], access: AccessRules) -> None:
    """Say, in one line for each kind of fault, how many images have no picture, and what would help."""
    kinds: dict[str, list[tuple[Row, HqlabelError]]] = defaultdict(list)
    for image, error in missed:
        kinds[getattr(error, "code", "")].append((image, error))
    for code, ones in kinds.items():
        image, error = ones[0]
        such = "such as " if len(ones) > 1 else ""
        what = f"no picture of {count(len(ones), 'image')}, {such}{console.shown(image['image_id'])}: {error}"
        flags = _flags([one["image_uri"] for one, _ in ones], access) if code == "uri_refused" else ""
        console.say(f"note: {what}{flags}")


def _flags(uris: Sequence[str], access: AccessRules) -> str:
    """Return what would allow these uris to be read, as text; empty where no flag does."""
    places = [split_scheme(container_of(uri)) for uri in uris if "\x00" not in uri]
    folders = [
        os.path.dirname(os.path.realpath(path))
        for scheme, path in places
        if scheme == "file" and "\x00" not in path
    ]
    folders = [one for one in folders if not any(is_inside(one, root) for root in access.roots)]
    schemes = sorted({scheme for scheme, _ in places} - {"file", *access.schemes})
    flags = [allow_root(folders)] if folders else []
    flags += [f"--allow-scheme {clean_text(scheme)}" for scheme in schemes]
    return f"; allow them with {' '.join(flags)}" if flags else ""


def upright_picture(context: JobContext, image: Row, child: DecodeChild) -> Image.Image:
    """Return the picture of a row of `images`, fetched and decoded anew; ImageError when that fails."""
    uri = image["image_uri"]
    version = image["source_etag"] if parse_archive_uri(uri) else None  # its place may hold another picture
    try:
        fetched = fetch_object(uri, context.access, context.limits, version)
        return Image.fromarray(np.asarray(child.decode(fetched.data).pixels_hwc))
    except HqlabelError:
        raise
    except Exception as error:  # a picture costs itself here as in the stages
        raise charge(error, uri=uri, step="draw") from error


def size_in_tables(image: Row, picture: Image.Image) -> tuple[int, int]:
    """Return (height, width) of an image as boxes and masks are measured; the picture may be smaller."""
    return (int(image["height"]), int(image["width"])) if image["height"] else (picture.height, picture.width)


def _tile(rows: ImageRows, picture: Image.Image, context: JobContext) -> Tile:
    return Tile(
        picture=picture,
        size_hw=size_in_tables(rows.image, picture),
        instances=tuple(drawn_instance(row, context.box_rules.box_format) for row in drawn_rows(rows)),
        caption=rows.image["image_id"],
        remark=_remark(rows),
    )


def drawn_rows(rows: ImageRows) -> Sequence[Row]:
    """Return the rows that are drawn: of an image with very many boxes some, spread evenly.

    Each costs the decoding of a whole mask, and hides others long before.
    """
    pixels = max(1, int(rows.image["width"] or 1) * int(rows.image["height"] or 1))
    return spread(rows.instances, min(_MOST_DRAWN, max(_LEAST_DRAWN, _MOST_DECODED_PIXELS // pixels)))


def _remark(rows: ImageRows) -> str:
    boxes, masks = len(rows.instances), rows.masks()[0]
    text = f"{masks} of {count(boxes, 'box has', 'boxes have')} a mask"
    scores = [row["predicted_iou"] for row in rows.instances if row["predicted_iou"] is not None]
    if scores:
        text += f" · predicted IoU {min(scores):.2f}"
        text += f" to {max(scores):.2f}" if len(scores) > 1 else ""
    if (drawn := len(drawn_rows(rows))) < boxes:
        text += f" · {drawn:,} drawn"
    return text


def drawn_instance(row: Row, box_format: str) -> DrawnInstance:
    """Return a row of `instances` as it is drawn; `box_format`: the format that its boxes were given in."""
    mask = row["segmentation"]
    return DrawnInstance(
        box_xyxy=shown_box(row, box_format),
        size_hw=None if mask is None else (mask["size"][0], mask["size"][1]),
        counts=None if mask is None else mask["counts"],
        text=_label(row),
        accepted=row["accepted"],
    )


def _label(row: Row) -> str:
    if row["segmentation"] is None:
        return str(row["reject_reason"])
    name = "" if row["category_name"] is None else console.shown(row["category_name"], 20) + " "
    why = "" if row["accepted"] else f" ({row['reject_reason']})"
    return f"{name}{row['predicted_iou']:.2f}{why}"


def shown_box(row: Row, box_format: str) -> Box | None:
    """Return the prompt as used; of a box that could not be used, as given, if that is four numbers."""
    used = row["prompt_bbox"]
    if used is not None:
        x, y, width, height = used
        return x, y, x + width, y + height
    given: list[Any] = row["prompt_bbox_given"] or []
    if box_format not in get_args(PixelFormat) or len(given) != 4:
        return None
    if not all(value is not None and math.isfinite(value) for value in given):
        return None
    x1, y1, x2, y2 = boxes_to_xyxy(np.array([given], np.float64), cast(PixelFormat, box_format))[0].tolist()
    return x1, y1, x2, y2
