"""hqlabel export, judged by the rules of its readers: Ultralytics, Label Studio, CVAT, COCO and datasets."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hqlabel.jobs.export.yolo import yaml_text
from hqlabel.pipeline.job_context import BoxRules
from hqlabel.pipeline.settings import FilterSettings
from tests.jobs.cli.test_cli import run
from tests.jobs.made_outputs import MadeImage, blob, make_output

SIZE = (60, 80)
CAT = [(1, "cat")]


def export(kind: str, output: str, to: Path, *more: str) -> dict:
    code, out, err = run("export", kind, "--output", output, "--to", str(to), "--json", *more)
    assert code == 0, err
    return json.loads(out)


def notes(said: dict) -> str:
    return "\n".join(said["notes"])


def made(name: str, *, uri: str | None = None, **fields) -> MadeImage:
    return MadeImage(**({"image_id": name, "masks": [blob(3)], "categories": CAT, "uri": uri} | fields))


# ---------------------------------------------------------------------------------------------
# YOLO: Ultralytics' rules, as facts
# ---------------------------------------------------------------------------------------------

ULTRALYTICS_ENDINGS = {"bmp", "dng", "jpeg", "jpg", "mpo", "png", "tif", "tiff", "webp", "pfm", "heic"}


def data_set_of(yaml_file: Path) -> dict:
    """data.yaml as Ultralytics resolves it: from `path`, or without one from the file's own folder."""
    data = yaml.safe_load(yaml_file.read_text(encoding="utf-8"))
    root = Path(data.get("path") or yaml_file.parent)
    return {**data, "train": (root / data["train"]).resolve(), "val": (root / data["val"]).resolve()}


def pictures_of(listing: Path) -> list[str]:
    """The lines of a list; of one that begins with "./", every "./" is the list's folder."""
    lines = listing.read_text(encoding="utf-8").strip().splitlines()
    return [line.replace("./", f"{listing.parent}/") if line.startswith("./") else line for line in lines]


def label_of(picture: str) -> str:
    return "/labels/".join(picture.rsplit("/images/", 1)).rsplit(".", 1)[0] + ".txt"


NAMES = [
    "a.jpg",
    "street/a.jpg",
    "images/b.jpg",
    "images/images/b2.jpg",
    "train/images/c.jpg",
    "val/images/deep/er/d.png",
    "images/train/images/val/e.jpg",
    "labels/f.jpg",
    "train/labels/g.jpg",
    "my.images/h.jpg",
    "images.v2/i.tar.jpg",
    "dots.in.name.JPG",
    "with space/j k.jpg",
    "ünï/日本 🚗.webp",
    "a+b#c%20&d.jpg",
    "-dash.jpg",
    "x/.jpg",
    'it\'s "quoted".png',
]


@pytest.mark.parametrize("below", ["out", "images/out", "x/images/labels/my.out"])
def test_every_listed_picture_has_its_label_file_where_ultralytics_looks(below: str, tmp_path: Path) -> None:
    output = make_output(tmp_path / "job", [made(name) for name in NAMES])
    to = tmp_path / below

    said = export("yolo-seg", output, to)

    data = data_set_of(to / "data.yaml")
    pictures = pictures_of(data["train"])
    assert {Path(one).relative_to(to / "images").as_posix() for one in pictures} == set(NAMES)
    for picture in pictures:
        assert Path(label_of(picture)).read_text().count("\n") == 1, picture
    assert said["images"] == said["masks"] == len(NAMES)
    assert data["names"] == {0: "cat"}


def test_the_printed_line_brings_the_pictures_and_training_finds_both(tmp_path: Path) -> None:
    photos = tmp_path / "my photos"
    for name in NAMES:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(name.encode())
    (photos / "train/labels").mkdir(exist_ok=True)
    (photos / "train/labels/c.txt").write_text("an older label of other classes")
    output = make_output(tmp_path / "job", [made(name, uri=str(photos / name)) for name in NAMES])
    to = tmp_path / "out's yolo"
    said = export("yolo-seg", output, to)

    [line] = [note.removeprefix(": ") for note in said["notes"] if "xargs" in note]
    subprocess.run(["bash", "-ec", line], check=True, cwd=tmp_path)

    for picture in pictures_of(data_set_of(to / "data.yaml")["val"]):
        assert Path(picture).read_bytes() == Path(picture).relative_to(to / "images").as_posix().encode()
        assert Path(label_of(picture)).read_text().startswith("0 ")


def test_data_yaml_does_not_hang_on_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = make_output(tmp_path / "job", [made("a.jpg")])
    export("yolo-seg", output, tmp_path / "yolo")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = tmp_path / "moved"
    os.rename(tmp_path / "yolo", moved)

    data = data_set_of(Path("../moved/data.yaml"))

    assert data["train"] == moved / "images.txt"
    assert "path" not in data


@pytest.mark.parametrize(
    "name", ["a\nb.jpg", "a\rb.jpg", "a\x85b.jpg", "a\u2028b.jpg", "a\x1cb.jpg", "dir./b.jpg"]
)
def test_a_name_that_no_line_of_the_list_can_hold_is_left_out_and_counted(name: str, tmp_path: Path) -> None:
    output = make_output(tmp_path / "job", [made(name), made("good.jpg")])

    said = export("yolo-seg", output, tmp_path / "yolo")

    assert pictures_of(tmp_path / "yolo/images.txt") == [f"{tmp_path}/yolo/images/good.jpg"]
    assert sorted(p.name for p in (tmp_path / "yolo").rglob("*.txt")) == ["good.txt", "images.txt"]
    assert (said["images"], said["masks"]) == (1, 1)
    [[what, number]] = said["left_out"].items()
    assert number == 1
    assert "cannot hold" in what


def test_pictures_that_ultralytics_passes_over_are_said(tmp_path: Path) -> None:
    tiny = made("tiny.jpg", size_hw=(9, 40), masks=[np.ones((9, 40), np.uint8)])
    names = ["photo", "clip.gif", "scan.jfif", "fine.jpeg", "v1.2/photo"]
    output = make_output(tmp_path / "job", [*(made(name) for name in names), tiny])

    said = export("yolo-seg", output, tmp_path / "yolo")

    passed = [
        p
        for p in pictures_of(tmp_path / "yolo/images.txt")
        if p.rpartition(".")[2].lower() not in ULTRALYTICS_ENDINGS
    ]
    assert len(passed) == 4
    assert "passes over 5 images" in notes(said)
    assert (tmp_path / "yolo/labels/photo.txt").exists()


CLASS_NAMES = [
    *(
        "yes",
        "no",
        "null",
        "~",
        "1",
        "1.5",
        "1e3",
        "0x1f",
        "true",
        "on",
        "",
        " ",
        " lead",
        "trail ",
        "- item",
        "# x",
    ),
    *(
        "a: b",
        "key:",
        "'single'",
        '"double"',
        "back\\slash",
        "tab\there",
        "new\nline",
        "cr\rlf",
        "\x00nul",
        "\x7f",
    ),
    *(
        "\x85nel",
        "\u2028ls",
        "\ufeffbom",
        "\ufffe",
        "é",
        "日本",
        "🚗",
        "🏳️‍🌈",
        "\U0010ffff",
        "{a: 1}",
        "[x]",
        "*a",
        "&a",
    ),
    *("!tag", "%dir", "@at", "`tick", "|", ">", "---", "...", "2026-11-30", "n01440764", "=", "<<"),
]


def test_class_names_come_back_equal_from_the_yaml(tmp_path: Path) -> None:
    named = [name for name in CLASS_NAMES if name]
    images = [made(f"{n:03d}.jpg", categories=[(n, name)]) for n, name in enumerate(named)]
    output = make_output(tmp_path / "job", images)

    export("yolo-seg", output, tmp_path / "yolo")

    assert data_set_of(tmp_path / "yolo/data.yaml")["names"] == dict(enumerate(named))
    classes = json.loads((tmp_path / "yolo/classes.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in classes] == named


def test_every_character_survives_the_yaml() -> None:
    characters = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF)
    names = [characters[at : at + 512] for at in range(0, len(characters), 512)]
    text = "".join(f"{at}: {yaml_text(name)}\n" for at, name in enumerate(names))
    assert yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) == dict(enumerate(names))
    assert all(yaml.safe_load(yaml_text(name)) == name for name in CLASS_NAMES)


def test_an_image_without_objects_is_background_and_one_whose_masks_all_fell_is_not(tmp_path: Path) -> None:
    images = [
        made("kept.jpg", predicted_iou=[0.9]),
        made("fell.jpg", predicted_iou=[0.1]),
        made("nothing.jpg", masks=[np.zeros(SIZE, np.uint8)], boxes=[[0, 0, 9, 9]], predicted_iou=[0.9]),
    ]
    output = make_output(tmp_path / "job", images, filters=FilterSettings(min_predicted_iou=0.5))

    everything = export("yolo-seg", output, tmp_path / "all")
    accepted = export("yolo-seg", output, tmp_path / "accepted", "--accepted-only")

    assert (tmp_path / "all/labels/nothing.txt").read_text() == ""
    assert everything["left_out"] == {"rows without a mask": 1}
    assert [p.name for p in (tmp_path / "accepted/labels").iterdir()] == ["kept.txt"]
    assert accepted["left_out"]["images of which nothing was selected"] == 2


# ---------------------------------------------------------------------------------------------
# Label Studio
# ---------------------------------------------------------------------------------------------

HARD_NAMES = [
    "a b.jpg",
    "a+b.jpg",
    "a#b.jpg",
    "a%20b.jpg",
    "a&d=c.jpg",
    "q?x=1.jpg",
    "ü/日本🚗.jpg",
    "a=b;c.jpg",
]


def tasks_of(folder: Path) -> list[dict]:
    return [
        task for path in sorted(folder.glob("tasks-*.json")) for task in json.loads(path.read_text("utf-8"))
    ]


def test_label_studio_serves_the_very_file_behind_a_local_prefix(tmp_path: Path) -> None:
    output = make_output(tmp_path / "job", [made(name) for name in HARD_NAMES])

    export("label-studio", output, tmp_path / "ls", "--image-prefix", "/data/local-files/?d=set 1/")

    for task in tasks_of(tmp_path / "ls"):
        url = urlsplit(task["data"]["image"])
        assert url.fragment == ""
        [served] = parse_qs(url.query, keep_blank_values=True)["d"]  # as Django reads the query
        assert served == "set 1/" + task["data"]["image_id"]


def test_names_behind_a_bucket_stay_as_they_are_and_behind_https_are_encoded(tmp_path: Path) -> None:
    output = make_output(tmp_path / "job", [made(name) for name in HARD_NAMES])
    export("label-studio", output, tmp_path / "s3", "--image-prefix", "s3://bucket/set/")
    export("label-studio", output, tmp_path / "https", "--image-prefix", "https://host/set/")

    for task in tasks_of(tmp_path / "s3"):  # its storages cut the uri at the first slash, and decode nothing
        bucket, _, key = task["data"]["image"].removeprefix("s3://").partition("/")
        assert (bucket, key) == ("bucket", "set/" + task["data"]["image_id"])
    for task in tasks_of(tmp_path / "https"):
        url = urlsplit(task["data"]["image"])
        assert (url.query, url.fragment) == ("", "")
        assert len(url.path) > len("/set/")


@pytest.mark.parametrize("prefix", ["s3://bucket/set", "https://host", "/data/local-files/?d=set"])
def test_a_prefix_that_runs_into_the_names_is_said(prefix: str, tmp_path: Path) -> None:
    output = make_output(tmp_path / "job", [made("a.jpg")])

    without = export("label-studio", output, tmp_path / "without", "--image-prefix", prefix)
    ended = export("label-studio", output, tmp_path / "ended", "--image-prefix", prefix + "/")
    query = export("label-studio", output, tmp_path / "query", "--image-prefix", "/data/local-files/?d=")

    assert f"as in {prefix}NAME; if a folder is meant, end it with /" in notes(without)
    assert "right behind" not in notes(ended) + notes(query)


@pytest.mark.parametrize("scheme", ["az", "abfs", "hf"])
def test_uris_that_label_studio_does_not_open_are_said(scheme: str, tmp_path: Path) -> None:
    output = make_output(tmp_path / "job", [made("a.jpg", uri=f"{scheme}://c/set/a.jpg")])

    assert f"are {scheme}:// uris, which Label Studio does not open" in notes(
        export("label-studio", output, tmp_path / "ls")
    )


def test_uris_stay_as_they_are_without_a_prefix_and_local_ones_are_said_not_to_open(tmp_path: Path) -> None:
    bucket = [made(name, uri=f"s3://b/set/{name}") for name in HARD_NAMES]
    from_s3 = export("label-studio", make_output(tmp_path / "one", bucket), tmp_path / "ls-s3")
    local = export("label-studio", make_output(tmp_path / "two", [made("a.jpg")]), tmp_path / "ls-local")

    found = {task["data"]["image"] for task in tasks_of(tmp_path / "ls-s3")}
    assert found == {f"s3://b/set/{name}" for name in HARD_NAMES}
    assert "--image-prefix" not in notes(from_s3)
    assert "--image-prefix '/data/local-files/?d=FOLDER/'" in notes(local)


def test_the_labels_of_the_regions_are_those_of_the_configuration(tmp_path: Path) -> None:
    named = [name for name in CLASS_NAMES if name]
    images = [made(f"{n:03d}.jpg", categories=[(n, name)]) for n, name in enumerate([*named, "yes"])]
    output = make_output(tmp_path / "job", images)

    said = export("label-studio", output, tmp_path / "ls")

    labels = [one.attrib["value"] for one in ET.parse(tmp_path / "ls/config.xml").iter("Label")]
    used = [task["predictions"][0]["result"][0]["value"]["brushlabels"] for task in tasks_of(tmp_path / "ls")]
    assert len(labels) == len(set(labels)) == len(named)
    assert [one for [one] in used] == [*labels, "yes"]
    assert "1 name stands for several ids: `yes`" in notes(said)


# ---------------------------------------------------------------------------------------------
# COCO
# ---------------------------------------------------------------------------------------------


def load(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def evaluated(truth: COCO, found: list[dict]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(truth, truth.loadRes(found), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


ZEROS = [(0, "zero"), (7, "seven"), (None, None)]


def zero_output(folder: Path) -> str:
    """Everything that may be 0 is: the image's id, a category, a score, a corner of a box."""
    corner = np.zeros(SIZE, np.uint8)
    corner[0:20, 0:30] = 1
    image = made(
        "0",
        masks=[corner, blob(1), blob(2)],
        categories=ZEROS,
        scores=[0.0, 0.5, None],
        box_ids=["0", "1", "2"],
    )
    return make_output(folder, [image])


def labels_as_cvat_reads_them(path: Path) -> list[str | None]:
    """The label of each annotation, by the rule of CVAT's reader: a category that is 0 is no label."""
    content = json.loads(path.read_text())
    names = {one["id"]: one["name"] for one in content["categories"]}
    return [names[one["category_id"]] if one["category_id"] else None for one in content["annotations"]]


def test_no_two_images_get_one_file_name_when_some_uris_alone_end_in_their_ids(tmp_path: Path) -> None:
    output = make_output(tmp_path / "job", [made("1.jpg", uri="/a/x/1.jpg"), made("77", uri="/a/1.jpg")])

    said = [export(kind, output, tmp_path / kind) for kind in ("coco", "yolo-seg")]

    images = json.loads((tmp_path / "coco/instances.json").read_text())["images"]
    assert [one["file_name"] for one in images] == ["x/1.jpg", "1.jpg"]
    assert [one["images"] for one in said] == [2, 2]
    assert "cd /a/ && " in notes(said[1])


@pytest.mark.parametrize("ids", [["x/1.jpg", "x/2.jpg"], ["11", "12"]])
def test_the_image_root_and_a_file_name_make_the_uri(ids: list[str], tmp_path: Path) -> None:
    uris = ["/a/x/1.jpg", "/a/x/2.jpg"]
    output = make_output(tmp_path / "job", [made(one, uri=uri) for one, uri in zip(ids, uris, strict=True)])

    export("coco", output, tmp_path / "coco")

    content = json.loads((tmp_path / "coco/instances.json").read_text())
    assert [content["info"]["image_root"] + one["file_name"] for one in content["images"]] == uris


def test_category_0_is_said_and_a_switch_numbers_the_categories_from_1(tmp_path: Path) -> None:
    output = zero_output(tmp_path / "job")

    plain = export("coco", output, tmp_path / "plain")
    from_1 = export("coco", output, tmp_path / "from-1", "--categories-from-1")

    assert labels_as_cvat_reads_them(tmp_path / "plain/instances.json") == [None, "seven", "object"]
    assert "category 0, `zero`: CVAT takes category 0 for no label; --categories-from-1" in notes(plain)
    assert labels_as_cvat_reads_them(tmp_path / "from-1/instances.json") == ["zero", "seven", "object"]
    assert "CVAT" not in notes(from_1)
    assert json.loads((tmp_path / "from-1/category_ids.json").read_text()) == [
        {"id": 1, "category_id": 0, "name": "zero"},
        {"id": 2, "category_id": 7, "name": "seven"},
        {"id": 3, "category_id": None, "name": "object"},
    ]
    assert not (tmp_path / "plain/category_ids.json").exists()


def test_numbers_that_are_0_go_through_coco(tmp_path: Path) -> None:
    export("coco", zero_output(tmp_path / "job"), tmp_path / "coco")

    coco = load(tmp_path / "coco/instances.json")

    assert coco.getImgIds() == [0]
    first = coco.loadAnns(coco.getAnnIds(imgIds=[0], catIds=[0]))[0]
    assert (first["bbox"], first["detector_score"], first["box_id"]) == ([0, 0, 30, 20], 0, "0")
    found = [
        {k: a[k] for k in ("image_id", "category_id", "segmentation")} | {"score": 0.5}
        for a in coco.anns.values()
    ]
    assert evaluated(coco, found).stats[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("coco", [], "1 mask without a class is category 8, `object`"),
        ("coco", ["--categories-from-1"], "1 mask without a class is category 3, `object`"),
        ("yolo-seg", [], "1 mask without a class is category 2, `object`"),
        ("hf", [], "1 mask without a class is category 2, `object`"),
        ("label-studio", [], "1 mask without a class is `object`"),
    ],
)
def test_the_number_said_of_masks_without_a_class_is_the_files(
    kind: str, more: list[str], said: str, tmp_path: Path
) -> None:
    found = export(kind, zero_output(tmp_path / "job"), tmp_path / "to", *more)

    assert said in notes(found)
    numbers = {
        "coco": lambda: json.loads((tmp_path / "to/instances.json").read_text())["annotations"][2][
            "category_id"
        ],
        "yolo-seg": lambda: int((tmp_path / "to/labels/0.txt").read_text().splitlines()[2].split()[0]),
        "hf": lambda: pq.read_table(tmp_path / "to/data").to_pylist()[0]["objects"][2]["category"],
    }
    if kind in numbers:
        assert f"category {numbers[kind]()}," in said


def test_a_job_whose_every_mask_has_a_class_hears_nothing_of_object(tmp_path: Path) -> None:
    output = make_output(tmp_path / "job", [made("a.jpg")])

    for kind in ("coco", "yolo-seg", "hf", "label-studio"):
        assert "object`" not in notes(export(kind, output, tmp_path / kind))


CROWD_BOX = [10.5, 20.25, 40.0, 50.0]


def crowded_output(folder: Path, **more) -> str:
    """Images with an object and a crowd, with nothing but a crowd, and with a crowd and a box set aside."""
    crowd = {
        "masks": [blob(1), blob(2)],
        "boxes": [[5, 5, 70, 50], CROWD_BOX],
        "categories": [(0, "zero"), (0, "zero")],
    }
    images = [
        made("1", **crowd, crowds=[False, True], scores=[0.9, 0.8]),
        made("2", masks=[blob(3)], boxes=[[0, 0, 80, 60]], categories=[(0, "zero")], crowds=[True]),
        made("3", **crowd, crowds=[False, True], scores=[0.1, 0.8], rules=BoxRules(min_score=0.5)),
    ]
    return make_output(folder, images, **more)


def test_crowds_keep_their_flag_in_coco_and_cover_their_box(tmp_path: Path) -> None:
    said = export("coco", crowded_output(tmp_path / "job"), tmp_path / "coco")

    coco = load(tmp_path / "coco/instances.json")
    plain, crowd, alone = sorted(coco.anns.values(), key=lambda one: (one["image_id"], one["iscrowd"]))
    assert [one["iscrowd"] for one in (plain, crowd, alone)] == [0, 1, 1]
    region = coco.annToMask(crowd)
    wanted = np.zeros(SIZE, np.uint8)
    wanted[20:50, 10:40] = 1  # 10.5, 20.25 to 40, 50, cut outwards
    assert np.array_equal(region, wanted)
    assert (crowd["area"], crowd["bbox"]) == (900, [10, 20, 30, 30])
    assert coco.annToMask(alone).all()
    assert crowd["predicted_iou"] is None
    assert (said["masks"], said["crowds"], said["images"]) == (1, 2, 2)
    assert said["left_out"] == {
        "images whose boxes were all left without a mask: crowds, or by the job's rules": 1
    }
    assert "2 crowd regions have iscrowd 1" in notes(said)


def test_cocoeval_ignores_what_lies_in_a_crowd(tmp_path: Path) -> None:
    export("coco", crowded_output(tmp_path / "job"), tmp_path / "coco")
    coco = load(tmp_path / "coco/instances.json")
    [plain] = [one for one in coco.anns.values() if not one["iscrowd"]]
    inside, outside = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    inside[25:45, 15:35], outside[52:58, 60:75] = 1, 1

    def found(extra: np.ndarray) -> list[dict]:
        rle = coco_mask.encode(np.asfortranarray(extra))
        mine = {"image_id": plain["image_id"], "category_id": 0}
        return [
            mine | {"segmentation": rle, "score": 0.99},
            mine | {"segmentation": plain["segmentation"], "score": 0.5},
        ]

    assert evaluated(coco, found(inside)).stats[0] == pytest.approx(1.0)
    assert evaluated(coco, found(outside)).stats[0] < 0.6


@pytest.mark.parametrize("kind", ["yolo-seg", "label-studio", "hf"])
def test_other_formats_leave_crowds_out_and_count_them(kind: str, tmp_path: Path) -> None:
    said = export(kind, crowded_output(tmp_path / "job"), tmp_path / "to")

    assert (said["images"], said["masks"], said["crowds"]) == (1, 1, 0)
    assert said["left_out"]["crowd regions (iscrowd 1), which are no objects"] == 1
    assert (
        said["left_out"]["images whose boxes were all left without a mask: crowds, or by the job's rules"]
        == 2
    )


def test_crowds_pass_the_filters_and_obey_a_condition(tmp_path: Path) -> None:
    output = crowded_output(tmp_path / "job", filters=FilterSettings(min_predicted_iou=0.4))

    accepted = export("coco", output, tmp_path / "accepted", "--accepted-only")
    both = export("coco", output, tmp_path / "both", "--accepted-only", "--where", "category_name = 'zero'")
    none = export("coco", output, tmp_path / "none", "--where", "category_name = 'cat'")

    assert (accepted["masks"], accepted["crowds"]) == (1, 2)
    assert (both["masks"], both["crowds"]) == (1, 2)
    assert (none["masks"], none["crowds"], none["images"]) == (0, 0, 0)


def test_crowds_count_for_the_size_of_a_file(tmp_path: Path) -> None:
    crowds = [made(str(n), crowds=[True]) for n in range(5)]

    export("coco", make_output(tmp_path / "job", crowds), tmp_path / "coco", "--per-file", "2")

    files = sorted(p.name for p in (tmp_path / "coco").glob("*.json"))
    assert files == ["instances-00001.json", "instances-00002.json", "instances-00003.json"]


# ---------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------


def classes_of(tmp_path: Path, kinds: list[tuple[int | None, str | None]]) -> list[str]:
    """The name of each mask's category, as pycocotools reads it, of an output with rows of these classes."""
    images = [made(f"{n:03d}.jpg", categories=[kind]) for n, kind in enumerate(kinds)]
    export("coco", make_output(tmp_path / "job", images), tmp_path / "coco")
    coco = load(tmp_path / "coco/instances.json")
    return [coco.cats[one["category_id"]]["name"] for one in coco.anns.values()]


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        ([(3, None), (3, "car"), (3, "")], ["car", "car", "car"]),
        ([(3, "car"), (None, "car")], ["car", "car"]),
        ([(0, None), (0, "zero"), (None, "zero"), (None, None)], ["zero", "zero", "zero", "object"]),
        ([(3, "car"), (None, "bus"), (None, "bus"), (None, "ant")], ["car", "bus", "bus", "ant"]),
        ([(3, None), (4, None)], ["3", "4"]),
        ([(None, "car"), (3, "car"), (5, "car")], ["car", "car", "car"]),
    ],
)
def test_rows_of_one_class_are_one_class_however_they_are_named(kinds, names, tmp_path: Path) -> None:
    assert classes_of(tmp_path, kinds) == names


def test_a_name_without_an_id_that_rows_number_is_that_id_and_another_is_said(tmp_path: Path) -> None:
    images = [
        made(
            "a.jpg", masks=[blob(k) for k in range(3)], categories=[(0, "car"), (None, "car"), (None, "bus")]
        )
    ]
    said = export("coco", make_output(tmp_path / "job", images), tmp_path / "coco")

    ids = [
        one["category_id"]
        for one in json.loads((tmp_path / "coco/instances.json").read_text())["annotations"]
    ]
    assert ids == [0, 0, 1]
    assert "names without a category_id are numbered behind the others: category 1, `bus`" in notes(said)


def test_one_id_with_two_names_has_one_of_them_and_is_said(tmp_path: Path) -> None:
    images = [made("a.jpg", categories=[(0, "car")]), made("b.jpg", categories=[(0, "bus")])]
    output = make_output(tmp_path / "job", images)

    said = export("coco", output, tmp_path / "coco")

    assert "1 category_id has several names, the first by its bytes is taken: category 0, `bus`" in notes(
        said
    )
    written = json.loads((tmp_path / "coco/instances.json").read_text())
    assert [(one["id"], one["name"]) for one in written["categories"]] == [(0, "bus")]
    assert [one["category_id"] for one in written["annotations"]] == [0, 0]


def test_hf_labels_are_distinct_as_datasets_wants_them_and_its_card_is_a_table(tmp_path: Path) -> None:
    kinds = [
        (0, "cat"),
        (4, "cat"),
        (5, "a|b"),
        (6, "new\nline"),
        (7, "object"),
        (None, None),
        (9, "cat (4)"),
    ]
    images = [made(f"{n}.jpg", categories=[kind]) for n, kind in enumerate(kinds)]
    output = make_output(tmp_path / "job", images)

    said = export("hf", output, tmp_path / "hf")

    table = pq.read_table(tmp_path / "hf/data")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    labels = features["objects"]["feature"]["category"]["names"]
    assert len(labels) == len(set(labels)) == 7
    assert labels[:4] == ["cat (0)", "cat (4)'", "a|b", "new\nline"]
    assert [row["objects"][0]["category"] for row in table.to_pylist()] == [0, 1, 2, 3, 4, 6, 5]
    card = (tmp_path / "hf/README.md").read_text().splitlines()
    rows = [line for line in card if line.startswith("| ") and not line.startswith("| category")]
    assert len(rows) == 7
    assert rows[2] == "| 2 | 5 | a\\|b |"
    assert "2 names stand for several ids: `cat`, `object`" in notes(said)


def test_datasets_reads_names_that_are_doubled_or_odd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    names = [name for name in CLASS_NAMES if name] + ["yes", "yes"]
    images = [made(f"{n:03d}.jpg", categories=[(n, name)]) for n, name in enumerate(names)]
    export("hf", make_output(tmp_path / "job", images), tmp_path / "hf")

    data = datasets.load_dataset(str(tmp_path / "hf"), split="train", cache_dir=str(tmp_path / "cache"))

    labels = data.features["objects"].feature["category"]
    found = [labels.int2str(row["objects"][0]["category"]) for row in data.remove_columns("image")]
    last = len(names) - 1
    assert found == [f"yes ({n})" if name == "yes" else name for n, name in enumerate(names)]
    assert found[last] == f"yes ({last})"


@pytest.mark.parametrize("kind", ["coco", "yolo-seg", "label-studio", "hf"])
def test_an_output_without_any_box_can_be_handed_on(kind: str, tmp_path: Path) -> None:
    said = export(kind, make_output(tmp_path / "job", [MadeImage(image_id="a.jpg")]), tmp_path / "to")

    assert (said["images"], said["masks"]) == (0, 0)
    if kind == "yolo-seg":
        assert data_set_of(tmp_path / "to/data.yaml")["names"] == {}


def test_pictures_inside_other_files_are_said(tmp_path: Path) -> None:
    inside = made("0001.jpg", uri="/shards/0.tar#512:99/0001.jpg")
    row = made("train.parquet/000000003", uri="/data/train.parquet#image:0:3/x.jpg")

    said = export("coco", make_output(tmp_path / "job", [inside, row, made("a.jpg")]), tmp_path / "coco")

    assert "2 images lie inside tars or Parquet files" in notes(said)
