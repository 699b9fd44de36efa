"""manifest.json: which parts are published, from which units, with which filters, and their sums.

It is written before the first part is replaced, without the parts in question (`publishing`), and
again when all are stored. So a part that the manifest names is always the one it describes, however a
publish ends, and what is uncertain is published again. Each is written over the one that its writer has
read, or not at all: a command that slept while another wrote changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter
from pydantic_core import from_json

from hqlabel.pipeline.errors import DamageFound, JobRefused
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.job_state.job_file import MOST_UNITS
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.storage.backend import Entry
from hqlabel.pipeline.storage.bounded_json import MOST_BYTES, reason
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.count_masks import Counts, add_counts

MANIFEST_KEY = "manifest.json"
CATEGORIES_KEY = "categories.json"
MANIFEST_FORMAT = 1
MOST_NAME_CHARS = 100
MOST_COUNT = 2**63


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """One published file: its key, rows, bytes, and the sha256 (hex) of these bytes.

    `seal`: the one in its footer, by which a reader tells without reading all of it that this is the file.
    Manifests of earlier versions have none.
    """

    key: str
    rows: int
    bytes: int
    sha256: str
    seal: str = ""


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
    `cleaned`: the working files of the parts may be gone, and the parts are the truth. `revision`: rises
    by one with every writing, so that no two manifests of an output are equal.
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
    revision: int = 0

    @property
    def counts(self) -> Counts:
        """Sums over all parts."""
        return add_counts([part.counts for part in self.parts])

    @property
    def published_units(self) -> int:
        """How many units the parts hold."""
        return sum(part.stop_unit - part.first_unit for part in self.parts)


TABLES: tuple[Literal["images", "instances"], ...] = ("images", "instances")
_PART = re.compile(r"(images|instances)/part-(\d{5,})\.parquet")


def part_key(table: Literal["images", "instances"], index: int) -> str:
    """Return the only name of a published file."""
    return f"{table}/part-{index:05d}.parquet"


@dataclass(frozen=True, kw_only=True)
class StoredManifest:
    """What a store has for a manifest. `entry`: its version, None when there is none.

    `manifest`: None when there is none or it is damaged; `damage` then says what is wrong, if anything is.
    """

    entry: Entry | None = None
    manifest: Manifest | None = None
    damage: str | None = None


def write_manifest(store: Store, manifest: Manifest, seen: Entry | None) -> Entry:
    """Write the manifest over the version that was `seen` (None: over nothing); return its own version.

    Raises:
        JobRefused: another one is there by now, so what this one is based on is no longer current.
    """
    content = {
        "product": "hqlabel",
        "format": MANIFEST_FORMAT,
        "state": manifest.state,
        "counts": dataclasses.asdict(manifest.counts),
        **{k: v for k, v in dataclasses.asdict(manifest).items() if k not in ("state", "parts")},
        "filters": manifest.filters.model_dump(),
        "parts": [dataclasses.asdict(part) for part in manifest.parts],
    }
    body = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    visit("manifest.writing")
    there = store.fetch(MANIFEST_KEY) if store.put_if_unchanged(MANIFEST_KEY, body, seen) else None
    if there is None or there.data != body:
        raise JobRefused(
            f"{store.place.uri}: another command has published or cleaned here meanwhile; what it wrote "
            "stands, and nothing of this command was put over it. Start the command again."
        )
    return Entry(key=MANIFEST_KEY, size=there.size, etag=there.etag)


def look_for_manifest(store: Store) -> StoredManifest:
    """Return the store's manifest with its version, or what is wrong with it."""
    try:
        there = store.fetch(MANIFEST_KEY, most=MOST_BYTES)
    except DamageFound:
        damage = f"has over {MOST_BYTES:,} bytes, which no such file of hqlabel has"
        return StoredManifest(entry=store.head(MANIFEST_KEY), damage=damage)
    if there is None:
        parts = any(_PART.fullmatch(one.key) for table in TABLES for one in store.list(f"{table}/"))
        return StoredManifest(damage="is missing, although tables are here" if parts else None)
    entry = Entry(key=MANIFEST_KEY, size=there.size, etag=there.etag)
    try:
        return StoredManifest(entry=entry, manifest=_parse(there.data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return StoredManifest(entry=entry, damage=f"cannot be read ({reason(error)})")


def read_manifest(store: Store) -> Manifest | None:
    """Return the store's manifest, None when nothing was published; DamageFound when it cannot be read."""
    found = look_for_manifest(store)
    if found.damage:
        raise DamageFound(manifest_damage(store, found.damage))
    return found.manifest


def manifest_damage(store: Store, damage: str) -> str:
    """Return the sentence on a damaged manifest, with the next step."""
    return (
        f"{store.place.uri}/{MANIFEST_KEY} {damage}. `hqlabel publish` makes it again, from the units and "
        "from the tables themselves."
    )


def _parse(body: bytes) -> Manifest:
    content = from_json(body)
    if content["format"] != MANIFEST_FORMAT:
        raise ValueError(f"format {content['format']}, wanted {MANIFEST_FORMAT}")
    for counts in (part["counts"] for part in content["parts"]):
        if "empty" not in counts:  # older manifests count masks without a pixel among the others
            counts["empty"] = int(counts["rejected"].get("empty", 0))
            counts["masks"] -= counts["empty"]
    manifest = TypeAdapter(Manifest).validate_python(content)
    _check_ranges(manifest)
    for part in manifest.parts:
        _check_counts(part.counts)
    return manifest


def _check_counts(counts: Counts) -> None:
    """Raise ValueError unless each count is one, under a name that can be printed."""
    named = dataclasses.asdict(counts)
    of_each = [one if isinstance(one, dict) else {name: one} for name, one in named.items()]
    for name, value in (pair for one in of_each for pair in one.items()):
        if len(name) > MOST_NAME_CHARS or not name.isprintable():
            raise ValueError(f"a name of its counts is {name[:MOST_NAME_CHARS]!r}")
        if not 0 <= value < MOST_COUNT:
            raise ValueError(f"counts of {name} out of range: wanted 0 to 2**63")


def _check_ranges(manifest: Manifest) -> None:
    """Raise ValueError unless the parts' units are of the plan: their ranges are walked unit by unit."""
    if not 0 <= manifest.units <= MOST_UNITS:
        raise ValueError(f"{manifest.units} units, wanted 0 to {MOST_UNITS}")
    end = 0
    for part in sorted(manifest.parts, key=lambda part: part.index):
        if not end <= part.first_unit <= part.stop_unit <= manifest.units:
            raise ValueError(f"part {part.index} has the units {part.first_unit} to {part.stop_unit}")
        end = part.stop_unit
    if manifest.state == "complete" and manifest.published_units != manifest.units:
        raise ValueError(f"complete, but the parts have {manifest.published_units} of {manifest.units} units")
