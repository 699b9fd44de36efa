"""One pass over the published tables: sums, histograms and the rows that a report shows, in bounded memory.

Counts and histograms are exact at any size. Medians come from a fixed random sample of SAMPLE_ROWS rows,
which is all of them in smaller tables. Masks are not read here; the few that are shown are read after.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.report.sections import Section, reason_names, shuffle_keys
from jobs.results.read_tables import Row, row_groups
from pipeline import schema
from pipeline.storage.store import Store
from pipeline.tables.manifest import Manifest

Float64Array = npt.NDArray[np.float64]

SAMPLE_ROWS = 200_000
SCORES = ("detector_score", "predicted_iou", "stability_score", "box_iou", "mask_in_box")
TIMES = ("fetch_ms", "decode_ms", "detect_ms", "segment_ms")
BINS = 40
_SCALARS = (*SCORES, "area", "num_components", "touches_border")
_INSTANCE_COLUMNS = (
    *("image_id", "instance_index", "image_uri", "category_id", "category_name", "bbox"),
    *_SCALARS,
    *("accepted", "reject_reason"),
)
_IMAGE_COLUMNS = ("image_id", "num_boxes", "source_bytes", "processed_at", *TIMES)
_PAIR_REACH = 16  # rows after a row that are compared with it for overlap
PAIR_BOX_IOU = 0.6
_MOST_PAIRS = 40


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of equal bins between `low` and `high`; what lies outside is in the first or last bin.

    `accepted`: of these, the accepted ones. `log`: the bins are of the value's decimal logarithm.
    """

    name: str
    low: float
    high: float
    counts: npt.NDArray[np.int64]
    accepted: npt.NDArray[np.int64]
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """What is said of one class. Medians are None where nothing was measured."""

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
    """All that a report says in numbers, and the keys of what it shows.

    `chosen`: (image_id, instance_index) of each section's rows. `overlapping`: pairs of instances of
    unlike classes whose boxes overlap most. `times`: p50 and p95 of each stage, in ms. `model_s`: the
    model's seconds summed over all images.
    """

    histograms: Sequence[Histogram]
    classes: Sequence[ClassRow]
    chosen: Mapping[str, Sequence[Row]]
    overlapping: Sequence[tuple[Row, Row]]
    times: Mapping[str, tuple[float, float] | None]
    pace: Pace | None
    source_bytes: int
    model_s: float
    sampled: bool


@dataclass(kw_only=True)
class _Kept:
    """The rows with the least values so far."""

    number: int
    values: Float64Array = field(default_factory=lambda: np.zeros(0))
    rows: pa.Table | None = None

    def offer(self, values: Float64Array, table: pa.Table) -> None:
        known = np.flatnonzero(~np.isnan(values))
        if len(known) > self.number:
            bound = np.partition(values[known], self.number - 1)[self.number - 1]
            known = known[values[known] <= bound]
        rows = table.take(pa.array(known))
        merged = rows if self.rows is None else pa.concat_tables([self.rows, rows])
        all_values = np.concatenate([self.values, values[known]])
        best = np.argsort(all_values, kind="stable")[: self.number]
        self.values, self.rows = all_values[best], merged.take(pa.array(best))

    def to_list(self) -> list[Row]:
        return [] if self.rows is None else self.rows.to_pylist()


def gather(store: Store, manifest: Manifest, sections: Sequence[Section]) -> ReportData:
    """What the tables say. Reads every row once, without its mask."""
    instances, images = _Instances(sections), _Images()
    for part in manifest.parts:
        for group in row_groups(store, part.images, schema.IMAGES, _IMAGE_COLUMNS):
            images.add(group)
        for group in row_groups(store, part.instances, schema.INSTANCES, _INSTANCE_COLUMNS):
            instances.add(group)
    return ReportData(
        histograms=[*instances.histograms(), images.boxes_histogram()],
        classes=instances.classes(),
        chosen={key: kept.to_list() for key, kept in instances.kept.items()},
        overlapping=instances.pairs(),
        times=images.times(),
        pace=images.pace(),
        source_bytes=images.source_bytes,
        model_s=images.model_s,
        sampled=instances.rows > SAMPLE_ROWS or images.rows > SAMPLE_ROWS,
    )


class _Instances:
    """The pass over `instances`."""

    def __init__(self, sections: Sequence[Section]) -> None:
        self.sections = sections
        self.kept = {section.key: _Kept(number=section.number) for section in sections}
        self.rows = 0
        self._sample = _Kept(number=SAMPLE_ROWS)
        self._bins = {name: np.zeros((2, BINS), dtype=np.int64) for name in (*SCORES, "area")}
        self._parts = np.zeros((2, 10), dtype=np.int64)
        self._per_class: dict[tuple[Any, Any], Counter[str]] = defaultdict(Counter)
        self._last: tuple[str | None, set[Any]] = (None, set())
        self._pairs: list[tuple[float, Row, Row]] = []

    def add(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        columns = {name: _numbers(table, name) for name in _SCALARS}
        shuffle = shuffle_keys(table["image_id"].to_pylist(), table["instance_index"].to_pylist())
        given = {**columns, "shuffle": shuffle, "reason": reason_names(table["reject_reason"])}
        lean = table.select(["image_id", "instance_index", *SCORES, "area", "num_components"])
        for section in self.sections:
            self.kept[section.key].offer(section.order(given), lean)
        self._sample.offer(
            shuffle, table.select(["category_id", "category_name", *SCORES, "area", "accepted"])
        )
        self._count(table, columns)
        self._find_pairs(table, columns)

    def _count(self, table: pa.Table, columns: Mapping[str, Float64Array]) -> None:
        accepted = np.asarray(table["accepted"])
        has_mask = columns["area"] > 0
        for name, bins in self._bins.items():
            place = _bin(columns[name], log=name == "area")
            known = (place >= 0) & has_mask
            bins[0] += np.bincount(place[known], minlength=BINS)
            bins[1] += np.bincount(place[known & accepted], minlength=BINS)
        parts = np.nan_to_num(columns["num_components"], nan=0).astype(np.int64).clip(0, 10)
        for row, chosen in enumerate((parts > 0, (parts > 0) & accepted)):
            self._parts[row] += np.bincount(parts[chosen] - 1, minlength=10)
        self._count_classes(table)

    def _count_classes(self, table: pa.Table) -> None:
        names = ["category_id", "category_name"]
        lean = table.select([*names, "image_id", "accepted"])
        lean = lean.append_column("mask", pc.greater(table["area"], 0))
        sums = lean.group_by(names).aggregate([("accepted", "count"), ("accepted", "sum"), ("mask", "sum")])
        for row in sums.to_pylist():
            found = self._per_class[row["category_id"], row["category_name"]]
            found["boxes"] += row["accepted_count"]
            found["accepted"] += row["accepted_sum"] or 0
            found["masks"] += row["mask_sum"] or 0
        last_image, last_classes = self._last
        ends_with = table["image_id"][-1].as_py() if table.num_rows else last_image
        in_last = set(last_classes) if ends_with == last_image else set()
        for row in lean.group_by([*names, "image_id"]).aggregate([]).to_pylist():
            kind = (row["category_id"], row["category_name"])
            known = row["image_id"] == last_image and kind in last_classes
            self._per_class[kind]["images"] += not known  # an image may begin in the group before
            if row["image_id"] == ends_with:
                in_last.add(kind)
        self._last = (ends_with, in_last)

    def _find_pairs(self, table: pa.Table, columns: Mapping[str, Float64Array]) -> None:
        """Neighbouring rows of one image with unlike classes and boxes that overlap."""
        has_mask = np.flatnonzero(columns["area"] > 0)
        rows = table.select(["image_id", "instance_index", "category_id", "category_name"]).take(
            pa.array(has_mask)
        )
        boxes = np.asarray(
            table["bbox"].combine_chunks().take(pa.array(has_mask)).flatten(), dtype=np.float64
        ).reshape(-1, 4)
        image = _codes(rows, ["image_id"])
        kind = _codes(rows, ["category_id", "category_name"])
        for reach in range(1, min(_PAIR_REACH, len(boxes) - 1) + 1):
            near = (image[reach:] == image[:-reach]) & (kind[reach:] != kind[:-reach])
            first = np.flatnonzero(near)
            overlap = _box_iou(boxes[first], boxes[first + reach])
            for place in np.flatnonzero(overlap > PAIR_BOX_IOU):
                one, other = (rows.slice(int(first[place]) + by, 1).to_pylist()[0] for by in (0, reach))
                self._pairs.append((float(overlap[place]), one, other))
        self._pairs = sorted(self._pairs, key=lambda pair: -pair[0])[:_MOST_PAIRS]

    def pairs(self) -> list[tuple[Row, Row]]:
        return [(one, other) for _, one, other in self._pairs]

    def histograms(self) -> list[Histogram]:
        found = [
            Histogram(
                name=name,
                low=0,
                high=8 if name == "area" else 1,
                counts=bins[0],
                accepted=bins[1],
                log=name == "area",
            )
            for name, bins in self._bins.items()
        ]
        parts = Histogram(
            name="num_components", low=1, high=11, counts=self._parts[0], accepted=self._parts[1]
        )
        return [*found, parts]

    def classes(self) -> list[ClassRow]:
        sample = self._sample.rows
        codes: dict[tuple[Any, Any], list[int]] = defaultdict(list)
        numbers: dict[str, Float64Array] = {}
        if sample is not None:
            kinds = zip(sample["category_id"].to_pylist(), sample["category_name"].to_pylist(), strict=True)
            for place, kind in enumerate(kinds):
                codes[kind].append(place)
            numbers = {name: _numbers(sample, name) for name in (*SCORES, "area")}
        rows = [
            ClassRow(
                category_id=kind[0],
                name=kind[1] or ("no class" if kind[0] is None else str(kind[0])),
                images=count["images"],
                boxes=count["boxes"],
                masks=count["masks"],
                accepted=count["accepted"],
                medians={name: _median(values[codes[kind]]) for name, values in numbers.items()},
            )
            for kind, count in self._per_class.items()
        ]
        return sorted(rows, key=lambda row: (-row.boxes, row.name))


class _Images:
    """The pass over `images`."""

    def __init__(self) -> None:
        self.rows = 0
        self.source_bytes = 0
        self.model_s = 0.0
        self._sample = _Kept(number=SAMPLE_ROWS)
        self._seconds: Counter[int] = Counter()
        self._boxes = np.zeros(BINS, dtype=np.int64)

    def add(self, table: pa.Table) -> None:
        # A hash of the id would do as well; the place in the tables is as good as random for times.
        order = np.random.default_rng(self.rows).random(table.num_rows)
        self.rows += table.num_rows
        self._sample.offer(order, table.select(list(TIMES)))
        self.source_bytes += pc.sum(table["source_bytes"]).as_py() or 0
        self.model_s += (pc.sum(table["segment_ms"]).as_py() or 0.0) / 1000
        seconds = np.asarray(table["processed_at"].cast(pa.int64()), dtype=np.int64) // 1_000_000
        for second, number in zip(*np.unique(seconds, return_counts=True), strict=True):
            self._seconds[int(second)] += int(number)
        boxes = np.asarray(table["num_boxes"], dtype=np.int64).clip(0, BINS - 1)
        self._boxes += np.bincount(boxes, minlength=BINS)

    def boxes_histogram(self) -> Histogram:
        return Histogram(
            name="boxes per image", low=0, high=BINS, counts=self._boxes, accepted=np.zeros_like(self._boxes)
        )

    def times(self) -> dict[str, tuple[float, float] | None]:
        found: dict[str, tuple[float, float] | None] = {}
        for name in TIMES:
            values = np.zeros(0) if self._sample.rows is None else _numbers(self._sample.rows, name)
            values = values[~np.isnan(values)]
            found[name] = (
                (float(np.percentile(values, 50)), float(np.percentile(values, 95))) if len(values) else None
            )
        return found

    def pace(self, spans: int = 60) -> Pace | None:
        if len(self._seconds) < 2:
            return None
        start, stop = min(self._seconds), max(self._seconds) + 1
        span = max(1.0, (stop - start) / spans)
        counts = [0] * int(np.ceil((stop - start) / span))
        for second, number in self._seconds.items():
            counts[int((second - start) / span)] += number
        return Pace(start_s=start, span_s=span, counts=counts)


def _numbers(table: pa.Table, name: str) -> Float64Array:
    column = (
        table[name].cast(pa.int8()) if pa.types.is_boolean(table.schema.field(name).type) else table[name]
    )
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _bin(values: Float64Array, *, log: bool) -> npt.NDArray[np.int64]:
    """The bin of each value; -1 for NaN, and for an empty mask where the axis is logarithmic."""
    known = ~np.isnan(values) & (values > 0 if log else np.True_)
    finite = np.nan_to_num(values)
    if log:
        return _clipped(np.log10(np.maximum(finite, 1e-9)) * (BINS / 8), known)
    # In float32, as the columns are: 0.7 stands in the bin from 0.7 on, as a filter at 0.7 keeps it.
    return _clipped(finite.astype(np.float32) * np.float32(BINS), known)


def _clipped(scaled: npt.NDArray[Any], known: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return np.where(known, np.clip(scaled, 0, BINS - 1).astype(np.int64), -1)


def _codes(table: pa.Table, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """A number for each row that is equal for equal values of these columns."""
    code = np.zeros(table.num_rows, dtype=np.int64)
    for name in names:
        column = table[name].combine_chunks().dictionary_encode(null_encoding="encode")
        code = code * (len(column.dictionary) + 1) + np.asarray(column.indices, dtype=np.int64)
    return code


def _box_iou(one: Float64Array, other: Float64Array) -> Float64Array:
    """IoU of boxes xywh, row by row."""
    low = np.maximum(one[:, :2], other[:, :2])
    high = np.minimum(one[:, :2] + one[:, 2:], other[:, :2] + other[:, 2:])
    both = np.clip(high - low, 0, None).prod(axis=1)
    union = one[:, 2:].prod(axis=1) + other[:, 2:].prod(axis=1) - both
    return np.asarray(np.divide(both, union, out=np.zeros_like(both), where=union > 0), dtype=np.float64)


def _median(values: Float64Array) -> float | None:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else None
