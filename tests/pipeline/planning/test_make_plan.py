"""From files to a plan: ids, joins, order, codes and warnings; written once and read back by unit."""

import json
import math
import random
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import DamageFound, JobRefused, UsageError
from hqlabel.pipeline.job_context import AccessRules, Place
from hqlabel.pipeline.job_state.plan_files import iter_plan, plan_key, read_unit
from hqlabel.pipeline.planning import make_plan as plan_module
from hqlabel.pipeline.planning.make_plan import Plan, make_plan, write_plan
from hqlabel.pipeline.schema import PLAN
from hqlabel.pipeline.settings import InputSettings
from hqlabel.pipeline.stages.box_prompts import prompt_faults
from hqlabel.pipeline.storage.output_store import NotFound, Store

A, B, C = [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0]


@pytest.fixture
def pictures(tmp_path):
    """A folder of four pictures, and other files beside them."""
    root = tmp_path / "pictures"
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "sub/deep/ü d.tiff", "notes.txt", "._a.jpg", "sub/c.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def table(path, columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def as_json(path, tree):
    path.write_text(json.dumps(tree))
    return str(path)


def planned(access: AccessRules | None = None, images_per_unit: int = 64, **settings) -> Plan:
    inputs = {key: str(v) if key in ("images", "boxes") else v for key, v in settings.items()}
    return make_plan(InputSettings(**inputs), access, images_per_unit=images_per_unit)


def boxes_of(plan: Plan) -> dict[str, list | None]:
    """image_id -> its boxes as given."""
    return {
        row["image_id"]: None if row["boxes"] is None else [box["given"] for box in row["boxes"]]
        for row in plan.table.to_pylist()
    }


def ids_of(plan: Plan) -> list[str]:
    return plan.table.column("image_id").to_pylist()


def refusal(**settings) -> str:
    with pytest.raises(JobRefused) as caught:
        planned(**settings)
    return str(caught.value)


# --- images ---------------------------------------------------------------------------------


def test_a_folder_gives_its_pictures_under_their_paths_below_it(pictures):
    plan = planned(images=pictures)

    assert ["a.PNG", "b.jpg", "sub/c.webp", "sub/deep/ü d.tiff"] == ids_of(plan)
    assert f"{pictures}/sub/c.webp" == plan.table.column("image_uri")[2].as_py()
    assert 2 == plan.summary.skipped_files
    assert (f"1 hidden file in {pictures}: left out",) == plan.summary.left_out
    assert PLAN == plan.table.schema
    assert (4, 0, 4, 4) == (
        plan.summary.images,
        plan.summary.boxes,
        plan.summary.without_boxes,
        plan.summary.listed_without_boxes,
    )


def test_a_relative_folder_is_made_absolute(pictures, monkeypatch):
    monkeypatch.chdir(pictures.parent)

    assert (
        planned(images=pictures).sha256
        == planned(images="pictures/").sha256
        == planned(images="./pictures").sha256
    )


def test_a_pattern_gives_what_matches_and_ids_below_its_fixed_part(pictures):
    assert ["deep/ü d.tiff"] == ids_of(planned(images=f"{pictures}/sub/**/*.tiff"))
    assert ["a.PNG", "b.jpg"] == ids_of(planned(images=f"{pictures}/*"))
    assert ["notes.txt"] == ids_of(planned(images=f"{pictures}/*.txt"))


def test_a_folder_named_like_a_pattern_is_a_folder(tmp_path):
    (tmp_path / "set[1]").mkdir()
    (tmp_path / "set[1]" / "a.jpg").touch()

    assert ["a.jpg"] == ids_of(planned(images=tmp_path / "set[1]"))


def test_a_table_of_uris_reads_relative_ones_from_its_folder(tmp_path):
    uris = ["./x/b.jpg", "a.jpg", f"{tmp_path}/c.jpg", "s3://bucket/d.jpg", "x/../../../etc/passwd"]

    plan = planned(images=table(tmp_path / "i.parquet", {"image_uri": uris}))

    assert ["a.jpg", "c.jpg", "s3://bucket/d.jpg", "x/../../../etc/passwd", "x/b.jpg"] == ids_of(plan)
    assert f"{tmp_path}/x/b.jpg" == plan.table.column("image_uri")[4].as_py()
    assert [None, None, None, "uri_refused", None] == plan.table.column("error_code").to_pylist()


def test_a_table_may_be_a_folder_of_parts_and_csv_and_jsonl(tmp_path):
    folder = tmp_path / "list.parquet"
    folder.mkdir()
    table(folder / "part-1.parquet", {"image_uri": ["b.jpg"], "image_id": [10]})
    table(folder / "part-0.parquet", {"image_uri": ["a.jpg"], "image_id": [9]})
    (folder / "_SUCCESS").touch()
    (folder / "_temporary").mkdir()
    table(folder / "_temporary" / "part-2.parquet", {"image_uri": ["c.jpg"], "image_id": [11]})
    (tmp_path / "i.csv").write_text("image_id,image_uri\n9,list.parquet/a.jpg\n10,list.parquet/b.jpg\n")
    rows = [
        {"image_uri": "list.parquet/a.jpg", "image_id": 9},
        {"image_uri": "list.parquet/b.jpg", "image_id": 10},
    ]
    (tmp_path / "i.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    plans = [planned(images=path) for path in (folder, tmp_path / "i.csv", tmp_path / "i.jsonl")]

    assert ["10", "9"] == ids_of(plans[0])
    assert 1 == len({plan.sha256 for plan in plans})
    assert [{folder / "part-0.parquet", folder / "part-1.parquet"}] == [
        {type(folder)(file["uri"]) for file in plans[0].summary.input_files}
    ]


@pytest.mark.parametrize(
    "log",
    [
        "_delta_log/00000000000000000000.json",
        "_delta_log/00000000000000000010.checkpoint.parquet",
        "metadata/v2.metadata.json",
        "t/metadata/00001-2f0d6c5e-8a51-4c5e-9a3f-0d1e2f3a4b5c.gz.metadata.json",
    ],
)
def test_a_table_whose_log_says_which_files_count_is_refused(tmp_path, pictures, log):
    """Spark's UPDATE on Delta Lake and Iceberg writes a new file and leaves the old one where it is."""
    folder = tmp_path / "boxes"
    (folder / log).parent.mkdir(parents=True)
    (folder / log).write_text("{}")
    for name in ("part-00000-old.parquet", "part-00001-new.parquet"):
        table(folder / name, {"image_uri": ["b.jpg"], "bbox": [A]})

    message = refusal(images=pictures, boxes=folder)

    assert str(folder / log) in message
    assert "plain Parquet" in message
    assert 1 == planned(images=pictures, boxes=f"{folder}/*-new.parquet").summary.boxes
    (folder / log).rename((folder / log).with_name("b.jpg.metadata.json"))
    assert 2 == planned(images=pictures, boxes=folder).summary.boxes


def test_image_root_moves_relative_names(tmp_path, pictures):
    listing = as_json(tmp_path / "i.json", {"images": [{"id": 4, "file_name": "b.jpg"}]})

    plan = planned(images=listing, image_root=str(pictures))

    assert [f"{pictures}/b.jpg"] == plan.table.column("image_uri").to_pylist()
    assert [None] == plan.table.column("error_code").to_pylist()


def test_local_files_outside_the_roots_are_rows_with_a_reason(tmp_path, pictures):
    inside = tmp_path / "tables"
    inside.mkdir()
    path = table(
        inside / "i.parquet",
        {"image_uri": [f"{pictures}/b.jpg", "/dev/zero", "http://x/y.jpg", "a.jpg", " "]},
    )

    plan = planned(images=path)
    allowed = planned(images=path, access=AccessRules(roots=(str(pictures),), schemes=("http",)))

    assert 4 == plan.summary.refused_uris
    assert ["4 of 5 uris are refused and will fail"] == [w.partition(":")[0] for w in plan.summary.warnings]
    assert "--allow-root" in " ".join(plan.table.column("error_message").drop_null().to_pylist())
    codes = dict(zip(ids_of(allowed), allowed.table.column("error_code").to_pylist(), strict=True))
    assert {" ", "/dev/zero"} == {key for key, code in codes.items() if code}
    assert (str(pictures), str(inside)) == allowed.access.roots


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: p / "missing", "no such file or folder"),
        (lambda p: p / "missing.parquet", "no such file or folder"),
        (lambda p: p / "missing.json", "no such file"),
        (lambda p: p / "sub/*.gif", "no pictures; found nothing"),
        (lambda p: p / "*.md", "no pictures"),
        (lambda p: p / "notes.txt", "no known kind"),
        (lambda p: table(p / "t.parquet", {"path": ["a"], "file": ["b"]}), "input.columns.image_uri=path"),
        (lambda p: table(p / "t.parquet", {"image_uri": ["a", None, ""]}), "row 1: image_uri is null"),
        (lambda p: table(p / "t.parquet", {"image_uri": ["a", "b"], "image_id": [1, 1]}), "'1' stands for"),
        (lambda p: table(p / "t.parquet", {"image_uri": ["a", "a"], "image_id": [1, 2]}), "is there twice"),
        (lambda p: table(p / "t.parquet", {"image_uri": ["a", "./a"], "image_id": [1, 2]}), "is there twice"),
        (lambda p: table(p / "t.parquet", {"image_uri": ["a"], "image_id": [""]}), "row 0: image_id is null"),
        (
            lambda p: as_json(p / "r.json", [{"image_id": 1, "bbox": A}]),
            "give the instances file as --images",
        ),
    ],
)
def test_images_that_cannot_be_listed_are_refused(pictures, make, reason):
    assert reason in refusal(images=make(pictures))


@pytest.mark.parametrize(
    ("rows", "ids", "failed"),
    [
        ([("a", "a"), ("a", "a"), ("a", "a")], ["a", "b", "c", "d", "e"], {}),
        ([("a", "1"), ("a", "1")], ["1", "b", "c", "d", "e"], {}),
        ([("a", "1"), ("x", "1"), ("x", "1")], ["1", "b", "c", "d", "e"], {"1": "stands for"}),
        ([("a", "1"), ("./a", "2")], ["1", "2", "b", "c", "d", "e"], {"1": "another", "2": "another"}),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_an_image_or_id_that_is_listed_twice_costs_itself(pictures, rows, ids, failed, turned):
    listed = [*rows, *((one, one) for one in "bcde")]
    uris, names = zip(*(listed[::-1] if turned else listed), strict=True)

    plan = planned(images=table(pictures / "t.parquet", {"image_uri": uris, "image_id": names}))

    assert ids_of(plan) == ids
    rows_of = {row["image_id"]: row for row in plan.table.to_pylist()}
    assert {name for name, row in rows_of.items() if row["error_code"] == "uri_refused"} == failed.keys()
    assert all(text in rows_of[name]["error_message"] for name, text in failed.items())
    told = " ".join(plan.summary.warnings)
    assert failed.keys() or "listed before" in told
    assert plan.summary.listed_images == len(ids)


def test_nothing_at_all_is_a_usage_error():
    with pytest.raises(UsageError, match="--images or --boxes"):
        planned()


def test_a_detectors_boxes_are_read_as_it_gives_them_whatever_is_said_of_files(pictures):
    plan = planned(images=pictures, box_format="cxcywh-normalised", box_frame="stored")

    assert ("xyxy", "upright") == (plan.summary.box_format, plan.summary.box_frame)


# --- joins ----------------------------------------------------------------------------------


def test_boxes_name_the_images_when_no_images_are_given(tmp_path):
    plan = planned(
        boxes=table(tmp_path / "b.parquet", {"image_uri": ["b.jpg", "a.jpg"], "boxes": [[B], [A, C]]})
    )

    assert {"a.jpg": [A, C], "b.jpg": [B]} == boxes_of(plan)
    assert [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"] == plan.table.column("image_uri").to_pylist()
    assert ("xyxy", "upright") == (plan.summary.box_format, plan.summary.box_frame)


def test_images_without_boxes_have_none_and_null_lists_stay_null(tmp_path, pictures):
    path = table(pictures / "t.parquet", {"image_uri": ["b.jpg", "sub/c.webp"], "boxes": [None, []]})

    plan = planned(images=pictures, boxes=path)

    assert {"a.PNG": [], "b.jpg": None, "sub/c.webp": [], "sub/deep/ü d.tiff": []} == boxes_of(plan)
    assert (3, 2, 1) == (
        plan.summary.without_boxes,
        plan.summary.listed_without_boxes,
        plan.summary.null_boxes,
    )


def test_both_shapes_give_the_same_plan(tmp_path):
    rng = random.Random(1)
    boxes = {
        f"{i:02d}.jpg": [[float(rng.random()) * 100 for _ in range(4)] for _ in range(i % 4)]
        for i in range(30)
    }
    flat = [(name, box) for name, lists in boxes.items() for box in lists]
    rng.shuffle(flat)
    order: dict[str, list] = {name: [box for key, box in flat if key == name] for name in boxes}
    images = table(tmp_path / "i.parquet", {"image_uri": list(boxes)})
    lists = table(tmp_path / "l.parquet", {"image_uri": list(order), "boxes": list(order.values())})
    single = table(tmp_path / "s.parquet", {"image_uri": [n for n, _ in flat], "bbox": [b for _, b in flat]})

    assert planned(images=images, boxes=lists).sha256 == planned(images=images, boxes=single).sha256
    assert order == boxes_of(planned(images=images, boxes=single))


def test_the_plan_does_not_depend_on_the_order_of_the_inputs(tmp_path):
    names = [f"{i}.jpg" for i in range(50)]
    boxes = {name: [[float(i), 0.0, 99.0, 99.0]] * (i % 3) for i, name in enumerate(names)}
    shas = set()
    for seed in range(3):
        random.Random(seed).shuffle(names)
        images = table(tmp_path / "i.parquet", {"image_uri": names})
        random.Random(seed + 9).shuffle(names)
        path = table(tmp_path / "b.parquet", {"image_uri": names, "boxes": [boxes[name] for name in names]})
        shas.add(planned(images=images, boxes=path).sha256)

    assert 1 == len(shas)
    assert shas.isdisjoint(
        {planned(images=images).sha256, planned(images=images, boxes=path, limit=49).sha256}
    )


def test_the_plan_depends_on_every_value(tmp_path):
    base = {"image_uri": ["a"], "boxes": [[A]], "labels": [["x"]], "scores": [[0.5]], "box_ids": [["i"]]}
    changes = [
        {},
        {"image_uri": ["b"]},
        {"boxes": [[[1.0, 2.0, 3.0, 4.5]]]},
        {"boxes": [None]},
        {"boxes": [[]]},
        {"labels": [["y"]]},
        {"scores": [[None]]},
        {"scores": [[0.0]]},
        {"box_ids": [[""]]},
        {"box_ids": [[None]]},
        {"scores": [[math.nan]]},
        {"box_ids": [["j"]]},
    ]

    shas = {planned(boxes=table(tmp_path / "b.parquet", base | change)).sha256 for change in changes}

    assert len(changes) == len(shas)


def test_the_plan_depends_on_whose_a_box_is(tmp_path):
    lists = ([[A, B], []], [[A], [B]], [[], [A, B]], [None, [A, B]])
    shas = set()
    for boxes in lists:
        path = table(tmp_path / "b.parquet", {"image_uri": ["a", "b"], "boxes": boxes})
        shas.add(planned(boxes=path).sha256)

    assert len(lists) == len(shas)


def test_units_are_a_part_of_the_plan(pictures):
    two = planned(images=pictures, images_per_unit=2)

    assert [0, 0, 1, 1] == two.table.column("unit_id").to_pylist()
    assert two.sha256 != planned(images=pictures, images_per_unit=3).sha256


NAMES = ["z", "é", "e\u0301", "漢字", "😀", "\uffff", "a b", "a%20b", "A", "a", "Z" * 300, "\t", "ß", "ss"]


def test_ids_are_bytes_sorted_as_bytes(tmp_path):
    plan = planned(images=table(tmp_path / "i.parquet", {"image_uri": [f"{name}.jpg" for name in NAMES]}))

    expected = sorted((f"{name}.jpg" for name in NAMES), key=str.encode)
    assert expected == ids_of(plan)
    assert unicodedata.normalize("NFC", "e\u0301.jpg") in expected


def test_ids_of_the_box_table_are_used_where_the_images_have_none(pictures):
    path = table(
        pictures / "b.parquet", {"image_uri": ["b.jpg", "a.PNG"], "image_id": [7, 12], "boxes": [[A], [B]]}
    )

    plan = planned(images=pictures, boxes=path)

    assert {"7": [A], "12": [B], "sub/c.webp": [], "sub/deep/ü d.tiff": []} == boxes_of(plan)


def test_coco_instances_over_a_folder_join_by_file_name_and_keep_their_ids(tmp_path, pictures):
    path = as_json(
        tmp_path / "elsewhere.json",
        {
            "images": [{"id": 31, "file_name": "b.jpg"}, {"id": 4, "file_name": "sub/c.webp"}],
            "annotations": [{"image_id": 31, "bbox": A, "category_id": 2}],
            "categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}],
        },
    )

    plan = planned(images=pictures, boxes=path)

    assert {"31": [A], "4": [], "a.PNG": [], "sub/deep/ü d.tiff": []} == boxes_of(plan)
    assert "xywh" == plan.summary.box_format
    assert ({"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}) == plan.categories
    (box,) = plan.table.to_pylist()[0]["boxes"]
    assert (2, "cat") == (box["category_id"], box["category_name"])


def test_coco_results_join_by_id_with_the_instances(tmp_path):
    listed = [{"id": 31, "file_name": "b.jpg"}, {"id": 4, "file_name": "c.jpg"}]
    images = as_json(tmp_path / "i.json", {"images": listed, "categories": [{"id": 1, "name": "cat"}]})
    boxes = as_json(tmp_path / "r.json", [{"image_id": 31, "bbox": A, "score": 0.25, "category_id": 1}])

    plan = planned(images=images, boxes=boxes)

    assert {"31": [A], "4": []} == boxes_of(plan)
    assert f"{tmp_path}/b.jpg" == plan.table.column("image_uri")[0].as_py()
    assert ({"id": 1, "name": "cat"},) == plan.categories
    assert plan.table.column("boxes")[0].as_py()[0]["category_name"] == "cat"


def test_coco_instances_alone_list_their_images(tmp_path):
    path = as_json(
        tmp_path / "i.json",
        {"images": [{"id": 1, "file_name": "x/b.jpg"}], "annotations": [{"image_id": 1, "bbox": A}]},
    )

    plan = planned(boxes=path)

    assert [f"{tmp_path}/x/b.jpg"] == plan.table.column("image_uri").to_pylist()
    assert {"1": [A]} == boxes_of(plan)


def test_annotations_of_images_that_coco_does_not_list_are_refused_or_left_out(tmp_path):
    tree = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "bbox": A}, {"image_id": 77, "bbox": B}],
    }
    path = as_json(tmp_path / "i.json", tree)

    assert "1 box of 1 image (of 2) have no image: it names '77'" in refusal(boxes=path)
    plan = planned(boxes=path, allow_unmatched=True)
    assert {"1": [A]} == boxes_of(plan)
    assert ("77",) == plan.summary.unmatched_boxes.examples


def test_file_uris_and_paths_are_one_file(tmp_path, pictures):
    path = table(tmp_path / "b.parquet", {"image_uri": [f"file://{pictures}/b.jpg"], "boxes": [[A]]})

    assert [A] == boxes_of(planned(images=pictures, boxes=path))["b.jpg"]


def test_relative_uris_of_boxes_kept_elsewhere_are_read_below_the_image_folder(tmp_path, pictures):
    path = table(tmp_path / "b.parquet", {"image_uri": ["b.jpg", "sub/c.webp"], "boxes": [[A], [B]]})

    plan = planned(images=pictures, boxes=path)

    assert ([A], [B]) == (boxes_of(plan)["b.jpg"], boxes_of(plan)["sub/c.webp"])
    assert f"relative ones below {pictures}" in plan.summary.id_rule


def test_boxes_whose_image_is_not_listed_are_refused_or_left_out_and_counted(tmp_path, pictures):
    path = table(
        pictures / "b.parquet",
        {
            "image_uri": ["b.jpg", "x.jpg", "y.jpg", "z.jpg"],
            "boxes": [[A], [A, B], [C], []],
            "labels": [["m"], ["k", "l"], ["n"], []],
        },
    )

    message = refusal(images=pictures, boxes=path)
    plan = planned(images=pictures, boxes=path, allow_unmatched=True)

    assert "3 boxes of 2 images (of 4)" in message
    assert "x.jpg" in message
    assert "a.PNG" in message
    assert "--allow-unmatched" in message
    lost = plan.summary.unmatched_boxes
    assert (3, 2, f"{pictures}/x.jpg") == (lost.boxes, lost.images, lost.examples[0])
    assert 1 == plan.summary.boxes
    assert ({"id": 1, "name": "m"},) == plan.categories
    assert f"3 boxes of 2 unlisted images, such as '{pictures}/x.jpg': left out" in plan.summary.warnings


@pytest.mark.parametrize(
    ("ids", "hint"),
    [
        (["B", "A"], "upper and lower case"),
        (["sub/c", "b"], "without their ending"),
        (["other/b.jpg", "c.webp"], "agree but for the folder"),
        (["c", "other/b"], "file stems"),
        (["nothing", "alike"], None),
    ],
)
def test_ids_that_match_nothing_are_explained(pictures, ids, hint):
    images = table(pictures / "i.parquet", {"image_uri": ["b.jpg", "sub/c.webp"]})
    if hint == "upper and lower case":
        images = table(pictures / "i.parquet", {"image_uri": ["1.jpg", "2.jpg"], "image_id": ["a", "b"]})
    boxes = table(pictures / "b.parquet", {"image_id": ids, "boxes": [[A], [B]]})

    message = refusal(images=images, boxes=boxes)

    assert (hint or "Fix --images") in message


NFD = unicodedata.normalize("NFD", "é/ü.jpg")


@pytest.mark.parametrize(
    ("there", "named", "hint"),
    [
        ("images/a.jpg", "images\\a.jpg", "differ in backslashes (Windows): "),
        ("a.jpg", "C:\\data\\images\\a.jpg", "differ in backslashes (Windows) and the folder: "),
        ("a.jpg", "other/A.JPG", "differ in upper and lower case and the folder: "),
        ("é/ü.jpg", f"other/{NFD}", "differ in Unicode form (NFC, NFD) and the folder: "),
        ("É/ü.jpg", NFD, "differ in upper and lower case and Unicode form (NFC, NFD): "),
        ("a b.jpg", "a%20b.jpg", "differ in percent-encoding (%20): "),
        ("a b.jpg", "other/a%20b.jpg", "differ in percent-encoding (%20) and the folder: "),
        ("a.jpg", "https://host/a.jpg?sig=x/y", "differ in a query behind the name (?, #) and the folder: "),
        ("a.jpg", "a.jpg\r", "differ in white space or quotes around them: "),
        ("a.jpg", " 'a.jpg'", "differ in white space or quotes around them: "),
        ("a.jpg", "a.png", "without their ending, or with another one: "),
        ("a.jpg", "a", "without their ending, or with another one: "),
        ("a.jpg", "other/a.jpeg", "look like file stems: "),
        ("a.jpg", "other/A", "differ in upper and lower case and the folder and the ending: "),
        ("x/a.jpg", "s3://bucket/x/a.jpg", "agree but for the folder: "),
        ("x/a.jpg", "file:///data/x/a.jpg", "agree but for the folder: "),
        ("000123.jpg", "123.jpg", "differ in leading zeros: "),
        ("x/000123.jpg", "y/123.jpg", "differ in the folder and leading zeros: "),
        ("d/Cafe 1.jpg", "CAFE 1", "upper and lower case and the folder and the ending: "),
        ("d/a_1.jpg", "q/a+1.jpg", "in spaces (_, + or a no-break space for them) and the folder: "),
        ("d/a b.jpg", "d/a\u202fb.jpg", "They differ in spaces (_, + or a no-break space for them): "),
        ("d/a b.jpg", "d/a%2520b.jpg", "They differ in percent-encoding (%20): "),
        ("d/a b.jpg", "/data/local-files/?d=d/a%20b.jpg", "They differ in percent-encoding (%20) and "),
        ("a b.jpg", "/data/upload/1/0a1b2c3d-a_b.jpg", "what Label Studio puts before them and spaces"),
        ("a.jpg", "0a1b2c3d-a.jpg", "They differ in what Label Studio puts before them"),
        ("d/a.jpg", "images/0a1b2c3d-a.jpg", "what Label Studio puts before them and the folder: "),
        ("000123.jpg", "123", "look like the numbers in the file names"),
        ("COCO_val2014_000000000139.jpg", "139", "look like the numbers in the file names"),
        ("0.jpg", "00", "look like the numbers in the file names"),
        ("a.jpg", "b.jpg", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["image_id", "image_uri"])
@pytest.mark.parametrize("beside", [True, False])
def test_names_that_differ_are_explained_with_a_pair(tmp_path, there, named, hint, column, beside):
    """Wherever the box table lies: the folder that its relative names start from is no difference."""
    root = tmp_path / "pictures"
    for name in (there, "odd.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    path = table((root if beside else tmp_path) / "b.parquet", {column: [named], "bbox": [A]})

    message = refusal(images=root, boxes=path)

    assert any(f". {start} " in message for start in ("They", "The ids")) == bool(hint)
    if hint:
        pair = message.partition(hint)[2]
        assert there.rpartition("/")[2] in pair
        assert "odd" not in pair


@pytest.mark.parametrize(("ids", "hinted"), [((0, 1), True), (("x", 1), False)])
def test_numbers_of_coco_results_are_those_of_their_instances(tmp_path, pictures, ids, hinted):
    """Detectron2 and MMDetection write ids alone; names of pictures need not have a number in them."""
    rows = [{"image_id": name, "category_id": 0, "bbox": A, "score": 0.5} for name in ids]

    message = refusal(images=pictures, boxes=as_json(tmp_path / "results.json", rows))

    assert ("give the instances JSON, which names whose these numbers are, as --images" in message) == hinted


def test_a_pair_is_shown_of_which_the_sentence_is_true(pictures):
    images = table(
        pictures / "i.parquet", {"image_uri": ["1", "2", "3"], "image_id": ["d/a", "d/b", "d/c d"]}
    )
    boxes = table(pictures / "b.parquet", {"image_id": ["D/A", "d\\b", "d/c%20d"], "bbox": [A, A, A]})

    message = refusal(images=images, boxes=boxes)

    assert "They differ in backslashes (Windows) and percent-encoding (%20): 'd\\\\b' and 'd/b'" in message


def test_names_that_stand_before_others_are_explained(tmp_path):
    images = table(tmp_path / "i.parquet", {"image_uri": ["1", "2"], "image_id": ["x/a.jpg", "x/b.jpg"]})
    for before in ("/", "./", "file://", "s3://"):
        boxes = table(tmp_path / "b.parquet", {"image_id": [f"{before}x/b.jpg"], "bbox": [A]})
        assert f"'{before}x/b.jpg' and 'x/b.jpg'" in refusal(images=images, boxes=boxes)


def test_a_difference_is_said_where_boxes_are_left_out_knowingly(pictures):
    path = table(pictures / "b.parquet", {"image_uri": ["B.JPG", "A.png"], "boxes": [[A], [B]]})

    plan = planned(images=pictures, boxes=path, allow_unmatched=True)

    assert "upper and lower case" in " ".join(plan.summary.warnings)


def test_half_of_what_is_lost_is_enough_to_be_explained(pictures):
    path = table(pictures / "b.parquet", {"image_uri": ["B.JPG", "gone"], "boxes": [[A], [B]]})

    assert "upper and lower case" in refusal(images=pictures, boxes=path)


def test_one_image_that_is_gone_among_many_is_not_explained_by_spelling(pictures):
    images = table(pictures / "i.parquet", {"image_uri": ["1.jpg", "2.jpg"], "image_id": ["a", "b"]})
    boxes = table(pictures / "b.parquet", {"image_id": ["a", "b", "gone"], "boxes": [[A], [B], [A]]})

    message = refusal(images=images, boxes=boxes)

    assert "upper and lower case" not in message
    assert "'gone'" in message


def test_numbers_of_coco_results_over_a_folder_of_padded_names_are_explained(tmp_path):
    for number in (139, 285):
        (tmp_path / f"{number:012d}.jpg").touch()
    boxes = as_json(tmp_path / "r.json", [{"image_id": 139, "bbox": A}, {"image_id": 285, "bbox": B}])

    assert "give the instances JSON as --images" in refusal(images=tmp_path, boxes=boxes)


def test_composed_and_decomposed_names_are_two_names_and_explained(tmp_path):
    images = table(tmp_path / "i.parquet", {"image_uri": ["caf\u00e9.jpg"]})
    boxes = table(tmp_path / "b.parquet", {"image_uri": ["cafe\u0301.jpg"], "boxes": [[A]]})

    assert "Unicode form" in refusal(images=images, boxes=boxes)


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ({"image_uri": ["b.jpg", "b.jpg"], "boxes": [[A], [B]]}, "more than one row"),
        ({"image_uri": ["b.jpg", "b.jpg"], "image_id": [1, 2], "bbox": [A, B]}, "more than one id"),
        ({"image_uri": ["b.jpg", "a.PNG"], "image_id": [1, 1], "bbox": [A, B]}, "names two images"),
        ({"image_id": [1], "bbox": [A]}, "have no image"),
    ],
)
def test_boxes_that_name_most_images_twice_are_refused(pictures, boxes, reason):
    assert reason in refusal(images=pictures, boxes=table(pictures / "b.parquet", boxes))


def test_boxes_by_id_alone_need_images(tmp_path):
    assert "--images" in refusal(boxes=table(tmp_path / "b.parquet", {"image_id": [1], "bbox": [A]}))


def test_an_image_twice_in_a_table_of_boxes_alone_counts_once(tmp_path):
    path = table(tmp_path / "b.parquet", {"image_uri": ["a", "a"], "boxes": [[A], [A]]})

    plan = make_plan(InputSettings(boxes=str(path)))

    assert [[A]] == [[box["given"] for box in row["boxes"]] for row in plan.table.to_pylist()]
    assert "1 image in several rows that say the same" in " ".join(plan.summary.warnings)


# --- values ---------------------------------------------------------------------------------


def test_labels_that_are_names_are_numbered_by_their_bytes(tmp_path):
    path = table(
        tmp_path / "b.parquet",
        {
            "image_uri": ["a", "b"],
            "boxes": [[A, B], [C]],
            "labels": [["é", "z"], ["Z"]],
            "scores": [[0.5, math.nan], None],
        },
    )

    plan = planned(boxes=path)

    assert ({"id": 1, "name": "Z"}, {"id": 2, "name": "z"}, {"id": 3, "name": "é"}) == plan.categories
    first, second = (row["boxes"] for row in plan.table.to_pylist())
    assert [(3, "é", 0.5), (2, "z")] == [
        (first[0]["category_id"], first[0]["category_name"], first[0]["score"]),
        (first[1]["category_id"], first[1]["category_name"]),
    ]
    assert math.isnan(first[1]["score"])
    assert (1, "Z", None) == (second[0]["category_id"], second[0]["category_name"], second[0]["score"])


def test_names_given_with_ids_are_kept(tmp_path):
    columns = {"image_uri": ["a"] * 3, "bbox": [A] * 3, "label": ["x", "y", None], "category_id": [5, 2, 5]}

    assert ({"id": 2, "name": "y"}, {"id": 5, "name": "x"}) == planned(
        boxes=table(tmp_path / "b.parquet", columns)
    ).categories


def test_lists_of_unlike_length_are_rows_with_a_code(tmp_path):
    path = table(
        tmp_path / "b.parquet", {"image_uri": ["a", "b"], "boxes": [[A, B], [C]], "labels": [["x"], ["y"]]}
    )

    plan = planned(boxes=path)

    assert ["labels_mismatch", None] == plan.table.column("error_code").to_pylist()
    assert ["labels has 1 values for 2 boxes", None] == plan.table.column("error_message").to_pylist()
    assert {"a": [A, B], "b": [C]} == boxes_of(plan)
    assert 1 == plan.summary.mismatched_labels


def test_prompts_that_cannot_be_used_are_counted_and_the_first_is_named(tmp_path):
    sound = {"size": [4, 5], "counts": "d0"}
    masks = [sound, sound | {"counts": "abc"}, None, sound | {"size": [5, 5]}, sound, None, None]
    rows = {
        "image_uri": ["b", "b", "b", "a\x1b", "c", "c", "c"],
        "bbox": [A, A, None, None, None, None, A],
        "points": [None, None, [[1.0, 2.0]], None, [[1.0, math.nan]], [[1.0, 2.0]] * 300, None],
        "point_labels": [None, None, [1], None, [1], [1] * 300, [2]],
        "prompt_mask": masks,
    }

    plan = planned(boxes=table(tmp_path / "b.parquet", rows))
    [warning] = plan.summary.warnings

    assert plan.summary.invalid_prompts == 5
    assert warning.startswith("5 of 7 boxes have points or a mask that cannot be used")
    assert "prompt_invalid" in warning
    assert r"box 0 of a\x1b: its mask: runs of 20 pixels in all, wanted 25" in warning

    rows["image_uri"] = ["a"] * 7
    assert (
        "box 1 of a: its mask: the run-length text ends"
        in planned(boxes=table(tmp_path / "c.parquet", rows)).summary.warnings[0]
    )
    few = {name: values[:1] for name, values in rows.items()}
    few["points"] = pa.array([None], pa.list_(pa.list_(pa.float64())))
    few["point_labels"] = pa.array([None], pa.list_(pa.int64()))
    sound_plan = planned(boxes=table(tmp_path / "d.parquet", few))
    assert (0, ()) == (sound_plan.summary.invalid_prompts, sound_plan.summary.warnings)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"prompt_mask": "{'size': [4, 5], 'counts': b'd0'}"}, 'its mask is not {"size": [height, width]'),
        ({"prompt_mask": [[10, 10, 20, 20, 30, 5]]}, 'its mask is not {"size": [height, width]'),
        ({"prompt_mask": {"size": [4, 5], "counts": [3.5, 17]}}, "the text or whole numbers of COCO's runs"),
        ({"points": [[1, 2, 1]], "point_labels": [1]}, "a point that is not two numbers"),
        ({"points": [[1, 2]], "point_labels": None}, "2 coordinates for 0 point labels"),
    ],
)
def test_prompts_made_of_something_else_are_told_in_words(tmp_path, prompt, said):
    (tmp_path / "b.jsonl").write_text(json.dumps({"image_uri": "a", "bbox": A} | prompt))

    [warning] = planned(boxes=str(tmp_path / "b.jsonl")).summary.warnings

    assert f"box 0 of a: {said}" in warning or said in warning


def test_of_many_points_each_that_cannot_be_used_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("hqlabel.pipeline.planning.plan_summary._PROMPTS_AT_ONCE", 50)
    rng = random.Random(0)
    odd = [None, math.nan, math.inf, 1e308, 1.0, 0.0, 5.0]
    points, labels = [], []
    for i in range(999):
        count = rng.choice([0, 1, 2, 3, 300])
        points.append(None if i % 5 == 0 else [[rng.choice(odd if i % 2 else odd[3:]), 2.0]] * count)
        label = rng.choice([1, 0, -1, 1, 0, 2][: 6 - i % 3])
        labels.append(None if i % 7 == 0 else [label] * (count + (i % 11 == 0)))
    arrays = {
        "image_uri": ["a"] * 999,
        "bbox": [A] * 999,
        "points": pa.array(points, pa.list_(pa.list_(pa.float64()))),
        "point_labels": pa.array(labels, pa.list_(pa.int64())),
    }

    plan = planned(boxes=table(tmp_path / "b.parquet", arrays))

    faults = prompt_faults(plan.table.to_pylist()[0]["boxes"])
    wrong = [place for place, fault in enumerate(faults) if fault is not None]
    assert 200 < len(wrong) < 800
    assert len(wrong) == plan.summary.invalid_prompts
    assert f"the first is box {wrong[0]} of a: {faults[wrong[0]]}" in " ".join(plan.summary.warnings)


def test_points_and_masks_travel_in_the_plan(tmp_path):
    mask = {"size": [4, 5], "counts": "abc"}
    path = table(
        tmp_path / "b.parquet",
        {
            "image_uri": ["a", "a"],
            "bbox": [None, A],
            "points": [[[1.0, 2.0]], None],
            "point_labels": [[1], None],
            "prompt_mask": [mask, None],
        },
    )

    plan = planned(boxes=path)
    store = Store(Place(uri=str(tmp_path / "out")))
    write_plan(store, plan)
    first, second = read_unit(store, plan.sha256, 0).to_pylist()[0]["boxes"]

    assert (None, [1.0, 2.0], [1], mask) == tuple(
        first[k] for k in ("given", "points_xy", "point_labels", "prompt_mask")
    )
    assert (A, None, None, None) == tuple(
        second[k] for k in ("given", "points_xy", "point_labels", "prompt_mask")
    )


def test_likely_mistakes_are_warned_of_with_the_flag(tmp_path):
    def warnings(boxes, **settings):
        return " ".join(
            planned(
                boxes=table(tmp_path / "b.parquet", {"image_uri": ["a"], "boxes": [boxes]}), **settings
            ).summary.warnings
        )

    assert "" == warnings([A, B])
    with pytest.raises(JobRefused, match="--box-format xyxy-normalised"):
        warnings([[0.1, 0.1, 0.5, 1.0]])
    assert "--box-format xyxy-normalised" in warnings([[0.1, 0.1, 0.5, 1.0]], box_format="xyxy")
    assert "" == warnings([[0.1, 0.1, 0.5, 1.0]], box_format="xyxy-normalised")
    assert "--box-format xywh" in warnings([[100, 100, 20, 20], [10, 10, 50, 50]])


def test_sizes_in_coco_show_corners_read_as_widths(tmp_path):
    tree = {
        "images": [{"id": 1, "file_name": "a", "width": 640, "height": 480}],
        "annotations": [{"image_id": 1, "bbox": [300, 300, 400, 400]}],
    }

    assert "--box-format xyxy" in planned(boxes=as_json(tmp_path / "c.json", tree)).summary.warnings[0]


def test_mapped_columns_are_checked(tmp_path):
    path = table(tmp_path / "b.parquet", {"path": ["a"], "boxes": [[A]]})

    assert {"a": [A]} == boxes_of(planned(boxes=path, columns={"image_uri": "path"}))
    assert "no table has a column 'scores2'" in refusal(
        boxes=path, columns={"image_uri": "path", "scores": "scores2"}
    )
    with pytest.raises(UsageError, match="no column of ours"):
        planned(boxes=path, columns={"image_uri": "path", "colour": "path"})


def test_the_limit_takes_the_first_ids_of_the_whole(tmp_path):
    path = table(
        tmp_path / "b.parquet",
        {"image_uri": ["c", "a", "b"], "boxes": [[C], [A], [B]], "labels": [["x"], ["y"], ["z"]]},
    )

    plan = planned(boxes=path, limit=2)

    assert {"a": [A], "b": [B]} == boxes_of(plan)
    assert (2, 3) == (plan.summary.images, plan.summary.listed_images)
    assert 3 == len(plan.categories)


def test_a_table_without_rows_is_a_plan_without_units(tmp_path):
    path = table(
        tmp_path / "b.parquet",
        {"image_uri": pa.array([], pa.string()), "bbox": pa.array([], pa.list_(pa.float64()))},
    )

    plan = planned(boxes=path)
    store = Store(Place(uri=str(tmp_path / "out")))
    write_plan(store, plan)

    assert (0, 0, PLAN) == (plan.summary.images, plan.summary.units, plan.table.schema)
    assert [] == list(iter_plan(store, plan.sha256))


# --- written and read back ------------------------------------------------------------------


def many(tmp_path, count=300, per_unit=2) -> Plan:
    rng = np.random.default_rng(0)
    boxes = [rng.uniform(0, 99, (i % 5, 4)).tolist() if i % 7 else None for i in range(count)]
    path = table(
        tmp_path / "many.parquet", {"image_uri": [f"{i:05d}.jpg" for i in range(count)], "boxes": boxes}
    )
    return planned(boxes=path, images_per_unit=per_unit)


def test_every_unit_reads_back_as_it_was_planned(tmp_path):
    plan = many(tmp_path)
    store = Store(Place(uri=str(tmp_path / "out")))

    write_plan(store, plan)

    assert 3 == len(store.list("plan/"))
    assert 150 == plan.summary.units
    for unit in (0, 1, 63, 64, 127, 128, 149):
        assert plan.table.slice(unit * 2, 2).to_pylist() == read_unit(store, plan.sha256, unit).to_pylist()
    units = list(iter_plan(store, plan.sha256))
    assert plan.table.to_pylist() == pa.concat_tables(units).to_pylist()
    assert list(range(150)) == [unit.column("unit_id")[0].as_py() for unit in units]


def test_a_plan_is_written_once_and_the_rest_of_a_half_written_one_later(tmp_path):
    plan = many(tmp_path)
    store = Store(Place(uri=str(tmp_path / "out")))
    write_plan(store, plan)
    before = {entry.key: (entry.etag, store.read(entry.key)) for entry in store.list("plan/")}
    store.delete([plan_key(plan.sha256, 1)])

    write_plan(store, plan)

    after = {entry.key: (entry.etag, store.read(entry.key)) for entry in store.list("plan/")}
    assert before.keys() == after.keys()
    assert [] == [key for key in before if before[key][1] != after[key][1]]
    assert [plan_key(plan.sha256, 1)] == [key for key in before if before[key][0] != after[key][0]]


def test_a_plan_lives_in_a_bucket_too(tmp_path, moto_s3):
    place = moto_s3.place()
    images = Store(place)
    for name in ("b.jpg", "sub/a.jpg", "notes.txt"):
        images.put(f"photos/{name}", b"x")
    body = pa.BufferOutputStream()
    pq.write_table(pa.table({"image_uri": ["photos/b.jpg"], "bbox": [A]}), body)
    images.put("boxes.parquet", body.getvalue().to_pybytes())
    access = AccessRules(options={"s3": moto_s3.options})

    plan = planned(images=f"{place.uri}/photos", boxes=f"{place.uri}/boxes.parquet", access=access)
    write_plan(images, plan)

    assert {"b.jpg": [A], "sub/a.jpg": []} == boxes_of(plan)
    assert 1 == plan.summary.skipped_files
    assert "etag" in plan.summary.input_files[0]
    assert plan.table.to_pylist() == read_unit(images, plan.sha256, 0).to_pylist()


def test_damage_in_a_plan_file_is_found(tmp_path):
    plan = many(tmp_path)
    store = Store(Place(uri=str(tmp_path / "out")))
    write_plan(store, plan)
    key = plan_key(plan.sha256, 0)
    whole = store.read(key)

    with pytest.raises(DamageFound, match="no unit 150"):
        read_unit(store, plan.sha256, 150)
    with pytest.raises(NotFound):
        read_unit(store, plan.sha256, 64 * 3)
    for flipped in (300, len(whole) // 2, len(whole) - 600):
        store.put(key, whole[:flipped] + bytes([whole[flipped] ^ 1]) + whole[flipped + 1 :])
        with pytest.raises(DamageFound):
            list(iter_plan(store, plan.sha256))
    store.put(key, store.read(plan_key(plan.sha256, 1)))
    with pytest.raises(DamageFound, match="does not hold unit"):
        read_unit(store, plan.sha256, 0)
    store.delete([key])
    with pytest.raises(DamageFound, match="missing"):
        list(iter_plan(store, plan.sha256))


def test_a_large_plan_is_cut_into_slices_without_a_seam(tmp_path, monkeypatch):
    whole = many(tmp_path, count=97, per_unit=10)
    monkeypatch.setattr("hqlabel.pipeline.planning.plan_table.SLICE_ROWS", 7)
    monkeypatch.setattr("hqlabel.pipeline.arrow_lists.HASH_ROWS", 97)

    cut = many(tmp_path, count=97, per_unit=10)

    assert whole.table.to_pylist() == cut.table.to_pylist()
    assert whole.sha256 == cut.sha256
    assert plan_module.UNITS_PER_FILE == 64
