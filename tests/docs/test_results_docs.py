"""The recipes of docs/results.md run unchanged and return what a user expects."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.docs.markdown import blocks, section
from tests.jobs.cli.test_cli import run
from tests.jobs.made_outputs import MadeImage, blob, make_output

RECIPES = section((Path(__file__).resolve().parents[2] / "docs" / "results.md").read_text(), "Recipes")
SIZE = (30, 50)
PYTHON = {"polars": 0, "datasets": 1, "torch": 2, "fiftyone": 3}


@pytest.fixture
def folder_with_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `out`: images of 0, 1 and 2 masks, one turned by EXIF, one failed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    images, photos = [], tmp_path / "photos"
    photos.mkdir()
    for n in range(5):
        size = SIZE[::-1] if n == 2 else SIZE
        exif = Image.Exif()
        exif[0x0112] = 6 if n == 2 else 1
        Image.new("RGB", SIZE[::-1]).save(photos / f"{n}.jpg", exif=exif)
        images.append(
            MadeImage(
                image_id=f"{n}.jpg", size_hw=size, masks=[blob(9 * n + k, size) for k in range(n % 3)],
                categories=[(1, "cat")] * (n % 3), uri=str(photos / f"{n}.jpg"),
                predicted_iou=[0.9] * (n % 3), exif=6 if n == 2 else 1, error="not_found" if n == 4 else None,
            )
        )  # fmt: skip
    make_output(tmp_path / "out", images)
    return tmp_path


def run_python(name: str) -> dict[str, Any]:
    """Return the variables of the recipe after it ran."""
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(blocks(RECIPES, "python")[PYTHON[name]], f"recipe of {name}", "exec"), names)
    return names


def test_the_queries_answer(folder_with_out: Path) -> None:
    kept, failures = (duckdb.sql(query).fetchall() for query in blocks(RECIPES, "sql"))

    assert kept == [("cat", 3, 3)]
    assert [row[:2] for row in failures] == [("not_found", 1)]


def test_polars_lists_the_images_whose_masks_are_all_good(
    folder_with_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_python("polars")

    assert capsys.readouterr().out.strip() == str(
        [str(folder_with_out / "photos" / name) for name in ("1.jpg", "2.jpg")]
    )


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_datasets_streams_the_tables(folder_with_out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_python("datasets")

    lines = capsys.readouterr().out.splitlines()
    assert lines == ["1.jpg cat (30, 50)", "2.jpg cat (50, 30)", "2.jpg cat (50, 30)"]


def test_a_torch_loader_gives_pictures_with_masks_of_their_size(
    folder_with_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_python("torch")

    assert capsys.readouterr().out.splitlines() == ["(3, 30, 50) 1 [1]", "(3, 50, 30) 2 [1, 1]"]


@pytest.mark.skipif(importlib.util.find_spec("fiftyone") is None, reason="fiftyone is not installed")
@pytest.mark.filterwarnings("ignore")
def test_fiftyone_reads_every_mask_through_coco(
    folder_with_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("export", "coco", "--output", "out", "--to", "out-coco")
    assert code == 0, err

    labels = run_python("fiftyone")["labels"]

    assert capsys.readouterr().out.splitlines()[-1] == "3 masks, 0 doubtful"
    coco = json.loads((folder_with_out / "out-coco" / "instances.json").read_text())
    names = {one["id"]: one["file_name"] for one in coco["images"]}
    read = {
        (Path(one.filepath).name, mask.instance_index): mask
        for one in labels
        for mask in one.ground_truth.detections
    }
    assert len(read) == len(coco["annotations"]) == 3
    for one in coco["annotations"]:
        mask = read[names[one["image_id"]], one["instance_index"]]
        x, y, width, height = one["bbox"]
        whole = coco_mask.decode(one["segmentation"])
        assert np.array_equal(mask.mask, whole[y : y + height, x : x + width])
        assert mask.label == "cat"
