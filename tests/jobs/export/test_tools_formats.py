"""cvat, png, labelme, webdataset and coco's subsets, by their documented rules and by tools that read them.

The tools are not pinned: where one is missing, its test is skipped and says so (docs/dev/export-readers.md).
"""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from hqlabel.jobs.export.fill_polygon import fill_polygon
from hqlabel.jobs.export.voc_masks import palette
from hqlabel.pipeline.storage.backend import local_tag
from tests.jobs.cli.test_cli import run
from tests.jobs.export.test_export import SIZE, export, made_images, photos_of
from tests.jobs.export.test_hostile_names import FIT, UNFIT_FOR_YOLO, files_below, output_of
from tests.jobs.made_outputs import MadeImage, blob, make_output, tight_box

NEW = ("cvat", "png", "labelme", "webdataset")
NAMES = {2: "cat", 7: "dog", 90: "traffic light"}


@pytest.fixture
def photos(tmp_path: Path) -> list[MadeImage]:
    return photos_of(tmp_path / "photos", made_images())


def exported(kind: str, images: list[MadeImage], tmp_path: Path, *more: str) -> tuple[Path, dict]:
    output, to = make_output(tmp_path / "out", images), tmp_path / kind
    root = ("--allow-root", str(tmp_path / "photos")) if "--images" in more else ()
    return to, export(kind, "--output", output, "--to", str(to), *more, *root)


def photos_named(folder: Path, ids: list[str]) -> list[MadeImage]:
    """JPEGs of these names, whatever their endings say, with a mask each."""
    for one in ids:
        (folder / one).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIZE[1], SIZE[0]), (9, 9, 9)).save(folder / one, "JPEG")
    return [MadeImage(image_id=one, masks=[blob(1)], uri=str(folder / one)) for one in ids]


def odd_masks() -> list[np.ndarray]:
    """One pixel in each corner, the whole picture, its last row, parts that touch by a corner, a ring."""
    masks = [np.zeros(SIZE, np.uint8) for _ in range(8)]
    for mask, (y, x) in zip(masks, [(0, 0), (0, -1), (-1, 0), (-1, -1)], strict=False):
        mask[y, x] = 1
    masks[4][:] = masks[5][-1] = masks[6][2:5, 2:5] = masks[6][5:9, 5:9] = 1
    masks[7][10:30, 10:30] = 1
    masks[7][15:25, 15:25] = 0
    masks[7][40, 70] = 1
    return masks


def labelled(images: list[MadeImage]) -> list[MadeImage]:
    return [made for made in images if made.masks]


# ---------------------------------------------------------------------------------------------
# CVAT
# ---------------------------------------------------------------------------------------------


def cvat_mask(shape: ET.Element, size_hw: tuple[int, int]) -> np.ndarray:
    """A <mask>: runs of outside and inside by turns, row by row, within its box."""
    left, top, width, height = (int(shape.attrib[key]) for key in ("left", "top", "width", "height"))
    lengths = [int(one) for one in shape.attrib["rle"].split(", ")]
    assert sum(lengths) == width * height
    flat = np.repeat(np.arange(len(lengths)) % 2, lengths)
    mask = np.zeros(size_hw, np.uint8)
    mask[top : top + height, left : left + width] = flat.reshape(height, width)
    return mask


def test_cvat_masks_are_the_masks(tmp_path: Path) -> None:
    to, said = exported("cvat", made_images(), tmp_path)

    root = ET.parse(to / "annotations.xml").getroot()
    assert (root.tag, root.findtext("version")) == ("annotations", "1.1")
    assert [one.findtext("name") for one in root.iter("label")] == list(NAMES.values())
    images = {one.attrib["name"]: one for one in root.iter("image")}
    assert [one.attrib["id"] for one in images.values()] == ["0", "1", "2", "3"]
    for made in labelled(made_images()):
        one = images[made.image_id]
        assert (int(one.attrib["height"]), int(one.attrib["width"])) == SIZE
        for shape, mask, kind, score in zip(one, made.masks, made.categories, made.scores, strict=True):
            assert np.array_equal(cvat_mask(shape, SIZE), mask)
            assert shape.attrib["label"] == kind[1]
            scores = {one.attrib["name"]: float(one.text) for one in shape}
            assert scores["detector_score"] == pytest.approx(score)
    assert said["loss"] is None


def test_cvat_polygons_are_measured_and_cut_into_files(tmp_path: Path) -> None:
    to, said = exported("cvat", made_images(), tmp_path, "--polygons", "--per-file", "4")

    assert sorted(path.name for path in to.iterdir()) == [f"annotations-{n:05d}.xml" for n in (1, 2, 3)]
    masks = [mask for made in labelled(made_images()) for mask in made.masks]
    shapes = [one for path in sorted(to.iterdir()) for one in ET.parse(path).iter("polygon")]
    ious = []
    for shape, mask in zip(shapes, masks, strict=True):
        points = [float(value) for pair in shape.attrib["points"].split(";") for value in pair.split(",")]
        drawn = coco_mask.decode(coco_mask.frPyObjects([points], *SIZE))[..., 0]
        ious.append((drawn & mask).sum() / (drawn | mask).sum())
    assert said["loss"]["mean_iou"] == pytest.approx(np.mean(ious))
    assert min(ious) > 0.9


CLASSES = [
    "a & b",
    "<x>",
    "'q' \"p\"",
    "new\nline",
    "cr\rlf",
    "\x01control",
    "é日本🚗",
    " lead",
    "c:d",
    "#e",
    "background",
]


def test_names_of_classes_come_back_or_are_escaped(tmp_path: Path) -> None:
    images = [
        MadeImage(image_id=f"{n:02d}.jpg", masks=[blob(n)], categories=[(n, name)])
        for n, name in enumerate(CLASSES)
    ]
    cvat, _ = exported("cvat", images, tmp_path)
    png = tmp_path / "png"
    export("png", "--output", str(tmp_path / "out"), "--to", str(png))

    root = ET.parse(cvat / "annotations.xml").getroot()
    listed = [one.findtext("name") for one in root.iter("label")]
    assert listed == [name.replace("\x01", "\\x01") for name in CLASSES]
    assert [one.attrib["label"] for one in root.iter("mask")] == listed
    names = [line.split(":")[0] for line in (png / "labelmap.txt").read_text().split("\n")[1:-1]]
    assert len(names) == len(set(names)) == len(CLASSES) + 1
    assert names[0] == "background"
    assert "c\\x3ad" in names
    assert all(line.count(":") == 3 for line in (png / "labelmap.txt").read_text().splitlines())
    known = json.loads((png / "classes.json").read_text())
    assert [one["name"] for one in known] == CLASSES


# ---------------------------------------------------------------------------------------------
# PNG
# ---------------------------------------------------------------------------------------------


def voc_colours() -> np.ndarray:
    """Pascal VOC's colours as its development kit computes them (VOClabelcolormap)."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(256):
        rest, rgb = index, [0, 0, 0]
        for shift in range(7, -1, -1):
            for channel in range(3):
                rgb[channel] |= (rest >> channel & 1) << shift
            rest >>= 3
        colours[index] = rgb
    return colours


def by_the_rule(masks: list[np.ndarray], values: list[int]) -> np.ndarray:
    """Each pixel by itself: of the masks over it, the smallest; of equal ones the last."""
    painted = np.zeros(masks[0].shape, np.uint8)
    for y, x in np.ndindex(painted.shape):
        over = [(int(mask.sum()), -at) for at, mask in enumerate(masks) if mask[y, x]]
        painted[y, x] = values[-min(over)[1]] if over else 0
    return painted


def test_indexed_masks_follow_the_rule_for_overlaps_and_what_is_hidden_is_said(tmp_path: Path) -> None:
    large, small, equal = (np.zeros(SIZE, np.uint8) for _ in range(3))
    large[5:50, 5:70], small[10:20, 10:20], equal[15:25, 10:20] = 1, 1, 1
    images = [
        MadeImage(
            image_id="o.jpg", masks=[small, large, equal], categories=[(2, "cat"), (7, "dog"), (2, "cat")]
        ),
        *labelled(made_images()),
    ]
    to, said = exported("png", images, tmp_path)

    assert np.array_equal(palette(), voc_colours())
    hidden = []
    for made in images:
        stem = made.image_id.removesuffix(".jpg")
        numbers = [{2: 1, 7: 2, 90: 3}[kind[0]] for kind in made.categories]
        for folder, values in (("Object", list(range(1, len(made.masks) + 1))), ("Class", numbers)):
            with Image.open(to / f"Segmentation{folder}" / f"{stem}.png") as picture:
                assert picture.mode == "P"
                assert picture.getpalette() == voc_colours().ravel().tolist()
                found = np.array(picture)
            assert np.array_equal(found, by_the_rule(list(made.masks), values))
            if folder == "Object":
                hidden += [(found == at).sum() / mask.sum() for at, mask in enumerate(made.masks, start=1)]
    assert said["loss"]["mean_iou"] == pytest.approx(np.mean(hidden))
    assert said["loss"]["least_iou"] == pytest.approx(np.min(hidden))
    assert hidden[:3] == [0.5, 1 - 150 / large.sum(), 1.0]
    listed = (to / "ImageSets/Segmentation/default.txt").read_text().splitlines()
    assert listed == ["o", "street/01", "street/02", "street/03", "street/04"]


def test_a_mask_that_others_hide_wholly_is_counted(tmp_path: Path) -> None:
    twice = MadeImage(image_id="o.jpg", masks=[blob(1), blob(1), blob(2)])
    _, said = exported("png", [twice], tmp_path)
    assert (said["loss"]["masks_lost"], said["loss"]["least_iou"]) == (1, 0)
    [note] = [one for one in said["notes"] if "IoU" in one]
    assert ", 1 of them lost wholly; the smaller of two masks lies on top; scores are lost" in note


def test_more_than_a_byte_tells_apart_is_refused_or_left_out(tmp_path: Path) -> None:
    dot = np.zeros((16, 16), np.uint8)
    dot[3, 4] = 1
    many = MadeImage(image_id="many.jpg", size_hw=(16, 16), masks=[dot] * 255)
    _, said = exported("png", [many, MadeImage(image_id="one.jpg", masks=[blob(1)])], tmp_path)
    assert said["images"] == 1
    assert said["left_out"] == {
        "images with more than 254 masks, which a PNG of one byte a pixel cannot tell apart": 1
    }
    classes = MadeImage(
        image_id="c.jpg", size_hw=(16, 16), masks=[dot] * 255, categories=[(n, f"c{n}") for n in range(255)]
    )
    output = make_output(tmp_path / "classes", [classes])
    code, _, err = run("export", "png", output, str(tmp_path / "refused"))
    assert code == 2
    assert "255 classes" in err
    assert not (tmp_path / "refused").exists()


# ---------------------------------------------------------------------------------------------
# labelme
# ---------------------------------------------------------------------------------------------


def labelme_shapes(path: Path) -> list[tuple[str, np.ndarray]]:
    """The shapes of a file by labelme's rules: a mask's PNG lies from one point to the other, inclusive."""
    content = json.loads(path.read_text())
    assert set(content) == {
        "version",
        "flags",
        "shapes",
        "imagePath",
        "imageData",
        "imageHeight",
        "imageWidth",
    }
    size = (content["imageHeight"], content["imageWidth"])
    found = []
    for shape in content["shapes"]:
        mask = np.zeros(size, np.uint8)
        if shape["shape_type"] == "mask":
            (x1, y1), (x2, y2) = shape["points"]
            with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as picture:
                mask[y1 : y2 + 1, x1 : x2 + 1] = np.array(picture).astype(bool)
        else:
            mask = fill_polygon(np.array(shape["points"]), size)
        found.append((shape["label"], mask))
    return found


def test_labelme_masks_are_the_masks_beside_their_pictures(photos: list[MadeImage], tmp_path: Path) -> None:
    to, _ = exported("labelme", photos, tmp_path, "--images", "copy")
    for made in labelled(photos):
        path = (to / made.image_id).with_suffix(".json")
        assert (path.parent / json.loads(path.read_text())["imagePath"]).read_bytes()
        for (label, found), mask, kind in zip(labelme_shapes(path), made.masks, made.categories, strict=True):
            assert label == kind[1]
            assert np.array_equal(found, mask)


def test_labelme_polygons_are_nearly_the_masks(tmp_path: Path) -> None:
    to, said = exported("labelme", made_images(), tmp_path, "--polygons")
    ious = []
    for made in labelled(made_images()):
        shapes = labelme_shapes((to / made.image_id).with_suffix(".json"))
        ious += [
            (found & mask).sum() / (found | mask).sum()
            for (_, found), mask in zip(shapes, made.masks, strict=True)
        ]
    assert min(ious) > 0.97
    assert said["loss"]["mean_iou"] > 0.97


# ---------------------------------------------------------------------------------------------
# WebDataset
# ---------------------------------------------------------------------------------------------


def samples_of(folder: Path) -> Iterator[dict[str, bytes]]:
    """Samples by WebDataset's rule: neighbours in a tar whose names are equal up to the first dot."""
    for path in sorted(folder.glob("shard-*.tar")):
        sample: dict[str, bytes] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                sample |= {"__key__": key, ending: tar.extractfile(member).read()}
        yield sample


def test_webdataset_shards_hold_pictures_and_masks(photos: list[MadeImage], tmp_path: Path) -> None:
    to, said = exported("webdataset", photos, tmp_path, "--images", "copy", "--per-file", "4")

    assert sorted(path.name for path in to.glob("*.tar")) == [f"shard-{n:06d}.tar" for n in range(3)]
    samples = list(samples_of(to))
    assert len({one["__key__"] for one in samples}) == len(samples) == said["images"] == 4
    for sample, made in zip(samples, labelled(photos), strict=True):
        record = json.loads(sample["json"])
        assert record["image_id"] == made.image_id
        assert sample["jpg"] == Path(made.uri).read_bytes()
        for one, mask, kind in zip(record["masks"], made.masks, made.categories, strict=True):
            assert np.array_equal(coco_mask.decode(one["segmentation"]), mask)
            assert list(NAMES)[one["class"]] == kind[0]


def test_shards_of_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    one, _ = exported("webdataset", made_images(), tmp_path)
    export("webdataset", "--output", str(tmp_path / "out"), "--to", str(tmp_path / "again"))
    assert (one / "shard-000000.tar").read_bytes() == (tmp_path / "again/shard-000000.tar").read_bytes()


def test_no_picture_in_a_shard_has_an_ending_whose_decoder_runs_code(tmp_path: Path) -> None:
    ids = ["a.pyd", "b.PTH", "c.json", "d.npy", "e", "f.JPG", "g.tar.webp"]
    images = photos_named(tmp_path / "photos", ids)
    to, _ = exported("webdataset", images, tmp_path, "--images", "copy")
    endings = [(set(one) - {"__key__", "json"}).pop() for one in samples_of(to)]
    assert endings == ["img", "img", "img", "img", "img", "jpg", "webp"]


# ---------------------------------------------------------------------------------------------
# COCO's subsets and scores
# ---------------------------------------------------------------------------------------------


def test_a_subset_of_coco_has_its_place_its_pictures_and_scores(
    photos: list[MadeImage], tmp_path: Path
) -> None:
    to, _ = exported("coco", photos, tmp_path, "--subset", "default", "--images", "link")
    content = json.loads((to / "annotations/instances_default.json").read_text())
    for image in content["images"]:
        assert (to / "images/default" / image["file_name"]).resolve() == Path(image["image_uri"]).resolve()
    for one in content["annotations"]:
        assert one["score"] == pytest.approx(one["predicted_iou"] * one["detector_score"])


def test_each_file_of_a_cut_subset_is_a_subset_with_its_own_pictures(
    photos: list[MadeImage], tmp_path: Path
) -> None:
    to, _ = exported("coco", photos, tmp_path, "--subset", "train", "--images", "link", "--per-file", "4")
    found = {}
    for path in (to / "annotations").iterdir():
        names = {image["file_name"] for image in json.loads(path.read_text())["images"]}
        pictures = to / "images" / path.stem.removeprefix("instances_")
        assert {str(one.relative_to(pictures)) for one in files_below(pictures)} == names
        found[path.stem] = len(names)
    assert found == {"instances_train-00001": 2, "instances_train-00002": 1, "instances_train-00003": 1}


@pytest.mark.parametrize("kind", ["coco", "hf", "cvat"])
def test_rights_to_read_pictures_that_no_picture_needs_are_named(kind: str, tmp_path: Path) -> None:
    output, rights = make_output(tmp_path / "out", made_images()), ("--allow-root", str(tmp_path))
    said = export(kind, output, str(tmp_path / "to"), *rights, "--allow-scheme", "https")
    [note] = [one for one in said["notes"] if "--allow" in one]
    assert note.startswith("note: --allow-root, --allow-scheme: without effect, because ")
    assert not any("--allow" in one for one in export(kind, output, str(tmp_path / "again"))["notes"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["png", "--per-file", "3"], "--per-file: export png has no use"),
        (["coco", "--tolerance", "1"], "--tolerance: export coco has no use"),
        (["labelme", "--tolerance", "0.5"], "add --polygons"),
        (["cvat", "--image-prefix", "https://x/"], "--image-prefix: export cvat has no use"),
        (["hf", "--categories-from-1"], "--categories-from-1: export hf has no use"),
        (["coco", "--subset", "../x"], "wanted letters, digits"),
        (["png", "--subset", "a"], "--subset: export png has no use"),
        (["coco", "--images", "copy"], "add --subset"),
        (["webdataset", "--images", "link"], "wanted --images copy"),
        (["hf", "--polygons"], "--polygons: export hf has no use"),
    ],
)
def test_options_that_do_not_fit_are_refused(more: list[str], said: str, tmp_path: Path) -> None:
    output = make_output(tmp_path / "out", made_images())
    code, _, err = run("export", more[0], output, str(tmp_path / "to"), *more[1:])
    assert code == 2
    assert said in err
    assert not (tmp_path / "to").exists()


# ---------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------


def test_odd_masks_are_whole_in_every_format_that_keeps_masks_and_empty_ones_are_counted(
    tmp_path: Path,
) -> None:
    masks, empty = odd_masks(), np.zeros(SIZE, np.uint8)
    kinds = [(n, f"k{n}") for n in range(9)]
    boxes = [*map(tight_box, masks), [1.0, 1.0, 5.0, 5.0]]
    made = MadeImage(image_id="o.jpg", masks=[*masks, empty], boxes=boxes, categories=kinds)
    output = make_output(tmp_path / "out", [made])
    for kind in (*NEW, "yolo-seg"):
        said = export(kind, output, str(tmp_path / kind))
        assert (said["masks"], said["left_out"]) == (8, {"rows without a mask": 1})
    shapes = ET.parse(tmp_path / "cvat/annotations.xml").iter("mask")
    found = {"cvat": [cvat_mask(shape, SIZE) for shape in shapes]}
    found["labelme"] = [mask for _, mask in labelme_shapes(tmp_path / "labelme/o.json")]
    [sample] = samples_of(tmp_path / "webdataset")
    records = json.loads(sample["json"])["masks"]
    found["webdataset"] = [coco_mask.decode(one["segmentation"]) for one in records]
    for kind, all_ in found.items():
        assert [np.array_equal(one, mask) for one, mask in zip(all_, masks, strict=True)] == [True] * 8, kind
    with Image.open(tmp_path / "png/SegmentationObject/o.png") as picture:
        assert np.array_equal(np.array(picture), by_the_rule(masks, list(range(1, 9))))


def test_pictures_in_a_tar_are_unpacked_beside_their_labels(tmp_path: Path) -> None:
    ids = ["x/a.jpg", "b c&<é>.jpg"]
    images = photos_named(tmp_path / "loose", ids)
    (tmp_path / "photos").mkdir()
    with tarfile.open(tmp_path / "photos/0.tar", "w") as tar:
        for one in ids:
            tar.add(tmp_path / "loose" / one, one)
    with tarfile.open(tmp_path / "photos/0.tar") as tar:
        places = {one.name: f"{tar.name}#{one.offset_data}:{one.size}/{one.name}" for one in tar}
    etag = local_tag((tmp_path / "photos/0.tar").stat())
    images = [MadeImage(**{**vars(one), "uri": places[one.image_id], "etag": etag}) for one in images]
    for kind, folder in (("cvat", "images"), ("labelme", "."), ("png", "JPEGImages")):
        to, said = exported(kind, images, tmp_path, "--images", "copy")
        assert said["images"] == 2
        assert not any("unpack" in note for note in said["notes"])
        for one in ids:
            assert (to / folder / one).read_bytes() == (tmp_path / "loose" / one).read_bytes()
    linked = ("--images", "link", "--allow-root", str(tmp_path / "photos"))
    said = export("cvat", str(tmp_path / "out"), str(tmp_path / "linked"), *linked)
    assert said["left_out"] == {"images that could not be read": 2}


@pytest.mark.parametrize("kind", NEW)
def test_hostile_names_are_left_out_or_harmless_and_no_file_is_elsewhere(kind: str, tmp_path: Path) -> None:
    ids = [name for name in [*UNFIT_FOR_YOLO, *FIT] if name != "a.png "]  # without its ending it is a.jpg too
    output = output_of(tmp_path / "job" / "out", ids)
    before = files_below(tmp_path)
    to = tmp_path / "deep" / "to"

    said = export(kind, "--output", output, "--to", str(to))

    assert files_below(tmp_path) - before == files_below(to)
    assert said["images"] + sum(said["left_out"].values()) == len(ids)
    assert said["images"] >= len(FIT) - 2
    if kind == "webdataset":
        found = [json.loads(one["json"])["image_id"] for one in samples_of(to)]
        assert sorted(found) == sorted(ids)
        assert all(re.fullmatch(r"[0-9]{9}", one["__key__"]) for one in samples_of(to))


@pytest.mark.parametrize("kind", ["png", "labelme"])
def test_two_images_that_want_one_file_are_refused_before_the_first(kind: str, tmp_path: Path) -> None:
    output = output_of(tmp_path / "out", ["x/y.jpg", "x/y.png"])
    code, _, err = run("export", kind, output, str(tmp_path / "to"))
    assert code == 2
    assert "'x/y.jpg'" in err
    assert "'x/y.png'" in err
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("kind", NEW)
def test_only_what_was_selected_is_in_the_new_formats(kind: str, tmp_path: Path) -> None:
    _, said = exported(kind, made_images(), tmp_path, "--where", "category_name = 'dog'")
    assert (said["images"], said["masks"]) == (3, 3)
    assert said["left_out"]["images of which nothing was selected"] == 1


# ---------------------------------------------------------------------------------------------
# Read back by tools that did not write it
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> list[MadeImage]:
    """270 masks of 61 pictures, the odd ones among them, of five classes whose names need escaping."""
    kinds = [
        (2, "cat"),
        (7, "traffic light"),
        (8, "\u00e9\u65e5\U0001f697"),
        (9, "a & b <c> 'd' \"e\""),
        (90, "x"),
    ]
    images = [
        MadeImage(
            image_id=f"st reet/\u00e9 {n:02d}.jpg",
            masks=[blob(100 * n + at) for at in range(n % 8 + 1)],
            categories=[kinds[(n + at) % 5] for at in range(n % 8 + 1)],
        )
        for n in range(60)
    ]
    odd = MadeImage(image_id="odd.jpg", masks=odd_masks(), categories=[kinds[at % 5] for at in range(8)])
    return photos_of(tmp_path / "photos", [odd, *images])


def by_datumaro(folder: Path, kind: str) -> dict[str, list[tuple[str, np.ndarray]]]:
    """The masks of each item with their labels."""
    dm = pytest.importorskip("datumaro", reason="datumaro is not installed")
    data = dm.Dataset.import_from(str(folder), kind)
    names = [one.name for one in data.categories()[dm.AnnotationType.label]]
    found = {}
    for item in data:
        masks = [one for one in item.annotations if hasattr(one, "image")]
        found[item.id] = [(names[one.label], np.asarray(one.image).astype(np.uint8)) for one in masks]
    return found


def wanted(images: list[MadeImage]) -> dict[str, list[tuple[str, bytes]]]:
    return {
        made.image_id.removesuffix(".jpg"): sorted(
            (kind[1], mask.tobytes()) for kind, mask in zip(made.categories, made.masks, strict=True)
        )
        for made in labelled(images)
    }


def as_bytes(found: dict[str, list[tuple[str, np.ndarray]]]) -> dict[str, list[tuple[str, bytes]]]:
    return {key: sorted((name, mask.tobytes()) for name, mask in masks) for key, masks in found.items()}


@pytest.mark.parametrize(
    ("kind", "more", "as_"), [("coco", ["--subset", "default"], "coco"), ("cvat", [], "cvat")]
)
def test_datumaro_reads_the_same_masks(
    kind: str, more: list[str], as_: str, many: list[MadeImage], tmp_path: Path
) -> None:
    pytest.importorskip("datumaro", reason="datumaro is not installed")
    to, _ = exported(kind, many, tmp_path, *more, "--images", "copy")
    assert as_bytes(by_datumaro(to, as_)) == wanted(many)


def test_datumaro_reads_the_indexed_masks(many: list[MadeImage], tmp_path: Path) -> None:
    pytest.importorskip("datumaro", reason="datumaro is not installed")
    to, _ = exported("png", many, tmp_path, "--images", "copy")
    seen = []
    for made in many:
        painted = by_the_rule(list(made.masks), list(range(1, 1 + len(made.masks)))) if made.masks else None
        masks = [(painted == at + 1).astype(np.uint8) for at in range(len(made.masks))]
        seen.append(MadeImage(**{**vars(made), "masks": masks, "boxes": [tight_box(m) for m in made.masks]}))
    found = by_datumaro(to, "voc_instance_segmentation")
    assert as_bytes(found) == wanted(seen)


def test_labelmes_own_reader_reads_the_same_masks(many: list[MadeImage], tmp_path: Path) -> None:
    label_file = pytest.importorskip("labelme._label_file", reason="labelme is not installed")
    from labelme.utils import shape_to_mask

    masks, _ = exported("labelme", many, tmp_path, "--images", "copy")
    polygons, ious = tmp_path / "polygons", []
    said = export(
        *("labelme", "--output", str(tmp_path / "out"), "--to", str(polygons), "--polygons"),
        *("--images", "copy", "--allow-root", str(tmp_path / "photos")),
    )
    for made in many:
        read = label_file.read_label_file(str((masks / made.image_id).with_suffix(".json")))
        for shape, mask, kind in zip(read.shapes, made.masks, made.categories, strict=True):
            (x1, y1), (x2, y2) = shape["points"]
            assert shape["label"] == kind[1]
            assert np.array_equal(shape["mask"], mask[y1 : y2 + 1, x1 : x2 + 1])
            assert mask.sum() == shape["mask"].sum()
        read = label_file.read_label_file(str((polygons / made.image_id).with_suffix(".json")))
        for shape, mask in zip(read.shapes, made.masks, strict=True):
            drawn = shape_to_mask(made.size_hw, shape["points"], shape["shape_type"])
            ious.append((drawn & (mask == 1)).sum() / (drawn | (mask == 1)).sum())
    assert (np.mean(ious), min(ious)) == pytest.approx((said["loss"]["mean_iou"], said["loss"]["least_iou"]))
    assert min(ious) > 0.95


def test_webdatasets_own_reader_reads_the_same_masks(many: list[MadeImage], tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    to, _ = exported("webdataset", many, tmp_path, "--images", "copy", "--per-file", "40")
    urls = [str(path) for path in sorted(to.glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    for sample, made in zip(samples, many, strict=True):
        assert sample["jpg"].shape == (*SIZE, 3)
        assert sample["json"]["image_id"] == made.image_id
        for one, mask in zip(sample["json"]["masks"], made.masks, strict=True):
            assert np.array_equal(coco_mask.decode(one["segmentation"]), mask)
