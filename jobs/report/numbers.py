"""The numbers of a report and the keys of the rows it shows, computed by DuckDB (`queries`, `sections`).

The columns that the queries name are read once from the published tables, row group by row group and without
masks, into a temporary DuckDB file; memory is bounded, because DuckDB spills to that folder. Counts and
histograms are exact at any size. Medians come from SAMPLE_ROWS rows, the first of a fixed shuffle, which is
all of them in smaller tables. Masks are not read here; the few that are shown are read after.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from hqlabel.jobs.report.queries import (
    BINS,
    BINS_PER_DECADE,
    CLASS_COUNTS,
    MEDIANS,
    MOST_PARTS,
    SAMPLE_ROWS,
    SCORES,
    TIMES,
    by_class,
    queries,
)
from hqlabel.jobs.report.sections import KEY_COLUMNS, SHUFFLED, ReportSection
from hqlabel.jobs.results.read_tables import row_groups
from hqlabel.pipeline import schema
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import Manifest, PartFile

_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "memory_limit": "500MB",
    "threads": 4,  # each holds its own buffers
    "preserve_insertion_order": False,  # every query orders its answer; loading needs less memory so
}
_INSTANCE_COLUMNS = (
    *("image_id", "instance_index", "category_id", "category_name", "bbox", *SCORES, "area"),
    *("num_components", "touches_border", "accepted", "reject_reason"),
)
_IMAGE_COLUMNS = (
    *("image_id", "status", "num_boxes", "num_instances", "num_accepted", "source_bytes", "processed_at"),
    *TIMES,
)

Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of equal bins between `low` and `high`; what lies outside is in the first or last bin.

    `accepted`: of these, the accepted ones. `log`: the bins are of the value's decimal logarithm.
    """

    name: str
    low: float
    high: float
    counts: Sequence[int]
    accepted: Sequence[int]
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """The facts of one class. Medians are None where nothing was measured."""

    category_id: int | None
    name: str
    images: int
    boxes: int
    masks: int
    accepted: int
    medians: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When images were finished: `counts` of equal spans from `start_s` on (seconds since 1970)."""

    start_s: float
    span_s: float
    counts: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All numbers of a report, and the keys (image_id, instance_index) of what it shows.

    `chosen`: of each section's rows. `overlapping`: pairs of instances of unlike classes whose boxes overlap
    most. `whole`: the images shown with all of their boxes. `times`: p50 and p95 of each stage, in ms.
    `model_s`: the model's seconds summed over all images.
    """

    histograms: Sequence[Histogram]
    classes: Sequence[ClassRow]
    chosen: Mapping[str, Sequence[Key]]
    overlapping: Sequence[tuple[Key, Key]]
    whole: Sequence[str]
    times: Mapping[str, tuple[float, float] | None]
    pace: Pace | None
    source_bytes: int
    model_s: float
    sampled: bool


def gather(store: Store, manifest: Manifest, sections: Sequence[ReportSection]) -> ReportData:
    """Return the numbers of the published tables. Reads every row once, without its mask."""
    ask = queries("instances", "images")
    with _loaded(store, manifest) as tables:
        totals = tables.sql(ask["totals"]).fetchall()
        return ReportData(
            histograms=_histograms(tables, ask),
            classes=_classes(tables),
            chosen={one.key: tables.sql(one.sql("instances", KEY_COLUMNS)).fetchall() for one in sections},
            overlapping=[
                ((image, one), (image, other))
                for image, one, other, *_ in tables.sql(ask["pairs"]).fetchall()
            ],
            whole=[image_id for (image_id,) in tables.sql(ask["whole"]).fetchall()],
            times=_times(tables),
            pace=_pace(tables.sql(ask["pace"]).fetchall()),
            source_bytes=sum(row[-1] or 0 for row in totals),
            model_s=sum(row[-2] or 0.0 for row in totals),
            sampled=max(_rows(tables, "instances"), _rows(tables, "images")) > SAMPLE_ROWS,
        )


@contextlib.contextmanager
def _loaded(store: Store, manifest: Manifest) -> Iterator[duckdb.DuckDBPyConnection]:
    """Meanwhile a connection to the tables `instances` and `images` and to a sample of the rows of each."""
    with (
        tempfile.TemporaryDirectory(prefix="hqlabel-report-") as folder,
        duckdb.connect(str(Path(folder) / "tables.duckdb"), config=_SETTINGS) as tables,
    ):
        tables.execute("SET enable_external_access = false")  # now that its own file is open
        files = [part.instances for part in manifest.parts]
        _load(tables, "instances", store, files, schema.INSTANCES, _INSTANCE_COLUMNS, SHUFFLED)
        files = [part.images for part in manifest.parts]
        _load(tables, "images", store, files, schema.IMAGES, _IMAGE_COLUMNS, "md5(image_id)")
        yield tables


def _load(
    tables: duckdb.DuckDBPyConnection,
    name: str,
    store: Store,
    files: Sequence[PartFile],
    kind: pa.Schema,
    columns: Sequence[str],
    shuffle: str,
) -> None:
    """Make the table `name` of these columns and `name`_sample, of SAMPLE_ROWS rows at most."""
    wanted = pa.schema([kind.field(column) for column in columns])
    tables.register("read", pa.Table.from_batches([], wanted))  # `empty_table` would import pandas
    tables.execute(f"CREATE TABLE {name} AS SELECT * FROM read")
    for file in files:
        for rows in row_groups(store, file, kind, columns):
            tables.register("read", rows)
            tables.execute(f"INSERT INTO {name} SELECT * FROM read")
    tables.unregister("read")
    first = f"ORDER BY {shuffle} LIMIT {SAMPLE_ROWS}" if _rows(tables, name) > SAMPLE_ROWS else ""
    tables.execute(f"CREATE TEMPORARY TABLE {name}_sample AS SELECT * FROM {name} {first}")


def _rows(tables: duckdb.DuckDBPyConnection, name: str) -> int:
    [(number,)] = tables.sql(f"SELECT count(*) FROM {name}").fetchall()
    return int(number)


def _histograms(tables: duckdb.DuckDBPyConnection, ask: Mapping[str, str]) -> list[Histogram]:
    names = ("scores", "area", "num_components", "boxes per image")
    answers = {name: tables.sql(ask[name]).fetchall() for name in names}
    scores: dict[str, list[tuple[float, ...]]] = {name: [] for name in SCORES}
    for name, low, *counts in answers["scores"]:
        scores[name].append((low * BINS, *counts))
    area = [(math.log10(low) * BINS_PER_DECADE, *counts) for low, *counts in answers["area"]]
    parts = [(number - 1, *counts) for number, *counts in answers["num_components"]]
    boxes = [(number, images, 0) for number, images in answers["boxes per image"]]
    return [
        *(_histogram(name, bins) for name, bins in scores.items()),
        _histogram("area", area, high=BINS / BINS_PER_DECADE, log=True),
        _histogram("num_components", parts, bins=MOST_PARTS, low=1, high=MOST_PARTS + 1),
        _histogram("boxes per image", boxes, high=BINS),
    ]


def _histogram(
    name: str,
    answers: Sequence[tuple[float, ...]],
    *,
    bins: int = BINS,
    low: float = 0,
    high: float = 1,
    log: bool = False,
) -> Histogram:
    """Return a histogram of (bin, all, accepted); bins past the last one are counted in it."""
    counts, accepted = [0] * bins, [0] * bins
    for place, number, kept in answers:
        at = min(round(place), bins - 1)
        counts[at] += int(number)
        accepted[at] += int(kept)
    return Histogram(name=name, low=low, high=high, counts=counts, accepted=accepted, log=log)


def _classes(tables: duckdb.DuckDBPyConnection) -> list[ClassRow]:
    """Return the classes, the commonest first."""
    sample = tables.sql(by_class(MEDIANS, "instances_sample")).fetchall()
    medians = {row[:2]: dict(zip((*SCORES, "area"), row[2:], strict=True)) for row in sample}
    unknown = dict.fromkeys((*SCORES, "area"))
    rows = [
        ClassRow(
            category_id=number,
            name=name or ("no class" if number is None else str(number)),
            images=images,
            boxes=boxes,
            masks=masks,
            accepted=accepted,
            medians=medians.get((number, name), unknown),
        )
        for number, name, images, boxes, masks, accepted in tables.sql(
            by_class(CLASS_COUNTS, "instances")
        ).fetchall()
    ]
    return sorted(rows, key=lambda row: (-row.boxes, row.name))


def _times(tables: duckdb.DuckDBPyConnection) -> dict[str, tuple[float, float] | None]:
    [answer] = tables.sql(queries("instances", "images_sample")["times"]).fetchall()
    return {name: None if times is None else tuple(times) for name, times in zip(TIMES, answer, strict=True)}


def _pace(rows: Sequence[tuple[float, float, int, int]]) -> Pace | None:
    """Return the chart of (start, span's seconds, span, images); None for a job of one second."""
    start, seconds, last, _ = rows[-1]
    if last == 0:
        return None
    counts = dict.fromkeys(range(last + 1), 0) | {span: images for *_, span, images in rows}
    return Pace(start_s=start, span_s=seconds, counts=list(counts.values()))
