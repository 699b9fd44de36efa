"""The first stage: a unit's number in, its images fetched and decoded out, all in one task.

While one picture is decoded, the next ones are on their way. What is wrong with an image becomes a
value in its row; an image that needs no pixels (no boxes, failed in planning) is not fetched at all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from pipeline.errors import ImageError, SystemicFault
from pipeline.failpoints import visit
from pipeline.images.decode_process import DecodeChild
from pipeline.images.fetch import FetchOutcome, fetch_ahead, stop_if_denied, stop_if_unreachable
from pipeline.job.plan_files import read_unit
from pipeline.settings import JobContext, Limits
from pipeline.stages.hand_over import PixelArena, Pixels, UnitRow
from pipeline.stages.prompt_groups import resolved_boxes
from pipeline.storage.store import Store
from pipeline.tables.unit_files import CommittedUnit, read, unit_key
from pipeline.unit import ImageResult
from pipeline.worker.process_env import refuse_unsafe_env


def prepare_unit(
    unit: UnitRow, context: JobContext, store: Store, child: DecodeChild
) -> tuple[UnitRow, PixelArena | None]:
    """The unit with its images, decoded where they have usable boxes, and the arena of their pixels.

    Of a unit that is retried, the images to be done again. A systemic fault comes back inside the unit.
    """
    began = time.monotonic()
    try:
        images, pixels, shown, arena = _prepare(unit, context, store, child)
    except SystemicFault as fault:
        return replace(unit, fault=fault), None
    seconds = unit.seconds + time.monotonic() - began
    unit = replace(unit, images=tuple(images), pixels=tuple(pixels), detector_pixels=tuple(shown))
    return replace(unit, seconds=seconds), arena


def _prepare(
    unit: UnitRow, context: JobContext, store: Store, child: DecodeChild
) -> tuple[list[ImageResult], list[Pixels], list[Pixels], PixelArena]:
    refuse_unsafe_env()
    rows = planned_rows(unit, context, store)
    visit("unit.read")
    images = [_counted(ImageResult(planned=row), context.limits) for row in rows]
    pixels: list[Pixels] = [None] * len(images)
    shown: list[Pixels] = [None] * len(images)
    detector = context.detector
    wanted = [
        place
        for place, image in enumerate(images)
        if needs_pixels(image.planned, detected=detector is not None) and image.error_code is None
    ]
    shown_side = None if detector is None else detector.longest_side
    arena = PixelArena(len(wanted), context.weights.input_side, shown_side)
    errors: list[ImageError | None] = []
    uris = [images[place].planned["image_uri"] for place in wanted]
    for place, outcome in zip(wanted, fetch_ahead(uris, context.access, context.limits), strict=True):
        errors.append(outcome.error)
        images[place], pixels[place], shown[place] = _decode(images[place], outcome, context, child, arena)
    stop_if_denied(errors)
    if unit.redo_codes is None:  # in a retry they may well be all that is left, for good
        stop_if_unreachable(uris, errors)
    return images, pixels, shown, arena


def planned_rows(unit: UnitRow, context: JobContext, store: Store) -> list[dict[str, Any]]:
    """The plan's rows of the images to work on: all of the unit, or in a retry the failed ones asked for."""
    rows: list[dict[str, Any]] = read_unit(store, context.plan_sha256, unit.unit_id).to_pylist()
    if unit.redo_codes is None:
        return rows
    earlier = earlier_generation(unit, store)
    codes = dict(zip(earlier["image_id"].to_pylist(), earlier["error_code"].to_pylist(), strict=True))
    asked = unit.redo_codes
    return [
        row for row in rows if (code := codes[row["image_id"]]) is not None and (not asked or code in asked)
    ]


def earlier_generation(unit: UnitRow, store: Store) -> pa.Table:
    """The committed rows of the generation before the unit's own, verified; schema.UNIT."""
    generation = unit.generation - 1
    key = unit_key(unit.unit_id, generation)
    return read(store, CommittedUnit(unit_id=unit.unit_id, generation=generation, key=key, size=0))


def needs_pixels(planned: Mapping[str, Any], *, detected: bool = False) -> bool:
    """Whether an image has to be opened: it has boxes, and nothing was wrong with it when it was planned.

    `detected`: a detector is to find the boxes.
    """
    return planned["error_code"] is None and (detected or bool(planned["boxes"]))


def _counted(image: ImageResult, limits: Limits) -> ImageResult:
    """The image, failed if it has more boxes than one image may have."""
    count = len(image.planned["boxes"] or ())
    if count <= limits.max_boxes_per_image or image.planned["error_code"] is not None:
        return image
    wanted = f"wanted at most {limits.max_boxes_per_image} (limits.max_boxes_per_image)"
    return _failed(image, ImageError("too_many_boxes", f"{count} boxes, {wanted}"))


def _decode(
    image: ImageResult, outcome: FetchOutcome, context: JobContext, child: DecodeChild, arena: PixelArena
) -> tuple[ImageResult, Pixels, Pixels]:
    """The image with what fetching and decoding say of it, and its pixels if the model has work with it.

    The second picture is the detector's, where it is another one.
    """
    image = replace(image, fetch_ms=outcome.fetch_ms)
    if outcome.fetched is None:
        return _failed(image, outcome.error), None, None
    image = replace(image, source_bytes=outcome.fetched.size, source_etag=outcome.fetched.etag)
    began = time.monotonic()
    try:
        decoded = child.decode(outcome.fetched.data)
    except ImageError as error:
        return _failed(replace(image, decode_ms=1000 * (time.monotonic() - began)), error), None, None
    image = replace(
        image,
        size_hw=decoded.size_hw,
        stored_size_hw=decoded.stored_size_hw,
        exif_orientation=decoded.exif_orientation,
        decode_ms=1000 * (time.monotonic() - began),
    )
    if arena.detector is None and not resolved_boxes(image, context.box_rules).usable.any():
        return image, None, None
    shown = decoded.detector_hwc
    kept = None if arena.detector is None or shown is None else arena.detector.keep(shown)
    return image, arena.keep(decoded.pixels_hwc), kept


def _failed(image: ImageResult, error: ImageError | None) -> ImageResult:
    assert error is not None
    return replace(image, error_code=error.code, error_message=error.message)
