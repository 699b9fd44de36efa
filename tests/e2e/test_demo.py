"""`make demo` as a newcomer runs it: three photographs labelled, a table, and a page where it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "model" / "weights" / "hqlabel-demo" / "model.safetensors"
LINES = (ROOT / "examples" / "photos" / "demo.jsonl").read_text().splitlines()
BOXES = {row["image_uri"]: row["boxes"] for row in map(json.loads, LINES)}


def demo(place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "examples/demo.py", str(place)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(600)
def test_the_demo_labels_its_photographs(tmp_path: Path) -> None:
    first = demo(tmp_path / "demo")

    assert first.returncode == 0, first.stdout + first.stderr
    images = pq.read_table(tmp_path / "demo" / "labels" / "images").to_pylist()
    instances = pq.read_table(tmp_path / "demo" / "labels" / "instances").to_pylist()
    assert {row["image_id"]: row["status"] for row in images} == dict.fromkeys(BOXES, "labelled")
    assert len(instances) == sum(map(len, BOXES.values()))
    assert all(row["segmentation"] is not None for row in instances)
    marked = sorted(row["category_name"] for row in instances if not row["accepted"])
    assert marked == (["tripod"] if WEIGHTS.is_file() else marked), "one box shows what a filter does"
    for name, boxes in BOXES.items():
        assert re.search(
            rf"^{re.escape(name)} +{len(boxes)} +{len(boxes)} ", first.stdout, flags=re.MULTILINE
        )
    page = Path(re.search(r"^Look at (.+)\. Your own", first.stdout, flags=re.MULTILINE)[1])
    assert "tripod" in page.read_text()
    with Image.open(page.parent / "contact_sheet.png") as opened:
        opened.load()
    assert ("RANDOM weights" in first.stdout) != WEIGHTS.is_file()


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_the_demo_run_again_changes_nothing(tmp_path: Path) -> None:
    first = demo(tmp_path / "demo")

    assert first.returncode == 0, first.stdout + first.stderr
    tables = {p: p.read_bytes() for p in (tmp_path / "demo" / "labels").rglob("*.parquet")}
    again = demo(tmp_path / "demo")

    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing was left to do" in again.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "demo" / "labels").rglob("*.parquet")} == tables
