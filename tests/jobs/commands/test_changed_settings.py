"""Started again with other settings or other inputs: what the real commands say, and do, before any work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.e2e import commands


def hqlabel(*arguments: str, code: int = 0) -> str:
    """What the command says; the model is a stub, all else is the product."""
    command = [sys.executable, "-m", "tests.faults.stub_cli", *arguments]
    if arguments[0] in ("label", "retry"):
        command += ["--no-progress", "--set", "cluster.actors=1"]
    done = subprocess.run(
        command, cwd=commands.REPOSITORY, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def write_boxes(path: Path, boxes: dict[str, list]) -> None:
    rows = [json.dumps({"image_uri": uri, "boxes": given}) for uri, given in boxes.items()]
    path.write_text("\n".join(rows) + "\n")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for number in range(6):
        folder = "elsewhere" if number == 5 else "photos"
        size = (200, 200) if number == 4 else (80, 60)
        Image.new("RGB", size, (10 * number, 99, 30)).save(tmp_path / folder / f"{number}.png")
    boxes = {f"{number}.png": [[5, 5, 40, 40]] for number in range(5)}
    boxes[str(tmp_path / "elsewhere" / "5.png")] = [[5, 5, 40, 40]]
    write_boxes(tmp_path / "photos" / "boxes.jsonl", boxes)
    return tmp_path / "photos"


@pytest.mark.faults
def test_a_resume_and_a_retry_keep_to_what_the_job_began_with(photos: Path, tmp_path: Path) -> None:
    output, elsewhere = str(tmp_path / "out"), str(tmp_path / "elsewhere")
    base = ("label", "--boxes", str(photos / "boxes.jsonl"), "--checkpoint", "demo", "--output", output)
    base = (*base, "--set", "limits.max_failure_rate=1", "--set", "output.images_per_unit=2")
    limit = ("--set", "limits.max_image_pixels=10000")
    hqlabel(*base, *limit, "--allow-root", elsewhere, "--slice", "1/3")

    narrower = hqlabel(*base, *limit, code=4)
    other = hqlabel(*base, "--set", "limits.max_image_pixels=20000", "--allow-root", elsewhere, code=4)
    hqlabel(*base, *limit, "--allow-root", elsewhere)

    assert f"(add --allow-root {elsewhere})" in narrower
    assert "limits.max_image_pixels: the job there has 10000, now 20000" in other
    assert "retry does the images that failed again with other limits" in other
    failed = {r["image_id"]: r["error_code"] for r in commands.tables(Path(output))[0].to_pylist()}
    assert {code for code in failed.values() if code} == {"too_large"}

    retry = ("retry", "--output", output, "--checkpoint", "demo", "--allow-root", str(photos))
    said = hqlabel(*retry, "--set", "limits.max_image_pixels=50000", "--set", "limits.max_failure_rate=1")

    assert "limits.max_image_pixels: 50000 for the images done again, 10000 for all others" in said
    assert "1 image done again; 0 failed again" in said
    [unit] = Path(output, "units").glob("*.g1.parquet")
    footer = pq.read_schema(unit).metadata
    assert json.loads(footer[b"hqlabel.limits"])["max_image_pixels"] == 10000
    [redone] = json.loads(footer[b"hqlabel.redone"])
    assert json.loads(redone["limits"])["max_image_pixels"] == 50000
    part = pq.read_schema(next(Path(output, "images").glob("*.parquet"))).metadata
    assert json.loads(part[b"hqlabel.limits"])["max_image_pixels"] == 10000


@pytest.mark.faults
def test_changed_boxes_are_refused_with_numbers_and_accepted_on_request(photos: Path, tmp_path: Path) -> None:
    output, table = str(tmp_path / "out"), photos / "boxes.jsonl"
    base = ("label", "--boxes", str(table), "--checkpoint", "demo", "--output", output)
    base = (*base, "--set", "output.images_per_unit=2")
    boxes = {f"{number}.png": [[5, 5, 40, 40]] for number in range(4)}
    write_boxes(table, boxes)
    hqlabel(*base)
    before = {row["image_id"]: row for row in commands.tables(Path(output))[0].to_pylist()}

    write_boxes(table, {**boxes, "1.png": [[9, 9, 30, 30]], "4.png": [[5, 5, 40, 40]]})
    refused = hqlabel(*base, code=4)
    unchanged = commands.contents(Path(output))
    said = hqlabel(*base, "--accept-changed-inputs")
    again = hqlabel(*base)

    numbers = "2 images differ (1 changed, 1 new, 0 gone), 3 are as before, 3 of them done"
    assert numbers in refused
    assert "--accept-changed-inputs" in refused
    assert unchanged.keys() >= {"job.json", "manifest.json"}
    assert f"the inputs changed: {numbers}" in said
    assert "3 units of up to 2 images; 2 images to do, 3 rows kept" in said
    assert "2 images in this run, 3 rows kept" in said
    assert "nothing was left to do" in again
    after = {row["image_id"]: row for row in commands.tables(Path(output))[0].to_pylist()}
    assert sorted(after) == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    same = [name for name in after if name in before and after[name]["run_id"] == before[name]["run_id"]]
    assert same == ["0.png", "2.png", "3.png"]
    assert "sound" in hqlabel("validate", "--output", output)
