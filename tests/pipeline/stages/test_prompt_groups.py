"""Prompts of mixed kinds are grouped for the model and come back in the order of the boxes."""

from __future__ import annotations

import numpy as np

from hqlabel.model.records import PreparedImage
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.job_context import BoxRules
from hqlabel.pipeline.stages.box_prompts import resolve_boxes
from hqlabel.pipeline.stages.prompt_groups import group_by_kind, join, with_boxes
from tests.fakes import box_masks
from tests.pipeline.made_units import planned_box, planned_image

SIZE_HW = (40, 60)


def mask_prompt(counts, size_hw):
    return np.full((4, 4), len(counts), np.float32)


def groups_of(boxes):
    resolved = resolve_boxes(boxes, BoxRules(), upright_size_hw=SIZE_HW)
    return resolved, group_by_kind(resolved, SIZE_HW, mask_prompt)


def test_boxes_alone_are_one_group_without_the_unusable():
    boxes = [planned_box((1, 1, 9, 9)), planned_box((9, 9, 1, 1)), planned_box((2, 2, 30, 20))]

    _, (group,) = groups_of(boxes)

    assert group.places.tolist() == [0, 1]
    assert group.prompts.boxes_xyxy.tolist() == [[1, 1, 9, 9], [2, 2, 30, 20]]
    assert (group.prompts.points_xy, group.prompts.mask_logits) == (None, None)


def test_equal_boxes_are_one_prompt_and_each_gets_its_mask():
    twice, other = planned_box((1, 1, 9, 9)), planned_box((2, 2, 30, 20))
    boxes = [twice, other, twice, planned_box((9, 9, 1, 1)), twice | {"category_id": 7}]

    _, (group,) = groups_of(boxes)
    masks = box_masks(
        PreparedImage(pixels_hwc=np.zeros((64, 64, 3), np.uint8), size_hw=SIZE_HW, prompts=group.prompts)
    )
    joined = join([group], [masks])

    assert group.prompts.boxes_xyxy.tolist() == [[1, 1, 9, 9], [2, 2, 30, 20]]
    assert group.places.tolist() == [0, 1, 2, 3]
    assert joined.counts == (masks.counts[0], masks.counts[1], masks.counts[0], masks.counts[0])
    assert joined.area.tolist() == [64, 28 * 18, 64, 64]


def test_equal_boxes_with_points_stay_apart():
    boxes = [planned_box((1, 1, 9, 9), points_xy=[x, 5.0], point_labels=[1]) for x in (3.0, 4.0)]

    _, (group,) = groups_of(boxes)

    assert len(group.prompts.boxes_xyxy) == 2
    assert group.row_of.tolist() == [0, 1]


def test_no_usable_box_gives_no_group():
    assert groups_of([planned_box((9, 9, 1, 1))])[1] == []
    assert groups_of([])[1] == []


def test_kinds_are_kept_apart_and_every_usable_prompt_is_in_one():
    boxes = [
        planned_box((1, 1, 9, 9)),
        planned_box(points_xy=[5.0, 5.0], point_labels=[1]),
        planned_box((3, 3, 19, 19)),
        planned_box(points_xy=[7.0, 7.0], point_labels=[0]),
        planned_box(points_xy=[7.0, 7.0, 8.0, 8.0], point_labels=[0, 1]),
    ]
    boxes[4]["given"] = None

    resolved, groups = groups_of(boxes)

    assert resolved.usable.all()
    assert [group.places.tolist() for group in groups] == [[0, 2], [1, 3], [4]]
    assert groups[1].prompts.points_xy.shape == (2, 1, 2)
    assert groups[1].prompts.point_labels.tolist() == [[1], [0]]
    assert groups[2].prompts.boxes_xyxy is None


def test_answers_come_back_in_the_order_of_the_boxes():
    boxes = [planned_box((i, i, i + 10, i + 10)) for i in range(6)]
    for place in (1, 4):
        boxes[place] |= {"points_xy": [5.0, 5.0], "point_labels": [1]}
    _, groups = groups_of(boxes)
    pixels = np.zeros((40, 60, 3), np.uint8)
    answers = [
        box_masks(PreparedImage(pixels_hwc=pixels, size_hw=SIZE_HW, prompts=group.prompts))
        for group in groups
    ]

    found = join(groups, answers)

    assert len(groups) == 2
    assert found.bbox_xywh.tolist() == [[i, i, 10, 10] for i in range(6)]


def test_boxes_are_resolved_in_the_frame_of_the_decoded_image():
    image = ImageResult(
        planned=planned_image(boxes=[planned_box((0, 0, 10, 40))]),
        size_hw=(60, 40),
        stored_size_hw=(40, 60),
        exif_orientation=6,
    )

    stored = with_boxes(image, BoxRules(box_frame="stored")).boxes
    upright = with_boxes(image, BoxRules()).boxes

    assert stored.prompt_xyxy.tolist() == [[0, 0, 40, 10]]
    assert upright.prompt_xyxy.tolist() == [[0, 0, 10, 40]]
