"""HQ-SAM 2's file as it is published: names and shapes of four sizes, strictness, what shapes cannot tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hqlabel.model.checkpoints import CheckpointError, load, save_original, save_transformers
from hqlabel.model.hq_sam2.hiera_config import (
    HIERA_SIZES,
    HieraConfig,
    hiera_from_shapes,
    hq_sam2_config,
)
from hqlabel.model.hq_sam2.hq_sam2 import HQSam2
from hqlabel.model.hq_sam2.hq_sam2_names import VIDEO, name_in_file, name_in_model
from hqlabel.model.sam_config import ConfigError
from tests.parity.hq_sam2_recipe import (
    SMALL,
    layout_of,
    model_of,
    picture,
    published_tensors,
    write_published,
)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return published_tensors(model_of(SMALL, 9))


def folder_with(tmp_path: Path, tensors: dict[str, torch.Tensor], **stated: Any) -> Path:
    """A folder with these tensors; `stated`: keys of its config.json that differ, None for none."""
    torch.save({"model": tensors}, tmp_path / "pytorch_model.bin")
    values = {key: value for key, value in {**SMALL, **stated}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize("size", HIERA_SIZES)
def test_the_names_and_shapes_of_every_size_are_the_published_ones(size: str) -> None:
    layout = layout_of(size)
    image = {name: shape for name, (shape, use) in layout.items() if use == "image"}
    with torch.device("meta"):
        model = HQSam2(hq_sam2_config(HIERA_SIZES[size]))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    assert {name_in_file(name): shape for name, shape in shapes.items()} == image
    assert {name_in_model(name) for name in image} == set(shapes)
    assert {name for name in layout if VIDEO.fullmatch(name)} == layout.keys() - image.keys()
    found = hiera_from_shapes(shapes, {})
    assert found.vision == HIERA_SIZES[size]
    assert found.vision.name == size


def test_a_published_file_loads_and_says_what_it_is(tmp_path: Path) -> None:
    loaded = load(write_published(tmp_path))
    assert isinstance(loaded.model, HQSam2)
    assert loaded.model.fit == "stretch"
    assert loaded.weights.layout == "hq_sam2"
    assert loaded.weights.architecture == "hiera_16x1-2-3-1"
    assert len(loaded.weights.ignored_keys) == 160
    assert loaded.weights.warnings == ()
    expected = model_of(SMALL, 9).state_dict()
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_file_saved_here_loads_again_with_the_same_tensors(tmp_path: Path) -> None:
    model = model_of(SMALL, 4)
    written = save_original(model, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    loaded = load(tmp_path)
    assert (loaded.weights.sha256, loaded.weights.layout) == (written.sha256, written.layout)
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="transformers has no HQ-SAM 2"):
        save_transformers(model, tmp_path)


@pytest.mark.parametrize("wrapped", ["module.", "model."])
def test_a_wrapped_models_file_loads(wrapped: str, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    load(folder_with(tmp_path, {wrapped + name: value for name, value in tensors.items()}))


@pytest.mark.parametrize(
    "name",
    [
        "no_mem_embed",
        "sam_mask_decoder.hf_token.weight",
        "sam_mask_decoder.conv_s0.weight",
        "sam_mask_decoder.pred_obj_score_head.layers.1.bias",
        "sam_mask_decoder.transformer.layers.1.mlp.layers.0.weight",
        "sam_prompt_encoder.not_a_point_embed.weight",
        "image_encoder.trunk.pos_embed_window",
        "image_encoder.trunk.blocks.1.proj.bias",
        "image_encoder.neck.convs.3.conv.bias",
    ],
)
def test_a_missing_tensor_is_named(name: str, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    rest = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(CheckpointError, match=rf"1 tensor is missing: {name}$"):
        load(folder_with(tmp_path, rest))


@pytest.mark.parametrize(
    "name",
    [
        "no_mem_embedding",
        "memory_attention.layers.0.self_attn.q_proj.scale",
        "memory_encoder.fuser.gamma",
        "obj_ptr_proj.weight",
        "sam_mask_decoder.conv_s2.weight",
        "sam_mask_decoder.transformer.layers.0.mlp.lin1.weight",
        "image_encoder.no_mem_embed",
        "image_encoder.trunk.blocks.1.attn.qkv.scale",
    ],
)
def test_a_tensor_of_no_known_name_is_named(
    name: str, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"left over: {name}"):
        load(folder_with(tmp_path, tensors | {name: torch.zeros(2)}))


def test_a_tensor_of_another_shape_is_named(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    name = "sam_mask_decoder.conv_s1.bias"
    with pytest.raises(CheckpointError, match=rf"tensor {name} has shape \(3,\); wanted \(8,\)"):
        load(folder_with(tmp_path, tensors | {name: torch.zeros(3)}))


def test_plain_sam_2_is_refused_for_its_missing_hq_token(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    hq = ("sam_mask_decoder.hf_", "sam_mask_decoder.embedding_maskfeature")
    with pytest.raises(CheckpointError, match="the file holds SAM 2, not SAM-HQ: there is no HQ token"):
        load(folder_with(tmp_path, {k: v for k, v in tensors.items() if not k.startswith(hq)}))


def test_a_size_that_is_not_published_needs_to_be_told_what_shapes_cannot_tell(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"none of the published sizes.*config\.json with window_spec"):
        load(folder_with(tmp_path, tensors, window_spec=None))
    path = tmp_path / "alone.pt"
    torch.save({"model": tensors}, path)
    with pytest.raises(CheckpointError, match=r"num_heads, global_att_blocks, window_spec next to"):
        load(path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("embed_dim", 32, "embed_dim is 32, but 16 by the tensors"),
        ("stages", [1, 2, 2, 1], r"stages is .*, but \(1, 2, 3, 1\) by the tensors"),
        ("d_model", 64, "d_model is 64, but 32 by the tensors"),
        ("model_type", "sam_hq", "model_type 'sam_hq'; wanted 'hq_sam2'"),
        ("num_heads", 3, "multiple of 3 heads"),
        ("num_heads", "one", "num_heads is 'one'; wanted whole numbers"),
        ("window_spec", [8, 4, 6], "four numbers"),
        ("window_spec", [8, 3, 6, 3], "must be even"),
        ("global_att_blocks", [7], "blocks of the 7"),
        ("image_size", 200, "image_size 200"),
    ],
)
def test_a_config_json_that_does_not_fit_is_refused(
    key: str, value: Any, said: str, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=said):
        load(folder_with(tmp_path, tensors, **{key: value}))


def test_an_unknown_key_of_config_json_is_a_warning(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (warning,) = load(folder_with(tmp_path, tensors, q_pool=3)).weights.warnings
    assert "q_pool" in warning


def test_an_image_size_that_is_stated_is_followed(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = load(folder_with(tmp_path, tensors, image_size=128)).model
    embedding = model.encode_images([picture(50, 90, 0)])
    assert embedding.embedding_BCGG.shape == (1, 32, 8, 8)
    assert embedding.resized_hw == ((128, 128),)
    answer = model.decode_boxes(embedding, [np.array([[5, 5, 60, 40]])])
    assert answer.low_res_NMHW.shape == (1, 1, 32, 32)


def test_blocks_of_the_largest_size_have_the_windows_of_the_original() -> None:
    blocks = HieraConfig().blocks()
    assert blocks[2] == (1, 8, True)  # it pools, in windows of the stage before
    assert blocks[3] == (1, 4, False)
    assert blocks[8] == (2, 4, True)
    assert blocks[9] == (2, 16, False)
    assert [i for i, (_, window, _) in enumerate(blocks) if window == 0] == [23, 33, 43]
    assert blocks[44] == (3, 16, True)
    assert blocks[47] == (3, 8, False)
