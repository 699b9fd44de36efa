"""Whole small jobs made on the spot: pictures in a folder, boxes, a written plan and the job's context."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hqlabel.pipeline.job_context import BoxRules, JobContext, Place, Weights
from hqlabel.pipeline.planning.make_plan import Plan, make_plan, write_plan
from hqlabel.pipeline.settings import InputSettings, Limits, ModelSettings
from hqlabel.pipeline.storage.output_store import Store

SIDE = 64
BOXES = [[4.2, 5.0, 30.7, 40.0], [0.0, 0.0, 12.0, 9.0]]


@dataclass(frozen=True, kw_only=True)
class MadeJob:
    """A planned job; `boxes` by image id as they were given."""

    context: JobContext
    plan: Plan
    boxes: dict[str, list | None]

    @property
    def unit_ids(self) -> list[int]:
        return sorted(set(self.plan.table["unit_id"].to_pylist()))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def noise(seed: int, height: int = 48, width: int = 64) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def make_job(
    folder: Path,
    pictures: dict[str, bytes],
    boxes: dict[str, list | None] | None = None,
    *,
    place: Place | None = None,
    images_per_unit: int = 4,
    limits: Limits | None = None,
    lineage: dict[str, str] | None = None,
    **context,
) -> MadeJob:
    """A job over `pictures` (name to bytes); an image that `boxes` leaves out has BOXES."""
    root = folder / "pictures"
    root.mkdir(parents=True)
    for name, data in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    given = dict.fromkeys(pictures, BOXES) | (boxes or {})
    columns = {"image_id": list(given), "boxes": list(given.values())}
    kinds = pa.schema([("image_id", pa.string()), ("boxes", pa.list_(pa.list_(pa.float64())))])
    pq.write_table(pa.Table.from_pydict(columns, schema=kinds), folder / "boxes.parquet")
    settings = InputSettings(images=str(root), boxes=str(folder / "boxes.parquet"))
    plan = make_plan(settings, images_per_unit=images_per_unit)
    made = JobContext(
        output=place or Place(uri=str(folder / "out")),
        plan_sha256=plan.sha256,
        images_per_unit=images_per_unit,
        run_id="run",
        weights=Weights(source="none", sha256="0" * 64, architecture="stub", input_side=SIDE),
        model=ModelSettings(dtype="float32", boxes_per_call=16),
        box_rules=BoxRules(box_format=plan.summary.box_format, box_frame=plan.summary.box_frame),
        access=plan.access,
        limits=limits or Limits(decode_timeout_s=5, segment_timeout_s=2),
        lineage=lineage or {},
        segmenter="tests.fakes:box_segmenter",
        decoder="tests.fakes:troubled_decoder",
    )
    write_plan(Store(made.output), plan)
    return MadeJob(context=replace(made, **context), plan=plan, boxes=given)
