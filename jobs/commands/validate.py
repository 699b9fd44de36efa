"""`hqlabel validate`: everything in an output is read again and checked; each fault is named."""

from __future__ import annotations

from dataclasses import asdict

from hqlabel.jobs.job_setup.saved_job import STORE, open_saved
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import DamageFound, count
from hqlabel.pipeline.tables.verify_output import Verified, verify


def run(given: ConfigSources, *, sample: int | None, json: bool) -> int:
    """Check the job in the output; 0 when it is sound, 6 when it is not. `sample`: masks decoded a file."""
    saved = open_saved(given, "validate", STORE)
    store = saved.store
    found = verify(store, saved.job, sample=sample)
    for finding in found.findings:
        console.say(f"damaged: {finding}")
    console.say(_sentence(store.place.uri, found))
    if json:
        console.data_json({"output": store.place.uri, "sound": not found.findings, **asdict(found)})
    return DamageFound.exit_code if found.findings else 0


def _sentence(uri: str, found: Verified) -> str:
    read = (
        f"{count(found.units, 'unit')}, {count(found.parts, 'part')}, "
        f"{count(found.plan_files, 'file')} of the plan read ({console.size(found.bytes)}), "
        f"{count(found.masks_decoded, 'mask')} decoded"
    )
    left = f"; {count(found.units_left, 'unit')} not done yet" if found.units_left else ""
    if found.findings:
        return f"{uri}: {count(len(found.findings), 'fault')} found; {read}{left}"
    return f"{uri}: sound; {read}{left}"
