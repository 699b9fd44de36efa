"""Every format of boxes gives the same plan; a broken file of each names file, field, found and wanted."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqlabel.pipeline.errors import JobRefused, UsageError
from hqlabel.pipeline.images.fetch import fetch_object
from hqlabel.pipeline.job_context import BoxRules
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.settings import InputSettings, Limits
from hqlabel.pipeline.stages.box_prompts import resolve_boxes
from tests.pipeline import made_formats
from tests.pipeline.made_formats import BOXES, FORMATS, NAMES, PICTURES, SIZE_HW, sample, tar_of

NAMED_BY_ROW = ("hf", "hf_structs")
NAMELESS = ("table", "parquet", "box_rows", "tars")


def planned(written):
    """The plan, and its prompts by the picture that its uris lead to: what no format may change."""
    plan = make_plan(written.settings)
    rules = BoxRules(box_format=plan.summary.box_format, box_frame=plan.summary.box_frame)
    found = {}
    for row in plan.table.to_pylist():
        data = fetch_object(row["image_uri"], plan.access, Limits()).data
        name = next(name for name, picture in PICTURES.items() if picture == data)
        prompts = resolve_boxes(row["boxes"], rules, upright_size_hw=SIZE_HW)
        assert prompts.usable.all()
        found[name] = [
            (box["category_id"] - written.first_class, tuple(xyxy), box["score"])
            for box, xyxy in zip(row["boxes"], prompts.prompt_xyxy.tolist(), strict=True)
        ]
    return plan, found


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_images_and_boxes(kind, tmp_path):
    written = FORMATS[kind](tmp_path)

    plan, found = planned(written)

    assert found == BOXES
    assert plan.summary.refused_uris == 0
    ids = plan.table["image_id"].to_pylist()
    if kind.startswith("coco"):
        assert ids == sorted(BOXES)
    elif kind in NAMED_BY_ROW:
        assert ids == [f"train-0.parquet/{row:09d}" for row in range(3)] + ["train-1.parquet/000000000"]
    else:
        assert ids == sorted(f"{name}.png" for name in BOXES)
    names = {one["id"] - written.first_class: one["name"] for one in plan.categories}
    assert names == dict(enumerate([None] * 3 if kind in NAMELESS else NAMES))
    rule = {"tars": "the names in the tars", "hf": "the files' names", "hf_structs": "the files' names"}
    assert rule.get(kind, "") in plan.summary.id_rule


@pytest.mark.parametrize("kind", FORMATS)
def test_a_plan_is_the_same_each_time_and_its_files_are_fingerprinted(kind, tmp_path):
    written = FORMATS[kind](tmp_path)

    first, second = make_plan(written.settings), make_plan(written.settings)

    assert first.sha256 == second.sha256
    assert first.summary.input_files == second.summary.input_files
    has_label_files = kind not in ("tars", *NAMED_BY_ROW)
    assert bool(first.summary.input_files) == has_label_files


def test_a_changed_label_file_changes_the_folders_fingerprint(tmp_path):
    written = made_formats.write_yolo(tmp_path)
    before = make_plan(written.settings).summary.input_files
    label = tmp_path / "labels" / "b" / "3.txt"
    label.write_text(label.read_text().replace("0.75", "0.80"))

    after = make_plan(written.settings).summary.input_files

    assert before[0]["files"] == after[0]["files"] == 5
    assert before[0]["sha256"] != after[0]["sha256"]


def test_images_alone_are_read_from_tars_and_data_sets_too(tmp_path):
    tars, hf = made_formats.write_tars(tmp_path / "t"), made_formats.write_hf(tmp_path / "h")
    patterns = str(tmp_path / "t" / "shards" / "*.tar")

    plans = [
        make_plan(InputSettings(images=place))
        for place in (
            tars.settings.images,
            patterns,
            hf.settings.boxes,
            f"{hf.settings.boxes}/train-1.parquet",
        )
    ]

    assert [plan.summary.images for plan in plans] == [4, 4, 4, 1]
    assert plans[0].table["image_id"].to_pylist() == sorted(f"{name}.png" for name in BOXES)
    uri = plans[0].table["image_uri"][0].as_py()
    assert uri.startswith(f"{tmp_path}/t/shards/0.tar#")
    assert uri.endswith("/a/1.png"), "the member's own name is kept"
    assert plans[2].table["image_uri"][0].as_py().endswith("train-0.parquet#image:0:0/a/1.png")


@pytest.mark.parametrize(
    ("ids", "wanted"), [("key", "a/1"), ("shard", "0.tar/a/1.png"), ("member", "a/1.png")]
)
def test_images_of_tars_are_called_as_asked(tmp_path, ids, wanted):
    settings = made_formats.write_tars(tmp_path).settings.model_copy(update={"boxes": None, "tar_ids": ids})

    assert make_plan(settings).table["image_id"][0].as_py() == wanted


def test_a_name_in_two_tars_is_refused_and_told_apart_by_shard(tmp_path):
    for shard in "01":
        (tmp_path / f"{shard}.tar").write_bytes(tar_of(sample("a/1")))

    with pytest.raises(JobRefused, match=r"image_id 'a/1\.png' stands for"):
        make_plan(InputSettings(images=str(tmp_path)))
    plan = make_plan(InputSettings(images=str(tmp_path), tar_ids="shard"))
    assert plan.table["image_id"].to_pylist() == ["0.tar/a/1.png", "1.tar/a/1.png"]


def test_a_table_of_boxes_joins_the_pictures_of_tars_by_name_and_by_key(tmp_path):
    tars = made_formats.write_tars(tmp_path / "t").settings.images
    table = made_formats.write_table(tmp_path / "b").settings.boxes
    keys = tmp_path / "keys.csv"
    keys.write_text("image_id,x1,y1,x2,y2\na/1,1,2,3,4\n")

    by_name = make_plan(InputSettings(images=tars, boxes=table))
    by_key = make_plan(InputSettings(images=tars, boxes=str(keys), tar_ids="key"))

    assert by_name.summary.boxes == 5
    assert by_key.table["boxes"].to_pylist()[0][0]["given"] == [1, 2, 3, 4]


def test_columns_of_tars_and_data_sets_are_mapped(tmp_path):
    beside = json.dumps({"found": [[1, 2, 3, 4]], "kinds": ["cat"]}).encode()
    (tmp_path / "a.tar").write_bytes(tar_of({"x.png": PICTURES["a/1"], "x.json": beside}))
    rows = made_formats.hf_rows().rename_columns(["picture", "objects", "other"])
    pq.write_table(rows, tmp_path / "rows.parquet")

    tar = InputSettings(boxes=str(tmp_path / "a.tar"), columns={"boxes": "found", "labels": "kinds"})
    hf = InputSettings(boxes=str(tmp_path / "rows.parquet"), columns={"image": "picture"})

    assert make_plan(tar).table["boxes"].to_pylist()[0][0]["category_name"] == "cat"
    assert make_plan(hf).summary.boxes == 5
    with pytest.raises(JobRefused, match="no table has a column 'nowhere'"):
        make_plan(tar.model_copy(update={"columns": {"boxes": "found", "labels": "nowhere"}}))
    with pytest.raises(UsageError, match="'picture' is no column of ours"):
        make_plan(hf.model_copy(update={"columns": {"picture": "image", "image": "picture"}}))


def test_a_picture_that_megadetector_could_not_read_has_missing_boxes(tmp_path):
    written = made_formats.write_megadetector(tmp_path)
    path = tmp_path / "md.json"
    content = json.loads(path.read_text())
    content["images"][1] |= {"detections": None, "failure": "Failure image access"}
    content["images"][2].pop("detections")
    content["images"][2]["failure"] = "Failure inference"
    path.write_text(json.dumps(content))

    plan = make_plan(written.settings)

    assert plan.summary.null_boxes == 2
    by_id = dict(zip(plan.table["image_id"].to_pylist(), plan.table["boxes"].to_pylist(), strict=True))
    assert by_id["a/2.png"] is by_id["b/3.png"] is None


def test_class_names_of_yolo_come_from_its_yaml_too(tmp_path):
    written = made_formats.write_yolo(tmp_path)
    (tmp_path / "labels" / "classes.txt").unlink()
    (tmp_path / "labels" / "data.yaml").write_text("names: {0: cat, 1: dog, 2: red car}\nnc: 3\n")

    assert [one["name"] for one in make_plan(written.settings).categories] == NAMES


def test_classes_without_names_are_said_with_the_way_out(tmp_path):
    written = made_formats.write_yolo(tmp_path)
    named = make_plan(written.settings).summary.warnings
    (tmp_path / "labels" / "classes.txt").rename(tmp_path / "classes.txt")

    plan = make_plan(written.settings)

    assert named == ()
    assert {one["name"] for one in plan.categories} == {None}
    [said] = plan.summary.warnings
    assert f"{tmp_path}/labels: none of classes.txt, data.yaml or dataset.yaml is there" in said


def test_pictures_without_a_label_file_have_no_boxes_and_labels_without_a_picture_are_refused(tmp_path):
    written = made_formats.write_yolo(tmp_path)
    (tmp_path / "labels" / "b" / "3.txt").unlink()

    plan = make_plan(written.settings)
    (tmp_path / "labels" / "b" / "9.txt").write_text("0 0.5 0.5 0.1 0.1\n")

    assert plan.summary.boxes == 4
    assert plan.summary.listed_without_boxes == 1
    with pytest.raises(JobRefused, match=r"1 box of 1 image .* have no image: it names 'b/9'"):
        make_plan(written.settings)


# ---------------------------------------------------------------------------------------------
# Broken ones
# ---------------------------------------------------------------------------------------------


def broken(kind: str, tmp_path: Path, change) -> str:
    """What is said of a data set after `change(folder)`."""
    written = FORMATS[kind](tmp_path)
    change(tmp_path)
    with pytest.raises(JobRefused) as caught:
        make_plan(written.settings)
    return str(caught.value)


def told(kind: str, tmp_path: Path, change) -> str:
    """The warnings on a data set after `change(folder)`, which costs no more than itself."""
    written = FORMATS[kind](tmp_path)
    change(tmp_path)
    return " ".join(make_plan(written.settings).summary.warnings)


def with_text(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 0.1 0.2 0.3\n", ("line 1 has 4 numbers (too few)", "wanted `class cx cy width height`")),
        ("0,0.1,0.2,0.3,0.4\n", ("line 1 has 1 numbers (too few): '0,0.1,0.2,0.3,0.4'", "wanted `class cx")),
        ("0 0.1 0.2 0.3 0.4\n1 0 0 1 0 1 1 0 1\n", ("line 2 has 9 numbers (a polygon", "wanted `class cx")),
        ("cat 0.1 0.2 0.3 0.4\n", ("line 1 holds 'cat 0.1 0.2 0.3 0.4'", "wanted `class")),
        ("1.5 0.1 0.2 0.3 0.4\n", ("the class is 1.5", "wanted a whole number")),
    ],
)
def test_a_broken_line_of_yolo_labels_is_named(tmp_path, text, said):
    message = told("yolo", tmp_path, with_text("labels/b/3.txt", text))

    assert all(part in message for part in ("labels/b/3.txt", *said))


def test_broken_yolo_folders_are_refused(tmp_path):
    assert "dataset.yaml: no `names`" in broken(
        "yolo",
        tmp_path / "1",
        lambda folder: [
            (folder / "labels" / "classes.txt").unlink(),
            (folder / "labels" / "dataset.yaml").write_text("nc: 3"),
        ],
    )
    with pytest.raises(JobRefused, match="state with --images where they are"):
        make_plan(InputSettings(boxes=str(tmp_path / "1" / "labels")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one["images"][0].pop("detections"), ("row 0", "neither detections nor a failure")),
        (lambda one: one["images"][2].pop("file"), ("row 2", "has no file", "wanted MegaDetector")),
        (
            lambda one: one["images"][0]["detections"][0].update(category="animal"),
            ("category 'animal' of a detection", "wanted a number"),
        ),
        (
            lambda one: one["images"][0]["detections"][0].update(bbox="none"),
            ("'detections[].bbox' holds text", "wanted a list"),
        ),
    ],
)
def test_a_broken_entry_of_megadetector_is_named(tmp_path, change, said):
    def changed(folder):
        content = json.loads((folder / "md.json").read_text())
        change(content)
        (folder / "md.json").write_text(json.dumps(content))

    message = told("megadetector", tmp_path, changed)

    assert all(part in message for part in ("md.json", *said))


def test_a_megadetector_file_names_no_place_for_images(tmp_path):
    written = made_formats.write_megadetector(tmp_path)

    with pytest.raises(JobRefused, match="give it as --boxes"):
        make_plan(InputSettings(images=written.settings.boxes))


def shard(members: dict[str, bytes]):
    return lambda folder: (folder / "shards" / "1.tar").write_bytes(tar_of(members))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shard(sample("b/3") | {"b/3.json": b"[1]"}), ("b/3.json: it holds a list", "wanted a JSON object")),
        (shard(sample("b/3") | {"b/3.json": b"{"}), ("b/3.json: it is no JSON",)),
        (
            shard(sample("b/3") | {"b/4.png": b"x", "b/4.json": b'{"boxes": "none"}'}),
            ("b/4.json", "'boxes' holds text", "wanted a list"),
        ),
        (
            shard(sample("b/3") | {"b/3.json": b'{"boxes": [[1, 2, 3, 4]], "labels": [1.5]}'}),
            ("b/3.json", "'labels[]' holds 1.5", "wanted a whole number"),
        ),
    ],
)
def test_a_broken_json_in_a_tar_is_named(tmp_path, change, said):
    message = told("tars", tmp_path, change)

    assert all(part in message for part in ("shards/1.tar", *said))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda folder: (folder / "shards" / "1.tar").write_bytes(b"\x1f\x8b" + b"0" * 2000),
            ("not a sound tar",),
        ),
        (
            lambda folder: (folder / "shards" / "1.tar").write_bytes(tar_of(sample("b/3"))[:2000]),
            ("not a sound tar", "wanted a plain, uncompressed one"),
        ),
    ],
)
def test_a_broken_tar_is_refused(tmp_path, change, said):
    message = broken("tars", tmp_path, change)

    assert all(part in message for part in ("shards/1.tar", *said))


def test_tars_without_pictures_or_boxes_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"readme.txt": b"x"}))
    with pytest.raises(JobRefused, match="no pictures in 1 tars"):
        make_plan(InputSettings(images=str(tmp_path)))
    (tmp_path / "a.tar").write_bytes(tar_of({"x.png": PICTURES["a/1"], "x.json": b'{"labels": []}'}))
    with pytest.raises(JobRefused, match=r"a\.tar: in the \.json next to the pictures: no column boxes"):
        make_plan(InputSettings(boxes=str(tmp_path)))


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**30
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**30 + 4096)

    with pytest.raises(JobRefused, match="a header of 107374"):
        make_plan(InputSettings(images=str(tmp_path / "a.tar")))


def hf_with(table: pa.Table):
    return lambda folder: pq.write_table(table, folder / "data" / "train-1.parquet")


ROWS = made_formats.hf_rows()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            hf_with(ROWS.drop_columns(["objects"])),
            ("no column 'objects' with the boxes", "found image, other"),
        ),
        (
            hf_with(ROWS.set_column(1, "objects", pa.array([{"box": [[1.0]]}] * 4))),
            ("'objects' has no field bbox; found box", "input.columns"),
        ),
        (
            hf_with(ROWS.set_column(1, "objects", pa.array([{"bbox": [1.0]}] * 4))),
            ("column 'objects.bbox' has type list<", "wanted list<list<number>>"),
        ),
        (
            hf_with(ROWS.set_column(1, "objects", pa.array([1] * 4))),
            ("column 'objects' has type int64", "wanted"),
        ),
        (
            hf_with(ROWS.set_column(0, "image", pa.array([{"bytes": "text"}] * 4))),
            ("column 'image' has type struct", "wanted struct<bytes: binary"),
        ),
        (
            lambda folder: (folder / "data" / "train-1.parquet").write_bytes(b"PAR1 no PAR1"),
            ("not a sound parquet",),
        ),
    ],
)
def test_a_broken_data_set_is_refused(tmp_path, change, said):
    message = broken("hf", tmp_path, change)

    assert all(part in message for part in ("train-1.parquet", *said)), message


def test_null_objects_are_missing_boxes_and_uneven_ones_fail_alone(tmp_path):
    objects = pa.array(
        [None, {"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [1, 2]}, {"bbox": [], "category": []}, None]
    )
    pq.write_table(ROWS.set_column(1, "objects", objects), tmp_path / "rows.parquet")

    plan = make_plan(InputSettings(boxes=str(tmp_path / "rows.parquet")))

    assert plan.summary.null_boxes == 2
    assert plan.table["error_code"].to_pylist() == [None, "labels_mismatch", None, None]
    assert plan.table["boxes"].to_pylist()[2] == []


def test_no_picture_is_read_while_a_data_set_is_planned(tmp_path):
    table = ROWS.set_column(0, "image", pa.array([{"bytes": b"x" * 10**6, "path": str(i)} for i in range(4)]))
    pq.write_table(table, tmp_path / "rows.parquet", compression="none", use_dictionary=False)
    body = bytearray((tmp_path / "rows.parquet").read_bytes())
    at = body.find(b"x" * 1000)
    body[at : at + 10**5] = np.random.default_rng(0).bytes(10**5)
    (tmp_path / "rows.parquet").write_bytes(body)

    assert make_plan(InputSettings(boxes=str(tmp_path / "rows.parquet"))).summary.images == 4
