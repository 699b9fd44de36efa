"""`hqlabel publish --merge`: the tables of several outputs as one, such as one of daily drops.

An image that several outputs have is taken from one of them, whole, with all its instances: from the one
that processed it last, but a failed row never takes the place of one that did not fail. The new tables are
like those after `clean`: they can be read, validated, exported and reported on, and no longer be retried.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.jobs.job_setup import resolve_settings
from hqlabel.jobs.job_setup.driver_slice import JobLock
from hqlabel.jobs.job_setup.saved_job import STORE, SavedJob, open_saved, save_tree, saved_tree
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.results.read_tables import require_published, row_groups
from hqlabel.jobs.terminal import console
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import JobRefused, UsageError, count
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.job_state.job_file import Job, open_job, units_per_part
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.count_masks import counts_of
from hqlabel.pipeline.tables.manifest import Manifest, Part, PartFile, part_key, write_manifest
from hqlabel.pipeline.tables.published_parts import StatedPart, as_footer, describe_file

_KEYS = ["image_id", "processed_at", "status"]


@dataclass(frozen=True, kw_only=True)
class MergedOutput:
    """One output to merge. `number`: its place in the call."""

    number: int
    saved: SavedJob
    manifest: Manifest


def run(given: ConfigSources, outputs: Sequence[str], interrupts: Interrupts, *, json: bool) -> int:
    """Write the merged tables into the empty output that `given` names, report doubled rows, return 0.

    Raises:
        UsageError: fewer than two outputs, or the new one is not empty, or classes contradict each other.
    """
    if len(outputs) < 2:
        raise UsageError("--merge wants two outputs or more: --merge out1 out2")
    sources = [_open_output(number, uri, given) for number, uri in enumerate(outputs)]
    config = given.load()
    store = Store(resolve_settings.output_place(config))
    _refuse_files(store)  # before a mark is written into a folder that is somebody else's
    with JobLock(store, interrupts) as lock:
        lock.take()
        _refuse_files(store)
        winners, doubled = choose(sources)
        names = _names_by_id(sources)
        new_ids = _renumbering(names)
        newest = max(sources, key=lambda source: source.manifest.published_at)
        job = _open_merged_job(store, sources, newest, winners.num_rows, names, new_ids)
        save_tree(store, _merged_config(newest, store.place.uri))
        manifest = Manifest(
            state="publishing",
            run_id=job.context.run_id,
            plan_sha256=job.context.plan_sha256,
            units=0,
            filters=newest.manifest.filters,
            parts=(),
            published_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            cleaned=True,
            lineage=newest.manifest.lineage,
            revision=1,
        )
        entry = write_manifest(store, manifest, None)
        visit("publish.begun")
        parts = tuple(_write_parts(store, job, sources, winners, names, new_ids, manifest.filters))
        visit("publish.parts")
        lock.require("merge")
        manifest = replace(manifest, state="complete", parts=parts, revision=2)
        write_manifest(store, manifest, entry)
    _report(sources, manifest, doubled, store.place.uri, renumbered=new_ids is not None, json=json)
    return 0


def _refuse_files(store: Store) -> None:
    """Raise UsageError unless the folder is empty but for marks of drivers."""
    files = [entry.key for entry in store.list(limit=1000) if not entry.key.startswith("owner/")]
    if files:
        raise UsageError(
            f"{store.place.uri}: is not empty ({files[0]}); merged tables want a new folder or prefix"
        )


def _open_output(number: int, uri: str, given: ConfigSources) -> MergedOutput:
    # The stores of all are reached with the options of this call.
    given = replace(given, flags={"output.uri": uri})
    saved = open_saved(given, "publish --merge", STORE)
    manifest = require_published(saved.store)
    if manifest.state != "complete":
        raise UsageError(f"{uri}: is {manifest.state}; merge it when it is complete")
    return MergedOutput(number=number, saved=saved, manifest=manifest)


def choose(sources: Sequence[MergedOutput]) -> tuple[pa.Table, int]:
    """Return every image once, sorted by id, with the `source` it is from; and how many rows are older."""
    tables = []
    for source in sources:
        for part in source.manifest.parts:
            for rows in row_groups(source.saved.store, part.images, schema.IMAGES, _KEYS):
                number = pa.array(np.full(rows.num_rows, source.number, np.int32))
                good = pc.cast(pc.not_equal(rows["status"], "failed"), pa.int8())
                tables.append(pa.table({"image_id": rows["image_id"], "source": number,
                                        "good": good, "at": rows["processed_at"]}))  # fmt: skip
    order = [
        ("image_id", "ascending"),
        ("good", "descending"),
        ("at", "descending"),
        ("source", "descending"),
    ]
    found = pa.concat_tables(tables).sort_by(order).combine_chunks()
    ids = found["image_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    return found.take(pa.array(first)).select(["image_id", "source"]), found.num_rows - len(first)


def _names_by_id(sources: Sequence[MergedOutput]) -> dict[int, dict[int, str]]:
    """Return the names of each source's classes by id; ids without a name are skipped."""
    return {
        source.number: {
            int(one["id"]): str(one["name"]) for one in source.saved.job.categories if one["name"]
        }
        for source in sources
    }


def _renumbering(names: Mapping[int, Mapping[int, str]]) -> dict[str, int] | None:
    """Return new ids by name, when one id means two classes or one class has two ids; else None.

    Ids made from names count the names of one output alone, so that two outputs may contradict.
    """
    pairs = {(number, name) for of_source in names.values() for number, name in of_source.items()}
    by_id, by_name = Counter(number for number, _ in pairs), Counter(name for _, name in pairs)
    if max([*by_id.values(), *by_name.values()], default=1) == 1:
        return None
    return {name: place for place, name in enumerate(sorted(by_name, key=str.encode), start=1)}


def _open_merged_job(
    store: Store,
    sources: Sequence[MergedOutput],
    newest: MergedOutput,
    images: int,
    names: Mapping[int, Mapping[int, str]],
    new_ids: Mapping[str, int] | None,
) -> Job:
    merged = [
        {"run_id": source.manifest.run_id, "plan_sha256": source.manifest.plan_sha256} for source in sources
    ]
    digest = hashlib.sha256("".join(one["plan_sha256"] for one in merged).encode()).hexdigest()
    run_id = "merge-" + dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S")
    context = replace(newest.saved.job.context, output=store.place, plan_sha256=digest, run_id=run_id)
    by_id: dict[int, str | None]
    if new_ids is None:
        by_id = {int(one["id"]): None for source in sources for one in source.saved.job.categories}
        by_id |= {number: name for of_source in names.values() for number, name in of_source.items()}
    else:
        by_id = {number: name for name, number in new_ids.items()}
    boxes = sum(source.manifest.counts.boxes for source in sources)
    job = Job(
        identity={"merged": merged},
        context=context,
        plan={"images": images, "boxes": boxes, "units": 0},
        categories=tuple({"id": number, "name": name} for number, name in sorted(by_id.items())),
        units_per_part=units_per_part(images=images, boxes=boxes, images_per_unit=1),
    )
    return open_job(store, job)


def _merged_config(newest: MergedOutput, uri: str) -> dict[str, Any]:
    """Return the newest output's `config.yaml`, for the new place."""
    tree = saved_tree(newest.saved.store)
    output = tree.get("output")
    return {**tree, "output": {**(output if isinstance(output, dict) else {}), "uri": uri}}


def _write_parts(
    store: Store,
    job: Job,
    sources: Sequence[MergedOutput],
    winners: pa.Table,
    names: Mapping[int, Mapping[int, str]],
    new_ids: Mapping[str, int] | None,
    filters: FilterSettings,
) -> Iterator[Part]:
    if new_ids is None:  # no contradiction: what one output names is named in all
        every = {number: name for of_source in names.values() for number, name in of_source.items()}
        names = dict.fromkeys(names, every)
    footer = {
        "schema_version": str(schema.SCHEMA_VERSION),
        "run_id": job.context.run_id,
        "plan_sha256": job.context.plan_sha256,
        "filters": filters.model_dump_json(),
        "merged": "true",
    }
    for index, start in enumerate(range(0, max(winners.num_rows, 1), job.units_per_part)):
        chosen = winners.slice(start, job.units_per_part)
        images = _rows(sources, chosen, "images", schema.IMAGES)
        instances = _renumbered(_rows(sources, chosen, "instances", schema.INSTANCES, names), new_ids)
        counts = counts_of(images, instances)
        said = StatedPart(
            index=index, first_unit=0, stop_unit=0, generations={}, counts=counts, publication=1
        )
        footer |= as_footer(said)
        yield Part(
            index=index,
            first_unit=0,
            stop_unit=0,
            generations={},
            images=_write_file(store, part_key("images", index), images, footer),
            instances=_write_file(store, part_key("instances", index), instances, footer),
            counts=counts,
        )


def _write_file(store: Store, key: str, rows: pa.Table, footer: Mapping[str, str]) -> PartFile:
    sink = checksummed_parquet.ParquetSink(rows.schema, footer)
    sink.write(rows)
    body = sink.finish()
    if not store.put_if_absent(key, body):
        raise JobRefused(f"{store.place.uri}/{key} is there already: another merge writes into this folder")
    return describe_file(key, body, sink.rows)


def _rows(
    sources: Sequence[MergedOutput],
    chosen: pa.Table,
    table: str,
    kind: pa.Schema,
    names: Mapping[int, Mapping[int, str]] | None = None,
) -> pa.Table:
    """Return the rows of the chosen images by id; `names`: of the classes, source by source."""
    found = [kind.empty_table()]
    for source in sources:
        mine = chosen.filter(pc.equal(chosen["source"], source.number))["image_id"].combine_chunks()
        if not len(mine):
            continue
        low, high = mine[0].as_py(), mine[-1].as_py()
        for part in source.manifest.parts:
            for rows in row_groups(source.saved.store, getattr(part, table), kind, kind.names, low, high):
                rows = rows.filter(pc.is_in(rows["image_id"], mine))
                found.append(rows if names is None else _named(rows, names[source.number]))
    keys = ["image_id", *(["instance_index"] if table == "instances" else [])]
    # Sorted by keys alone: lists and structs cannot pass through a sort.
    merged = pa.concat_tables([rows.replace_schema_metadata() for rows in found])
    order = pc.sort_indices(merged.select(keys), [(key, "ascending") for key in keys])
    # Not cast: Arrow would check below null boxes, where `take` leaves nulls.
    return pa.Table.from_arrays(merged.take(order).columns, schema=kind)


def _named(rows: pa.Table, names: Mapping[int, str]) -> pa.Table:
    """Return the rows with the name of every class whose id has one."""
    at = rows.schema.get_field_index("category_name")
    known = pa.array(list(names.values()), pa.string())
    ids = pa.array(list(names), pa.int32())
    found = known.take(pc.index_in(rows["category_id"].combine_chunks(), ids, skip_nulls=True))
    return rows.set_column(
        at, rows.schema.field(at), pc.coalesce(rows["category_name"].combine_chunks(), found)
    )


def _renumbered(rows: pa.Table, new_ids: Mapping[str, int] | None) -> pa.Table:
    if new_ids is None:
        return rows
    unnamed = pc.and_(rows["category_id"].is_valid(), rows["category_name"].is_null())
    if pc.any(unnamed).as_py():
        raise UsageError(
            "the outputs number their classes differently, and some boxes have a number without a name"
        )
    names, numbers = pa.array(list(new_ids), pa.string()), pa.array(list(new_ids.values()), pa.int32())
    ids = numbers.take(pc.index_in(rows["category_name"].combine_chunks(), names))
    at = rows.schema.get_field_index("category_id")
    return rows.set_column(at, rows.schema.field(at), ids)


def _report(
    sources: Sequence[MergedOutput],
    manifest: Manifest,
    doubled: int,
    uri: str,
    *,
    renumbered: bool,
    json: bool,
) -> None:
    counts = manifest.counts
    total = f"{count(counts.images, 'image')}, {count(counts.boxes, 'box', 'boxes')}"
    console.say(f"merged {len(sources)} outputs into {uri}: {total}")
    lines: list[tuple[str, str]] = []
    if doubled:
        rows = count(doubled, "older row was", "older rows were")
        lines.append(
            ("doubled", f"{rows} left out: the newest row of an image holds, a failed one only alone")
        )
    if renumbered:
        lines.append(("classes", "numbered anew by their names, because the outputs contradict each other"))
    filters: list[Any] = [source.manifest.filters for source in sources]
    if any(one != filters[0] for one in filters):
        lines.append(("note", "the outputs were published with different filters; `accepted` is as it was"))
    if lines:
        console.say(console.pairs(lines))
    if json:
        console.data_json(
            {
                "output": uri,
                "merged": [source.saved.store.place.uri for source in sources],
                "counts": asdict(counts),
                "doubled": doubled,
                "classes_renumbered": renumbered,
            }
        )
