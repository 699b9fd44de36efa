"""The bytes of weights: found, hashed, parsed to tensors. Which tensors they should be is not known here.

A file is read into memory, hashed and parsed from there, so that the hash is of the very bytes in use. The
price is about twice the file's size while it loads. A `.pth` goes through torch's restricted unpickler only.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError

Source = str | Path | bytes | BinaryIO | Mapping[str, bytes | BinaryIO]
Read = Callable[[str], bytes | None]
"""Returns the bytes of a file of a folder by name, None when the folder has no such file."""

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
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
        return read_folder(lambda name: as_bytes(source[name]) if name in source else None, "given files")
    if not isinstance(source, (str, Path)):
        return read_single(as_bytes(source), name=str(getattr(source, "name", "given bytes")))
    path = Path(source)
    if path.is_dir():
        return read_folder(lambda name: read_if_there(path / name), str(path))
    if path.name in (SINGLE, INDEX) and path.exists():
        return read_folder(lambda name: read_if_there(path.parent / name), str(path), weights=path.name)
    if path.exists():
        return read_single(path.read_bytes(), name=str(path))
    hub_id = HUB_ID.fullmatch(str(source))
    if hub_id is None:
        raise CheckpointError(
            f"{source}: no such file or folder, nor a hub id (org/name or org/name/file.pth)"
        )
    return read_hub(hub_id["repo"], hub_id["file"], revision)


def read_single(data: bytes, *, name: str, license: str | None = None) -> WeightFiles:
    """Return the tensors of one file."""
    sha256 = hashlib.sha256(data).hexdigest()
    tensors = parse_tensors(data, name=name)
    return WeightFiles(tensors=tensors, sha256=sha256, source=name, license=license or stated_license(data))


def read_folder(
    read: Read, source: str, *, weights: str | None = None, license: str | None = None
) -> WeightFiles:
    """Return the tensors of a folder in the transformers layout: one safetensors file, or an index of shards.

    `weights`: which of the two, when both may be there.
    """
    single = read(SINGLE) if weights in (None, SINGLE) else None
    index = read(INDEX) if weights in (None, INDEX) and single is None else None
    if single is None and index is None:
        raise CheckpointError(f"{source}: neither {SINGLE} nor {INDEX} is there")
    data = read(CONFIG)
    config = None if data is None else parse_json(data, name=f"{source}: {CONFIG}")
    if single is not None:
        files = read_single(single, name=f"{source}: {SINGLE}", license=license)
    else:
        files = read_shards(read, parse_json(index or b"", name=f"{source}: {INDEX}"), source, license)
    return WeightFiles(
        tensors=files.tensors, sha256=files.sha256, source=source, config=config, license=files.license
    )


def read_shards(read: Read, index: Mapping[str, Any], source: str, license: str | None) -> WeightFiles:
    """Return the tensors of all shards, after checking that each holds just what the index says."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{source}: {INDEX} has no weight_map")
    tensors: dict[str, torch.Tensor] = {}
    digest = hashlib.sha256()
    for shard in sorted(set(weight_map.values())):
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*", shard):
            raise CheckpointError(f"{source}: {INDEX} names a shard {shard!r}; wanted a plain file name")
        data = read(shard)
        if data is None:
            raise CheckpointError(f"{source}: {INDEX} names {shard}, which is not there")
        digest.update(data)
        found = parse_tensors(data, name=f"{source}: {shard}")
        license = license or stated_license(data)
        wanted = {name for name, place in weight_map.items() if place == shard}
        if set(found) != wanted:
            raise CheckpointError(
                f"{source}: {shard} and {INDEX} disagree on {', '.join(sorted(set(found) ^ wanted)[:8])}"
            )
        tensors.update(found)
    return WeightFiles(tensors=tensors, sha256=digest.hexdigest(), source=source, license=license)


def read_hub(repo: str, file: str | None, revision: str | None) -> WeightFiles:
    """Return the tensors of a Hugging Face hub repository, or of one file in it; from its cache if there."""
    commits: list[str] = []
    reasons: list[str] = []

    def read(name: str) -> bytes | None:
        try:
            # One commit for all files, also while somebody pushes to the branch.
            wanted = commits[0] if commits else revision
            path = Path(huggingface_hub.hf_hub_download(repo, name, revision=wanted))
        except EntryNotFoundError as error:
            # Also raised without network for what is not in the cache; then the reason says so.
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
        hint = "; name a file of it, as in lkeab/hq-sam/sam_hq_vit_b.pth" if file is None else ""
        raise CheckpointError("; ".join([str(error) + hint, *reasons[:1]])) from error
    return WeightFiles(
        tensors=files.tensors,
        sha256=files.sha256,
        source=f"{files.source}@{commits[0]}",
        config=files.config,
        license=files.license,
    )


def commit_of(path: Path) -> str:
    """Return the commit of a file in the hub's cache, `.../snapshots/<commit>/<name>`."""
    # The last such folder: the cache itself may lie in one of that name.
    last = len(path.parts) - 1 - path.parts[::-1].index("snapshots")
    return path.parts[last + 1]


def parse_tensors(data: bytes, *, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a `.pth` or safetensors file, told apart by its first bytes."""
    if data[8:9] == b"{" and len(data) > 9:
        return parse_safetensors(data, name=name)
    if data[:2] == b"PK" or data[:1] == b"\x80":
        return parse_pth(data, name=name)
    hint = ""
    if data.startswith(b"version https://git-lfs"):
        hint = "; it is a Git LFS pointer, fetch the file itself with `git lfs pull`"
    raise CheckpointError(
        f"{name}: neither a .pth nor a safetensors file ({len(data)} bytes, starting {data[:16]!r}){hint}"
    )


def parse_safetensors(data: bytes, *, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file."""
    try:
        return safetensors.torch.load(data)
    except Exception as error:
        raise CheckpointError(f"{name}: damaged safetensors file: {error}") from error


def parse_pth(data: bytes, *, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a PyTorch file, which may wrap them as `model` or `state_dict`.

    `weights_only` is written out: only then does torch not let TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, if someone
    has set it, turn the load into an execution of whatever the file holds.
    """
    try:
        values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{name}: not a file of plain tensors, or damaged: {reason_of(error)}"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(values, dict) and isinstance(values.get(wrapper), dict):
            values = values[wrapper]
    if not isinstance(values, dict) or not values:
        raise CheckpointError(f"{name}: holds a {type(values).__name__}; wanted a dict of tensors by name")
    for key, value in values.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{name}: entry {key!r} is a {type(value).__name__}; wanted a tensor")
    tensors = {key.removeprefix("module."): value for key, value in values.items()}
    if len(tensors) < len(values):
        twice = [key for key in values if f"module.{key}" in values]
        raise CheckpointError(
            f"{name}: holds tensors twice, with and without `module.`: {', '.join(twice[:8])}"
        )
    return tensors


def reason_of(error: Exception) -> str:
    """Return one line of why a `.pth` was not read, without torch's advice to read it unrestrictedly."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = [line for line in lines if "unsupported GLOBAL" in line]
    if "weights_only" in lines[0] and not telling:
        return "it holds more than tensors"
    return (telling or lines)[0]


def parse_json(data: bytes, *, name: str) -> dict[str, Any]:
    """Return a JSON object, or raise `CheckpointError` naming the file."""
    try:
        values = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{name}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{name}: holds a {type(values).__name__}; wanted a JSON object")
    return values


def stated_license(data: bytes) -> str | None:
    """Return the licence in a safetensors file's metadata (`save_transformers` writes it there), if any."""
    if data[8:9] != b"{":
        return None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    license = header.get("__metadata__", {}).get("license")
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
