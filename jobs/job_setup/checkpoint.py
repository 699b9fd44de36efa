"""The job's checkpoint, as the command line names it, to the record that workers open it by.

Read whole and checked strictly here, once, before any work: a missing file, another model or a damaged
tensor ends the job with exit code 4, not a thousand workers with a traceback each.
"""

from __future__ import annotations

import os

from jobs.config import Config
from jobs.job_setup.resolve_settings import absolute, is_local, require, storage_options
from model.checkpoints import CheckpointError, LoadedModel, load
from model.config import ConfigError
from model.weight_files import ENDINGS
from pipeline.errors import HqlabelError, JobRefused, clean_text
from pipeline.settings import DEMO, Weights
from pipeline.stages.load_model import open_weights

DEMO_NOTE = (
    "made with the demo checkpoint: for trying the pipeline and for its tests, not for labelling your data"
)


def read_checkpoint(config: Config) -> Weights:
    """The record of the configured checkpoint, after reading it whole.

    Raises:
        UsageError: none is named.
        JobRefused: nothing there, not SAM-HQ, damaged, or not readable.
    """
    named = require(config.model.checkpoint, "--checkpoint", "SAM-HQ weights, or demo for a first try")
    source = _source(named)
    options = {} if is_local(source) else storage_options(config, source)
    loaded = _load(named, source, dict(options))
    return Weights(
        source=source,
        sha256=loaded.weights.sha256,
        options=options,
        license=clean_text(loaded.weights.license or "") or None,
        architecture=loaded.weights.architecture,
        input_side=loaded.model.config.image_size,
        note=DEMO_NOTE if source == DEMO else None,
        warning=clean_text("; ".join(loaded.weights.warnings)) or None,
    )


def _source(named: str) -> str:
    """What a worker is told: a path that exists is made absolute; a hub id and `demo` stay as they are."""
    if named == DEMO or not is_local(named):
        return named
    path = absolute(named)
    if os.path.exists(path):
        return path
    # Asking the hub for what was meant as a path takes half a minute and ends in a misleading answer.
    meant_as_path = os.path.isabs(named) or (os.path.isdir(os.path.dirname(path)) and os.sep in named)
    if meant_as_path or (named.count("/") < 2 and named.endswith(ENDINGS)):
        raise JobRefused(f"--checkpoint {named}: there is no such file or folder")
    return named


def _load(named: str, source: str, options: dict[str, object]) -> LoadedModel:
    try:
        return load(open_weights(source, options))
    except (CheckpointError, ConfigError, OSError) as error:
        raise JobRefused(f"--checkpoint {named}: {_without_source(clean_text(str(error)), named)}") from error
    except HqlabelError as error:
        raise JobRefused(f"--checkpoint {named}: {error}") from error


def _without_source(message: str, named: str) -> str:
    return message.removeprefix(f"{named}: ")
