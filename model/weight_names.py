"""The names of the models' tensors in each layout, and the architecture that SAM-HQ's shapes give.

The model's own names are the original's (`segment-anything-hq`), so a published `.pth` loads as it is.
`NAMES` lists those of transformers' `SamHQModel` next to them; HQ-SAM 2's file has names of its own
(`hq_sam2/hq_sam2_names.py`). No tensor is reshaped or transposed between layouts. A name is renamed whole, in
one pass: the middle layer of an MLP is `layers.1` in one layout and `layers.0` in the other, so that
replacing parts one after another would swap layers without an error.

Depth, widths, heads, window, grid and which blocks attend over the whole grid all follow from shapes, so that
a checkpoint of any size loads without a statement of what it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Literal

import torch

from hqlabel.model.hq_sam2.hq_sam2_names import VIDEO, name_in_file, name_in_model
from hqlabel.model.sam_config import (
    PATCH_SIZE,
    ConfigError,
    EncoderConfig,
    MaskDecoderConfig,
    PromptEncoderConfig,
    SamHQConfig,
    TinyVisionConfig,
    VisionConfig,
)

Layout = Literal["original", "transformers", "hq_sam2"]
Tensors = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

POSITIONS = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
SHARED_POSITIONS = "shared_image_embedding.positional_embedding"
TIED_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
"""The first and the second name under which transformers keeps the positional matrix."""

ATTENTIONS = (
    "layers.#.self_attn",
    "layers.#.cross_attn_token_to_image",
    "layers.#.cross_attn_image_to_token",
    "final_attn_token_to_image",
)
MLPS = {
    "output_hypernetworks_mlps.#": "output_hypernetworks_mlps.#",
    "hf_mlp": "hq_mask_mlp",
    "iou_prediction_head": "iou_prediction_head",
}
CONVOLUTIONS = {
    "output_upscaling": ("upscale_conv1", "upscale_layer_norm", "upscale_conv2"),
    "compress_vit_feat": ("compress_vit_conv1", "compress_vit_norm", "compress_vit_conv2"),
    "embedding_encoder": ("encoder_conv1", "encoder_norm", "encoder_conv2"),
    "embedding_maskfeature": ("mask_conv1", "mask_norm", "mask_conv2"),
}
BLOCK = ("attn.qkv", "attn.proj", "attn.rel_pos_h", "attn.rel_pos_w", "mlp.lin1", "mlp.lin2")
NECK = {0: "conv1", 1: "layer_norm1", 2: "conv2", 3: "layer_norm2"}
MASK_EMBED = {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"}
PROMPTS, DECODER = "prompt_encoder", "mask_decoder"
TRANSFORMER = "mask_decoder.transformer"

NAMES: tuple[tuple[str, str], ...] = (
    ("image_encoder.pos_embed", "vision_encoder.pos_embed"),
    ("image_encoder.patch_embed.proj", "vision_encoder.patch_embed.projection"),
    ("image_encoder.blocks.#.norm#", "vision_encoder.layers.#.layer_norm#"),
    *((f"image_encoder.blocks.#.{x}", f"vision_encoder.layers.#.{x}") for x in BLOCK),
    *((f"image_encoder.neck.{i}", f"vision_encoder.neck.{x}") for i, x in NECK.items()),
    (POSITIONS, SHARED_POSITIONS),
    ("prompt_encoder.point_embeddings.#", "prompt_encoder.point_embed.#"),
    ("prompt_encoder.not_a_point_embed", "prompt_encoder.not_a_point_embed"),
    ("prompt_encoder.no_mask_embed", "prompt_encoder.no_mask_embed"),
    *((f"{PROMPTS}.mask_downscaling.{i}", f"{PROMPTS}.mask_embed.{x}") for i, x in MASK_EMBED.items()),
    *((f"{TRANSFORMER}.{x}.{y}_proj",) * 2 for x in ATTENTIONS for y in ("q", "k", "v", "out")),
    (f"{TRANSFORMER}.layers.#.norm#", f"{TRANSFORMER}.layers.#.layer_norm#"),
    (f"{TRANSFORMER}.layers.#.mlp.lin#", f"{TRANSFORMER}.layers.#.mlp.lin#"),
    (f"{TRANSFORMER}.norm_final_attn", f"{TRANSFORMER}.layer_norm_final_attn"),
    (f"{DECODER}.iou_token", f"{DECODER}.iou_token"),
    (f"{DECODER}.mask_tokens", f"{DECODER}.mask_tokens"),
    (f"{DECODER}.hf_token", f"{DECODER}.hq_token"),
    *(
        (f"{DECODER}.{mlp}.layers.{i}", f"{DECODER}.{theirs}.{layer}")
        for mlp, theirs in MLPS.items()
        for i, layer in enumerate(("proj_in", "layers.0", "proj_out"))
    ),
    *(
        (f"{DECODER}.{layers}.{i}", f"{DECODER}.{layer}")
        for layers, theirs in CONVOLUTIONS.items()
        for i, layer in zip((0, 1, 3), theirs, strict=True)
    ),
)  # fmt: skip
"""Original and transformers, without `weight` and `bias`; `#` is a number, in order the same in both."""

LEAF = r"(\.(?:weight|bias|running_mean|running_var|num_batches_tracked))?"
TINY = re.compile(
    r"image_encoder\.(?:patch_embed\.seq\.\d+\.(?:c|bn)"
    r"|layers\.\d\.(?:downsample\.conv\d|blocks\.\d+\.(?:conv\d|local_conv))\.(?:c|bn)"
    r"|layers\.\d\.blocks\.\d+\.(?:attn\.(?:norm|qkv|proj|attention_biases)|mlp\.(?:norm|fc1|fc2)))" + LEAF
)
"""Names of TinyViT, which transformers does not have."""

IGNORED = re.compile(
    r"pixel_mean|pixel_std|n_averaged"
    r"|image_encoder\.(?:head|norm_head)\.(?:weight|bias)"
    r"|image_encoder\.layers\.\d\.blocks\.\d+\.attn\.(?:attention_bias_idxs|ab)"
)
"""Names in some files that nothing reads: TinyViT's ImageNet classifier, constants, the counter of PyTorch's
`AveragedModel`."""

WRAPPED = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What DDP, FSDP, checkpointing and `torch.compile` put into names: at the front, or in the middle where one
part was wrapped."""

PARTS = ("image_encoder", "vision_encoder", "prompt_encoder", "mask_decoder", "shared_image_embedding")
"""The parts of a model, in either layout."""

BEFORE_PARTS = re.compile(rf"((?:[^.]+\.)*?)(?:{'|'.join(PARTS)})\.")


@cache
def patterns(column: int) -> tuple[tuple[re.Pattern[str], tuple[str, str]], ...]:
    """Return a pattern for each pair of `NAMES` that matches its names in one column."""
    return tuple(
        (re.compile(re.escape(pair[column]).replace(r"\#", r"(\d+)") + LEAF), pair) for pair in NAMES
    )


def rename(name: str, source: Layout, target: Layout) -> str | None:
    """Return the name in layout `target` of a tensor called `name` in `source`; None: it is not known.

    Every model's own names count as the original's.
    """
    if "hq_sam2" in (source, target):
        return name_in_model(name) if source == "hq_sam2" else name_in_file(name)
    columns: dict[Layout, int] = {"original": 0, "transformers": 1}
    for pattern, pair in patterns(columns[source]):
        if match := pattern.fullmatch(name):
            *numbers, leaf = match.groups(default="")
            parts = pair[columns[target]].split("#")
            return "".join(map("".join, zip(parts, [*numbers, leaf], strict=True)))
    return name if source == target == "original" and TINY.fullmatch(name) else None


# The names of a file

NAMES_LISTED = 8

ADAPTER = re.compile(r"\.(?:lora_|base_layer\.|modules_to_save\.|original_module\.)")
"""In the names that PEFT gives to what it adds to a model's own layers."""


class CheckpointError(ValueError):
    """Weights that cannot be found, read or used. The message names the file or the tensor."""


def original_names(tensors: Tensors) -> tuple[Layout, Tensors, list[str]]:
    """Return the layout, the tensors under the model's names, and the names that are known not to matter."""
    tensors = without_prefix(tensors)
    layout = check_family(tensors)
    named, ignored, left_over = Tensors(), list[str](), list[str]()
    for name, tensor in tensors.items():
        if layout == "transformers" and name == TIED_POSITIONS:
            if not torch.equal(tensors.get(SHARED_POSITIONS, tensor), tensor):
                raise CheckpointError(f"{TIED_POSITIONS} differs from {SHARED_POSITIONS}")
            named[POSITIONS] = tensor
        elif original := rename(name, layout, "original"):
            named[original] = tensor
        else:
            known = VIDEO if layout == "hq_sam2" else IGNORED
            (ignored if known.fullmatch(name) else left_over).append(name)
    if left_over:
        # Without its adapters such a model is another one: to save the rest alone would be wrong advice.
        advice = (
            "adapters such as LoRA's must be merged first: save what PEFT's model.merge_and_unload() returns"
            if any(ADAPTER.search(name) for name in left_over)
            else "save the model's own alone"
        )
        raise CheckpointError(
            f"{tensors_are(len(left_over))} left over: {listed(sorted(left_over))}; {advice}"
        )
    return layout, named, ignored


def check_family(names: Collection[str]) -> Layout:
    """Return the layout that the names are of.

    Raises:
        CheckpointError: names of a related model, of no model known here, or of a mask decoder alone. Of
            SAM-HQ's it may be the HQ layers alone, which are all that its training changes.
    """

    def have(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in names)

    related = None
    if have(r"sam_mask_decoder\.|sam_prompt_encoder\.|image_encoder\.trunk\."):
        if have(r"sam_mask_decoder\.(?:hf_|embedding_maskfeature)"):
            return "hq_sam2"
        related = "SAM 2"
    elif have(r"vision_encoder\.backbone\.|mask_decoder\.conv_s0"):
        related = "SAM 2"
    elif have(r"mask_decoder\.") and not have(r"mask_decoder\.h[fq]_token"):
        related = "MobileSAM" if have(r".*\.patch_embed\.seq\.") else "plain SAM"
    if related:
        raise CheckpointError(
            f"the file holds {related}, not SAM-HQ: there is no HQ token in it. Use a SAM-HQ checkpoint, "
            "such as sam_hq_vit_b.pth, sam2.1_hq_hiera_large.pt or syscv-community/sam-hq-vit-base"
        )
    if have(r"vision_encoder\."):
        return "transformers"
    if have(r"image_encoder\."):
        return "original"
    if have(r".*hq_token\.weight$"):
        advice = "SAM-HQ alone; save the whole model: model.save_pretrained('sam_hq')"
    elif have(r".*hf_token\.weight$"):
        whole = have(r"mask_decoder\.hf_token\.weight$")
        merged = "hq" if whole else "{'mask_decoder.' + k: hq[k] for k in hq}"
        advice = (
            "SAM-HQ alone, as training saves it after each epoch. Name the sam_hq_epoch_*.pth that it saves "
            "at its end, or merge it with its SAM: sam = torch.load('sam_vit_l.pth', weights_only=True); "
            "hq = torch.load('epoch_11.pth', weights_only=True); "
            f"sam.update({merged}); torch.save(sam, 'sam_hq.pth')"
        )
    elif have(r".*iou_prediction_head\."):
        advice = "SAM alone, from which the training of SAM-HQ begins; it is not SAM-HQ"
    else:
        raise CheckpointError(
            f"the file holds {len(names)} tensors, none of an image encoder; it is not SAM-HQ "
            f"(first names: {listed(sorted(names))})"
        )
    raise CheckpointError(f"the file holds the mask decoder of {advice}")


def without_prefix(tensors: Tensors) -> Tensors:
    """Return the tensors under the names inside the model, whatever training code had wrapped it in."""
    bare = {name: WRAPPED.sub("", name) for name in tensors}
    prefixes = sorted({match[1] for match in map(BEFORE_PARTS.match, bare.values()) if match})
    if len(prefixes) > 1:
        raise CheckpointError(
            f"the parts of the model are under {len(prefixes)} prefixes, {listed([*map(repr, prefixes)])}; "
            "wanted one model: save the tensors of one prefix alone"
        )
    result = Tensors()
    for name, tensor in tensors.items():
        short = bare[name].removeprefix("".join(prefixes))
        if short in result:
            wrapped = next(x for x in tensors if x != short and bare[x] == bare[name])
            raise CheckpointError(
                f"the file holds tensors twice, with and without `{wrapped.removesuffix(short)}`: {short}"
            )
        result[short] = tensor
    return result


def tensors_are(number: int) -> str:
    """Return the number as the start of a sentence."""
    return "1 tensor is" if number == 1 else f"{number} tensors are"


def listed(names: Sequence[str]) -> str:
    """Return some names or complaints, and how many more there are."""
    more = len(names) - NAMES_LISTED
    return ", ".join(names[:NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")


# The architecture

DECIDING = (
    "image_encoder.patch_embed.proj.weight",
    "image_encoder.pos_embed",
    "image_encoder.blocks.0.attn.rel_pos_h",
    "image_encoder.patch_embed.seq.2.c.weight",
    *(f"image_encoder.layers.{i}.downsample.conv1.c.weight" for i in range(3)),
    "image_encoder.trunk.patch_embed.proj.weight",
    "image_encoder.neck.convs.0.conv.weight",
    "image_encoder.neck.0.weight",
    "prompt_encoder.no_mask_embed.weight",
    "prompt_encoder.mask_downscaling.3.weight",
    "mask_decoder.iou_token.weight",
    "mask_decoder.compress_vit_feat.0.weight",
)
"""Tensors whose sides must agree with one another. Which of two is wrong is not known, so all are named."""


def deciding_shapes(shapes: Shapes) -> str:
    """Return as text what an architecture was read from."""
    return "read from the shapes of " + ", ".join(f"{x} {shapes[x]}" for x in DECIDING if x in shapes)


def config_from_shapes(shapes: Shapes, *, image_size: int | None = None) -> SamHQConfig:
    """Return the architecture that tensors of these shapes, under the original's names, belong to.

    `image_size`: input side of a TinyViT, which does not follow from its tensors (1024 for None); a ViT's is
    that of its position table, and `image_size` is not used.

    Raises:
        ConfigError: a tensor that the architecture is read from is missing or has an impossible shape, or
            such tensors contradict each other; the message names them.
    """
    tiny = "image_encoder.patch_embed.seq.0.c.weight" in shapes
    vision = _tiny_vit(shapes, image_size or 1024) if tiny else _vit(shapes)
    vit_dim = side_of(shapes, "mask_decoder.compress_vit_feat.0.weight", 0, of=4)
    return with_decoder(vision, shapes, vit_dim=vit_dim)


def with_decoder(vision: EncoderConfig, shapes: Shapes, *, vit_dim: int) -> SamHQConfig:
    """Return the configuration of a whole model: this encoder, the rest by its shapes.

    `vit_dim`: width of the early feature, 0 for a decoder without one. Raises as `config_from_shapes`.
    """
    layers = f"{TRANSFORMER}.layers"
    return SamHQConfig(
        vision=vision,
        prompt_encoder=PromptEncoderConfig(
            hidden_size=side_of(shapes, "prompt_encoder.no_mask_embed.weight", 1, of=2),
            image_size=vision.image_size,
            mask_input_channels=side_of(shapes, "prompt_encoder.mask_downscaling.3.weight", 0, of=4),
        ),
        mask_decoder=MaskDecoderConfig(
            hidden_size=side_of(shapes, "mask_decoder.iou_token.weight", 1, of=2),
            mlp_dim=side_of(shapes, f"{layers}.0.mlp.lin1.weight", 0, of=2),
            num_hidden_layers=count_of(shapes, layers),
            iou_head_hidden_dim=side_of(shapes, "mask_decoder.iou_prediction_head.layers.0.weight", 0, of=2),
            vit_dim=vit_dim,
        ),
    )


def _vit(shapes: Shapes) -> VisionConfig:
    """Return the ViT of these tensors. A block is global when its table covers the whole grid."""
    positions, blocks = "image_encoder.pos_embed", "image_encoder.blocks"
    width, grid = side_of(shapes, positions, 3, of=4), side_of(shapes, positions, 1, of=4)
    tables = [f"{blocks}.{i}.attn.rel_pos_h" for i in range(count_of(shapes, blocks))]
    sides = [(side_of(shapes, table, 0, of=2) + 1) // 2 for table in tables]
    head_width = side_of(shapes, tables[0], 1, of=2)
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
        num_hidden_layers=len(tables),
        num_attention_heads=width // head_width,
        mlp_dim=side_of(shapes, f"{blocks}.0.mlp.lin1.weight", 0, of=2),
        window_size=windows[0] if windows else min(14, grid - 1),  # without a windowed block: any
        global_attn_indexes=tuple(i for i, side in enumerate(sides) if side == grid),
        image_size=grid * PATCH_SIZE,
        output_channels=side_of(shapes, "image_encoder.neck.0.weight", 0, of=4),
    )


def _tiny_vit(shapes: Shapes, image_size: int) -> TinyVisionConfig:
    layers = "image_encoder.layers"
    stem = side_of(shapes, "image_encoder.patch_embed.seq.2.c.weight", 0, of=4)
    widths = [side_of(shapes, f"{layers}.{i}.downsample.conv1.c.weight", 0, of=4) for i in range(3)]
    depths = [count_of(shapes, f"{layers}.{i}.blocks") for i in range(4)]
    biases = [f"{layers}.{i}.blocks.0.attn.attention_biases" for i in (1, 2, 3)]
    return TinyVisionConfig(
        embed_dims=(stem, *widths),
        depths=tuple(depths),
        num_heads=tuple(side_of(shapes, name, 0, of=2) for name in biases),
        window_sizes=tuple(math.isqrt(side_of(shapes, name, 1, of=2)) for name in biases),
        image_size=image_size,
        output_channels=side_of(shapes, "image_encoder.neck.0.weight", 0, of=4),
    )


def side_of(shapes: Shapes, name: str, axis: int, *, of: int) -> int:
    """Return one side of a tensor of `of` axes, or raise `ConfigError` naming the tensor."""
    if name not in shapes:
        raise ConfigError(f"the architecture cannot be read: tensor {name} is missing")
    if len(shapes[name]) != of or shapes[name][axis] < 1:
        raise ConfigError(
            f"the architecture cannot be read: tensor {name} has shape {shapes[name]}; wanted {of} axes"
        )
    return shapes[name][axis]


def count_of(shapes: Shapes, prefix: str) -> int:
    """Return how many blocks `prefix.0`, `prefix.1`, ... there are, or raise `ConfigError` naming a gap."""
    numbers = {int(name[len(prefix) + 1 :].split(".")[0]) for name in shapes if name.startswith(prefix + ".")}
    gap = next((i for i in range(len(numbers) + 1) if i not in numbers), 0)
    if not numbers or gap < len(numbers):
        raise ConfigError(f"the architecture cannot be read: no tensor of {prefix}.{gap}")
    return len(numbers)
