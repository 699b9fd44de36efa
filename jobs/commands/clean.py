"""`hqlabel clean`: the working files of a finished job go, its tables stay. The only command that deletes."""

from __future__ import annotations

from dataclasses import asdict

from hqlabel.jobs.job_setup.driver_slice import JobLock
from hqlabel.jobs.job_setup.saved_job import STORE, open_saved
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.pipeline.errors import count
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.clean_output import clean, require_complete
from hqlabel.pipeline.tables.manifest import look_for_manifest


def run(given: ConfigSources, interrupts: Interrupts, *, sure: bool, json: bool) -> int:
    """Delete, or without `sure` only report what would go, and return 0."""
    saved = open_saved(given, "clean", STORE)
    store, first = saved.store, saved.job.context.first_generation
    if not sure:
        return _report_candidates(store, json=json)
    with JobLock(store, interrupts) as lock:
        done = clean(store, require_owner=lock.require, first_generation=first)
    console.say(
        f"{store.place.uri}: {count(done.files, 'file')} removed ({console.size(done.bytes)}), "
        f"{count(done.uploads, 'unfinished upload')} dropped; the tables are as they were"
    )
    if json:
        console.data_json({"output": store.place.uri, "deleted": True, **asdict(done)})
    return 0


def _report_candidates(store: Store, *, json: bool) -> int:
    require_complete(store, look_for_manifest(store))
    files = [entry for prefix in ("units/", "attempts/") for entry in store.list(prefix)]
    size = sum(entry.size for entry in files)
    what = f"{count(len(files), 'working file')} ({console.size(size)})"
    console.say(f"{store.place.uri}: {what} would go; nothing was deleted. Add --yes to delete them")
    console.say("afterwards the job can no longer be retried or published with other filters")
    if json:
        console.data_json({"output": store.place.uri, "deleted": False, "files": len(files), "bytes": size})
    return 0
