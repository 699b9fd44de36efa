"""A job's checkpoint and detector, read, checked and tried once on this machine, before any work.

A missing file, another model, a damaged tensor or a detector that raises ends the job with exit code 4 here,
and not as a thousand workers with a traceback each, or a failure of every image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hqlabel.model
from hqlabel.jobs.job_setup.answering_stores import look_in_the_cache_of_a_silent_hub
from hqlabel.jobs.job_setup.resolve_settings import (
    absolute,
    absolute_if_there,
    detector_settings,
    is_local,
    require,
    storage_options,
)
from hqlabel.jobs.load_config import Config
from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import HqlabelError, JobRefused, clean_text, count
from hqlabel.pipeline.job_context import JobDetector, Weights
from hqlabel.pipeline.settings import DEMO
from hqlabel.pipeline.stages.detect import load_detector, try_out

if TYPE_CHECKING:
    from hqlabel.model.checkpoints import LoadedModel

DEMO_NOTE = (
    "made with the demo checkpoint: for trying the pipeline and for its tests, not for labelling your data"
)
DEMO_RECORD = Weights(
    source=DEMO,
    sha256="2908f8c03e7ed7006986ee49fae2cd5818a203833d69f0a9cfbe79ca0c67d314",
    license="Apache-2.0",
    architecture="vit_192x8",
    input_side=512,
    note=DEMO_NOTE,
)
"""What `load` finds in the checkpoint that comes with the package: of known bytes it needs no torch."""
_DEMO_FILE = Path(hqlabel.model.__file__).parent / "weights" / "hqlabel-demo" / "model.safetensors"


def read_checkpoint(config: Config) -> Weights:
    """Return the record by which workers open the configured checkpoint, after reading it whole.

    Raises:
        UsageError: none is configured.
        JobRefused: nothing there, not SAM-HQ, damaged, or not readable.
    """
    name = require(config.model.checkpoint, "--checkpoint", "SAM-HQ weights, or demo for a first try")
    source = absolute_if_there(name)
    if source == DEMO and _is_the_known_demo():
        return DEMO_RECORD
    _refuse_missing_path(name, source)
    options = {} if is_local(source) else storage_options(config, source)
    look_in_the_cache_of_a_silent_hub([name])
    loaded = _load(name, source, options)
    return Weights(
        source=source,
        sha256=loaded.weights.sha256,
        options=options,
        license=clean_text(loaded.weights.license or "") or None,
        architecture=loaded.weights.architecture,
        input_side=loaded.model.config.image_size,
        fit=loaded.model.fit,
        note=DEMO_NOTE if source == DEMO else None,
        warning=clean_text("; ".join(loaded.weights.warnings)) or None,
    )


def _is_the_known_demo() -> bool:
    """Return whether the demo checkpoint is that of `DEMO_RECORD`; a checkout may hold another, or none."""
    try:
        return hashlib.sha256(_DEMO_FILE.read_bytes()).hexdigest() == DEMO_RECORD.sha256
    except OSError:
        return False


def _refuse_missing_path(name: str, source: str) -> None:
    """Raise JobRefused for a name that was meant as a path: the hub takes half a minute and misleads."""
    if name == DEMO or not is_local(name) or os.path.exists(source):
        return
    from hqlabel.model.checkpoints import ENDINGS

    in_a_folder = os.path.isdir(os.path.dirname(absolute(name))) and os.sep in name
    looks_like_a_file = name.count("/") < 2 and name.endswith(ENDINGS)
    if os.path.isabs(name) or in_a_folder or looks_like_a_file:
        raise JobRefused(f"--checkpoint {name}: there is no such file or folder")


def _load(name: str, source: str, options: Mapping[str, Any]) -> LoadedModel:
    from hqlabel.model.checkpoints import CheckpointError, load  # brings torch
    from hqlabel.model.sam_config import ConfigError
    from hqlabel.pipeline.stages.load_model import open_weights

    try:
        return load(open_weights(source, options))
    except (CheckpointError, ConfigError, OSError) as error:
        message = clean_text(str(error)).removeprefix(f"{name}: ")
        raise JobRefused(f"--checkpoint {name}: {message}") from error
    except HqlabelError as error:
        raise JobRefused(f"--checkpoint {name}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class CheckedDetector:
    """A detector that works here. `settings`: with its own fingerprint. `categories`: {"id", "name"}."""

    settings: JobDetector
    categories: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        licence = f"licence {self.settings.license}" if self.settings.license else "licence unknown"
        classes = count(len(self.categories), "category", "categories")
        fingerprint = console.fingerprint(self.settings.fingerprint)
        return f"{self.settings.title}; {classes}; fingerprint {fingerprint}; {licence}"


def read_detector(config: Config) -> CheckedDetector | None:
    """Return the configured detector, tried on a blank picture on this machine's CPU; None without one.

    Raises:
        UsageError: prompts that do not go with it.
        JobRefused: it cannot be loaded, or does not do what a detector does.
    """
    settings = detector_settings(config)
    if settings is None:
        return None
    look_in_the_cache_of_a_silent_hub([settings.name])
    detector = load_detector(settings)
    try_out(detector, settings)
    fingerprint = detector.fingerprint()
    if not isinstance(fingerprint, str) or not fingerprint:
        raise JobRefused(f"detector {settings.name}: its fingerprint is {fingerprint!r}; wanted a text")
    categories = sorted(detector.categories, key=lambda category: category.id)
    facts = {"fingerprint": fingerprint, "title": detector.name, "license": detector.license}
    return CheckedDetector(
        settings=settings.model_copy(update=facts),
        categories=tuple({"id": int(category.id), "name": category.name} for category in categories),
    )
