"""A unit's table -> rows of the published tables `images` and `instances`, with what is counted of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hqlabel.pipeline import schema
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.tables.count_masks import Counts, counts_of
from hqlabel.pipeline.tables.lineage import devices_of
from hqlabel.pipeline.tables.mask_quality import mark


@dataclass(frozen=True, kw_only=True)
class FlatUnit:
    """One unit as rows of the published tables: schema.IMAGES and schema.INSTANCES."""

    images: pa.Table
    instances: pa.Table
    counts: Counts


def flatten_unit(table: pa.Table, filters: FilterSettings) -> FlatUnit:
    """Return a unit's table (schema.UNIT) as published rows, marked by `filters`."""
    nested = table["instances"].combine_chunks()
    image_row = np.asarray(pc.list_parent_indices(nested), dtype=np.int64)
    values = nested.flatten()
    fields = dict(zip(schema.UNIT_INSTANCE.names, values.flatten(), strict=True))
    flat = pa.table({**fields, "image_index": pa.array(image_row)})
    accepted, reasons = mark(flat, filters)
    of_image: dict[str, Any] = {
        name: table[name].combine_chunks().take(pa.array(image_row))
        for name in ("image_id", "image_uri", "run_id")
    }
    marks = {"accepted": pa.array(accepted, pa.bool_()), "reject_reason": pa.array(reasons, pa.string())}
    columns = {**fields, **of_image, **marks}
    instances = pa.Table.from_arrays(
        [columns[name] for name in schema.INSTANCES.names], schema=schema.INSTANCES
    )
    has_mask = np.asarray(pc.fill_null(pc.greater(fields["area"], 0), False), dtype=np.bool_)
    images = _image_rows(table, image_row, has_mask, np.asarray(accepted, dtype=np.bool_))
    counts = replace(counts_of(images, instances), devices=dict.fromkeys(devices_of(table), 1))
    return FlatUnit(images=images, instances=instances, counts=counts)


def _image_rows(
    table: pa.Table,
    image_row: npt.NDArray[np.int64],
    has_mask: npt.NDArray[np.bool_],
    accepted: npt.NDArray[np.bool_],
) -> pa.Table:
    def per_image(chosen: npt.NDArray[np.int64]) -> pa.Array:
        return pa.array(np.bincount(chosen, minlength=table.num_rows).astype(np.int32))

    columns = {name: table[name].combine_chunks() for name in table.schema.names}
    columns["num_boxes"] = per_image(image_row)
    columns["num_instances"] = per_image(image_row[has_mask])
    columns["num_accepted"] = per_image(image_row[accepted])
    return pa.Table.from_arrays([columns[name] for name in schema.IMAGES.names], schema=schema.IMAGES)
