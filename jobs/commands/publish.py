"""`hqlabel publish`: the tables once more from the committed units, with other filters; no model runs."""

from __future__ import annotations

from dataclasses import asdict

from hqlabel.jobs.cluster.ray_session import Machine
from hqlabel.jobs.cluster.run_units import save_config
from hqlabel.jobs.commands.end_summary import EXIT_OVER_BUDGET, describe_counts, over_budget
from hqlabel.jobs.job_setup import resolve_settings
from hqlabel.jobs.job_setup.driver_slice import JobLock
from hqlabel.jobs.job_setup.saved_job import open_saved
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.pipeline.errors import count
from hqlabel.pipeline.tables.publish_tables import publish


def run(given: ConfigSources, interrupts: Interrupts, *, json: bool) -> int:
    """Publish every range of units that is whole, with the call's filters, and return the exit code."""
    saved = open_saved(given)
    filters = saved.config.filter
    with Machine(saved.config, interrupts) as machine, JobLock(saved.store, interrupts) as lock:
        manifest = publish(
            saved.store, saved.job, filters, require_owner=lock.require, mapper=machine.map_parts
        )
        config = resolve_settings.resolved(saved.config)
        # A hub id must not be taken for a folder in the current one.
        save_config(saved.store, config.model_copy(update={"model": saved.config.model}))
    uri = saved.store.place.uri
    chosen = ", ".join(f"{name} {value}" for name, value in filters.model_dump().items() if value is not None)
    console.say(f"published {manifest.published_units:,} of {count(manifest.units, 'unit')} in {uri}")
    console.say(console.pairs([*describe_counts(manifest), ("filters", chosen)]))
    over, counts = None, manifest.counts
    if manifest.state == "complete":
        failed = counts.status.get("failed", 0)
        over = over_budget(saved.config.limits, images=counts.images, failed=failed)
    if over is not None:
        console.say(over)
    code = 0 if over is None else EXIT_OVER_BUDGET
    if json:
        console.data_json(
            {
                "output": uri,
                "exit_code": code,
                "state": manifest.state,
                "units": {"planned": manifest.units, "published": manifest.published_units},
                "filters": filters.model_dump(),
                "counts": asdict(counts),
            }
        )
    return code
