"""What the commands that read the tables cost: report, exports and evaluation, with time and peak memory.

python -m benchmarks.labels_out --images 20000 --commands report,coco,yolo-seg,label-studio,hf,evaluate
python -m benchmarks.labels_out --images 714300 --commands coco        # 5 million masks
python -m benchmarks.labels_out --images 1428600 --commands report     # 10 million rows

With `--folder` the tables stay there, and another call with as many images uses them again. They are
made up: 7 masks of two ellipses with a hole in each 640 x 480 image, 100 different images repeated under
new ids. Only the report opens pictures, and they are all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pycocotools import mask as coco_mask

from hqlabel.model.records import Instances
from hqlabel.pipeline import schema
from hqlabel.pipeline.image_result import ImageResult
from hqlabel.pipeline.job_context import AccessRules, BoxRules, JobContext, Place, Weights
from hqlabel.pipeline.job_state.job_file import Job, identity_of, open_job
from hqlabel.pipeline.settings import FilterSettings, Limits, ModelSettings
from hqlabel.pipeline.stages.box_prompts import resolve_boxes
from hqlabel.pipeline.storage.checksummed_parquet import ParquetSink
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.count_masks import Counts
from hqlabel.pipeline.tables.images_and_instances import flatten_unit
from hqlabel.pipeline.tables.manifest import Manifest, Part, PartFile, write_manifest
from hqlabel.pipeline.tables.unit_table import build_unit_table

SIZE_HW = (480, 640)
MASKS_PER_IMAGE = 7
DIFFERENT = 100
IMAGES_PER_UNIT = 64
IMAGES_PER_PART = 36_000
CLASSES = ("person", "car", "dog", "tree", "cup")
LINKS_OF_ONE_FILE = 50_000  # ext4 takes 65,000
COMMANDS = ("report", "coco", "yolo-seg", "label-studio", "hf", "evaluate")


def drawn_mask(rng: np.random.Generator) -> np.ndarray:
    """Two ellipses and a hole."""
    rows, columns = np.ogrid[: SIZE_HW[0], : SIZE_HW[1]]
    mask = np.zeros(SIZE_HW, np.uint8)
    middle = rng.uniform(0.2, 0.8, 2) * SIZE_HW
    for value in (1, 1, 0):
        reach = rng.uniform(8, 90, 2) if value else rng.uniform(3, 8, 2)
        cy, cx = middle + rng.uniform(-30, 30, 2) * value
        mask[((rows - cy) / reach[0]) ** 2 + ((columns - cx) / reach[1]) ** 2 <= 1] = value
    mask[int(middle[0]), int(middle[1]) + 12] = 1
    return mask


def one_image(number: int, num_masks: int = MASKS_PER_IMAGE) -> ImageResult:
    """A labelled image with so many masks."""
    rng = np.random.default_rng(number)
    rles = [coco_mask.encode(np.asfortranarray(drawn_mask(rng))) for _ in range(num_masks)]
    boxes = [coco_mask.toBbox(rle) for rle in rles]
    blank = dict.fromkeys(field.name for field in schema.PLAN_BOX)
    kinds = rng.integers(0, len(CLASSES), num_masks)
    given = [
        blank
        | {"given": [x, y, x + w, y + h], "score": float(rng.uniform(0.2, 1))}
        | {"category_id": int(kind) + 1, "category_name": CLASSES[kind]}
        for (x, y, w, h), kind in zip(boxes, kinds, strict=True)
    ]
    row = {"unit_id": 0, "image_id": f"{number}", "image_uri": "", "boxes": given}
    row |= {"error_code": None, "error_message": None}
    masks = Instances(
        size_hw=SIZE_HW,
        counts=tuple(rle["counts"].decode() for rle in rles),
        area=np.array([int(coco_mask.area(rle)) for rle in rles], np.int64),
        bbox_xywh=np.array(boxes, np.float32),
        predicted_iou=rng.uniform(0.4, 1.01, num_masks).astype(np.float32),
        stability_score=rng.uniform(0.7, 1, num_masks).astype(np.float32),
    )
    return ImageResult(
        planned=row,
        size_hw=SIZE_HW,
        stored_size_hw=SIZE_HW,
        exif_orientation=1,
        boxes=resolve_boxes(given, BoxRules(), upright_size_hw=SIZE_HW),
        instances=masks,
        source_bytes=120_000,
        fetch_ms=5.0,
        decode_ms=8.0,
        segment_ms=120.0,
    )


def open_output(
    output: Path,
    images: int,
    *,
    masks_per_image: int,
    units_per_part: int = IMAGES_PER_PART // IMAGES_PER_UNIT,
) -> tuple[Store, JobContext]:
    """The store and the context of a job of so many images, opened there."""
    store = Store(Place(uri=str(output)))
    context = JobContext(
        output=store.place,
        plan_sha256="0" * 64,
        images_per_unit=IMAGES_PER_UNIT,
        run_id="bench",
        weights=Weights(source="none", sha256="0" * 64, architecture="none"),
        model=ModelSettings(dtype="float32", boxes_per_call=16),
        box_rules=BoxRules(),
        access=AccessRules(),
        limits=Limits(),
    )
    units = -(-images // IMAGES_PER_UNIT)
    open_job(
        store,
        Job(
            identity=identity_of(context, inputs={}, limit=None, protocol=1),
            context=context,
            plan={"images": images, "boxes": images * masks_per_image, "units": units},
            units_per_part=units_per_part,
        ),
    )
    return store, context


def make_tables(folder: Path, output: Path, images: int) -> None:
    """Write the output of a finished job of so many images, without units; its pictures are in `folder`."""
    store, context = open_output(output, images, masks_per_image=MASKS_PER_IMAGE)
    units = -(-images // IMAGES_PER_UNIT)
    (output / "config.yaml").write_text(f"input:\n  images: {folder}\n")
    results = [one_image(number) for number in range(min(DIFFERENT, images))]
    flat = flatten_unit(build_unit_table(results, context), FilterSettings())
    parts = [
        _part(folder, store, first, min(first + IMAGES_PER_PART, images), flat.images, flat.instances)
        for first in range(0, images, IMAGES_PER_PART)
    ]
    write_manifest(
        store,
        Manifest(
            state="complete",
            run_id="bench",
            plan_sha256="0" * 64,
            units=units,
            filters=FilterSettings(),
            parts=tuple(parts),
            published_at="2026-01-01T00:00:00+00:00",
            cleaned=True,
        ),
    )


def _part(folder: Path, store: Store, first: int, stop: int, images: pa.Table, instances: pa.Table) -> Part:
    index = first // IMAGES_PER_PART
    sinks = {"images": ParquetSink(schema.IMAGES, {}), "instances": ParquetSink(schema.INSTANCES, {})}
    for start in range(first, stop, images.num_rows):
        count = min(images.num_rows, stop - start)
        for name, table in (("images", images), ("instances", instances)):
            per_image = table.num_rows // images.num_rows
            ids = [f"{start + place // per_image:09d}.jpg" for place in range(count * per_image)]
            rows = table.slice(0, count * per_image)
            uris = [f"{folder}/photos/{image_id}" for image_id in ids]
            for column, values in (("image_id", ids), ("image_uri", uris)):
                at = rows.schema.get_field_index(column)
                rows = rows.set_column(at, rows.schema.field(at), pa.array(values))
            sinks[name].write(rows)
    files = {}
    for name, sink in sinks.items():
        body = sink.finish()
        key = f"{name}/part-{index:05d}.parquet"
        store.put(key, body)
        files[name] = PartFile(key=key, rows=sink.rows, bytes=len(body), sha256="0" * 64)
    number = stop - first
    masks = number * MASKS_PER_IMAGE
    counts = Counts(images=number, boxes=masks, masks=masks, accepted=masks, status={"labelled": number})
    return Part(
        index=index, generations={},
        first_unit=first // IMAGES_PER_UNIT, stop_unit=-(-stop // IMAGES_PER_UNIT),
        images=files["images"], instances=files["instances"], counts=counts,
    )  # fmt: skip


def write_pictures(folder: Path, images: int) -> None:
    """One picture under the name of every image."""
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE_HW, 3), dtype=np.uint8)
    (folder / "photos").mkdir()
    for number in range(images):
        path = folder / "photos" / f"{number:09d}.jpg"
        if number % LINKS_OF_ONE_FILE == 0:
            picture = path
            Image.fromarray(noise).save(picture)
        else:
            path.hardlink_to(picture)


def write_truth(folder: Path, images: int) -> Path:
    """The made-up masks themselves as ground truth, ids as in the tables."""
    results = [one_image(number).instances for number in range(min(DIFFERENT, images))]
    kinds = [one_image(number).planned["boxes"] for number in range(len(results))]
    annotations, listed = [], []
    for number in range(images):
        listed.append(
            {"id": number, "file_name": f"{number:09d}.jpg", "height": SIZE_HW[0], "width": SIZE_HW[1]}
        )
        masks = results[number % DIFFERENT]
        for k in range(MASKS_PER_IMAGE):
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "iscrowd": 0,
                    "category_id": kinds[number % DIFFERENT][k]["category_id"],
                    "bbox": masks.bbox_xywh[k].tolist(), "area": int(masks.area[k]),
                    "segmentation": {"size": list(SIZE_HW), "counts": masks.counts[k]},
                }
            )  # fmt: skip
    categories = [{"id": place, "name": name} for place, name in enumerate(CLASSES, start=1)]
    path = folder / "truth.json"
    path.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories}))
    return path


def measured(arguments: list[str]) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak MB) of one command in a process of its own."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "hqlabel", *arguments], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments} ended with status {status}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def size_of(folder: Path) -> float:
    """MB of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--folder", type=Path, help="keep the tables here")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        output = tables_of(folder, options.images)
        for command in options.commands.split(","):
            run(command, folder, output, options.images)


def tables_of(folder: Path, images: int) -> Path:
    """The output in `folder`, made now or by an earlier call."""
    output = folder / f"out-{images}"
    if not (output / "manifest.json").exists():  # written last
        shutil.rmtree(output, ignore_errors=True)
        began = time.perf_counter()
        make_tables(folder, output, images)
        print(f"tables made in {time.perf_counter() - began:.0f} s")
    masks = images * MASKS_PER_IMAGE
    print(f"{images:,} images, {masks:,} masks, {size_of(output):,.0f} MB of tables", flush=True)
    return output


def run(command: str, folder: Path, output: Path, images: int) -> None:
    """Print what one command took; what it wrote is removed."""
    to = folder / command
    arguments = ["export", command, "--output", str(output), "--to", str(to)]
    if command == "report":
        write_pictures(folder, images)
        arguments = ["report", "--output", str(output), "--to", str(to / "page.html")]
    elif command == "evaluate":
        truth = write_truth(folder, images)
        arguments = ["evaluate", "--output", str(output), "--truth", str(truth)]
    seconds, cpu, peak = measured(arguments)
    wrote = size_of(to) if to.exists() else 0
    print(
        f"{command:<13}{seconds:8.1f} s{cpu:8.1f} s of CPU{peak:9,.0f} MB peak{wrote:9,.0f} MB written",
        flush=True,
    )
    shutil.rmtree(to, ignore_errors=True)
    shutil.rmtree(folder / "photos", ignore_errors=True)


if __name__ == "__main__":
    main()
