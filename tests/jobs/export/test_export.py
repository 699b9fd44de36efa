"""hqlabel export: every format read back by the tool it is for, mask by mask."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from hqlabel.jobs.export.export_source import mask_of
from hqlabel.jobs.export.fill_polygon import fill_polygon
from hqlabel.pipeline.errors import DamageFound
from hqlabel.pipeline.job_context import BoxRules
from hqlabel.pipeline.settings import FilterSettings
from tests.jobs.cli.test_cli import run
from tests.jobs.export.test_polygons import decode_brush
from tests.jobs.made_outputs import MadeImage, blob, make_output

SIZE = (60, 80)


def made_images() -> list[MadeImage]:
    """Five images with 0 to 4 masks of three classes, ids with gaps."""
    kinds = [(2, "cat"), (7, "dog"), (90, "traffic light")]
    images = []
    for n in range(5):
        masks = [blob(10 * n + k, SIZE) for k in range(n)]
        images.append(
            MadeImage(
                image_id=f"street/{n:02d}.jpg", masks=masks, categories=[kinds[k % 3] for k in range(n)],
                scores=[0.2 + 0.2 * k for k in range(n)], predicted_iou=[0.5 + 0.1 * k for k in range(n)],
                box_ids=[f"box {k}" for k in range(n)], uri=f"/photos/street/{n:02d}.jpg",
            )
        )  # fmt: skip
    return images


@pytest.fixture
def output(tmp_path: Path) -> str:
    return make_output(tmp_path / "out", made_images())


def export(*arguments: str) -> dict:
    code, out, err = run("export", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def load_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_coco_is_read_by_pycocotools_and_every_mask_is_the_same(output: str, tmp_path: Path) -> None:
    said = export("coco", "--output", output, "--to", str(tmp_path / "coco"))

    coco = load_coco(tmp_path / "coco" / "instances.json")
    assert said["images"] == 4
    assert said["masks"] == len(coco.anns) == 10
    assert {c["id"]: c["name"] for c in coco.cats.values()} == {2: "cat", 7: "dog", 90: "traffic light"}
    for made in made_images()[1:]:
        [image] = [one for one in coco.imgs.values() if one["file_name"] == made.image_id]
        assert (image["height"], image["width"]) == SIZE
        annotations = sorted(coco.imgToAnns[image["id"]], key=lambda one: one["instance_index"])
        assert [a["category_id"] for a in annotations] == [kind[0] for kind in made.categories]
        for annotation, mask in zip(annotations, made.masks, strict=True):
            assert np.array_equal(coco.annToMask(annotation), mask)
            assert annotation["detector_score"] == pytest.approx(made.scores[annotation["instance_index"]])


def test_coco_is_cut_into_files_between_images_with_ids_that_go_on(output: str, tmp_path: Path) -> None:
    export("coco", "--output", output, "--to", str(tmp_path / "coco"), "--per-file", "4")

    files = sorted((tmp_path / "coco").glob("instances-*.json"))
    parts = [load_coco(path) for path in files]
    assert [len(part.anns) for part in parts] == [3, 3, 4]
    assert sorted(key for part in parts for key in part.anns) == list(range(1, 11))
    assert all(set(part.imgToAnns) <= set(part.imgs) for part in parts)
    ids = [key for part in parts for key in part.imgs]
    assert len(ids) == len(set(ids)) == 4


@pytest.mark.parametrize(("tolerance", "least", "most"), [("0.5", 0.98, 1), ("4", 0.5, 0.9)])
def test_yolo_polygons_are_drawn_as_the_masks_and_the_loss_said_is_the_loss(
    output: str, tmp_path: Path, tolerance: str, least: float, most: float
) -> None:
    said = export("yolo-seg", "--output", output, "--to", str(tmp_path / "yolo"), "--tolerance", tolerance)

    ious = []
    for made in made_images()[1:]:
        lines = (tmp_path / "yolo" / "labels" / made.image_id).with_suffix(".txt").read_text().splitlines()
        assert len(lines) == len(made.masks)
        for line, mask, kind in zip(lines, made.masks, made.categories, strict=True):
            number, *values = line.split(" ")
            assert int(number) == {2: 0, 7: 1, 90: 2}[kind[0]]
            points = np.array(values, float).reshape(-1, 2)
            assert points.min() >= 0
            assert points.max() <= 1
            drawn = fill_polygon(points * [SIZE[1], SIZE[0]], SIZE)
            ious.append((drawn & mask).sum() / (drawn | mask).sum())
    assert said["loss"]["mean_iou"] == pytest.approx(np.mean(ious))
    assert said["loss"]["least_iou"] == pytest.approx(np.min(ious))
    assert least < np.min(ious) <= most
    classes = json.loads((tmp_path / "yolo" / "classes.json").read_text())
    assert classes[2] == {"class": 2, "category_id": 90, "name": "traffic light"}
    assert "./images/street/04.jpg" in (tmp_path / "yolo" / "images.txt").read_text().splitlines()


def ultralytics_mask(line: str, size_hw: tuple[int, int], resampled: int) -> np.ndarray:
    """A label as Ultralytics draws it: float32, points added between those given, whole pixels, fillPoly."""
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    points = np.array(line.split(" ")[1:], np.float32).reshape(-1, 2)
    closed = np.concatenate([points, points[:1]])
    at = np.arange(len(closed))
    added = np.linspace(0, len(closed) - 1, max(2, resampled - len(closed)))
    places = np.insert(added, np.searchsorted(added, at), at)
    segment = np.stack([np.interp(places, at, closed[:, axis]) for axis in (0, 1)], axis=1).astype(np.float32)
    segment *= np.array(size_hw[::-1], np.float32)
    drawn = np.zeros(size_hw, np.uint8)
    cv2.fillPoly(drawn, np.asarray([segment], np.int32), color=1)
    return drawn


@pytest.mark.parametrize("resampled", [2, 1000])
def test_ultralytics_way_of_drawing_gives_the_masks_back(resampled: int, output: str, tmp_path: Path) -> None:
    export("yolo-seg", "--output", output, "--to", str(tmp_path / "yolo"))
    ious = []
    for made in made_images()[1:]:
        lines = (tmp_path / "yolo" / "labels" / made.image_id).with_suffix(".txt").read_text().splitlines()
        drawn = [ultralytics_mask(line, SIZE, resampled) for line in lines]
        ious += [(one & mask).sum() / (one | mask).sum() for one, mask in zip(drawn, made.masks, strict=True)]
    assert min(ious) > 0.97
    assert np.mean(ious) > 0.99


def photos_of(folder: Path, images: list[MadeImage]) -> list[MadeImage]:
    """The images with pictures of their own in a folder."""
    for made in images:
        (folder / made.image_id).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIZE[1], SIZE[0]), (9, 9, 9)).save(folder / made.image_id)
    return [MadeImage(**{**vars(made), "uri": str(folder / made.image_id)}) for made in images]


@pytest.mark.parametrize("way", ["link", "copy"])
def test_yolo_pictures_are_put_beside_their_labels_and_one_out_of_reach_is_left_out(
    way: str, tmp_path: Path
) -> None:
    images = photos_of(tmp_path / "photos", made_images())
    images[1] = photos_of(tmp_path / "elsewhere", made_images())[1]
    output, to = make_output(tmp_path / "out", images), tmp_path / "yolo"

    said = export(
        "yolo-seg", "--output", output, "--to", str(to), "--images", way,
        "--allow-root", str(tmp_path / "photos"),
    )  # fmt: skip

    listed = (to / "images.txt").read_text().splitlines()
    assert listed == [f"./images/street/{n:02d}.jpg" for n in (2, 3, 4)]
    assert [(to / line).is_symlink() for line in listed] == [way == "link"] * 3
    for line in listed:
        assert (to / line).read_bytes() == (tmp_path / "photos" / line.removeprefix("./images/")).read_bytes()
    assert not (to / "labels/street/01.txt").exists()
    assert said["left_out"]["images that could not be read"] == 1
    assert (said["images"], said["masks"]) == (3, 9)


def test_without_the_right_to_read_no_picture_is_linked(tmp_path: Path) -> None:
    """The uris come from the tables: what the call does not allow is not touched."""
    output = make_output(tmp_path / "out", photos_of(tmp_path / "photos", made_images()))
    said = export("yolo-seg", "--output", output, "--to", str(tmp_path / "yolo"), "--images", "link")
    assert said["images"] == 0
    assert said["left_out"]["images that could not be read"] == 4
    assert not list((tmp_path / "yolo").rglob("*.jpg"))


def test_images_held_back_are_chosen_by_their_ids_alone(tmp_path: Path) -> None:
    images = [MadeImage(image_id=f"{n:03d}.jpg", masks=[blob(1)]) for n in range(60)]
    lists = []
    for number, some in enumerate([images, images[20:]]):
        output, to = make_output(tmp_path / f"out{number}", some), tmp_path / f"yolo{number}"
        export("yolo-seg", "--output", output, "--to", str(to), "--val", "0.2")
        lists.append([(to / f"{name}.txt").read_text().splitlines() for name in ("train", "val", "images")])
        assert "train: train.txt\nval: val.txt\n" in (to / "data.yaml").read_text()
    (train, val, both), (_, val_of_fewer, _) = lists
    assert sorted([*train, *val]) == sorted(both)
    assert 4 <= len(val) <= 20
    assert set(val_of_fewer) == {line for line in val if int(line[-7:-4]) >= 20}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["coco", "--val", "0.1"], "--val: export coco has no use for it"),
        (["hf", "--images", "copy"], "--images: export hf has no use for it"),
        (["yolo-seg", "--images", "move"], "wanted link or copy"),
        (["yolo-seg", "--val", "1"], "wanted a share"),
        (["yolo-seg", "--val", "nan"], "wanted a share"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    more: list[str], said: str, output: str, tmp_path
) -> None:
    code, _, err = run("export", more[0], output, str(tmp_path / "to"), *more[1:])
    assert code == 2
    assert said in err


def test_label_studio_brushes_decode_to_the_masks(output: str, tmp_path: Path) -> None:
    export("label-studio", "--output", output, "--to", str(tmp_path / "ls"), "--per-file", "3")

    files = sorted((tmp_path / "ls").glob("tasks-*.json"))
    tasks = [task for path in files for task in json.loads(path.read_text())]
    assert [len(json.loads(path.read_text())) for path in files] == [3, 1]
    by_id = {task["data"]["image_id"]: task for task in tasks}
    for made in made_images()[1:]:
        [prediction] = by_id[made.image_id]["predictions"]
        for region, mask, kind in zip(prediction["result"], made.masks, made.categories, strict=True):
            value = region["value"]
            pixels = decode_brush(value["rle"]).reshape(
                region["original_height"], region["original_width"], 4
            )
            assert np.array_equal(pixels[..., 3], mask * 255)
            assert value["brushlabels"] == [kind[1]]
        assert prediction["score"] == pytest.approx(0.5)
    assert '<Label value="traffic light"/>' in (tmp_path / "ls" / "config.xml").read_text()


def test_label_studios_own_reader_decodes_the_masks(output: str, tmp_path: Path) -> None:
    found = importlib.util.find_spec("label_studio_sdk")
    if found is None:
        pytest.skip("label-studio-sdk is not installed")
    # The module alone: the package's __init__ asks for a web client and OpenCV.
    path = Path(found.origin).parent / "converter" / "brush.py"
    spec = importlib.util.spec_from_file_location("brush", path)
    brush = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(brush)
    export("label-studio", "--output", output, "--to", str(tmp_path / "ls"))

    tasks = json.loads((tmp_path / "ls" / "tasks-00001.json").read_text())
    for task, made in zip(tasks, made_images()[1:], strict=True):
        results = [{**region, **region["value"]} for region in task["predictions"][0]["result"]]
        layers = brush.decode_from_annotation("mask", results)
        assert len(layers) == len(made.masks)
        masks = {mask.tobytes() for mask in made.masks}
        assert {(layer // 255).tobytes() for layer in layers.values()} == masks


def test_hf_rows_hold_the_nested_masks_and_the_card_the_classes(output: str, tmp_path: Path) -> None:
    export("hf", "--output", output, "--to", str(tmp_path / "hf"), "--per-file", "4")

    tables = [pq.read_table(path) for path in sorted((tmp_path / "hf" / "data").glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["image_id"] for row in rows] == [made.image_id for made in made_images()[1:]]
    for row, made in zip(rows, made_images()[1:], strict=True):
        for one, mask, kind in zip(row["objects"], made.masks, made.categories, strict=True):
            assert np.array_equal(coco_mask.decode(one["segmentation"]), mask)
            assert ["cat", "dog", "traffic light"][one["category"]] == kind[1]
    features = json.loads(tables[0].schema.metadata[b"huggingface"])["info"]["features"]
    assert features["objects"]["feature"]["category"]["names"] == ["cat", "dog", "traffic light"]
    assert "| 2 | 90 | traffic light |" in (tmp_path / "hf" / "README.md").read_text()


def test_hf_is_read_by_datasets_with_its_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    photos = tmp_path / "photos"
    images = made_images()
    for made in images:
        (photos / made.image_id).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIZE[1], SIZE[0]), (9, 9, 9)).save(photos / made.image_id)
    images = [MadeImage(**{**vars(made), "uri": str(photos / made.image_id)}) for made in images]
    output = make_output(tmp_path / "out", images)
    export("hf", "--output", output, "--to", str(tmp_path / "hf"))

    data = datasets.load_dataset(str(tmp_path / "hf"), split="train", cache_dir=str(tmp_path / "cache"))

    assert len(data) == 4
    assert data.features["objects"].feature["category"].names == ["cat", "dog", "traffic light"]
    for row, made in zip(data, images[1:], strict=True):
        assert row["image"].size == (row["width"], row["height"]) == (SIZE[1], SIZE[0])
        for one, mask, kind in zip(row["objects"], made.masks, made.categories, strict=True):
            assert np.array_equal(coco_mask.decode(one["segmentation"]), mask)
            assert data.features["objects"].feature["category"].int2str(one["category"]) == kind[1]


@pytest.mark.parametrize("kind", ["coco", "yolo-seg", "label-studio", "hf"])
def test_only_what_was_selected_is_handed_on_and_the_rest_is_counted(kind: str, tmp_path: Path) -> None:
    output = make_output(tmp_path / "out", made_images(), filters=FilterSettings(min_predicted_iou=0.6))

    everything = export(kind, "--output", output, "--to", str(tmp_path / "all"))
    accepted = export(kind, "--output", output, "--to", str(tmp_path / "accepted"), "--accepted-only")
    chosen = export(
        kind, "--output", output, "--to", str(tmp_path / "chosen"), "--accepted-only",
        "--where", "category_name = 'dog' OR detector_score > 0.75",
    )  # fmt: skip

    assert (everything["masks"], everything["not_accepted"]) == (10, 4)
    assert (accepted["masks"], accepted["images"]) == (6, 3)
    assert accepted["left_out"]["images of which nothing was selected"] == 1
    assert (chosen["masks"], chosen["images"]) == (4, 3)


def test_an_export_never_mixes_with_files_that_are_there(output: str, tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "instances-00009.json").write_text("{}")

    code, _, err = run("export", "coco", "--output", output, "--to", str(tmp_path / "coco"))

    assert code == 2
    assert "choose a new folder" in err


def test_an_export_to_the_name_of_a_file_is_refused_before_any_work(output: str, tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text("{}")

    code, _, err = run("export", "coco", "--output", output, "--to", str(tmp_path / "coco.json"))

    assert code == 2
    assert "coco.json: this is a file; wanted a new folder" in err
    assert (tmp_path / "coco.json").read_text() == "{}"


def test_two_images_that_differ_in_their_ending_alone_are_refused_for_yolo(tmp_path: Path) -> None:
    images = [MadeImage(image_id=name, masks=[blob(1)]) for name in ("a.jpg", "b.jpg", "b.png")]
    output = make_output(tmp_path / "out", images)

    code, _, err = run("export", "yolo-seg", "--output", output, "--to", str(tmp_path / "yolo"))

    assert code == 2
    assert "b.txt" in err
    assert not list((tmp_path / "yolo").rglob("*.*")), "refused before anything was written"


def test_two_classes_that_would_be_one_label_are_refused_for_label_studio(tmp_path: Path) -> None:
    """XML holds no control character; its escape may be another class's name."""
    names = ("cat\x01", "cat\\x01")
    images = [
        MadeImage(image_id=f"{at}.jpg", masks=[blob(1)], categories=[(at, name)])
        for at, name in enumerate(names, start=1)
    ]
    output = make_output(tmp_path / "out", images)

    code, _, err = run("export", "label-studio", "--output", output, "--to", str(tmp_path / "ls"))

    assert code == 2
    assert "would be one label" in err
    assert not list((tmp_path / "ls").rglob("*.*"))


def test_an_export_goes_to_a_bucket_as_to_a_folder(output: str, moto_s3, tmp_path: Path) -> None:
    from hqlabel.pipeline.job_context import Place
    from hqlabel.pipeline.storage.output_store import Store

    to = f"s3://{moto_s3.bucket}/exports/coco"
    code, _, err = run(
        "export", "coco", "--output", output, "--to", to,
        "--set", f"storage.s3={json.dumps(moto_s3.options)}",
    )  # fmt: skip

    assert code == 0, err
    export("coco", "--output", output, "--to", str(tmp_path / "here"))
    store = Store(Place(uri=to, options=moto_s3.options))
    assert store.read("instances.json") == (tmp_path / "here" / "instances.json").read_bytes()


def test_an_image_whose_boxes_the_rules_left_out_is_no_picture_without_objects(tmp_path: Path) -> None:
    images = [
        MadeImage(image_id="kept.jpg", masks=[blob(1)], scores=[0.9], rules=BoxRules(min_score=0.5)),
        MadeImage(image_id="left.jpg", masks=[blob(2)], scores=[0.4], rules=BoxRules(min_score=0.5)),
    ]
    output = make_output(tmp_path / "out", images)

    said = export("coco", "--output", output, "--to", str(tmp_path / "coco"))

    coco = json.loads((tmp_path / "coco" / "instances.json").read_text())
    assert [one["file_name"] for one in coco["images"]] == ["kept.jpg"]
    assert (
        said["left_out"]["images whose boxes were all left without a mask: crowds, or by the job's rules"]
        == 1
    )
    rows = {row["image_id"]: row for row in pq.read_table(Path(output) / "images").to_pylist()}
    assert (rows["left.jpg"]["status"], rows["left.jpg"]["num_boxes"]) == ("no_boxes", 1)
    [reason] = pq.read_table(Path(output) / "instances", filters=[("image_id", "=", "left.jpg")])[
        "reject_reason"
    ]
    assert reason.as_py() == "box_score"


@pytest.mark.parametrize("counts", ["o" * 13 + "0", "\x7f", "ooo", "0"])
def test_runs_that_cannot_be_decoded_are_damage_and_not_a_bug(counts: str) -> None:
    with pytest.raises(DamageFound, match=r"instance 3 of an image.*hqlabel validate"):
        mask_of({"instance_index": 3, "segmentation": {"size": [30, 50], "counts": counts}})
