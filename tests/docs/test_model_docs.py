"""The code in docs/model.md runs, and its tables name what exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from hqlabel.model.checkpoints import save_transformers
from hqlabel.model.hq_sam2.hiera_config import HIERA_SIZES, hq_sam2_config
from hqlabel.model.hq_sam2.hq_sam2 import family_of
from hqlabel.model.sam_config import PUBLISHED
from hqlabel.model.sam_hq import SamHQ
from tests.docs.markdown import blocks, column, section, table
from tests.parity.lively import SMALL_VITS, lively, photo

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "model.md").read_text()
EXAMPLES = blocks(section(PAGE, "Use"), "python")
PUBLISHED_ID = "syscv-community/sam-hq-vit-base"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the pictures that the examples open, and weights under the hub id's path."""
    monkeypatch.chdir(tmp_path)
    save_transformers(lively(SMALL_VITS["grid14-window7"]), tmp_path / PUBLISHED_ID)
    for name in ("car.png", "street.png"):
        Image.fromarray(photo(1200, 1800)).save(name)


def test_the_example_runs_and_returns_what_its_comments_state(place):
    (example,) = EXAMPLES
    names: dict[str, object] = {}
    exec(example, names)
    answer = names["answer"]

    assert list(answer.low_res_NMHW.shape[:2]) == [3, 1]
    assert answer.image_index_N.tolist() == [0, 1, 1]
    assert names["mask"].shape == (1200, 1800)


def test_each_example_is_ten_lines_of_code_or_fewer_without_imports():
    for code in EXAMPLES:
        lines = [line for line in code.splitlines() if line and not re.match(r"(import|from) ", line)]
        assert len(lines) <= 10


def test_the_script_shows_the_fault(capsys):
    notes = (DOCS / "dev" / "model-notes.md").read_text()
    (script,) = blocks(section(notes, "The fault in transformers"), "python")
    exec(script, {})

    assert "upscaled is updated: False" in capsys.readouterr().out
    assert len([line for line in script.splitlines() if line]) <= 13


def test_every_name_of_ours_in_the_table_of_compatibility_exists():
    text = " ".join(column(table(section(PAGE, "What others can be asked, and its name here")), "here"))
    modules = (
        "checkpoints",
        "masks",
        "prompt_encoder",
        "sam_config",
        "sam_hq",
        "segmenter",
        "records",
    )
    known = {name for module in modules for name in vars(importlib.import_module(f"hqlabel.model.{module}"))}
    with torch.device("meta"):
        model = SamHQ(PUBLISHED["vit_tiny"])

    called = re.findall(r"\bmodel\.([a-z_]+)\(", text)
    assert called
    assert all(hasattr(model, name) for name in called)
    of_modules = re.findall(r"\b(?:masks|checkpoints|sam_config|records)\.(\w+)", text)
    of_modules += re.findall(
        r"\b(Prompts|MaskLogits|ImageEmbedding|Segmenter|save_\w+|mask_to_prompt)\b", text
    )
    assert set(of_modules) <= known


def test_parameters_of_the_table_are_those_of_the_models():
    rows = table(section(PAGE, "Published numbers to expect"))
    configs = [PUBLISHED[size] for size in ("vit_b", "vit_l", "vit_h", "vit_tiny")]
    for row, config in zip(rows, [*configs, hq_sam2_config(HIERA_SIZES["hiera_l"])], strict=True):
        with torch.device("meta"):
            count = sum(p.numel() for p in family_of(config)(config).parameters())
        assert row["parameters"].split()[0] == f"{count / 1e6:.1f}"
