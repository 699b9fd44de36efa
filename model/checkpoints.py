"""Weights in and out: read safely, named, checked to be whole, and put into a `SamHQ`.

    bytes of a file, folder or hub id  ->  SHA-256  ->  tensors  ->  our names  ->  architecture  ->  SamHQ

A file is read into memory, hashed and parsed from there, so that the hash is of the very bytes in use. The
price is about twice the file's size while it loads. A `.pth` goes through torch's restricted unpickler only:
no file is unpickled beyond tensors, whatever the environment asks for.

Strict on tensors. The original loader only prints what is missing or left over, so that a file of plain SAM
gives HQ-SAM with random HQ weights; here each such tensor is an error by name. The tensors decide the
architecture. A `config.json` next to them is checked against them; its unknown keys are a warning, so that
the files of the next release of transformers can be read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch.overrides import TorchFunctionMode

from hqlabel.model.hq_sam2.hiera_config import hiera_from_shapes, unknown_keys
from hqlabel.model.hq_sam2.hq_sam2 import HQSam2, family_of
from hqlabel.model.records import WeightsInfo
from hqlabel.model.sam_config import (
    ConfigError,
    SamHQConfig,
    TinyVisionConfig,
    VisionConfig,
    check_config_json,
    config_to_json,
    json_part,
    stated_side,
)
from hqlabel.model.sam_hq import SamHQ
from hqlabel.model.weight_names import (
    PARTS,
    CheckpointError,
    Layout,
    Tensors,
    config_from_shapes,
    deciding_shapes,
    listed,
    original_names,
    rename,
    tensors_are,
)

__all__ = ["DEMO_FOLDER", "CheckpointError", "LoadedModel", "load", "save_original", "save_transformers"]

DEMO_FOLDER = Path(__file__).parent / "weights" / "hqlabel-demo"
"""The small model that comes with the package, in the transformers layout."""

Source = str | Path | bytes | BinaryIO | Mapping[str, bytes | BinaryIO]
Read = Callable[[str], bytes | None]
"""Returns the bytes of a file of a folder by name, None when the folder has no such file."""

SINGLE, CONFIG = "model.safetensors", "config.json"
IN_FOLDER = (SINGLE, f"{SINGLE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The names under which transformers keeps the weights of a folder, in order of preference."""
ALONE = ("",)
"""In place of names, for a file by itself, without a `config.json`."""
ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
OF_SAM = ("iou_prediction_head.", "hf_token.", "hq_token.")
"""Parts of the names of every model of this family in every layout, also of a decoder or its HQ layers."""
DEEPEST_WRAPPER = 4
OF_TENSORS = re.compile(
    r"torch\.(?:\w+Storage|Size|device|_utils\.\w+|storage\.\w+|_tensor\.\w+)|collections\.OrderedDict"
)
"""What a pickle of tensors is made of."""
NOT_WEIGHTS = {
    rb"\Z": "it is empty: fetch it again",
    rb"version https://git-lfs": "it is a Git LFS pointer, fetch the file itself with `git lfs pull`",
    rb"\x1f\x8b": "it is a packed file: unpack it with `gunzip`",
    rb"\xfd7zXZ\x00": "it is a packed file: unpack it with `unxz`",
    rb"BZh": "it is a packed file: unpack it with `bunzip2`",
    rb"\x28\xb5\x2f\xfd": "it is a packed file: unpack it with `unzstd`",
    rb"7z\xbc\xaf": "it is a packed file: unpack it with `7z x`",
    rb"Rar!": "it is a packed file: unpack it with `unrar x`",
    rb".{257}ustar": "it is a tar archive: unpack it, and name the file in it",
    rb"(?:\xef\xbb\xbf)?\s{0,60}<": "it is a web page saved under this name: the address led to no file, "
    "fetch it again",
    rb"[ -~\t\r\n]{1,9999}\Z": "it is a text, perhaps what a server answered instead of the file: read it, "
    "fetch it again",  # weights are longer
}
"""How files begin that are often found in place of weights (patterns), and what to do about each."""
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+))?")
APACHE_2 = re.compile(r"lkeab/hq-sam|syscv-community/sam-hq-vit-(?:base|large|huge)")
"""The hub's repositories of the published weights, which are under Apache-2.0."""
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """What was read: tensors under the file's own names, and where they came from.

    `sha256`: hex, of the file's bytes, or of all shards' one after another in name order. `config`: the
    parsed `config.json` next to them, if any. `license`: as the file or the publisher states it.
    """

    tensors: Tensors
    sha256: str
    source: str
    config: Mapping[str, Any] | None = None
    license: str | None = None


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

    `source`: a path of a PyTorch or safetensors file of any layout, of an index of shards, or of a folder
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
    layout, tensors, ignored = original_names(files.tensors)
    values = files.config or {}
    config = read_config(tensors, values, layout)
    unknown = unknown_keys(values) if layout == "hq_sam2" else check_config_json(values, config)
    info = WeightsInfo(
        sha256=files.sha256,
        layout=layout,
        architecture=config.vision.name,
        license=files.license,
        source=files.source,
        ignored_keys=tuple(sorted(ignored)),
        warnings=(f"config.json: {listed(unknown)}: not known here, not followed",) if unknown else (),
    )
    return LoadedModel(model=build(config, tensors, layout).cast(dtype).to(device), weights=info)


# What the tensors are


def read_config(tensors: Tensors, values: Mapping[str, Any], layout: Layout) -> SamHQConfig:
    """Return the architecture of the tensors; `config.json` adds what does not follow from them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        if layout == "hq_sam2":
            return hiera_from_shapes(shapes, values)
        config = config_from_shapes(shapes, image_size=stated_side(values))
    except ConfigError as error:
        message = f"{error} ({deciding_shapes(shapes)})"
        raise CheckpointError(in_file_names(message, layout)) from error
    vision, grid = config.vision, config.vision.grid
    # Every block may be global, as in a ViT-B at 224 pixels, whose grid of 14 is as wide as its windows.
    if (
        isinstance(vision, VisionConfig)
        and len(vision.global_attn_indexes) == vision.num_hidden_layers > 1
        and json_part(values, "vision_config").get("global_attn_indexes") is None
    ):
        raise CheckpointError(
            f"the table of every block covers the whole grid of {grid}x{grid} tokens, so that blocks with "
            f"windows of {grid} cannot be told from global ones, the first of which gives the early feature; "
            "put a config.json with vision_config.global_attn_indexes next to the weights, in a folder"
        )
    return config


def build(config: SamHQConfig, tensors: Tensors, layout: Layout) -> SamHQ:
    """Return the model with exactly these tensors, as fp32, for evaluation; errors use the file's names."""
    with torch.device("meta"), _Uninitialised():
        model = family_of(config)(config)
    expected = model.state_dict()
    # BatchNorm's counter of training steps: some files leave it out, and inference does not read it.
    counters = {name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked")}
    tensors = counters | tensors
    for what, names in ("missing", set(expected) - set(tensors)), ("left over", set(tensors) - set(expected)):
        if names:
            in_file = sorted(in_file_names(name, layout) for name in names)
            raise CheckpointError(f"{tensors_are(len(names))} {what}: {listed(in_file)}")
    shapes = {name: tuple(tensors[name].shape) for name in expected}
    wrong = [
        f"tensor {name} has shape {shapes[name]}; wanted {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if shapes[name] != tuple(tensor.shape)
    ]
    if wrong:
        # Of several, the wrong one may be one of those that the expected shapes follow from: list these too.
        reason = f" (the model was {deciding_shapes(shapes)})" if len(wrong) > 1 else ""
        raise CheckpointError(in_file_names(listed(wrong) + reason, layout))
    checked = {
        name: checked_tensor(in_file_names(name, layout), tensors[name], expected[name]) for name in expected
    }
    model.load_state_dict(checked, strict=True, assign=True)
    return model.eval()


class _Uninitialised(TorchFunctionMode):
    """Modules made meanwhile keep their parameters as they are: on `meta` there is nothing to fill.

    Filling them there imports the compiler, a second in every model process.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def in_file_names(message: str, layout: Layout) -> str:
    """Return a message, or a name, with the model's names of tensors as a file of this layout has them."""
    names = re.compile(r"\b(?:image_encoder|prompt_encoder|mask_decoder)[\w.]*\w")
    return names.sub(lambda name: rename(name[0], "original", layout) or name[0], message)


def checked_tensor(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
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
        tensor = tensor.clone()  # a view would keep all of a larger tensor alive
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"tensor {name} holds values that are not finite")
    return tensor


# Files


def read_weights(source: Source, *, revision: str | None = None) -> WeightFiles:
    """Return the tensors in `source`; see `load` for what it may be.

    Raises:
        CheckpointError: nothing there, or not a weights file.
    """
    if isinstance(source, Mapping):
        candidates = [name for name in sorted(source) if name.endswith(ENDINGS)]
        return read_files(
            lambda name: as_bytes(source[name]) if name in source else None, "given files", near=candidates
        )
    if not isinstance(source, (str, Path)):
        return read_files({"": as_bytes(source)}.get, str(getattr(source, "name", "given bytes")), ALONE)
    path = Path(source)
    if not path.exists():
        if hub_id := HUB_ID.fullmatch(str(source)):
            return read_hub(hub_id["repo"], hub_id["file"], revision)
        raise CheckpointError(
            f"{source}: no such file or folder, nor a hub id (org/name or org/name/file.pth)"
        )
    if path.is_dir():
        candidates = [] if any((path / name).is_file() for name in IN_FOLDER) else weights_near(path)
        return read_files(folder_reader(path), str(path), near=candidates)
    if path.name == CONFIG:
        raise CheckpointError(f"{source}: describes a model and holds no weights; name the folder it is in")
    if not path.is_file():
        raise CheckpointError(f"{source}: a pipe or device; wanted a file, which every worker can open again")
    if path.name in IN_FOLDER:
        return read_files(folder_reader(path.parent), str(path), (path.name,))
    return read_files({"": path.read_bytes()}.get, str(path), ALONE)


def as_bytes(file: bytes | BinaryIO) -> bytes:
    """Return the bytes, or the rest of an open binary file."""
    data = file if isinstance(file, (bytes, bytearray, memoryview)) else file.read()
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise CheckpointError(f"{file!r} gives {type(data).__name__}; open it in binary mode")
    return bytes(data)


def folder_reader(folder: Path) -> Read:
    """Return a function that reads files of a local folder."""
    return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None


def weights_near(folder: Path) -> list[str]:
    """Return what may be meant in a folder without weights of a known name: files, and folders with some.

    Such as `checkpoint-500` of a trainer, or `snapshots/<commit>` in the hub's cache.
    """
    files = [x for x in sorted(folder.iterdir()) if x.name.endswith(ENDINGS) and x.is_file()]
    below = [x.parent for deep in ("*", "*/*") for y in IN_FOLDER for x in sorted(folder.glob(f"{deep}/{y}"))]
    return [str(x.relative_to(folder)) for x in files + below]


def read_files(
    read: Read,
    source: str,
    names: Sequence[str] = IN_FOLDER,
    *,
    near: Sequence[str] = (),
    license: str | None = None,
) -> WeightFiles:
    """Return the tensors of a file, or of a folder as transformers writes it: one file or an index of shards.

    `names`: of files that may hold the weights; the first that exists counts. `ALONE`: `source` is a file.
    `near`: the folder's files that may be weights under other names, for the message.
    """
    name, data = next(((name, data) for name in names if (data := read(name)) is not None), ("", None))
    if data is None:
        hint = f"; it holds {', '.join(near[:8])}: name one of them" if near else ""
        missing = " is not there" if names == ALONE else f": neither {' nor '.join(names)} is there{hint}"
        raise CheckpointError(f"{source}{missing}")
    config = read(CONFIG)
    index = parse_index(data, source, name) if name.endswith(".json") else {}
    tensors, digest = Tensors(), hashlib.sha256()
    for shard in sorted(set(index.values())) or [name]:
        part = read(shard) if index else data
        if part is None:
            raise CheckpointError(f"{source}: {name} names {shard}, which is not there")
        digest.update(part)
        held = parse_tensors(part, name=f"{source}: {shard}" if shard else source)
        license = license or stated_license(part)
        if index and (differing := held.keys() ^ {key for key, file in index.items() if file == shard}):
            raise CheckpointError(
                f"{source}: {shard} and {name} disagree on {', '.join(sorted(differing)[:8])}"
            )
        tensors |= held
    values = None if config is None else parse_json(config, name=f"{source}: {CONFIG}")
    return WeightFiles(
        tensors=tensors, sha256=digest.hexdigest(), source=source, config=values, license=license
    )


def parse_index(data: bytes, source: str, name: str) -> dict[str, str]:
    """Return the shard of each tensor in an index of transformers."""
    index = parse_json(data, name=f"{source}: {name}").get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{source}: {name} has no weight_map")
    for shard in index.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*", shard):
            raise CheckpointError(f"{source}: {name} names a shard {shard!r}; wanted a plain file name")
    return index


def parse_json(data: bytes, *, name: str) -> dict[str, Any]:
    """Return a JSON object, or raise `CheckpointError` naming the file."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not JSON ({error}){what_instead(data)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{name}: holds a {type(values).__name__}; wanted a JSON object")
    return values


def stated_license(data: bytes) -> str | None:
    """Return the licence in a safetensors file's metadata (`save_transformers` writes it there), if any."""
    if data[8:9] != b"{":
        return None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    license = (header.get("__metadata__") or {}).get("license")  # null is allowed, and is none
    return license if isinstance(license, str) else None


def read_hub(repo: str, file: str | None, revision: str | None) -> WeightFiles:
    """Return the tensors of a Hugging Face hub repository, or of one file in it; from its cache if there."""
    commit, unreached, absent = "", "", ""
    source = f"{repo}/{file}" if file else repo

    def read(name: str) -> bytes | None:
        nonlocal commit, unreached, absent
        if file and name:
            return None  # one file has no config.json
        name = file or name
        try:
            # One commit for all files, also while somebody pushes to the branch. A hub that once did not
            # answer is not asked again, 20 s for each name: then the cache alone.
            path = huggingface_hub.hf_hub_download(
                repo, name, revision=commit or revision, local_files_only=bool(unreached)
            )
        except LocalEntryNotFoundError:
            unreached = f"; the hub was not asked for {name}: it does not answer"
            return None
        except EntryNotFoundError as error:
            absent = absent or f"; {str(error).splitlines()[0]}"
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{repo}: {name} could not be fetched from the hub: {error}") from error
        # `.../snapshots/<commit>/<name>`; the hub's cache itself may lie in a folder of that name.
        commit = path.rpartition("/snapshots/")[2].partition("/")[0]
        return Path(path).read_bytes()

    try:
        files = read_files(
            read,
            source,
            ALONE if file else IN_FOLDER,
            license="Apache-2.0" if APACHE_2.fullmatch(repo) else None,
        )
    except CheckpointError as error:
        if unreached and not commit:
            raise CheckpointError(
                f"{repo}: the hub does not answer, and {file or 'a file of the model'} is not in "
                f"the cache of this machine: connect it, or fetch the weights elsewhere (hf download {repo} "
                f"--local-dir FOLDER) and name {f'FOLDER/{file}' if file else 'FOLDER'}"
            ) from error
        hint = "" if file else "; name a file of it, as in lkeab/hq-sam/sam_hq_vit_b.pth"
        raise CheckpointError(f"{error}{hint}{unreached}{absent}") from error
    return replace(files, source=f"{source}@{commit}")


def parse_tensors(data: bytes, *, name: str) -> Tensors:
    """Return the tensors of a PyTorch or safetensors file, distinguished by its first bytes.

    `weights_only` is written out: only then does torch not let TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, if someone
    has set it, turn the load into an execution of whatever the file holds.
    """
    safe = data[8:9] == b"{" and len(data) > 9
    if not safe and not data.startswith((b"PK", b"\x80")):
        raise CheckpointError(
            f"{name}: neither a .pth nor a safetensors file ({len(data)} bytes, starting "
            f"{data[:16]!r}){what_instead(data)}"
        )
    try:
        if safe:
            return safetensors.torch.load(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks for a report of what the refusals below explain
            values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"damaged safetensors file ({error}): fetch it again" if safe else why_unread(data, error)
        raise CheckpointError(f"{name}: {reason}") from error
    return find_model(values, name=name)


def what_instead(data: bytes) -> str:
    """Return what a file without weights is and what to do, as far as its first bytes show."""
    return next((f"; {text}" for start, text in NOT_WEIGHTS.items() if re.match(start, data, re.DOTALL)), "")


def find_model(values: object, *, name: str) -> Tensors:
    """Return the tensors of the one model in an unpickled file, from whatever dicts they are wrapped in."""
    dicts = list(tensor_dicts(values))
    if not dicts:
        held = f" of {', '.join(map(repr, list(values)[:8]))}" if isinstance(values, dict) and values else ""
        raise CheckpointError(
            f"{name}: holds a {type(values).__name__}{held} without tensors by name; wanted a state dict"
        )
    models = [
        (path, tensors) for path, tensors in dicts if any(part in key for key in tensors for part in OF_SAM)
    ]
    if not models:
        return max((tensors for _, tensors in dicts), key=len)
    (path, tensors), *others = models
    other = next((path for path, other in others if not same_tensors(tensors, other)), None)
    if other is not None:
        raise CheckpointError(
            f"{name}: holds two models, {path or 'at the top'} and {other}, which give other masks; save the "
            f"one you want alone: torch.save(torch.load(FILE, weights_only=True){other}, 'weights.pth')"
        )
    return tensors


def tensor_dicts(values: object) -> Iterator[tuple[str, Tensors]]:
    """Yield every dict, at any depth of wrapping, that holds tensors by name, and the subscripts to it."""
    seen, waiting = set(), [("", values, 0)]
    for path, value, depth in waiting:
        if not isinstance(value, dict) or id(value) in seen:  # a pickle may hold a dict in itself
            continue
        seen.add(id(value))
        inner = {key: one for key, one in value.items() if isinstance(one, dict)}
        parts = {f"{key}.": inner.pop(key) for key in PARTS if key in inner}  # each part saved on its own
        tensors = {
            prefix + key: tensor
            for prefix, held in {"": value, **parts}.items()
            for key, tensor in held.items()
            if isinstance(key, str) and isinstance(tensor, torch.Tensor)
        }
        if tensors:
            yield path, tensors
        if depth < DEEPEST_WRAPPER:
            waiting += [(f"{path}[{key!r}]", one, depth + 1) for key, one in inner.items()]


def same_tensors(one: Tensors, other: Tensors) -> bool:
    """Return whether two dicts hold equal tensors under equal names: never of tensors without data."""
    try:
        return one.keys() == other.keys() and all(
            tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
            for name, tensor in one.items()
        )
    except RuntimeError:
        return False


def why_unread(data: bytes, error: Exception) -> str:
    """Return why torch did not read a file. Of its message, which advises to lift the restriction, only the
    name of a class or function is used.
    """
    alone = (
        "in the program that made it, save the weights alone: torch.save(model.state_dict(), 'sam_hq.pth')"
    )
    if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"not a file of plain tensors: {foreign[1]} is in it, and what could run code is not read; "
            f"{alone}"
        )
    if "TorchScript" in str(error):
        return f"a TorchScript archive, which holds code; {alone}"
    pickled = data
    with contextlib.suppress(Exception):  # of a torn or hostile archive zipfile raises errors of many kinds
        archive = zipfile.ZipFile(io.BytesIO(data))
        names = archive.namelist()
        inner = [name for name in names if name.endswith(ENDINGS)]
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if not pickles:
            what = f"a zip archive of {', '.join(inner or names[:8]) or 'nothing'}"
            return f"{what}: unpack it, and name the file in it" if inner else f"{what}; {alone}"
        pickled = archive.read(pickles[0])
    if pickled[:2] in (b"\x80\x04", b"\x80\x05"):
        # Of a class: two short memoized strings, module and name, then the opcode that joins them.
        pairs = re.findall(rb"\x8c.([\w.]+)\x94\x8c.([\w.]+)\x94\x93", pickled, flags=re.DOTALL)
        classes = [f"{module.decode()}.{name.decode()}" for module, name in pairs]
        held = next((f" with {name} in it" for name in classes if not OF_TENSORS.fullmatch(name)), "")
        return f"a pickle of protocol {pickled[1]}{held}, which is not read (torch.save writes 2); {alone}"
    return f"damaged, or more than plain tensors; fetch it again, or {alone}"


# Writing


def save_transformers(
    model: SamHQ, folder: str | Path, *, half: bool = False, license: str | None = None
) -> WeightsInfo:
    """Write `config.json` and `model.safetensors`, as transformers reads them, and return what was written.

    `half`: store fp16, rounded, but for the positional matrix, whose rounding would move boxes. Without
    it the round trip through `load` is bit-exact. `license`: an SPDX name, kept in the file.

    Raises:
        CheckpointError: weights that are not fp32 (cast down before), or too large for fp16; a TinyViT or an
            HQ-SAM 2.
    """
    if not isinstance(model.config.vision, VisionConfig):
        what = "TinyViT" if isinstance(model.config.vision, TinyVisionConfig) else "HQ-SAM 2"
        raise CheckpointError(f"transformers has no {what}; save the model with save_original")
    tensors = stored_tensors(model, "transformers")
    if half:
        tensors = {name: to_half(name, tensor) for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | ({"license": license} if license else {})
    data = safetensors.torch.save(tensors, metadata)
    config = json.dumps(config_to_json(model.config), indent=2, sort_keys=True) + "\n"
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(folder) / SINGLE, data)
    write_atomically(Path(folder) / CONFIG, config.encode())
    return record_of(model, data, "transformers", str(folder), license)


def save_original(model: SamHQ, path: str | Path) -> WeightsInfo:
    """Write a `.pth` as the original loads it, and return what was written.

    The round trip through `load` is bit-exact. TinyViT's classifier, which nothing reads, is not in it, nor
    HQ-SAM 2's video part, without which the original does not take the file.

    Raises:
        CheckpointError: weights that are not fp32 (cast down before).
    """
    buffer = io.BytesIO()
    layout: Layout = "hq_sam2" if isinstance(model, HQSam2) else "original"
    tensors = stored_tensors(model, layout)
    torch.save({"model": tensors} if layout == "hq_sam2" else tensors, buffer)
    write_atomically(Path(path), buffer.getvalue())
    return record_of(model, buffer.getvalue(), layout, str(path), None)


def stored_tensors(model: SamHQ, layout: Layout) -> Tensors:
    """Return the model's tensors under the layout's names, on the host."""
    tensors = {}
    for ours, tensor in model.state_dict().items():
        name = in_file_names(ours, layout)
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise CheckpointError(f"tensor {name} is {tensor.dtype}; save the model before casting it")
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def to_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as fp16, or as it is where rounding would hurt: the positional matrix, statistics."""
    if not tensor.is_floating_point() or "positional_embedding" in name or ".running_" in name:
        return tensor
    largest = tensor.abs().max().item()
    if largest > torch.finfo(torch.float16).max:
        raise CheckpointError(f"tensor {name} holds {largest:g}, too large for fp16; save with half=False")
    return tensor.half()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary name in the same folder, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def record_of(model: SamHQ, data: bytes, layout: Layout, source: str, license: str | None) -> WeightsInfo:
    """Return the record of a file just written."""
    return WeightsInfo(
        sha256=hashlib.sha256(data).hexdigest(),
        layout=layout,
        architecture=model.config.vision.name,
        license=license,
        source=source,
    )
