"""The example of docs/inputs.md is a table as it is read."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.settings import InputSettings

ROOT = Path(__file__).resolve().parents[2]


def test_clicks_without_a_box_are_planned(tmp_path: Path) -> None:
    [block] = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "inputs.md").read_text(), flags=re.DOTALL)
    (tmp_path / "photos").mkdir()
    shutil.copy(ROOT / "examples" / "photos" / "cat.jpg", tmp_path / "photos")
    table = tmp_path / "clicks.jsonl"
    table.write_text("".join(line.strip() + "\n" for line in block.splitlines()))

    [planned] = make_plan(InputSettings(boxes=str(table))).table.to_pylist()

    assert planned["image_uri"] == str(tmp_path / "photos" / "cat.jpg")
    assert planned["error_code"] is None
    assert [(box["given"], box["points_xy"], box["point_labels"]) for box in planned["boxes"]] == [
        (None, [220, 150], [1]),
        (None, [60, 40, 220, 150], [1, 0]),
    ]
