"""The real model, which also tells the colours that it was shown: `python -m tests.faults.probe label ...`.

Masks are the model's. In place of the model's own score stands the mean colour below each box, as one
number: red, green and blue as the digits of a fraction in base 256, which float32 holds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hqlabel.jobs.cli import main as cli
from hqlabel.jobs.job_setup import open_job
from hqlabel.model.records import Instances, PreparedImage, SegmentFailure
from hqlabel.model.segmenter import Segmenter
from hqlabel.pipeline.job_context import JobContext
from hqlabel.pipeline.stages.load_model import load_segmenter


def probe_segmenter(context: JobContext, use_gpu: bool) -> Segmenter:
    segmenter = load_segmenter(context, use_gpu)
    segment = segmenter.segment_prepared

    def segment_prepared(images: Sequence[PreparedImage]) -> list[Instances | SegmentFailure]:
        return [
            replace(answer, predicted_iou=colour_numbers(image)) if isinstance(answer, Instances) else answer
            for image, answer in zip(images, segment(images), strict=True)
        ]

    segmenter.segment_prepared = segment_prepared  # type: ignore[method-assign]
    return segmenter


def colour_numbers(image: PreparedImage) -> np.ndarray:
    """The mean colour below each box, as the module says; float32 (N,)."""
    assert image.prompts.boxes_xyxy is not None
    scale = max(image.pixels_hwc.shape[:2]) / max(image.size_hw)
    numbers = []
    for x1, y1, x2, y2 in np.asarray(image.prompts.boxes_xyxy, np.float64) * scale:
        inside = image.pixels_hwc[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1]
        red, green, blue = inside.reshape(-1, 3).mean(axis=0).round().astype(int).tolist() or (0, 0, 0)
        numbers.append((red * 65536 + green * 256 + blue) / 2**24)
    return np.array(numbers, np.float32)


def colour_of(number: float) -> tuple[int, int, int]:
    """The colour that a number of `colour_numbers` stands for."""
    whole = round(number * 2**24)
    return whole >> 16, whole >> 8 & 255, whole & 255


def main() -> None:
    made = open_job.JobContext

    def context(**fields: Any) -> JobContext:
        return made(**fields, segmenter="tests.faults.probe:probe_segmenter")

    open_job.JobContext = context  # type: ignore[assignment,misc]
    cli.main()


if __name__ == "__main__":
    main()
