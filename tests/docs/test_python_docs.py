"""Every example of docs/python.md runs as it stands, and a job's rows are those of `predict`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hqlabel.predict import SamHQ
from tests.docs.markdown import blocks, section

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text()
ONE_IMAGE = blocks(section(PAGE, "One image"), "python")
(EVERYTHING,) = blocks(section(PAGE, "Everything in an image"), "python")
(PARTS,) = blocks(section(PAGE, "Parts of the model"), "python")
(RAY_DATA,) = blocks(section(PAGE, "A stage of Ray Data"), "python")
(JOB,) = blocks(section(PAGE, "A whole job"), "python")


@pytest.fixture(autouse=True)
def in_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("code", [*ONE_IMAGE, PARTS])
def test_an_example_of_one_image_runs(code: str) -> None:
    names = run(code)
    if "answer" in names:
        answer = names["answer"]
        assert answer.masks.shape[-2:] == (300, 451)
        assert answer.scores.shape[0] == len(answer) > 0
        shapes = re.findall(r"# bool (\(.*?\)), upright", code) + re.findall(r"# (\(\d.*?\)),", code)
        assert all(str(answer.masks.shape) == shape for shape in shapes)


def test_the_example_of_everything_finds_masks() -> None:
    found = run(EVERYTHING)["found"]
    assert found
    assert all(mask["predicted_iou"] > 0.3 and mask["segmentation"]["size"] == [300, 451] for mask in found)


def test_there_is_an_example_of_each_kind_and_none_is_long() -> None:
    assert len(ONE_IMAGE) == 5
    for code in (*ONE_IMAGE, EVERYTHING, PARTS, RAY_DATA, JOB):
        assert sum(not re.match(r"import |from |$", line) for line in code.splitlines()) <= 7


def test_the_ray_data_example_runs(local_ray: None) -> None:
    (row,) = run(RAY_DATA)["answer"]
    expected = SamHQ.from_pretrained("demo").predict("examples/photos/cat.jpg", boxes=[[50, 20, 400, 290]])
    assert row["masks"][0]["counts"] == expected.rle[0]["counts"]


def test_the_job_of_the_example_has_the_masks_that_predict_returns() -> None:
    answer = run(JOB)["answer"]
    model = SamHQ.from_pretrained("demo")
    assert (answer.images.num_rows, answer.over_budget) == (8, False)
    rows = answer.instances.to_pylist()
    for name in ("cat.jpg", "coins.png"):
        mine = [row for row in rows if row["image_id"] == name]
        boxes = np.array([row["prompt_bbox"] for row in mine])  # xywh
        boxes[:, 2:] += boxes[:, :2]
        found = model.predict(ROOT / "examples" / "photos" / name, boxes=boxes)
        assert [row["segmentation"] for row in mine] == found.rle
        np.testing.assert_array_equal(np.array([row["predicted_iou"] for row in mine]), found.scores)
