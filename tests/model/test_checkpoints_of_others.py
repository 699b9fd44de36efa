"""Checkpoints as other programs write them: their folders, wrappers, prefixes, and files that only look so.

What is saved is the original package's own `Sam`; the wrappers are PyTorch's own where it has them.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import re
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from model.checkpoints import CheckpointError, load, save_transformers
from model.config import ConfigError, vit_config
from model.sam_hq import SamHQ
from tests.parity.oracle import original_of

CONFIGS = Path(__file__).parent / "saved_configs"
SAVED = vit_config(
    embed_dim=64, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=5, image_size=128
)
"""What the folders of `saved_configs` were saved from."""


SMALL = vit_config(
    embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=3, image_size=64,
    out_channels=32, mlp_dim=64,
)  # fmt: skip

COMPILES = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
"""PyTorch warns of its own parts when `torch.compile` is first called."""


@pytest.fixture(scope="module")
def model() -> SamHQ:
    return SamHQ.from_config(SMALL, 0, position_std=0.5)


@pytest.fixture(scope="module")
def sam(model: SamHQ) -> nn.Module:
    return original_of(model)


@pytest.fixture(scope="module")
def saved_model() -> SamHQ:
    return SamHQ.from_config(SAVED, 0, position_std=0.5)


@pytest.fixture
def folder(saved_model: SamHQ, tmp_path: Path) -> Path:
    save_transformers(saved_model, tmp_path / "folder")
    return tmp_path / "folder"


def saved(value: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def same(loaded: SamHQ, model: SamHQ) -> bool:
    a, b = loaded.state_dict(), model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def with_config(folder: Path, text: str, **changes: object) -> Path:
    """The folder with another config.json; `vision_config__window_size=3` changes a part."""
    values = json.loads(text)
    for path, value in changes.items():
        *parts, key = path.split("__") if not path.startswith("_") else [path]
        target = values
        for part in parts:
            target = target[part]
        target[key] = value
    (folder / "config.json").write_text(json.dumps(values))
    return folder


# Folders of transformers


@pytest.mark.parametrize("name", ["transformers-4.52.4", "transformers-4.57.1", "transformers-5.23.0"])
def test_the_config_of_each_release_is_read_without_a_warning(name, folder, saved_model):
    loaded = load(with_config(folder, (CONFIGS / f"{name}.json").read_text()))

    assert same(loaded.model, saved_model)
    assert loaded.weights.warnings == ()


def test_the_config_of_the_first_upload_is_read_and_its_own_keys_are_told(folder, saved_model):
    loaded = load(with_config(folder, (CONFIGS / "first-upload.json").read_text()))

    assert same(loaded.model, saved_model)
    [warning] = loaded.weights.warnings
    assert "intializer_range, prompt_encoder_config.image_embeddings_size" in warning


def test_keys_of_a_release_to_come_are_a_warning(folder, saved_model):
    text = (CONFIGS / "transformers-5.23.0.json").read_text()
    new = {"use_cache": True, "_commit_hash": "0" * 40, "auto_map": {}, "vision_config__novelty": {"a": [1]}}
    loaded = load(with_config(folder, text, **new))

    assert same(loaded.model, saved_model)
    [warning] = loaded.weights.warnings
    assert all(key in warning for key in ("use_cache", "_commit_hash", "auto_map", "vision_config.novelty"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision_config__image_size", 1024, "vision_config.image_size is 1024, but 128 by the tensors"),
        ("prompt_encoder_config__image_size", 1024, "prompt_encoder_config.image_size is 1024, but 128"),
        ("vision_config__window_size", 14, "vision_config.window_size is 14, but 5"),
        ("vision_config__global_attn_indexes", [0], r"global_attn_indexes is \[0\], but \[1\]"),
        ("vision_config__num_attention_heads", 4, "num_attention_heads is 4, but 2"),
        ("vision_config__num_hidden_layers", 12, "num_hidden_layers is 12, but 2"),
        ("vision_config__hidden_act", "gelu_new", "hidden_act is 'gelu_new'; only 'gelu' is known"),
        ("vision_config__layer_norm_eps", 1e-5, "layer_norm_eps is 1e-05"),
        ("vision_config__use_rel_pos", False, "use_rel_pos is False"),
        ("vision_config__model_type", "sam_vision_model", "wanted 'sam_hq_vision_model'"),
        ("vision_config__model_type", "sam_hq_tiny_vit", "vision_config.model_type is 'sam_hq_tiny_vit'"),
        ("mask_decoder_config__vit_dim", 1024, "mask_decoder_config.vit_dim is 1024, but 64"),
        ("mask_decoder_config__num_multimask_outputs", 4, "num_multimask_outputs is 4, but 3"),
        ("mask_decoder_config__hidden_act", "gelu", "hidden_act is 'gelu'; only 'relu' is known"),
        ("model_type", "sam", "model_type 'sam'; wanted 'sam_hq'"),
    ],
)
def test_a_known_key_that_says_what_is_not_done_is_refused(key, value, message, folder):
    with_config(folder, (CONFIGS / "transformers-4.57.1.json").read_text(), **{key: value})

    with pytest.raises((CheckpointError, ConfigError), match=message):
        load(folder)


def test_what_a_config_leaves_out_the_tensors_tell(folder, saved_model):
    for text in ("{}", '{"vision_config": null}', '﻿{"model_type": "sam_hq"}'):
        (folder / "config.json").write_text(text, encoding="utf-8")
        assert same(load(folder).model, saved_model)
    (folder / "config.json").unlink()
    (folder / "preprocessor_config.json").write_text('{"size": {"longest_edge": 1024}}')
    assert same(load(folder).model, saved_model)


def test_a_small_model_with_the_default_window_is_read(tmp_path):
    """14 tokens on a grid of 8, as transformers' defaults give for pictures of 128 pixels."""
    config = vit_config(
        embed_dim=64, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=14, image_size=128
    )
    save_transformers(SamHQ.from_config(config, 0), tmp_path)
    text = (CONFIGS / "transformers-4.57.1.json").read_text()

    assert load(with_config(tmp_path, text, vision_config__window_size=14)).model.config == config


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_pickled_weights_is_read(shards, folder, saved_model):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        files = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
        for i, file in enumerate(files):
            torch.save({name: tensors[name] for name in names[i::shards]}, folder / file)
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    path = folder / ("pytorch_model.bin" if shards == 1 else "pytorch_model.bin.index.json")

    for source in (folder, path, {file.name: file.read_bytes() for file in folder.iterdir()}):
        assert same(load(source).model, saved_model)
    with_config(folder, (CONFIGS / "transformers-4.57.1.json").read_text(), model_type="sam")
    for source in (folder, path):
        with pytest.raises(ConfigError):
            load(source)


def test_a_folder_without_the_known_names_says_what_could_be_named(tmp_path):
    for name in ("epoch_1.pth", "epoch_2.pth", "notes.txt"):
        (tmp_path / name).write_bytes(b"")

    with pytest.raises(
        CheckpointError, match=r"neither.*pytorch_model\.bin.*epoch_1\.pth, epoch_2\.pth: name one"
    ):
        load(tmp_path)


def test_safetensors_may_hold_the_original_layout(sam, model, tmp_path):
    safetensors.torch.save_file(sam.state_dict(), tmp_path / "sam_hq.safetensors")

    assert same(load(tmp_path / "sam_hq.safetensors").model, model)


# Wrappers and prefixes


class Kept(nn.Module):
    """A module that keeps the model under a name, as people's training code does."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        setattr(self, name, module)


def lightning(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """The keys of a Lightning checkpoint of a module with `self.model`."""
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}
    return {
        "epoch": 3,
        "global_step": 700,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": OrderedDict((f"model.{name}", tensor) for name, tensor in state.items()),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-4},
    }


WRAPPED = {
    "state dict": lambda sam: sam.state_dict(),
    **{
        key: (lambda sam, key=key: {key: sam.state_dict(), "epoch": 3})
        for key in ("model", "state_dict", "model_state_dict", "net", "network", "weights", "module")
    },
    "flat, with other entries": lambda sam: {**sam.state_dict(), "epoch": 3, "best": 0.9, "names": ["a"]},
    "two wrappers": lambda sam: {"checkpoint": {"model": sam.state_dict()}, "step": 1},
    "data parallel": lambda sam: {"model": nn.DataParallel(sam).state_dict()},
    "compiled": lambda sam: torch.compile(sam).state_dict(),
    "compiled in data parallel": lambda sam: nn.DataParallel(torch.compile(sam)).state_dict(),
    "compiled data parallel": lambda sam: torch.compile(nn.DataParallel(sam)).state_dict(),
    "lightning": lambda sam: lightning(sam.state_dict()),
    "kept and compiled": lambda sam: torch.compile(Kept("sam", sam)).state_dict(),
    "compiled and kept": lambda sam: {"state_dict": Kept("model", torch.compile(sam)).state_dict()},
    "kept twice": lambda sam: Kept("model", Kept("sam_model", nn.DataParallel(sam))).state_dict(),
    **{
        key: (lambda sam, key=key: Kept(key, sam).state_dict())
        for key in ("sam", "model", "sam_model", "student")
    },
    "optimizer beside": lambda sam: {
        "model": sam.state_dict(),
        "optimizer": torch.optim.AdamW(sam.parameters()).state_dict(),
        "scaler": {"scale": 65536.0, "growth": torch.ones(1)},
    },
    "equal average beside": lambda sam: {"model": sam.state_dict(), "ema": dict(sam.state_dict())},
    "parameters": lambda sam: {**dict(sam.named_parameters()), **dict(sam.named_buffers())},
}


@COMPILES
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_weights_are_found(kind, legacy, sam, model):
    data = saved(WRAPPED[kind](sam), _use_new_zipfile_serialization=not legacy)

    assert same(load(data).model, model)


@COMPILES
def test_a_part_that_was_wrapped_alone_is_found(model):
    sam = original_of(model)
    sam.image_encoder = torch.compile(sam.image_encoder)
    sam.mask_decoder = nn.DataParallel(sam.mask_decoder)
    names = list(sam.state_dict())
    assert any(name.startswith("image_encoder._orig_mod.") for name in names)
    assert any(name.startswith("mask_decoder.module.") for name in names)

    assert same(load(saved(sam.state_dict())).model, model)


def test_prefixes_are_taken_off_the_transformers_layout_too(folder, saved_model):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    data = safetensors.torch.save({f"model._orig_mod.{name}": tensor for name, tensor in tensors.items()})

    assert same(load(data).model, saved_model)


def test_names_under_two_prefixes_are_refused(sam):
    state = sam.state_dict()
    two = {f"teacher.{n}": t for n, t in state.items()} | {f"student.{n}": t for n, t in state.items()}
    with pytest.raises(CheckpointError, match=r"under 2 prefixes, 'student\.', 'teacher\.'"):
        load(saved(two))
    halves = {(f"sam.{n}" if n.startswith("image") else n): t for n, t in state.items()}
    with pytest.raises(CheckpointError, match=r"under 2 prefixes, '', 'sam\.'"):
        load(saved(halves))


def test_what_stands_outside_the_model_is_left_over_by_name(sam):
    state = {f"model.{n}": t for n, t in sam.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"1 tensors are left over: adapter\.weight"):
        load(saved(state | {"adapter.weight": torch.ones(2)}))


def test_a_model_and_an_average_that_differs_are_not_chosen_between(sam, model, tmp_path):
    state = sam.state_dict()
    average = {name: tensor * 0.5 for name, tensor in state.items()}
    torch.save({"model": state, "ema": {"module": average}}, tmp_path / "both.pth")
    with pytest.raises(
        CheckpointError, match=r"two models, \['model'\] and \['ema'\]\['module'\]"
    ) as refusal:
        load(tmp_path / "both.pth")

    advice = re.search(r"torch\.save\(.*\)", str(refusal.value))[0].replace("['ema']['module']", "['model']")
    exec(
        advice.replace("FILE", f"'{tmp_path}/both.pth'").replace("weights.pth", f"{tmp_path}/weights.pth"),
        {"torch": torch},
    )
    assert same(load(tmp_path / "weights.pth").model, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_floating_type_become_float32(dtype, sam):
    state = {name: tensor.to(dtype) for name, tensor in sam.state_dict().items()}
    loaded = load(saved(state)).model

    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.image_encoder.pos_embed, state["image_encoder.pos_embed"].float())


def test_a_float64_that_float32_cannot_hold_is_refused(sam):
    state = {name: tensor.double() for name, tensor in sam.state_dict().items()}
    state["image_encoder.pos_embed"] = torch.full_like(state["image_encoder.pos_embed"], 1e300)

    with pytest.raises(CheckpointError, match=r"image_encoder\.pos_embed holds values that are not finite"):
        load(saved(state))


def test_tensors_that_share_or_stride_their_memory_are_read(sam, model):
    state = sam.state_dict()
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    shared = {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}
    name = "image_encoder.blocks.0.mlp.lin1.weight"
    shared[name] = shared[name].t().contiguous().t()
    assert not shared[name].is_contiguous()

    assert same(load(saved(shared)).model, model)


# The decoder alone


def test_a_decoder_alone_is_named_and_the_advice_makes_it_whole(sam, model, tmp_path):
    hq = ("hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature")
    plain = {n: t for n, t in sam.state_dict().items() if not any(part in n for part in hq)}
    torch.save(plain, tmp_path / "sam_vit_l.pth")
    torch.save(sam.mask_decoder.state_dict(), tmp_path / "epoch_11.pth")
    with pytest.raises(CheckpointError, match="mask decoder of SAM-HQ alone") as refusal:
        load(tmp_path / "epoch_11.pth")

    advice = str(refusal.value).split("merge it with its SAM: ")[1]
    exec(re.sub(r"'(\w+\.pth)'", rf"'{tmp_path}/\1'", advice), {"torch": torch})
    assert same(load(tmp_path / "sam_hq.pth").model, model)
    assert len(str(refusal.value)) < 450  # a refusal is cut at 500 characters, path and all


def test_a_decoder_alone_is_named_in_its_wrappers_too(sam):
    state = sam.mask_decoder.state_dict()
    for value in (
        {"model": nn.DataParallel(sam.mask_decoder).state_dict()},
        {f"mask_decoder.{name}": tensor for name, tensor in state.items()},
    ):
        with pytest.raises(CheckpointError, match="mask decoder of SAM-HQ alone"):
            load(saved(value))
    plain = {name: tensor for name, tensor in state.items() if name != "hf_token.weight"}
    with pytest.raises(CheckpointError, match="mask decoder of SAM alone, from which the training"):
        load(saved(plain))


# What is more than tensors


class Trainer:
    """A class of the program that saved the file."""


BESIDE = {
    "argparse.Namespace": lambda sam: {"model": sam.state_dict(), "args": argparse.Namespace(lr=1e-4)},
    "numpy._core.multiarray.scalar": lambda sam: {"model": sam.state_dict(), "loss": np.float64(0.1)},
    "numpy._core.multiarray._reconstruct": lambda sam: {"model": sam.state_dict(), "history": np.zeros(3)},
    "segment_anything_hq.modeling.sam.Sam": lambda sam: sam,
    "torch.nn.parallel.data_parallel.DataParallel": lambda sam: nn.DataParallel(sam),
    "test_checkpoints_of_others.Trainer": lambda sam: {"model": sam.state_dict(), "trainer": Trainer()},
    "pathlib": lambda sam: {"model": sam.state_dict(), "out": Path("runs")},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_what_is_more_than_tensors_is_named_and_torch_is_not_quoted(name, legacy, sam):
    with pytest.raises(CheckpointError) as refusal:
        load(saved(BESIDE[name](sam), _use_new_zipfile_serialization=not legacy))
    said = str(refusal.value)

    assert name in said
    assert "torch.save(model.state_dict()" in said
    assert said.isprintable()
    assert not re.search("weights_only|safe_globals|trust|PyTorch 2|https?:", said)


def test_the_same_weights_alone_are_read(sam, model):
    """Guards the test above: nothing but what is beside the weights is in the way."""
    assert same(load(saved({"model": BESIDE["argparse.Namespace"](sam)["model"]})).model, model)


@COMPILES
def test_a_torchscript_archive_is_named():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    with pytest.raises(CheckpointError, match="a TorchScript archive") as refusal:
        load(buffer.getvalue())

    assert "weights_only" not in str(refusal.value)


# Downloads


def packed(sam: nn.Module, kind: str) -> bytes:
    data, buffer = saved(sam.state_dict()), io.BytesIO()
    if kind == "gzip":
        return gzip.compress(data, 1)
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("sam_hq_vit_b.pth", data)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo("sam_hq_vit_b.pth")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gzip", "gunzip"),
        ("zip", r"a zip archive of sam_hq_vit_b\.pth: unpack"),
        ("tar", "a tar archive: unpack"),
    ],
)
def test_packed_weights_are_named(kind, message, sam):
    with pytest.raises(CheckpointError, match=message):
        load(packed(sam, kind))


def test_an_archive_that_cannot_be_listed_is_damaged(sam):
    data = packed(sam, "zip")
    end = data.rindex(b"PK\x01\x02")
    for byte in (b"\xff", b"\x00"):  # the version that unpacking needs, then the name's length
        place = end + (6 if byte == b"\xff" else 28)
        with pytest.raises(CheckpointError, match="damaged"):
            load(data[:place] + byte + data[place + 1 :])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>Sign in to Google Drive</html>", "it is a web page"),
        (b"\xef\xbb\xbf\r\n<html>", "it is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 379\n", "git lfs pull"),
        (b'{"error": "Repository not found"}', "neither a .pth nor a safetensors file"),
        (b"\x80\x04\x95\x00", "damaged"),
    ],
)
def test_what_came_instead_of_the_weights_is_named(data, message, tmp_path):
    for name in ("sam_hq_vit_b.pth", "model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=message) as refusal:
            load(tmp_path / name)
        assert name in str(refusal.value)
