"""Transformers' `config.json` of a SAM-HQ model, read strictly and written in full.

Every key is known by name: read, checked against the one value this code follows, or listed as without
effect. A key that is none of these is an error, since it may ask for something that would not be done.

Light HQ-SAM has no class in transformers. Its file has the same form with a `vision_config` of our own,
`model_type` "sam_hq_tiny_vit".
"""

from __future__ import annotations

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

PARTS = {"vision_config", "prompt_encoder_config", "mask_decoder_config"}

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


def config_from_json(values: Mapping[str, Any]) -> SamHQConfig:
    """Return the configuration in a parsed `config.json` of transformers.

    A key left out has transformers' default, that of ViT-B.

    Raises:
        ConfigError: another model's file, an unknown key, or a value that this code does not follow.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.json holds a {type(values).__name__}; wanted an object")
    if "vision_encoder_dim" in values:
        raise ConfigError(
            "config.json is of a SAM-HQ port with its own remote code (key vision_encoder_dim); not read"
        )
    if values.get("model_type") != TOP_TYPE:
        raise ConfigError(f"config.json is of model_type {values.get('model_type')!r}; wanted {TOP_TYPE!r}")
    refuse_unknown("config.json", values, PARTS | {"model_type"})
    vision, prompt, decoder = (
        part_of(values, name) for name in ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    )
    return SamHQConfig(
        vision=tiny_from_json(vision) if vision.get("model_type") == TINY_TYPE else vit_from_json(vision),
        prompt_encoder=prompt_from_json(prompt),
        mask_decoder=MaskDecoderConfig(
            **read_part("mask_decoder_config", decoder, MaskDecoderConfig, DECODER_TYPE, DECODER_FIXED)
        ),
    )


def part_of(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return one of the three parts; empty when it is left out or null."""
    part = values.get(name)
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        raise ConfigError(f"config.json: {name} is {part!r}; wanted an object")
    return part


def vit_from_json(part: Mapping[str, Any]) -> VisionConfig:
    """Return the ViT in a `vision_config`."""
    derived = frozenset({"mlp_ratio", "num_pos_feats"})
    fields_given = read_part("vision_config", part, VisionConfig, VIT_TYPE, VIT_FIXED, derived)
    width = fields_given.get("hidden_size", VisionConfig.hidden_size)
    ratio = part.get("mlp_ratio", 4.0)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < MLP_RATIO_LIMIT:
        raise ConfigError(f"vision_config: mlp_ratio is {ratio!r}; wanted a number over 0")
    mlp_dim = fields_given.get("mlp_dim", int(width * ratio))
    if "mlp_ratio" in part and abs(mlp_dim - width * ratio) >= 1:
        raise ConfigError(f"vision_config: mlp_dim {mlp_dim} contradicts mlp_ratio {ratio} of {width}")
    config = VisionConfig(**{**fields_given, "mlp_dim": mlp_dim})
    features = part.get("num_pos_feats", config.output_channels // 2)
    if features != config.output_channels // 2:
        raise ConfigError(
            f"vision_config: num_pos_feats {features}; wanted half of output_channels "
            f"{config.output_channels}"
        )
    return config


def tiny_from_json(part: Mapping[str, Any]) -> TinyVisionConfig:
    """Return the TinyViT in a `vision_config` of our own."""
    return TinyVisionConfig(**read_part("vision_config", part, TinyVisionConfig, TINY_TYPE, {}))


def prompt_from_json(part: Mapping[str, Any]) -> PromptEncoderConfig:
    """Return the prompt encoder in a `prompt_encoder_config`."""
    derived = frozenset({"image_embedding_size"})
    config = PromptEncoderConfig(
        **read_part("prompt_encoder_config", part, PromptEncoderConfig, PROMPT_TYPE, PROMPT_FIXED, derived)
    )
    if part.get("image_embedding_size", config.grid) != config.grid:
        raise ConfigError(
            f"prompt_encoder_config: image_embedding_size {part['image_embedding_size']}; "
            f"wanted {config.grid}, which is image_size {config.image_size} / {config.patch_size}"
        )
    return config


def read_part(
    name: str,
    part: Mapping[str, Any],
    kind: type,
    model_type: str,
    fixed: Mapping[str, tuple[Any, ...]],
    derived: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Return the given fields of dataclass `kind`, after checking every other key of the part."""
    if part.get("model_type", model_type) != model_type:
        raise ConfigError(f"{name}: model_type {part['model_type']!r}; wanted {model_type!r}")
    own = {f.name: f.default for f in fields(kind)}
    refuse_unknown(name, part, set(own) | set(fixed) | derived | {"model_type"})
    for key, allowed in fixed.items():
        if part.get(key, allowed[0]) not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise ConfigError(f"{name}: {key} is {part[key]!r}; only {wanted} is known")
    return {
        key: plain_size(name, key, value, like=own[key])
        for key, value in part.items()
        if key in own and value is not None
    }


def plain_size(name: str, key: str, value: Any, *, like: Any) -> int | tuple[int, ...]:
    """Return a number, or a list as a tuple, as the field's default `like` is one or the other.

    An (h, w) pair of equal sizes becomes one number.
    """
    is_list = isinstance(value, (list, tuple))
    numbers = list(value) if is_list else [value]
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
    return tuple(numbers) if is_list else int(value)


def refuse_unknown(name: str, values: Mapping[str, Any], known: set[str]) -> None:
    """Raise `ConfigError` when a key is neither known nor known to be without effect."""
    unknown = sorted(set(values) - known - WITHOUT_EFFECT)
    if unknown:
        raise ConfigError(f"{name}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")


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
