"""manifest.json: which parts are published, from which units, with which filters, and their sums.

It is written before the first part is replaced, without the parts in question (`publishing`), and
again when all are stored. So a part that the manifest names is always the one it describes, however a
publish ends, and what is uncertain is published again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter
from pydantic_core import from_json

from hqlabel.pipeline.errors import DamageFound
from hqlabel.pipeline.job_state.job_file import MOST_UNITS
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.storage.bounded_json import MOST_BYTES, reason
from hqlabel.pipeline.storage.output_store import NotFound, Store
from hqlabel.pipeline.tables.count_masks import Counts, add_counts

MANIFEST_KEY = "manifest.json"
CATEGORIES_KEY = "categories.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """One published file: its key, rows, bytes, and the sha256 (hex) of these bytes."""

    key: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """The two files of one range of units, first to stop (end-exclusive).

    `generations`: the generation of each unit that was retried; of all others it is 0.
    """

    index: int
    first_unit: int
    stop_unit: int
    generations: Mapping[int, int]
    images: PartFile
    instances: PartFile
    counts: Counts

    def generation_of(self, unit_id: int) -> int:
        """Return the generation of a unit of this part that its rows come from."""
        return self.generations.get(unit_id, 0)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is published. `state`: `complete` (every planned unit), `partial`, or `publishing` (parts
    that are not named may be of the old or the new kind; publish again). `units`: planned.
    `cleaned`: the working files of the parts may be gone, and the parts are the truth.
    """

    state: Literal["complete", "partial", "publishing"]
    run_id: str
    plan_sha256: str
    units: int
    filters: FilterSettings
    parts: tuple[Part, ...]
    published_at: str
    cleaned: bool = False
    lineage: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        """Sums over all parts."""
        return add_counts([part.counts for part in self.parts])

    @property
    def published_units(self) -> int:
        """How many units the parts hold."""
        return sum(part.stop_unit - part.first_unit for part in self.parts)


def part_key(table: Literal["images", "instances"], index: int) -> str:
    """Return the only name of a published file."""
    return f"{table}/part-{index:05d}.parquet"


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Write the manifest into the store."""
    content = {
        "product": "hqlabel",
        "format": MANIFEST_FORMAT,
        "state": manifest.state,
        "counts": dataclasses.asdict(manifest.counts),
        **{k: v for k, v in dataclasses.asdict(manifest).items() if k not in ("state", "parts")},
        "filters": manifest.filters.model_dump(),
        "parts": [dataclasses.asdict(part) for part in manifest.parts],
    }
    store.put(MANIFEST_KEY, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(store: Store) -> Manifest | None:
    """Return the store's manifest, None when nothing was published; DamageFound when it cannot be read."""
    try:
        body = store.read(MANIFEST_KEY, most=MOST_BYTES)
    except NotFound:
        return None
    try:
        content = from_json(body)
        if content["format"] != MANIFEST_FORMAT:
            raise ValueError(f"format {content['format']}, wanted {MANIFEST_FORMAT}")
        for counts in (part["counts"] for part in content["parts"]):
            if "empty" not in counts:  # older manifests count masks without a pixel among the others
                counts["empty"] = int(counts["rejected"].get("empty", 0))
                counts["masks"] -= counts["empty"]
        manifest = TypeAdapter(Manifest).validate_python(content)
        _check_ranges(manifest)
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageFound(
            f"{store.place.uri}/{MANIFEST_KEY} cannot be read ({reason(error)}). "
            "Move it away and publish again: the units are the truth."
        ) from error


def _check_ranges(manifest: Manifest) -> None:
    """Raise ValueError unless the parts' units are of the plan: their ranges are walked unit by unit."""
    if not 0 <= manifest.units <= MOST_UNITS:
        raise ValueError(f"{manifest.units} units, wanted 0 to {MOST_UNITS}")
    end = 0
    for part in sorted(manifest.parts, key=lambda part: part.index):
        if not end <= part.first_unit <= part.stop_unit <= manifest.units:
            raise ValueError(f"part {part.index} has the units {part.first_unit} to {part.stop_unit}")
        end = part.stop_unit


def finished_units(committed: Sequence[int], manifest: Manifest | None) -> set[int]:
    """Return the units that need no work: committed ones, and published ones whose files were cleaned."""
    finished = set(committed)
    if manifest is not None and manifest.cleaned:
        for part in manifest.parts:
            finished.update(range(part.first_unit, part.stop_unit))
    return finished
