"""The working truth: one Parquet file a unit, written once, whole, under the name of unit and generation.

`units/00001234.g0.parquet` is created if absent and
never replaced: a retry writes the next generation, and the highest one counts. What is committed is
what a listing shows; there are no other markers.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pyarrow as pa

from hqlabel.pipeline import schema
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.job_context import JobContext, UnitOutcome
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.count_masks import count_unit

_KEY = re.compile(r"units/(\d{8,})\.g(\d+)\.parquet")


@dataclass(frozen=True, kw_only=True)
class CommittedUnit:
    """One unit's file in the store."""

    unit_id: int
    generation: int
    key: str
    size: int
    etag: str | None = None


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


def list_committed(store: Store, first_generation: int = 0) -> dict[int, CommittedUnit]:
    """Return the highest generation of every committed unit, by unit id, ascending; from one listing.

    `first_generation`: of the job's plan (`JobContext.first_generation`).
    """
    generations = [unit for unit in list_generations(store) if unit.generation >= first_generation]
    newest = {unit.unit_id: unit for unit in sorted(generations, key=lambda one: one.generation)}
    return dict(sorted(newest.items()))


def list_generations(store: Store) -> list[CommittedUnit]:
    """Return every unit's file, older generations too, in order of their keys."""
    parsed = [(entry, parse_key(entry.key)) for entry in store.list("units/")]
    return [
        CommittedUnit(unit_id=ids[0], generation=ids[1], key=entry.key, size=entry.size, etag=entry.etag)
        for entry, ids in parsed
        if ids is not None
    ]


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
