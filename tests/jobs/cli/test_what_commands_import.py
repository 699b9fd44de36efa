"""What a command loads: each imports what it works with, and `torch` only where a model runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.jobs.made_outputs import MadeImage, make_output

ROOT = Path(__file__).parents[3]
SLOW = {"torch", "torch._dynamo", "transformers", "ray", "duckdb", "pandas", "pyarrow", "numpy", "yaml"}
FOR_TABLES = {"pyarrow", "pandas", "numpy", "yaml"}
COMMAND = """
import sys
from hqlabel.jobs.cli.main import app, interrupts
try:
    app(sys.argv[2:])
except SystemExit as end:
    assert end.code == 0, end.code
print("loaded", *sorted(set(sys.argv[1].split(",")) & set(sys.modules)))
"""


def loaded_by(*arguments: str) -> set[str]:
    """What of `SLOW` a command has loaded by its end."""
    command = [sys.executable, "-c", COMMAND, ",".join(SLOW), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An output of one picture, and its folder of pictures."""
    pictures = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (80, 60)).save(pictures / "a.png")
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 20:50] = 1
    image = MadeImage(image_id="a.png", masks=[mask], uri=str(pictures / "a.png"))
    return make_output(tmp_path_factory.mktemp("outputs") / "out", [image]), str(pictures)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["label", "--help"]])
def test_help_and_version_load_nothing_slow(arguments: list[str]) -> None:
    assert loaded_by(*arguments) == set()


def test_commands_without_a_model_load_no_torch_and_no_ray(output: tuple[str, str], tmp_path: Path) -> None:
    out, pictures = output
    root = ["--allow-root", pictures]
    coco, picture = str(tmp_path / "coco"), str(tmp_path / "a.overlay.png")
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("image_uri,x1,y1,x2,y2\na.png,1,1,40,40\n")
    plan = ["plan", "--images", pictures, "--boxes", str(boxes), "--checkpoint", "demo"]
    assert loaded_by("status", "--output", out) <= FOR_TABLES
    assert loaded_by("validate", "--output", out) <= FOR_TABLES
    assert loaded_by("export", "coco", "--output", out, "--to", coco) <= FOR_TABLES | {"duckdb"}
    assert loaded_by("inspect", "a.png", "--output", out, *root, "--picture", picture) <= FOR_TABLES
    assert loaded_by(*plan) <= FOR_TABLES
    assert loaded_by("report", "--output", out, *root) <= FOR_TABLES - {"pandas"} | {"duckdb"}


def test_the_model_is_imported_and_loaded_without_the_compiler() -> None:
    code = (
        "import sys, hqlabel.model.segmenter, hqlabel.model.hq_sam2.hq_sam2\n"
        "from hqlabel.model.checkpoints import DEMO_FOLDER, load\n"
        "load(DEMO_FOLDER)\n"
        "assert 'torch' in sys.modules and not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
