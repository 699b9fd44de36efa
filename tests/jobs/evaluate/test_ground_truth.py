"""Ground truth as other programs write it: read as pycocotools does, by a rule, or refused with the id."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from hqlabel.jobs.evaluate.ground_truth import MAX_OUTLINE, Truth, TruthObject, read_truth
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.job_context import AccessRules
from tests.jobs.made_outputs import blob, lengths_of, rle_of

SIZE = (60, 80)
MASK = blob(3, SIZE)
SQUARE = "[[10, 10, 40, 10, 40, 40, 10, 40]]"


def read(text: str | bytes, folder: Path, **options: Any) -> Truth:
    path = folder / "truth.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_truth(str(path), AccessRules(), **options)


def refusal(text: str | bytes, folder: Path, **options: Any) -> str:
    with pytest.raises(JobRefused) as error:
        read(text, folder, **options)
    said = str(error.value)
    assert said.startswith(f"{folder}/truth.json: ")
    assert said.isprintable()
    assert len(said) < 2000
    return said


def file_of(
    segmentation: str = SQUARE,
    *,
    annotation: str = '"id": 0, "image_id": 0, "category_id": 0, "bbox": [10, 10, 30, 30], "area": 900',
    image: str = '{"id": 0, "file_name": "a.jpg", "height": 60, "width": 80}',
    category: str = '{"id": 0, "name": "cat"}',
) -> str:
    """One annotation, number 0, of image 0 and category 0: as text, because other programs write text."""
    return (
        f'{{"images": [{image}], "categories": [{category}], '
        f'"annotations": [{{{annotation}, "segmentation": {segmentation}}}]}}'
    )


def only(truth: Truth) -> TruthObject:
    [[one]] = truth.objects.values()
    return one


def as_pycocotools(text: str, place: int = 0) -> str:
    """The compressed runs that pycocotools makes of an annotation of a file."""
    coco = COCO()
    coco.dataset = json.loads(text)
    coco.createIndex()
    return coco.annToRLE(coco.dataset["annotations"][place])["counts"].decode()


# ---------------------------------------------------------------------------------------------
# Whole files, in the shape that each program gives them
# ---------------------------------------------------------------------------------------------

RUNS = json.dumps({"counts": lengths_of(MASK), "size": list(SIZE)})
WRITTEN = {
    # CVAT 2: attributes, polygons of two decimals, crowds (brush masks) as uncompressed runs
    "CVAT": """{"licenses":[{"name":"","id":0,"url":""}],"info":{"contributor":"","date_created":"",
      "description":"","url":"","version":"","year":""},"categories":[{"id":1,"name":"cat","supercategory":""}],
      "images":[{"id":1,"width":80,"height":60,"file_name":"a.jpg","license":0,"flickr_url":"","coco_url":"",
      "date_captured":0}],"annotations":[
      {"id":1,"image_id":1,"category_id":1,"segmentation":[[10.25,10.5,40.0,10.5,40.0,40.75]],"area":450.0,
       "bbox":[10.25,10.5,29.75,30.25],"iscrowd":0,"attributes":{"occluded":false,"rotation":0.0}},
      {"id":2,"image_id":1,"category_id":1,"segmentation":RUNS,"area":900.0,"bbox":[1.0,2.0,30.0,30.0],
       "iscrowd":1,"attributes":{"occluded":false}}]}""",
    # Roboflow: a category 0 that nothing has, called as the project; ids from 0; numbers as in JavaScript
    "Roboflow": """{"info":{"year":"2026","version":"1","description":"Exported from roboflow.com"},
      "licenses":[{"id":1,"url":"","name":"MIT"}],"categories":[{"id":0,"name":"cats","supercategory":"none"},
      {"id":1,"name":"cats","supercategory":"cats"}],"images":[{"id":0,"license":1,
      "file_name":"a_jpg.rf.0123456789abcdef.jpg","height":60,"width":80,"date_captured":"2026-01-01T00:00:00+00:00",
      "extra":{"name":"a.jpg"}}],"annotations":[{"id":0,"image_id":0,"category_id":1,"bbox":[10,10,30,30.5],
      "area":915,"segmentation":[[10,10,40,10,40,40.5,10,40.5,10,10]],"iscrowd":0}]}""",
    # Label Studio: ids from 0, `ignore`, folders of the machine that exported, annotations before info
    "Label Studio": """{"images":[{"width":80,"height":60,"id":0,"file_name":"images\\\\1\\\\0a1b-a.jpg"}],
      "categories":[{"id":0,"name":"cat"}],"annotations":[{"id":0,"image_id":0,"category_id":0,
      "segmentation":[[10.0,10.0,40.1,10.0,40.1,40.3]],"bbox":[10.0,10.0,30.1,30.3],"ignore":0,"iscrowd":0,
      "area":456.0}],"info":{"year":2026,"version":"1.0","contributor":"Label Studio"}}""",
    # LVIS: neither iscrowd nor file_name, annotations first, extra keys
    "LVIS": """{"annotations":[{"area":450.0,"id":1,"segmentation":[[10.0,10.0,40.0,10.0,40.0,40.0]],
      "image_id":7,"bbox":[10.0,10.0,30.0,30.0],"category_id":3}],"images":[{"date_captured":"2013-11-15","neg_category_ids":[9],
      "id":7,"license":4,"height":60,"width":80,"flickr_url":"http://f/a.jpg",
      "coco_url":"http://images.cocodataset.org/val2017/000000000007.jpg","not_exhaustive_category_ids":[]}],
      "categories":[{"frequency":"c","id":3,"synset":"cat.n.01","image_count":1,"instance_count":1,
      "synonyms":["cat"],"def":"a cat","name":"cat"}]}""",
    # Datumaro: a picture that it did not open has no size, and no annotation here
    "Datumaro": """{"licenses":[],"info":{},"categories":[{"id":1,"name":"cat","supercategory":""}],
      "images":[{"id":1,"width":80,"height":60,"file_name":"a.jpg","license":0,"flickr_url":"","coco_url":"",
      "date_captured":0},{"id":2,"width":0,"height":0,"file_name":"b.jpg","license":0,"flickr_url":"",
      "coco_url":"","date_captured":0}],"annotations":[{"id":1,"image_id":1,"category_id":1,"segmentation":RUNS,
      "area":900,"bbox":[1.0,2.0,30.0,30.0],"iscrowd":1,"attributes":{}}]}""",
    # pandas: a column with a hole in it makes all its numbers floats, and NaN of what is not there
    "pandas": """{"images":[{"id":1.0,"file_name":"a.jpg","height":60.0,"width":80.0,"license":NaN}],
      "categories":[{"id":1.0,"name":"cat"}],"annotations":[{"id":1.0,"image_id":1.0,"category_id":1.0,
      "iscrowd":0.0,"area":450.0,"bbox":[10.0,10.0,30.0,30.0],"segmentation":[[10.0,10.0,40.0,10.0,40.0,40.0]],
      "score":NaN}]}""",
}  # fmt: skip


@pytest.mark.parametrize("program", WRITTEN)
def test_what_other_programs_write_is_read_as_pycocotools_reads_it(program: str, tmp_path: Path) -> None:
    text = WRITTEN[program].replace("RUNS", RUNS)

    truth = read(text, tmp_path)

    content = json.loads(text)
    found = {one.annotation_id: one for mine in truth.objects.values() for one in mine}
    assert len(found) == len(content["annotations"])
    for place, annotation in enumerate(content["annotations"]):
        one = found[str(int(annotation["id"]))]
        assert one.image_id == str(int(annotation["image_id"]))
        assert one.category_id == annotation["category_id"]
        assert one.is_crowd == bool(annotation.get("iscrowd", 0))
        assert (list(one.bbox_xywh), one.area) == (annotation["bbox"], annotation["area"])
        if program != "pandas":  # pycocotools refuses sizes that are floats
            assert one.counts == as_pycocotools(text, place)
    assert truth.images[one.image_id].size_hw == SIZE


def test_an_image_without_a_size_is_read_as_long_as_nothing_lies_on_it(tmp_path: Path) -> None:
    text = WRITTEN["Datumaro"].replace("RUNS", RUNS)

    assert read(text, tmp_path).images["2"].size_hw is None

    said = refusal(text.replace('"image_id":1', '"image_id":2'), tmp_path)
    assert "1 of an image whose height and width the file does not say (annotation 1: image 2)" in said


def test_lvis_is_read_and_its_other_way_of_counting_said(tmp_path: Path) -> None:
    truth = read(WRITTEN["LVIS"], tmp_path)

    assert truth.images["7"].file_name.endswith("/000000000007.jpg")
    assert [number for rule, number in truth.rules.items() if "LVIS" in rule] == [1]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_before_utf_8_is_passed_over(bom: bytes, tmp_path: Path) -> None:
    assert only(read(bom + file_of().encode(), tmp_path)).annotation_id == "0"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "it is empty"),
        (gzip.compress(file_of().encode()), "it is compressed by gzip"),
        (b"PK\x03\x04 and so on", "it is a zip"),
        (file_of().encode("utf-16"), "it is UTF-16 text; wanted UTF-8"),
        (file_of().encode("utf-16-le"), "as UTF-16 does; wanted UTF-8 text"),
        (b'[{"image_id": 0, "category_id": 0, "score": 1}]', "a list, as COCO results are"),
        (b"\xef\xbb\xbf \n[]", "a list, as COCO results are"),
        (file_of()[:-20].encode(), "it ends early"),
        (b'{"shapes": [], "imagePath": "a.jpg", "imageHeight": 60}', "no list `images`"),  # labelme
        (b'{"a.jpg123": {"filename": "a.jpg", "regions": []}}', "no list `images`"),  # VIA's own
        (b'{"images": [], "categories": [], "info": {"annotations": []}}', "no list `annotations`"),
        (b'{"images": [], "annotations": {}, "categories": []}', "no list `annotations`"),
        (b'{"images": [], "annotations": []}', "To let classes not count: --class-agnostic"),
    ],
)
def test_what_is_no_instances_file_is_refused_with_what_it_is(body: bytes, said: str, tmp_path: Path) -> None:
    found = refusal(body, tmp_path)

    assert said in found
    assert "wanted a COCO instances file" in found


def test_a_file_without_images_or_objects_is_a_truth(tmp_path: Path) -> None:
    truth = read('{"annotations": [], "categories": [], "images": []}', tmp_path)

    assert (truth.images, truth.objects, truth.categories) == ({}, {}, {})


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------

REFUSED_MASKS = {
    "null": ("null", "1 without a mask (annotation 0: `segmentation` is null)"),
    "boxes only, as CVAT and Roboflow write": ("[]", "1 without a mask (annotation 0: `segmentation` is [])"),
    "an empty object": ("{}", "1 without a mask (annotation 0: `segmentation` is {})"),
    "a number": ("0", "neither polygons nor runs (annotation 0: `segmentation` is 0)"),
    "a text": ('"[[1,2]]"', "neither polygons nor runs (annotation 0"),
    "an empty polygon": ("[[]]", "fewer than three points (annotation 0: 0 numbers)"),
    "one point": ("[[10, 10]]", "fewer than three points (annotation 0: 2 numbers)"),
    "four numbers, which pycocotools takes for a box": (
        "[[10, 10, 20, 20]]",
        "fewer than three points (annotation 0: 4 numbers)",
    ),
    "a flat list of four numbers": ("[10, 10, 20, 20]", "fewer than three points (annotation 0: 4 numbers)"),
    "an odd number": ("[[1, 1, 30, 1, 30, 30, 9]]", "odd number of numbers (annotation 0: 7 numbers)"),
    "a flat odd list": ("[1, 1, 30, 1, 30]", "odd number of numbers (annotation 0: 5 numbers)"),
    "a hole": ("[[1, 1, null, 1, 30, 30]]", "list x1, y1, x2, y2, … of numbers (annotation 0: [1, 1, null"),
    "a null part": ("[[1, 1, 30, 1, 30, 30], null]", "of numbers (annotation 0: null)"),
    "numbers as text": ('[["1", "1", "30", "1", "30", "30"]]', 'of numbers (annotation 0: ["1", "1"'),
    "true": ("[[true, 1, 30, 1, 30, 30]]", "of numbers (annotation 0: [true"),
    "pairs, as labelme has them": ("[[[1, 1], [30, 1], [30, 30]]]", "of numbers (annotation 0: [[1, 1]"),
    "runs in a list": ('[{"size": [60, 80], "counts": [4800]}]', 'of numbers (annotation 0: {"size"'),
    "NaN": ("[[1, 1, NaN, 1, 30, 30]]", "a polygon point that is not finite (annotation 0)"),
    "infinity": ("[[1, 1, 30, 1, 30, -Infinity]]", "a polygon point that is not finite (annotation 0)"),
    "beyond any float": (f"[[1, 1, {10**400}, 1, 30, 30]]", "a polygon point that is not finite"),
    "1e8": ("[[1, 1, 1e8, 1, 30, 30]]", "longer side outside (annotation 0: 1e+08, the longer side is 80)"),
    "-1e8 in a later part": (
        "[[1, 1, 30, 1, 30, 30], [-1e8, 1, 30, 1, 30, 30]]",
        "longer side outside (annotation 0: -1e+08",
    ),
    "to and fro": (
        json.dumps([[-800, 0, 880, 60] * 1300]),
        "more than 4,000,000 pixels around (annotation 0: 4,36",
    ),
    "runs that stop early": (
        '{"size": [60, 80], "counts": [10, 5]}',
        "damaged runs (annotation 0: runs of 15 pixels in all, wanted 4800)",
    ),
    "runs that go on": ('{"size": [60, 80], "counts": [10, 4791]}', "runs of 4801 pixels in all"),
    "no runs": ('{"size": [60, 80], "counts": []}', "damaged runs (annotation 0: an empty run-length text)"),
    "no text": ('{"size": [60, 80], "counts": ""}', "damaged runs (annotation 0: an empty run-length text)"),
    "a negative run": ('{"size": [60, 80], "counts": [10, -5, 4795]}', "runs (annotation 0: run 1 is"),
    "a run of 1e30": ('{"size": [60, 80], "counts": [1e30]}', "damaged runs (annotation 0: run 0 is"),
    "a run of NaN": ('{"size": [60, 80], "counts": [4800, NaN]}', "damaged runs (annotation 0: run 1 is"),
    "a run as text": ('{"size": [60, 80], "counts": ["4800"]}', "damaged runs (annotation 0: run 0 is"),
    "Python's repr of bytes": (
        json.dumps({"size": [60, 80], "counts": repr(rle_of(MASK)["counts"].encode())}),
        "write counts.decode(\"ascii\") (annotation 0)",
    ),
    "base64": ('{"size": [60, 80], "counts": "eJwz0DEAAAKgAQ=="}', "outside the alphabet"),
    "no ASCII": ('{"size": [60, 80], "counts": "é"}', "outside the alphabet"),
    "a text cut short": (
        json.dumps({"size": [60, 80], "counts": rle_of(MASK)["counts"][:-2]}),
        "damaged runs (annotation 0: ",
    ),
    "counts of null": ('{"size": [60, 80], "counts": null}', "counts of type NoneType"),
    "no counts": ('{"size": [60, 80]}', "neither polygons nor runs"),
    "width before height": ('{"size": [80, 60], "counts": [4800]}', "(annotation 0: [80, 60], wanted [60, 8"),
    "no size": ('{"counts": [4800]}', "(annotation 0: null, wanted [60, 80])"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED_MASKS)
def test_a_mask_that_pycocotools_would_hang_or_guess_at_is_refused_with_the_id(
    kind: str, tmp_path: Path
) -> None:
    segmentation, said = REFUSED_MASKS[kind]
    began = time.perf_counter()

    found = refusal(file_of(segmentation), tmp_path)

    assert said in found
    assert "Fix them or take them out of the file" in found
    assert time.perf_counter() - began < 5


def test_one_flat_polygon_as_via_writes_it_is_one_part_and_counted(tmp_path: Path) -> None:
    truth = read(file_of("[10, 10, 40, 10, 40, 40, 10, 40]"), tmp_path)

    assert only(truth).counts == as_pycocotools(file_of(SQUARE))
    assert truth.rules == {"annotations with one flat polygon, read as one part": 1}


@pytest.mark.parametrize("part", ["[]", "[5, 5]", "[5.5, 5, 70, 50]"])
@pytest.mark.parametrize("first", [True, False])
def test_a_part_of_one_or_two_points_is_left_out_and_counted(part: str, first: bool, tmp_path: Path) -> None:
    """What pycocotools draws of it, where it draws it at all, has no pixel."""
    whole = "[10, 10, 40, 10, 40, 40]"

    truth = read(file_of(f"[{part}, {whole}]" if first else f"[{whole}, {part}]"), tmp_path)

    assert only(truth).counts == as_pycocotools(file_of(f"[{whole}]"))
    if not first:
        assert only(truth).counts == as_pycocotools(file_of(f"[{whole}, {part}]"))
    [(rule, number)] = truth.rules.items()
    assert (rule.startswith("annotations with parts of one or two points"), number) == (True, 1)


@pytest.mark.parametrize("seed", range(30))
def test_polygons_are_drawn_as_pycocotools_draws_them(seed: int, tmp_path: Path) -> None:
    """In the picture, across its edges, far outside, degenerate, closed or not, of ints and floats."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(int(rng.integers(1, 5))):
        reach = float(rng.choice([0, 30, 500]))
        points = rng.uniform([-reach, -reach], [80 + reach, 60 + reach], (int(rng.integers(3, 30)), 2))
        points = np.round(points, int(rng.integers(0, 3)))
        if rng.random() < 0.3:
            points[1:] = points[0]
        if rng.random() < 0.3:
            points = np.concatenate([points, points[:1]])
        parts.append([int(v) if v == int(v) and seed % 2 else float(v) for v in points.ravel()])
    text = file_of(json.dumps(parts))

    assert only(read(text, tmp_path)).counts == as_pycocotools(text)


@pytest.mark.parametrize("count", [255, 256, 257, 1000])
def test_an_object_of_very_many_parts_is_their_union(count: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(count)
    corners = rng.uniform(0, 70, (count, 1, 2)) + rng.uniform(0, 9, (count, 3, 2))
    text = file_of(json.dumps(corners.reshape(count, 6).round(2).tolist()))

    assert only(read(text, tmp_path)).counts == as_pycocotools(text)


@pytest.mark.parametrize("far", [-800, 880])
def test_a_polygon_may_reach_ten_sides_out_and_no_further(far: float, tmp_path: Path) -> None:
    text = file_of(f"[[10, 10, {far}, 10, 40, 40]]")

    assert only(read(text, tmp_path)).counts == as_pycocotools(text)
    further = far + np.sign(far)
    assert "10 times the picture's longer side outside" in refusal(
        text.replace(str(far), str(further)), tmp_path
    )


def test_the_longest_outline_that_is_taken_is_drawn_in_seconds(tmp_path: Path) -> None:
    steps = MAX_OUTLINE // 1760 // 2 * 2
    polygon = [[0 if n % 2 else 1760, n / steps] for n in range(steps)]
    image = '{"id": 0, "height": 1000, "width": 1760}'
    began = time.perf_counter()

    truth = read(file_of(json.dumps([np.ravel(polygon).tolist()]), image=image), tmp_path)

    assert only(truth).counts
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("seed", range(3))
def test_runs_of_both_kinds_are_the_mask(seed: int, tmp_path: Path) -> None:
    mask = blob(seed, SIZE)
    listed = json.dumps({"size": list(SIZE), "counts": lengths_of(mask)})
    as_floats = listed.replace("[60, 80]", "[60.0, 80.0]")

    for segmentation in (json.dumps(rle_of(mask)), listed, as_floats):
        assert only(read(file_of(segmentation), tmp_path)).counts == rle_of(mask)["counts"]


def test_runs_of_no_length_between_others_change_nothing(tmp_path: Path) -> None:
    """Numpy's `diff` of padded masks leaves such runs at the ends, joined masks in the middle."""
    runs = '{"size": [60, 80], "counts": [0, 0, 100, 20, 0, 30, 4650, 0]}'

    one = only(read(file_of(runs, annotation='"id": 0, "image_id": 0, "category_id": 0'), tmp_path))

    flat = np.zeros(4800, np.uint8)
    flat[100:150] = 1
    ours = {"size": list(SIZE), "counts": rle_of(flat.reshape(SIZE, order="F"))["counts"].encode()}
    theirs = {"size": list(SIZE), "counts": one.counts.encode()}
    assert coco_mask.iou([ours], [theirs], [0])[0, 0] == 1
    assert (one.area, list(one.bbox_xywh)) == (50, coco_mask.toBbox(ours).tolist())


@pytest.mark.parametrize(
    "segmentation", ['{"size": [60, 80], "counts": [4800]}', "[[200, 200, 300, 200, 300, 300]]"]
)
def test_a_mask_of_no_pixel_stays_an_object_and_is_counted(segmentation: str, tmp_path: Path) -> None:
    truth = read(file_of(segmentation), tmp_path)

    assert only(truth).area == 900
    assert truth.rules == {"annotations with a mask of no pixel, which nothing can find": 1}


# ---------------------------------------------------------------------------------------------
# The other keys
# ---------------------------------------------------------------------------------------------


def annotation_with(key: str, value: str | None) -> str:
    given = {"id": "0", "image_id": "0", "category_id": "0", "bbox": "[10, 10, 30, 30]", "area": "900"}
    fields = {k: v for k, v in (given | {key: value}).items() if v is not None}
    return file_of(annotation=", ".join(f'"{k}": {v}' for k, v in fields.items()))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("id", "null", "whole number or text as `id` (annotation number 0 (from 0): `id` is null)"),
        ("id", None, "(annotation number 0 (from 0): there is no `id`)"),
        ("id", '""', "(annotation number 0 (from 0)"),
        ("id", "true", "(annotation number 0 (from 0)"),
        ("id", "0.5", "(annotation number 0 (from 0)"),
        ("id", "[1]", "(annotation number 0 (from 0)"),
        ("image_id", "9", "1 of an image that the file does not list (annotation 0: image 9)"),
        ("image_id", '"00"', "(annotation 0: image 00)"),
        ("image_id", "null", "whole number or text as `image_id` (annotation 0: `image_id` is null)"),
        ("image_id", None, "(annotation 0: there is no `image_id`)"),
        ("category_id", "77", "1 of a category that the file does not list (annotation 0: category 77)"),
        ("category_id", '"cat"', '`category_id` that is no whole number (annotation 0: `category_id` is "c'),
        ("category_id", "0.5", "(annotation 0: `category_id` is 0.5)"),
        ("category_id", "null", "(annotation 0: `category_id` is null)"),
        ("category_id", None, "(annotation 0: there is no `category_id`)"),
        ("iscrowd", "2", "`iscrowd` that is neither 0 nor 1 (annotation 0: `iscrowd` is 2)"),
        ("iscrowd", '"no"', "neither 0 nor 1"),
        ("iscrowd", "NaN", "neither 0 nor 1"),
        ("area", "NaN", "`area` that is no number from 0 to 1e+10 (annotation 0: `area` is NaN)"),
        ("area", "-1", "(annotation 0: `area` is -1)"),
        ("area", "1e11", "(annotation 0: `area` is"),
        ("area", '"900"', "(annotation 0: `area` is"),
        ("bbox", "[10, 10, 30]", "not x, y, width, height, finite, sizes from 0 (annotation 0: [10"),
        ("bbox", "[10, 10, NaN, 30]", "(annotation 0: [10, 10, NaN, 30])"),
        ("bbox", "[10, 10, -30, 30]", "(annotation 0: [10, 10, -30, 30])"),
        ("bbox", "[null, null, null, null]", "(annotation 0: [null"),
        ("bbox", '{"x": 1}', '(annotation 0: {"x": 1})'),
    ],
)  # fmt: skip
def test_a_key_that_would_change_a_figure_is_refused_with_the_id(
    key: str, value: str | None, said: str, tmp_path: Path
) -> None:
    assert said in refusal(annotation_with(key, value), tmp_path)


@pytest.mark.parametrize("key", ["id", "image_id", "category_id"])
@pytest.mark.parametrize("value", ["0", "0.0", "-0.0", '"0"'])
def test_an_id_is_the_same_as_a_number_a_float_or_a_text(key: str, value: str, tmp_path: Path) -> None:
    one = only(read(annotation_with(key, value), tmp_path))

    assert (one.annotation_id, one.image_id, one.category_id) == ("0", "0", 0)


@pytest.mark.parametrize(
    ("value", "crowd"),
    [
        *((v, False) for v in ("0", "0.0", "false", "null", '"0"', None)),
        *((v, True) for v in ("1", "1.0", "true", '"1"')),
    ],
)
def test_a_crowd_is_one_however_yes_is_written(value: str | None, crowd: bool, tmp_path: Path) -> None:
    assert only(read(annotation_with("iscrowd", value), tmp_path)).is_crowd == crowd


def test_ignore_is_not_used_as_in_pycocotools_and_that_is_said(tmp_path: Path) -> None:
    truth = read(annotation_with("ignore", "1"), tmp_path)

    assert not only(truth).is_crowd
    assert [number for rule, number in truth.rules.items() if "`ignore`" in rule] == [1]
    assert not read(annotation_with("ignore", "0"), tmp_path).rules


@pytest.mark.parametrize("value", ["null", None])
def test_an_area_that_is_not_there_is_the_masks_and_counted(value: str | None, tmp_path: Path) -> None:
    truth = read(annotation_with("area", value), tmp_path)

    counts = as_pycocotools(file_of(SQUARE)).encode()
    assert only(truth).area == coco_mask.area({"size": list(SIZE), "counts": counts})
    assert truth.rules == {"annotations without `area`: that of the mask": 1}


def test_an_area_of_0_stays_0_and_is_counted(tmp_path: Path) -> None:
    truth = read(annotation_with("area", "0"), tmp_path)

    assert only(truth).area == 0
    assert truth.rules == {"annotations with an `area` of 0 beside a mask: small ones, as in pycocotools": 1}


@pytest.mark.parametrize("value", ["null", None, "[]"])
def test_a_bbox_that_is_not_there_is_the_masks_and_counted(value: str | None, tmp_path: Path) -> None:
    truth = read(annotation_with("bbox", value), tmp_path)

    counts = as_pycocotools(file_of(SQUARE)).encode()
    expected = coco_mask.toBbox({"size": list(SIZE), "counts": counts}).tolist()
    assert list(only(truth).bbox_xywh) == expected
    assert truth.rules == {"annotations without `bbox`: that of the mask": 1}


ODD_BOX = "annotations whose `bbox` does not lie around the mask (other numbers? runs by rows?)"


def test_a_bbox_at_0_0_of_no_size_stays_as_it_is_and_is_counted(tmp_path: Path) -> None:
    truth = read(annotation_with("bbox", "[0, 0, 0, 0]"), tmp_path)

    assert only(truth).bbox_xywh == (0, 0, 0, 0)
    assert truth.rules == {ODD_BOX: 1}


@pytest.mark.parametrize(
    ("bbox", "count"),
    [
        ("[10, 10, 30, 30]", 0),
        ("[5, 5, 38, 38]", 0),
        ("[10, 10, 40, 40]", 0),  # x1, y1, x2, y2 near 0, 0: not to be told
        ("[0.125, 0.1666, 0.375, 0.5]", 1),  # shares
        ("[25, 25, 30, 30]", 1),  # the centre
        ("[0, 0, 1e308, 1e308]", 1),
    ],
)
def test_a_bbox_of_other_numbers_is_counted(bbox: str, count: int, tmp_path: Path) -> None:
    assert read(annotation_with("bbox", bbox), tmp_path).rules == ({ODD_BOX: 1} if count else {})


def test_runs_by_rows_where_coco_has_columns_are_counted(tmp_path: Path) -> None:
    """Many a script writes them so: of the right length, and another mask."""
    mask = np.zeros(SIZE, np.uint8)
    mask[5:10, 10:70] = 1
    by_rows = json.dumps(
        {"size": list(SIZE), "counts": lengths_of(mask.reshape(-1).reshape(SIZE, order="F"))}
    )
    box = '"id": 0, "image_id": 0, "category_id": 0, "bbox": [10, 5, 60, 5], "area": 300'

    assert read(file_of(by_rows, annotation=box), tmp_path).rules == {ODD_BOX: 1}
    assert not read(file_of(json.dumps(rle_of(mask)), annotation=box), tmp_path).rules


def test_polygons_in_shares_of_the_picture_are_counted(tmp_path: Path) -> None:
    keys = '"id": 0, "image_id": 0, "category_id": 0, "area": 0.2'

    shares = read(file_of("[[0.1, 0.2, 0.8, 0.2, 0.8, 1.0]]", annotation=keys), tmp_path)
    corner = read(file_of("[[0.1, 0.2, 0.8, 0.2, 9.8, 1.0]]", annotation=keys), tmp_path)

    rule = "annotations with polygons within 0 to 1 (shares of the picture? wanted: pixels)"
    assert (shares.rules.get(rule), corner.rules.get(rule)) == (1, None)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ('{"file_name": "a.jpg", "height": 60, "width": 80}', "image number 0 (from 0): there is no `id`"),
        ('{"id": 0, "file_name": 7, "height": 60, "width": 80}', "(image 0: `file_name` is 7)"),
        ('{"id": 0, "height": 1e9, "width": 80}', "(image 0: height 1000000000.0, width 80)"),
        ('{"id": 0, "height": 100000, "width": 100000}', "(image 0: height 100000, width 100000)"),
        ('{"id": 0, "height": NaN, "width": 80}', "(image 0: height NaN, width 80)"),
        ('{"id": 0, "height": -60, "width": 80}', "(image 0: height -60, width 80)"),
        ('{"id": 0, "height": 60.5, "width": 80}', "(image 0: height 60.5, width 80)"),
        ('{"id": 0, "height": [60], "width": 80}', "(image 0: height [60], width 80)"),
        ('{"id": 0, "height": 60, "width": 80}, {"id": "0"}', "1 with the id of an earlier one (image 0)"),
        ("7", "1 that are no JSON object (image number 0 (from 0): 7)"),
        ('{"id": 0, "height": 60, "width": 80}, ', "that are no sound JSON (image number 1 (from 0): "),
        ('{"id": 0, "height": 6o, "width": 80}', "that are no sound JSON (image number 0 (from 0): "),
    ],
)
def test_an_image_that_cannot_be_told_apart_or_measured_is_refused(
    image: str, said: str, tmp_path: Path
) -> None:
    assert said in refusal(file_of(image=image), tmp_path)


@pytest.mark.parametrize("height", ["60", "60.0", '"60"', '"60.0"'])
def test_a_size_is_the_same_as_a_number_a_float_or_a_text(height: str, tmp_path: Path) -> None:
    image = f'{{"id": 0, "file_name": null, "height": {height}, "width": 80}}'

    assert read(file_of(image=image), tmp_path).images["0"].size_hw == SIZE


@pytest.mark.parametrize("height", ["0", "null", '""'])
def test_no_size_is_refused_where_a_mask_needs_it(height: str, tmp_path: Path) -> None:
    image = f'{{"id": 0, "file_name": "a.jpg", "height": {height}, "width": 80}}'

    assert "0: " in refusal(file_of(image=image), tmp_path)


@pytest.mark.parametrize(
    ("category", "said"),
    [
        ('{"name": "cat"}', "category number 0 (from 0): there is no `id`"),
        ('{"id": "c", "name": "cat"}', 'category number 0 (from 0): `id` is "c"'),
        ('{"id": 0, "name": 5}', "(category 0: `name` is 5)"),
        ('{"id": 0, "name": "cat"}, {"id": 0.0, "name": "dog"}', 'two names (category 0: "cat" and "dog")'),
        ('"cat"', 'no JSON object (category number 0 (from 0): "cat")'),
        ("", "1 of a category that the file does not list (annotation 0: category 0)"),
    ],
)  # fmt: skip
def test_a_category_that_says_nothing_or_two_things_is_refused(
    category: str, said: str, tmp_path: Path
) -> None:
    assert said in refusal(file_of(category=category), tmp_path)


@pytest.mark.parametrize("category", ['{"id": 0}', '{"id": "0", "name": null}', '{"id": 0.0, "name": ""}'])
def test_a_category_may_have_no_name(category: str, tmp_path: Path) -> None:
    assert read(file_of(category=category), tmp_path).categories == {0: ""}


def test_where_classes_do_not_count_there_need_be_none(tmp_path: Path) -> None:
    text = (
        '{"images": [{"id": 0, "height": 60, "width": 80}], '
        '"annotations": [{"id": 0, "image_id": 0, "segmentation": [[1, 1, 30, 1, 30, 30]]}]}'
    )

    assert only(read(text, tmp_path, classes=False)).category_id is None
    assert only(read(file_of(category='"nonsense"'), tmp_path, classes=False)).category_id is None


def test_all_kinds_of_faults_are_said_at_once_with_how_many_and_three_ids_each(tmp_path: Path) -> None:
    good = {"image_id": 0, "category_id": 0, "segmentation": [[10, 10, 40, 10, 40, 40]]}
    annotations = [
        *({**good, "id": number, "segmentation": []} for number in range(10, 1015)),
        {**good, "id": 3, "area": float("nan")},
        {**good, "id": 4},
        {**good, "id": 4},
        {**good, "id": "\x1b[31m\ud800" + "x" * 10_000, "category_id": 5},
        {**good, "id": 6, "segmentation": {"size": [60, 80], "counts": "b'0'"}},
    ]
    images = [{"id": 0, "height": 60, "width": 80}]
    categories = [{"id": 0, "name": "cat"}]

    said = refusal(
        json.dumps({"annotations": annotations, "images": images, "categories": categories}), tmp_path
    )

    for part in (
        "1,005 without a mask (annotation 10: `segmentation` is []; 11: `segmentation` is []; 12: ",
        "1 with an `area` that is no number",
        "1 with the id of an earlier one (annotation 4)",
        r"1 of a category that the file does not list (annotation \x1b[31m\ud800xxx",
        "Python's",
    ):
        assert part in said
    assert "13:" not in said
