"""`hqlabel publish`: the tables once more from the committed units, with other filters; no model runs."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from hqlabel.jobs.cluster.ray_session import Machine
from hqlabel.jobs.commands.end_summary import EXIT_OVER_BUDGET, describe_counts, over_budget
from hqlabel.jobs.job_setup.driver_slice import JobLock
from hqlabel.jobs.job_setup.saved_job import STORE, SavedJob, open_saved, save_tree, saved_tree
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.pipeline.errors import count
from hqlabel.pipeline.settings import KEEPS_ROWS
from hqlabel.pipeline.tables.publish_tables import publish

USES = (*STORE, "filter", "cluster", "limits.max_failure_rate", "limits.failure_rate_from_images")
"""The settings that the command takes from the call; what decides rows is the job's."""


def run(given: ConfigSources, interrupts: Interrupts, *, json: bool) -> int:
    """Publish every range of units that is whole, with the call's filters, and return the exit code."""
    saved = open_saved(given, "publish", USES)
    filters = saved.config.filter
    with Machine(saved.config, interrupts) as machine, JobLock(saved.store, interrupts) as lock:
        manifest = publish(
            saved.store,
            saved.job,
            filters,
            require_owner=lock.require,
            mapper=machine.map_parts,
            save_filters=partial(_save_filters, saved, lock),
        )
        _save_filters(saved, lock)  # when nothing was to be published
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


def _save_filters(saved: SavedJob, lock: JobLock) -> None:
    """Keep the filters and the failure budget in `config.yaml`; all else there stays as it is."""
    tree, limits = saved_tree(saved.store), saved.config.limits
    budget = limits.model_dump(include=limits.marked(KEEPS_ROWS))
    before = tree.get("limits")
    tree["limits"] = {**(before if isinstance(before, dict) else {}), **budget}
    tree["filter"] = saved.config.filter.model_dump()
    if tree != saved_tree(saved.store):
        lock.require("to save the filters")
        save_tree(saved.store, tree)
