"""`hqlabel clean`: remove the working files that published parts have replaced. Nothing else deletes.

Only files of this job go, by their exact names, that the manifest has replaced, proved by reading every
part again. The manifest is marked `cleaned` before the first file goes: however a clean ends, the job's
state is known, and a later clean finishes the work.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from hqlabel.pipeline.errors import DamageFound, JobRefused
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import Manifest, read_manifest, write_manifest
from hqlabel.pipeline.tables.unit_files import CommittedUnit, list_committed, list_generations

_ATTEMPT = re.compile(r"attempts/\d{8,}\.g\d+(\.prepare|\.commit)?/\d{4,}\.(start|image)\.json")


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """What was removed: files and bytes, and unfinished writes of dead processes."""

    files: int
    bytes: int
    uploads: int


def clean(store: Store, *, require_owner: Callable[[str], None]) -> Cleaned:
    """Remove the files and return what was removed. A job that is not fully published stays as it is.

    Raises:
        JobRefused: something is not published yet; with what to do. DamageFound: a part does not verify.
    """
    manifest = read_manifest(store)
    if manifest is None or manifest.state != "complete":
        raise JobRefused(
            f"{store.place.uri}: not every unit is published, so its working files are needed; "
            "finish the job with label, then clean"
        )
    replaced = _replaced(store, manifest)
    for file in (file for part in manifest.parts for file in (part.images, part.instances)):
        if hashlib.sha256(store.read(file.key)).hexdigest() != file.sha256:
            raise DamageFound(f"{file.key}: its sha256 is not the one in the manifest; nothing was removed")
    require_owner("clean")
    if not manifest.cleaned:
        write_manifest(store, replace(manifest, cleaned=True))
    visit("clean.marked")
    marks = [entry for entry in store.list("attempts/") if _ATTEMPT.fullmatch(entry.key)]
    sizes = {file.key: file.size for file in replaced} | {mark.key: mark.size for mark in marks}
    require_owner("clean")
    if sizes:
        store.delete(list(sizes))
    visit("clean.deleted")
    uploads = store.abort_stale_uploads()
    return Cleaned(files=len(sizes), bytes=sum(sizes.values()), uploads=uploads)


def _replaced(store: Store, manifest: Manifest) -> list[CommittedUnit]:
    """Return every file of a unit that the parts hold; JobRefused when something is newer than a part."""
    published = {
        unit_id: part.generation_of(unit_id)
        for part in manifest.parts
        for unit_id in range(part.first_unit, part.stop_unit)
    }
    for unit in list_committed(store).values():
        if unit.generation > published.get(unit.unit_id, -1):
            raise JobRefused(
                f"{store.place.uri}: {unit.key} is newer than the published parts; publish first"
            )
    return list_generations(store)
