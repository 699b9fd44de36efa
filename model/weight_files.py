"""The bytes of weights: found, hashed, parsed to tensors. Which tensors they should be is not known here.

A file is read into memory, hashed and parsed from there, so that the hash is of the very bytes in use. The
price is about twice the file's size while it loads. A `.pth` goes through torch's restricted unpickler only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickletools
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

from model.layouts import PARTS

Source = str | Path | bytes | BinaryIO | Mapping[str, bytes | BinaryIO]
Read = Callable[[str], bytes | None]
"""Returns the bytes of a file of a folder by name, None when the folder has no such file."""

SINGLE, CONFIG = "model.safetensors", "config.json"
IN_FOLDER = (SINGLE, f"{SINGLE}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Under these names transformers looks for the weights of a folder, in this order."""
ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
OF_SAM = ("iou_prediction_head.", "hf_token.", "hq_token.")
"""Parts of the names of every model of this family in every layout, also of a decoder or its HQ layers."""
DEEPEST_WRAPPER = 4
OF_TENSORS = re.compile(
    r"torch\.(?:\w+Storage|Size|device|_utils\.\w+|storage\.\w+|_tensor\.\w+)|collections\.OrderedDict"
)
"""What a pickle of tensors is made of."""
PACKED = {
    b"\x1f\x8b": "gunzip",
    b"\xfd7zXZ\x00": "unxz",
    b"BZh": "bunzip2",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"7z\xbc\xaf": "7z x",
    b"Rar!": "unrar x",
}
"""How packed files begin, and what unpacks them."""
SHORTEST = 10_000
"""No weights are as short: fewer bytes of text are an answer, not a file."""
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./-]+))?")
PUBLISHED_LICENSES = {
    "lkeab/hq-sam": "Apache-2.0",
    "syscv-community/sam-hq-vit-base": "Apache-2.0",
    "syscv-community/sam-hq-vit-large": "Apache-2.0",
    "syscv-community/sam-hq-vit-huge": "Apache-2.0",
}


class CheckpointError(ValueError):
    """Weights that cannot be found, read or used. The message names the file or the tensor."""


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """What was read: tensors under the file's own names, and where they came from.

    `sha256`: hex, of the file's bytes, or of all shards' one after another in name order. `config`: the
    parsed `config.json` beside them, if any. `license`: as the file or the publisher states it.
    """

    tensors: dict[str, torch.Tensor]
    sha256: str
    source: str
    config: Mapping[str, Any] | None = None
    license: str | None = None


def read_weights(source: Source, *, revision: str | None = None) -> WeightFiles:
    """Return the tensors in `source`; see `checkpoints.load` for what it may be.

    Raises:
        CheckpointError: nothing there, or not a weights file.
    """
    if isinstance(source, Mapping):
        there = [name for name in sorted(source) if name.endswith(ENDINGS)]
        return read_folder(
            lambda name: as_bytes(source[name]) if name in source else None, "given files", there=there
        )
    if not isinstance(source, (str, Path)):
        return read_single(as_bytes(source), name=str(getattr(source, "name", "given bytes")))
    path = Path(source)
    if path.is_dir():
        there = [] if any((path / name).is_file() for name in IN_FOLDER) else near(path)
        return read_folder(lambda name: read_if_there(path / name), str(path), there=there)
    if path.name in IN_FOLDER and path.exists():
        return read_folder(lambda name: read_if_there(path.parent / name), str(path), names=(path.name,))
    if path.name == CONFIG and path.exists():
        raise CheckpointError(f"{source}: describes a model and holds no weights; name the folder it is in")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{source}: a pipe or device; wanted a file, which every worker can open again")
    if path.exists():
        return read_single(path.read_bytes(), name=str(path))
    hub_id = HUB_ID.fullmatch(str(source))
    if hub_id is None:
        raise CheckpointError(
            f"{source}: no such file or folder, nor a hub id (org/name or org/name/file.pth)"
        )
    return read_hub(hub_id["repo"], hub_id["file"], revision)


def near(folder: Path) -> list[str]:
    """Return what may be meant in a folder without weights of a known name: files, and folders with some.

    Such as `checkpoint-500` of a trainer, or `snapshots/<commit>` in the hub's cache.
    """
    files = [x for x in sorted(folder.iterdir()) if x.name.endswith(ENDINGS) and x.is_file()]
    deeper = (
        x for depth in ("*", "*/*") for name in IN_FOLDER for x in sorted(folder.glob(f"{depth}/{name}"))
    )
    return [str(x.relative_to(folder)) for x in files] + [str(x.parent.relative_to(folder)) for x in deeper]


def read_single(data: bytes, *, name: str, license: str | None = None) -> WeightFiles:
    """Return the tensors of one file."""
    sha256 = hashlib.sha256(data).hexdigest()
    tensors = parse_tensors(data, name=name)
    return WeightFiles(tensors=tensors, sha256=sha256, source=name, license=license or stated_license(data))


def read_folder(
    read: Read,
    source: str,
    *,
    names: Sequence[str] = IN_FOLDER,
    there: Sequence[str] = (),
    license: str | None = None,
) -> WeightFiles:
    """Return the tensors of a folder as transformers writes it: one file, or an index of shards.

    `names`: where to look for the weights; the first that is there counts. `there`: the folder's files that
    may be weights under a name of their own, for the message.
    """
    found = next(((name, data) for name in names if (data := read(name)) is not None), None)
    if found is None:
        hint = f"; it holds {', '.join(there[:8])}: name one of them" if there else ""
        raise CheckpointError(f"{source}: neither {' nor '.join(names)} is there{hint}")
    name, data = found
    config = read(CONFIG)
    if name.endswith(".json"):
        files = read_shards(read, data, source, name, license)
    else:
        files = read_single(data, name=f"{source}: {name}", license=license)
    parsed = None if config is None else parse_json(config, name=f"{source}: {CONFIG}")
    return replace(files, source=source, config=parsed)


def read_shards(read: Read, index: bytes, source: str, name: str, license: str | None) -> WeightFiles:
    """Return the tensors of all shards, after checking that each holds just what the index `name` says."""
    weight_map = parse_json(index, name=f"{source}: {name}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{source}: {name} has no weight_map")
    odd = [x for x in weight_map.values() if not isinstance(x, str) or not re.fullmatch(r"[\w-][\w.-]*", x)]
    if odd:
        raise CheckpointError(f"{source}: {name} names a shard {odd[0]!r}; wanted a plain file name")
    tensors: dict[str, torch.Tensor] = {}
    digest = hashlib.sha256()
    for shard in sorted(set(weight_map.values())):
        data = read(shard)
        if data is None:
            raise CheckpointError(f"{source}: {name} names {shard}, which is not there")
        digest.update(data)
        found = parse_tensors(data, name=f"{source}: {shard}")
        license = license or stated_license(data)
        wanted = {tensor for tensor, place in weight_map.items() if place == shard}
        if set(found) != wanted:
            raise CheckpointError(
                f"{source}: {shard} and {name} disagree on {', '.join(sorted(set(found) ^ wanted)[:8])}"
            )
        tensors.update(found)
    return WeightFiles(tensors=tensors, sha256=digest.hexdigest(), source=source, license=license)


def read_hub(repo: str, file: str | None, revision: str | None) -> WeightFiles:
    """Return the tensors of a Hugging Face hub repository, or of one file in it; from its cache if there."""
    commits: list[str] = []
    reasons: list[str] = []
    unreached: list[str] = []

    def read(name: str) -> bytes | None:
        try:
            # One commit for all files, also while somebody pushes to the branch.
            wanted = commits[0] if commits else revision
            # A hub that once did not answer is not waited for again, 20 s for each name: the cache is left.
            path = Path(
                huggingface_hub.hf_hub_download(repo, name, revision=wanted, local_files_only=bool(unreached))
            )
        except LocalEntryNotFoundError:
            unreached.append(f"the hub was not asked for {name}: it does not answer")
            return None
        except EntryNotFoundError as error:
            reasons.append(str(error).splitlines()[0])
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{repo}: {name} could not be fetched from the hub: {error}") from error
        commits.append(commit_of(path))
        return path.read_bytes()

    license = PUBLISHED_LICENSES.get(repo)
    try:
        if file is None:
            files = read_folder(read, repo, license=license)
        else:
            data = read(file)
            if data is None:
                raise CheckpointError(f"{repo}: {file} is not there")
            files = read_single(data, name=f"{repo}/{file}", license=license)
    except CheckpointError as error:
        if unreached and not commits:
            raise CheckpointError(
                f"{repo}: the hub does not answer, and {file or 'a file of the model'} is not in "
                f"the cache of this machine: connect it, or fetch the weights elsewhere (hf download {repo} "
                f"--local-dir FOLDER) and name {f'FOLDER/{file}' if file else 'FOLDER'}"
            ) from error
        hint = "; name a file of it, as in lkeab/hq-sam/sam_hq_vit_b.pth" if file is None else ""
        raise CheckpointError("; ".join([str(error) + hint, *unreached[-1:], *reasons[:1]])) from error
    return replace(files, source=f"{files.source}@{commits[0]}")


def commit_of(path: Path) -> str:
    """Return the commit of a file in the hub's cache, `.../snapshots/<commit>/<name>`."""
    # The last such folder: the cache itself may lie in one of that name.
    last = len(path.parts) - 1 - path.parts[::-1].index("snapshots")
    return path.parts[last + 1]


def parse_tensors(data: bytes, *, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a PyTorch or safetensors file, told apart by its first bytes."""
    if data[8:9] == b"{" and len(data) > 9:
        return parse_safetensors(data, name=name)
    if data[:2] == b"PK" or data[:1] == b"\x80":
        return parse_pth(data, name=name)
    raise CheckpointError(
        f"{name}: neither a .pth nor a safetensors file ({len(data)} bytes, starting "
        f"{data[:16]!r}){what_else(data)}"
    )


def what_else(data: bytes) -> str:
    """Return what a file is that is no weights, and what to do, where its first bytes tell; else nothing."""
    if not data:
        return "; it is empty: fetch it again"
    if data.startswith(b"version https://git-lfs"):
        return "; it is a Git LFS pointer, fetch the file itself with `git lfs pull`"
    packed = next((tool for start, tool in PACKED.items() if data.startswith(start)), None)
    if packed:
        return f"; it is a packed file: unpack it with `{packed}`"
    if data[257:262] == b"ustar":
        return "; it is a tar archive: unpack it, and name the file in it"
    if data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return "; it is a web page saved under this name: the address led to no file, fetch it again"
    if len(data) < SHORTEST and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in data):
        return (
            "; it is a text, perhaps what a server answered instead of the file: look at it, fetch it again"
        )
    return ""


def parse_safetensors(data: bytes, *, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file."""
    try:
        return safetensors.torch.load(data)
    except Exception as error:
        raise CheckpointError(f"{name}: damaged safetensors file ({error}): fetch it again") from error


def parse_pth(data: bytes, *, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a PyTorch file, from whatever dicts they are wrapped in.

    `weights_only` is written out: only then does torch not let TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, if someone
    has set it, turn the load into an execution of whatever the file holds.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks for a report of what is told below in our words
            values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{name}: {why_unread(data, str(error))}") from error
    found = list(tensor_dicts(values))
    if not found:
        held = f" of {', '.join(map(repr, list(values)[:8]))}" if isinstance(values, dict) and values else ""
        raise CheckpointError(
            f"{name}: holds a {type(values).__name__}{held} without tensors by name; wanted a state dict"
        )
    models = [
        (path, tensors) for path, tensors in found if any(part in key for key in tensors for part in OF_SAM)
    ]
    if not models:
        return max((tensors for _, tensors in found), key=len)
    (path, tensors), *others = models
    other = next((path for path, other in others if not same_tensors(tensors, other)), None)
    if other is not None:
        raise CheckpointError(
            f"{name}: holds two models, {path or 'at the top'} and {other}, which give other masks; save the "
            f"one you want alone: torch.save(torch.load(FILE, weights_only=True){other}, 'weights.pth')"
        )
    return tensors


def tensor_dicts(values: object) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield every dict, at any depth of wrapping, that holds tensors by name, and the subscripts to it."""
    seen, waiting = set(), [("", values, 0)]
    for path, value, depth in waiting:
        if not isinstance(value, dict) or id(value) in seen:  # a pickle may hold a dict in itself
            continue
        seen.add(id(value))
        parts = {key: value[key] for key in PARTS if isinstance(value.get(key), dict)}
        tensors = tensors_of(value)
        for part, held in parts.items():  # each part saved on its own
            tensors |= {f"{part}.{key}": tensor for key, tensor in tensors_of(held).items()}
        if tensors:
            yield path, tensors
        if depth < DEEPEST_WRAPPER:
            inner = [(key, one) for key, one in value.items() if isinstance(one, dict) and key not in parts]
            waiting += [(f"{path}[{key!r}]", one, depth + 1) for key, one in inner]


def tensors_of(values: Mapping[object, object]) -> dict[str, torch.Tensor]:
    """Return the tensors by name that stand in a dict itself."""
    return {k: v for k, v in values.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


def same_tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Return whether two dicts hold equal tensors under equal names."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and tensor.layout == other[name].layout == torch.strided
        and not (tensor.is_meta or other[name].is_meta)
        and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def why_unread(data: bytes, said: str) -> str:
    """Return why torch did not read a file. Of its own words, which advise to lift the restriction, only
    the name of a class or function is taken.
    """
    alone = (
        "in the program that made it, save the weights alone: torch.save(model.state_dict(), 'sam_hq.pth')"
    )
    foreign = re.search(r"GLOBAL ([\w.]+)", said)
    if foreign:
        return (
            f"not a file of plain tensors: {foreign[1]} is in it, and what could run code is not read; "
            f"{alone}"
        )
    if "TorchScript" in said:
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
        name = foreign_class(pickled)
        held = f" with {name} in it" if name else ""
        return f"a pickle of protocol {pickled[1]}{held}, which is not read (torch.save writes 2); {alone}"
    return f"damaged, or more than plain tensors; fetch it again, or {alone}"


def foreign_class(pickled: bytes) -> str | None:
    """Return the first class or function in a pickle of protocol 4 or 5 that belongs to no tensor."""
    strings: list[str] = []
    memo: list[str] = []
    with contextlib.suppress(Exception):  # of a torn or hostile pickle; nothing of it is run
        for op, value, _ in pickletools.genops(pickled):
            name = None
            if "UNICODE" in op.name:
                strings.append(str(value))
            elif op.name == "MEMOIZE":  # of whatever came last; only names are looked up again
                memo.append(strings[-1] if strings else "")
            elif op.name in ("BINGET", "LONG_BINGET"):
                strings.append(memo[int(value or 0)])
            elif op.name == "STACK_GLOBAL":
                name = ".".join(strings[-2:])
            elif op.name == "GLOBAL":
                name = str(value).replace(" ", ".")
            if name and not OF_TENSORS.fullmatch(name):
                return name
    return None


def parse_json(data: bytes, *, name: str) -> dict[str, Any]:
    """Return a JSON object, or raise `CheckpointError` naming the file."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not JSON ({error}){what_else(data)}") from error
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


def as_bytes(file: bytes | BinaryIO) -> bytes:
    """Return the bytes, or what is left to read of an open binary file."""
    data = file if isinstance(file, (bytes, bytearray, memoryview)) else file.read()
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise CheckpointError(f"{file!r} gives {type(data).__name__}; open it in binary mode")
    return bytes(data)


def read_if_there(path: Path) -> bytes | None:
    """Return the file's bytes, None when there is none."""
    return path.read_bytes() if path.is_file() else None


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
