"""COCO files: every box read once, in order, under the id of its image; nothing damaged passes."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.inputs import json_records as json_arrays
from hqlabel.pipeline.inputs.coco_boxes import is_results, read_coco_images, read_instances, read_results
from hqlabel.pipeline.inputs.image_box_lists import BoxList
from hqlabel.pipeline.job_context import AccessRules

ACCESS = AccessRules()


def written(tmp_path, tree) -> str:
    path = tmp_path / "coco.json"
    path.write_bytes(tree if isinstance(tree, bytes) else json.dumps(tree).encode())
    return str(path)


def results(tmp_path, tree) -> BoxList:
    return read_results(written(tmp_path, tree), ACCESS, folder=str(tmp_path))


def instances(tmp_path, tree) -> BoxList:
    return read_instances(written(tmp_path, tree), ACCESS, folder=str(tmp_path))


def rows(boxes: BoxList, *names) -> dict[str, list]:
    found = {}
    for place, key in enumerate(boxes.image_id.to_pylist()):
        at = pa.array(boxes.rows_of(np.array([place])))
        found[key] = [tuple(row.values()) for row in boxes.boxes.select(names).take(at).to_pylist()]
    return found


def refusal(read, tmp_path, tree) -> str:
    with pytest.raises(JobRefused) as caught:
        read(tmp_path, tree)
    assert "coco.json" in str(caught.value)
    return str(caught.value)


def test_results_are_grouped_by_image_in_their_order(tmp_path):
    boxes = results(
        tmp_path,
        [
            {
                "image_id": 9,
                "category_id": 1,
                "bbox": [1, 2, 3.5, 4],
                "score": 0.5,
                "segmentation": {"a": [1]},
            },
            {"image_id": 2, "category_id": 3, "bbox": [5, 6, 7, 8], "score": None},
            {"image_id": 9, "category_id": 1, "bbox": [9, 9, 9, 9], "score": math.nan},
        ],
    )

    found = rows(boxes, "given", "category_id", "score")
    assert [([1, 2, 3.5, 4], 1, 0.5), ([9, 9, 9, 9], 1)] == [found["9"][0], found["9"][1][:2]]
    assert math.isnan(found["9"][1][2])
    assert [([5, 6, 7, 8], 3, None)] == found["2"]
    assert "xywh" == boxes.box_format


def test_boxes_of_any_length_null_and_not_finite_are_kept_as_given(tmp_path):
    given_boxes = [[], [1], [1, 2, 3, 4, 5], None, [1, None, 3, 4], [math.nan, 1, math.inf, -math.inf]]

    boxes = results(tmp_path, [{"image_id": "x", "bbox": box} for box in given_boxes])

    assert repr(given_boxes) == repr(
        [[*box] if box else box for (box,) in _as_written(rows(boxes, "given")["x"])]
    )


def _as_written(found):
    whole = lambda value: int(value) if value is not None and math.isfinite(value) else value  # noqa: E731
    return [(None if box is None else [whole(value) for value in box],) for (box,) in found]


def test_string_ids_and_ids_of_results_are_kept(tmp_path):
    boxes = results(tmp_path, [{"image_id": "007", "bbox": [1, 2, 3, 4], "id": 12}])

    assert {"007": [("12",)]} == rows(boxes, "box_id")


def test_instances_bring_their_images_also_those_without_boxes(tmp_path):
    tree = {
        "info": {"images": [1, 2]},
        "annotations": [
            {"id": 5, "image_id": 3, "bbox": [1, 2, 3, 4], "category_id": 7, "iscrowd": True},
            {"id": 6, "image_id": 1, "bbox": [5, 6, 7, 8], "category_id": 7},
            {"id": 7, "image_id": 3, "bbox": [0, 0, 1, 1], "category_id": 8},
        ],
        "categories": [{"id": 7, "name": "cat", "supercategory": "x"}, {"id": 8, "name": "dog"}],
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 640, "height": 480},
            {"id": 2, "file_name": "b.jpg", "width": 640.0},
            {"id": 3, "file_name": "c.jpg", "height": None},
        ],
    }

    boxes = instances(tmp_path, tree)
    images = read_coco_images(written(tmp_path, tree), ACCESS, folder="/root")

    assert {"1": [("6",)], "2": [], "3": [("5",), ("7",)]} == rows(boxes, "box_id")
    assert ["a.jpg", "b.jpg", "c.jpg"] == boxes.image_uri.to_pylist() == images.image_uri.to_pylist()
    assert ["1", "2", "3"] == images.image_id.to_pylist()
    assert [[480, 640], [0, 640], [0, 0]] == boxes.size_hw.tolist() == images.size_hw.tolist()
    assert {7: "cat", 8: "dog"} == boxes.categories


def test_annotations_of_images_that_are_not_listed_come_last_without_a_uri(tmp_path):
    boxes = instances(
        tmp_path,
        {
            "images": [{"id": 1, "file_name": "a"}],
            "annotations": [{"image_id": 5, "bbox": [1, 2, 3, 4]}, {"image_id": 1, "bbox": [5, 6, 7, 8]}],
        },
    )

    assert ["1", "5"] == boxes.image_id.to_pylist()
    assert ["a", None] == boxes.image_uri.to_pylist()
    assert {"1": [([5, 6, 7, 8],)], "5": [([1, 2, 3, 4],)]} == rows(boxes, "given")


def test_empty_lists_are_no_boxes(tmp_path):
    assert 0 == len(results(tmp_path, []).lengths)
    assert [0] == instances(
        tmp_path, {"images": [{"id": 1, "file_name": "a"}], "annotations": []}
    ).lengths.tolist()


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ([{"bbox": [1, 2, 3, 4]}], "record 0 (from 0) has no image_id"),
        ([{"image_id": 1, "segmentation": {}}], "none of its 1 records has a bbox"),
        ([{"image_id": 1, "bbox": ["1", 2, 3, 4]}], "bbox"),
        ([{"image_id": 1, "bbox": 5}], "bbox"),
        ([{"image_id": 1, "bbox": [[1, 2]]}], "bbox"),
        ([{"image_id": 1, "bbox": [1], "category_id": "cat"}], "category_id"),
        ([{"image_id": 1, "bbox": [1], "category_id": 2**40}], "category_id"),
        ([{"image_id": 1, "bbox": [1], "category_id": 1.5}], "1.5"),
        ([{"image_id": 1, "bbox": [1], "score": "high"}], "score"),
        ([{"image_id": 1, "bbox": [1]}, *[{"image_id": "a", "bbox": [1]}] * 2], "image_id"),
        ([{"image_id": 1.5, "bbox": [1]}], "image_id"),
        ([{"image_id": True, "bbox": [1]}], "image_id"),
        ([[1, 2, 3]], "JSON"),
        ([5], "JSON"),
        (b'[{"image_id": 1, "bbox": [1]}, ]', "JSON"),
        (b'[{"image_id": 1, "bbox": [1]} {"image_id": 1}]', "JSON"),
        (b'[{"image_id": 1, "bbox": [1', "ends early"),
        (b'[{"image_id": 1, "bbox": [1]}] x', "after its end"),
        (b'[{"image_id": "\xff", "bbox": [1]}]', "not UTF-8"),
        (b'[{"image_id": 1, "image_id": 2, "bbox": [1]}]', "JSON"),
        (b"[" * 400_000, "64 deep"),
    ],
)
def test_results_that_are_not_sound_are_refused(tmp_path, tree, reason):
    assert reason in refusal(results, tmp_path, tree)


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"images": []}, "no list `annotations`"),
        ({"annotations": [{"image_id": 1, "bbox": [1]}]}, "no list `images`"),
        ({"images": [{"file_name": "a"}], "annotations": []}, "image 0 (from 0) has no id"),
        (
            {"images": [{"id": 1, "file_name": "a"}, {"id": 2}, {"id": 3}], "annotations": []},
            "image 1 (from 0) has no file_name",
        ),
        ({"images": [{"id": 1, "file_name": 5}], "annotations": []}, "file_name"),
        (
            {"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []},
            "1 of 1 ids are not of one file: image id '1' stands for several files: 'a', 'b'",
        ),
        ({"images": {}, "annotations": []}, "no list `images`"),
    ],
)
def test_instances_that_are_not_sound_are_refused(tmp_path, tree, reason):
    assert reason in refusal(instances, tmp_path, tree)


@pytest.mark.parametrize(("content", "expected"), [(b" \n[]", True), (b'\xef\xbb\xbf{"a": 1}', False)])
def test_results_and_instances_are_told_apart_by_their_first_bracket(tmp_path, content, expected):
    assert expected == is_results(written(tmp_path, content), ACCESS)


@pytest.mark.parametrize("content", [b"", b"hello", b"  "])
def test_a_file_that_is_no_json_is_refused(tmp_path, content):
    with pytest.raises(JobRefused, match="wanted COCO"):
        is_results(written(tmp_path, content), ACCESS)


numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 3)) | st.integers(-1000, 1000)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"image_id": st.integers(0, 5), "bbox": st.none() | st.lists(st.none() | numbers, max_size=5)},
            optional={"score": st.none() | numbers, "category_id": st.none() | st.integers(0, 9)},
        ),
        max_size=12,
    )
)
def test_any_results_come_back_whole_in_blocks_of_any_size(tmp_path_factory, records):
    records = [*records, {"image_id": 0, "bbox": [1, 2, 3, 4]}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_arrays, "BLOCK_BYTES", 50)
        boxes = results(tmp_path_factory.mktemp("coco"), records)

    expected: dict[str, list] = {}
    for record in records:
        expected.setdefault(str(record["image_id"]), []).append((record["bbox"],))
    assert expected == rows(boxes, "given")
