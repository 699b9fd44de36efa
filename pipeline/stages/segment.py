"""Decoded units in, masks out: the process around the model, and what becomes of it when an image is bad.

Where the job has a detector, it lives here too, and finds the boxes first (`detect`).

A model process cannot be supervised like a decoder: its weights take seconds to load, and a lost GPU
takes the whole process with it. So it is allowed to die, and Ray starts it again. Each start of a unit
is noted in the store beforehand; from the second one on the images go through alone, each noted before
it is tried, so that a later start knows which of them kills and writes it as failed (`attempts`).

An exception, of whatever type, costs the image that it is raised on. One that a blank picture raises too is
the model's, and stops the job: nobody wants it written into a million rows.

No Ray here, and no torch: the model comes by the name of its factory (`JobContext.segmenter`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from model.records import CallShape, Instances, PreparedImage, Prompts, SegmentFailure
from pipeline.errors import SystemicFault, clean_text
from pipeline.failpoints import visit
from pipeline.settings import JobContext, Limits
from pipeline.stages.crash_log import Attempts, Start
from pipeline.stages.detect import CallWatch, DetectStep, Record, is_out_of_memory
from pipeline.stages.hand_over import UInt8Array, UnitRow
from pipeline.stages.prompt_groups import PromptGroup, group_by_kind, join, resolved_boxes, without_numbers
from pipeline.storage.store import Store
from pipeline.unit import ImageResult, ResolvedBoxes
from pipeline.worker import logs
from pipeline.worker.process_env import prepare_for_torch, refuse_unsafe_env

BOXES_PER_DEADLINE = 100
"""So many boxes give an image `limits.segment_timeout_s` once more."""
MAX_DEATHS_IN_LOADING = 3
_BACKSTOP_S = 15.0
_EXIT_STATUS = 1
_KILLED = {
    "crashed": "the process that worked on this image died each time; twice it was tried alone",
    "timeout": "this image did not finish within its deadline, also alone (limits.segment_timeout_s)",
}
_log = logging.getLogger(__name__)


class MaskModel(Protocol):
    """What a factory named in `JobContext.segmenter` returns."""

    @property
    def call_shape(self) -> CallShape:
        """The fixed shapes of the model's calls."""

    def segment_prepared(self, images: Sequence[PreparedImage]) -> list[Instances | SegmentFailure]:
        """One result an image, in order; see `model.segmenter.Segmenter`."""

    def mask_prompt(self, counts: str, size_hw: tuple[int, int]) -> npt.NDArray[np.float32]:
        """Compressed runs of the upright picture as low-resolution logits."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One image that goes to the model: its place in the unit, pixels and prompts."""

    place: int
    image_id: str
    pixels_hwc: UInt8Array
    size_hw: tuple[int, int]
    boxes: ResolvedBoxes

    @property
    def usable(self) -> int:
        return int(np.count_nonzero(self.boxes.usable))

    def prepared(self, groups: Sequence[PromptGroup]) -> list[PreparedImage]:
        return [
            PreparedImage(pixels_hwc=self.pixels_hwc, size_hw=self.size_hw, prompts=group.prompts)
            for group in groups
        ]


class SegmentWorker:
    """The model of one process, and the rules for its death. One unit at a time.

    `epoch`: the number of the job's driver, under which starts are noted. `restarted`: the name of the
    worker, when an earlier process of it has died. `end_process`: how this one ends itself when it must;
    a test may give another way.
    """

    def __init__(
        self,
        context: JobContext,
        *,
        epoch: int,
        use_gpu: bool,
        restarted: str | None = None,
        end_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self._context = context
        store = Store(context.output)
        self._attempts = Attempts(store, epoch=epoch)
        self._end_process = end_process
        self._fault: SystemicFault | None = None
        self._record = Record()
        prepare_for_torch(os.environ)  # before the factory loads torch
        try:
            refuse_unsafe_env()
            with _counted_loading(store, f"attempts/model.{epoch}.{restarted}.json", bool(restarted)):
                self._model: MaskModel = load_by_name(context.segmenter)(context, use_gpu)
                self._detect: DetectStep | None = None
                if context.detector is not None:
                    self._detect = DetectStep(context.detector, use_gpu=use_gpu)
            if use_gpu or restarted:
                began = time.monotonic()
                self._prove_device()  # compiles the model, where it is to be compiled
                logs.event("warmed_up", seconds=time.monotonic() - began, compiled=context.model.compile)
        except SystemicFault as fault:  # kept, and said of every unit: Ray would start us again for ever
            self._fault = fault

    def run(self, unit: UnitRow) -> UnitRow:
        """The unit with masks or an error for every image that has pixels, and without its pixels."""
        if unit.fault is not None or self._fault is not None:
            return _without_images(replace(unit, fault=unit.fault or self._fault))
        began = time.monotonic()
        try:
            # Without pixels there is nothing to die of, and nothing to note in the store.
            images = self._segment(unit) if any(one is not None for one in unit.pixels) else unit.images
            visit("unit.segmented")
        except SystemicFault as fault:
            return _without_images(replace(unit, fault=fault))
        seconds = unit.seconds + time.monotonic() - began
        nothing = (None,) * len(images)
        return replace(unit, images=tuple(images), pixels=nothing, detector_pixels=nothing, seconds=seconds)

    def _segment(self, unit: UnitRow) -> Sequence[ImageResult]:
        start = self._attempts.note_start(unit.unit_id, unit.generation)
        images = [replace(image, attempts=start.earlier + 1) for image in unit.images]
        for place, image in enumerate(images):
            code = start.crashed.get(image.planned["image_id"])
            if code is not None and unit.pixels[place] is not None:
                images[place] = replace(image, error_code=code, error_message=_KILLED[code])
        if self._detect is not None:
            self._detect.run(images, unit.pixels, unit.detector_pixels, self._watch(start))
        jobs: list[_Job] = []
        for place, (image, pixels) in enumerate(zip(images, unit.pixels, strict=True)):
            if pixels is not None and image.error_code is None:
                jobs.append(self._job(place, image, pixels))
        jobs = [job for job in jobs if job.usable]  # a detector may have found nothing
        size = 1 if start.image_by_image else self._model.call_shape.images_per_call
        for at in range(0, len(jobs), size):
            if start.image_by_image:
                self._attempts.note_image(start, jobs[at].image_id)
            self._work(jobs[at : at + size], images, start)
        if start.image_by_image:
            self._attempts.note_image(start, None)
        return images

    def _job(self, place: int, image: ImageResult, pixels: UInt8Array) -> _Job:
        assert image.size_hw is not None
        return _Job(
            place=place,
            image_id=image.planned["image_id"],
            pixels_hwc=pixels,
            size_hw=image.size_hw,
            boxes=resolved_boxes(image, self._context.box_rules),
        )

    def _work(self, jobs: Sequence[_Job], images: list[ImageResult], start: Start) -> None:
        """Puts what becomes of one call's images into `images`; of a call that raises each is tried alone.

        Raises:
            SystemicFault: `model`, when it raises on any image.
        """
        error = self._call(jobs, images, start)
        # Past the handler nothing refers to the tensors of the frames that failed.
        if error is None:
            self._record.worked()
        elif len(jobs) > 1:
            for job in jobs:
                self._work([job], images, start)
        else:
            images[jobs[0].place] = self._charged(images[jobs[0].place], error)

    def _call(self, jobs: Sequence[_Job], images: list[ImageResult], start: Start) -> Exception | None:
        """Puts the results of one call of the model into `images`; returns what was raised instead, if so."""

        began = time.monotonic()
        timeout_s = sum(deadline_s(self._context.limits, job.usable) for job in jobs)
        try:
            with _deadline(timeout_s, lambda: self._end_late(start, [job.image_id for job in jobs])):
                groups = [group_by_kind(job.boxes, job.size_hw, self._model.mask_prompt) for job in jobs]
                answers = self._model.segment_prepared(
                    [one for job, mine in zip(jobs, groups, strict=True) for one in job.prepared(mine)]
                )
            segment_ms = 1000 * (time.monotonic() - began) / len(jobs)
            _check_answers([group for mine in groups for group in mine], answers)
            for job, mine in zip(jobs, groups, strict=True):
                image = replace(images[job.place], segment_ms=segment_ms)
                images[job.place] = _with_masks(image, mine, answers[: len(mine)])
                answers = answers[len(mine) :]
        except SystemicFault:
            raise
        except Exception as error:  # whatever it is, it is one image's, or proves to be the model's
            self._end_if_lost(error)
            return error.with_traceback(None)
        return None

    def _charged(self, image: ImageResult, error: Exception) -> ImageResult:
        """The image, failed for what was raised while it was worked on alone.

        Raises:
            SystemicFault: `model`, when it is the model's fault and not the image's.
        """
        said = clean_text(" ".join(f"{type(error).__name__}: {error}".split()))
        if is_out_of_memory(error):
            return replace(image, error_code="out_of_memory", error_message=said)
        timeout_s = self._context.limits.segment_timeout_s
        with _deadline(timeout_s, lambda: self._end_process(_EXIT_STATUS)):
            blank = self._raised_on_blank()
        if blank is not None and not is_out_of_memory(blank):
            self._end_if_lost(blank)
            raise SystemicFault("model", f"it raises on a blank picture too: {said}")
        self._record.raised(f"the model, the last time with {said}")
        return replace(image, error_code="model_failed", error_message=said)

    def _watch(self, start: Start) -> CallWatch:
        """How a detector's calls for one unit are looked after: as the model's."""

        def deadline(image_ids: Sequence[str]) -> contextlib.AbstractContextManager[None]:
            timeout_s = self._context.limits.segment_timeout_s * len(image_ids)
            return _deadline(timeout_s, lambda: self._end_late(start, image_ids))

        return CallWatch(
            one_by_one=start.image_by_image,
            note=lambda image_id: self._attempts.note_image(start, image_id),
            deadline=deadline,
            end_if_lost=self._end_if_lost,
        )

    def _end_late(self, start: Start, image_ids: Sequence[str]) -> None:
        with contextlib.suppress(Exception):  # without the word, this counts as a crash
            if len(image_ids) == 1:
                self._attempts.note_image(start, image_ids[0], code="timeout")
        self._end_process(_EXIT_STATUS)

    def _end_if_lost(self, error: BaseException) -> None:
        if is_device_lost(error):
            _log.error("the GPU is lost to this process, which ends: %s", error)
            self._end_process(_EXIT_STATUS)

    def _prove_device(self) -> None:
        """None when the device computes: on a broken one, every image would look like a killer.

        Raises:
            SystemicFault: `device`, or `model` for whatever else is raised.
        """
        error = self._raised_on_blank()
        if error is not None:
            code = "device" if is_device_lost(error) else "model"
            said = str(error) if code == "device" else f"{type(error).__name__}: {error}"
            raise SystemicFault(code, clean_text(f"on a blank image: {said}")) from error

    def _raised_on_blank(self) -> Exception | None:
        """What the model raises on a blank picture with one box; None when it works."""
        side = self._context.weights.input_side
        blank = PreparedImage(
            pixels_hwc=np.zeros((side, side, 3), np.uint8),
            size_hw=(side, side),
            prompts=Prompts(boxes_xyxy=np.array([[0, 0, side, side]], np.float64)),
        )
        try:
            self._model.segment_prepared([blank])
        except Exception as error:
            return error.with_traceback(None)
        return None


def _without_images(unit: UnitRow) -> UnitRow:
    return replace(unit, images=(), pixels=(), detector_pixels=())


@contextlib.contextmanager
def _counted_loading(store: Store, key: str, is_restart: bool) -> Iterator[None]:
    """Counts, in the store, the processes of a worker that die while the block loads their model.

    Too little memory for the weights kills each one, and Ray would start the next for ever.

    Raises:
        SystemicFault: `resources`, at the start after `MAX_DEATHS_IN_LOADING` of them.
    """
    if not is_restart:
        yield
        return
    deaths = int(store.read(key)) if store.head(key) is not None else 0
    if deaths >= MAX_DEATHS_IN_LOADING:
        raise SystemicFault(
            "resources",
            f"{deaths} processes died one after another while they loaded the model, most likely for lack of "
            "memory; give the nodes more, or set fewer cluster.actors",
        )
    store.put(key, str(deaths + 1).encode())
    yield
    store.put(key, b"0")


def load_by_name(name: str) -> Any:
    """The object that `module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def deadline_s(limits: Limits, boxes: int) -> float:
    """Seconds that the model may take for one image with so many boxes."""
    return limits.segment_timeout_s * (1 + boxes / BOXES_PER_DEADLINE)


def is_device_lost(error: BaseException) -> bool:
    """Whether an error says that the GPU is gone for this process: a CUDA error that is not about memory.

    After one, every later call in the process fails or gives wrong numbers.
    """
    text = str(error)
    lost = "CUDA error" in text or type(error).__name__ == "AcceleratorError"
    return lost and "out of memory" not in text.lower()


def _check_answers(groups: Sequence[PromptGroup], answers: Sequence[Instances | SegmentFailure]) -> None:
    """Raise `ValueError` unless there is an answer for each group, and in it a mask for each prompt."""
    found = [len(answer.counts) if isinstance(answer, Instances) else None for answer in answers]
    wanted = [len(group) for group in groups]
    if len(found) != len(wanted) or any(n not in (None, m) for n, m in zip(found, wanted, strict=True)):
        raise ValueError(f"the model gave {found} masks for {wanted} prompts")


def _with_masks(
    image: ImageResult, groups: list[PromptGroup], answers: list[Instances | SegmentFailure]
) -> ImageResult:
    """The image with the masks of all its prompts, or with what failed it.

    Of prompts of several kinds, one kind alone may be without finite numbers.
    """
    failures = [answer for answer in answers if isinstance(answer, SegmentFailure)]
    fatal = [failure for failure in failures if failure.code != "non_finite"]
    if len(failures) == len(groups):
        fatal = failures
    if fatal:
        return replace(image, error_code=fatal[0].code, error_message=fatal[0].message)
    assert image.size_hw is not None
    found = [
        answer if isinstance(answer, Instances) else without_numbers(group, image.size_hw)
        for group, answer in zip(groups, answers, strict=True)
    ]
    return replace(image, instances=join(groups, found))


@contextlib.contextmanager
def _deadline(timeout_s: float, on_timeout: Callable[[], None]) -> Iterator[None]:
    """Calls `on_timeout` in another thread when the block takes too long; it ends the process.

    A block that never lets go of the interpreter also keeps that thread from running. For it there is
    Python's own watchdog, which needs no interpreter: it prints where all threads are and exits.
    """
    timer = threading.Timer(timeout_s, on_timeout)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(timeout_s + _BACKSTOP_S, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
