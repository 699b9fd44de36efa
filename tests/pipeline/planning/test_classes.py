"""Ids and names of classes, settled while planning: filled in where the meaning is clear, else refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.planning.make_plan import Plan, make_plan
from hqlabel.pipeline.settings import InputSettings
from tests.pipeline.made_formats import tar_of
from tests.pipeline.made_jobs import noise, png

Kind = tuple[int | None, str | None]


def classes_of(plan: Plan) -> list[Kind]:
    return [
        (box["category_id"], box["category_name"]) for row in plan.table.to_pylist() for box in row["boxes"]
    ]


def write_parquet(folder, kinds: list[Kind]) -> InputSettings:
    """One row a box."""
    columns = {
        "image_uri": [f"{at:03d}.jpg" for at in range(len(kinds))],
        "bbox": [[0.0, 0.0, 4.0, 5.0]] * len(kinds),
        "category_id": pa.array([kind[0] for kind in kinds], pa.int64()),
        "label": pa.array([kind[1] for kind in kinds], pa.string()),
    }
    pq.write_table(pa.table(columns), folder / "boxes.parquet")
    return InputSettings(boxes=str(folder / "boxes.parquet"))


def write_csv(folder, kinds: list[Kind]) -> InputSettings:
    rows = [
        f"{at:03d}.jpg,0,0,4,5,{'' if number is None else number},{'' if name is None else name}"
        for at, (number, name) in enumerate(kinds)
    ]
    (folder / "boxes.csv").write_text("image_uri,x1,y1,x2,y2,category_id,label\n" + "\n".join(rows) + "\n")
    return InputSettings(boxes=str(folder / "boxes.csv"))


def write_jsonl(folder, kinds: list[Kind]) -> InputSettings:
    """One row a box; a value that is not known is a key that is not there."""
    rows = []
    for at, (number, name) in enumerate(kinds):
        row = {"image_uri": f"{at:03d}.jpg", "bbox": [0, 0, 4, 5], "category_id": number, "label": name}
        rows.append(json.dumps({key: value for key, value in row.items() if value is not None}))
    (folder / "boxes.jsonl").write_text("\n".join(rows) + "\n")
    return InputSettings(boxes=str(folder / "boxes.jsonl"))


WRITERS = [write_parquet, write_csv, write_jsonl]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("given", "settled"),
    [
        ([(3, None), (3, "car")], [(3, "car"), (3, "car")]),
        ([(0, "zero"), (0, None), (5, None)], [(0, "zero"), (0, "zero"), (5, None)]),
        ([(None, "car"), (3, "car")], [(3, "car"), (3, "car")]),
        ([(None, "zero"), (0, "zero"), (None, None)], [(0, "zero"), (0, "zero"), (None, None)]),
        ([(0, "zero"), (None, "bus")], [(0, "zero"), (None, "bus")]),
        ([(3, "car"), (5, "car")], [(3, "car"), (5, "car")]),
    ],
)
def test_what_one_box_lacks_and_others_say_is_filled_in(write, given, settled, tmp_path):
    plan = make_plan(write(tmp_path, given))

    assert classes_of(plan) == settled
    named = {number: name for number, name in settled if number is not None}
    assert plan.categories == tuple({"id": key, "name": named[key]} for key in sorted(named))


@pytest.mark.parametrize("write", WRITERS)
def test_names_of_which_no_box_has_an_id_are_numbered_though_the_column_is_there(write, tmp_path):
    plan = make_plan(write(tmp_path, [(None, "dog"), (None, "cat"), (None, None)]))

    assert classes_of(plan) == [(2, "dog"), (1, "cat"), (None, None)]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("turn", [1, -1])
def test_one_id_with_two_names_keeps_both_in_its_boxes_and_is_told(write, turn, tmp_path):
    given = [(3, "car"), (0, "x"), (3, "bus"), (3, None), (None, "car"), (0, None)]
    plan = make_plan(write(tmp_path, given[::turn]))

    settled = [(3, "car"), (0, "x"), (3, "bus"), (3, None), (None, "car"), (0, "x")]
    assert classes_of(plan) == settled[::turn]
    assert plan.categories == ({"id": 0, "name": "x"}, {"id": 3, "name": "bus"})
    told = " ".join(plan.summary.warnings)
    assert "1 category id with several names, such as 3: 'bus', 'car'" in told
    assert "exports call it 'bus'" in told


@pytest.mark.parametrize("write", WRITERS)
def test_a_name_alone_that_has_two_ids_stays_alone_and_is_told(write, tmp_path):
    plan = make_plan(write(tmp_path, [(0, "car"), (5, "car"), (None, "car"), (7, "bus"), (None, "bus")]))

    assert classes_of(plan) == [(0, "car"), (5, "car"), (None, "car"), (7, "bus"), (7, "bus")]
    assert "1 category name with several ids stands in boxes without an id, such as 'car': 0, 5" in " ".join(
        plan.summary.warnings
    )


def test_a_name_that_nobody_numbers_is_said(tmp_path):
    plan = make_plan(write_parquet(tmp_path, [(0, "zero"), (None, "bus"), (None, "ant")]))

    [warning] = [sentence for sentence in plan.summary.warnings if "no id" in sentence]
    assert warning.startswith("2 category names have no id, such as 'ant', 'bus', while others have one")


def test_a_blank_name_beside_ids_is_none(tmp_path):
    plan = make_plan(write_parquet(tmp_path, [(3, ""), (3, "car"), (None, "")]))

    assert classes_of(plan) == [(3, "car"), (3, "car"), (None, None)]


def coco(folder, *, categories, annotations) -> InputSettings:
    content = {
        "images": [{"id": 0, "file_name": "0.jpg"}],
        "annotations": [{"image_id": 0, "bbox": [0, 0, 4, 5], **one} for one in annotations],
        "categories": categories,
    }
    (folder / "boxes.json").write_text(json.dumps(content))
    return InputSettings(boxes=str(folder / "boxes.json"))


def test_coco_categories_may_lack_names_and_annotations_categories(tmp_path):
    plan = make_plan(
        coco(
            tmp_path,
            categories=[{"id": 0, "name": "zero"}, {"id": 4}, {"id": 9, "name": None}],
            annotations=[
                {"category_id": 0},
                {"category_id": 4},
                {"category_id": 7},
                {"category_id": None},
                {},
            ],
        )
    )

    assert classes_of(plan) == [(0, "zero"), (4, None), (7, None), (None, None), (None, None)]


def test_the_list_of_a_coco_file_of_images_names_the_ids_of_a_table(tmp_path):
    images = coco(
        tmp_path, categories=[{"id": 0, "name": "zero"}, {"id": 3, "name": "car"}], annotations=[]
    ).boxes
    columns = {
        "image_id": ["0"] * 4, "bbox": [[0.0, 0.0, 4.0, 5.0]] * 4,
        "category_id": pa.array([0, 3, None, 3]), "label": [None, None, "zero", "car"],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "boxes.parquet")

    plan = make_plan(InputSettings(images=images, boxes=str(tmp_path / "boxes.parquet")))

    assert classes_of(plan) == [(0, "zero"), (3, "car"), (0, "zero"), (3, "car")]


def test_a_list_that_calls_an_id_otherwise_than_the_boxes_is_not_used_and_that_is_said(tmp_path):
    listed = [{"id": 0, "name": "zero"}, {"id": 3, "name": "car"}]
    images = coco(tmp_path, categories=listed, annotations=[]).boxes
    columns = {
        "image_id": ["0"] * 2,
        "bbox": [[0.0, 0.0, 4.0, 5.0]] * 2,
        "category_id": [0, 3],
        "label": [None, "bus"],
    }
    pq.write_table(pa.table(columns), tmp_path / "boxes.parquet")

    plan = make_plan(InputSettings(images=images, boxes=str(tmp_path / "boxes.parquet")))

    assert classes_of(plan) == [(0, None), (3, "bus")]
    [warning] = [sentence for sentence in plan.summary.warnings if "list" in sentence]
    assert warning.startswith("category 3 is 'car' in the list of categories and 'bus' in the boxes")


def test_one_row_an_image_with_labels_of_numbers_and_gaps(tmp_path):
    (tmp_path / "boxes.jsonl").write_text(
        '{"image_uri": "a.jpg", "boxes": [[0,0,4,5],[0,0,4,5]], "labels": [0, null]}\n'
        '{"image_uri": "b.jpg", "boxes": [[0,0,4,5]], "labels": null}\n'
    )

    assert classes_of(make_plan(InputSettings(boxes=str(tmp_path / "boxes.jsonl")))) == [
        (0, None), (None, None), (None, None),
    ]  # fmt: skip


def test_tars_whose_labels_are_names_with_gaps(tmp_path):
    beside = json.dumps({"boxes": [[0, 0, 4, 5]] * 3, "labels": ["b", None, "a"]}).encode()
    (tmp_path / "0.tar").write_bytes(tar_of({"1.png": png(noise(1)), "1.json": beside}))

    plan = make_plan(InputSettings(images=str(tmp_path), boxes=str(tmp_path)))

    assert classes_of(plan) == [(2, "b"), (None, None), (1, "a")]


def test_hugging_face_names_its_numbers_and_those_beyond_the_list_have_none(tmp_path):
    objects = pa.array(
        [{"bbox": [[0.0, 0.0, 4.0, 5.0]] * 3, "category": [0, 1, None]}],
        pa.struct([("bbox", pa.list_(pa.list_(pa.float64()))), ("category", pa.list_(pa.int64()))]),
    )
    table = pa.table({"image": [{"bytes": b"x", "path": "x.jpg"}], "objects": objects})
    label = {"_type": "ClassLabel", "names": ["zero"]}
    features = {"image": {"_type": "Image"}, "objects": {"feature": {"category": label}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "set.parquet")

    plan = make_plan(InputSettings(boxes=str(tmp_path / "set.parquet")))

    assert classes_of(plan) == [(0, "zero"), (1, None), (None, None)]


def test_a_category_that_the_list_lacks_keeps_its_id_and_is_said(tmp_path):
    (tmp_path / "instances.json").write_text(
        '{"images": [{"id": 0, "file_name": "a.jpg", "width": 9, "height": 9}],'
        ' "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": [0, 0, 4, 5]},'
        ' {"id": 1, "image_id": 0, "category_id": 77, "bbox": [0, 0, 4, 5]}],'
        ' "categories": [{"id": 0, "name": "cat"}]}'
    )
    plan = make_plan(InputSettings(boxes=str(tmp_path / "instances.json")))

    assert classes_of(plan) == [(0, "cat"), (77, None)]
    assert [note for note in plan.summary.warnings if "category id" in note] == [
        "1 category id of the boxes without a name, such as 77, while others have one: is the list of "
        "categories that of these boxes? The tables keep the ids"
    ]


def test_categories_without_any_name_need_no_word(tmp_path):
    plan = make_plan(write_parquet(tmp_path, [(0, None), (77, None)]))

    assert not [note for note in plan.summary.warnings if "category id" in note]
