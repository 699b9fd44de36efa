"""The architecture of a checkpoint, read from the shapes of its tensors alone.

Depth, widths, heads, window, grid and which blocks attend over the whole grid all follow from shapes, so that
a checkpoint of any size loads without being told what it is. A `config.json` beside it is a cross-check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from model.config import (
    PATCH_SIZE,
    ConfigError,
    MaskDecoderConfig,
    PromptEncoderConfig,
    SamHQConfig,
    TinyVisionConfig,
    VisionConfig,
)

DECIDING = (
    "image_encoder.patch_embed.weight",
    "image_encoder.pos_embed",
    "image_encoder.blocks.0.attn.rel_pos_h",
    "image_encoder.stem2.conv.weight",
    "image_encoder.conv_stage.downsample.conv1.conv.weight",
    "image_encoder.stages.0.downsample.conv1.conv.weight",
    "image_encoder.stages.1.downsample.conv1.conv.weight",
    "image_encoder.neck.conv1.weight",
    "prompt_encoder.no_mask",
    "prompt_encoder.mask.conv2.weight",
    "mask_decoder.iou_token",
    "mask_decoder.hq_vit.conv1.weight",
)
"""Tensors whose sides must agree with one another. Which of two is wrong cannot be told, so all are shown."""


def config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], *, image_size: int | None = None
) -> SamHQConfig:
    """Return the architecture that tensors of these shapes, under our own names, belong to.

    `image_size`: input side of a TinyViT, which its tensors do not tell (1024 unless given); a ViT's is
    that of its position table, and `image_size` is not used.

    Raises:
        ConfigError: a tensor that the architecture is read from is missing or has an impossible shape, or
            such tensors contradict each other; the message names them.
    """
    try:
        return read_shapes(shapes, image_size)
    except ConfigError as error:
        raise ConfigError(f"{error} ({deciding_shapes(shapes)})") from error


def deciding_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return in words what an architecture was read from."""
    found = ", ".join(f"{name} {shapes[name]}" for name in DECIDING if name in shapes)
    return f"read from the shapes of {found}"


def read_shapes(shapes: Mapping[str, tuple[int, ...]], image_size: int | None) -> SamHQConfig:
    """Return what `config_from_shapes` does; its errors name one tensor, or none where two disagree."""
    if "image_encoder.stem1.conv.weight" in shapes:
        vision: VisionConfig | TinyVisionConfig = tiny_from_shapes(shapes, image_size=image_size or 1024)
    else:
        vision = vit_from_shapes(shapes)
    width = dimension(shapes, "prompt_encoder.no_mask", 1, of=2)
    layers = "mask_decoder.transformer.layers"
    return SamHQConfig(
        vision=vision,
        prompt_encoder=PromptEncoderConfig(
            hidden_size=width,
            image_size=vision.image_size,
            mask_input_channels=dimension(shapes, "prompt_encoder.mask.conv2.weight", 0, of=4),
        ),
        mask_decoder=MaskDecoderConfig(
            hidden_size=dimension(shapes, "mask_decoder.iou_token", 1, of=2),
            mlp_dim=dimension(shapes, f"{layers}.0.fc1.weight", 0, of=2),
            num_hidden_layers=count_blocks(shapes, layers),
            iou_head_hidden_dim=dimension(shapes, "mask_decoder.iou_head.0.weight", 0, of=2),
            vit_dim=dimension(shapes, "mask_decoder.hq_vit.conv1.weight", 0, of=4),
        ),
    )


def vit_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> VisionConfig:
    """Return the ViT of these tensors. A block is global when its table covers the whole grid."""
    positions, blocks = "image_encoder.pos_embed", "image_encoder.blocks"
    width, grid = dimension(shapes, positions, 3, of=4), dimension(shapes, positions, 1, of=4)
    depth = count_blocks(shapes, blocks)
    tables = [f"{blocks}.{i}.attn.rel_pos_h" for i in range(depth)]
    sides = [(dimension(shapes, table, 0, of=2) + 1) // 2 for table in tables]
    head_width = dimension(shapes, tables[0], 1, of=2)
    if width % head_width:
        raise ConfigError(
            f"tensor {tables[0]} has shape {shapes[tables[0]]}: heads {head_width} wide do not divide the "
            f"encoder's width {width}"
        )
    windows = sorted({side for side in sides if side != grid})
    if len(windows) > 1:
        raise ConfigError(
            f"windows of {windows} tokens in one encoder on a grid of {grid}; only one size is known"
        )
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // head_width,
        mlp_dim=dimension(shapes, f"{blocks}.0.mlp.fc1.weight", 0, of=2),
        # Without a windowed block nothing depends on the window.
        window_size=windows[0] if windows else min(14, grid - 1),
        global_attn_indexes=tuple(i for i, side in enumerate(sides) if side == grid),
        image_size=grid * PATCH_SIZE,
        patch_size=dimension(shapes, "image_encoder.patch_embed.weight", 2, of=4),
        output_channels=dimension(shapes, "image_encoder.neck.conv1.weight", 0, of=4),
    )


def tiny_from_shapes(shapes: Mapping[str, tuple[int, ...]], *, image_size: int) -> TinyVisionConfig:
    """Return the TinyViT of these tensors."""
    e = "image_encoder"
    biases = [f"{e}.stages.{i}.blocks.0.attn.attention_biases" for i in range(3)]
    downsamples = [
        f"{e}.{stage}.downsample.conv1.conv.weight" for stage in ("conv_stage", "stages.0", "stages.1")
    ]
    stem = dimension(shapes, f"{e}.stem2.conv.weight", 0, of=4)
    one, two, three = (dimension(shapes, name, 0, of=4) for name in downsamples)
    heads = [dimension(shapes, name, 0, of=2) for name in biases]
    windows = [math.isqrt(dimension(shapes, name, 1, of=2)) for name in biases]
    depths = [count_blocks(shapes, f"{e}.stages.{i}.blocks") for i in range(3)]
    return TinyVisionConfig(
        embed_dims=(stem, one, two, three),
        depths=(count_blocks(shapes, f"{e}.conv_stage.blocks"), depths[0], depths[1], depths[2]),
        num_heads=(heads[0], heads[1], heads[2]),
        window_sizes=(windows[0], windows[1], windows[2]),
        image_size=image_size,
        output_channels=dimension(shapes, f"{e}.neck.conv1.weight", 0, of=4),
    )


def dimension(shapes: Mapping[str, tuple[int, ...]], name: str, axis: int, *, of: int) -> int:
    """Return one side of a tensor `of` so many axes, or raise `ConfigError` naming the tensor."""
    if name not in shapes:
        raise ConfigError(f"the architecture cannot be read: tensor {name} is missing")
    if len(shapes[name]) != of or shapes[name][axis] < 1:
        raise ConfigError(
            f"the architecture cannot be read: tensor {name} has shape {shapes[name]}; wanted {of} axes"
        )
    return shapes[name][axis]


def count_blocks(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """Return how many blocks `prefix.0`, `prefix.1`, ... there are, or raise `ConfigError` naming a gap."""
    numbers = {int(name[len(prefix) + 1 :].split(".")[0]) for name in shapes if name.startswith(prefix + ".")}
    gap = next((i for i in range(len(numbers) + 1) if i not in numbers), 0)
    if not numbers or gap < len(numbers):
        raise ConfigError(f"the architecture cannot be read: no tensor of {prefix}.{gap}")
    return len(numbers)
