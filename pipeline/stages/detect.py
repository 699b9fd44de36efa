"""Where a job's boxes come from when it has none: the registry of detectors, and the step that runs one.

The detector shares the process of the masks' model (docs/dev/decisions.md), so what holds there holds for
it: its pictures arrive once, and a picture that kills it or takes too long is failed, alone.

A detector's boxes become the boxes of the image as if a table had given them: xyxy, upright pixels.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from hqlabel.model.detectors import (
    Category,
    ClosedSetDetector,
    Detections,
    Detector,
    DetectorError,
    ZeroShotDetector,
)
from hqlabel.pipeline.box_geometry import best_first
from hqlabel.pipeline.errors import JobRefused, SystemicFault, clean_text, text_of
from hqlabel.pipeline.image_result import ImageResult, UInt8Array
from hqlabel.pipeline.job_context import JobDetector
from hqlabel.pipeline.stages.crash_log import CallGuard
from hqlabel.pipeline.worker.image_guard import describe_raised, is_an_images, log_trace

HF, ZERO_SHOT = "hf:", "hf-zero-shot:"
WANTED = "wanted hf:ID_OR_FOLDER, hf-zero-shot:ID_OR_FOLDER or your own module:Class"
_BLANK_HW = (48, 64)
MOST_RAISED = 32
"""Images on which a model may raise in a process in which it never worked, before the job stops for it."""


def is_own_code(name: str) -> bool:
    """Return whether a detector's name is a user's own `module:Class`, which is imported and so is code."""
    return not name.startswith((HF, ZERO_SHOT))


def load_detector(settings: JobDetector, device: str = "cpu") -> Detector:
    """Return the detector of the settings, ready to work on `device`.

    Raises:
        JobRefused: no such detector, or one that cannot be loaded.
    """
    try:
        return _new_detector(settings, device)
    except JobRefused:
        raise
    except Exception as error:  # whatever a library or a user's own class raises
        raise JobRefused(f"detector {settings.name}: {_message(error)}") from error


def _new_detector(settings: JobDetector, device: str) -> Detector:
    name, threshold = settings.name, settings.score_threshold
    if is_own_code(name):
        return _new_own_detector(settings)
    if name.startswith(ZERO_SHOT):
        source = name.removeprefix(ZERO_SHOT)
        return ZeroShotDetector(source, settings.prompts, threshold=threshold, device=device)
    return ClosedSetDetector(name.removeprefix(HF), threshold=threshold, device=device)


def _new_own_detector(settings: JobDetector) -> Detector:
    module, colon, attribute = settings.name.partition(":")
    if not colon or not module or not attribute.isidentifier():
        raise JobRefused(f"detector {settings.name!r}: no such kind of detector; {WANTED}")
    detector: Detector = getattr(_import(module), attribute)(**settings.options)
    wanted = ("name", "license", "categories", "fingerprint", "detect")
    missing = [name for name in wanted if not hasattr(detector, name)]
    if missing:
        raise JobRefused(f"detector {settings.name}: it has no {missing[0]!r}; see docs/detectors.md")
    return detector


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that it imports itself
        raise ModuleNotFoundError(
            f"{error}; wanted a module that Python finds here and on every worker, as with PYTHONPATH=FOLDER"
        ) from error


@dataclass(kw_only=True)
class ModelRecord:
    """What a model, or a step, has done in this process: one that never worked is at fault itself.

    `code`: the systemic code of that.
    """

    code: str = "model"
    _has_worked: bool = False
    _raised: int = 0

    def worked(self) -> None:
        """Note an image that was done."""
        self._has_worked = True

    def raised(self, whose: str) -> None:
        """Note an image that was raised on, alone; `whose` goes into the message.

        Raises:
            SystemicFault: `code`, for the MOST_RAISED-th one of a model that never worked.
        """
        self._raised += 1
        if not self._has_worked and self._raised >= MOST_RAISED:
            raise SystemicFault(
                self.code,
                f"none of the first {self._raised} images of a process could be worked on by {whose}",
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on whichever device."""
    return isinstance(error, MemoryError) or "out of memory" in text_of(error).lower()


def try_out(detector: Detector, settings: JobDetector) -> None:
    """Check its answer to a blank picture: a detector's mistakes are cheapest before any work.

    Raises:
        JobRefused: it raised, or its answer is not a detector's.
    """
    blank = np.full((*_BLANK_HW, 3), 127, np.uint8)
    try:
        _checked(detector.detect([blank]), [blank], detector.categories)
    except BaseException as error:
        if not is_an_images(error):
            raise
        raise JobRefused(f"detector {settings.name}: on a blank picture: {_message(error)}") from error


class DetectStep:
    """A loaded detector, and what becomes of its answers.

    Raises:
        SystemicFault: `weights`, when it cannot be loaded, or is not the one that the job began with.
    """

    def __init__(self, settings: JobDetector, *, use_gpu: bool) -> None:
        self._settings = settings
        try:
            self._detector = load_detector(settings, "cuda" if use_gpu else "cpu")
            fingerprint = self._detector.fingerprint()
        except Exception as error:
            raise SystemicFault("weights", clean_text(str(error))) from error
        if fingerprint != settings.fingerprint:
            raise SystemicFault(
                "weights",
                f"detector {settings.name} has fingerprint {fingerprint}, this job began with "
                f"{settings.fingerprint}; put the old one back, or start a new output folder",
            )
        self._record = ModelRecord()
        self._names = {category.id: category.name for category in self._detector.categories}

    def run(self, images: Sequence[ImageResult], guard: CallGuard) -> list[ImageResult]:
        """Return the images; each with pixels and no error has its boxes in `planned` now, or an error."""
        results = list(images)
        places = [
            place
            for place, image in enumerate(images)
            if image.pixels_hwc is not None and image.error_code is None
        ]
        size = 1 if guard.image_by_image else self._settings.images_per_call
        for at in range(0, len(places), size):
            batch = [images[place] for place in places[at : at + size]]
            if guard.image_by_image:
                guard.note_image(_image_id(batch[0]))
            began = time.monotonic()
            answers = self._detect(batch, guard)
            detect_ms = 1000 * (time.monotonic() - began) / len(batch)
            for place, answer in zip(places[at : at + size], answers, strict=True):
                results[place] = self._with_answer(replace(images[place], detect_ms=detect_ms), answer, guard)
        return results

    def _detect(
        self, images: Sequence[ImageResult], guard: CallGuard
    ) -> list[list[dict[str, Any]] | BaseException]:
        """Return the boxes of each, or what went wrong with it; of a call that fails each is tried alone."""
        try:
            detections = self._call(images, guard)
            return [
                planned_boxes(one, _picture(image).shape[:2], _size_of(image), self._settings, self._names)
                for image, one in zip(images, detections, strict=True)
            ]
        except BaseException as error:
            if not is_an_images(error):
                raise
            guard.exit_if_device_lost(error)
            if len(images) == 1:
                log_trace(error, uri=images[0].planned["image_uri"], step="detect")
                return [error]
        return [answer for image in images for answer in self._detect([image], guard)]

    def _call(self, images: Sequence[ImageResult], guard: CallGuard) -> list[Detections]:
        """Call the detector once, filled up to its fixed size: its numbers depend on how many there are."""
        filled = [_picture(image) for image in images]
        filled += filled[-1:] * (self._settings.images_per_call - len(filled))
        with guard.deadline([_image_id(image) for image in images]):
            detections = self._detector.detect(filled)
        return _checked(detections, filled, self._detector.categories)[: len(images)]

    def _with_answer(
        self, image: ImageResult, answer: list[dict[str, Any]] | BaseException, guard: CallGuard
    ) -> ImageResult:
        """Return the image with its boxes, or failed for what the detector raised on it alone.

        Raises:
            SystemicFault: `model`, when it raises on a blank picture too, or on every image.
        """
        if not isinstance(answer, BaseException):
            self._record.worked()
            return replace(image, planned={**image.planned, "boxes": answer})
        message = _message(answer)
        if is_out_of_memory(answer):
            return replace(image, error_code="out_of_memory", error_message=message)
        try:
            with guard.deadline([_image_id(image)]):
                try_out(self._detector, self._settings)
        except JobRefused as refusal:
            raise SystemicFault("model", clean_text(str(refusal))) from answer
        self._record.raised(f"detector {self._settings.name}, the last time with {message}")
        return replace(image, error_code="detector_failed", error_message=message)


def _image_id(image: ImageResult) -> str:
    return str(image.planned["image_id"])


def _size_of(image: ImageResult) -> tuple[int, int]:
    assert image.size_hw is not None, "an image with pixels has a size"
    return image.size_hw


def _picture(image: ImageResult) -> UInt8Array:
    """Return the picture that the detector gets: its own, or the model's where that is the same."""
    picture = image.pixels_hwc if image.detector_pixels_hwc is None else image.detector_pixels_hwc
    assert picture is not None, "only images with pixels come here"
    return picture


def planned_boxes(
    detections: Detections,
    picture_hw: tuple[int, ...],
    size_hw: tuple[int, int],
    settings: JobDetector,
    names: dict[int, str | None],
) -> list[dict[str, Any]]:
    """Return the detections that count, best first, as `boxes` of a schema.PLAN row: xyxy, upright pixels.

    Equal scores, and boxes without one, keep the detector's order. A score that is no number counts as none.
    """
    scores = np.full(len(detections.category_ids), np.nan)
    if detections.scores is not None:
        scores = np.asarray(detections.scores).astype(np.float64)
    kept = np.flatnonzero(~(scores <= settings.score_threshold))
    order = kept[best_first(scores[kept])][: settings.max_detections]
    scale = np.array([size_hw[1] / picture_hw[1], size_hw[0] / picture_hw[0]] * 2)
    with np.errstate(over="ignore"):  # infinite boxes are rows without a mask (box_not_finite)
        boxes = np.asarray(detections.boxes_xyxy, np.float64).reshape(-1, 4) * scale
    ids = None if detections.box_ids is None else list(detections.box_ids)
    return [
        {
            "given": boxes[row].tolist(),
            "box_id": _utf8(None if ids is None else ids[row]),
            "category_id": int(detections.category_ids[row]),
            "category_name": _utf8(names.get(int(detections.category_ids[row]))),
            "score": float(scores[row]) if np.isfinite(scores[row]) else None,
            "points_xy": None,
            "point_labels": None,
            "prompt_mask": None,
            "iscrowd": None,
        }
        for row in order.tolist()
    ]


def _utf8(value: object) -> str | None:
    """Return the value as text; UnicodeEncodeError for one that no table can hold."""
    return None if value is None else str(value).encode("utf-8").decode("utf-8")


def _checked(
    answers: Sequence[Detections], images: Sequence[npt.NDArray[np.uint8]], categories: Sequence[Category]
) -> list[Detections]:
    """Return the answers; DetectorError unless there is one a picture and each is sound in itself."""
    if len(answers) != len(images):
        raise DetectorError(f"it gave {len(answers)} results for {len(images)} pictures; wanted one for each")
    known = {category.id for category in categories}
    for one in answers:
        boxes, ids = np.asarray(one.boxes_xyxy), np.asarray(one.category_ids)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise DetectorError(f"boxes_xyxy has shape {boxes.shape}; wanted (N, 4)")
        lists = {"category_ids": ids, "scores": one.scores, "box_ids": one.box_ids}
        for name, values in lists.items():
            if values is not None and len(values) != len(boxes):
                raise DetectorError(f"{name} has {len(values)} values for {len(boxes)} boxes")
        if len(ids) and not np.issubdtype(ids.dtype, np.integer):
            raise DetectorError(f"category_ids has type {ids.dtype}; wanted integers")
        if len(ids) and not (ids.min() >= -(2**31) and ids.max() < 2**31):
            raise DetectorError(f"category_ids reaches {ids.max()}; wanted integers of 32 bits")
        unknown = set(ids.tolist()) - known
        if unknown:
            raise DetectorError(f"category_ids holds {min(unknown)}, which is not among its categories")
    return list(answers)


def _message(error: BaseException) -> str:
    is_ours = isinstance(error, JobRefused | DetectorError)
    return clean_text(" ".join(str(error).split())) if is_ours else describe_raised(error)
