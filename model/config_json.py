"""Transformers' `config.json` of a SAM-HQ model, held against what is followed here, and written in full.

A key is known by name and then checked, or listed as without effect, or unknown. An unknown one is a warning:
each release of transformers brings some, and the tensors decide the architecture. A known one that asks for
what is not done here is an error.

Light HQ-SAM has no class in transformers. Its file has the same form with a `vision_config` of our own,
`model_type` "sam_hq_tiny_vit".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from model.config import (
    ConfigError,
    MaskDecoderConfig,
    PromptEncoderConfig,
    SamHQConfig,
    TinyVisionConfig,
    VisionConfig,
)

TOP_TYPE, VIT_TYPE, TINY_TYPE = "sam_hq", "sam_hq_vision_model", "sam_hq_tiny_vit"
PROMPT_TYPE, DECODER_TYPE = "sam_hq_prompt_encoder", "sam_hq_mask_decoder"

BLOCK_NUMBERS = "global_attn_indexes"
"""The one list of any length, and the one that counts from 0."""

MLP_RATIO_LIMIT = 1000
"""Beyond it nothing is an MLP: keeps infinity and NaN out."""

PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")

# fmt: off
WITHOUT_EFFECT = frozenset({
    "architectures", "transformers_version", "torch_dtype", "dtype", "initializer_range",
    "tie_word_embeddings", "attention_dropout", "scale", "_name_or_path", "_attn_implementation",
    "_attn_implementation_autoset", "output_attentions", "output_hidden_states", "return_dict",
    "use_return_dict", "torchscript", "use_bfloat16", "chunk_size_feed_forward", "is_encoder_decoder",
    "is_decoder", "id2label", "label2id", "problem_type", "tf_legacy_loss", "pruned_heads",
    "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "finetuning_task", "tokenizer_class", "prefix", "bos_token_id",
    "pad_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "task_specific_params",
})
# fmt: on
"""Keys that transformers of some version writes into every part; none of them changes a mask."""

VIT_FIXED: Mapping[str, tuple[Any, ...]] = {
    "num_channels": (3,),
    "hidden_act": ("gelu",),
    "layer_norm_eps": (1e-6,),
    "qkv_bias": (True,),
    "use_abs_pos": (True,),
    "use_rel_pos": (True,),
}
PROMPT_FIXED: Mapping[str, tuple[Any, ...]] = {
    "num_point_embeddings": (4,),
    "hidden_act": ("gelu",),
    "layer_norm_eps": (1e-6,),
}
DECODER_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("relu",),
    "iou_head_depth": (3,),
    # The published files say 1e-6, the port's default. The weights were trained with 1e-5, and both are
    # computed with 1e-5 here; masks differ by 1e-4 of the largest logit.
    "layer_norm_eps": (1e-5, 1e-6),
}


FIXED = dict(zip(PARTS, (VIT_FIXED, PROMPT_FIXED, DECODER_FIXED), strict=True))


def config_from_json(values: Mapping[str, Any]) -> SamHQConfig:
    """Return the configuration in a parsed `config.json` of transformers.

    A key left out has transformers' default, that of ViT-B. Weights do not need it: `checkpoints.load` reads
    the architecture from the tensors, and holds the file against it.

    Raises:
        ConfigError: as `unknown_keys`, or a file that contradicts itself.
    """
    unknown_keys(values)
    vision, prompt, decoder = (part_of(values, name) for name in PARTS)
    kind: type[VisionConfig | TinyVisionConfig] = TinyVisionConfig if is_tiny(vision) else VisionConfig
    given = own_values("vision_config", vision, kind)
    if kind is VisionConfig:
        width, ratio = given.get("hidden_size", VisionConfig.hidden_size), vision.get("mlp_ratio") or 4.0
        given = {"mlp_dim": int(width * ratio), **given}
    config = SamHQConfig(
        vision=kind(**given),
        prompt_encoder=PromptEncoderConfig(
            **own_values("prompt_encoder_config", prompt, PromptEncoderConfig)
        ),
        mask_decoder=MaskDecoderConfig(**own_values("mask_decoder_config", decoder, MaskDecoderConfig)),
    )
    if wrong := disagreements(values, config):
        raise ConfigError(f"config.json contradicts itself: {', '.join(wrong)} by its other values")
    return config


def unknown_keys(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a parsed `config.json` that are not known here, those of a part with its name.

    Raises:
        ConfigError: another model's file, or a value that is not followed here whatever the tensors.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.json holds a {type(values).__name__}; wanted an object")
    if "vision_encoder_dim" in values:
        raise ConfigError(
            "config.json is of a SAM-HQ port with its own remote code (key vision_encoder_dim); not read"
        )
    tiny = is_tiny(part_of(values, "vision_config"))
    known = config_to_json(SamHQConfig.around(TinyVisionConfig() if tiny else VisionConfig()))
    check_type("config.json", values, TOP_TYPE)
    unknown = sorted(set(values) - set(known) - WITHOUT_EFFECT)
    ratio = part_of(values, "vision_config").get("mlp_ratio") or 4.0
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < MLP_RATIO_LIMIT:
        raise ConfigError(f"vision_config: mlp_ratio is {ratio!r}; wanted a number over 0")
    for name in PARTS:
        part = part_of(values, name)
        check_type(name, part, known[name]["model_type"])
        for key, allowed in FIXED[name].items():
            if part.get(key) is not None and not any(is_same(part[key], one) for one in allowed):
                wanted = " or ".join(map(repr, allowed))
                raise ConfigError(f"{name}: {key} is {part[key]!r}; only {wanted} is known")
        unknown += sorted(f"{name}.{key}" for key in set(part) - set(known[name]) - WITHOUT_EFFECT)
    return tuple(unknown)


def is_same(found: Any, wanted: Any) -> bool:
    """Return whether a value is the wanted one. A number may have been through float32: 9.99999997e-07."""
    if isinstance(found, float) and isinstance(wanted, float):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)


def check_type(name: str, values: Mapping[str, Any], wanted: str) -> None:
    """Raise `ConfigError` for another model's type; an empty one, as transformers 4 writes, is like none."""
    found = values.get("model_type") or wanted
    if str(found).replace("-", "_") != wanted:  # the first copies on the hub say sam-hq
        raise ConfigError(f"{name}: model_type {found!r}; wanted {wanted!r}")


def disagreements(values: Mapping[str, Any], config: SamHQConfig) -> list[str]:
    """Return in words where a file says something else than a configuration; what it leaves out does not."""
    found = []
    for name in PARTS:
        part, wanted = part_of(values, name), config_to_json(config)[name]
        for key in sorted(set(part) & set(wanted) - set(FIXED[name])):
            # Sizes may be written as pairs.
            same = part[key] in (None, wanted[key], [wanted[key], wanted[key]])
            if not same and not has_no_say(key, part, config):
                found.append(f"{name}.{key} is {part[key]!r}, but {wanted[key]!r}")
    return found


def has_no_say(key: str, part: Mapping[str, Any], config: SamHQConfig) -> bool:
    """Return whether nothing follows from this key of a part, beside its other keys."""
    vision = config.vision
    if key == "model_type":  # `check_type` has seen it; of image encoders there are two kinds
        return part[key] not in (VIT_TYPE, TINY_TYPE) or is_tiny(part) == isinstance(vision, TinyVisionConfig)
    if not isinstance(vision, VisionConfig):
        return False
    if key == "mlp_ratio":  # where mlp_dim stands, transformers does not read it, else it rounds down
        return part.get("mlp_dim") is not None or abs(part[key] * vision.hidden_size - vision.mlp_dim) < 1
    return key == "window_size" and len(vision.global_attn_indexes) == vision.num_hidden_layers


def part_of(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return one of the three parts; empty when it is left out or null."""
    part = values.get(name)
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        raise ConfigError(f"config.json: {name} is {part!r}; wanted an object")
    return part


def is_tiny(vision: Mapping[str, Any]) -> bool:
    """Return whether a `vision_config` is that of a Light HQ-SAM as written here."""
    return vision.get("model_type") == TINY_TYPE


def stated_side(values: Mapping[str, Any]) -> int | None:
    """Return the input side that a file states; the tensors of a TinyViT do not tell it."""
    side: int | None = own_values("vision_config", part_of(values, "vision_config"), VisionConfig).get(
        "image_size"
    )
    return side


def own_values(name: str, part: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return those values of a part that are fields of dataclass `kind`, with lists as tuples."""
    return {
        f.name: plain_size(name, f.name, part[f.name], like=f.default)
        for f in fields(kind)
        if part.get(f.name) is not None
    }


def plain_size(name: str, key: str, value: Any, *, like: Any) -> int | tuple[int, ...]:
    """Return a number, or a list as a tuple, as the field's default `like` is one or the other.

    An (h, w) pair of equal sizes becomes one number.
    """
    is_list = isinstance(value, (list, tuple))
    given = list(value) if is_list else [value]
    numbers = [int(x) if isinstance(x, float) and x.is_integer() else x for x in given]  # 64.0
    least = 0 if key == BLOCK_NUMBERS else 1
    if not all(isinstance(x, int) and not isinstance(x, bool) and x >= least for x in numbers):
        raise ConfigError(f"{name}: {key} is {value!r}; wanted whole numbers from {least}")
    if key in ("image_size", "patch_size"):
        if len(set(numbers)) != 1:
            raise ConfigError(f"{name}: {key} {numbers} is not square; only squares are known")
        return int(numbers[0])
    if is_list != isinstance(like, tuple):
        wanted = "one whole number" if is_list else "a list of whole numbers"
        raise ConfigError(f"{name}: {key} is {value!r}; wanted {wanted}")
    if is_list and key != BLOCK_NUMBERS and len(numbers) != len(like):
        raise ConfigError(f"{name}: {key} is {value!r}; wanted {len(like)} whole numbers")
    return tuple(numbers) if is_list else int(numbers[0])


def config_to_json(config: SamHQConfig) -> dict[str, Any]:
    """Return the values of a `config.json` from which transformers (and `config_from_json`) build this model.

    The decoder's `layer_norm_eps` is written as the 1e-5 that is computed with.
    """
    vision, prompt, decoder = config.vision, config.prompt_encoder, config.mask_decoder
    if isinstance(vision, TinyVisionConfig):
        vision_values = {"model_type": TINY_TYPE, **own_fields(vision)}
    else:
        vision_values = {
            "model_type": VIT_TYPE,
            **own_fields(vision),
            "mlp_ratio": vision.mlp_dim / vision.hidden_size,
            "num_pos_feats": vision.output_channels // 2,
            **first_values(VIT_FIXED),
        }
    return {
        "architectures": ["SamHQModel"],
        "model_type": TOP_TYPE,
        "vision_config": vision_values,
        "prompt_encoder_config": {
            "model_type": PROMPT_TYPE,
            **own_fields(prompt),
            "image_embedding_size": prompt.grid,
            **first_values(PROMPT_FIXED),
        },
        "mask_decoder_config": {
            "model_type": DECODER_TYPE,
            **own_fields(decoder),
            **first_values(DECODER_FIXED),
        },
    }


def own_fields(
    part: VisionConfig | TinyVisionConfig | PromptEncoderConfig | MaskDecoderConfig,
) -> dict[str, Any]:
    """Return a part's fields, tuples as lists."""
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def first_values(fixed: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return the value to write for each fixed key."""
    return {key: allowed[0] for key, allowed in fixed.items()}
