"""One meaning of "with a mask", wherever it is said: at least one pixel; empty masks are counted apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from hqlabel.jobs.commands.end_summary import describe_counts
from hqlabel.jobs.commands.estimate import Measured, carry_over, describe
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.job_context import BoxRules, Place
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.ray_execution.metrics import _masks
from hqlabel.pipeline.settings import InputSettings
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import read_manifest
from tests.docs.markdown import blocks
from tests.jobs.cli.test_cli import run
from tests.jobs.made_outputs import MadeImage, blob, make_output
from tests.pipeline.made_units import planned_image, segment

README = Path(__file__).resolve().parents[3] / "README.md"
SIZE = (60, 80)
EMPTY = np.zeros(SIZE, np.uint8)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six boxes: two masks, two empty ones, a crowd and a box that a rule leaves without one."""
    fields = {"boxes": [[1, 1, 9, 9], [5, 5, 70, 50]], "categories": [(0, "zero")] * 2}
    images = [
        MadeImage(image_id="a", masks=[EMPTY, blob(1)], **fields),
        MadeImage(image_id="b", masks=[EMPTY, blob(2)], crowds=[False, True], **fields),
        MadeImage(
            image_id="c", masks=[blob(3), blob(4)], scores=[0.1, 0.9], rules=BoxRules(min_score=0.5), **fields
        ),
    ]
    return make_output(tmp_path_factory.mktemp("job") / "out", images)


def said(*arguments: str) -> str:
    code, out, err = run(*arguments)
    assert code == 0, err
    return out + err


def test_the_manifest_and_the_tables_count_pixels(output: str) -> None:
    counts = read_manifest(Store(Place(uri=output))).counts

    assert (counts.boxes, counts.masks, counts.empty, counts.accepted) == (6, 2, 2, 2)
    assert counts.rejected == {"box_score": 1, "crowd": 1, "empty": 2}
    images = pq.read_table(Path(output) / "images").to_pylist()
    assert [one["num_instances"] for one in images] == [1, 0, 1]
    assert [one["num_accepted"] for one in images] == [1, 0, 1]
    assert [one["status"] for one in images] == ["labelled"] * 3


def test_the_summary_the_status_the_page_and_inspect_say_the_same(output: str, tmp_path: Path) -> None:
    manifest = read_manifest(Store(Place(uri=output)))
    page = tmp_path / "page.html"
    said("report", "--output", output, "--to", str(page))

    lines = dict(describe_counts(manifest))
    assert lines["boxes"] == "6 in all · 2 with a mask, 2 empty · 2 accepted"
    assert (
        "",
        "1 crowd box (iscrowd 1) is a region, no object: it keeps its row without a mask",
    ) in describe_counts(manifest)
    assert "not accepted: empty 2, box_score 1" in lines[""]
    assert "6 given, 2 with a mask, 2 empty" in said("status", "--output", output)
    assert json.loads(run("status", "--output", output, "--json")[1])["boxes"] == {
        "given": 6,
        "masks": 2,
        "empty": 2,
    }
    assert "of 6 boxes, 2 empty besides" in page.read_text()
    assert "2 given, 1 with a mask, 1 empty, 1 accepted" in said(
        "inspect", "--output", output, "a", "--picture", str(tmp_path / "a.png")
    )


def test_the_status_of_units_that_are_not_published_says_the_same(output: str) -> None:
    tables, aside = (
        [Path(output) / name for name in ("manifest.json", "images", "instances")],
        Path(output) / "x",
    )
    aside.mkdir()
    for path in tables:
        path.rename(aside / path.name)
    try:
        assert "6 given, 2 with a mask, 2 empty" in said("status", "--output", output)
    finally:
        for path in tables:
            (aside / path.name).rename(path)
        aside.rmdir()


def test_a_manifest_of_an_earlier_version_is_read_in_this_meaning(output: str, tmp_path: Path) -> None:
    content = json.loads((Path(output) / "manifest.json").read_text())
    for counts in [content["counts"], *(part["counts"] for part in content["parts"])]:
        counts["masks"] += counts.pop("empty")
    (tmp_path / "manifest.json").write_text(json.dumps(content))

    counts = read_manifest(Store(Place(uri=str(tmp_path)))).counts

    assert (counts.masks, counts.empty) == (2, 2)


def test_merged_tables_count_the_same(output: str, tmp_path: Path) -> None:
    other = make_output(tmp_path / "other", [MadeImage(image_id="z", masks=[EMPTY], boxes=[[1, 1, 9, 9]])])

    code, out, err = run("publish", "--output", str(tmp_path / "all"), "--merge", output, other, "--json")

    assert code == 0, err
    counts = json.loads(out)["counts"]
    assert (counts["boxes"], counts["masks"], counts["empty"]) == (7, 2, 3)


def test_the_query_of_the_readme_counts_the_same(
    output: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "out").symlink_to(output)
    monkeypatch.chdir(tmp_path)
    query = next(block for block in blocks(README.read_text(), "sql") if "masks" in block)

    found = duckdb.sql(query)

    row = dict(zip(found.columns, found.fetchall()[0], strict=True))
    assert (row["boxes"], row["masks"]) == (6, 2)


def test_the_report_counts_the_masks_of_a_class_and_of_a_score_alike(output: str, tmp_path: Path) -> None:
    said("report", "--output", output, "--to", str(tmp_path / "page.html"))

    cells = re.search(r"<tr><td>zero.*?</tr>", (tmp_path / "page.html").read_text())[0]
    assert re.findall(r"<td>([\d,]+)</td>", cells)[:3] == ["3", "6", "2"]  # images, boxes, masks


def test_a_metric_counts_masks_with_a_pixel() -> None:
    image = ImageResult(planned=planned_image(), instances=segment([EMPTY, blob(1)]))

    assert _masks(image) == 1
    assert _masks(ImageResult(planned=planned_image())) == 0


def test_the_sample_of_a_plan_says_boxes_and_masks_apart(tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_text("image_uri,x1,y1,x2,y2\na.jpg,0,0,4,5\n")
    plan = make_plan(InputSettings(boxes=str(tmp_path / "boxes.csv")))
    measured = Measured(
        images=10, images_per_unit=5, failed=0, boxes=1222, masks=435, empty=787, start_s=1.0,
        images_per_s=1.0, row_bytes=10, part_bytes=10, actors=1, gpus=0, device="cpu",
    )  # fmt: skip

    lines = dict(describe(carry_over(measured, plan, left=1, usd_per_gpu_hour=None)))

    assert lines["sample"].startswith("10 images, 1,222 boxes, 435 with a mask, 787 empty: ")
