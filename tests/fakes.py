"""Small real things that stand in for slow or lucky ones; each is told what to do by its input."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from hqlabel.model.records import CallShape, Instances, PreparedImage, SegmentFailure
from hqlabel.pipeline.images.decode_upright import DecodedImage, decode_image
from hqlabel.pipeline.job_context import JobContext

TROUBLE = b"TROUBLE:"


def trouble(kind: str) -> bytes:
    """Bytes that make `troubled_decoder` misbehave: crash, exit, kill, sleep, spin, bomb, bug or kill-parent.

    `until:PATH` decodes to nothing but an error, as soon as a file stands at PATH.
    """
    return TROUBLE + kind.encode()


def troubled_decoder(data: bytes, *, max_pixels: int, side: int) -> DecodedImage:
    """`decode_image`, except for the bytes that `trouble` makes, which harm their process."""
    if data.startswith(TROUBLE):
        kind, _, path = data.removeprefix(TROUBLE).decode().partition(":")
        _wait_for_file(path) if kind == "until" else _MISBEHAVE[kind]()
    return decode_image(data, max_pixels=max_pixels, side=side)


_MISBEHAVE = {
    "crash": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(137),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill-parent": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(10**6),
    "spin": lambda: re.match(r"(a+)+$", "a" * 64 + "b"),  # for ever, and never lets go of the GIL
    "bomb": lambda: bytearray(64 * 2**30),
    "bug": lambda: _raise(RuntimeError("a bug in the decoder")),
}


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------

_HARM = {
    "crash": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(137),
    "sleep": lambda: time.sleep(10**6),
    "spin": lambda: re.match(r"(a+)+$", "a" * 64 + "b"),
    "device": lambda: _raise(RuntimeError("CUDA error: an illegal memory access was encountered")),
    "bug": lambda: _raise(KeyError("a bug in the model")),
}
_HARM_COLOURS = {kind: (255, 0, 200 + number) for number, kind in enumerate([*_HARM, "nan", "until"])}


def harmful_picture(kind: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture that decodes well and makes `BoxSegmenter` crash, exit, sleep, spin, lose its device,
    raise, give NaN or wait until a file stands at `stub_until` of the job's lineage."""
    return Image.new("RGB", size, _HARM_COLOURS[kind])


@dataclass(frozen=True, kw_only=True)
class BoxSegmenter:
    """A model whose masks are its boxes, rounded, and whose scores tell the pixels it was given.

    Works without weights and in no time. `lineage` of the job steers it: `stub_sleep_s` is how long an
    image takes, `stub_trace` a folder with one line an image, by process, written before the work.
    """

    call_shape: CallShape
    lineage: Mapping[str, str]

    def segment_prepared(self, images: Sequence[PreparedImage]) -> list[Instances | SegmentFailure]:
        return [self._segment(image) for image in images]

    def mask_prompt(self, counts: str, size_hw: tuple[int, int]) -> np.ndarray:
        return np.full((4, 4), len(counts), np.float32)

    def _segment(self, image: PreparedImage) -> Instances | SegmentFailure:
        if "stub_trace" in self.lineage:
            line = f"{image.size_hw} {image.pixels_hwc.mean():.6f}\n"
            with open(os.path.join(self.lineage["stub_trace"], f"{os.getpid()}.txt"), "a") as file:
                file.write(line)
        time.sleep(float(self.lineage.get("stub_sleep_s", "0")))
        for kind, colour in _HARM_COLOURS.items():
            if tuple(image.pixels_hwc[0, 0]) == colour:
                if kind == "nan":
                    return SegmentFailure(code="non_finite", message="the stub's logits are not finite")
                _wait_for_file(self.lineage["stub_until"]) if kind == "until" else _HARM[kind]()
        return box_masks(image)


def box_segmenter(context: JobContext, use_gpu: bool) -> BoxSegmenter:
    """For `JobContext.segmenter`: "tests.fakes:box_segmenter"."""
    return BoxSegmenter(call_shape=context.model.call_shape, lineage=context.lineage)


def box_masks(image: PreparedImage) -> Instances:
    """The prompts' boxes as masks, rounded; a prompt without box covers the picture."""
    prompts, (height, width) = image.prompts, image.size_hw
    given = (prompts.boxes_xyxy, prompts.points_xy, prompts.mask_logits)
    count = next(len(one) for one in given if one is not None)
    boxes = np.tile(np.array([[0, 0, width, height]], np.float64), (count, 1))
    if prompts.boxes_xyxy is not None:
        boxes = np.rint(prompts.boxes_xyxy)
    rows = [_runs_of_box([int(v) for v in box], height, width) for box in boxes]
    encoded = coco_mask.frPyObjects(
        [{"size": [height, width], "counts": runs} for runs in rows], height, width
    )
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).astype(np.int64)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    tint = image.pixels_hwc.mean() / 255
    return Instances(
        size_hw=image.size_hw,
        counts=tuple(one["counts"].decode() for one in encoded),
        area=area,
        bbox_xywh=np.where(area[:, None] > 0, xywh, 0).astype(np.float32),
        predicted_iou=np.full(count, tint, np.float32),
        stability_score=np.linspace(1, 0.5, count, dtype=np.float32),
    )


def _runs_of_box(box: Sequence[int], height: int, width: int) -> list[int]:
    """Column-major run lengths, outside first."""
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return [height * width]
    if y2 - y1 == height:
        runs = [x1 * height, (x2 - x1) * height, (width - x2) * height]
    else:
        gap = height - (y2 - y1)
        runs = [x1 * height + y1, *[y2 - y1, gap] * (x2 - x1 - 1), y2 - y1]
        runs.append(height * width - sum(runs))
    return runs if runs[-1] else runs[:-1]


def _wait_for_file(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.05)


def _raise(error: Exception) -> None:
    raise error
