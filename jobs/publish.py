"""`hqlabel publish`: the tables once more from the committed units, with other filters; no model runs."""

from __future__ import annotations

from dataclasses import asdict

from jobs import console, ending, settings
from jobs.config import Given
from jobs.interrupts import Interrupts
from jobs.machine import Machine
from jobs.ownership import Ownership
from jobs.saved import open_saved
from jobs.working import save_config
from pipeline.publish import publish


def run(given: Given, interrupts: Interrupts, *, json: bool) -> int:
    """Publish every range of units that is whole, with the filters given now, and return 0."""
    saved = open_saved(given)
    filters = settings.filter_settings(saved.config)
    with (
        Machine(saved.config, interrupts) as machine,
        Ownership(saved.store, interrupts) as ownership,
    ):
        manifest = publish(
            saved.store, saved.job, filters, require_owner=ownership.require, mapper=machine.map_parts
        )
        config = settings.resolved(saved.config)
        # A hub id is not looked for among the folders of where this command happens to run.
        save_config(saved.store, config.model_copy(update={"model": saved.config.model}))
    uri = saved.store.place.uri
    asked = ", ".join(f"{name} {value}" for name, value in asdict(filters).items() if value is not None)
    console.say(f"published {manifest.published_units:,} of {console.count(manifest.units, 'unit')} in {uri}")
    console.say(console.pairs([*ending.describe_counts(manifest), ("filters", asked)]))
    if json:
        console.data_json(
            {
                "output": uri,
                "state": manifest.state,
                "units": {"planned": manifest.units, "published": manifest.published_units},
                "filters": asdict(filters),
                "counts": asdict(manifest.counts),
            }
        )
    return 0
