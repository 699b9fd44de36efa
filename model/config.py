"""The architecture of a SAM-HQ model as typed values, and the transformers `config.json` that says the same.

Only what a checkpoint can vary is a field. What all of them share (8 heads in the decoder, two-fold
narrower cross attention, exact GELU, biases, the epsilons) is written once here as a constant, and a file
that says otherwise is refused: a value that is read and then not followed is a silent wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PATCH_SIZE = 16
DECODER_HEADS = 8
NUM_MULTIMASK_OUTPUTS = 3
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""ImageNet mean and standard deviation of R, G, B, in 0 to 255."""


class ConfigError(ValueError):
    """A configuration that contradicts itself, or asks for what this code does not do."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A ViT image encoder. Names as in transformers' `SamHQVisionConfig`.

    `window_size`: tokens along a window of the blocks not named in `global_attn_indexes` (0-based).
    `image_size`: input side S in pixels. `output_channels`: width of the neck's output.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_dim: int = 3072
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    image_size: int = 1024
    patch_size: int = PATCH_SIZE
    output_channels: int = 256

    def __post_init__(self) -> None:
        check_side(self.image_size, self.patch_size)
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
    def grid(self) -> int:
        """Tokens along a side, G."""
        return self.image_size // self.patch_size

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
class TinyVisionConfig:
    """The TinyViT image encoder of Light HQ-SAM: four stages, the first of convolutions.

    `num_heads` and `window_sizes` are those of stages 1 to 3. All ratios are of the original: MLP and
    MBConv 4, heads as wide as `embed_dims[i] / num_heads[i]`.
    """

    embed_dims: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    num_heads: tuple[int, int, int] = (4, 5, 10)
    window_sizes: tuple[int, int, int] = (7, 14, 7)
    image_size: int = 1024
    output_channels: int = 256

    def __post_init__(self) -> None:
        check_side(self.image_size, PATCH_SIZE)
        for width, heads in zip(self.embed_dims[1:], self.num_heads, strict=True):
            if width % heads:
                raise ConfigError(
                    f"embed_dims {self.embed_dims}: {width} is no multiple of its {heads} heads"
                )

    @property
    def patch_size(self) -> int:
        """Pixels along a cell of the final grid."""
        return PATCH_SIZE

    @property
    def grid(self) -> int:
        """Tokens along a side of the final grid, G."""
        return self.image_size // PATCH_SIZE

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
class PromptEncoderConfig:
    """The prompt encoder. `image_size`: S. `mask_input_channels`: inner width of the mask embedding."""

    hidden_size: int = 256
    image_size: int = 1024
    patch_size: int = PATCH_SIZE
    mask_input_channels: int = 16

    def __post_init__(self) -> None:
        check_side(self.image_size, self.patch_size)
        if self.mask_input_channels < 1 or self.mask_input_channels % 4:
            raise ConfigError(f"mask_input_channels {self.mask_input_channels} must be a multiple of 4")

    @property
    def grid(self) -> int:
        """Tokens along a side, G."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class MaskDecoderConfig:
    """The mask decoder. `vit_dim`: width of the early feature."""

    hidden_size: int = 256
    mlp_dim: int = 2048
    num_hidden_layers: int = 2
    num_attention_heads: int = DECODER_HEADS
    attention_downsample_rate: int = 2
    num_multimask_outputs: int = NUM_MULTIMASK_OUTPUTS
    iou_head_hidden_dim: int = 256
    vit_dim: int = 768

    def __post_init__(self) -> None:
        if self.hidden_size % (8 * DECODER_HEADS // 4) or self.hidden_size <= 0:
            raise ConfigError(f"decoder hidden_size {self.hidden_size} must be a multiple of 16")
        fixed = {
            "num_attention_heads": DECODER_HEADS,
            "attention_downsample_rate": 2,
            "num_multimask_outputs": NUM_MULTIMASK_OUTPUTS,
        }
        for field, wanted in fixed.items():
            if getattr(self, field) != wanted:
                raise ConfigError(f"mask decoder {field} is {getattr(self, field)}; only {wanted} is known")


@dataclass(frozen=True, kw_only=True)
class SamHQConfig:
    """A whole model. The three parts must agree on sizes and widths."""

    vision: VisionConfig | TinyVisionConfig
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

    @classmethod
    def around(
        cls, vision: VisionConfig | TinyVisionConfig, *, mlp_dim: int = 2048, iou_head_hidden_dim: int = 256
    ) -> SamHQConfig:
        """Return the configuration of a model with this encoder and the usual prompt encoder and decoder."""
        width = vision.output_channels
        return cls(
            vision=vision,
            prompt_encoder=PromptEncoderConfig(hidden_size=width, image_size=vision.image_size),
            mask_decoder=MaskDecoderConfig(
                hidden_size=width,
                mlp_dim=mlp_dim,
                iou_head_hidden_dim=iou_head_hidden_dim,
                vit_dim=vision.early_channels,
            ),
        )


def check_side(image_size: int, patch_size: int) -> None:
    """Raise `ConfigError` unless the input side is a positive multiple of the only patch size known, 16."""
    if patch_size != PATCH_SIZE:
        raise ConfigError(f"patch_size is {patch_size}; only {PATCH_SIZE} is known")
    if image_size <= 0 or image_size % PATCH_SIZE:
        raise ConfigError(f"image_size {image_size} must be a positive multiple of {PATCH_SIZE}")


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
