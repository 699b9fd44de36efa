"""Decoded units in, masks out: the process around the model, and what becomes of it when an image is bad.

Where the job has a detector, it lives here too, and finds the boxes first (`detect`).

A model process cannot be supervised like a decoder: its weights take seconds to load, and a lost GPU
takes the whole process with it. So it is allowed to die, and Ray starts it again. Each start of a unit
is noted in the store beforehand; from the second one on the images go through alone, each noted before
it is tried, so that a later start knows which of them kills and writes it as failed (`crash_log`).

An exception, of whatever type, costs the image that it is raised on. One that a blank picture raises too is
the model's, and stops the job, so that it is not written into a million rows.

No Ray here, and no torch: the model comes by the name of its factory (`JobContext.segmenter`).
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hqlabel.model.records import CallShape, Instances, PreparedImage, Prompts, SegmentFailure
from hqlabel.pipeline.errors import SystemicFault, clean_text, text_of
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.stages.crash_log import (
    EXIT_STATUS,
    CallGuard,
    CrashLog,
    Start,
    deadline,
    is_device_lost,
)
from hqlabel.pipeline.stages.detect import DetectStep, ModelRecord, is_out_of_memory
from hqlabel.pipeline.stages.prompt_groups import (
    PromptGroup,
    group_by_kind,
    join,
    with_boxes,
    without_numbers,
)
from hqlabel.pipeline.stages.rows_between_stages import UnitRow
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.worker import logs
from hqlabel.pipeline.worker.image_guard import charge, describe_raised, is_an_images, log_trace
from hqlabel.pipeline.worker.process_env import prepare_for_torch, refuse_unsafe_env

BOXES_PER_DEADLINE = 100
"""That many boxes give an image `limits.segment_timeout_s` once more."""
_KILLED = {
    "crashed": "the process that worked on this image died each time; twice it was tried alone",
    "timeout": "this image did not finish within its deadline, also alone (limits.segment_timeout_s)",
}


class MaskModel(Protocol):
    """What a factory named in `JobContext.segmenter` returns."""

    @property
    def call_shape(self) -> CallShape:
        """The fixed shapes of the model's calls."""

    def segment_prepared(self, images: Sequence[PreparedImage]) -> list[Instances | SegmentFailure]:
        """Return one result an image, in order; see `hqlabel.model.segmenter.Segmenter`."""

    def mask_prompt(self, counts: str, size_hw: tuple[int, int]) -> npt.NDArray[np.float32]:
        """Return compressed runs of the upright picture as low-resolution logits."""


@dataclass(kw_only=True)
class _ImageWork:
    """One image of a unit while the model works on it; `result` is replaced when something becomes of it."""

    result: ImageResult

    @property
    def image_id(self) -> str:
        return str(self.result.planned["image_id"])

    @property
    def prompts(self) -> int:
        """How many of its boxes the model gets; none of an image that has failed, or without pixels."""
        boxes = self.result.boxes
        return 0 if boxes is None else int(np.count_nonzero(boxes.usable))

    def groups(self, model: MaskModel) -> list[PromptGroup]:
        assert self.result.boxes is not None
        assert self.result.size_hw is not None
        return group_by_kind(self.result.boxes, self.result.size_hw, model.mask_prompt)

    def prepared(self, group: PromptGroup) -> PreparedImage:
        assert self.result.pixels_hwc is not None
        assert self.result.size_hw is not None
        return PreparedImage(
            pixels_hwc=self.result.pixels_hwc, size_hw=self.result.size_hw, prompts=group.prompts
        )


class SegmentWorker:
    """The model of one process, and the rules for its death. One unit at a time.

    `epoch`: the number of the job's driver, under which starts are noted. `restarted`: the name of the
    worker, when an earlier process of it has died. `end_process`: how this one ends itself when it must;
    a test may pass another function. `tell` gets a unit's number, its images that have left the model, the
    failed ones of these, and the seconds of the last call, after each call.
    """

    def __init__(
        self,
        context: JobContext,
        *,
        epoch: int,
        use_gpu: bool,
        restarted: str | None = None,
        end_process: Callable[[int], Any] = os._exit,
        tell: Callable[[int, int, int, float], None] = lambda *_: None,
    ) -> None:
        self._context = context
        self._crash_log = CrashLog(Store(context.output), epoch=epoch)
        self._end_process = end_process
        self._tell = tell
        self._fault: SystemicFault | None = None
        self._record = ModelRecord()
        self._prompts_record = ModelRecord(code="internal")
        prepare_for_torch(os.environ)  # before the factory loads torch
        try:
            refuse_unsafe_env()
            with self._crash_log.limit_load_crashes(restarted):
                self._model: MaskModel = load_by_name(context.segmenter)(context, use_gpu)
                self._detect: DetectStep | None = None
                if context.detector is not None:
                    self._detect = DetectStep(context.detector, use_gpu=use_gpu)
            if use_gpu or restarted:
                began = time.monotonic()
                self._check_device()  # compiles the model, where it is to be compiled
                logs.event("warmed_up", seconds=time.monotonic() - began, compiled=context.model.compile)
        except SystemicFault as fault:  # kept, and passed on with every unit: Ray would restart us for ever
            self._fault = fault

    def run(self, unit: UnitRow) -> UnitRow:
        """Return the unit with masks or an error for every image that has pixels, and without its pixels."""
        if unit.fault is not None or self._fault is not None:
            return replace(unit, fault=unit.fault or self._fault, images=())
        began = time.monotonic()
        images = unit.images
        try:
            # Images without pixels cannot crash the model: skip the crash log.
            if any(image.pixels_hwc is not None for image in images):
                images = self._segment(unit)
            visit("unit.segmented")
        except SystemicFault as fault:
            return replace(unit, fault=fault, images=())
        images = tuple(replace(image, pixels_hwc=None, detector_pixels_hwc=None) for image in images)
        seconds = unit.seconds + time.monotonic() - began
        # A stub of tests states no kind.
        return replace(unit, images=images, seconds=seconds, device=getattr(self._model, "device_kind", ""))

    def _segment(self, unit: UnitRow) -> tuple[ImageResult, ...]:
        start = self._crash_log.note_start(unit.unit_id, unit.generation)
        guard = CallGuard(self._crash_log, start, self._context.limits, self._end_process)
        images = [_started(image, start) for image in unit.images]
        if self._detect is not None:
            images = self._detect.run(images, guard)
        works = [_ImageWork(result=self._with_boxes(image)) for image in images]
        pending = [work for work in works if work.prompts]
        failed = 0
        size = 1 if guard.image_by_image else self._model.call_shape.images_per_call
        for at in range(0, len(pending), size):
            if guard.image_by_image:
                guard.note_image(pending[at].image_id)
            began = time.monotonic()
            self._work(pending[at : at + size], guard)
            done = pending[at : at + size]
            failed += sum(work.result.error_code is not None for work in done)
            self._tell(unit.unit_id, at + len(done), failed, time.monotonic() - began)
        if guard.image_by_image:
            guard.note_image(None)
        return tuple(work.result for work in works)

    def _with_boxes(self, image: ImageResult) -> ImageResult:
        if image.pixels_hwc is None or image.error_code is not None:
            return image
        try:
            image = with_boxes(image, self._context.box_rules)
        except BaseException as raised:
            error = charge(raised, uri=image.planned["image_uri"], step="segment")
            self._prompts_record.raised(f"the rules on boxes, the last time with {error.message}")
            return replace(image, error_code=error.code, error_message=error.message)
        self._prompts_record.worked()
        return image

    def _work(self, works: Sequence[_ImageWork], guard: CallGuard) -> None:
        """Do the images of one call of the model; of a call that raises each is tried alone.

        Raises:
            SystemicFault: `model`, when it raises on any image.
        """
        error = self._call(works, guard)
        # Past the handler nothing refers to the tensors of the frames that failed.
        if error is None:
            self._record.worked()
        elif len(works) > 1:
            for work in works:
                self._work([work], guard)
        else:
            works[0].result = self._charged(works[0].result, error, guard)

    def _call(self, works: Sequence[_ImageWork], guard: CallGuard) -> BaseException | None:
        """Call the model once and keep its answers; return what was raised instead, if so."""
        began = time.monotonic()
        timeout_s = sum(deadline_s(self._context.limits, work.prompts) for work in works)
        try:
            with guard.deadline([work.image_id for work in works], timeout_s):
                groups = [work.groups(self._model) for work in works]
                answers = self._model.segment_prepared(
                    [work.prepared(one) for work, mine in zip(works, groups, strict=True) for one in mine]
                )
            segment_ms = 1000 * (time.monotonic() - began) / len(works)
            _check_answers([group for mine in groups for group in mine], answers)
            for work, mine in zip(works, groups, strict=True):
                image = replace(work.result, segment_ms=segment_ms)
                work.result = _with_masks(image, mine, answers[: len(mine)])
                answers = answers[len(mine) :]
        except BaseException as error:
            if not is_an_images(error):
                raise
            guard.exit_if_device_lost(error)
            if len(works) == 1:
                log_trace(error, uri=works[0].result.planned["image_uri"], step="segment")
            return error.with_traceback(None)
        return None

    def _charged(self, image: ImageResult, error: BaseException, guard: CallGuard) -> ImageResult:
        """Return the image, failed for what was raised while it was worked on alone.

        Raises:
            SystemicFault: `model`, when it is the model's fault and not the image's.
        """
        message = describe_raised(error)
        if is_out_of_memory(error):
            return replace(image, error_code="out_of_memory", error_message=message)
        with deadline(self._context.limits.segment_timeout_s, lambda: self._end_process(EXIT_STATUS)):
            blank = self._raised_on_blank()
        if blank is not None and not is_out_of_memory(blank):
            guard.exit_if_device_lost(blank)
            raise SystemicFault("model", f"it raises on a blank picture too: {message}")
        self._record.raised(f"the model, the last time with {message}")
        return replace(image, error_code="model_failed", error_message=message)

    def _check_device(self) -> None:
        """Raise unless the device computes: on a broken one, every image would look like a killer.

        Raises:
            SystemicFault: `device`, or `model` for whatever else is raised.
        """
        error = self._raised_on_blank()
        if error is not None:
            code = "device" if is_device_lost(error) else "model"
            reason = text_of(error) if code == "device" else describe_raised(error)
            raise SystemicFault(code, clean_text(f"on a blank image: {reason}")) from error

    def _raised_on_blank(self) -> BaseException | None:
        """Return what the model raises on a blank picture with one box; None when it works."""
        side = self._context.weights.input_side
        blank = PreparedImage(
            pixels_hwc=np.zeros((side, side, 3), np.uint8),
            size_hw=(side, side),
            prompts=Prompts(boxes_xyxy=np.array([[0, 0, side, side]], np.float64)),
        )
        try:
            self._model.segment_prepared([blank])
        except BaseException as error:
            if not is_an_images(error):
                raise
            return error.with_traceback(None)
        return None


def _started(image: ImageResult, start: Start) -> ImageResult:
    """Return the image as this start begins with it: failed, where it has killed too many before."""
    image = replace(image, attempts=start.earlier + 1)
    code = start.crashed.get(image.planned["image_id"])
    if code is None or image.pixels_hwc is None:
        return image
    return replace(image, error_code=code, error_message=_KILLED[code])


def load_by_name(name: str) -> Any:
    """Return the object that `module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def deadline_s(limits: Limits, boxes: int) -> float:
    """Return the seconds that the model may take for one image with that many boxes."""
    return limits.segment_timeout_s * (1 + boxes / BOXES_PER_DEADLINE)


def _check_answers(groups: Sequence[PromptGroup], answers: Sequence[Instances | SegmentFailure]) -> None:
    """Raise `ValueError` unless there is an answer for each group, and in it a mask for each prompt."""
    masks = [len(answer.counts) if isinstance(answer, Instances) else None for answer in answers]
    prompts = [len(group) for group in groups]
    if len(masks) != len(prompts) or any(n not in (None, m) for n, m in zip(masks, prompts, strict=True)):
        raise ValueError(f"the model gave {masks} masks for {prompts} prompts")


def _with_masks(
    image: ImageResult, groups: list[PromptGroup], answers: list[Instances | SegmentFailure]
) -> ImageResult:
    """Return the image with the masks of all its prompts, or with what failed it.

    Of prompts of several kinds, one kind alone may be without finite numbers.
    """
    failures = [answer for answer in answers if isinstance(answer, SegmentFailure)]
    fatal = [failure for failure in failures if failure.code != "non_finite"]
    if len(failures) == len(groups):
        fatal = failures
    if fatal:
        return replace(image, error_code=fatal[0].code, error_message=fatal[0].message)
    assert image.size_hw is not None
    masks = [
        answer if isinstance(answer, Instances) else without_numbers(group, image.size_hw)
        for group, answer in zip(groups, answers, strict=True)
    ]
    return replace(image, instances=join(groups, masks))
