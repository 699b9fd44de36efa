"""Published parts as files: what each states of itself, and whether it is the one that a manifest means.

The footer of both files of a part names its units, their generations, the filters and the counts. So the
manifest can be made again from the parts when it is lost, also after `clean`, when there is no other truth.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter
from pydantic_core import from_json

from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import DamageFound, HqlabelError, JobRefused
from hqlabel.pipeline.job_state.job_file import Job
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.output_store import NotFound, Replaced, Store
from hqlabel.pipeline.tables.count_masks import Counts, counts_of
from hqlabel.pipeline.tables.manifest import TABLES, Manifest, Part, PartFile, look_for_manifest, part_key
from hqlabel.pipeline.tables.unit_files import UnitSet, list_committed

READERS = 8
KINDS = {"images": schema.IMAGES, "instances": schema.INSTANCES}
_STATED = "part"


@dataclass(frozen=True, kw_only=True)
class StatedPart:
    """What the footers of a part's files state. `publication`: the manifest's revision when it was made, so
    that two publishes never write equal files.
    """

    index: int
    first_unit: int
    stop_unit: int
    generations: Mapping[int, int]
    counts: Counts
    publication: int


@dataclass(frozen=True, kw_only=True)
class HeldPart:
    """A part that is whole in the store, and the filters that have marked its rows (None: not stated)."""

    part: Part
    filters: FilterSettings | None
    publication: int = 0


def stated(footer: Mapping[str, str]) -> StatedPart | None:
    """Return what a footer states; None when it does not, as in files of earlier versions."""
    try:
        return TypeAdapter(StatedPart).validate_python(from_json(footer[_STATED]))
    except (KeyError, ValueError):
        return None


def as_footer(part: StatedPart) -> dict[str, str]:
    """Return the entry of the footer that `stated` reads."""
    return {_STATED: json.dumps(asdict(part), sort_keys=True)}


def describe_file(key: str, body: bytes, rows: int) -> PartFile:
    """Return what a manifest says of a file."""
    return PartFile(
        key=key,
        rows=rows,
        bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
        seal=checksummed_parquet.seal_of(_footer(body)),
    )


def _footer(body: bytes) -> dict[str, str]:
    with checksummed_parquet.open_closed(pa.BufferReader(body)) as file:
        return checksummed_parquet.footer_of(file)


def stated_in(body: bytes) -> StatedPart | None:
    """Return what the footer of a file's bytes states; see `stated`."""
    return stated(_footer(body))


@contextlib.contextmanager
def open_part(store: Store, file: PartFile, kind: pa.Schema) -> Iterator[pq.ParquetFile]:
    """Yield a published file to read from, the very one that a manifest names.

    Raises:
        JobRefused: the tables were published anew since the manifest was read.
        DamageFound: another file is there, or none.
    """
    try:
        with (
            store.open_parquet(file.key) as stream,
            checksummed_parquet.open_body(stream, kind, file.key) as body,
        ):
            seal = checksummed_parquet.seal_of(checksummed_parquet.footer_of(body))
            if stream.seek(0, 2) != file.bytes or file.seal not in ("", seal):
                raise _replaced(store, file)
            yield body
    except NotFound as error:
        raise DamageFound(f"{store.place.uri}/{file.key} is gone; publish again") from error
    except Replaced as error:
        raise _replaced(store, file) from error


def _replaced(store: Store, file: PartFile) -> HqlabelError:
    """Return the error for a file that is not the named one: is there a newer manifest by now, or none?"""
    now = look_for_manifest(store).manifest
    named = [one for part in now.parts for one in (part.images, part.instances)] if now else []
    if now is None or now.state == "publishing" or file not in named:
        return JobRefused(
            f"{store.place.uri}: the tables are being published anew, or were while they were read; "
            "start this command again when that has ended"
        )
    return DamageFound(f"{store.place.uri}/{file.key} is not the file that the manifest names; publish again")


def held_parts(store: Store, manifest: Manifest) -> dict[int, HeldPart]:
    """Return the parts of a manifest, by index, whose files are there and are the ones that it names."""
    sizes = _sizes(store)
    likely = [part for part in manifest.parts if _has_sizes(part, sizes)]
    with ThreadPoolExecutor(READERS) as pool:
        checks = pool.map(lambda part: _is_named(store, part), likely)
        return {
            part.index: HeldPart(part=part, filters=manifest.filters)
            for part, named in zip(likely, checks, strict=True)
            if named
        }


def _sizes(store: Store) -> dict[str, int]:
    return {entry.key: entry.size for table in TABLES for entry in store.list(f"{table}/")}


def _has_sizes(part: Part, sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(file.key) == file.bytes for file in (part.images, part.instances))


def _is_named(store: Store, part: Part) -> bool:
    with contextlib.suppress(DamageFound, JobRefused, NotFound):
        for file, kind in ((part.images, schema.IMAGES), (part.instances, schema.INSTANCES)):
            if file.seal:  # older manifests have none, and the size must do
                with open_part(store, file, kind):
                    pass
        return True
    return False


def finished_units(store: Store, committed: Iterable[int], manifest: Manifest | None) -> UnitSet:
    """Return the units that need no work: committed ones, and published ones whose files were cleaned.

    A cleaned part that is not there any more is work again: nothing else has its rows.
    """
    finished = (
        committed if isinstance(committed, UnitSet) else UnitSet(np.unique(np.fromiter(committed, np.int64)))
    )
    if manifest is None or not manifest.cleaned or not manifest.parts:
        return finished
    sizes, there = _sizes(store), list[range]()
    for part in manifest.parts:
        both = part.images.key in sizes and part.instances.key in sizes
        if _has_sizes(part, sizes) or (both and manifest.state == "publishing"):
            there.append(range(part.first_unit, part.stop_unit))
    return finished.union(there)


def is_merged(job: Job) -> bool:
    """Return whether these are the tables of several outputs, merged: no units are behind them."""
    return "merged" in job.identity


def count_parts(job: Job) -> int:
    """Return how many parts the whole job has; merged tables, without units, have them by their images."""
    units = max(int(job.plan["images"]), 1) if is_merged(job) else job.units
    return -(-units // job.units_per_part)


def units_of_part(job: Job, index: int) -> range:
    """Return the units of a part; none in merged tables."""
    first = min(index * job.units_per_part, job.units)
    return range(first, min(first + job.units_per_part, job.units))


def read_part(store: Store, job: Job, index: int, newest: Mapping[int, int]) -> HeldPart | None:
    """Return a part as its own two files state it, read whole and verified; None without a usable one.

    `newest`: the highest generation of every committed unit. Files of earlier versions state no generations:
    they were cleaned only when they held the newest. The two files may be of two publishes, when the second
    was cut short between them: then the older generations hold, if the units that differ are still there.
    """
    found = [_read_file(store, job, table, index) for table in TABLES]
    if None in found:
        return None
    images, instances = (one for one in found if one is not None)
    if images.filters != instances.filters:
        return None
    ids = units_of_part(job, index)
    of_both = [one.stated for one in (images, instances)]
    generations = _common_generations(index, ids, of_both, newest)
    if generations is None or any(generations.get(u, 0) < job.context.first_generation for u in ids):
        return None
    part = Part(
        index=index,
        first_unit=ids.start,
        stop_unit=ids.stop,
        generations=generations,
        images=images.file,
        instances=instances.file,
        counts=replace(counts_of(images.rows, instances.rows), devices=_devices(of_both, generations)),
    )
    publication = max(one.publication if one else 0 for one in of_both)
    return HeldPart(part=part, filters=images.filters, publication=publication)


def _common_generations(
    index: int, ids: range, of_both: Sequence[StatedPart | None], newest: Mapping[int, int]
) -> dict[int, int] | None:
    """Return the generations that both files of a part have; None when they are no part."""
    two = [one for one in of_both if one is not None]
    if not two:
        return {unit: newest[unit] for unit in ids if newest.get(unit)}
    if any((one.index, one.first_unit, one.stop_unit) != (index, ids.start, ids.stop) for one in two):
        return None
    if len(two) < len(of_both):  # the other may hold older rows: units that are there are published again
        return {unit: one for unit, one in two[0].generations.items() if newest.get(unit, -1) < one}
    pairs = {unit: sorted(one.generations.get(unit, 0) for one in two) for unit in ids}
    if any(low != high and newest.get(unit, -1) < high for unit, (low, high) in pairs.items()):
        return None
    return {unit: low for unit, (low, _) in pairs.items() if low}


def unfinished_change(store: Store, job: Job) -> str | None:
    """Return the sentence on tables of a plan before whose job was taken over by a plan that is not done yet.

    They are whole: `label` replaces them when it has done the units of the new plan.
    """
    if not job.context.earlier or len(list_committed(store, job.context.first_generation)) >= job.units:
        return None
    if not any(_is_of_earlier_plan(store, job, index) for index in range(count_parts(job))):
        return None
    return (
        f"{store.place.uri}: its inputs changed (--accept-changed-inputs), not every unit of the new plan is "
        "done, and the tables are those of the plan before; run `hqlabel label` again, which goes on"
    )


def _is_of_earlier_plan(store: Store, job: Job, index: int) -> bool:
    plans = {plan.plan_sha256 for plan in job.context.earlier}
    for table in TABLES:
        with contextlib.suppress(DamageFound, NotFound):
            body = store.read(part_key(table, index))
            checksummed_parquet.check_seal(body, part_key(table, index))
            if _footer(body).get("plan_sha256") in plans:
                return True
    return False


def _devices(of_both: Sequence[StatedPart | None], generations: Mapping[int, int]) -> Mapping[str, int]:
    """Return the devices that a file of these generations states: no row has them."""
    said = (one.counts.devices for one in of_both if one and dict(one.generations) == dict(generations))
    return next(said, {})


@dataclass(frozen=True, kw_only=True)
class _PartAsRead:
    file: PartFile
    rows: pa.Table
    stated: StatedPart | None
    filters: FilterSettings | None


def _read_file(store: Store, job: Job, table: Any, index: int) -> _PartAsRead | None:
    """Return a file of a part of this job; None when there is none, or it does not verify."""
    key = part_key(table, index)
    try:
        body = store.read(key)
        rows = checksummed_parquet.read_body(body, KINDS[table], key)
    except (NotFound, DamageFound):
        return None
    footer = _footer(body)
    if footer.get("plan_sha256", job.context.plan_sha256) != job.context.plan_sha256:
        return None
    try:
        filters = FilterSettings(**from_json(footer["filters"])) if "filters" in footer else None
    except (ValueError, TypeError):
        return None
    return _PartAsRead(
        file=describe_file(key, body, rows.num_rows),
        rows=rows.select(_COUNTED[table]),
        stated=stated(footer),
        filters=filters,
    )


_COUNTED = {
    "images": ["status", "error_code"],
    "instances": ["area", "accepted", "reject_reason"],
}
"""What `counts_of` reads; the masks of a whole part need not wait in memory for it."""
