"""What a printed command needs besides its output: the flags that a job takes from its calls alone.

They are text for the person who types, who decides. Of an output's own statement nothing is obeyed here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable

from hqlabel.jobs.load_config import Config
from hqlabel.jobs.terminal.console import visible
from hqlabel.pipeline.inputs.open_inputs import allowed_access
from hqlabel.pipeline.job_context import AccessRules
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.settings import DEMO, InputSettings


def begun_with(job: Job) -> AccessRules:
    """Return the folders and schemes that the job's images could be read from, by its identity."""
    arguments = job.identity.get("inputs", {}).get("arguments", {})
    places = {name: arguments.get(name) for name in ("images", "boxes", "image_root")}
    inputs = InputSettings.model_validate({n: place for n, place in places.items() if isinstance(place, str)})
    named = AccessRules(
        roots=tuple(_texts(arguments.get("allow_roots"))),
        schemes=(*AccessRules().schemes, *_texts(arguments.get("allow_schemes"))),
    )
    try:
        return allowed_access(inputs, named)
    except ValueError:  # no path: a NUL, half a surrogate pair
        return AccessRules()


def _texts(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def retry_command(output: str, config: Config, job: Job) -> str:
    """Return the command that does the job's failed images again."""
    flags = [*storage_flags(config), *model_flags(config, job), *picture_flags(job)]
    return shlex.join(["hqlabel", "retry", "--output", output, *flags])


def storage_flags(config: Config) -> list[str]:
    """Return the options of the stores as flags."""
    flags = []
    for scheme, options in config.storage.items():
        flags += ["--set", f"storage.{scheme}={json.dumps(options)}"]
    return flags


def model_flags(config: Config, job: Job) -> list[str]:
    """Return the weights, the detector and the cluster as flags."""
    source = job.context.weights.source
    flags = [] if source == DEMO else ["--checkpoint", visible(source)]
    if job.context.detector is not None:
        flags += ["--detector", visible(job.context.detector.name)]
    if config.cluster.ray_address is not None:
        flags += ["--ray-address", config.cluster.ray_address]
    return flags


def picture_flags(job: Job) -> list[str]:
    """Return, as flags, the folders and schemes of this call and those that the job began with."""
    began, now = begun_with(job), job.context.access
    return access_flags([*now.roots, *began.roots], [*now.schemes, *began.schemes])


def access_flags(roots: Iterable[str], schemes: Iterable[str]) -> list[str]:
    """Return the flags that allow these folders and schemes; those that need none are left out."""
    flags = []
    for root in dict.fromkeys(roots):
        flags += ["--allow-root", visible(root)]
    for scheme in dict.fromkeys(schemes):
        if scheme not in AccessRules().schemes:
            flags += ["--allow-scheme", visible(scheme)]
    return flags
