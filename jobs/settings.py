"""From the configuration, which people write, to the records that the pipeline is given.

Local places become absolute here, because a worker has another working folder; uris stay as written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from jobs.config import Config
from model.structures import CallShape
from pipeline.errors import UsageError
from pipeline.records import AccessRules, Limits, MaskSettings, Place
from pipeline.storage import refuse_secrets

_REMOTE = re.compile(r"[a-z][a-z0-9+.\-]*://")
_GLOB = re.compile(r"[*?\[]")


def is_local(uri: str) -> bool:
    """True for a plain path or `file://`."""
    return uri.startswith("file://") or not _REMOTE.match(uri)


def absolute(uri: str) -> str:
    """A local path made absolute (links are not followed); any other uri as it is."""
    return os.path.abspath(uri.removeprefix("file://")) if is_local(uri) else uri


def storage_options(config: Config, uri: str) -> Mapping[str, Any]:
    """The fsspec options of the configuration for the scheme of `uri`; raises `UsageError` on a secret."""
    for scheme, options in config.storage.items():
        refuse_secrets(options, where=f"storage.{scheme}")
    return config.storage.get("file" if is_local(uri) else uri.partition("://")[0], {})


def output_place(config: Config) -> Place:
    """Where the job's output is; raises `UsageError` when none is named."""
    uri = require(config.output.uri, "--output", "a folder or prefix for the labels")
    return Place(uri=absolute(uri), options=storage_options(config, uri))


def require(value: str | None, flag: str, wanted: str) -> str:
    """`value`, or a `UsageError` naming the flag that is missing and what it wants."""
    if not value:
        raise UsageError(f"{flag} is missing: {wanted}")
    return value


def access_rules(config: Config) -> AccessRules:
    """What image uris may point at: below the inputs' own folders and --allow-root, and allowed schemes."""
    storage_options(config, "")
    inputs = [uri for uri in (config.input.images, config.input.boxes) if uri and is_local(uri)]
    folders = [*map(_folder_of, inputs), *map(_existing_folder, config.input.allow_roots)]
    schemes = [*AccessRules().schemes, *config.input.allow_schemes]
    return AccessRules(
        roots=tuple(dict.fromkeys(os.path.realpath(folder) for folder in folders)),
        schemes=tuple(dict.fromkeys(schemes)),
        options=config.storage,
    )


def limits(config: Config) -> Limits:
    """The bounds on one image and on the job."""
    return Limits(**config.limits.model_dump())


def mask_settings(config: Config, dtype: str) -> MaskSettings:
    """What the model is asked for, with the resolved number format (`float32` or `bfloat16`)."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is not resolved; wanted float32 or bfloat16")
    model = config.model
    shape = CallShape(images_per_call=model.images_per_call, boxes_per_call=model.boxes_per_call)
    return MaskSettings(
        dtype="float32" if dtype == "float32" else "bfloat16",
        call_shape=shape,
        multimask=model.multimask,
        hq_token_only=model.hq_token_only,
        stability_offset=model.stability_offset,
    )


def _folder_of(uri: str) -> str:
    """The folder of a local input: itself, the part of a glob before its first sign, or a file's folder."""
    path = absolute(uri)
    sign = _GLOB.search(path)
    if os.path.isdir(path):
        return path
    return os.path.dirname(path[: sign.start()] if sign and not os.path.exists(path) else path)


def _existing_folder(path: str) -> str:
    if not os.path.isdir(path):
        raise UsageError(f"--allow-root {path}: there is no such folder")
    return path
