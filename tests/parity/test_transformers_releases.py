"""Folders that releases of transformers save themselves, by the release's own code in a process of its own.

The installed release is always asked. Others are asked where they lie in folders of their own, named in
OTHER_TRANSFORMERS (joined by colons), each made once by, for instance:

    pip install --no-deps --target tf457 transformers==4.57.1 tokenizers==0.22.2 huggingface_hub==0.36.2
    pip install --no-deps --target tf452 transformers==4.52.4 tokenizers==0.21.4 huggingface_hub==0.36.2
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hqlabel.model.checkpoints import load
from hqlabel.model.weight_names import TIED_POSITIONS, rename

SCRIPT = Path(__file__).with_name("save_with_transformers.py")
CONFIGS = Path(__file__).parents[1] / "model" / "saved_configs"
OTHERS = [path for path in os.environ.get("OTHER_TRANSFORMERS", "").split(os.pathsep) if path]
NONE = pytest.param(
    None, marks=pytest.mark.skip(reason="OTHER_TRANSFORMERS names no folder with another transformers")
)


@pytest.fixture(scope="module", params=["installed", *(OTHERS or [NONE])])
def saved(request, tmp_path_factory):
    """What one release saved, and its version."""
    folder = tmp_path_factory.mktemp("saved")
    path = {} if request.param == "installed" else {"PYTHONPATH": os.path.abspath(request.param)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env={**os.environ, **path}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return folder, done.stdout.split()[-1]


def test_every_way_of_saving_gives_the_tensors_of_the_model(saved):
    folder, _ = saved
    state = torch.load(folder / "state.pth", weights_only=True)
    wanted = {
        rename(name, "transformers", "original"): tensor
        for name, tensor in state.items()
        if name != TIED_POSITIONS
    }
    ways = sorted(folder.iterdir())
    assert len(ways) in (3, 5)

    for way in ways:
        loaded = load(way)
        assert loaded.weights.warnings == ()
        found = loaded.model.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items()), way.name


def test_the_config_kept_for_the_other_tests_is_what_the_release_writes(saved):
    folder, version = saved
    kept = CONFIGS / f"transformers-{version}.json"
    if not kept.exists():
        pytest.skip(f"no file of {version} is kept")

    assert json.loads((folder / "whole" / "config.json").read_text()) == json.loads(kept.read_text())
