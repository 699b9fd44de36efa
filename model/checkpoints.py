"""Weights in and out: where they come from, what they are, whether they are whole.

    bytes of a file, folder or hub id  ->  SHA-256  ->  tensors  ->  our names  ->  architecture  ->  SamHQ

Strict on tensors. The original loader only prints what is missing or left over, so that a file of plain SAM
gives HQ-SAM with random HQ weights; here each such tensor is an error by name.
The tensors decide the architecture. A `config.json` beside them is held against them; what it holds beyond
what is known here is a warning, so that the files of the next release of transformers can be read.
No file is unpickled beyond tensors, whatever the environment says.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from model.architecture import config_from_shapes, deciding_shapes
from model.config import ConfigError, SamHQConfig, VisionConfig
from model.config_json import config_to_json, disagreements, part_of, stated_side, unknown_keys
from model.layouts import (
    IGNORED,
    TIED_PE,
    Layout,
    decoder_alone,
    detect_layout,
    foreign_model,
    prefixes,
    rename,
    without_wrappers,
)
from model.records import WeightsInfo
from model.sam_hq import SamHQ
from model.weight_files import CONFIG, SINGLE, CheckpointError, Source, read_weights, write_atomically

__all__ = ["DEMO_FOLDER", "CheckpointError", "LoadedModel", "load", "save_original", "save_transformers"]

DEMO_FOLDER = Path(__file__).parent / "weights" / "hqlabel-demo"
"""The small model that comes with the package, in the transformers layout."""

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FP16_MAX = 65504.0
NAMES_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to encode and decode, and where its weights came from."""

    model: SamHQ
    weights: WeightsInfo


def load(
    source: Source,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> LoadedModel:
    """Return the model in `source`, in evaluation mode.

    `source`: a path of a PyTorch or safetensors file of either layout, of an index of shards, or of a folder
    as transformers writes it; bytes or an open binary file of one of the two kinds of file; a mapping of
    file names to bytes or open files, for a folder that lies elsewhere; or a hub id, `org/name` (a folder) or
    `org/name/file.pth`, when no such path exists. `revision`: of a hub id.
    `dtype`: float32 or bfloat16, see `SamHQ.cast`. Weights stored as fp16, bf16 or fp64 become fp32 first.

    Raises:
        CheckpointError: nothing there, not a weights file, another model's, or a tensor that is missing,
            left over, of a wrong shape or dtype, or not finite: the message names it.
        ConfigError: a `config.json` of another model, or that asks for what is not done here.
    """
    files = read_weights(source, revision=revision)
    layout, native, ignored = to_native(files.tensors)
    unknown = unknown_keys(files.config or {})
    config = read_config(native, files.config or {}, layout)
    model = build(config, native, layout)
    info = WeightsInfo(
        sha256=files.sha256,
        layout=layout,
        architecture=config.vision.name,
        license=files.license,
        source=files.source,
        ignored_keys=tuple(sorted(ignored)),
        warnings=(f"config.json: {shown(unknown)}: not known here, not followed",) if unknown else (),
    )
    return LoadedModel(model=model.cast(dtype).to(device), weights=info)


_ADAPTER = re.compile(r"\.(?:lora_|base_layer\.|modules_to_save\.|original_module\.)")
"""In the names that PEFT gives to what it put beside and around a model's own layers."""


def to_native(tensors: Mapping[str, torch.Tensor]) -> tuple[Layout, dict[str, torch.Tensor], list[str]]:
    """Return the layout, the tensors under our names, and the names that are known not to matter."""
    tensors = without_prefix(tensors)
    foreign = foreign_model(tensors)
    if foreign is not None:
        raise CheckpointError(
            f"the file holds {foreign}, not SAM-HQ: there is no HQ token in it. Use a SAM-HQ checkpoint, "
            "such as sam_hq_vit_b.pth or syscv-community/sam-hq-vit-base"
        )
    whose = decoder_alone(tensors)
    if whose is not None:
        raise CheckpointError(
            f"the file holds the mask decoder of {whose} alone{what_to_merge(whose, tensors)}"
        )
    layout = detect_layout(tensors)
    if layout is None:
        raise CheckpointError(
            f"the file holds {len(tensors)} tensors, none of an image encoder; it is not SAM-HQ "
            f"(first names: {shown(sorted(tensors))})"
        )
    native: dict[str, torch.Tensor] = {}
    ignored, left_over = [], []
    for name, tensor in tensors.items():
        ours = rename(name, layout, "native")
        if ours is not None:
            native[ours] = tensor
        elif name == TIED_PE and layout == "transformers":
            add_tied_matrix(native, tensor, tensors)
        elif IGNORED.fullmatch(name):
            ignored.append(name)
        else:
            left_over.append(name)
    if left_over:
        # Without its adapters such a model is another one: to save the rest alone would be wrong advice.
        advice = (
            "adapters such as LoRA's must be merged first: save what PEFT's model.merge_and_unload() returns"
            if any(_ADAPTER.search(name) for name in left_over)
            else "save the model's own alone"
        )
        raise CheckpointError(
            f"{tensors_are(len(left_over))} left over: {shown(sorted(left_over))}; {advice}"
        )
    return layout, native, ignored


def what_to_merge(whose: Literal["SAM", "SAM-HQ"], tensors: Mapping[str, torch.Tensor]) -> str:
    """Return what to do with a decoder alone."""
    if whose == "SAM":
        return ", from which the training of SAM-HQ begins; it is not SAM-HQ"
    if any("hq_token." in name for name in tensors):
        return "; save the whole model: model.save_pretrained('sam_hq')"
    named = next((name for name in tensors if name.endswith("hf_token.weight")), "")
    ours = "hq" if named.startswith("mask_decoder.") else "{'mask_decoder.' + k: hq[k] for k in hq}"
    return (
        ", as training saves it after each epoch. Name the sam_hq_epoch_*.pth that it saves at its end, or "
        "merge it with its SAM: sam = torch.load('sam_vit_l.pth', weights_only=True); "
        "hq = torch.load('epoch_11.pth', weights_only=True); "
        f"sam.update({ours}); torch.save(sam, 'sam_hq.pth')"
    )


def without_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under the model's own names, without what training code had it wrapped in."""
    bare = {name: without_wrappers(name) for name in tensors}
    found = sorted(prefixes(bare.values()))
    if len(found) > 1:
        raise CheckpointError(
            f"the parts of the model stand under {len(found)} prefixes, {shown([repr(x) for x in found])}; "
            "wanted one model: save the tensors of one prefix alone"
        )
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        short = bare[name].removeprefix(found[0] if found else "")
        if short in result:
            wrapped = next(x for x in tensors if x != short and bare[x] == bare[name])
            raise CheckpointError(
                f"the file holds tensors twice, with and without `{wrapped.removesuffix(short)}`: {short}"
            )
        result[short] = tensor
    return result


def add_tied_matrix(
    native: dict[str, torch.Tensor], tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Take transformers' second copy of the positional matrix; it must equal the first if that is there."""
    first = tensors.get("shared_image_embedding.positional_embedding")
    if first is not None and not torch.equal(first, tensor):
        raise CheckpointError(f"{TIED_PE} differs from shared_image_embedding.positional_embedding")
    native["prompt_encoder.pe_matrix"] = tensor


def read_config(
    native: Mapping[str, torch.Tensor], values: Mapping[str, Any] | None, layout: Layout
) -> SamHQConfig:
    """Return the architecture of the tensors, after holding a `config.json` against it if there is one."""
    try:
        config = config_from_shapes(
            {name: tuple(tensor.shape) for name, tensor in native.items()},
            image_size=stated_side(values or {}),
        )
    except ConfigError as error:
        raise CheckpointError(in_file_names(str(error), layout)) from error
    if not early_block_is_told(values or {}, config):
        grid = config.prompt_encoder.grid
        raise CheckpointError(
            f"the table of every block covers the whole grid of {grid}x{grid} tokens, so that blocks with "
            f"windows of {grid} cannot be told from global ones, the first of which gives the early feature; "
            "put a config.json with vision_config.global_attn_indexes beside the weights, in a folder"
        )
    if differing := disagreements(values or {}, config):
        raise CheckpointError(f"config.json and tensors disagree: {', '.join(differing)} by the tensors")
    return config


def early_block_is_told(values: Mapping[str, Any], config: SamHQConfig) -> bool:
    """Return whether it is known which block is the first global one.

    It is not where all may be: a ViT-B at 224 pixels has a grid of 14, as wide as its windows.
    """
    vision = config.vision
    return (
        not isinstance(vision, VisionConfig)
        or len(vision.global_attn_indexes) < vision.num_hidden_layers
        or vision.num_hidden_layers == 1
        or part_of(values, "vision_config").get("global_attn_indexes") is not None
    )


def build(config: SamHQConfig, native: Mapping[str, torch.Tensor], layout: Layout) -> SamHQ:
    """Return the model with exactly these tensors, as fp32, for evaluation; errors use the file's names."""
    with torch.device("meta"):
        model = SamHQ(config)
    expected = model.state_dict()
    tensors = dict(native)
    for name in expected:
        # BatchNorm's counter of training steps: some files leave it out, and inference does not read it.
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, torch.tensor(0))
    check_names("missing", set(expected) - set(tensors), layout)
    check_names("left over", set(tensors) - set(expected), layout)
    check_shapes(tensors, expected, layout)
    for name in expected:
        tensors[name] = checked(file_name(name, layout), tensors[name], expected[name])
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def file_name(name: str, layout: Layout) -> str:
    """Return what a tensor of ours is called in a file of this layout."""
    found = rename(name, "native", layout)
    assert found is not None, name
    return found


def in_file_names(message: str, layout: Layout) -> str:
    """Return an error message with the names of tensors as a file of this layout has them."""
    ours = re.compile(r"\b(?:image_encoder|prompt_encoder|mask_decoder)[\w.]*\w")
    return ours.sub(lambda name: rename(name[0], "native", layout) or name[0], message)


def check_names(what: str, names: set[str], layout: Layout) -> None:
    """Raise `CheckpointError` when there are such tensors, naming them as the file does."""
    if names:
        found = sorted(file_name(name, layout) for name in names)
        raise CheckpointError(f"{tensors_are(len(names))} {what}: {shown(found)}")


def check_shapes(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], layout: Layout
) -> None:
    """Raise `CheckpointError` naming every tensor of another shape.

    Where several are, the wrong one may be one of those that the expected shapes follow from: these too.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [
        f"tensor {file_name(name, layout)} has shape {shapes[name]}; wanted {tuple(wanted.shape)}"
        for name, wanted in expected.items()
        if shapes[name] != tuple(wanted.shape)
    ]
    if wrong:
        reason = f" (the model was {deciding_shapes(shapes)})" if len(wrong) > 1 else ""
        raise CheckpointError(shown(wrong) + in_file_names(reason, layout))


def checked(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the tensor as fp32 (a counter as int64), or raise `CheckpointError` naming it."""
    if tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(f"tensor {name} is sparse or without data; wanted plain numbers")
    if not expected.is_floating_point():
        return tensor.to(expected.dtype)
    if tensor.dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"tensor {name} is {tensor.dtype}; wanted float32, float16, bfloat16 or float64"
        )
    tensor = tensor.detach().to(torch.float32).contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # a part of something larger would keep all of it alive
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"tensor {name} holds values that are not finite")
    return tensor


def tensors_are(number: int) -> str:
    """Return the number in words that go on."""
    return "1 tensor is" if number == 1 else f"{number} tensors are"


def shown(names: Sequence[str]) -> str:
    """Return some names or complaints, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def save_transformers(
    model: SamHQ, folder: str | Path, *, half: bool = False, license: str | None = None
) -> WeightsInfo:
    """Write `config.json` and `model.safetensors`, as transformers reads them, and return what was written.

    `half`: store fp16, rounded, but for the positional matrix, whose rounding would move boxes. Without
    it the round trip through `load` is bit-exact. `license`: an SPDX name, kept in the file.

    Raises:
        CheckpointError: weights that are not fp32 (cast down before), or too large for fp16.
    """
    tensors = stored_tensors(model, "transformers")
    if half:
        tensors = {name: to_half(name, tensor) for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | ({"license": license} if license else {})
    data = safetensors.torch.save(tensors, metadata)
    config = json.dumps(config_to_json(model.config), indent=2, sort_keys=True) + "\n"
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(folder) / SINGLE, data)
    write_atomically(Path(folder) / CONFIG, config.encode())
    return written(model, data, "transformers", str(folder), license)


def save_original(model: SamHQ, path: str | Path) -> WeightsInfo:
    """Write a `.pth` as the original loads it, and return what was written.

    The round trip through `load` is bit-exact. TinyViT's classifier, which nothing reads, is not in it.

    Raises:
        CheckpointError: weights that are not fp32 (cast down before).
    """
    buffer = io.BytesIO()
    torch.save(stored_tensors(model, "original"), buffer)
    write_atomically(Path(path), buffer.getvalue())
    return written(model, buffer.getvalue(), "original", str(path), None)


def stored_tensors(model: SamHQ, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the model's tensors under the layout's names, on the host."""
    tensors = {}
    for ours, tensor in model.state_dict().items():
        name = file_name(ours, layout)
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise CheckpointError(f"tensor {name} is {tensor.dtype}; save the model before casting it")
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def to_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as fp16, or as it is where rounding would hurt: the positional matrix, statistics."""
    if not tensor.is_floating_point() or "positional_embedding" in name or ".running_" in name:
        return tensor
    largest = tensor.abs().max().item()
    if largest > FP16_MAX:
        raise CheckpointError(f"tensor {name} holds {largest:g}, too large for fp16; save with half=False")
    return tensor.half()


def written(model: SamHQ, data: bytes, layout: Layout, source: str, license: str | None) -> WeightsInfo:
    """Return the record of a file just written."""
    return WeightsInfo(
        sha256=hashlib.sha256(data).hexdigest(),
        layout=layout,
        architecture=model.config.vision.name,
        license=license,
        source=source,
    )
