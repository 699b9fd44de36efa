"""The plan of a job: every image once, with its boxes, in fixed order, cut into numbered units.

Made once from the inputs, it is in the output as `plan/<first 16 digits of its sha256>/`, 64 units a
file and one Parquet row group a unit, so that a worker reads its unit from one range of one file. The
same images and boxes give the same plan, bit for bit, in whatever order the inputs name them.

One million images with three boxes each take about 7 s and 1 GB (docs/dev/measurements.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa

from hqlabel.pipeline.arrow_lists import table_sha256
from hqlabel.pipeline.errors import UsageError
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.inputs.image_box_lists import BoxList
from hqlabel.pipeline.inputs.open_inputs import allowed_access, check_columns, read_boxes, read_images
from hqlabel.pipeline.job_context import AccessRules, BoxRules
from hqlabel.pipeline.job_state.plan_files import UNITS_PER_FILE, plan_key
from hqlabel.pipeline.planning.join_boxes_to_images import images_of, join
from hqlabel.pipeline.planning.plan_summary import (
    JoinedInputs,
    PlanSummary,
    checked_boxes,
    count_rows,
    summarise,
)
from hqlabel.pipeline.planning.plan_table import (
    Categories,
    RefusedUris,
    number_categories,
    plan_table,
    refuse_if_a_flag_is_missing,
)
from hqlabel.pipeline.schema import PLAN, SCHEMA_VERSION
from hqlabel.pipeline.settings import InputSettings
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.read_objects import one_version_each

WRITERS = 4  # compressing takes cores, and putting waits


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`table`: schema.PLAN in the order of image ids. `categories`: {"id", "name"} by id.

    `access`: the rules by which its uris were checked; workers check by the same. `sha256`: of every
    row, units included, whatever the order of the inputs.
    """

    table: pa.Table
    summary: PlanSummary
    categories: Categories
    sha256: str
    images_per_unit: int
    access: AccessRules


def make_plan(
    settings: InputSettings, access: AccessRules | None = None, *, images_per_unit: int = 64
) -> Plan:
    """Return the plan of the inputs; nothing is written and no image is opened.

    `access`: further local roots, allowed schemes and storage options, added to what the inputs imply.

    Raises:
        UsageError: settings that contradict each other. JobRefused: inputs that are unreadable, do not fit
            each other, or name an image twice; most images may not be read, and a flag would allow it.
    """
    if settings.images is None and settings.boxes is None:
        raise UsageError("neither images nor boxes: name with --images or --boxes what to label")
    with one_version_each():
        return _make_plan(settings, allowed_access(settings, access), images_per_unit)


def _make_plan(settings: InputSettings, access: AccessRules, images_per_unit: int) -> Plan:
    inputs = _read_and_join(settings, access, images_per_unit)
    boxes, categories = _numbered(inputs)
    inputs = replace(inputs, boxes=boxes)
    joined = inputs.joined
    order = joined.listed()[: settings.limit]
    table = plan_table(
        joined, order, boxes, access, doubted=inputs.images.doubted, images_per_unit=images_per_unit
    )
    refuse_if_a_flag_is_missing(RefusedUris.among(table, access))
    columns = boxes.boxes.column_names if boxes else ()
    counts = count_rows(table, joined.mention[order.to_numpy()] >= 0, columns)
    return Plan(
        table=table,
        summary=summarise(inputs, counts, checked_boxes(inputs), listed=len(joined.listed())),
        categories=categories,
        sha256=_sha256(table),
        images_per_unit=images_per_unit,
        access=access,
    )


def _sha256(table: pa.Table) -> str:
    """Return the hash of every row. For pictures that are files, as earlier versions made it."""
    column = table.column("source_version")
    return table_sha256(table.drop_columns(["source_version"]) if column.null_count == len(column) else table)


def _read_and_join(settings: InputSettings, access: AccessRules, images_per_unit: int) -> JoinedInputs:
    boxes = None if settings.boxes is None else read_boxes(settings, access)
    if settings.images is not None:
        images = read_images(settings, access)
    else:
        assert boxes is not None, "images or boxes were given"
        images = images_of(boxes)
    check_columns(settings, [*images.columns, *(boxes.columns if boxes else ())])
    joined = join(images, boxes, allow_unmatched=settings.allow_unmatched)
    return JoinedInputs(
        access=access,
        images_per_unit=images_per_unit,
        images=images,
        boxes=joined.boxes,
        joined=joined,
        rules=rules_of(settings, boxes),
        format_stated=settings.box_format is not None,
    )


def rules_of(settings: InputSettings, boxes: BoxList | None) -> BoxRules:
    """Return the user's setting first, except for an earlier output, which states how its boxes are read.

    Without a box file there are a detector's boxes or none, and those are read as a detector gives them.
    """
    if boxes is None:
        return BoxRules()
    return BoxRules(
        box_format=settings.box_format or boxes.box_format, box_frame=boxes.box_frame or settings.box_frame
    )


def _numbered(inputs: JoinedInputs) -> tuple[BoxList | None, Categories]:
    if inputs.boxes is None:
        return None, ()
    listed = inputs.joined.mention[inputs.joined.mention >= 0]
    used = inputs.boxes.rows_of(listed) if inputs.joined.unmatched.boxes else None
    boxes = inputs.boxes
    if not boxes.categories:  # COCO results have ids alone; the file that lists their images names them
        boxes = replace(boxes, categories=inputs.images.categories)
    return number_categories(boxes, used)


def write_plan(store: Store, plan: Plan) -> None:
    """Write every file of the plan that the store does not have yet."""
    write_files(
        store,
        plan.sha256,
        plan.images_per_unit,
        plan.table,
        0,
        missing_files(store, plan.sha256, plan.table.num_rows, plan.images_per_unit),
    )
    visit("plan.written")


def missing_files(store: Store, sha256: str, images: int, images_per_unit: int) -> list[int]:
    """Return the numbers of the files of a plan that the store does not have."""
    there = {entry.key for entry in store.list(f"plan/{sha256[:16]}/")}
    files = range(-(-images // (UNITS_PER_FILE * images_per_unit)))
    return [index for index in files if plan_key(sha256, index) not in there]


def write_files(
    store: Store, sha256: str, images_per_unit: int, table: pa.Table, first: int, files: Sequence[int]
) -> None:
    """Write some files of a plan. `table`: its rows from file number `first` on, to the last of these."""
    footer = {"schema_version": str(SCHEMA_VERSION), "plan_sha256": sha256}
    rows_per_file = UNITS_PER_FILE * images_per_unit

    def write(index: int) -> None:
        rows = table.slice((index - first) * rows_per_file, rows_per_file)
        sink = checksummed_parquet.ParquetSink(PLAN, footer, row_group_rows=images_per_unit)
        for start in range(0, rows.num_rows, images_per_unit):
            sink.write(rows.slice(start, images_per_unit))
        store.put_if_absent(plan_key(sha256, index), sink.finish())
        visit("plan.file")

    with ThreadPoolExecutor(max_workers=WRITERS) as pool:
        for _ in pool.map(write, files):
            pass
