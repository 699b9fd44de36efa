"""Publishing a job of very many images: committed units in, tables out, against the disk alone.

    python -m benchmarks.publishing --images 1000000

The units are real ones, three masks of 640 x 480 an image, 64 images a unit, 6,400 different images repeated
under new ids: too far apart for the compression to see it. Measured are `hqlabel publish` in a process of
its own, reading the same files and writing as many bytes with nothing between, and reading every row of the
tables back with pyarrow.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.labels_out import IMAGES_PER_UNIT, measured, one_image, open_output, size_of
from hqlabel.pipeline.job_state.job_file import units_per_part
from hqlabel.pipeline.storage.checksummed_parquet import write_body
from hqlabel.pipeline.tables.unit_files import footer, put_unit
from hqlabel.pipeline.tables.unit_table import build_unit_table

MASKS_PER_IMAGE = 3
DIFFERENT_UNITS = 100
CHUNK = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "out"
        make_units(output, images)
        size_mb = size_of(output / "units")
        count = -(-images // IMAGES_PER_UNIT)
        print(f"{images:,} images, {images * MASKS_PER_IMAGE:,} masks, {count:,} units, {size_mb:,.0f} MB")
        seconds, _, peak_mb = measured(["publish", "--output", str(output)])
        tables_mb = size_of(output / "images") + size_of(output / "instances")
        print(
            f"hqlabel publish: {seconds:.1f} s, {images / seconds:,.0f} images/s, "
            f"{size_mb / seconds:.0f} MB/s read; {tables_mb:,.0f} MB of tables; peak {peak_mb:,.0f} MB"
        )
        print(f"the disk alone, the same files read: {timed(lambda: read_files(output / 'units')):.1f} s")
        print(
            f"as many bytes as the tables written and synced: {timed(lambda: write(output, tables_mb)):.1f} s"
        )
        rows = 0

        def read_back() -> None:
            nonlocal rows
            for table in ("images", "instances"):
                for file in sorted((output / table).glob("*.parquet")):
                    rows += pq.read_table(file).num_rows

        print(f"every row of both tables read back: {timed(read_back):.1f} s; {rows:,} rows")
        assert rows == images * (1 + MASKS_PER_IMAGE), rows


def make_units(output: Path, images: int) -> None:
    """Commit every unit of a job of so many images."""
    boxes = images * MASKS_PER_IMAGE
    part = units_per_part(images=images, boxes=boxes, images_per_unit=IMAGES_PER_UNIT)
    store, context = open_output(output, images, masks_per_image=MASKS_PER_IMAGE, units_per_part=part)
    numbers = range(DIFFERENT_UNITS * IMAGES_PER_UNIT)
    results = [one_image(number, MASKS_PER_IMAGE) for number in numbers]
    tables = [
        build_unit_table(results[start : start + IMAGES_PER_UNIT], context)
        for start in numbers[::IMAGES_PER_UNIT]
    ]
    for unit_id in range(-(-images // IMAGES_PER_UNIT)):
        first = unit_id * IMAGES_PER_UNIT
        rows = tables[unit_id % DIFFERENT_UNITS].slice(0, min(IMAGES_PER_UNIT, images - first))
        ids = [f"photos/{first + place:09d}.jpg" for place in range(rows.num_rows)]
        columns = {
            "unit_id": pa.array([unit_id] * rows.num_rows, pa.int32()),
            "image_id": pa.array(ids),
            "image_uri": pa.array([f"s3://bucket/{image_id}" for image_id in ids]),
        }
        for name, values in columns.items():
            at = rows.schema.get_field_index(name)
            rows = rows.set_column(at, rows.schema.field(at), values)
        put_unit(store, unit_id, 0, write_body(rows, footer(context)))


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def read_files(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        file.read_bytes()


def write(folder: Path, megabytes: float) -> None:
    """As many bytes, in one file, on the disk when this returns."""
    block = os.urandom(CHUNK)
    with (folder / "plain").open("wb") as file:
        for _ in range(round(megabytes * 1e6 / CHUNK)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
