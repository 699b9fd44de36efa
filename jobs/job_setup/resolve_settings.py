"""What a configuration means on this machine: absolute places, image access, values chosen for `null`.

Local places become absolute here, because a worker has another working folder; uris stay as written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from hqlabel.jobs.load_config import Config
from hqlabel.pipeline.errors import UsageError
from hqlabel.pipeline.job_context import AccessRules, BoxRules, JobDetector, Place
from hqlabel.pipeline.settings import DEMO, BoxFormat, BoxFrame
from hqlabel.pipeline.stages.detect import HF, ZERO_SHOT
from hqlabel.pipeline.storage.uri_rules import refuse_password, refuse_secrets, refuse_storage_secrets

BOXES_PER_CALL = {"cpu": 2, "cuda": 16}
"""By the kind of device. On one CPU core a box costs the same in calls of 2 to 16 (56 to 63 ms at full size),
so the fewest boxes of padding win; a GPU wants many at once."""
_REMOTE = re.compile(r"[a-z][a-z0-9+.\-]*://")


def is_local(uri: str) -> bool:
    """Return True for a plain path or `file://`."""
    return uri.startswith("file://") or not _REMOTE.match(uri)


def absolute(uri: str) -> str:
    """Return a local path made absolute (links are not followed), and any other uri as it is."""
    return os.path.abspath(uri.removeprefix("file://")) if is_local(uri) else uri


def absolute_if_there(checkpoint: str) -> str:
    """Return the path of a checkpoint that exists made absolute, and any other name as it is."""
    if checkpoint == DEMO or not os.path.exists(absolute(checkpoint)):
        return checkpoint
    return absolute(checkpoint)


def resolved(config: Config) -> Config:
    """Return the configuration with every local place absolute: what `config.yaml` in the output holds."""
    inputs: dict[str, Any] = {
        name: absolute(place)
        for name, place in config.input.model_dump(include={"images", "boxes", "image_root"}).items()
        if place
    }
    # A set, as they are compared on a resume.
    inputs["allow_roots"] = sorted({os.path.realpath(root) for root in config.input.allow_roots})
    inputs["allow_schemes"] = sorted(set(config.input.allow_schemes))
    checkpoint, uri, detector = config.model.checkpoint, config.output.uri, config.detector.name
    return _with(
        config,
        input=inputs,
        model={"checkpoint": checkpoint and absolute_if_there(checkpoint)},
        detector={"name": detector and _with_absolute_folder(detector)},
        output={"uri": uri and absolute(uri)},
        # A cluster is joined when one is named in a command, never because an earlier run did.
        cluster={"ray_address": None},
    )


def _with(config: Config, **sections: Mapping[str, Any]) -> Config:
    """Return the configuration with some settings of some sections replaced."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def with_boxes_per_call(config: Config, otherwise: int | None) -> Config:
    """Return the configuration with `model.boxes_per_call`, where it is null, set to `otherwise`."""
    return _with(config, model={"boxes_per_call": config.model.boxes_per_call or otherwise})


def storage_options(config: Config, uri: str) -> Mapping[str, Any]:
    """Return the fsspec options for the scheme of `uri`; raise `UsageError` where a secret is configured."""
    for scheme, options in config.storage.items():
        refuse_storage_secrets(options, where=f"storage.{scheme}")
    refuse_password(config.input.images, where="--images")
    refuse_password(config.input.boxes, where="--boxes")
    refuse_password(config.input.image_root, where="input.image_root")
    refuse_password(config.model.checkpoint, where="--checkpoint")
    refuse_password(config.output.uri, where="--output")
    return config.storage.get("file" if is_local(uri) else uri.partition("://")[0], {})


def output_place(config: Config) -> Place:
    """Return where the job's output is; raise `UsageError` when none is configured."""
    uri = require(config.output.uri, "--output", "a folder or prefix for the labels")
    return Place(uri=absolute(uri), options=storage_options(config, uri))


def require(value: str | None, flag: str, wanted: str) -> str:
    """Return `value`, or raise `UsageError` with the flag that is missing and what it takes."""
    if not value:
        raise UsageError(f"{flag} is missing: {wanted}")
    return value


def check_inputs(config: Config) -> AccessRules:
    """Return what image uris may point at, in addition to the folders that the inputs imply.

    Raises:
        UsageError: inputs that are missing or contradict each other, a folder that does not exist, a secret.
    """
    inputs, detector = config.input, config.detector.name
    if detector and inputs.boxes:
        raise UsageError(
            "--boxes and --detector are both given; the boxes come from one of them: drop the other"
        )
    if detector and not inputs.images:
        raise UsageError("--images is missing: a detector needs pictures")
    if not inputs.images and not inputs.boxes:
        raise UsageError("--images and --boxes are missing: name images, boxes, or both")
    return check_access(config)


def check_access(config: Config) -> AccessRules:
    """Return what image uris may point at by `allow_roots`, `allow_schemes` and `storage` alone.

    Raises:
        UsageError: a folder that does not exist, a secret.
    """
    inputs = config.input
    for root in inputs.allow_roots:
        if not os.path.isdir(root):
            raise UsageError(f"--allow-root {root}: there is no such folder")
    storage_options(config, "")
    return AccessRules(
        roots=tuple(map(os.path.realpath, inputs.allow_roots)),
        schemes=tuple(dict.fromkeys((*AccessRules().schemes, *inputs.allow_schemes))),
        options=config.storage,
    )


def box_rules(config: Config, box_format: BoxFormat, box_frame: BoxFrame) -> BoxRules:
    """Return how boxes become prompts; format and frame are what planning found."""
    return BoxRules(box_format=box_format, box_frame=box_frame, **config.boxes.model_dump())


def detector_settings(config: Config) -> JobDetector | None:
    """Return the configured detector, not loaded yet; None without one.

    Raises:
        UsageError: prompts for a detector that takes none, or none for one that needs them.
    """
    name, prompts, options = config.detector.name, config.detector.prompts, config.detector.options
    if name is None:
        return None
    is_zero_shot = name.startswith(ZERO_SHOT)
    if is_zero_shot != bool(prompts):
        wrong = "--prompts are missing" if is_zero_shot else "it takes no --prompts"
        raise UsageError(
            f"--detector {name}: {wrong}; hf-zero-shot: detectors take them, such as 'person; red car'"
        )
    refuse_secrets(options, where="detector.options")
    return JobDetector(**(config.detector.model_dump() | {"name": _with_absolute_folder(name)}))


def _with_absolute_folder(name: str) -> str:
    """Return `hf:FOLDER` with the folder absolute, for workers elsewhere, and another name as it is."""
    for kind in (HF, ZERO_SHOT):
        if name.startswith(kind) and os.path.isdir(name.removeprefix(kind)):
            return kind + os.path.abspath(name.removeprefix(kind))
    return name
