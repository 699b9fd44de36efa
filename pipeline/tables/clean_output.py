"""`hqlabel clean`: remove the working files that published parts have replaced. Nothing else deletes.

Only files of this job go, by their exact names, whose rows are in a part: every part is read again for it.
The manifest is marked `cleaned` before the first file goes, over the manifest that was read: however a clean
ends, the job's state is known, a later clean finishes the work, and one that was overtaken deletes nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from hqlabel.pipeline.errors import DamageFound, JobRefused
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.storage.output_store import NotFound, Store
from hqlabel.pipeline.tables.manifest import (
    Manifest,
    Part,
    StoredManifest,
    look_for_manifest,
    manifest_damage,
    write_manifest,
)
from hqlabel.pipeline.tables.published_parts import stated_in
from hqlabel.pipeline.tables.unit_files import CommittedUnit, list_generations

_ATTEMPT = re.compile(r"attempts/\d{8,}\.g\d+(\.prepare|\.commit)?/\d{4,}\.(start|image)\.json")


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """What was removed: files and bytes, and unfinished writes of dead processes."""

    files: int
    bytes: int
    uploads: int


def clean(store: Store, *, require_owner: Callable[[str], None], first_generation: int = 0) -> Cleaned:
    """Remove the files and return what was removed. A job that is not fully published stays as it is.

    `first_generation`: of the job's plan; files of the plans before go too.

    Raises:
        JobRefused: something is not published yet; with what to do. DamageFound: a part does not verify.
    """
    require_owner("clean")  # before anything is looked at
    found = look_for_manifest(store)
    manifest = require_complete(store, found)
    replaced = _replaced(store, manifest, first_generation)
    for part in manifest.parts:
        _prove(store, part)
    marks = [entry for entry in store.list("attempts/") if _ATTEMPT.fullmatch(entry.key)]
    sizes = {file.key: file.size for file in replaced} | {mark.key: mark.size for mark in marks}
    visit("clean.listed")
    require_owner("clean")
    if sizes or not manifest.cleaned:  # over the manifest that was read, or nothing is deleted
        write_manifest(store, replace(manifest, cleaned=True, revision=manifest.revision + 1), found.entry)
    visit("clean.marked")
    require_owner("clean")
    visit("clean.deleting")
    if sizes:
        store.delete(list(sizes))
    visit("clean.deleted")
    uploads = store.abort_stale_uploads()
    return Cleaned(files=len(sizes), bytes=sum(sizes.values()), uploads=uploads)


def require_complete(store: Store, found: StoredManifest) -> Manifest:
    """Return the manifest of a job that is wholly published; JobRefused or DamageFound with what to do."""
    if found.damage:
        raise DamageFound(manifest_damage(store, found.damage))
    if found.manifest is None or found.manifest.state != "complete":
        raise JobRefused(
            f"{store.place.uri}: not every unit is published, so its working files are needed; "
            "finish the job with label, or a publish that was interrupted with publish, then clean"
        )
    return found.manifest


def _prove(store: Store, part: Part) -> None:
    """Read a part and raise DamageFound unless it has the bytes, and the units, that the manifest says."""
    for file in (part.images, part.instances):
        try:
            body = store.read(file.key)
        except NotFound as error:
            raise DamageFound(f"{file.key} is gone; nothing was removed. Publish again") from error
        if hashlib.sha256(body).hexdigest() != file.sha256:
            raise DamageFound(
                f"{file.key}: its sha256 is not the one in the manifest; nothing was removed. Move the file "
                "away and publish again"
            )
        said = stated_in(body)
        if said is not None and dict(said.generations) != dict(part.generations):
            raise DamageFound(
                f"{file.key}: it has other generations of its units than the manifest says; nothing was "
                "removed. Move the file away and publish again"
            )


def _replaced(store: Store, manifest: Manifest, first_generation: int) -> list[CommittedUnit]:
    """Return every file of a unit that the parts hold; JobRefused when something is newer than a part."""
    published = {
        unit_id: part.generation_of(unit_id)
        for part in manifest.parts
        for unit_id in range(part.first_unit, part.stop_unit)
    }
    files = list_generations(store)
    for unit in (one for one in files if one.generation >= first_generation):
        if unit.generation > published.get(unit.unit_id, -1):
            raise JobRefused(
                f"{store.place.uri}: {unit.key} is newer than the published parts; publish first"
            )
    return files
