"""Some rows of published tables of any size: footers first, then only the row groups concerned.

Parts are in the order of image ids, and so are the rows in them: an image is found by the least and
greatest id that each row group's footer states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.job_state.job_file import read_job
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.manifest import Manifest, PartFile, read_manifest
from hqlabel.pipeline.tables.published_parts import open_part, unfinished_change

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ImageRows:
    """One image as published: its row of `images`, and its rows of `instances` in prompt order."""

    image: Row
    instances: tuple[Row, ...]

    def instance(self, index: int) -> Row:
        """Return the row with this instance_index."""
        return next(row for row in self.instances if row["instance_index"] == index)

    def masks(self) -> tuple[int, int]:
        """Return how many of its boxes have a mask of at least one pixel, and how many an empty one."""
        areas = [row["area"] for row in self.instances if row["area"] is not None]
        return sum(area > 0 for area in areas), areas.count(0)


def require_published(store: Store) -> Manifest:
    """Return the manifest of the tables in a store; JobRefused when nothing is published there."""
    manifest = read_manifest(store)
    if manifest is not None and manifest.state == "publishing":
        job = read_job(store)
        raise JobRefused(
            (unfinished_change(store, job) if job is not None else None)
            or f"{store.place.uri}: the tables are being published now, or a publish was interrupted; "
            "start this command again when it has ended, or publish again"
        )
    if manifest is None or not manifest.parts:
        raise JobRefused(f"{store.place.uri}: no tables are published here yet; see hqlabel publish --help")
    return manifest


def find_images(
    store: Store, manifest: Manifest, image_ids: Collection[str], columns: Sequence[str] | None = None
) -> dict[str, ImageRows]:
    """Return the rows of several images by id, those that some part has. Each row group is read once.

    `columns`: of the rows of `images`, if not all; `image_id` is among them.
    """
    wanted = sorted(set(image_ids), key=str.encode)
    images: dict[str, Row] = {}
    instances: dict[str, list[Row]] = {image_id: [] for image_id in wanted}
    for part in manifest.parts:
        found = _rows_in(store, part.images, schema.IMAGES, wanted, columns)
        images.update((row["image_id"], row) for row in found)
        for row in _rows_in(store, part.instances, schema.INSTANCES, wanted):
            instances[row["image_id"]].append(row)
    return {key: ImageRows(image=row, instances=tuple(instances[key])) for key, row in images.items()}


def sample_labelled(store: Store, manifest: Manifest, number: int) -> list[ImageRows]:
    """Return up to `number` images with a mask, spread evenly over the tables; the same ones every time."""
    parts = [part for part in manifest.parts if part.counts.masks]
    chosen: list[ImageRows] = []
    for part, share in zip(spread(parts, number), _shares(len(parts), number), strict=True):
        ids = _labelled_ids(store, part.images)
        for image_id in spread(ids, share):
            [image] = _rows_in(store, part.images, schema.IMAGES, [image_id])
            instances = _rows_in(store, part.instances, schema.INSTANCES, [image_id])
            chosen.append(ImageRows(image=image, instances=tuple(instances)))
    return chosen


def failed_examples(store: Store, manifest: Manifest, *, per_code: int = 2) -> dict[str, list[Row]]:
    """Return up to `per_code` rows of images for every code they failed with; reads until it has them."""
    examples: dict[str, list[Row]] = {code: [] for code in manifest.counts.failed}
    columns = ["image_id", "image_uri", "error_code", "error_message"]
    for part in manifest.parts:
        wanted = [code for code in part.counts.failed if len(examples[code]) < per_code]
        if not wanted:
            continue
        for table in row_groups(store, part.images, schema.IMAGES, columns):
            for row in table.filter(pc.is_in(table["error_code"], pa.array(wanted))).to_pylist():
                if len(examples[row["error_code"]]) < per_code:
                    examples[row["error_code"]].append(row)
    return examples


def failed_units(store: Store, file: PartFile, codes: Sequence[str]) -> dict[int, int]:
    """Return how many images of each unit of a part failed with one of `codes` (empty: with any)."""
    images: Counter[int] = Counter()
    for table in row_groups(store, file, schema.IMAGES, ["unit_id", "error_code"]):
        failed = table.filter(table["error_code"].is_valid())
        if codes:
            failed = failed.filter(pc.is_in(failed["error_code"], pa.array(codes)))
        images.update(failed["unit_id"].to_pylist())
    return images


def _rows_in(
    store: Store,
    file: PartFile,
    kind: pa.Schema,
    image_ids: Sequence[str],
    columns: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Yield the rows of these images (sorted by UTF-8 bytes), group by group."""
    with open_part(store, file, kind) as body:
        for group in range(body.num_row_groups):
            held = [image_id for image_id in image_ids if _may_meet(body, group, image_id, image_id)]
            if held:
                table = body.read_row_group(group, columns)
                ids = pa.lib.StringBuilder()  # `pa.array` would import pandas, for a quarter of a second
                ids.append_values(held)
                yield from table.filter(pc.is_in(table["image_id"], ids.finish())).to_pylist()


def _may_meet(body: pq.ParquetFile, group: int, low: str, high: str) -> bool:
    column = body.metadata.row_group(group).column(body.schema_arrow.get_field_index("image_id"))
    facts = column.statistics
    if facts is None or not facts.has_min_max:
        return True
    least, most = (end.encode() if isinstance(end, str) else end for end in (facts.min, facts.max))
    return bool(least <= high.encode() and low.encode() <= most)


def _labelled_ids(store: Store, file: PartFile) -> list[str]:
    return [
        image_id
        for table in row_groups(store, file, schema.IMAGES, ["image_id", "num_instances"])
        for image_id in table.filter(pc.greater(table["num_instances"], 0))["image_id"].to_pylist()
    ]


def row_groups(
    store: Store,
    file: PartFile,
    kind: pa.Schema,
    columns: Sequence[str],
    low: str | None = None,
    high: str | None = None,
) -> Iterator[pa.Table]:
    """Yield the row groups of a part that may hold an image_id from `low` to `high` (None: all)."""
    with open_part(store, file, kind) as body:
        for group in range(body.num_row_groups):
            if low is None or high is None or _may_meet(body, group, low, high):
                yield body.read_row_group(group, columns=list(columns))


def spread(items: Sequence[T], number: int) -> list[T]:
    """Return up to `number` of the items, evenly spaced, the first and last among them if two or more."""
    if len(items) <= number:
        return list(items)
    if number == 1:
        return [items[len(items) // 2]]
    return [items[place * (len(items) - 1) // (number - 1)] for place in range(number)]


def _shares(parts: int, number: int) -> list[int]:
    """Return how many images each of the chosen parts gives, `number` together."""
    chosen = min(parts, number)
    return [number * (place + 1) // chosen - number * place // chosen for place in range(chosen)]
