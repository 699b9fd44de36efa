"""From the configuration, which people write, to the records that the pipeline is given.

Local places become absolute here, because a worker has another working folder; uris stay as written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from jobs.config import Config
from pipeline.errors import UsageError
from pipeline.settings import (
    DEMO,
    AccessRules,
    BoxFormat,
    BoxFrame,
    BoxRules,
    JobDetector,
    Place,
)
from pipeline.stages.detect import HF, ZERO_SHOT
from pipeline.storage.uri_rules import refuse_secrets

BOXES_PER_CALL = {"cpu": 2, "cuda": 16}
"""By the kind of device. On one CPU core a box costs the same in calls of 2 to 16 (56 to 63 ms at full size),
so the fewest boxes of padding win; a GPU wants many at once."""
_REMOTE = re.compile(r"[a-z][a-z0-9+.\-]*://")


def is_local(uri: str) -> bool:
    """True for a plain path or `file://`."""
    return uri.startswith("file://") or not _REMOTE.match(uri)


def absolute(uri: str) -> str:
    """A local path made absolute (links are not followed); any other uri as it is."""
    return os.path.abspath(uri.removeprefix("file://")) if is_local(uri) else uri


def resolved(config: Config) -> Config:
    """The configuration with every local place absolute: what `config.yaml` in the output holds."""
    given, model = config.input, config.model
    places = {name: getattr(given, name) for name in ("images", "boxes", "image_root")}
    inputs: dict[str, Any] = {name: absolute(place) for name, place in places.items() if place}
    inputs["allow_roots"] = [os.path.realpath(root) for root in given.allow_roots]
    checkpoint = model.checkpoint
    may_be_path = checkpoint not in (None, DEMO) and is_local(str(checkpoint))
    if checkpoint and may_be_path and os.path.exists(absolute(checkpoint)):
        checkpoint = absolute(checkpoint)
    uri, detector = config.output.uri, detector_settings(config)
    return config.model_copy(
        update={
            "input": given.model_copy(update=inputs),
            "detector": config.detector.model_copy(update={"name": detector and detector.name}),
            "model": model.model_copy(update={"checkpoint": checkpoint}),
            "output": config.output.model_copy(update={"uri": absolute(uri) if uri else uri}),
            # A cluster is joined when one is named in a command, never because an earlier run did.
            "cluster": config.cluster.model_copy(update={"ray_address": None}),
        }
    )


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


def check_inputs(config: Config) -> AccessRules:
    """Return what image uris may point at, besides the folders that the inputs imply.

    Raises:
        UsageError: inputs that are missing or contradict each other, a folder that does not exist, a secret.
    """
    inputs = config.input
    if config.detector.name and inputs.boxes:
        raise UsageError(
            "--boxes and --detector are both given; the boxes come from one of them: leave one out"
        )
    if config.detector.name and not inputs.images:
        raise UsageError("--images is missing: a detector needs pictures to look at")
    if not inputs.images and not inputs.boxes:
        raise UsageError("--images and --boxes are missing: name images, boxes, or both")
    storage_options(config, "")
    return AccessRules(
        roots=tuple(os.path.realpath(_existing_folder(root)) for root in inputs.allow_roots),
        schemes=tuple(dict.fromkeys((*AccessRules().schemes, *inputs.allow_schemes))),
        options=config.storage,
    )


def box_rules(config: Config, box_format: BoxFormat, box_frame: BoxFrame) -> BoxRules:
    """How the boxes become prompts; format and frame are what planning has understood."""
    return BoxRules(box_format=box_format, box_frame=box_frame, **config.boxes.model_dump())


def detector_settings(config: Config) -> JobDetector | None:
    """The detector as asked for, not yet looked at; None without one.

    Raises:
        UsageError: prompts for a detector that takes none, or none for one that needs them.
    """
    given = config.detector
    if given.name is None:
        return None
    is_zero_shot = given.name.startswith(ZERO_SHOT)
    if is_zero_shot != bool(given.prompts):
        wrong = "--prompts are missing" if is_zero_shot else "it takes no --prompts"
        raise UsageError(
            f"--detector {given.name}: {wrong}; hf-zero-shot: detectors take them, such as 'person; red car'"
        )
    refuse_secrets(given.options, where="detector.options")
    return JobDetector(**(given.model_dump() | {"name": _with_absolute_folder(given.name)}))


def _with_absolute_folder(name: str) -> str:
    """`hf:FOLDER` with the folder absolute, for workers elsewhere; another name as it is."""
    for kind in (HF, ZERO_SHOT):
        if name.startswith(kind) and os.path.isdir(name.removeprefix(kind)):
            return kind + os.path.abspath(name.removeprefix(kind))
    return name


def with_boxes_per_call(config: Config, otherwise: int | None) -> Config:
    """The configuration with `model.boxes_per_call` as it is given, or `otherwise` where it is null."""
    chosen = config.model.boxes_per_call or otherwise
    return config.model_copy(update={"model": config.model.model_copy(update={"boxes_per_call": chosen})})


def _existing_folder(path: str) -> str:
    if not os.path.isdir(path):
        raise UsageError(f"--allow-root {path}: there is no such folder")
    return path
