"""What a job prints of its inputs and settings before it works."""

from __future__ import annotations

import pytest

from hqlabel.jobs.load_config import Config
from hqlabel.jobs.terminal.input_report import warnings

PLAN = {"warnings": [], "boxes": 1, "without_boxes": 0, "images": 1}
BOXES = {"images": "a", "boxes": "b.csv"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"input": BOXES}, []),
        ({"input": BOXES, "detector": {"score_threshold": 0.5}}, ["detector.score_threshold", "--detector"]),
        ({"input": BOXES, "boxes": {"nms_iou": 0.5}}, ["boxes.nms_iou", "nms_mode is none"]),
        ({"input": BOXES, "filter": {"nms_iou": 0.5}}, ["filter.nms_iou", "nms_mode is none"]),
        (
            {
                "input": {"images": "a", "box_format": "xywh"},
                "detector": {"name": "x:Y", "max_detections": 5},
            },
            ["input.box_format", "there are no --boxes"],
        ),
        (
            {"input": {"images": "a"}, "boxes": {"min_score": 0.5, "nms_mode": "all", "expand": 0.1}},
            ["boxes.min_score, boxes.nms_mode, boxes.expand: without effect", "nor a --detector"],
        ),
        ({"input": {"images": "a"}, "detector": {"name": "x:Y"}, "boxes": {"min_score": 0.5}}, []),
        ({"input": BOXES | {"box_format": "xywh"}, "boxes": {"nms_mode": "class", "nms_iou": 0.5}}, []),
    ],
)
def test_settings_without_effect_are_named_with_the_reason(settings, said) -> None:
    found = warnings(Config.model_validate(settings), PLAN)

    assert len(found) == bool(said)
    assert all(part in found[0] for part in said)
