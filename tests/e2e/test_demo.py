"""`make demo` as a newcomer runs it: every photograph labelled, tables and pictures where it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from hqlabel.model.checkpoints import DEMO_FOLDER

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "examples" / "photos" / "boxes.jsonl").read_text().splitlines()
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
def test_the_demo_labels_every_photograph_and_again_changes_nothing(tmp_path: Path) -> None:
    first = demo(tmp_path / "demo")

    assert first.returncode == 0, first.stdout + first.stderr
    images = pq.read_table(tmp_path / "demo" / "labels" / "images").to_pylist()
    instances = pq.read_table(tmp_path / "demo" / "labels" / "instances").to_pylist()
    assert {row["image_id"]: row["status"] for row in images} == dict.fromkeys(BOXES, "labelled")
    assert len(instances) == sum(map(len, BOXES.values()))
    assert all(row["segmentation"] is not None for row in instances)
    for name in BOXES:
        assert re.search(rf"^{re.escape(name)} +labelled", first.stdout, flags=re.MULTILINE)
    pictures = re.findall(r"^picture:  (.+)$", first.stdout, flags=re.MULTILINE)
    assert len(pictures) == 4  # the contact sheet and three overlays
    for picture in pictures:
        with Image.open(picture) as opened:
            opened.load()
    assert ("RANDOM weights" in first.stdout) != (DEMO_FOLDER / "model.safetensors").is_file()

    tables = {p: p.read_bytes() for p in (tmp_path / "demo" / "labels").rglob("*.parquet")}
    again = demo(tmp_path / "demo")

    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing was left to do" in again.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "demo" / "labels").rglob("*.parquet")} == tables
