"""Masks of one image in Python: which images and prompts it takes, and what comes back."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco

import hqlabel
from hqlabel.model.records import Prompts
from hqlabel.pipeline.errors import ImageError
from hqlabel.predict import SamHQ
from hqlabel.ray_data_stage import SegmentImages
from tests.parity.hq_sam2_recipe import write_published

PHOTO = Path(__file__).parents[2] / "examples" / "photos" / "cat.jpg"
BOX = [50, 20, 400, 290]


@pytest.fixture(scope="module")
def model() -> SamHQ:
    return SamHQ.from_pretrained("demo", dtype="float32")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.array(ImageOps.exif_transpose(Image.open(PHOTO)).convert("RGB"))


def test_importing_the_package_brings_neither_torch_nor_ray() -> None:
    code = "import sys, hqlabel; dir(hqlabel); assert not {'torch', 'ray', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'SamHq'"):
        _ = hqlabel.SamHq
    assert set(hqlabel.__all__) <= set(dir(hqlabel))


def test_every_kind_of_image_gives_the_same_masks(model: SamHQ, pixels: np.ndarray) -> None:
    picture = Image.open(PHOTO)
    answers = [
        model.predict(image, boxes=BOX) for image in (PHOTO, str(PHOTO), PHOTO.read_bytes(), picture, pixels)
    ]
    assert answers[0].masks.any()
    for answer in answers[1:]:
        assert answer.rle == answers[0].rle
        np.testing.assert_array_equal(answer.scores, answers[0].scores)


def test_orientation_is_applied_to_files_and_pillow_images(model: SamHQ, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    out = io.BytesIO()
    Image.fromarray(np.rot90(pixels).copy()).save(out, "PNG", exif=exif)
    upright = model.predict(pixels, boxes=BOX)
    for image in (out.getvalue(), Image.open(out)):
        turned = model.predict(image, boxes=BOX)
        assert turned.size_hw == upright.size_hw == pixels.shape[:2]
        assert turned.rle == upright.rle


def test_masks_are_the_runs_and_pycocotools_agrees(model: SamHQ, pixels: np.ndarray) -> None:
    answer = model.predict(pixels, boxes=[BOX, [100, 60, 300, 200]])
    assert len(answer) == 2
    assert answer.masks.shape == (2, *pixels.shape[:2])
    assert answer.masks.dtype == np.bool_
    for mask, rle in zip(answer.masks, answer.rle, strict=True):
        np.testing.assert_array_equal(mask, coco.decode(rle).astype(bool))


def test_no_boxes_give_no_masks(model: SamHQ, pixels: np.ndarray) -> None:
    answer = model.predict(pixels, boxes=np.zeros((0, 4)))
    assert (len(answer), answer.masks.shape, answer.scores.shape) == (0, (0, *pixels.shape[:2]), (0,))


def test_three_masks_are_those_of_the_network_sorted_by_score(model: SamHQ, pixels: np.ndarray) -> None:
    answer = model.predict(pixels, points=[[220, 150]], multimask="three")
    prompts = Prompts(points_xy=np.array([[[220.0, 150.0]]]), point_labels=np.array([[1]]))
    logits = model.network.decode_prompts(model.network.encode_images([pixels]), [prompts], multimask="three")
    np.testing.assert_array_equal(answer.scores, logits.predicted_iou_NM.numpy())
    assert answer.masks.shape == (1, 3, *pixels.shape[:2])
    assert (np.diff(answer.scores[0]) <= 0).all()
    best = model.predict(pixels, points=[[220, 150]], multimask="best")
    assert best.rle == [answer.rle[0][0]]


def test_points_of_several_objects_and_labels_change_the_masks(model: SamHQ, pixels: np.ndarray) -> None:
    one = model.predict(pixels, points=[[220, 150], [60, 60]], labels=[1, 1])
    other = model.predict(pixels, points=[[220, 150], [60, 60]], labels=[1, 0])
    both = model.predict(pixels, points=[[[220, 150], [60, 60]]] * 2, labels=[[1, 1], [1, 0]])
    assert one.rle != other.rle
    assert both.rle == one.rle + other.rle


def test_a_mask_is_a_hint_that_counts(model: SamHQ, pixels: np.ndarray) -> None:
    rough = np.zeros(pixels.shape[:2], bool)
    rough[60:250, 120:360] = True
    plain = model.predict(pixels, points=[[220, 150]])
    hinted = model.predict(pixels, points=[[220, 150]], mask=rough)
    assert plain.rle != hinted.rle


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "no prompt"),
        ({"labels": [1]}, "labels without points"),
        ({"boxes": [1, 2, 3]}, r"4"),
        ({"boxes": [[[1, 2, 3, 4]]]}, r"boxes has shape \(1, 1, 4\); wanted \(4,\) or \(N, 4\)"),
        ({"points": [3, 4]}, r"points has shape \(2,\)"),
        ({"points": [[3, 4]], "labels": [2]}, "label"),
        ({"points": [[3, 4]], "labels": [1, 1]}, "label"),
        ({"mask": np.zeros((5, 5), bool)}, r"a mask has size 5x5; wanted .* 300x451"),
        ({"boxes": [[1, 2, 3, 4]], "points": [[[3, 4]], [[5, 6]]]}, "prompts"),
    ],
)
def test_prompts_that_cannot_be_meant_are_refused(
    model: SamHQ, pixels: np.ndarray, prompts: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.predict(pixels, **prompts)  # type: ignore[arg-type]


def test_pictures_and_arrays_that_are_none_are_refused_by_name(model: SamHQ) -> None:
    with pytest.raises(ImageError, match="not_an_image"):
        model.predict(b"no picture", boxes=BOX)
    with pytest.raises(ValueError, match=r"shape \(5, 5\) and dtype float64"):
        model.predict(np.zeros((5, 5)), boxes=BOX)
    with pytest.raises(FileNotFoundError):
        model.predict("missing.jpg", boxes=BOX)


def test_hq_sam_2_is_a_model_like_any_other(pixels: np.ndarray, tmp_path: Path) -> None:
    folder = str(write_published(tmp_path / "weights"))
    model = SamHQ.from_pretrained(folder, dtype="float32")
    answer = model.predict(PHOTO, boxes=[BOX, [100, 60, 300, 200]])
    stage = SegmentImages(folder, dtype="float32", allow_roots=[str(PHOTO.parent)])
    table = pa.table({"image": [PHOTO.read_bytes()], "boxes": [[BOX, [100.0, 60.0, 300.0, 200.0]]]})
    (row,) = stage(table).to_pylist()

    assert model.weights.layout == "hq_sam2"
    assert answer.size_hw == pixels.shape[:2]
    assert 0 < answer.masks.mean() < 1
    assert [dict(one) for one in row["masks"]] == answer.rle
    three = model.predict(pixels, points=[[220, 150]], multimask="three")
    assert (np.diff(three.scores, axis=1) <= 0).all(), "best first, whatever the order of the tokens"
    assert three.masks.shape == (1, 3, *pixels.shape[:2])
    best = model.predict(pixels, points=[[220, 150]], multimask="best")
    assert best.rle[0] == three.rle[0][0]


def test_everything_comes_as_runs_with_what_each_was_made_of(model: SamHQ, pixels: np.ndarray) -> None:
    settings = {"pred_iou": 0.2, "stability": 0.2, "stability_offset": 0.1, "crop_layers": 1}
    found = model.generate(PHOTO, 2, **settings)
    assert found
    for mask in found:
        assert coco.area(mask["segmentation"]) == mask["area"]
        assert coco.toBbox(mask["segmentation"]).tolist() == mask["bbox"]
        (x, y), (left, top, width, height) = mask["point_coords"][0], mask["crop_box"]
        assert left < x < left + width <= pixels.shape[1]
        assert top < y < top + height <= pixels.shape[0]
        assert mask["predicted_iou"] > 0.2
        assert mask["stability_score"] >= np.float32(0.2)
    whole = model.generate(pixels, 2, pred_iou=0.0, stability=0.0)
    assert model.generate(PHOTO, 2, pred_iou=0.0, stability=0.0) == whole
