"""What is counted: images by outcome, boxes, and their masks; of a unit, a part, a job."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline.tables.lineage import devices_of


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over images. `boxes`: given. `masks`: boxes with a mask of at least one pixel. `empty`: boxes
    whose mask has none. `status`, `failed`: images by status and error code. `rejected`: boxes by reason; all
    that lost to a better mask are `nms`. `devices`: units by the kinds of device that made rows of them.
    """

    images: int = 0
    boxes: int = 0
    masks: int = 0
    accepted: int = 0
    status: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    empty: int = 0
    devices: Mapping[str, int] = field(default_factory=dict)


def add_counts(many: Sequence[Counts]) -> Counts:
    """Return the sum."""

    def by_name(name: str) -> dict[str, int]:
        total: Counter[str] = Counter()
        for one in many:
            total.update(getattr(one, name))
        return dict(sorted(total.items()))

    return Counts(
        images=sum(one.images for one in many),
        boxes=sum(one.boxes for one in many),
        masks=sum(one.masks for one in many),
        accepted=sum(one.accepted for one in many),
        status=by_name("status"),
        failed=by_name("failed"),
        rejected=by_name("rejected"),
        empty=sum(one.empty for one in many),
        devices=by_name("devices"),
    )


def count_masks(images: pa.Table, areas: pa.Array) -> Counts:
    """Return the counts of images (`status`, `error_code`) and of the masks of all their boxes by `areas`."""
    failed = Counter(code for code in images["error_code"].to_pylist() if code is not None)
    return Counts(
        images=images.num_rows,
        boxes=len(areas),
        masks=pc.sum(pc.greater(areas, 0)).as_py() or 0,
        empty=pc.sum(pc.equal(areas, 0)).as_py() or 0,
        status=dict(sorted(Counter(images["status"].to_pylist()).items())),
        failed=dict(sorted(failed.items())),
    )


def count_unit(table: pa.Table) -> Counts:
    """Return the counts of a unit's table (schema.UNIT)."""
    counts = count_masks(table, table["instances"].combine_chunks().flatten().field("area"))
    return dataclasses.replace(counts, devices=dict.fromkeys(devices_of(table), 1))


def counts_of(images: pa.Table, instances: pa.Table) -> Counts:
    """Return the sums over published rows: schema.IMAGES, and schema.INSTANCES of the same images."""
    reasons = instances["reject_reason"].to_pylist()
    rejected = Counter(reason.split(":")[0] for reason in reasons if reason is not None)
    return dataclasses.replace(
        count_masks(images, instances["area"]),
        accepted=pc.sum(instances["accepted"]).as_py() or 0,
        rejected=dict(sorted(rejected.items())),
    )
