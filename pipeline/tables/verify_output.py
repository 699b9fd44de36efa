"""`hqlabel validate`: read everything that was written again, and name every fault.

Seals find any flipped bit in a file by itself, the manifest's sha256 finds a whole file put in the place
of another, the plan finds what is missing or doubled, the units find rows that are older than they are, and
masks are decoded: a sample, or all.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pycocotools import mask as coco_mask

from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import DamageFound, HqlabelError, JobRefused
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.job_state.plan_files import UNITS_PER_FILE, iter_plan
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.output_store import NotFound, Store
from hqlabel.pipeline.tables.manifest import (
    MANIFEST_KEY,
    Manifest,
    Part,
    PartFile,
    StoredManifest,
    look_for_manifest,
    manifest_damage,
)
from hqlabel.pipeline.tables.publish_tables import foreign_parts
from hqlabel.pipeline.tables.published_parts import stated, unfinished_change
from hqlabel.pipeline.tables.unit_checks import find_faults, plan_faults
from hqlabel.pipeline.tables.unit_files import (
    CommittedUnit,
    list_generations,
    parse_key,
    read_committed,
    unit_key,
)

READERS = 8
UNITS_AT_A_TIME = 64


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault: the file, the unit or part where it is of one, and a sentence."""

    key: str
    message: str
    unit_id: int | None = None
    part: int | None = None

    def __str__(self) -> str:
        where = f" (unit {self.unit_id})" if self.unit_id is not None else ""
        return f"{self.key}{where}: {self.message}"


@dataclass(kw_only=True)
class Verified:
    """What was read and what was wrong; `findings` empty: sound. `units_left`: planned, not committed."""

    findings: list[Finding] = field(default_factory=list)
    plan_files: int = 0
    units: int = 0
    units_left: int = 0
    parts: int = 0
    images: int = 0
    masks_decoded: int = 0
    bytes: int = 0


def verify(store: Store, job: Job, *, sample: int | None = 64) -> Verified:
    """Read and check everything below a job's folder.

    `sample`: masks to decode in each published file, and one image's in each unit; None: all of them.
    A job that is not finished is sound when what there is, is.
    """
    result = Verified()
    before = look_for_manifest(store)
    manifest = _manifest(store, job, before, result)
    _verify_plan(store, job, result)
    outcomes = _verify_units(store, job, manifest, result, all_masks=sample is None)
    if manifest is not None:
        _verify_parts(store, job, manifest, outcomes, result, sample)
    if result.findings and look_for_manifest(store).entry != before.entry:
        raise JobRefused(
            f"{store.place.uri}: another command published or cleaned here while this one read; validate "
            "again when it has ended"
        )
    return result


def _manifest(store: Store, job: Job, found: StoredManifest, result: Verified) -> Manifest | None:
    manifest = found.manifest
    if found.damage:
        result.findings.append(Finding(key=MANIFEST_KEY, message=manifest_damage(store, found.damage)))
    if manifest is not None and manifest.state == "publishing":
        message = unfinished_change(store, job) or "a publish was interrupted; run publish again"
        result.findings.append(Finding(key=MANIFEST_KEY, message=message))
    return manifest


def _verify_plan(store: Store, job: Job, result: Verified) -> None:
    for entry in store.list(f"plan/{job.context.plan_sha256[:16]}/"):
        result.plan_files += 1
        result.bytes += entry.size
        try:
            checksummed_parquet.check_seal(store.read(entry.key), entry.key)
        except DamageFound as error:
            result.findings.append(Finding(key=entry.key, message=_without(entry.key, error)))


def _without(name: str, error: HqlabelError) -> str:
    return str(error).removeprefix(f"{name}: ")


# ---------------------------------------------------------------------------------------------
# Units
# ---------------------------------------------------------------------------------------------


def _verify_units(
    store: Store, job: Job, manifest: Manifest | None, result: Verified, *, all_masks: bool
) -> dict[int, bytes]:
    """Check every unit's files; return digests of what happened to the images of each published one."""
    outcomes: dict[int, bytes] = {}
    published = _published(manifest)
    files: dict[int, list[CommittedUnit]] = {}
    for unit in list_generations(store):
        if unit.generation >= job.context.first_generation:  # else of a plan before
            files.setdefault(unit.unit_id, []).append(unit)
    result.findings += [
        Finding(key=entry.key, message="this is no file of a unit")
        for entry in store.list("units/")
        if parse_key(entry.key) is None
    ]
    for unit_id in sorted(set(files) - set(range(job.units))):
        result.findings += [_finding(unit, "the plan has no such unit") for unit in files[unit_id]]
    result.findings += _gone(job, files, manifest)
    result.findings += _unpublished(files, published)
    result.units_left = len(set(range(job.units)) - set(files)) if not (manifest and manifest.cleaned) else 0
    if not files and manifest is None and result.plan_files < -(-job.units // UNITS_PER_FILE):
        return outcomes  # ended while its plan was written, which the next start of label goes on with
    planned, detected = _planned_units(store, job, result), job.context.detector is not None
    with ThreadPoolExecutor(READERS) as pool:
        # In batches, or the plan of millions of images would wait in memory for its turn.
        while batch := list(islice(planned, UNITS_AT_A_TIME)):
            work = [(unit, rows) for unit_id, rows in batch for unit in files.get(unit_id, [])]
            checks = pool.map(
                lambda one: _check_unit(store, *one, detected=detected, all_masks=all_masks), work
            )
            for unit, faults, outcome in checks:
                result.units += 1
                result.bytes += unit.size
                result.findings += [_finding(unit, fault) for fault in faults]
                if published.get(unit.unit_id) == unit.generation and not faults:
                    outcomes[unit.unit_id] = outcome
    return outcomes


def _published(manifest: Manifest | None) -> dict[int, int]:
    """Return the generation that is published of every unit that is."""
    parts = manifest.parts if manifest is not None else ()
    return {u: part.generation_of(u) for part in parts for u in range(part.first_unit, part.stop_unit)}


def _unpublished(
    files: Mapping[int, Sequence[CommittedUnit]], published: Mapping[int, int]
) -> Iterator[Finding]:
    """Yield the units of which the tables have an older generation than the store."""
    for unit_id, of_unit in files.items():
        newest = max(of_unit, key=lambda unit: unit.generation)
        if newest.generation > published.get(unit_id, newest.generation):
            yield _finding(
                newest,
                f"the tables have generation {published[unit_id]} of this unit: a retry is under way or was "
                "interrupted; publish again when it has ended",
            )


_OUTCOME = [
    "image_id",
    "status",
    "error_code",
    "error_message",
    "source_etag",
    "attempts",
    "run_id",
    "processed_at",
]


def _outcome_of(images: pa.Table) -> bytes:
    """Return a digest of what happened to the images of a unit: equal in its file and in its part."""
    return hashlib.sha256(repr(images.select(_OUTCOME).to_pylist()).encode()).digest()


def _finding(unit: CommittedUnit, message: str) -> Finding:
    return Finding(key=unit.key, message=message, unit_id=unit.unit_id)


def _planned_units(store: Store, job: Job, result: Verified) -> Iterator[tuple[int, pa.Table | None]]:
    """Yield every planned unit with its rows; without them from where on the plan cannot be read."""
    rows = iter_plan(store, job.context.plan_sha256)
    read = 0
    try:
        for read, table in enumerate(rows, start=1):
            yield read - 1, table
        if read != job.units:
            raise DamageFound(f"plan: {read} units, job.json states {job.units}")
    except (DamageFound, NotFound) as error:
        if not any(finding.key.startswith("plan/") for finding in result.findings):
            result.findings.append(Finding(key="plan/", message=str(error)))
        yield from ((later, None) for later in range(read, job.units))


def _check_unit(
    store: Store, unit: CommittedUnit, planned: pa.Table | None, *, detected: bool, all_masks: bool
) -> tuple[CommittedUnit, list[str], bytes]:
    try:
        table = read_committed(store, unit)
    except DamageFound as error:
        return unit, [_without(f"unit {unit.unit_id} ({unit.key})", error)], b""
    faults = find_faults(table, check_masks=all_masks)
    if not all_masks and not faults and table.num_rows:
        faults = find_faults(table.slice(unit.unit_id % table.num_rows, 1))
    if planned is not None:
        faults += plan_faults(table, planned, detected=detected)
    return unit, faults, _outcome_of(table)


def _gone(job: Job, files: Mapping[int, list[CommittedUnit]], manifest: Manifest | None) -> Iterator[Finding]:
    """Yield the units that were published from a file that is no longer there."""
    if manifest is None or manifest.cleaned:
        return
    for part in manifest.parts:
        for unit_id in range(part.first_unit, min(part.stop_unit, job.units)):
            generation = part.generation_of(unit_id)
            if generation not in {unit.generation for unit in files.get(unit_id, [])}:
                key = unit_key(unit_id, generation)
                yield Finding(key=key, unit_id=unit_id, message="the committed file is gone")


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def _verify_parts(
    store: Store,
    job: Job,
    manifest: Manifest,
    outcomes: Mapping[int, bytes],
    result: Verified,
    sample: int | None,
) -> None:
    part_keys = {file.key for part in manifest.parts for file in (part.images, part.instances)}
    extra = foreign_parts(store, job)
    if manifest.state != "publishing":
        stored = [entry.key for table in ("images/", "instances/") for entry in store.list(table)]
        extra = [key for key in stored if key not in part_keys]
    message = "the manifest does not name this file, and queries over the folder read it"
    result.findings += [Finding(key=key, message=message) for key in extra]
    for part in manifest.parts:
        result.parts += 1
        result.images += part.images.rows
        for file, kind in ((part.images, schema.IMAGES), (part.instances, schema.INSTANCES)):
            result.bytes += file.bytes
            units = outcomes if kind is schema.IMAGES else {}
            faults = _check_part_file(store, part, file, kind, units, result, sample)
            result.findings += [Finding(key=file.key, part=part.index, message=fault) for fault in faults]


def _misstated(file: pq.ParquetFile, part: Part) -> Iterator[str]:
    """Yield how a file's footer differs from the manifest; those of earlier versions state nothing."""
    said = stated(checksummed_parquet.footer_of(file))
    for name in ("first_unit", "stop_unit", "generations", "counts") if said is not None else ():
        one, other = getattr(said, name), getattr(part, name)
        if one != other:
            yield f"its footer states {name} {one}, the manifest {other}"


def _check_part_file(
    store: Store,
    part: Part,
    expected: PartFile,
    kind: pa.Schema,
    outcomes: Mapping[int, bytes],
    result: Verified,
    sample: int | None,
) -> list[str]:
    faults: list[str] = []
    try:
        body = store.read(expected.key)
        if len(body) != expected.bytes:
            faults.append(f"{len(body)} bytes, the manifest states {expected.bytes}")
        if hashlib.sha256(body).hexdigest() != expected.sha256:
            faults.append("its sha256 is not the one in the manifest")
        checksummed_parquet.check_seal(body, expected.key)
        with checksummed_parquet.open_body(pa.BufferReader(body), kind, expected.key) as file:
            faults += _misstated(file, part)
            faults += _row_faults(file, part, expected, kind, outcomes, result, sample)
    except (DamageFound, NotFound) as error:
        faults.append(_without(expected.key, error))
    return faults


def _row_faults(
    file: pq.ParquetFile,
    part: Part,
    expected: PartFile,
    kind: pa.Schema,
    outcomes: Mapping[int, bytes],
    result: Verified,
    sample: int | None,
) -> Iterator[str]:
    """Yield faults of the rows: their number, order, sums, and masks. One row group in memory at a time."""
    if file.metadata.num_rows != expected.rows:
        yield f"{file.metadata.num_rows} rows, the manifest states {expected.rows}"
    last: tuple[bytes, int] | None = None
    accepted, status = 0, Counter[str]()
    rows: list[pa.Table] = []
    for group in range(file.num_row_groups):
        table = _read_group(file, group, expected.key)
        place = table["instance_index"].to_pylist() if kind is schema.INSTANCES else []
        ids = [image_id.encode() for image_id in table["image_id"].to_pylist()]
        for key in zip(ids, place or [0] * len(ids), strict=True):
            if last is not None and key <= last:
                yield f"image {key[0]!r}, instance {key[1]} is there twice or out of order"
            last = key
        if kind is schema.IMAGES:
            rows.append(table.select([*_OUTCOME, "unit_id"]))
            status.update(table["status"].to_pylist())
            accepted += pc.sum(table["num_accepted"]).as_py() or 0
        else:
            accepted += pc.sum(table["accepted"]).as_py() or 0
            yield from _mask_faults(table, result, sample)
    if rows and outcomes:
        yield from _unlike_units(pa.concat_tables(rows), outcomes)
    if accepted != part.counts.accepted:
        yield f"{accepted} accepted masks, the manifest states {part.counts.accepted}"
    if kind is schema.IMAGES and dict(status) != dict(part.counts.status):
        yield f"statuses {dict(status)}, the manifest states {dict(part.counts.status)}"


def _unlike_units(images: pa.Table, outcomes: Mapping[int, bytes]) -> Iterator[str]:
    """Yield the units whose published images are not those of the committed file."""
    for unit_id in pc.unique(images["unit_id"]).to_pylist():
        mine = images.filter(pc.equal(images["unit_id"], unit_id))
        if _outcome_of(mine) != outcomes.get(unit_id, _outcome_of(mine)):
            yield f"its rows of unit {unit_id} are not those of the committed file; publish again"


def _read_group(file: pq.ParquetFile, group: int, name: str) -> pa.Table:
    try:
        return file.read_row_group(group)
    except (OSError, pa.ArrowException) as error:
        raise DamageFound(f"{name}: row group {group} cannot be read back ({error})") from error


def _mask_faults(table: pa.Table, result: Verified, sample: int | None) -> Iterator[str]:
    """Yield masks that do not have their size and area, of `sample` rows spread evenly (None: all)."""
    masks = table.filter(table["segmentation"].is_valid())
    step = 1 if sample is None else -(-masks.num_rows // max(sample, 1)) or 1
    rows = range(0, 0 if sample == 0 else masks.num_rows, step)
    for row in masks.take(pa.array(rows, pa.int64())).to_pylist():
        result.masks_decoded += 1
        fault = _mask_fault(row)
        if fault:
            yield f"image {row['image_id']!a}, instance {row['instance_index']}: {fault}"


def _mask_fault(row: Mapping[str, Any]) -> str | None:
    try:
        mask = coco_mask.decode(row["segmentation"])
    except ValueError as error:
        return f"the mask cannot be decoded ({error})"
    if list(mask.shape) != row["segmentation"]["size"] or int(mask.sum()) != row["area"]:
        return f"the mask has {int(mask.sum())} pixels in {mask.shape}, area is {row['area']}"
    return None
