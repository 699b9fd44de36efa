"""docs/configuration.md is generated from the fields of the configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from hqlabel.jobs.load_config import ConfigSources
from tests.docs.markdown import blocks

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    program = (
        "import runpy, sys; sys.stdout.write(runpy.run_path('tools/write_configuration_docs.py')['page']())"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert fresh.stdout == PAGE.read_text(), "run tools/write_configuration_docs.py"


def test_every_field_has_a_meaning() -> None:
    without_meaning = [
        line for line in PAGE.read_text().splitlines() if line.startswith("| `") and line.endswith("|  |")
    ]

    assert without_meaning == []


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    [example] = blocks(PAGE.read_text(), "yaml")
    path = tmp_path / "run.yaml"
    path.write_text(example)

    config = ConfigSources(path=str(path)).load()

    assert config.model_dump(include={"input": {"images"}}) == {
        "input": {"images": yaml.safe_load(example)["input"]["images"]}
    }
