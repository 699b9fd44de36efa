"""The job in an output with the configuration saved there: what later commands start from.

A call names only the output and what is to change; the rest is in `config.yaml` there. What names code or a
place to write is never taken from the output.
"""

from __future__ import annotations

from dataclasses import dataclass

from hqlabel.jobs.job_setup import resolve_settings as settings
from hqlabel.jobs.load_config import CONFIG_KEY, Config, ConfigSources
from hqlabel.pipeline.errors import UsageError
from hqlabel.pipeline.inputs.open_inputs import allowed_access
from hqlabel.pipeline.job_state.job_file import Job, require_job
from hqlabel.pipeline.stages.detect import is_own_code
from hqlabel.pipeline.storage.output_store import NotFound, Store


@dataclass(frozen=True, kw_only=True)
class SavedJob:
    """A job that was begun earlier. `config`: as saved, with what this call changes on top."""

    config: Config
    store: Store
    job: Job


def open_saved(sources: ConfigSources) -> SavedJob:
    """Return the job in the output that `sources` name.

    Raises:
        UsageError: no output is configured. JobRefused: there is no job.
    """
    alone = sources.load()
    place = settings.output_place(alone)
    store = Store(place)
    require_job(store)
    config = sources.load(_saved_yaml(store))
    _refuse_code_of_the_output(alone, config)
    # The output is where it is now, wherever it was when the configuration was saved.
    config = config.model_copy(update={"output": config.output.model_copy(update={"uri": place.uri})})
    has_inputs = config.input.images or config.input.boxes
    access = allowed_access(config.input, settings.check_inputs(config)) if has_inputs else None
    return SavedJob(config=config, store=store, job=require_job(store, access=access))


def _refuse_code_of_the_output(alone: Config, config: Config) -> None:
    """Raise UsageError for a detector that is code, unless this call names it: no output may choose code."""
    name = config.detector.name
    if name is not None and is_own_code(name) and alone.detector.name != name:
        raise UsageError(
            f"the job's detector is code of your own, {name!r}, which is never taken from an output: name it "
            f"again with --set detector.name={name}"
        )


def _saved_yaml(store: Store) -> str | None:
    try:
        return store.read(CONFIG_KEY).decode("utf-8")
    except NotFound:
        return None
