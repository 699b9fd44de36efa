"""A new user's first real command, with weights as they lie on their disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hqlabel.model.checkpoints import save_original, save_transformers
from hqlabel.model.sam_config import vit_config
from tests.e2e import commands
from tests.e2e.scenes import DataSet
from tests.parity.lively import lively

CONFIG = Path(__file__).parents[1] / "model" / "saved_configs" / "transformers-4.57.1.json"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hub/`, as transformers 4.57 saves it, and the same tensors in `sam_hq.pth`."""
    folder = tmp_path_factory.mktemp("weights")
    config = vit_config(
        embed_dim=64, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=5, image_size=128
    )
    model = lively(config)
    save_transformers(model, folder / "hub")
    shutil.copy(CONFIG, folder / "hub" / "config.json")
    save_original(model, folder / "sam_hq.pth")
    return folder


def arguments(data: DataSet, weights: Path, output: Path) -> list[str]:
    return [
        "label", "--images", str(data.images), "--boxes", str(data.boxes), "--checkpoint", str(weights),
        "--output", str(output), "--limit", "8", "--set", "model.dtype=float32",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_folder_of_transformers_4_57_gives_the_masks_of_the_pth_of_the_same_tensors(
    weights: Path, few_images: DataSet, tmp_path: Path
) -> None:
    for name in ("hub", "sam_hq.pth"):
        said = commands.label_here(*arguments(few_images, weights / name, tmp_path / "out" / name)).stderr
        assert "vit_64x2, input side 128" in said
        assert "not known here" not in said
    images, instances = commands.tables(tmp_path / "out" / "hub")

    assert images.num_rows == 8
    masks = instances["segmentation"].to_pylist()
    assert len(masks) > 10
    assert None not in masks
    assert len({mask["counts"] for mask in masks}) > 5
    again = commands.tables(tmp_path / "out" / "sam_hq.pth")
    assert commands.lasting(again[0]).equals(commands.lasting(images))
    assert commands.lasting(again[1]).equals(commands.lasting(instances))
