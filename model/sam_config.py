"""The architecture of a SAM-HQ model as typed values, and transformers' `config.json` of the same.

Only what a checkpoint can vary is a field. What all of them share (8 heads in the decoder, two-fold
narrower cross attention, exact GELU, biases, the epsilons) is a constant, and a file that states otherwise is
refused: a value that is read and then not followed is a silent wrong answer.

The tensors decide the architecture; a `config.json` is checked against them. A key is known by name and then
checked, or listed as without effect, or unknown. An unknown one is a warning, as each release of transformers
brings some.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from hqlabel.model.records import Fit

PATCH_SIZE = 16
DECODER_HEADS = 8
ATTENTION_DOWNSAMPLE_RATE = 2
NUM_MULTIMASK_OUTPUTS = 3
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""ImageNet mean and standard deviation of R, G, B, in 0 to 255."""


class ConfigError(ValueError):
    """A configuration that contradicts itself, or asks for what this code does not do."""


@dataclass(frozen=True, kw_only=True)
class InputSide:
    """What all parts on the image's side share. `image_size`: input side S in pixels."""

    image_size: int = 1024

    def __post_init__(self) -> None:
        if self.image_size <= 0 or self.image_size % PATCH_SIZE:
            raise ConfigError(f"image_size {self.image_size} must be a positive multiple of {PATCH_SIZE}")

    @property
    def grid(self) -> int:
        """Tokens along a side, G."""
        return self.image_size // PATCH_SIZE


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(InputSide):
    """What all image encoders share. `output_channels`: width of the embedding."""

    fit: ClassVar[Fit] = "pad"
    """How an image comes to the input side."""

    output_channels: int = 256

    @property
    def early_channels(self) -> int:
        """Width of the early feature, which the HQ head reads; 0: it reads none."""
        return 0

    @property
    def name(self) -> str:
        """The published size, or the widths and depths of another."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class VisionConfig(EncoderConfig):
    """A ViT image encoder. Names as in transformers' `SamHQVisionConfig`.

    `window_size`: tokens along a window of the blocks not named in `global_attn_indexes` (0-based).
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_dim: int = 3072
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of the "
                f"{self.num_attention_heads} attention heads"
            )
        blocks = self.global_attn_indexes
        if (
            not blocks
            or list(blocks) != sorted(set(blocks))
            or not 0 <= blocks[0] <= blocks[-1] < self.num_hidden_layers
        ):
            raise ConfigError(
                f"global_attn_indexes {blocks} must name, in rising order, one or more of the "
                f"{self.num_hidden_layers} blocks: the first of them gives the early feature"
            )
        if self.window_size < 1 or self.window_size == self.grid:
            raise ConfigError(
                f"window_size {self.window_size} must be at least 1 and another than the grid's side "
                f"{self.grid}: a window as large as the grid could not be told from a global block"
            )

    @property
    def early_channels(self) -> int:
        """Width of the early feature, which the HQ head reads."""
        return self.hidden_size

    @property
    def name(self) -> str:
        """`vit_b`, `vit_l`, `vit_h`, or `vit_<width>x<depth>` for others."""
        names = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}
        key = (self.hidden_size, self.num_hidden_layers)
        return names.get(key, f"vit_{key[0]}x{key[1]}")


@dataclass(frozen=True, kw_only=True)
class TinyVisionConfig(EncoderConfig):
    """The TinyViT image encoder of Light HQ-SAM: four stages, the first of convolutions.

    `num_heads` and `window_sizes` are those of stages 1 to 3. All ratios are of the original: MLP and
    MBConv 4, heads as wide as `embed_dims[i] / num_heads[i]`.
    """

    embed_dims: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (4, 5, 10)
    window_sizes: tuple[int, ...] = (7, 14, 7)

    def __post_init__(self) -> None:
        super().__post_init__()
        for width, heads in zip(self.embed_dims[1:], self.num_heads, strict=True):
            if width % heads:
                raise ConfigError(
                    f"embed_dims {self.embed_dims}: {width} is no multiple of its {heads} heads"
                )

    @property
    def early_channels(self) -> int:
        """Width of the early feature: of stage 1 after its downsampling."""
        return self.embed_dims[2]

    @property
    def name(self) -> str:
        """`vit_tiny`, or the widths and depths for others."""
        if self.embed_dims == (64, 128, 160, 320) and self.depths == (2, 2, 6, 2):
            return "vit_tiny"
        return "tiny_" + "-".join(map(str, self.embed_dims)) + "x" + "-".join(map(str, self.depths))


@dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(InputSide):
    """The prompt encoder. `mask_input_channels`: inner width of the mask embedding."""

    hidden_size: int = 256
    mask_input_channels: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_input_channels < 1 or self.mask_input_channels % 4:
            raise ConfigError(f"mask_input_channels {self.mask_input_channels} must be a multiple of 4")


@dataclass(frozen=True, kw_only=True)
class MaskDecoderConfig:
    """The mask decoder. `vit_dim`: width of the early feature; 0: it reads none."""

    hidden_size: int = 256
    mlp_dim: int = 2048
    num_hidden_layers: int = 2
    iou_head_hidden_dim: int = 256
    vit_dim: int = 768

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * DECODER_HEADS) or self.hidden_size <= 0:
            raise ConfigError(f"decoder hidden_size {self.hidden_size} must be a multiple of 16")


@dataclass(frozen=True, kw_only=True)
class SamHQConfig:
    """A whole model. The three parts must agree on sizes and widths."""

    vision: EncoderConfig
    prompt_encoder: PromptEncoderConfig
    mask_decoder: MaskDecoderConfig

    def __post_init__(self) -> None:
        vision, prompt, decoder = self.vision, self.prompt_encoder, self.mask_decoder
        pairs = {
            "vision image_size and prompt encoder image_size": (vision.image_size, prompt.image_size),
            "vision output_channels and decoder hidden_size": (vision.output_channels, decoder.hidden_size),
            "prompt encoder hidden_size and decoder hidden_size": (prompt.hidden_size, decoder.hidden_size),
            "vision early width and decoder vit_dim": (vision.early_channels, decoder.vit_dim),
        }
        for what, (one, other) in pairs.items():
            if one != other:
                raise ConfigError(f"{what} differ: {one} and {other}")

    @property
    def image_size(self) -> int:
        """Input side S in pixels."""
        return self.vision.image_size

    @property
    def mask_size(self) -> int:
        """Side of the low-resolution masks, 4G."""
        return 4 * self.vision.grid

    @property
    def fit(self) -> Fit:
        """How an image comes to the input side."""
        return self.vision.fit

    @classmethod
    def around(cls, vision: EncoderConfig, *, mlp_dim: int = 2048) -> SamHQConfig:
        """Return the configuration of a model with this encoder and the usual prompt encoder and decoder."""
        width = vision.output_channels
        return cls(
            vision=vision,
            prompt_encoder=PromptEncoderConfig(hidden_size=width, image_size=vision.image_size),
            mask_decoder=MaskDecoderConfig(hidden_size=width, mlp_dim=mlp_dim, vit_dim=vision.early_channels),
        )


def vit_config(
    *,
    embed_dim: int,
    depth: int,
    num_heads: int,
    global_attn_indexes: tuple[int, ...],
    window_size: int = 14,
    image_size: int = 1024,
    out_channels: int = 256,
    mlp_dim: int = 2048,
) -> SamHQConfig:
    """Return the configuration of a SAM-HQ with a ViT of any size, in the original's words.

    `out_channels`: width of the neck, the prompt encoder and the decoder (a multiple of 16).
    `mlp_dim`: hidden width of the decoder's MLPs; the encoder's is 4 `embed_dim`.
    """
    vision = VisionConfig(
        hidden_size=embed_dim,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        mlp_dim=4 * embed_dim,
        window_size=window_size,
        global_attn_indexes=tuple(global_attn_indexes),
        image_size=image_size,
        output_channels=out_channels,
    )
    return SamHQConfig.around(vision, mlp_dim=mlp_dim)


PUBLISHED: Mapping[str, SamHQConfig] = {
    "vit_b": vit_config(embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11)),
    "vit_l": vit_config(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)),
    "vit_h": vit_config(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31)),
    "vit_tiny": SamHQConfig.around(TinyVisionConfig()),
}
"""The published sizes, by the names of the original."""


# Transformers' config.json

JSON_PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")

# fmt: off
WITHOUT_EFFECT = frozenset({
    "architectures", "transformers_version", "torch_dtype", "dtype", "initializer_range",
    "tie_word_embeddings", "attention_dropout", "scale", "_name_or_path", "_attn_implementation",
    "_attn_implementation_autoset", "output_attentions", "output_hidden_states", "return_dict",
    "use_return_dict", "torchscript", "use_bfloat16", "chunk_size_feed_forward", "is_encoder_decoder",
    "is_decoder", "id2label", "label2id", "problem_type", "tf_legacy_loss", "pruned_heads",
    "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder", "max_length", "min_length",
    "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "finetuning_task",
    "tokenizer_class", "prefix", "bos_token_id", "pad_token_id", "eos_token_id", "sep_token_id",
    "decoder_start_token_id", "task_specific_params",
})
# fmt: on
"""Keys that transformers of some version writes into every part; none of them changes a mask."""

_VIT: Mapping[str, Any] = {"patch_size": PATCH_SIZE, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
FIXED: Mapping[str, Mapping[str, Any]] = {
    "vision_config": {**_VIT, "num_channels": 3, "qkv_bias": True, "use_abs_pos": True, "use_rel_pos": True},
    "prompt_encoder_config": {**_VIT, "num_point_embeddings": 4},
    "mask_decoder_config": {
        "hidden_act": "relu",
        "iou_head_depth": 3,
        "num_attention_heads": DECODER_HEADS,
        "attention_downsample_rate": ATTENTION_DOWNSAMPLE_RATE,
        "num_multimask_outputs": NUM_MULTIMASK_OUTPUTS,
        # The published files have 1e-6, the port's default. The weights were trained with 1e-5, and both are
        # computed with 1e-5 here; masks differ by 1e-4 of the largest logit.
        "layer_norm_eps": (1e-5, 1e-6),
    },
}
"""The values known for what does not follow from the tensors; of several the first is written."""


def config_to_json(config: SamHQConfig) -> dict[str, Any]:
    """Return the values of a `config.json` from which transformers builds this model.

    The decoder's `layer_norm_eps` is written as the 1e-5 that is computed with. Transformers has no TinyViT:
    of one's vision part only the two values that have a name there are returned.
    """
    vision, prompt = config.vision, config.prompt_encoder
    if isinstance(vision, VisionConfig):
        sizes = asdict(vision) | {
            "model_type": "sam_hq_vision_model",
            "mlp_ratio": vision.mlp_dim / vision.hidden_size,
            "num_pos_feats": vision.output_channels // 2,
            "global_attn_indexes": list(vision.global_attn_indexes),
        }
    else:
        sizes = {
            "model_type": "TinyViT",
            "image_size": vision.image_size,
            "output_channels": vision.output_channels,
        }
    parts = (
        sizes,
        {"model_type": "sam_hq_prompt_encoder", **asdict(prompt), "image_embedding_size": prompt.grid},
        {"model_type": "sam_hq_mask_decoder", **asdict(config.mask_decoder)},
    )
    values: dict[str, Any] = {"architectures": ["SamHQModel"], "model_type": "sam_hq"}
    for name, part in zip(JSON_PARTS, parts, strict=True):
        values[name] = part | {key: _choices(value)[0] for key, value in FIXED[name].items()}
    return values


def check_config_json(values: Mapping[str, Any], config: SamHQConfig) -> tuple[str, ...]:
    """Return the keys of a parsed `config.json` that are not known here, those of a part with its name.

    A missing key, or null, is not compared.

    Raises:
        ConfigError: another model's file, or one that does not describe this model, or asks for what is not
            done here.
    """
    if "vision_encoder_dim" in values:
        raise ConfigError(
            "config.json is of a SAM-HQ port with its own remote code (key vision_encoder_dim); not read"
        )
    expected = config_to_json(config)
    if not _is_same("model_type", values.get("model_type"), (expected["model_type"],)):
        raise ConfigError(f"config.json: model_type {values['model_type']!r}; wanted 'sam_hq'")
    unknown, wrong = sorted(set(values) - set(expected) - WITHOUT_EFFECT), []
    for name in JSON_PARTS:
        part, known = json_part(values, name), expected[name] | FIXED[name]
        unknown += sorted(f"{name}.{key}" for key in set(part) - set(known) - WITHOUT_EFFECT)
        for key in sorted(set(part) & set(known)):
            choices = _choices(known[key])
            if not _is_same(key, part[key], choices) and not _has_no_effect(key, part, config.vision):
                texts = " or ".join(map(repr, choices))
                reason = f"; only {texts} is known" if key in FIXED[name] else f", but {texts}"
                wrong.append(f"{name}.{key} is {part[key]!r}{reason}")
    if wrong:
        raise ConfigError(f"config.json and tensors disagree: {', '.join(wrong)} by the tensors")
    return tuple(unknown)


def json_part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return one of the three parts; empty when it is missing or null."""
    part = values.get(name)
    if part is not None and not isinstance(part, Mapping):
        raise ConfigError(f"config.json: {name} is {part!r}; wanted an object")
    return part or {}


def stated_side(values: Mapping[str, Any]) -> int | None:
    """Return the input side that a `config.json` states, if it is a whole number."""
    side = json_part(values, "vision_config").get("image_size")
    side = side[0] if isinstance(side, list) and side else side  # sizes may be written as pairs
    return int(side) if isinstance(side, int | float) and side == side // 1 else None


def _is_same(key: str, value: Any, known: tuple[Any, ...]) -> bool:
    """Return whether a value is one of the known, or none."""
    if key == "model_type":  # the first copies on the hub have sam-hq; transformers 4 writes empty ones
        return not value or str(value).replace("-", "_") in known
    if isinstance(value, float) and isinstance(known[0], float):  # perhaps through float32: 9.99999997e-07
        return any(math.isclose(value, one, rel_tol=1e-6) for one in known)
    return value is None or value in known or value in ([one, one] for one in known)


def _choices(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _has_no_effect(key: str, part: Mapping[str, Any], vision: EncoderConfig) -> bool:
    """Return whether nothing follows from this key of a part, next to its other keys."""
    if not isinstance(vision, VisionConfig):
        return False
    if key == "mlp_ratio":  # where mlp_dim is given, transformers does not read it, else it rounds down
        ratio = part[key]
        return part.get("mlp_dim") is not None or (
            isinstance(ratio, int | float) and abs(ratio * vision.hidden_size - vision.mlp_dim) < 1
        )
    return key == "window_size" and len(vision.global_attn_indexes) == vision.num_hidden_layers
