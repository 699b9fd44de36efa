"""The first stage: a unit's number in, its images fetched and decoded out, all in one task.

While one picture is decoded, the next ones are on their way. What is wrong with an image becomes a
value in its row; an image that needs no pixels (no boxes, failed in planning) is not fetched at all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hqlabel.pipeline.errors import ImageError, SystemicFault
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.images.fetch import FetchOutcome, fetch_ahead, stop_if_denied, stop_if_unreachable
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.job_state.plan_files import read_unit
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.stages.prompt_groups import with_boxes
from hqlabel.pipeline.stages.rows_between_stages import PixelArena, UnitRow
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.unit_files import read_generation
from hqlabel.pipeline.worker.process_env import refuse_unsafe_env


def prepare_unit(
    unit: UnitRow, context: JobContext, store: Store, decoder: DecodeChild
) -> tuple[UnitRow, PixelArena | None]:
    """Return the unit with its images, decoded where they have usable boxes, and the arena of their pixels.

    Of a unit that is retried, the images to be done again. A systemic fault comes back inside the unit.
    """
    began = time.monotonic()
    try:
        images, arena = _prepare(unit, context, store, decoder)
    except SystemicFault as fault:
        return replace(unit, fault=fault), None
    return replace(unit, images=tuple(images), seconds=unit.seconds + time.monotonic() - began), arena


def _prepare(
    unit: UnitRow, context: JobContext, store: Store, decoder: DecodeChild
) -> tuple[list[ImageResult], PixelArena]:
    refuse_unsafe_env()
    rows = planned_rows(unit, context, store)
    visit("unit.read")
    images = [_limit_boxes(ImageResult(planned=row), context.limits) for row in rows]
    detector = context.detector
    places = [
        place
        for place, image in enumerate(images)
        if image.error_code is None and needs_pixels(image.planned, detected=detector is not None)
    ]
    arena = PixelArena(
        len(places), context.weights.input_side, None if detector is None else detector.longest_side
    )
    errors: list[ImageError | None] = []
    uris = [images[place].planned["image_uri"] for place in places]
    for place, fetched in zip(places, fetch_ahead(uris, context.access, context.limits), strict=True):
        errors.append(fetched.error)
        images[place] = _decode(images[place], fetched, context, decoder, arena)
    stop_if_denied(errors)
    if unit.redo_codes is None:  # in a retry they may well be all that there is, for good
        stop_if_unreachable(uris, errors)
    return images, arena


def planned_rows(unit: UnitRow, context: JobContext, store: Store) -> list[dict[str, Any]]:
    """Return the plan's rows of the images to work on: all of the unit, or in a retry the failed ones."""
    rows: list[dict[str, Any]] = read_unit(store, context.plan_sha256, unit.unit_id).to_pylist()
    if unit.redo_codes is None:
        return rows
    before = read_generation(store, unit.unit_id, unit.generation - 1)
    codes = dict(zip(before["image_id"].to_pylist(), before["error_code"].to_pylist(), strict=True))
    redone = unit.redo_codes or set(codes.values()) - {None}
    return [row for row in rows if codes[row["image_id"]] in redone]


def needs_pixels(planned: Mapping[str, Any], *, detected: bool = False) -> bool:
    """Return whether an image has to be opened: it has boxes, and planning saw nothing wrong with it.

    `detected`: a detector is to find the boxes.
    """
    return planned["error_code"] is None and (detected or bool(planned["boxes"]))


def _limit_boxes(image: ImageResult, limits: Limits) -> ImageResult:
    """Return the image, failed if it has more boxes than one image may have."""
    count = len(image.planned["boxes"] or ())
    if count <= limits.max_boxes_per_image or image.planned["error_code"] is not None:
        return image
    reason = f"{count} boxes, wanted at most {limits.max_boxes_per_image} (limits.max_boxes_per_image)"
    return _failed(image, ImageError("too_many_boxes", reason))


def _decode(
    image: ImageResult, fetched: FetchOutcome, context: JobContext, decoder: DecodeChild, arena: PixelArena
) -> ImageResult:
    """Return the image with the results of fetching and decoding, and its pixels if a model needs them."""
    image = replace(image, fetch_ms=fetched.fetch_ms)
    if fetched.fetched is None:
        return _failed(image, fetched.error)
    image = replace(image, source_bytes=fetched.fetched.size, source_etag=fetched.fetched.etag)
    began = time.monotonic()
    try:
        decoded = decoder.decode(fetched.fetched.data)
    except ImageError as error:
        return _failed(replace(image, decode_ms=1000 * (time.monotonic() - began)), error)
    image = replace(
        image,
        size_hw=decoded.size_hw,
        stored_size_hw=decoded.stored_size_hw,
        exif_orientation=decoded.exif_orientation,
        decode_ms=1000 * (time.monotonic() - began),
    )
    if arena.detector is None:
        boxes = with_boxes(image, context.box_rules).boxes
        if boxes is None or not boxes.usable.any():
            return image
    elif decoded.detector_hwc is not None:
        image = replace(image, detector_pixels_hwc=arena.detector.keep(decoded.detector_hwc))
    return replace(image, pixels_hwc=arena.keep(decoded.pixels_hwc))


def _failed(image: ImageResult, error: ImageError | None) -> ImageResult:
    assert error is not None
    return replace(image, error_code=error.code, error_message=error.message)
