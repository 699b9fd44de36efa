"""Checkpoints as other programs write them: their folders, wrappers, prefixes, and files that only look so.

What is saved is the original package's own `Sam`; the wrappers are PyTorch's own where it has them.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
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
from torch.optim.swa_utils import AveragedModel

from hqlabel.model.checkpoints import CheckpointError, load, save_transformers
from hqlabel.model.sam_config import ConfigError, vit_config
from hqlabel.model.sam_hq import SamHQ
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
        ("vision_config__model_type", "sam_vision_model", "'sam_vision_model', but 'sam_hq_vision_model'"),
        ("vision_config__model_type", "sam_hq_tiny_vit", "vision_config.model_type is 'sam_hq_tiny_vit'"),
        ("mask_decoder_config__vit_dim", 1024, "mask_decoder_config.vit_dim is 1024, but 64"),
        ("mask_decoder_config__num_multimask_outputs", 4, "num_multimask_outputs is 4; only 3"),
        ("mask_decoder_config__hidden_act", "gelu", "hidden_act is 'gelu'; only 'relu' is known"),
        ("model_type", "sam", "model_type 'sam'; wanted 'sam_hq'"),
    ],
)
def test_a_known_key_that_says_what_is_not_done_is_refused(key, value, message, folder):
    with_config(folder, (CONFIGS / "transformers-4.57.1.json").read_text(), **{key: value})

    with pytest.raises((CheckpointError, ConfigError), match=message):
        load(folder)


def test_numbers_of_a_config_may_have_been_floats(folder, saved_model):
    floats = {"vision_config__image_size": 128.0, "vision_config__global_attn_indexes": [1.0]}
    single = float(np.float32(1e-6))
    assert single != 1e-6
    text = (CONFIGS / "transformers-4.57.1.json").read_text()

    loaded = load(with_config(folder, text, vision_config__layer_norm_eps=single, **floats))

    assert same(loaded.model, saved_model)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "", "<html>", '{"a": 1' + "0" * 6000 + "}"]
)
def test_a_config_or_an_index_that_is_no_json_is_refused(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        load(folder)
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: not JSON"):
        load(folder)


def test_metadata_of_safetensors_may_be_null(folder, saved_model):
    data = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8:end]), "__metadata__": None}).encode()

    loaded = load(len(header).to_bytes(8, "little") + header + data[end:])

    assert same(loaded.model, saved_model)
    assert loaded.weights.license is None


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


def test_windows_as_wide_as_the_grid_are_not_taken_for_global_blocks(tmp_path):
    """As of a ViT-B trained at 224 pixels; here the grid is 4 tokens wide."""
    config = vit_config(
        embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(0, 1), window_size=3, image_size=64,
        out_channels=32, mlp_dim=64,
    )  # fmt: skip
    model = SamHQ.from_config(config, 0)
    save_transformers(model, tmp_path)
    assert load(tmp_path).model.config.vision.global_attn_indexes == (0, 1)

    with pytest.raises(CheckpointError, match=r"whole grid of 4x4 tokens.*cannot be told from global ones"):
        load(saved(original_of(model).state_dict()))
    text = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"global_attn_indexes is \[1\], but \[0, 1\] by the tensors"):
        load(
            with_config(tmp_path, text, vision_config__window_size=4, vision_config__global_attn_indexes=[1])
        )


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


def test_folders_with_weights_below_are_told(folder, tmp_path):
    run, cache = tmp_path / "run", tmp_path / "models--org--name"
    run.mkdir()
    folder.rename(run / "checkpoint-500")
    (cache / "snapshots").mkdir(parents=True)
    (cache / "snapshots" / "0123").symlink_to(run / "checkpoint-500")
    (run / "model.safetensors").symlink_to("gone")

    for place, below in ((run, "checkpoint-500"), (cache, "snapshots/0123")):
        with pytest.raises(CheckpointError, match=f"it holds {below}: name one"):
            load(place)
        load(place / below)


def test_a_config_is_no_place_of_weights(folder):
    with pytest.raises(CheckpointError, match="holds no weights; name the folder it is in"):
        load(folder / "config.json")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "weights.pth")

    with pytest.raises(CheckpointError, match="a pipe or device; wanted a file"):
        load(tmp_path / "weights.pth")


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
    "averaged": lambda sam: AveragedModel(sam).state_dict(),
    "averaged, beside an epoch": lambda sam: {"model_ema": AveragedModel(sam).state_dict(), "epoch": 3},
    "each part on its own": lambda sam: {
        "epoch": 3,
        "model": {name: part.state_dict() for name, part in sam.named_children()},
    },
    "a name with a dash": lambda sam: {f"my-sam.{n}": tensor for n, tensor in sam.state_dict().items()},
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
    with pytest.raises(CheckpointError, match=r"1 tensor is left over: adapter\.weight; save"):
        load(saved(state | {"adapter.weight": torch.ones(2)}))


def test_adapters_of_peft_are_to_be_merged_and_not_left_out(folder):
    """As PEFT names them in a model with LoRA: the weights of a wrapped layer lie one name deeper."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    wrapped = re.compile(r"(.*\.attn\.qkv)\.(weight|bias)")
    peft = {"base_model.model." + wrapped.sub(r"\1.base_layer.\2", n): t for n, t in state.items()}
    for name in filter(wrapped.fullmatch, state):
        peft["base_model.model." + wrapped.sub(r"\1.lora_A.default.weight", name)] = torch.ones(2, 2)

    for tensors in (peft, {n: t for n, t in peft.items() if "lora_A" in n}):
        with pytest.raises(CheckpointError, match=r"lora_A.*merge_and_unload") as caught:
            load(saved(tensors))
        assert "own alone" not in str(caught.value)


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


HQ_LAYERS = ("hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature")


@pytest.mark.parametrize("prefix", ["", "mask_decoder."])
@pytest.mark.parametrize("only_hq", [False, True])
def test_a_decoder_alone_is_named_and_the_advice_makes_it_whole(prefix, only_hq, sam, model, tmp_path):
    plain = {n: t for n, t in sam.state_dict().items() if not any(part in n for part in HQ_LAYERS)}
    torch.save(plain, tmp_path / "sam_vit_l.pth")
    decoder = sam.mask_decoder.state_dict()
    kept = {prefix + n: t for n, t in decoder.items() if n.startswith(HQ_LAYERS) or not only_hq}
    torch.save(kept, tmp_path / "epoch_11.pth")
    with pytest.raises(CheckpointError, match="mask decoder of SAM-HQ alone") as refusal:
        load(tmp_path / "epoch_11.pth")

    advice = str(refusal.value).split("merge it with its SAM: ")[1]
    exec(re.sub(r"'(\w+\.pth)'", rf"'{tmp_path}/\1'", advice), {"torch": torch})
    assert same(load(tmp_path / "sam_hq.pth").model, model)
    assert len(str(refusal.value)) < 450  # a refusal is cut at 500 characters, path and all


def test_a_decoder_alone_of_transformers_is_not_merged_with_the_authors_sam(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    decoder = {n: t.clone() for n, t in tensors.items() if n.startswith("mask_decoder.")}

    with pytest.raises(CheckpointError, match=r"SAM-HQ alone; save the whole model: model\.save_pretrained"):
        load(safetensors.torch.save(decoder))


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


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_other_pickles_are_named_with_what_is_in_them(protocol, zipped, sam, recwarn):
    def packed(value: object) -> bytes:
        return saved(value, pickle_protocol=protocol) if zipped else pickle.dumps(value, protocol)

    with pytest.raises(
        CheckpointError, match=rf"a pickle of protocol {protocol}, which is not read"
    ) as refusal:
        load(packed(sam.state_dict()))
    assert "weights alone: torch.save(" in str(refusal.value)
    for value in (argparse.Namespace(lr=1e-4), sam):
        name = f"{type(value).__module__}.{type(value).__name__}"
        with pytest.raises(CheckpointError, match=rf"protocol {protocol} with {re.escape(name)} in it"):
            load(packed({"args": value, "model": sam.state_dict()}))
    assert not [w for w in recwarn if "weights_only" in str(w.message)]


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
    if kind in ("gzip", "xz", "bz2"):
        return {"gzip": gzip, "xz": lzma, "bz2": bz2}[kind].compress(data[:9000])
    if kind == "arrays":
        np.savez(buffer, pos_embed=np.zeros(3))
    elif kind == "nothing":
        zipfile.ZipFile(buffer, "w").close()
    elif kind == "zip":
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
        ("xz", "unxz"),
        ("bz2", "bunzip2"),
        ("arrays", r"a zip archive of pos_embed\.npy; in the program that made it, save"),
        ("nothing", "a zip archive of nothing;"),
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
        (b'{"error": "Repository not found"}', "neither a .pth nor a safetensors file.*it is a text"),
        (b"Entry not found", "it is a text, perhaps what a server answered"),
        (b"\x80\x02\x95\x00", "damaged"),
        (b"\x80\x04\x95\x00", "a pickle of protocol 4"),
    ],
)
def test_what_came_instead_of_the_weights_is_named(data, message, tmp_path):
    for name in ("sam_hq_vit_b.pth", "model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=message) as refusal:
            load(tmp_path / name)
        assert name in str(refusal.value)
