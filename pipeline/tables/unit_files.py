"""The working truth: one Parquet file a unit, written once, whole, under the name of unit and generation.

`units/00001234.g0.parquet` is created if absent and
never replaced: a retry writes the next generation, and the highest one counts. What is committed is
what a listing shows; there are no other markers.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hqlabel.pipeline import schema
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.job_context import JobContext, UnitOutcome
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.count_masks import count_unit

_KEY = re.compile(r"units/(\d{8,18})\.g(\d{1,18})\.parquet")  # numbers of 64 bits
_AT_A_TIME = 2**16
LISTED_AS_ONE = 10_000
LISTERS = 8

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedUnit:
    """One unit's file in the store."""

    unit_id: int
    generation: int
    key: str
    size: int


class UnitSet(Set[int]):
    """Numbers of units, ascending, at eight bytes each: a job has up to 20 million."""

    def __init__(self, numbers: Numbers) -> None:
        """Take ascending numbers, each of them once."""
        self._numbers = numbers

    def __contains__(self, number: object) -> bool:
        """Return whether the number is one of these."""
        return isinstance(number, (int, np.integer)) and self.place_of(int(number)) is not None

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers."""
        for start in range(0, len(self._numbers), _AT_A_TIME):  # as one list they would take 40 bytes each
            yield from self._numbers[start : start + _AT_A_TIME].tolist()

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._numbers)

    @classmethod
    def _from_iterable(cls, numbers: Iterable[int]) -> set[int]:  # type: ignore[override]
        return set(numbers)

    def place_of(self, number: int) -> int | None:
        """Return how many of these are below a number that is one of them; None when it is none."""
        numbers = self._numbers
        if 0 <= number < len(numbers) and numbers[number] == number:
            return number  # in a job that has all units so far
        place = int(np.searchsorted(numbers, number))
        return place if place < len(numbers) and numbers[place] == number else None

    def within(self, wanted: range) -> slice:
        """Return the places of those that are in a range of step 1."""
        first, stop = np.searchsorted(self._numbers, [wanted.start, wanted.stop])
        return slice(int(first), int(stop))

    def missing(self, wanted: range) -> Numbers:
        """Return the numbers of a range of step 1 that are not among these."""
        is_missing = np.ones(len(wanted), np.bool_)
        is_missing[self._numbers[self.within(wanted)] - wanted.start] = False
        return np.flatnonzero(is_missing) + wanted.start

    def outside(self, ranges: Iterable[range]) -> Numbers:
        """Return those that are in none of some ranges."""
        is_outside = np.ones(len(self), np.bool_)
        for one in ranges:
            is_outside[self.within(one)] = False
        return self._numbers[is_outside]

    def union(self, ranges: Iterable[range]) -> UnitSet:
        """Return these and the numbers of some ranges."""
        parts = [np.arange(one.start, one.stop, dtype=np.int64) for one in ranges]
        return UnitSet(np.unique(np.concatenate([self._numbers, *parts]))) if parts else self


class CommittedUnits(Mapping[int, CommittedUnit]):
    """The file of every committed unit, by its number, ascending; at 24 bytes each."""

    def __init__(self, numbers: Numbers, generations: Numbers, sizes: Numbers) -> None:
        """Take columns of equal length; the numbers are ascending, each of them once."""
        self.numbers = UnitSet(numbers)
        self._columns = (numbers, generations, sizes)

    def __getitem__(self, unit_id: int) -> CommittedUnit:
        """Return a unit's file; KeyError when it is not committed."""
        place = self.numbers.place_of(unit_id)
        if place is None:
            raise KeyError(unit_id)
        return self.nth(place)

    def nth(self, place: int) -> CommittedUnit:
        """Return the file of the unit at this place among them, from 0."""
        return _committed(*(int(column[place]) for column in self._columns))

    def __contains__(self, unit_id: object) -> bool:
        """Return whether a unit is committed."""
        return unit_id in self.numbers

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the units."""
        return iter(self.numbers)

    def __len__(self) -> int:
        """Return how many units are committed."""
        return len(self.numbers)

    def within(self, wanted: range) -> tuple[CommittedUnit, ...]:
        """Return the files of the units of a range of step 1."""
        rows = (column[self.numbers.within(wanted)].tolist() for column in self._columns)
        return tuple(_committed(*row) for row in zip(*rows, strict=True))

    def generations(self, wanted: range) -> dict[int, int]:
        """Return the generation of each unit of a range of step 1 that is committed."""
        place = self.numbers.within(wanted)
        numbers, generations, _ = self._columns
        return dict(zip(numbers[place].tolist(), generations[place].tolist(), strict=True))


def _committed(unit_id: int, generation: int, size: int) -> CommittedUnit:
    key = unit_key(unit_id, generation)
    return CommittedUnit(unit_id=unit_id, generation=generation, key=key, size=size)


def unit_key(unit_id: int, generation: int) -> str:
    """Return the only name of a unit's file."""
    return f"units/{unit_id:08d}.g{generation}.parquet"


def parse_key(key: str) -> tuple[int, int] | None:
    """Return (unit, generation) of a unit's file name, None for any other name."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    unit_id, generation = int(match.group(1)), int(match.group(2))
    return (unit_id, generation) if unit_key(unit_id, generation) == key else None


def list_committed(store: Store, first_generation: int = 0, *, units: int = 0) -> CommittedUnits:
    """Return the highest generation of every committed unit, by unit id, ascending; from one listing.

    `first_generation`: of the job's plan (`JobContext.first_generation`). `units`: of the plan, of which a
    store that lists by prefix is then asked in parallel.
    """
    files = _files(store, _prefixes(units if store.lists_by_prefix else 0))
    files = files[files[:, 1] >= first_generation]
    numbers = files[:, 0]
    is_newest = np.ones(len(numbers), np.bool_)
    is_newest[:-1] = numbers[1:] != numbers[:-1]
    return CommittedUnits(*(np.ascontiguousarray(column) for column in files[is_newest].T))


def list_generations(store: Store) -> list[CommittedUnit]:
    """Return every unit's file, older generations too, in order of units and generations."""
    return [_committed(*row) for row in _files(store, _prefixes(0)).tolist()]


def _prefixes(units: int) -> list[str]:
    """Return prefixes of the keys of so many units, at most 100 for a like number of units each."""
    if units < LISTED_AS_ONE:
        return ["units/"]
    unsaid = len(str(units - 1)) - 2  # digits behind the two that differ first
    return [unit_key(first, 0)[: len("units/") + 8 - unsaid] for first in range(0, units, 10**unsaid)]


def _files(store: Store, prefixes: Sequence[str]) -> Numbers:
    """Return a row of unit, generation and size for every unit's file, in that order."""
    with ThreadPoolExecutor(LISTERS) as pool:
        found = list(pool.map(lambda prefix: _below(store, prefix), prefixes))
    files = np.concatenate(found)
    return files[np.lexsort((files[:, 1], files[:, 0]))]


def _below(store: Store, prefix: str) -> Numbers:
    """Return such rows for the files below a prefix, in any order.

    Each page of the listing is forgotten before the next one: as objects, they take 600 bytes a file.
    """
    found = array("q")
    for page in store.pages(prefix):
        for entry in page:
            ids = parse_key(entry.key)
            if ids is not None:
                found.extend((*ids, entry.size))
    return np.frombuffer(found, np.int64).reshape(-1, 3)


def footer(context: JobContext, device: str = "") -> dict[str, str]:
    """Return the lineage that every Parquet file of a job carries, keys without the `hqlabel.` prefix.

    `device`: the kind of device that made it, where that is one.
    """
    masks = context.model.mask_settings()
    masks |= {"compiled": masks.pop("compile"), "draft_jpeg": context.draft_jpeg}
    entries = {
        "schema_version": schema.SCHEMA_VERSION,
        "run_id": context.run_id,
        "plan_sha256": context.plan_sha256,
        "weights_sha256": context.weights.sha256,
        "weights_license": context.weights.license or "unknown",
        "architecture": context.weights.architecture,
        "input_side": context.weights.input_side,
        **masks,
        "box_format": context.box_rules.box_format,
        "box_frame": context.box_rules.box_frame,
        "exif_rule": "orientation applied; sizes, boxes and masks are upright",
        "rle": "COCO compressed, column-major, size is [height, width]",
        "bbox_format": "xywh, absolute upright pixels",
        **_box_lineage(context),
        "limits": json.dumps(context.limits.identity()),
        "note": context.weights.note or "",
        **context.lineage,
        **({"device": device} if device else {}),
    }
    return {name: str(value) for name, value in sorted(entries.items())}


def _box_lineage(context: JobContext) -> dict[str, object]:
    """Return where the boxes come from, and the rules by which some have no mask."""
    detector, rules = context.detector, context.box_rules
    changed = rules.model_dump(exclude={"box_format", "box_frame"}, exclude_defaults=True)
    entries: dict[str, object] = {f"box_{name}": value for name, value in changed.items()}
    if detector is None:
        return entries
    return entries | {
        "detector": detector.title,
        "detector_fingerprint": detector.fingerprint,
        "detector_license": detector.license or "unknown",
        "detector_longest_side": detector.longest_side,
        "detector_score_threshold": detector.score_threshold,
        "detector_max_detections": detector.max_detections,
        "detector_prompts": json.dumps(dict(detector.prompts), ensure_ascii=False),
    }


def put_unit(store: Store, unit_id: int, generation: int, body: bytes) -> bool:
    """Put the unit's generation into the store; return True when it holds this body, False for another.

    "Already there" is success: the same identity makes the same masks. What is stored there is read back
    and verified before the unit counts as done.

    Raises:
        DamageFound: what is stored under the unit's name does not verify.
    """
    key = unit_key(unit_id, generation)
    store.put_if_absent(key, body)
    visit("commit.created")
    stored = store.read(key)
    if stored != body:
        checksummed_parquet.read_body(stored, schema.UNIT, f"unit {unit_id} ({key})")
    visit("commit.done")
    return stored == body


def read_committed(store: Store, unit: CommittedUnit) -> pa.Table:
    """Return the unit's rows: seal, page checksums, whole schema verified; DamageFound with unit and file.

    Its footer is the metadata of the table: see `footer_of`.
    """
    return checksummed_parquet.read_body(
        store.read(unit.key), schema.UNIT, f"unit {unit.unit_id} ({unit.key})", with_footer=True
    )


def read_generation(store: Store, unit_id: int, generation: int) -> pa.Table:
    """Return the rows of one generation of a unit, without a listing of the store; see `read_committed`."""
    key = unit_key(unit_id, generation)
    return read_committed(store, CommittedUnit(unit_id=unit_id, generation=generation, key=key, size=0))


def replace_rows(table: pa.Table, redone: pa.Table) -> pa.Table:
    """Return the unit's table with the rows of `redone` in the place of those with their image_id.

    For a retry: rows that were good keep every value, times and run_id too. ValueError when `redone`
    has an image that the unit has not.
    """
    place = {image_id: row for row, image_id in enumerate(redone["image_id"].to_pylist())}
    unknown = set(place) - set(table["image_id"].to_pylist())
    if unknown:
        raise ValueError(f"redone images that are not of this unit: {sorted(unknown)[:3]!a}")
    both = pa.concat_tables([one.replace_schema_metadata() for one in (table, redone)])
    ids = table["image_id"].to_pylist()
    rows = [table.num_rows + place[i] if i in place else row for row, i in enumerate(ids)]
    return both.take(pa.array(rows, pa.int64())).combine_chunks()


def outcome_of(
    table: pa.Table, unit_id: int, generation: int, *, size: int, created: bool, seconds: float
) -> UnitOutcome:
    """Return what the driver learns of a committed unit."""
    counts = count_unit(table)
    return UnitOutcome(
        unit_id=unit_id,
        generation=generation,
        images=counts.images,
        labelled=counts.status.get("labelled", 0),
        no_boxes=counts.status.get("no_boxes", 0),
        failed=counts.status.get("failed", 0),
        instances=counts.boxes,
        bytes=size,
        repeated=not created,
        failed_by_code=counts.failed,
        seconds=seconds,
    )
