import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import torch

from hqlabel.model import checkpoints
from hqlabel.model.checkpoints import CheckpointError, load, save_original, save_transformers
from hqlabel.model.sam_config import ConfigError, SamHQConfig, TinyVisionConfig, vit_config
from hqlabel.model.sam_hq import SamHQ
from hqlabel.model.weight_names import DECIDING, POSITIONS, TIED_POSITIONS, rename

VIT = vit_config(
    embed_dim=32, depth=3, num_heads=2, global_attn_indexes=(1, 2), window_size=3, image_size=64,
    out_channels=32, mlp_dim=64,
)  # fmt: skip
TINY = SamHQConfig.around(
    TinyVisionConfig(
        embed_dims=(16, 32, 40, 80),
        depths=(1, 1, 1, 1),
        num_heads=(2, 4, 5),
        image_size=128,
        output_channels=32,
    ),
    mlp_dim=64,
)
SHARED_PE = "shared_image_embedding.positional_embedding"


@pytest.fixture(scope="module")
def model():
    return SamHQ.from_config(VIT, 0, position_std=0.5)


@pytest.fixture
def folder(model, tmp_path):
    save_transformers(model, tmp_path / "folder", license="Apache-2.0")
    return tmp_path / "folder"


@pytest.fixture
def pth(model, tmp_path):
    save_original(model, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def same_weights(one: SamHQ, other: SamHQ) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def edited_pth(pth: Path, edit) -> bytes:
    """The bytes of a .pth after `edit` has changed its dict of tensors."""
    tensors = torch.load(pth, weights_only=True)
    return as_pth(edit(tensors) or tensors)


def as_pth(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edited_folder(folder: Path, edit) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    edit(tensors)
    safetensors.torch.save_file(tensors, file)


# Where weights may lie


def test_both_layouts_come_back_bit_for_bit(tmp_path):
    model = SamHQ.from_config(VIT, 0, position_std=0.5)
    written = [save_transformers(model, tmp_path / "folder"), save_original(model, tmp_path / "model.pth")]
    loaded = [load(tmp_path / "folder"), load(tmp_path / "model.pth")]

    for before, after in zip(written, loaded, strict=True):
        assert same_weights(after.model, model)
        assert (after.weights.layout, after.weights.sha256) == (before.layout, before.sha256)
        assert not after.model.training
    assert loaded[0].model.config == VIT


def test_light_hq_sam_comes_back_bit_for_bit_from_the_original_layout_alone(tmp_path):
    model = SamHQ.from_config(TINY, 0, position_std=0.5)
    save_original(model, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"vision_config": {"image_size": 128}}')

    assert same_weights(load(tmp_path).model, model)
    assert load(tmp_path).model.config == TINY
    assert load(tmp_path / "pytorch_model.bin").model.config == TINY
    assert load((tmp_path / "pytorch_model.bin").read_bytes()).model.config.image_size == 1024
    with pytest.raises(CheckpointError, match="transformers has no TinyViT"):
        save_transformers(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_the_record_says_what_was_loaded(folder, pth):
    data = (folder / "model.safetensors").read_bytes()
    weights = load(folder).weights

    assert weights.sha256 == hashlib.sha256(data).hexdigest()
    assert (weights.layout, weights.architecture, weights.license) == (
        "transformers",
        "vit_32x3",
        "Apache-2.0",
    )
    assert weights.source == str(folder)
    assert load(pth).weights.layout == "original"
    assert load(pth).weights.license is None


def test_bytes_are_hashed_before_anything_reads_them(folder, pth, monkeypatch):
    events = []

    def noted(name, function):
        return lambda *args, **options: (events.append(name), function(*args, **options))[1]

    monkeypatch.setattr(checkpoints.hashlib, "sha256", noted("hash", hashlib.sha256))
    monkeypatch.setattr(checkpoints.torch, "load", noted("parse", torch.load))
    monkeypatch.setattr(checkpoints.safetensors.torch, "load", noted("parse", safetensors.torch.load))
    for source in (pth, folder):
        load(source)

    assert events == ["hash", "parse"] * 2


def test_bytes_open_files_and_folders_elsewhere_load_like_paths(model, folder, pth):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pth.open("rb") as opened:
        sources = [pth.read_bytes(), opened, io.BytesIO(files["model.safetensors"]), files, str(folder)]
        sources.append({name: io.BytesIO(data) for name, data in files.items()})
        sources += [folder / "model.safetensors", str(pth)]
        for source in sources:
            assert same_weights(load(source).model, model)


def test_shards_load_as_one_and_hash_in_name_order(model, folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00002-of-00002.safetensors": names[::2], "model-00001-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    joined = b"".join((folder / file).read_bytes() for file in sorted(parts))

    for source in (folder, index):
        assert same_weights(load(source).model, model)
        assert load(source).weights.sha256 == hashlib.sha256(joined).hexdigest()

    weight_map[names[0]] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=f"disagree on {names[0]}"):
        load(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00001-of-00002.* which is not there"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {names[0]: "../other.safetensors"}}))
    with pytest.raises(CheckpointError, match="plain file name"):
        load(folder)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub's client, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_in_cache(cache: Path, repo: str, files: dict[str, bytes]) -> str:
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = cache / ("models--" + repo.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for name, data in files.items():
        path = root / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return commit


def test_a_hub_id_loads_from_the_clients_cache(model, folder, pth, hub_cache):
    commit = put_in_cache(
        hub_cache, "syscv-community/sam-hq-vit-base", {p.name: p.read_bytes() for p in folder.iterdir()}
    )
    put_in_cache(hub_cache, "lkeab/hq-sam", {"sam_hq_vit_b.pth": pth.read_bytes()})
    whole, single = load("syscv-community/sam-hq-vit-base"), load("lkeab/hq-sam/sam_hq_vit_b.pth")

    assert same_weights(whole.model, model)
    assert same_weights(single.model, model)
    assert whole.weights.source == f"syscv-community/sam-hq-vit-base@{commit}"
    assert single.weights.source == f"lkeab/hq-sam/sam_hq_vit_b.pth@{commit}"
    assert whole.weights.license == single.weights.license == "Apache-2.0"


def test_the_commit_is_found_in_a_cache_below_a_folder_of_snapshots(folder, monkeypatch, tmp_path):
    cache = tmp_path / "snapshots" / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = put_in_cache(cache, "some/model", {p.name: p.read_bytes() for p in folder.iterdir()})

    assert load("some/model").weights.source == f"some/model@{commit}"
    assert load("some/model", revision=commit).weights.source == f"some/model@{commit}"


def test_a_hub_that_cannot_be_reached_is_said_and_asked_once(hub_cache, monkeypatch):
    asked = []

    def download(repo, name, **options):
        asked.append(options["local_files_only"])
        return real(repo, name, **options)

    real = huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        CheckpointError, match=r"some/model: the hub does not answer, and a file of the model"
    ):
        load("some/model")
    assert asked == [False, True, True, True]
    with pytest.raises(
        CheckpointError, match=r"some/model: the hub does not answer, and file\.pth is not in"
    ):
        load("some/model/file.pth")


def test_what_is_in_the_cache_is_found_behind_a_name_that_is_not(model, folder, hub_cache):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    put_in_cache(hub_cache, "some/model", {p.name: p.read_bytes() for p in folder.iterdir()})

    assert same_weights(load("some/model").model, model)
    put_in_cache(hub_cache, "some/torn", {"pytorch_model.bin": b"PK"})
    with pytest.raises(CheckpointError, match="damaged, or more than plain tensors"):
        load("some/torn")


def test_an_existing_path_is_never_a_hub_id(model, tmp_path, monkeypatch, hub_cache):
    save_transformers(model, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)

    assert load("org/name").weights.source == "org/name"


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder, nor a hub id"):
        load(tmp_path / "absent.pth")
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        load(tmp_path)


# Files that are not weights


class Canary:
    """Unpickled without restriction it would make a folder."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.mark.parametrize("forced", ["0", "1"])
@pytest.mark.filterwarnings(
    "ignore"
)  # torch warns when it obeys the variable; an error would hide that it does
def test_a_file_that_would_run_code_is_refused_also_when_the_environment_would_allow_it(
    tmp_path, monkeypatch, forced
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    place = tmp_path / "canary"
    data = as_pth({"image_encoder.pos_embed": Canary(str(place))})

    with pytest.raises(CheckpointError, match=r"not a file of plain tensors.*mkdir") as refusal:
        load(data)
    assert not place.exists()
    assert "weights_only" not in str(refusal.value)  # torch's own message advises to turn it off


def test_the_canary_sings_without_the_restriction(tmp_path):
    """Guards the test above: the same file, loaded without restriction, does run code."""
    place = tmp_path / "canary"
    torch.load(io.BytesIO(as_pth(Canary(str(place)))), weights_only=False)

    assert place.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html>", "neither a .pth nor a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04 broken", "damaged"),
        (b"\x10\0\0\0\0\0\0\0{broken", "damaged safetensors"),
        (as_pth([1, 2]), "holds a list"),
        (as_pth({}), "holds a dict without tensors by name"),
        (as_pth({"epoch": 3}), "holds a dict of 'epoch' without tensors by name"),
    ],
)
def test_other_files_are_refused(data, message):
    with pytest.raises(CheckpointError, match=message):
        load(data)


@pytest.mark.parametrize("keep", [0.3, 0.9])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_torn_file_is_refused(folder, pth, tmp_path, name, keep):
    whole = (folder / name if name != "model.pth" else pth).read_bytes()

    with pytest.raises(CheckpointError):
        load(whole[: int(keep * len(whole))])


# Tensors that are not what they should be


def test_a_missing_tensor_is_named(pth):
    with pytest.raises(
        CheckpointError, match=r"1 tensor is missing: mask_decoder\.hf_mlp\.layers\.1\.weight"
    ):
        load(
            edited_pth(
                pth, lambda t: {n: x for n, x in t.items() if n != "mask_decoder.hf_mlp.layers.1.weight"}
            )
        )


@pytest.mark.parametrize(
    "name", ["image_encoder.blocks.3.surprise", "optimizer.state", "image_encoder.blocks.9.norm1.bias"]
)
def test_a_tensor_left_over_is_named(pth, name):
    with pytest.raises(CheckpointError, match=f"left over: {name}|no tensor of image_encoder.blocks.3"):
        load(edited_pth(pth, lambda t: t.update({name: torch.zeros(32)})))


def test_a_tensor_of_the_wrong_shape_or_kind_is_named(pth):
    name = "mask_decoder.output_upscaling.0.bias"
    for value, message in [
        (torch.zeros(9), r"has shape \(9,\); wanted \(8,\)"),
        (torch.zeros(8, dtype=torch.int64), "is torch.int64"),
        (torch.zeros(8, dtype=torch.complex64), "is torch.complex64"),
        (torch.ones(8).to_sparse(), "sparse or without data"),
        (torch.ones(8, device="meta"), "sparse or without data"),
        (torch.full((8,), torch.nan), "not finite"),
        (torch.full((8,), torch.inf), "not finite"),
    ]:
        with pytest.raises(CheckpointError, match=f"tensor {name} .*{message}"):
            load(edited_pth(pth, lambda t, v=value: t.update({name: v})))


def all_shapes_but(shape: torch.Size):
    """A tensor of one element more along each axis, of many more, of an axis more, and of none."""
    for axis, length in enumerate(shape):
        yield torch.zeros([*shape[:axis], length + 1, *shape[axis + 1 :]])
    yield torch.zeros([*shape[:-1], 64 * shape[-1]])
    yield torch.zeros([1, *shape])
    yield torch.zeros([])
    yield torch.zeros([0])


@pytest.mark.parametrize(
    ("config", "layout"),
    [(VIT, "original"), (VIT, "transformers"), (TINY, "original")],
    ids=["vit-original", "vit-transformers", "tiny-original"],
)
def test_a_tensor_that_decides_the_architecture_is_named_as_the_file_does(config, layout):
    """What defines the model cannot be compared to it; it must not end as another model or a stray error."""
    tensors = checkpoints.stored_tensors(SamHQ.from_config(config, 0), layout)
    deciding = {rename(name, "original", layout) for name in DECIDING} & set(tensors)
    assert len(deciding) == {VIT: 8, TINY: 9}[config]
    for name in deciding:
        for value in (None, *all_shapes_but(tensors[name].shape)):
            edited = {n: t for n, t in tensors.items() if n != name}
            if value is not None:
                edited[name] = value
            found, named, _ = checkpoints.original_names(edited)
            with pytest.raises(CheckpointError, match=re.escape(name)):
                checkpoints.build(checkpoints.read_config(named, {}, found), named, found)


def test_a_tensor_that_stands_in_a_file_twice_is_refused(pth):
    with pytest.raises(CheckpointError, match=r"twice, with and without `module\.`: mask_decoder\.iou_token"):
        load(edited_pth(pth, lambda t: t.update({"module.mask_decoder.iou_token.weight": torch.ones(1, 32)})))


def test_swapping_two_layers_of_an_mlp_would_be_seen(model, pth):
    """`layers.1` of one layout is `layers.0` of the other: the middle layer must stay the middle layer."""
    tensors = torch.load(pth, weights_only=True)

    assert torch.equal(
        tensors["mask_decoder.hf_mlp.layers.0.weight"], model.mask_decoder.hf_mlp.layers[0].weight
    )
    assert torch.equal(
        tensors["mask_decoder.hf_mlp.layers.1.weight"], model.mask_decoder.hf_mlp.layers[1].weight
    )


def test_the_middle_layer_is_layers_0_in_transformers(model, folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    ours = model.mask_decoder.hf_mlp.layers

    assert torch.equal(tensors["mask_decoder.hq_mask_mlp.proj_in.weight"], ours[0].weight)
    assert torch.equal(tensors["mask_decoder.hq_mask_mlp.layers.0.weight"], ours[1].weight)
    assert torch.equal(tensors["mask_decoder.hq_mask_mlp.proj_out.weight"], ours[2].weight)


def test_wrapped_and_prefixed_files_load(model, pth):
    for wrapper in ("model", "state_dict"):
        data = edited_pth(pth, lambda t, w=wrapper: {w: {f"module.{n}": x for n, x in t.items()}})
        assert same_weights(load(data).model, model)


def test_what_nothing_reads_is_ignored_by_name(pth):
    extra = {
        "pixel_mean": torch.zeros(3),
        "pixel_std": torch.ones(3),
        "image_encoder.norm_head.weight": torch.ones(4),
    }

    assert load(edited_pth(pth, lambda t: t.update(extra))).weights.ignored_keys == tuple(sorted(extra))


def test_the_positional_matrix_may_stand_under_either_name_or_both(model, folder):
    edited_folder(folder, lambda t: t.update({TIED_POSITIONS: t[SHARED_PE].clone()}))
    assert same_weights(load(folder).model, model)
    edited_folder(folder, lambda t: t.pop(SHARED_PE))
    assert same_weights(load(folder).model, model)
    edited_folder(folder, lambda t: t.update({SHARED_PE: t[TIED_POSITIONS] + 1}))
    with pytest.raises(CheckpointError, match=r"shared_embedding\.positional_embedding differs from"):
        load(folder)


def foreign(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    hq = ("hf_token", "hf_mlp", "compress_vit_feat", "embedding_encoder", "embedding_maskfeature")
    plain = {n: t for n, t in tensors.items() if not any(part in n for part in hq)}
    if kind == "plain SAM":
        return plain
    if kind == "MobileSAM":
        return plain | {"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(3)}
    return {
        "image_encoder.trunk.pos_embed": torch.zeros(3),
        "sam_mask_decoder.iou_token.weight": torch.zeros(3),
    }


@pytest.mark.parametrize("kind", ["plain SAM", "MobileSAM", "SAM 2"])
def test_related_models_are_refused_by_name(pth, kind):
    with pytest.raises(CheckpointError, match=f"the file holds {kind}, not SAM-HQ"):
        load(edited_pth(pth, lambda t: foreign(t, kind)))


def test_plain_sam_in_the_transformers_layout_is_refused_by_name(folder):
    hq = ("hq_token", "hq_mask_mlp", "compress_vit", "encoder_conv", "encoder_norm", "mask_conv", "mask_norm")
    edited_folder(folder, lambda t: [t.pop(n) for n in list(t) if n.split(".")[1].startswith(hq)])

    with pytest.raises(CheckpointError, match="the file holds plain SAM"):
        load(folder)


def test_something_else_altogether_is_refused():
    with pytest.raises(CheckpointError, match=r"none of an image encoder.*backbone\.weight"):
        load(as_pth({"backbone.weight": torch.zeros(3)}))


def test_a_config_that_contradicts_the_tensors_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["window_size"] = 2
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ConfigError, match=r"config\.json and tensors disagree: .*window_size is 2, but 3"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        load(folder)
    (folder / "config.json").write_text('{"model_type": "sam"}')
    with pytest.raises(ConfigError, match="model_type 'sam'"):
        load(folder)
    (folder / "config.json").unlink()
    assert load(folder).model.config == VIT


# Precision


def test_half_precision_files_load_as_float32_with_whole_positions(model, tmp_path):
    save_transformers(model, tmp_path, half=True)
    loaded = load(tmp_path).model
    full, stored = model.state_dict(), loaded.state_dict()

    assert {t.dtype for t in stored.values()} == {torch.float32}
    assert torch.equal(stored[POSITIONS], full[POSITIONS])
    assert all(torch.equal(stored[n], t.half().float()) for n, t in full.items() if n != POSITIONS)


def test_a_value_too_large_for_half_precision_is_named(tmp_path):
    model = SamHQ.from_config(VIT, 0)
    model.mask_decoder.output_upscaling[0].bias.data[0] = 1e5

    with pytest.raises(CheckpointError, match=r"upscale_conv1\.bias holds 100000"):
        save_transformers(model, tmp_path, half=True)
    assert not any(tmp_path.iterdir())


def test_a_model_that_was_cast_is_not_saved(tmp_path):
    model = SamHQ.from_config(VIT, 0).cast(torch.bfloat16)

    with pytest.raises(CheckpointError, match="save the model before casting it"):
        save_original(model, tmp_path / "model.pth")


def test_a_dtype_to_compute_in_is_taken_at_loading(folder):
    assert load(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="is not supported"):
        load(folder, dtype=torch.float16)


def test_loading_leaves_nothing_tied_to_the_file(folder):
    model = load(folder).model
    before = model.image_encoder.pos_embed.clone()
    shutil.rmtree(folder)

    assert torch.equal(model.image_encoder.pos_embed, before)
    with torch.no_grad():
        model.image_encoder.pos_embed.add_(1)  # owned, writable memory


def test_a_loaded_model_answers_like_the_saved_one(model, folder):
    image, boxes = np.full((50, 40, 3), 90, np.uint8), np.array([[3.0, 4, 30, 40]])
    answers = [m.decode_boxes(m.encode_images([image]), [boxes]) for m in (model, load(folder).model)]

    assert torch.equal(answers[0].low_res_NMHW, answers[1].low_res_NMHW)


def test_the_package_that_reads_weights_imports_no_transformers_timm_or_torchvision():
    code = (
        "import sys, model.checkpoints, model.sam_hq;"
        "print([m for m in ('transformers', 'timm', 'torchvision', 'ray', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )

    assert out.stdout.strip() == "[]"


def test_the_demo_model_has_its_place_in_the_package():
    assert Path(checkpoints.__file__).parent / "weights" / "hqlabel-demo" == checkpoints.DEMO_FOLDER
