import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hqlabel.model.sam_config import (
    PUBLISHED,
    ConfigError,
    SamHQConfig,
    TinyVisionConfig,
    VisionConfig,
    check_config_json,
    config_to_json,
    stated_side,
    vit_config,
)
from hqlabel.model.sam_hq import SamHQ
from hqlabel.model.weight_names import config_from_shapes

SMALL = vit_config(
    embed_dim=96, depth=3, num_heads=3, global_attn_indexes=(1, 2), window_size=7, image_size=224
)
SMALL_TINY = SamHQConfig.around(
    TinyVisionConfig(embed_dims=(16, 32, 40, 80), depths=(1, 2, 1, 1), num_heads=(2, 4, 5), image_size=256)
)
FOLDER = Path(__file__).parent / "saved_configs"
SAVED_CONFIGS = sorted(FOLDER.glob("*.json"))
ALL = {**PUBLISHED, "small": SMALL, "small_tiny": SMALL_TINY}


def values(config=SMALL, **changes):
    """A parsed config.json with changes such as vision_config__window_size=3."""
    result = json.loads(json.dumps(config_to_json(config)))
    for path, value in changes.items():
        *parts, key = path.split("__")
        target = result
        for part in parts:
            target = target[part]
        target[key] = value
    return result


@pytest.mark.parametrize("name", list(ALL))
def test_a_configuration_agrees_with_its_own_file(name):
    assert check_config_json(values(ALL[name]), ALL[name]) == ()


@pytest.mark.parametrize("name", ["small", "small_tiny", "vit_b"])
def test_a_configuration_comes_back_from_the_shapes_of_its_tensors(name):
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in SamHQ(ALL[name]).state_dict().items()}

    assert config_from_shapes(shapes, image_size=ALL[name].image_size) == ALL[name]


def test_names_of_sizes():
    assert [c.vision.name for c in PUBLISHED.values()] == list(PUBLISHED)
    assert SMALL.vision.name == "vit_96x3"
    assert SMALL_TINY.vision.name == "tiny_16-32-40-80x1-2-1-1"


def test_sides_follow_from_the_grid():
    assert (SMALL.image_size, SMALL.vision.grid, SMALL.mask_size) == (224, 14, 56)
    assert (PUBLISHED["vit_tiny"].vision.grid, PUBLISHED["vit_tiny"].mask_size) == (64, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 100}, "multiple of the 12 attention heads"),
        ({"global_attn_indexes": ()}, "gives the early feature"),
        ({"global_attn_indexes": (12,)}, "one or more of the 12 blocks"),
        ({"global_attn_indexes": (5, 2)}, "in rising order"),
        ({"num_attention_heads": 0}, "multiple of the 0 attention heads"),
        ({"window_size": 64}, "another than the grid's side 64"),
        ({"image_size": 1000}, "multiple of 16"),
    ],
)
def test_an_impossible_encoder_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        VisionConfig(**changes)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("prompt_encoder", {"image_size": 512}, "image_size differ: 224 and 512"),
        ("prompt_encoder", {"hidden_size": 128}, "hidden_size differ: 128 and 256"),
        ("mask_decoder", {"vit_dim": 768}, "vit_dim differ: 96 and 768"),
        ("mask_decoder", {"hidden_size": 128}, "hidden_size differ: 256 and 128"),
        ("mask_decoder", {"hidden_size": 100}, "multiple of 16"),
        ("prompt_encoder", {"mask_input_channels": 2}, "mask_input_channels 2 must be a multiple of 4"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **{part: replace(getattr(SMALL, part), **changes)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "sam"}, "model_type 'sam'; wanted 'sam_hq'"),
        ({"vision_encoder_dim": 768}, "remote code"),
        ({"vision_config__model_type": "sam_vision_model"}, "but 'sam_hq_vision_model'"),
        ({"vision_config__hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; only 'gelu'"),
        ({"vision_config__layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        ({"vision_config__use_rel_pos": False}, "use_rel_pos is False"),
        ({"vision_config__num_pos_feats": 64}, "num_pos_feats is 64, but 128 by the tensors"),
        ({"vision_config__image_size": [224, 256]}, r"image_size is \[224, 256\], but 224"),
        ({"vision_config__image_size": "224"}, "image_size is '224', but 224"),
        ({"vision_config__window_size": "7"}, "window_size is '7', but 7"),
        ({"vision_config__window_size": [7, 8]}, r"window_size is \[7, 8\], but 7"),
        (
            {"vision_config__num_attention_heads": -3},
            "heads is -3, but 3",
        ),
        ({"vision_config__global_attn_indexes": 1}, r"global_attn_indexes is 1, but \[1, 2\]"),
        ({"vision_config__mlp_ratio": "4", "vision_config__mlp_dim": None}, "mlp_ratio is '4', but 4.0"),
        ({"vision_config__mlp_ratio": float("nan"), "vision_config__mlp_dim": None}, "mlp_ratio is nan"),
        ({"vision_config": [1, 2]}, "vision_config is \\[1, 2\\]; wanted an object"),
        ({"prompt_encoder_config__image_embedding_size": 64}, "image_embedding_size is 64, but 14"),
        ({"prompt_encoder_config__num_point_embeddings": 5}, "num_point_embeddings is 5"),
        ({"mask_decoder_config__iou_head_depth": 2}, "iou_head_depth is 2"),
        ({"mask_decoder_config__layer_norm_eps": 1e-3}, "layer_norm_eps is 0.001; only 1e-05 or 1e-06"),
        ({"mask_decoder_config__num_multimask_outputs": 4}, "num_multimask_outputs is 4; only 3"),
        ({"mask_decoder_config__num_attention_heads": 4}, "num_attention_heads is 4; only 8"),
        ({"vision_config__patch_size": 14}, "patch_size is 14; only 16 is known"),
    ],
)
def test_a_file_that_asks_for_the_unknown_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config_json(values(**changes), SMALL)


def test_of_light_hq_sam_a_file_states_the_side_and_no_other_encoder():
    wide = {"vision_config": {"image_size": [256, 256], "hidden_size": 768}}
    assert stated_side(wide) == stated_side({"vision_config": {"image_size": 256.0}}) == 256
    assert check_config_json(wide, SMALL_TINY) == ("vision_config.hidden_size",)
    for value in ("256", None, [], 256.5, float("nan"), {}):
        assert stated_side({"vision_config": {"image_size": value}}) is None
    with pytest.raises(
        ConfigError, match=r"vision_config\.model_type is 'sam_hq_vision_model', but 'TinyViT'"
    ):
        check_config_json({"vision_config": {"model_type": "sam_hq_vision_model"}}, SMALL_TINY)


def test_what_a_file_leaves_out_is_not_compared():
    assert check_config_json({}, SMALL) == ()
    assert check_config_json({"vision_config": {"hidden_size": 96}, "mask_decoder_config": None}, SMALL) == ()


def test_sizes_may_be_written_as_pairs():
    assert check_config_json(values(vision_config__image_size=[224, 224]), SMALL) == ()


def test_an_empty_an_absent_and_a_null_model_type_are_the_same():
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    for name in ("", None):
        changes = {f"{part}__model_type": name for part in parts} | {"model_type": name}
        assert check_config_json(values(**changes), SMALL) == ()
    assert (
        check_config_json({"model_type": "sam_hq", "prompt_encoder_config": {"model_type": ""}}, SMALL) == ()
    )


def test_keys_that_are_not_known_are_told_and_change_nothing():
    new = {"use_cache": True, "_commit_hash": None, "auto_map": {}, "initializer_factor": 1.0}
    parts = {f"{part}__novelty": [1] for part in ("vision_config", "mask_decoder_config")}
    file = values(**new, **parts)

    unknown = (*sorted(new), "vision_config.novelty", "mask_decoder_config.novelty")
    assert check_config_json(file, SMALL) == unknown


def test_a_ratio_next_to_the_width_that_it_would_give_is_not_read():
    """As in transformers, which writes its default ratio next to any `mlp_dim`."""
    assert check_config_json(values(vision_config__mlp_ratio=3.0), SMALL) == ()
    rounded_down = replace(SMALL, vision=replace(SMALL.vision, mlp_dim=316))
    file = values(vision_config__mlp_ratio=3.3, vision_config__mlp_dim=None)
    assert check_config_json(file, rounded_down) == ()


def test_a_window_says_nothing_where_every_block_attends_to_the_whole_grid():
    vision = {"num_hidden_layers": 2, "global_attn_indexes": [0, 1], "image_size": 128, "window_size": 14}
    config = replace(SMALL.vision, num_hidden_layers=2, global_attn_indexes=(0, 1), window_size=3)

    small = SamHQConfig.around(replace(config, image_size=128))
    assert check_config_json({"vision_config": vision}, small) == ()
    vision["global_attn_indexes"] = [1]
    with pytest.raises(ConfigError, match="global_attn_indexes"):
        check_config_json({"vision_config": vision}, small)


@pytest.mark.parametrize("name", [path.stem for path in SAVED_CONFIGS])
def test_the_files_of_each_release_say_what_they_were_saved_from(name):
    file = json.loads((FOLDER / f"{name}.json").read_text())
    saved = vit_config(
        embed_dim=64, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=5, image_size=128
    )

    assert len(SAVED_CONFIGS) == 4
    check_config_json(file, saved)


@pytest.mark.parametrize(
    "missing",
    ["image_encoder.pos_embed", "prompt_encoder.no_mask_embed.weight", "mask_decoder.iou_token.weight"],
)
def test_shapes_without_a_deciding_tensor_are_refused_by_its_name(missing):
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in SamHQ(SMALL).state_dict().items()}
    del shapes[missing]

    with pytest.raises(ConfigError, match=missing):
        config_from_shapes(shapes)


def test_windows_of_two_sizes_are_refused():
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in SamHQ(SMALL).state_dict().items()}
    shapes["image_encoder.blocks.1.attn.rel_pos_h"] = (9, 32)

    with pytest.raises(ConfigError, match=r"windows of \[5, 7\]"):
        config_from_shapes(shapes)
