"""Boxes with iscrowd 1: understood in every input as other programs write it; regions, and no objects."""

import csv
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.jobs.terminal import input_report as understood
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.job_context import AccessRules, BoxRules, Place
from hqlabel.pipeline.job_state.job_file import require_job
from hqlabel.pipeline.planning.make_plan import Plan, make_plan
from hqlabel.pipeline.settings import FilterSettings, InputSettings
from hqlabel.pipeline.stages.box_prompts import resolve_boxes
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.images_and_instances import flatten_unit
from hqlabel.pipeline.tables.publish_tables import publish
from hqlabel.pipeline.tables.unit_checks import check_against_plan
from hqlabel.pipeline.tables.unit_table import build_unit_table
from tests.jobs.made_outputs import MadeImage, blob, make_output
from tests.pipeline.made_formats import BOXES, FORMATS, Written, write_coco
from tests.pipeline.made_units import SIZE_HW, labelled, make_context, plan_table, planned_box, planned_image

CROWDS = {"1": True, "true": True, '"1"': True, '"true"': True, "1.0": True, '"True"': True}
OBJECTS = {
    "0": None,
    "false": None,
    '"0"': None,
    "null": None,
    "0.0": None,
    '""': None,
    "": None,
    '"False"': None,
}


def crowds_of(plan: Plan) -> list[bool | None]:
    return [box["iscrowd"] for row in plan.table.to_pylist() for box in row["boxes"] or []]


def coco_text(flags: list[str]) -> str:
    """A COCO file as text, an annotation for each flag as it stands in the JSON; "": the key is not there."""
    annotations = ",".join(
        f'{{"id":{at},"image_id":0,"category_id":0,"bbox":[0,0,4,5],"area":20'
        + (f',"iscrowd":{flag}' if flag else "")
        + ',"segmentation":{"counts":[3,2],"size":[1,5]}}'
        for at, flag in enumerate(flags)
    )
    images = '[{"id":0,"file_name":"0.jpg","height":9,"width":9}]'
    return f'{{"images":{images},"annotations":[{annotations}],"categories":[{{"id":0,"name":"zero"}}]}}'


def lengths_of(plan: Plan) -> list[int]:
    """How many numbers each box of the plan has."""
    return [len(box["given"]) for row in plan.table.to_pylist() for box in row["boxes"]]


def plan_coco(tmp_path, flags: list[str]) -> Plan:
    (tmp_path / "boxes.json").write_text(coco_text(flags))
    return make_plan(InputSettings(boxes=str(tmp_path / "boxes.json")))


@pytest.mark.parametrize(("flag", "crowd"), [*CROWDS.items(), *OBJECTS.items()])
def test_every_way_in_which_coco_writes_the_flag_is_understood(flag, crowd, tmp_path):
    plan = plan_coco(tmp_path, [flag, flag])

    assert crowds_of(plan) == [crowd, crowd]
    assert plan.summary.crowd_boxes == 2 * bool(crowd)


def test_ways_may_differ_from_record_to_record(tmp_path):
    flags = {**CROWDS, **OBJECTS}

    assert crowds_of(plan_coco(tmp_path, list(flags))) == list(flags.values())
    assert crowds_of(plan_coco(tmp_path, ["0"] * 150 + ["true"])) == [None] * 150 + [True]
    assert crowds_of(plan_coco(tmp_path, [""] * 150 + ['"1"'])) == [None] * 150 + [True]


def test_ways_may_differ_between_the_blocks_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hqlabel.pipeline.inputs.json_records.CUT_BYTES", 512)

    plan = plan_coco(tmp_path, ["0"] * 20 + ["true"] * 20 + ['"1"'] * 20 + [""] * 20)

    assert crowds_of(plan) == [None] * 20 + [True] * 40 + [None] * 20


@pytest.mark.parametrize("flag", ["2", "-1", "0.5", '"yes"', "[1]"])
def test_a_flag_that_could_mean_either_costs_its_box_and_is_named(flag, tmp_path):
    plan = plan_coco(tmp_path, ["0", flag])

    assert any("iscrowd" in line and "wanted 0, 1, true or false" in line for line in plan.summary.warnings)
    assert lengths_of(plan) == [4, 1]  # one number is no box: box_malformed
    with pytest.raises(JobRefused, match=r"iscrowd"):
        plan_coco(tmp_path, ["0", flag, flag])  # most of them: another column


def test_a_fault_of_another_key_is_still_said(tmp_path):
    text = coco_text(["0", "true"]).replace('"category_id":0', '"category_id":"person"', 1)
    (tmp_path / "boxes.json").write_text(text)

    plan = make_plan(InputSettings(boxes=str(tmp_path / "boxes.json")))

    assert any("category_id" in line for line in plan.summary.warnings)
    assert sorted(lengths_of(plan)) == [1, 4]


def test_coco_results_may_have_the_flag_too(tmp_path):
    (tmp_path / "results.json").write_text(
        '[{"image_id":0,"bbox":[0,0,9,9],"score":0,"iscrowd":1},{"image_id":0,"bbox":[0,0,9,9],"iscrowd":0}]'
    )
    (tmp_path / "images.csv").write_text("image_id,image_uri\n0,0.jpg\n")

    plan = make_plan(InputSettings(images=str(tmp_path / "images.csv"), boxes=str(tmp_path / "results.json")))

    assert crowds_of(plan) == [True, None]


FLAGS = [1, 0, 1, 0, 0]


def frame(flags) -> pd.DataFrame:
    corners = {"x1": 0.0, "y1": 0.0, "x2": 4.0, "y2": 5.0}
    return pd.DataFrame({"image_uri": [f"{at}.jpg" for at in range(5)], **corners, "iscrowd": flags})


@pytest.mark.parametrize(
    "flags",
    [
        FLAGS,
        [bool(flag) for flag in FLAGS],
        [float(flag) for flag in FLAGS],
        [1, None, 1, 0, None],
        [True, None, True, False, None],
        ["1", "0", "true", "False", None],
        np.array(FLAGS, np.uint8),
    ],
    ids=["int", "bool", "float", "int-and-null", "bool-and-null", "text", "uint8"],
)
@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_column_of_a_table_as_pandas_writes_it(flags, ending, tmp_path):
    path, rows = tmp_path / f"boxes.{ending}", frame(flags)
    if ending == "parquet":
        rows.to_parquet(path)
    elif ending == "csv":
        rows.to_csv(path, index=False)
    else:
        rows.to_json(path, orient="records", lines=True)

    plan = make_plan(InputSettings(boxes=str(path)))

    assert crowds_of(plan) == [True, None, True, None, None]
    assert plan.summary.crowd_boxes == 2


def test_a_csv_by_the_csv_module_and_a_quoted_one(tmp_path):
    with (tmp_path / "boxes.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(["image_uri", "x1", "y1", "x2", "y2", "iscrowd"])
        writer.writerows(
            [["a.jpg", 0, 0, 4, 5, "1"], ["b.jpg", 0, 0, 4, 5, True], ["c.jpg", 0, 0, 4, 5, "0"]]
        )

    assert crowds_of(make_plan(InputSettings(boxes=str(tmp_path / "boxes.csv")))) == [True, True, None]


@pytest.mark.parametrize(
    "lists", ["[1, 0]", "[true, false]", '["1", "0"]', "[1.0, 0.0]", "[1, null]", "[true, null]"]
)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_list_of_an_image_in_text(lists, ending, tmp_path):
    boxes = "[[0, 0, 4, 5], [0, 0, 9, 9]]"
    path = tmp_path / f"boxes.{ending}"
    if ending == "jsonl":
        other = '{"image_uri":"b.jpg","boxes":[[1,1,2,2]],"iscrowd":null}'
        path.write_text(f'{{"image_uri":"a.jpg","boxes":{boxes},"iscrowd":{lists}}}\n{other}\n')
    else:
        quoted = lists.replace('"', '""')
        path.write_text(f'image_uri,boxes,iscrowd\na.jpg,"{boxes}","{quoted}"\nb.jpg,"[[1,1,2,2]]",\n')

    assert crowds_of(make_plan(InputSettings(boxes=str(path)))) == [True, None, None]


def test_a_list_of_another_length_costs_its_image_alone(tmp_path):
    (tmp_path / "boxes.jsonl").write_text(
        '{"image_uri":"a.jpg","boxes":[[0,0,4,5],[0,0,9,9]],"iscrowd":[1]}\n'
        '{"image_uri":"b.jpg","boxes":[[0,0,4,5]],"iscrowd":[1]}\n'
    )
    rows = make_plan(InputSettings(boxes=str(tmp_path / "boxes.jsonl"))).table.to_pylist()

    assert [row["error_code"] for row in rows] == ["labels_mismatch", None]
    assert rows[1]["boxes"][0]["iscrowd"] is True


def test_tables_of_flags_that_are_none_are_refused_by_name(tmp_path):
    pq.write_table(
        pa.table({"image_uri": ["a.jpg"], "bbox": [[0.0, 0.0, 4.0, 5.0]], "iscrowd": [3]}),
        tmp_path / "b.parquet",
    )
    with pytest.raises(JobRefused, match=r"b\.parquet: .*iscrowd holds 3; wanted 0, 1, true or false"):
        make_plan(InputSettings(boxes=str(tmp_path / "b.parquet")))


def test_a_word_in_a_csv_that_is_no_flag_costs_its_box_and_is_named(tmp_path):
    (tmp_path / "b.csv").write_text("image_uri,x1,y1,x2,y2,iscrowd\na.jpg,0,0,4,5,0\nb.jpg,0,0,4,5,yes\n")

    plan = make_plan(InputSettings(boxes=str(tmp_path / "b.csv")))

    assert any("iscrowd holds 'yes'; wanted 0, 1, true or false" in line for line in plan.summary.warnings)
    assert lengths_of(plan) == [4, 1]


@pytest.mark.parametrize("kind", [pa.int64(), pa.bool_(), pa.int8()])
@pytest.mark.parametrize("shape", ["struct-of-lists", "list-of-structs"])
def test_hugging_face_data_sets_have_it_among_their_objects(kind, shape, tmp_path):
    flags = [[1, 0], [], [0]] if kind != pa.bool_() else [[True, False], [], [False]]
    boxes = [[[0.0, 0.0, 4.0, 5.0]] * len(of) for of in flags]
    if shape == "struct-of-lists":
        objects = pa.array(
            [{"bbox": b, "category": [0] * len(b), "iscrowd": f} for b, f in zip(boxes, flags, strict=True)],
            pa.struct([("bbox", pa.list_(pa.list_(pa.float64()))), ("category", pa.list_(pa.int64())),
                       ("iscrowd", pa.list_(kind))]),
        )  # fmt: skip
    else:
        objects = pa.array(
            [[{"bbox": b, "category": 0, "iscrowd": f} for b, f in zip(bs, fs, strict=True)]
             for bs, fs in zip(boxes, flags, strict=True)],
            pa.list_(pa.struct([("bbox", pa.list_(pa.float64())), ("category", pa.int64()),
                                ("iscrowd", kind)])),
        )  # fmt: skip
    image = pa.array([{"bytes": b"x", "path": f"{n}.jpg"} for n in range(3)])
    pq.write_table(pa.table({"image": image, "objects": objects}), tmp_path / "set.parquet")

    plan = make_plan(InputSettings(boxes=str(tmp_path / "set.parquet")))

    assert crowds_of(plan) == [True, None, None]
    assert plan.categories == ({"id": 0, "name": None},)


def test_tars_have_it_in_the_json_beside_a_picture(tmp_path):
    written: Written = FORMATS["tars"](tmp_path)
    tar_path = next(tmp_path.rglob("*.tar"))
    with tarfile.open(tar_path) as tar:
        members = [(one, tar.extractfile(one).read()) for one in tar.getmembers()]
    with tarfile.open(tar_path, "w") as tar:
        for one, data in members:
            if one.name.endswith(".json"):
                row = json.loads(data)
                data = json.dumps({**row, "iscrowd": [at == 0 for at in range(len(row["boxes"]))]}).encode()
                one.size = len(data)
            tar.addfile(one, io.BytesIO(data))

    plan = make_plan(written.settings)

    assert plan.summary.crowd_boxes >= 1
    assert {row["boxes"][0]["iscrowd"] for row in plan.table.to_pylist() if row["boxes"]} <= {True, None}


def test_an_earlier_output_gives_its_crowds_back(tmp_path):
    image = MadeImage(
        image_id="a.jpg", masks=[blob(1), blob(2)], crowds=[True, False], uri=str(tmp_path / "a.jpg")
    )
    output = make_output(tmp_path / "out", [image])

    plan = make_plan(InputSettings(boxes=output), AccessRules(roots=(str(tmp_path),)))

    assert crowds_of(plan) == [True, None]


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_inputs_without_the_flag_have_no_crowds(kind, tmp_path):
    plan = make_plan(FORMATS[kind](tmp_path).settings)

    assert set(crowds_of(plan)) == {None}
    assert plan.summary.crowd_boxes == 0


def test_a_flag_of_0_makes_no_other_plan_than_none(tmp_path):
    plain = write_coco(tmp_path).settings
    path = Path(plain.boxes)
    content = json.loads(path.read_text())
    before = make_plan(plain)
    for one in content["annotations"]:
        one["iscrowd"] = 0
    path.write_text(json.dumps(content))
    zero = make_plan(plain)
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    crowd = make_plan(plain)

    assert before.sha256 == zero.sha256 != crowd.sha256
    assert sum(map(len, BOXES.values())) == crowd.summary.boxes


# ---------------------------------------------------------------------------------------------
# What becomes of them
# ---------------------------------------------------------------------------------------------

BOX = (5.0, 5.0, 25.0, 20.0)


def test_a_crowd_has_no_prompt_but_its_box_and_comes_before_every_other_reason():
    boxes = [
        planned_box(BOX, iscrowd=True, score=0.0),
        planned_box((25.0, 5.0, 5.0, 20.0), iscrowd=True),
        planned_box((5.0, math.nan, 9.0, 9.0), iscrowd=True),
        planned_box(iscrowd=True) | {"given": None},
        planned_box(BOX, score=0.9),
        planned_box(BOX, score=0.1, iscrowd=False),
        planned_box((-5.0, 0.0, 90.0, 20.0), iscrowd=True),
    ]
    rules = BoxRules(min_score=0.5, min_side_px=3, top_k=1, nms_mode="all", expand=0.5)

    found = resolve_boxes(boxes, rules, upright_size_hw=SIZE_HW)

    assert found.error == ("crowd", "crowd", "crowd", "crowd", None, "box_score", "crowd")
    assert found.usable.tolist() == [False] * 4 + [True, False, False]
    assert found.prompt_xyxy[0].tolist() == list(BOX)  # not expanded
    assert found.prompt_xyxy[6].tolist() == [0, 0, SIZE_HW[1], 20]
    assert np.isnan(found.prompt_xyxy[[1, 2, 3]]).all()
    assert found.flags[6] == ("box_clipped",)


def test_crowds_suppress_nothing_and_take_no_rank():
    boxes = [
        planned_box(BOX, score=0.99, iscrowd=True),
        planned_box(BOX, score=0.5),
        planned_box(BOX, score=0.4),
    ]

    found = resolve_boxes(boxes, BoxRules(top_k=2, nms_mode="all"), upright_size_hw=SIZE_HW)

    assert found.error == ("crowd", None, "nms:1")


@pytest.mark.parametrize("frame", ["upright", "stored"])
def test_the_region_of_a_crowd_is_turned_as_boxes_are(frame):
    found = resolve_boxes(
        [planned_box((0.0, 0.0, 10.0, 20.0), iscrowd=True)],
        BoxRules(box_frame=frame),
        upright_size_hw=(60, 40), stored_size_hw=(40, 60), orientation=6,
    )  # fmt: skip

    assert found.prompt_xyxy[0].tolist() == ([0, 0, 10, 20] if frame == "upright" else [20, 0, 40, 10])


def test_every_crowd_keeps_its_row_and_an_image_of_crowds_alone_has_not_failed():
    mixed = planned_image("a", [planned_box(BOX, iscrowd=True), planned_box(BOX)])
    alone = planned_image(
        "b", [planned_box(BOX, iscrowd=True), planned_box((9.0, 9.0, 1.0, 1.0), iscrowd=True)]
    )
    without = resolve_boxes(alone["boxes"], BoxRules(), upright_size_hw=SIZE_HW)
    results = [
        labelled(mixed),
        ImageResult(planned=alone, boxes=without, size_hw=SIZE_HW, stored_size_hw=SIZE_HW),
    ]

    unit = build_unit_table(results, make_context())
    check_against_plan(unit, plan_table([mixed, alone]))
    flat = flatten_unit(unit, FilterSettings())

    assert flat.images["status"].to_pylist() == ["labelled", "no_boxes"]
    assert flat.images["num_boxes"].to_pylist() == [2, 2]
    assert flat.images["num_instances"].to_pylist() == [1, 0]
    assert flat.instances["reject_reason"].to_pylist() == ["crowd", None, "crowd", "crowd"]
    assert flat.instances["accepted"].to_pylist() == [False, True, False, False]
    assert flat.instances["area"].to_pylist()[0] is None
    assert flat.instances["prompt_bbox"].to_pylist() == [[5, 5, 20, 15], [5, 5, 20, 15], [5, 5, 20, 15], None]
    assert flat.counts.rejected == {"crowd": 3}
    assert (flat.counts.boxes, flat.counts.masks, flat.counts.failed) == (4, 1, {})


def test_the_plan_says_how_many_crowds_there_are(tmp_path):
    plan = {**vars(plan_coco(tmp_path, ["1"] * 37 + ["0"]).summary)}
    plan["unmatched_boxes"] = vars(plan["unmatched_boxes"])

    said = understood._odd_images(plan, detected=False)

    assert said == [
        "37 crowd boxes (iscrowd 1) are regions, not objects: they keep their rows without a mask"
    ]
    plan["crowd_boxes"] = 1
    assert understood._odd_images(plan, detected=False) == [
        "1 crowd box (iscrowd 1) is a region, no object: it keeps its row without a mask"
    ]
    del plan["crowd_boxes"]  # a job of a version that knew none
    assert understood._odd_images(plan, detected=False) == []


def test_crowds_stay_crowds_however_the_tables_are_marked_anew(tmp_path):
    images = [MadeImage(image_id="a.jpg", masks=[blob(1), blob(2)], crowds=[True, False])]
    output = make_output(tmp_path / "out", images, filters=FilterSettings(min_box_iou=0.0))

    store = Store(Place(uri=output))
    marked = publish(
        store, require_job(store), FilterSettings(min_area_px=10**6), require_owner=lambda what: None
    )

    assert dict(marked.counts.rejected) == {"crowd": 1, "area": 1}
