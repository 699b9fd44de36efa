"""Which instances a report shows, each section with the SQL that finds the same rows.

A section is an order over rows: the rows with the least value come first, ties in the order of the
tables. NaN takes no part. The SQL is written for DuckDB, and a test runs it against the section.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.settings import FilterSettings

Float64Array = npt.NDArray[np.float64]
Columns = Mapping[str, Any]
Order = Callable[[Columns], Float64Array]

SHUFFLED = "md5(image_id || ':' || instance_index)"
"""A fixed shuffle: by the md5 of image_id, a colon and instance_index."""
_MASK = "area > 0"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A row of tiles. `order`: a value for each row of `instances`; `group`: sections shown under one head.

    `where`, `order_by`: the same in SQL. `column`: what the tiles are sorted by, named on them.
    """

    key: str
    group: str
    title: str
    note: str
    order: Order
    where: str
    order_by: str
    number: int
    column: str | None = None

    def sql(self, tables: str) -> str:
        """The query that gives this section's rows from the tables under `tables`."""
        chosen = ["image_id", "instance_index", "image_uri", "predicted_iou", "stability_score", "box_iou"]
        if self.column and self.column not in chosen:
            chosen.append(self.column)
        return (
            f"SELECT {', '.join(chosen)}\nFROM '{quoted(tables)}/instances/*.parquet'\nWHERE {self.where}\n"
            f"ORDER BY {self.order_by}, image_id, instance_index\nLIMIT {self.number};"
        )


def shuffle_keys(image_ids: Sequence[str], indices: Sequence[int]) -> Float64Array:
    """The place of each row in the fixed shuffle: the first 48 bits of its md5, float64 (N,)."""
    digests = (
        hashlib.md5(f"{image_id}:{index}".encode(), usedforsecurity=False).digest()[:6]
        for image_id, index in zip(image_ids, indices, strict=True)
    )
    return np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.float64)


def sections(filters: FilterSettings, rejected: Mapping[str, int], *, masks: int) -> list[Section]:
    """The sections of a report in their order; fewer tiles each where there are few masks."""
    few = min(8, max(3, masks // 5))
    found = [
        Section(
            key="random",
            group="Random sample",
            title="Random sample",
            note="Every mask had the same chance. Judge by these first.",
            order=_among("area", lambda values: values > 0, "shuffle"),
            where=_MASK,
            order_by=SHUFFLED,
            number=min(24, max(4, masks)),
        )
    ]
    found += [_worst(name, note, few) for name, note in _WORST]
    found.append(
        _section("num_components", "Worst first", "Most parts", "Masks in many pieces.", few, falling=True)
    )
    found += _near_the_line(filters, few)
    found += [
        _section("area", "Extremes", "Smallest masks", "By area in pixels.", few),
        _section("area", "Extremes", "Largest masks", "By area in pixels.", few, falling=True),
        _border(few),
        *_disagreeing_scores(few),
    ]
    found += [_rejected(reason, few) for reason in sorted(rejected, key=lambda r: -rejected[r])[:8]]
    return found


_WORST = (
    ("predicted_iou", "The model itself doubts these most."),
    ("stability_score", "The edge moves most with the threshold."),
    ("box_iou", "Mask and prompt box agree least."),
    ("mask_in_box", "Masks that leave their box."),
)


def _values(columns: Columns, name: str) -> Float64Array:
    return np.asarray(columns[name], dtype=np.float64)


def _among(name: str, keep: Callable[[Float64Array], npt.NDArray[np.bool_]], by: str) -> Order:
    """Rows whose column passes `keep`, ordered by another column."""
    return lambda columns: np.where(keep(_values(columns, name)), _values(columns, by), np.nan)


def _section(name: str, group: str, title: str, note: str, number: int, *, falling: bool = False) -> Section:
    sign = -1.0 if falling else 1.0

    def order(columns: Columns) -> Float64Array:
        return np.where(_values(columns, "area") > 0, sign * _values(columns, name), np.nan)

    return Section(
        key=f"{name}-{'most' if falling else 'least'}",
        group=group,
        title=title,
        note=note,
        order=order,
        where=f"{_MASK} AND {name} IS NOT NULL",
        order_by=f"{name} DESC" if falling else name,
        number=number,
        column=name,
    )


def _worst(name: str, note: str, number: int) -> Section:
    return _section(name, "Worst first", f"Lowest {name}", note, number)


def _near_the_line(filters: FilterSettings, number: int) -> list[Section]:
    found = []
    for setting, bound in filters.model_dump().items():
        if not setting.startswith("min_") or bound is None:
            continue
        name = {"min_area_px": "area"}.get(setting, setting.removeprefix("min_"))
        line = float(bound) if name == "area" else float(np.float32(bound))
        found += [_side(name, line, number, above=False), _side(name, line, number, above=True)]
    return found


def _side(name: str, line: float, number: int, *, above: bool) -> Section:
    def order(columns: Columns) -> Float64Array:
        values = _values(columns, name)
        kept = (_values(columns, "area") > 0) & ((values >= line) if above else (values < line))
        return np.where(kept, values if above else -values, np.nan)

    compare = ">=" if above else "<"
    kind = "DOUBLE" if name == "area" else "FLOAT"
    return Section(
        key=f"{name}-{'above' if above else 'below'}",
        group="Near the line",
        title=f"{name} just {'above' if above else 'below'} {line:g}",
        note="Kept by this filter." if above else "Marked by this filter.",
        order=order,
        where=f"{_MASK} AND {name} {compare} CAST({line!r} AS {kind})",
        order_by=name if above else f"{name} DESC",
        number=number,
        column=name,
    )


def _border(number: int) -> Section:
    return Section(
        key="border",
        group="Extremes",
        title="At the picture's border",
        note="A random choice of masks that reach it.",
        order=_among("touches_border", lambda values: values > 0, "shuffle"),
        where="touches_border",
        order_by=SHUFFLED,
        number=number,
    )


def _disagreeing_scores(number: int) -> list[Section]:
    def order(sign: float) -> Order:
        return lambda columns: sign * (_values(columns, "predicted_iou") - _values(columns, "detector_score"))

    gap = "CAST(predicted_iou AS DOUBLE) - CAST(detector_score AS DOUBLE)"
    where = "predicted_iou IS NOT NULL AND detector_score IS NOT NULL"
    shared = {"group": "Scores that disagree", "where": where, "number": number, "column": "detector_score"}
    return [
        Section(
            key="sure-detector",
            title="The detector is sure, the mask is not",
            note="detector_score high, predicted_iou low.",
            order=order(1.0),
            order_by=gap,
            **shared,  # type: ignore[arg-type]
        ),
        Section(
            key="sure-mask",
            title="The mask is sure, the detector is not",
            note="predicted_iou high, detector_score low.",
            order=order(-1.0),
            order_by=f"{gap} DESC",
            **shared,  # type: ignore[arg-type]
        ),
    ]


def _rejected(reason: str, number: int) -> Section:
    def order(columns: Columns) -> Float64Array:
        mine = pc.fill_null(pc.equal(columns["reason"], reason), False)
        return np.where(np.asarray(mine), _values(columns, "shuffle"), np.nan)

    return Section(
        key=f"rejected-{reason}",
        group="Not accepted",
        title=reason,
        note="A random choice of the boxes with this reject_reason.",
        order=order,
        where=f"split_part(reject_reason, ':', 1) = '{reason}'",
        order_by=SHUFFLED,
        number=number,
    )


def quoted(text: str) -> str:
    """The text as it stands between single quotes in SQL."""
    return text.replace("'", "''")


def reason_names(column: pa.ChunkedArray) -> pa.Array:
    """reject_reason without the winner of an `nms:<n>`."""
    return pc.replace_substring_regex(column.combine_chunks(), ":.*$", "")
