"""Weights in a bucket, under the names that other programs give them."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch

from hqlabel.model.checkpoints import CheckpointError, load
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.stages.load_model import open_weights
from tests.conftest import MotoS3
from tests.e2e.scenes import small_checkpoint


def test_files_and_folders_in_a_bucket_are_read_like_local_ones(moto_s3: MotoS3, tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "small")
    wanted = load(folder).weights
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "last.ckpt")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    place = moto_s3.place().uri
    s3 = fsspec.filesystem("s3", **moto_s3.options, skip_instance_cache=True)
    for name in ("model.safetensors", "config.json"):
        s3.put(str(folder / name), f"{place}/whole/{name}")
    s3.put(str(folder / "config.json"), f"{place}/bin/config.json")
    s3.put(str(tmp_path / "pytorch_model.bin"), f"{place}/bin/pytorch_model.bin")
    s3.put(str(tmp_path / "last.ckpt"), f"{place}/runs/last.ckpt")

    assert load(open_weights(f"{place}/whole", moto_s3.options)).weights.sha256 == wanted.sha256
    s3.put(str(tmp_path / "last.ckpt"), f"{place}/tar/model_best.pth.tar")

    for name in ("bin", "bin/pytorch_model.bin", "runs/last.ckpt", "tar/model_best.pth.tar"):
        assert (
            load(open_weights(f"{place}/{name}", moto_s3.options)).weights.architecture == wanted.architecture
        )
    with pytest.raises(CheckpointError, match=r"it holds last\.ckpt: name one"):
        load(open_weights(f"{place}/runs", moto_s3.options))
    for name in ("gone", "gone/"):
        with pytest.raises(JobRefused, match="there is no such"):
            open_weights(f"{place}/{name}", moto_s3.options)
