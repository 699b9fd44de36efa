"""The first stage: a unit's number in, its images fetched and decoded out, all in one task.

While one picture is decoded, the next ones are on their way. What is wrong with an image, or is raised on it,
becomes a value in its row; `fault_window` tells it from faults of the surroundings. An image that needs no
pixels (no boxes, failed in planning) is not fetched at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hqlabel.pipeline.errors import ImageError, SystemicFault, clean_text
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.images.fetch import FetchOutcome, fetch_ahead
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.job_state.plan_files import read_unit
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.stages.crash_log import Restart, TaskStart
from hqlabel.pipeline.stages.fault_window import Tried, stop_if_most_images_fail
from hqlabel.pipeline.stages.prompt_groups import with_boxes
from hqlabel.pipeline.stages.rows_between_stages import PixelArena, UnitRow
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.uri_rules import check_uri
from hqlabel.pipeline.tables.changed_inputs import kept_rows
from hqlabel.pipeline.tables.unit_files import read_generation
from hqlabel.pipeline.worker.image_guard import charge
from hqlabel.pipeline.worker.process_env import refuse_unsafe_env


def prepare_unit(
    unit: UnitRow, context: JobContext, store: Store, decoder: DecodeChild, restart: Restart | None = None
) -> tuple[UnitRow, PixelArena | None]:
    """Return the unit with its images, decoded where they have usable boxes, and the arena of their pixels.

    Of a unit that is retried, the images to be done again. A systemic fault comes back inside the unit.
    `restart`: where a process has ended over this unit before.
    """
    began = time.monotonic()
    try:
        start = None if restart is None else restart.begin(unit.unit_id, unit.generation)
        images, arena = _prepare(unit, context, store, decoder, start)
    except SystemicFault as fault:
        return replace(unit, fault=fault), None
    return replace(unit, images=tuple(images), seconds=unit.seconds + time.monotonic() - began), arena


def _prepare(
    unit: UnitRow, context: JobContext, store: Store, decoder: DecodeChild, start: TaskStart | None
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
    work = _Work(context=context, decoder=decoder)
    tried: list[Tried] = []
    opened = zip(places, work.open_all([images[place] for place in places], arena, start), strict=True)
    for place, (image, one) in opened:
        images[place] = image
        tried.append(one)
    stop_if_most_images_fail(tried, unit.unit_id, context, store, work.attempt)
    return images, arena


def planned_rows(unit: UnitRow, context: JobContext, store: Store) -> list[dict[str, Any]]:
    """Return the plan's rows of the images to work on: all of the unit but those that an
    earlier plan has done, or in a retry the failed ones."""
    planned = read_unit(store, context.plan_sha256, unit.unit_id)
    rows: list[dict[str, Any]] = planned.to_pylist()
    if unit.redo_codes is None:
        kept = kept_rows(store, context, planned) if context.earlier else None
        done = set() if kept is None else set(kept["image_id"].to_pylist())
        return [row for row in rows if row["image_id"] not in done]
    before = read_generation(store, unit.unit_id, unit.generation - 1)
    codes = dict(zip(before["image_id"].to_pylist(), before["error_code"].to_pylist(), strict=True))
    redone = unit.redo_codes or set(codes.values()) - {None}
    return [_judged_anew(row, context) for row in rows if codes[row["image_id"]] in redone]


def _judged_anew(row: dict[str, Any], context: JobContext) -> dict[str, Any]:
    """Return a planned row; of one that planning refused for its uri, only if this call's rights do too."""
    if row["error_code"] != "uri_refused":
        return row
    try:
        check_uri(row["image_uri"], context.access)
    except ImageError:
        return row
    return {**row, "error_code": None, "error_message": None}


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


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What opening an image takes."""

    context: JobContext
    decoder: DecodeChild

    def open_all(
        self, images: Sequence[ImageResult], arena: PixelArena | None, start: TaskStart | None = None
    ) -> Iterator[tuple[ImageResult, Tried]]:
        """Yield each image with what fetching and decoding made of it; the next ones are on their way.

        `start`: of a unit that has ended its process before; each image is then noted and opened alone.
        """
        if start is not None:
            yield from (self._open_alone(image, arena, start) for image in images)
            start.end()
            return
        planned = [image.planned for image in images]
        for image, fetched in zip(images, self._fetch(planned), strict=True):
            yield self._opened(image, fetched, arena)

    def attempt(self, rows: Sequence[Mapping[str, Any]]) -> list[Tried]:
        """Return what becomes of other images of the plan, which are not kept."""
        return [tried for _, tried in self.open_all([ImageResult(planned=row) for row in rows], None)]

    def _fetch(self, planned: Sequence[Mapping[str, Any]]) -> Iterator[FetchOutcome]:
        uris = [row["image_uri"] for row in planned]
        versions = [row.get("source_version") for row in planned]
        return fetch_ahead(uris, self.context.access, self.context.limits, versions=versions)

    def _open_alone(
        self, image: ImageResult, arena: PixelArena | None, start: TaskStart
    ) -> tuple[ImageResult, Tried]:
        uri = image.planned["image_uri"]
        error = start.begin(image.planned["image_id"], uri)
        if error is not None:
            return _failed(image, error), Tried(uri=uri, error=error)
        [fetched] = self._fetch([image.planned])
        return self._opened(image, fetched, arena)

    def _opened(
        self, image: ImageResult, fetched: FetchOutcome, arena: PixelArena | None
    ) -> tuple[ImageResult, Tried]:
        """Return the image decoded, or failed for whatever was raised on it."""
        uri, error = image.planned["image_uri"], fetched.error
        image = replace(image, fetch_ms=fetched.fetch_ms)
        if fetched.fetched is not None:
            tag = fetched.fetched.etag
            image = replace(
                image, source_bytes=fetched.fetched.size, source_etag=None if tag is None else clean_text(tag)
            )
            began = time.monotonic()
            try:
                image = self._decoded(image, fetched.fetched.data, arena)
            except BaseException as raised:
                error = charge(raised, uri=uri, step="decode")
            image = replace(image, decode_ms=1000 * (time.monotonic() - began))
        return image if error is None else _failed(image, error), Tried(uri=uri, error=error)

    def _decoded(self, image: ImageResult, data: bytes, arena: PixelArena | None) -> ImageResult:
        """Return the image with the results of decoding, its pixels in the arena if a model needs them."""
        decoded = self.decoder.decode(data)
        image = replace(
            image,
            size_hw=decoded.size_hw,
            stored_size_hw=decoded.stored_size_hw,
            exif_orientation=decoded.exif_orientation,
        )
        if arena is None:
            return image
        if arena.detector is None:
            boxes = with_boxes(image, self.context.box_rules).boxes
            if boxes is None or not boxes.usable.any():
                return image
        return arena.keep_all(image, decoded.pixels_hwc, decoded.detector_hwc)


def _failed(image: ImageResult, error: ImageError) -> ImageResult:
    return replace(image, error_code=error.code, error_message=error.message)
