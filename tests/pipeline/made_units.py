"""Plans and finished units made from a seed, for tests of what is done with them."""

from __future__ import annotations

import dataclasses
import datetime as dt

import numpy as np
import pyarrow as pa
from pycocotools import mask as coco_mask

from hqlabel.model.records import Instances
from hqlabel.pipeline import schema
from hqlabel.pipeline.arrow_lists import table_sha256
from hqlabel.pipeline.image_result import ImageResult, ResolvedBoxes
from hqlabel.pipeline.job_context import AccessRules, BoxRules, JobContext, Place, Weights
from hqlabel.pipeline.job_state.job_file import Job, identity_of, open_job
from hqlabel.pipeline.planning.make_plan import Plan, write_plan
from hqlabel.pipeline.settings import Limits, ModelSettings
from hqlabel.pipeline.stages.box_prompts import resolve_boxes
from hqlabel.pipeline.storage.checksummed_parquet import write_body
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.unit_checks import check_against_plan
from hqlabel.pipeline.tables.unit_files import footer, put_unit
from hqlabel.pipeline.tables.unit_table import build_unit_table

SIZE_HW = (40, 60)
WHEN = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def make_context(output: str = "/nowhere", *, images_per_unit: int = 4, run_id: str = "run-1") -> JobContext:
    return JobContext(
        output=Place(uri=output),
        plan_sha256="p" * 64,
        images_per_unit=images_per_unit,
        run_id=run_id,
        weights=Weights(source="w", sha256="5" * 64, license="apache-2.0", architecture="vit_test"),
        model=ModelSettings(dtype="float32", boxes_per_call=16),
        box_rules=BoxRules(),
        access=AccessRules(),
        limits=Limits(),
        lineage={"code_version": "test"},
    )


def planned_box(xyxy=(5.0, 5.0, 25.0, 20.0), **fields) -> dict:
    blank = dict.fromkeys(field.name for field in schema.PLAN_BOX)
    return blank | {"given": list(xyxy), "score": 0.5, "category_id": 1, "category_name": "cat"} | fields


def planned_image(image_id: str = "a", boxes: list | None = None, unit_id: int = 0, **fields) -> dict:
    row = {"unit_id": unit_id, "image_id": image_id, "image_uri": f"s3://b/{image_id}.jpg", "boxes": boxes}
    return row | {"error_code": None, "error_message": None} | fields


def plan_table(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema.PLAN)


def resolve(boxes: list[dict], **fields) -> ResolvedBoxes:
    """The boxes of one image as the pipeline resolves them, with some fields put in by the test."""
    return dataclasses.replace(resolve_boxes(boxes, BoxRules(), upright_size_hw=SIZE_HW), **fields)


def draw(xyxy, size_hw=SIZE_HW) -> np.ndarray:
    mask = np.zeros(size_hw, np.uint8)
    x1, y1, x2, y2 = (int(v) for v in xyxy)
    mask[y1 : max(y2, y1), x1 : max(x2, x1)] = 1
    return mask


def segment(masks: list[np.ndarray], **fields) -> Instances:
    rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
    boxes = [coco_mask.toBbox(rle) for rle in rles]
    values = {
        "size_hw": masks[0].shape if masks else SIZE_HW,
        "counts": tuple(rle["counts"].decode() for rle in rles),
        "area": np.array([int(coco_mask.area(rle)) for rle in rles], dtype=np.int64),
        "bbox_xywh": np.array(boxes, dtype=np.float32).reshape(-1, 4),
        "predicted_iou": np.linspace(0.5, 1.01, len(masks)).astype(np.float32),
        "stability_score": np.linspace(0.9, 0.8, len(masks)).astype(np.float32),
    }
    return Instances(**(values | fields))


def labelled(planned: dict, **fields) -> ImageResult:
    """The result of an image whose masks are its usable boxes, drawn."""
    boxes = resolve(planned["boxes"])
    masks = [draw(xyxy) for xyxy in boxes.prompt_xyxy[boxes.usable]]
    values = {
        "planned": planned, "size_hw": SIZE_HW, "stored_size_hw": SIZE_HW, "boxes": boxes,
        "instances": segment(masks), "source_bytes": 100, "source_etag": "tag",
        "fetch_ms": 1.0, "decode_ms": 2.0, "segment_ms": 3.0,
    }  # fmt: skip
    return ImageResult(**(values | fields))


def make_plan(num_images: int, *, images_per_unit: int = 4, seed: int = 0) -> pa.Table:
    """A plan of images with 0 to 4 boxes, some of them bad, sorted by id."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(num_images):
        boxes = []
        for _ in range(n % 5):
            x, y = rng.integers(0, 40), rng.integers(0, 20)
            wide, high = rng.integers(-3, 15), rng.integers(4, 15)
            boxes.append(planned_box((float(x), float(y), float(x + wide), float(y + high))))
        rows.append(planned_image(f"img-{n:05d}.jpg", boxes, n // images_per_unit))
    return plan_table(rows)


def finish(planned: dict, *, fail: bool = False) -> ImageResult:
    """The result of any planned image of `make_plan`."""
    if fail:
        return ImageResult(planned=planned, error_code="not_found", error_message="404")
    if not planned["boxes"]:
        return ImageResult(planned=planned)
    boxes = resolve(planned["boxes"])
    if not boxes.usable.any():
        return ImageResult(planned=planned, boxes=boxes, size_hw=SIZE_HW, stored_size_hw=SIZE_HW)
    return labelled(planned)


def unit_of(plan: pa.Table, unit_id: int) -> pa.Table:
    """The plan rows of one unit."""
    return plan.filter(pa.compute.equal(plan["unit_id"], unit_id))


def build_unit(plan: pa.Table, unit_id: int, context: JobContext, *, failing=(), when=WHEN) -> pa.Table:
    rows = unit_of(plan, unit_id)
    results = [finish(row, fail=row["image_id"] in failing) for row in rows.to_pylist()]
    table = build_unit_table(results, context, processed_at=when)
    check_against_plan(table, rows)
    return table


def commit_units(store: Store, plan: pa.Table, context: JobContext, unit_ids, *, failing=(), generation=0):
    """Each unit built, checked and committed."""
    for unit_id in unit_ids:
        table = build_unit(plan, unit_id, context, failing=failing)
        assert put_unit(store, unit_id, generation, write_body(table, footer(context)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeJob:
    """A job in a store with its plan, of which some units are committed."""

    store: Store
    job: Job
    plan: pa.Table

    @property
    def context(self) -> JobContext:
        return self.job.context

    def commit(self, unit_ids=None, **how) -> None:
        """These units committed; all when not said."""
        chosen = range(self.job.units) if unit_ids is None else unit_ids
        commit_units(self.store, self.plan, self.context, chosen, **how)


def make_job(
    store: Store, num_images: int = 22, *, units_per_part: int = 2, images_per_unit: int = 4
) -> MadeJob:
    """A job of 22 images in 6 units of 4, 2 units a part; nothing committed yet."""
    rows = make_plan(num_images, images_per_unit=images_per_unit)
    sha256 = table_sha256(rows)
    plan = Plan(
        table=rows,
        summary=None,  # only people read it
        categories=(),
        sha256=sha256,
        images_per_unit=images_per_unit,
        access=AccessRules(),
    )
    context = dataclasses.replace(
        make_context(images_per_unit=images_per_unit), output=store.place, plan_sha256=sha256
    )
    job = Job(
        identity=identity_of(context, inputs={}, limit=None, protocol=1),
        context=context,
        plan={"images": num_images, "boxes": 0, "units": -(-num_images // images_per_unit)},
        categories=({"id": 1, "name": "cat"},),
        units_per_part=units_per_part,
    )
    job = open_job(store, job)
    write_plan(store, plan)
    return MadeJob(store=store, job=job, plan=rows)


def footer_of(file) -> dict[str, str]:
    """The `hqlabel.` entries of an opened Parquet file's footer, without the prefix, by name."""
    entries = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
    ours = {key: value for key, value in sorted(entries.items()) if key.startswith("hqlabel.")}
    return {key.removeprefix("hqlabel."): value for key, value in ours.items()}
