"""Outputs with known masks: a committed and published job made without a model, and truth to compare with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pycocotools import mask as coco_mask

from hqlabel.pipeline import schema
from hqlabel.pipeline.arrow_lists import table_sha256
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.job_context import AccessRules, BoxRules, Place
from hqlabel.pipeline.job_state.job_file import Job, identity_of, open_job
from hqlabel.pipeline.planning.make_plan import Plan, write_plan
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.stages.box_prompts import resolve_boxes
from hqlabel.pipeline.storage.checksummed_parquet import write_body
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.publish_tables import publish
from hqlabel.pipeline.tables.unit_files import footer, put_unit
from hqlabel.pipeline.tables.unit_table import build_unit_table
from tests.pipeline.made_units import make_context, planned_box, planned_image, segment


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeImage:
    """One image of an output. `masks`: uint8 (H, W) each, one a box; `boxes`: xyxy, default tight ones.

    `error`: a code, for an image that failed. `exif`: its orientation. `etag`: of its file.
    `rules`: which boxes get no mask.
    `crowds`: whether each box has iscrowd 1.
    """

    image_id: str
    size_hw: tuple[int, int] = (60, 80)
    masks: Sequence[np.ndarray] = ()
    boxes: Sequence[Sequence[float]] | None = None
    box_ids: Sequence[str | None] | None = None
    categories: Sequence[tuple[int | None, str | None]] | None = None
    scores: Sequence[float | None] | None = None
    predicted_iou: Sequence[float] | None = None
    uri: str | None = None
    error: str | None = None
    exif: int = 1
    etag: str = "tag"
    crowds: Sequence[bool] | None = None
    rules: BoxRules = dataclasses.field(default_factory=BoxRules)


def tight_box(mask: np.ndarray) -> list[float]:
    x, y, w, h = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask))).tolist()
    return [x, y, x + w, y + h]


def make_output(
    folder: Path,
    images: Sequence[MadeImage],
    *,
    images_per_unit: int = 4,
    units_per_part: int = 2,
    filters: FilterSettings | None = None,
) -> str:
    """The folder, holding the published tables of a complete job over `images`."""
    store = Store(Place(uri=str(folder)))
    images = sorted(images, key=lambda one: one.image_id.encode())
    rows = [_planned(one, place // images_per_unit) for place, one in enumerate(images)]
    plan = pa.Table.from_pylist(rows, schema=schema.PLAN)
    sha256 = table_sha256(plan)
    context = dataclasses.replace(
        make_context(images_per_unit=images_per_unit), output=store.place, plan_sha256=sha256
    )
    units = -(-len(rows) // images_per_unit)
    job = open_job(
        store,
        Job(
            identity=identity_of(context, inputs={}, limit=None, protocol=1),
            context=context,
            plan={"images": len(rows), "boxes": 0, "units": units},
            categories=_categories(images),
            units_per_part=units_per_part,
        ),
    )
    write_plan(
        store,
        Plan(table=plan, summary=None, categories=(), sha256=sha256, images_per_unit=images_per_unit,
             access=AccessRules()),
    )  # fmt: skip
    for unit in range(units):
        mine = slice(unit * images_per_unit, (unit + 1) * images_per_unit)
        results = [_result(one, row) for one, row in zip(images[mine], rows[mine], strict=True)]
        put_unit(store, unit, 0, write_body(build_unit_table(results, job.context), footer(job.context)))
    publish(store, job, filters or FilterSettings(), require_owner=lambda what: None)
    return str(folder)


def _categories(images: Sequence[MadeImage]) -> tuple[dict, ...]:
    """As planning lists them: every id, with its name where a box has one."""
    found: dict[int, str | None] = {}
    for number, name in (kind for one in images for kind in one.categories or ()):
        if number is not None:
            found[number] = found.get(number) or name
    return tuple({"id": number, "name": found[number]} for number in sorted(found))


def _planned(one: MadeImage, unit_id: int) -> dict:
    count = len(one.masks)
    boxes = one.boxes if one.boxes is not None else [tight_box(mask) for mask in one.masks]
    box_ids = one.box_ids or [None] * count
    kinds = one.categories or [(None, None)] * count
    scores = one.scores or [None] * count
    crowds = one.crowds or [False] * count
    planned = [
        planned_box(
            box, box_id=box_id, category_id=kind[0], category_name=kind[1], score=score, iscrowd=crowd or None
        )
        for box, box_id, kind, score, crowd in zip(boxes, box_ids, kinds, scores, crowds, strict=True)
    ]
    return planned_image(one.image_id, planned, unit_id, image_uri=one.uri or f"/photos/{one.image_id}")


def _result(one: MadeImage, row: dict) -> ImageResult:
    if one.error:
        return ImageResult(planned=row, error_code=one.error, error_message=f"{one.error} happened")
    if not one.masks:
        return ImageResult(planned=row)
    resolved = resolve_boxes(row["boxes"], one.rules, upright_size_hw=one.size_hw)
    masks = [mask for mask, usable in zip(one.masks, resolved.usable, strict=True) if usable]
    fields = {}
    if one.predicted_iou is not None:
        fields["predicted_iou"] = np.array(one.predicted_iou, np.float32)
    stored = one.size_hw[::-1] if one.exif in (5, 6, 7, 8) else one.size_hw
    return ImageResult(
        planned=row, size_hw=one.size_hw, stored_size_hw=stored, exif_orientation=one.exif,
        boxes=resolved, instances=segment(masks, **fields) if masks else None,
        source_bytes=1000, source_etag=one.etag,
        fetch_ms=3.0, decode_ms=4.0, segment_ms=30.0 * len(masks),
    )  # fmt: skip


def blob(seed: int, size_hw: tuple[int, int] = (60, 80)) -> np.ndarray:
    """A mask of two ellipses with a hole, drawn from a seed; never empty."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    rows, columns = np.ogrid[:height, :width]
    mask = np.zeros(size_hw, np.uint8)
    for value in (1, 1, 0):
        reach = rng.uniform(0.08, 0.3, 2) * size_hw if value else rng.uniform(0.02, 0.06, 2) * size_hw
        cy, cx = rng.uniform(0.25, 0.75, 2) * size_hw
        mask[((rows - cy) / reach[0]) ** 2 + ((columns - cx) / reach[1]) ** 2 <= 1] = value
    mask[height // 2, width // 2] = 1
    return mask


def rle_of(mask: np.ndarray) -> dict:
    """A mask as COCO's JSON has it: size and compressed counts as text."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def lengths_of(mask: np.ndarray) -> list[int]:
    """The runs of a mask as COCO's crowds have them: outside and inside by turns, down the columns."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def write_truth(
    path: Path, images: Sequence[dict], annotations: Sequence[dict], names: dict[int, str]
) -> str:
    """The path of a COCO instances file with these records; areas and boxes are worked out."""
    full = []
    for number, one in enumerate(annotations, start=1):
        mask = one["mask"]
        x1, y1, x2, y2 = tight_box(mask)
        full.append(
            {"id": one.get("id", number), "image_id": one["image_id"], "category_id": one["category_id"],
             "iscrowd": one.get("iscrowd", 0), "bbox": [x1, y1, x2 - x1, y2 - y1],
             "area": float(mask.sum()), "segmentation": one.get("segmentation", rle_of(mask))}
        )  # fmt: skip
    categories = [{"id": number, "name": name} for number, name in names.items()]
    path.write_text(json.dumps({"images": list(images), "annotations": full, "categories": categories}))
    return str(path)
