"""The two layouts in which SAM-HQ weights are published, and ours: one table of names.

`original` is the `.pth` of `segment-anything-hq`, `transformers` the safetensors of `SamHQModel`. No tensor
is reshaped or transposed between the three. A name is renamed whole, in one pass: the middle layer of an MLP
is `layers.1` in one layout and `layers.0` in the other, so that replacing parts one after another would
swap layers without an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Literal

Layout = Literal["original", "transformers"]

Row = tuple[str, str, str]
"""native, original, transformers. `{i}` stands for a number, and is the same number in all three."""

LEAF = r"(\.(?:weight|bias|running_mean|running_var|num_batches_tracked))?"

VIT_ROWS: tuple[Row, ...] = (
    ("image_encoder.pos_embed", "image_encoder.pos_embed", "vision_encoder.pos_embed"),
    ("image_encoder.patch_embed", "image_encoder.patch_embed.proj", "vision_encoder.patch_embed.projection"),
    (
        "image_encoder.blocks.{i}.norm1",
        "image_encoder.blocks.{i}.norm1",
        "vision_encoder.layers.{i}.layer_norm1",
    ),
    (
        "image_encoder.blocks.{i}.norm2",
        "image_encoder.blocks.{i}.norm2",
        "vision_encoder.layers.{i}.layer_norm2",
    ),
    (
        "image_encoder.blocks.{i}.mlp.fc1",
        "image_encoder.blocks.{i}.mlp.lin1",
        "vision_encoder.layers.{i}.mlp.lin1",
    ),
    (
        "image_encoder.blocks.{i}.mlp.fc2",
        "image_encoder.blocks.{i}.mlp.lin2",
        "vision_encoder.layers.{i}.mlp.lin2",
    ),
    *(
        (
            f"image_encoder.blocks.{{i}}.attn.{x}",
            f"image_encoder.blocks.{{i}}.attn.{x}",
            f"vision_encoder.layers.{{i}}.attn.{x}",
        )
        for x in ("qkv", "proj", "rel_pos_h", "rel_pos_w")
    ),
)

NECK_ROWS: tuple[Row, ...] = tuple(
    (f"image_encoder.neck.{ours}", f"image_encoder.neck.{i}", f"vision_encoder.neck.{theirs}")
    for i, (ours, theirs) in enumerate(
        [("conv1", "conv1"), ("norm1", "layer_norm1"), ("conv2", "conv2"), ("norm2", "layer_norm2")]
    )
)


def tiny_rows() -> Iterator[Row]:
    """Yield TinyViT's rows. Transformers has no TinyViT: its column holds names of our own."""

    def conv(ours: str, original: str) -> Iterator[Row]:
        for one, other in (("conv", "c"), ("bn", "bn")):
            yield (
                f"image_encoder.{ours}.{one}",
                f"image_encoder.{original}.{other}",
                f"vision_encoder.{ours}.{one}",
            )

    yield from conv("stem1", "patch_embed.seq.0")
    yield from conv("stem2", "patch_embed.seq.2")
    for n in (1, 2, 3):
        yield from conv(f"conv_stage.blocks.{{i}}.conv{n}", f"layers.0.blocks.{{i}}.conv{n}")
        yield from conv(f"conv_stage.downsample.conv{n}", f"layers.0.downsample.conv{n}")
        for stage in (0, 1):
            yield from conv(f"stages.{stage}.downsample.conv{n}", f"layers.{stage + 1}.downsample.conv{n}")
    for stage in (0, 1, 2):
        ours, original = f"stages.{stage}.blocks.{{i}}", f"layers.{stage + 1}.blocks.{{i}}"
        yield from conv(f"{ours}.local_conv", f"{original}.local_conv")
        for part in (
            "attn.norm",
            "attn.qkv",
            "attn.proj",
            "attn.attention_biases",
            "mlp.norm",
            "mlp.fc1",
            "mlp.fc2",
        ):
            yield (
                f"image_encoder.{ours}.{part}",
                f"image_encoder.{original}.{part}",
                f"vision_encoder.{ours}.{part}",
            )


def prompt_rows() -> Iterator[Row]:
    """Yield the prompt encoder's rows."""
    p = "prompt_encoder"
    yield (
        f"{p}.pe_matrix",
        f"{p}.pe_layer.positional_encoding_gaussian_matrix",
        "shared_image_embedding.positional_embedding",
    )
    yield f"{p}.point_embed.{{i}}", f"{p}.point_embeddings.{{i}}.weight", f"{p}.point_embed.{{i}}.weight"
    yield f"{p}.not_a_point", f"{p}.not_a_point_embed.weight", f"{p}.not_a_point_embed.weight"
    yield f"{p}.no_mask", f"{p}.no_mask_embed.weight", f"{p}.no_mask_embed.weight"
    for n, ours, theirs in (
        (0, "conv1", "conv1"),
        (1, "norm1", "layer_norm1"),
        (3, "conv2", "conv2"),
        (4, "norm2", "layer_norm2"),
        (6, "conv3", "conv3"),
    ):
        yield f"{p}.mask.{ours}", f"{p}.mask_downscaling.{n}", f"{p}.mask_embed.{theirs}"


def transformer_rows() -> Iterator[Row]:
    """Yield the two-way transformer's rows."""
    t = "mask_decoder.transformer"
    for ours, theirs in (
        ("layers.{i}.self_attn", "layers.{i}.self_attn"),
        ("layers.{i}.t2i", "layers.{i}.cross_attn_token_to_image"),
        ("layers.{i}.i2t", "layers.{i}.cross_attn_image_to_token"),
        ("final_attn", "final_attn_token_to_image"),
    ):
        for x in ("q", "k", "v", "out"):
            yield f"{t}.{ours}.{x}", f"{t}.{theirs}.{x}_proj", f"{t}.{theirs}.{x}_proj"
    for n in (1, 2, 3, 4):
        yield f"{t}.layers.{{i}}.norm{n}", f"{t}.layers.{{i}}.norm{n}", f"{t}.layers.{{i}}.layer_norm{n}"
    for n in (1, 2):
        yield f"{t}.layers.{{i}}.fc{n}", f"{t}.layers.{{i}}.mlp.lin{n}", f"{t}.layers.{{i}}.mlp.lin{n}"
    yield f"{t}.norm_final", f"{t}.norm_final_attn", f"{t}.layer_norm_final_attn"


def decoder_rows() -> Iterator[Row]:
    """Yield the mask decoder's other rows."""
    d = "mask_decoder"
    yield f"{d}.iou_token", f"{d}.iou_token.weight", f"{d}.iou_token.weight"
    yield f"{d}.mask_tokens", f"{d}.mask_tokens.weight", f"{d}.mask_tokens.weight"
    yield f"{d}.hq_token", f"{d}.hf_token.weight", f"{d}.hq_token.weight"
    for ours, original, theirs in (
        ("hyper.{i}", "output_hypernetworks_mlps.{i}", "output_hypernetworks_mlps.{i}"),
        ("hyper_hq", "hf_mlp", "hq_mask_mlp"),
        ("iou_head", "iou_prediction_head", "iou_prediction_head"),
    ):
        for n, layer in enumerate(("proj_in", "layers.0", "proj_out")):
            yield f"{d}.{ours}.{n}", f"{d}.{original}.layers.{n}", f"{d}.{theirs}.{layer}"
    for ours, original, theirs, norm in (
        ("up", "output_upscaling", "upscale", "upscale_layer_norm"),
        ("hq_vit", "compress_vit_feat", "compress_vit", "compress_vit_norm"),
        ("hq_emb", "embedding_encoder", "encoder", "encoder_norm"),
        ("hq_mask", "embedding_maskfeature", "mask", "mask_norm"),
    ):
        yield f"{d}.{ours}.conv1", f"{d}.{original}.0", f"{d}.{theirs}_conv1"
        yield f"{d}.{ours}.norm", f"{d}.{original}.1", f"{d}.{norm}"
        yield f"{d}.{ours}.conv2", f"{d}.{original}.3", f"{d}.{theirs}_conv2"


ROWS: tuple[Row, ...] = (
    *VIT_ROWS,
    *tiny_rows(),
    *NECK_ROWS,
    *prompt_rows(),
    *transformer_rows(),
    *decoder_rows(),
)

IGNORED = re.compile(
    r"pixel_mean|pixel_std|n_averaged"
    r"|image_encoder\.(?:head|norm_head)\.(?:weight|bias)"
    r"|image_encoder\.layers\.\d\.blocks\.\d+\.attn\.(?:attention_bias_idxs|ab)"
)
"""Names that some files carry and nothing reads: TinyViT's ImageNet classifier, constants, the counter of
PyTorch's `AveragedModel`."""

TIED_PE = "prompt_encoder.shared_embedding.positional_embedding"
"""The second name under which transformers keeps the positional matrix."""

WRAPPED = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What wrappers of PyTorch put into names, at the front or, where one part was wrapped, in the middle."""

PARTS = ("image_encoder", "vision_encoder", "prompt_encoder", "mask_decoder", "shared_image_embedding")
"""The parts of a model, in either layout."""

BEFORE_PARTS = re.compile(rf"((?:[^.]+\.)*?)(?:{'|'.join(PARTS)})\.")

COLUMN = {"native": 0, "original": 1, "transformers": 2}


@cache
def patterns(source: str) -> tuple[tuple[re.Pattern[str], Row], ...]:
    """Return a pattern for each row of the table that matches the names of one layout."""
    return tuple(
        (re.compile(re.escape(row[COLUMN[source]]).replace(r"\{i\}", r"(?P<i>\d+)") + LEAF), row)
        for row in ROWS
    )


def rename(name: str, source: str, target: str) -> str | None:
    """Return the name in layout `target` of a tensor called `name` in `source`; None when unknown there.

    Layouts: `native`, `original`, `transformers`.
    """
    for pattern, row in patterns(source):
        match = pattern.fullmatch(name)
        if match:
            leaf = match.groups()[-1] or ""
            return row[COLUMN[target]].replace("{i}", match.groupdict().get("i") or "") + leaf
    return None


def without_wrappers(name: str) -> str:
    """Return a tensor's name without what DDP, FSDP, checkpointing and `torch.compile` put into it."""
    return WRAPPED.sub("", name)


def prefixes(names: Iterable[str]) -> set[str]:
    """Return what stands before the model's own names: `{"model."}` where it was kept as `self.model`."""
    return {match[1] for match in map(BEFORE_PARTS.match, names) if match}


def detect_layout(names: Mapping[str, object]) -> Layout | None:
    """Return the layout that the names are of, None when of neither."""
    if any(name.startswith("vision_encoder.") for name in names):
        return "transformers"
    if any(name.startswith("image_encoder.") for name in names):
        return "original"
    return None


def decoder_alone(names: Mapping[str, object]) -> Literal["SAM-HQ", "SAM"] | None:
    """Return whose mask decoder the names are of, when there is no image encoder beside it; else None.

    Of SAM-HQ's it may be the HQ layers alone, which are all that its training changes.
    """
    if detect_layout(names):
        return None
    if any(name.endswith(("hf_token.weight", "hq_token.weight")) for name in names):
        return "SAM-HQ"
    return "SAM" if any("iou_prediction_head." in name for name in names) else None


def foreign_model(names: Mapping[str, object]) -> str | None:
    """Return what related model the names are of, when not SAM-HQ; None when nothing speaks against it."""
    if any(
        name.startswith(("sam_mask_decoder.", "sam_prompt_encoder.", "image_encoder.trunk."))
        for name in names
    ):
        hq = any(".hf_" in name or ".compress_vit_feat" in name for name in names)
        return "HQ-SAM 2" if hq else "SAM 2"
    if any(name.startswith(("vision_encoder.backbone.", "mask_decoder.conv_s0")) for name in names):
        return "SAM 2"
    has_decoder = any(name.startswith("mask_decoder.") for name in names)
    has_hq = any(name.startswith(("mask_decoder.hf_token", "mask_decoder.hq_token")) for name in names)
    if has_decoder and not has_hq:
        return "MobileSAM" if any(".patch_embed.seq." in name for name in names) else "plain SAM"
    return None
