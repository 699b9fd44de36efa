"""Likely mistakes are found from the boxes and a few pictures before any work, each with its flag."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hqlabel.model.rle import compress_lengths
from hqlabel.pipeline.errors import JobRefused, UsageError
from hqlabel.pipeline.images.decode_upright import decode_image, measure_image
from hqlabel.pipeline.job_context import AccessRules, BoxRules
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.planning.preview import PICTURES, preview_pictures, with_preview_warnings
from hqlabel.pipeline.settings import BoxFrame, InputSettings, Limits

LIMITS = Limits()
STORED_WH = (320, 200)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 photographs, every third one turned by EXIF."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(40):
        exif = Image.Exif()
        if index % 3 == 0:
            exif[0x0112] = 6
        Image.new("RGB", STORED_WH, (index, 9, 9)).save(folder / f"{index:03d}.jpg", exif=exif)
    return folder


def boxes_by_name(kind: str) -> dict[str, np.ndarray]:
    """Four boxes for every photograph, right or with one mistake."""
    rng = np.random.default_rng(0)
    found = {}
    for index in range(40):
        turned = index % 3 == 0
        width, height = STORED_WH[::-1] if turned else STORED_WH
        start = rng.uniform(0, (0.5 * width, 0.5 * height), (4, 2))
        extent = rng.uniform(9, (0.4 * width, 0.4 * height), (4, 2))
        boxes = np.concatenate([start, start + extent], axis=1)
        if "xywh" in kind:
            boxes = np.concatenate([start, extent], axis=1)
        if "stored" in kind and turned:  # orientation 6: a quarter clockwise makes it upright
            boxes = np.stack([boxes[:, 1], width - boxes[:, 2], boxes[:, 3], width - boxes[:, 0]], axis=1)
        if "normalised" in kind:
            boxes = boxes / [width, height, width, height]
        found[f"{index:03d}.jpg"] = boxes
    return found


def table(path: Path, kind: str, rename: str = "{}") -> Path:
    named = boxes_by_name(kind)
    ids = [rename.format(name) for name in named]
    pq.write_table(pa.table({"image_id": ids, "boxes": [b.tolist() for b in named.values()]}), path)
    return path


def flags(photos: Path, boxes: Path, **settings: str) -> list[str]:
    """What a new job would warn of: the end of each sentence, which is the flag to set."""
    plan = make_plan(InputSettings(images=str(photos), boxes=str(boxes), **settings))  # type: ignore[arg-type]
    return [line[line.rindex("--") :] for line in with_preview_warnings(plan, LIMITS).summary.warnings]


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("right", None),
        ("normalised", "--box-format xyxy-normalised"),
        ("xywh", "--box-format xywh"),
        ("xywh normalised", "--box-format xywh-normalised"),
        ("stored", "--box-frame stored"),
    ],
)
def test_a_mistake_is_warned_of_and_its_flag_ends_the_warning(
    photos: Path, tmp_path: Path, kind: str, flag: str | None
) -> None:
    path = table(tmp_path / "boxes.parquet", kind)

    stated = {"box_format": "xyxy"} if "normalised" in kind else {}  # else they are refused
    assert set(flags(photos, path, **stated)) == ({flag} if flag else set())
    if flag:
        option, value = flag.removeprefix("--").replace("-", "_", 1).split()
        assert flags(photos, path, **{option: value}) == []


def test_a_frame_that_was_stated_wrongly_is_warned_of_too(photos: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "boxes.parquet", "right")

    assert flags(photos, path, box_frame="stored") == ["--box-frame upright"]


def test_corners_in_a_coco_file_are_warned_of_once(photos: Path, tmp_path: Path) -> None:
    named = boxes_by_name("right")
    images = [{"id": i, "file_name": n, "width": 320, "height": 200} for i, n in enumerate(named)]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": boxes[0].tolist()}
        for i, boxes in enumerate(named.values())
    ]
    coco = tmp_path / "coco.json"
    coco.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))

    assert flags(photos, coco) == ["--box-format xyxy"]


@pytest.mark.parametrize(
    ("rename", "why"), [("other-{}", "Fix --images or --boxes"), ("x/{}", "they agree but for the folder")]
)
def test_ids_that_match_nothing_are_refused_with_examples(
    photos: Path, tmp_path: Path, rename: str, why: str
) -> None:
    path = table(tmp_path / "boxes.parquet", "right", rename)

    with pytest.raises(JobRefused, match="(?i)" + why) as caught:
        make_plan(InputSettings(images=str(photos), boxes=str(path)))
    assert "160 boxes of 40 images" in str(caught.value)
    assert "000.jpg" in str(caught.value)
    assert "--allow-unmatched" in str(caught.value)


def test_pictures_that_are_not_there_are_said_before_work(tmp_path: Path) -> None:
    path = table(tmp_path / "boxes.parquet", "right")
    plan = make_plan(InputSettings(boxes=str(with_uris(path))))
    [sentence] = preview_pictures(plan.table, BoxRules(), plan.access, LIMITS)

    assert f"{PICTURES} of {PICTURES} pictures checked cannot be opened, most with not_found" in sentence
    assert sentence.endswith("--set input.image_root=FOLDER")


@pytest.mark.parametrize(
    ("missing", "is_said"),
    [
        (lambda i: i % 2 == 0, True),
        (lambda i: i % 2 == 1, True),
        (lambda i: i < 20, True),
        (lambda i: i % 4 != 0, True),
        (lambda i: i == 17, False),
        (lambda i: False, False),
    ],
)
@pytest.mark.parametrize("listed", [64, 9])
def test_pictures_of_which_half_are_missing_are_said_before_work(
    photos: Path, tmp_path: Path, missing: Callable[[int], bool], is_said: bool, listed: int
) -> None:
    """However the missing ones alternate: 64 rows in steps of two would all be one kind."""
    names = [f"{i:03d}-{'gone' if missing(i % 40) else 'here'}.jpg" for i in range(listed)]
    for i, name in enumerate(names):
        if not missing(i % 40):
            (tmp_path / name).symlink_to(photos / f"{i % 40:03d}.jpg")
    path = tmp_path / "i.parquet"
    pq.write_table(pa.table({"image_uri": names, "boxes": [[[9.0, 9.0, 99.0, 99.0]]] * listed}), path)
    plan = make_plan(InputSettings(boxes=str(path)), AccessRules(roots=(str(photos),)))

    found = " ".join(preview_pictures(plan.table, BoxRules(), plan.access, LIMITS))

    count = min(PICTURES, listed)
    assert (f"of {count} pictures checked cannot be opened, most with not_found" in found) == is_said
    assert ("-gone.jpg" in found) == is_said


def test_names_of_windows_and_of_the_web_are_said_to_be_odd(tmp_path: Path) -> None:
    for name, words in (("a\\b.jpg", "backslashes"), ("a%20b.jpg", "percent"), ("a.jpg ", "white space")):
        path = tmp_path / "i.parquet"
        pq.write_table(pa.table({"image_uri": [name], "boxes": [[[9.0, 9.0, 99.0, 99.0]]]}), path)
        plan = make_plan(InputSettings(boxes=str(path)))
        [sentence] = preview_pictures(plan.table, BoxRules(), plan.access, LIMITS)
        assert f"the name has {words}" in sentence


def test_a_detector_makes_every_picture_count(tmp_path: Path) -> None:
    path = tmp_path / "i.csv"
    path.write_text("image_uri\ngone.jpg\n")
    plan = make_plan(InputSettings(images=str(path)))

    assert preview_pictures(plan.table, BoxRules(), plan.access, LIMITS) == ()
    warnings = preview_pictures(plan.table, BoxRules(), plan.access, LIMITS, detected=True)
    assert "1 of 1 pictures" in " ".join(warnings)
    assert "1 of 1 pictures" in " ".join(with_preview_warnings(plan, LIMITS, detected=True).summary.warnings)


def with_uris(path: Path) -> Path:
    found = pq.read_table(path)
    pq.write_table(found.rename_columns(["image_uri", "boxes"]), path)
    return path


def test_a_store_that_cannot_be_reached_from_here_does_not_stop_planning(
    moto_s3, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = AccessRules(options={"s3": {**moto_s3.options, "profile": "no-such-profile"}})
    rows = [
        {"image_uri": "s3://bucket/a.jpg", "boxes": [{"given": [1.0, 2.0, 3.0, 4.0]}], "error_code": None}
    ]
    kind = pa.list_(pa.struct([("given", pa.list_(pa.float64()))]))
    schema = pa.schema([("image_uri", pa.string()), ("boxes", kind), ("error_code", pa.string())])
    [sentence] = preview_pictures(pa.Table.from_pylist(rows, schema=schema), BoxRules(), access, LIMITS)

    assert sentence.startswith("no picture could be checked from this machine: credentials")


def test_images_without_boxes_are_not_looked_at(photos: Path) -> None:
    plan = make_plan(InputSettings(images=str(photos)))

    assert preview_pictures(plan.table, BoxRules(), AccessRules(), LIMITS) == ()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_header_tells_the_sizes_that_decoding_finds(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture"
    Image.new("RGB", STORED_WH).save(path, kind, exif=exif)
    measured = measure_image(path.read_bytes(), max_pixels=10**6, side=1)
    decoded = decode_image(path.read_bytes(), max_pixels=10**6, side=64)

    assert measured.size_hw == decoded.size_hw
    assert measured.stored_size_hw == decoded.stored_size_hw
    assert measured.exif_orientation == decoded.exif_orientation


def test_masks_of_another_size_than_their_picture_are_warned_of(photos: Path, tmp_path: Path) -> None:
    width, height = STORED_WH
    whole = compress_lengths([0, width * height])
    rows = [
        {"image_id": f"{i:03d}.jpg", "bbox": [1, 2, 3, 4], "prompt_mask": {"size": size, "counts": whole}}
        for i, size in (
            (1, [height, width]),
            (2, [width, height]),
            (3, [height, width]),
            (6, [width, height]),
        )
    ]  # 3 and 6 are turned by EXIF, so that they stand upright
    rows.append({"image_id": "004.jpg", "bbox": [1, 2, 3, 4], "prompt_mask": "no mask, which planning says"})
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))

    plan = make_plan(InputSettings(images=str(photos), boxes=str(tmp_path / "boxes.jsonl")))
    [sentence] = preview_pictures(plan.table, BoxRules(), plan.access, LIMITS)

    assert plan.summary.invalid_prompts == 1
    assert sentence.startswith("2 of 4 masks checked are of another size than their picture")
    assert f"such as [{width}, {height}] for 002.jpg, which is {height} high and {width} wide" in sentence


@pytest.mark.parametrize(
    ("points", "frame", "said"),
    [
        (
            [[0.2, 0.0], [0.5, 0.9], [1.0, 1.0]],
            "upright",
            "nearly all of 12 points checked lie within",
        ),
        ([[0.2, 0.0], [30.0, 9.0], [1.0, 1.0]], "upright", None),
        ([[0.0, 0.0], list(STORED_WH), [5.0, 5.0]], "stored", None),
        (
            [[1.0, 2.0], [STORED_WH[0] + 1.0, 9.0], [9.0, 9.0]],
            "stored",
            "4 of 12 points checked lie out",
        ),
    ],
)
def test_points_as_shares_or_outside_their_picture_are_warned_of(
    photos: Path, tmp_path: Path, points: list[list[float]], frame: BoxFrame, said: str | None
) -> None:
    """Points of the label -1 fill up and lie nowhere; labels and points of unlike number are the plan's."""
    prompt = {"bbox": [1, 2, 30, 31], "points": [*points, [9e9, -1]], "point_labels": [1, 0, 1, -1]}
    rows = [{"image_id": f"{i:03d}.jpg", **prompt} for i in range(4)]
    rows.append({"image_id": "004.jpg", "bbox": [1, 2, 30, 31], "points": [[9e9, 0]], "point_labels": []})
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = InputSettings(images=str(photos), boxes=str(tmp_path / "boxes.jsonl"), box_frame=frame)
    plan = make_plan(settings)

    found = preview_pictures(plan.table, BoxRules(box_frame=frame), plan.access, LIMITS)

    about = [sentence for sentence in found if "point" in sentence]
    assert [sentence.startswith(said or "-") for sentence in about] == [True] * bool(said)


@pytest.mark.parametrize(("of_four", "stops"), [(1, False), (2, True), (4, True)])
def test_a_driver_that_is_missing_for_most_pictures_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_four: int, stops: bool
) -> None:
    def fetch(uri: str, *_: object) -> None:
        if int(Path(uri).stem) < of_four:
            raise UsageError("no driver for gs:// uris here; install it: pip install 'hqlabel[gcs]'")
        raise RuntimeError("a bug")

    monkeypatch.setattr("hqlabel.pipeline.images.fetch.fetch_object", fetch)
    path = tmp_path / "i.parquet"
    uris = [f"gs://b/{number}.jpg" for number in range(4)]
    pq.write_table(pa.table({"image_uri": uris, "boxes": [[[9.0, 9.0, 99.0, 99.0]]] * 4}), path)
    plan = make_plan(InputSettings(boxes=str(path)))

    if stops:
        with pytest.raises(UsageError, match=r"hqlabel\[gcs\]"):
            preview_pictures(plan.table, BoxRules(), plan.access, LIMITS)
    else:
        [sentence] = preview_pictures(plan.table, BoxRules(), plan.access, LIMITS)
        assert sentence.startswith("no picture could be checked from this machine")
