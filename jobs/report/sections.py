"""Which instances a report shows: each section is a query, printed under its tiles.

A section is an order over rows: the rows with the least value come first, ties in the order of the tables.
The SQL is written for DuckDB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hqlabel.jobs.report.queries import literal
from hqlabel.pipeline.settings import FilterSettings

SHUFFLED = "md5(image_id || ':' || instance_index)"
"""A fixed shuffle: by the md5 of image_id, a colon and instance_index."""
KEY_COLUMNS = ("image_id", "instance_index")
_SHOWN_COLUMNS = (*KEY_COLUMNS, "image_uri", "predicted_iou", "stability_score", "box_iou")
_MASK = "area > 0"


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """A row of tiles. `group`: sections under one head. `where`, `order_by`: SQL over a row of `instances`.

    `column`: what the tiles are sorted by, named on them.
    """

    key: str
    group: str
    title: str
    note: str
    where: str
    order_by: str
    number: int
    column: str | None = None

    def sql(self, instances: str, columns: Sequence[str] = ()) -> str:
        """Return the query of this section's rows from `instances`: these columns, or those of interest."""
        names = columns or dict.fromkeys([*_SHOWN_COLUMNS, *([self.column] if self.column else [])])
        return (
            f"SELECT {', '.join(names)}\nFROM {instances}\nWHERE {self.where}\n"
            f"ORDER BY {self.order_by}, image_id, instance_index\nLIMIT {self.number};"
        )


def sections(filters: FilterSettings, rejected: Mapping[str, int], *, masks: int) -> list[ReportSection]:
    """Return the sections of a report in their order; fewer tiles each where there are few masks."""
    few = min(8, max(3, masks // 5))
    return [
        ReportSection(
            key="random",
            group="Random sample",
            title="Random sample",
            note="Every mask had the same chance. Judge by these first.",
            where=_MASK,
            order_by=SHUFFLED,
            number=min(24, max(4, masks)),
        ),
        *(_extreme(name, "Worst first", f"Lowest {name}", note, few) for name, note in _WORST),
        _extreme("num_components", "Worst first", "Most parts", "Masks in many pieces.", few, falling=True),
        *_near_the_line(filters, few),
        _extreme("area", "Extremes", "Smallest masks", "By area in pixels.", few),
        _extreme("area", "Extremes", "Largest masks", "By area in pixels.", few, falling=True),
        ReportSection(
            key="border",
            group="Extremes",
            title="At the picture's border",
            note="A random choice of masks that reach it.",
            where="touches_border",
            order_by=SHUFFLED,
            number=few,
        ),
        *_disagreeing_scores(few),
        *(_rejected(reason, few) for reason in sorted(rejected, key=lambda r: -rejected[r])[:8]),
    ]


_WORST = (
    ("predicted_iou", "The model itself doubts these most."),
    ("stability_score", "The edge moves most with the threshold."),
    ("box_iou", "Mask and prompt box agree least."),
    ("mask_in_box", "Masks that leave their box."),
)


def _extreme(
    name: str, group: str, title: str, note: str, number: int, *, falling: bool = False
) -> ReportSection:
    return ReportSection(
        key=f"{name}-{'most' if falling else 'least'}",
        group=group,
        title=title,
        note=note,
        where=f"{_MASK} AND {name} IS NOT NULL",
        order_by=f"{name} DESC" if falling else name,
        number=number,
        column=name,
    )


def _near_the_line(filters: FilterSettings, number: int) -> list[ReportSection]:
    """Return, for each filter that is set, the masks on both sides of its line."""
    found = []
    for setting, bound in filters.model_dump().items():
        if not setting.startswith("min_") or bound is None:
            continue
        name = {"min_area_px": "area"}.get(setting, setting.removeprefix("min_"))
        line = float(bound) if name == "area" else float(np.float32(bound))
        found += [_side(name, line, number, above=above) for above in (False, True)]
    return found


def _side(name: str, line: float, number: int, *, above: bool) -> ReportSection:
    kind = "DOUBLE" if name == "area" else "FLOAT"
    return ReportSection(
        key=f"{name}-{'above' if above else 'below'}",
        group="Near the line",
        title=f"{name} just {'above' if above else 'below'} {line:g}",
        note="Kept by this filter." if above else "Marked by this filter.",
        where=f"{_MASK} AND {name} {'>=' if above else '<'} CAST({line!r} AS {kind})",
        order_by=name if above else f"{name} DESC",
        number=number,
        column=name,
    )


def _disagreeing_scores(number: int) -> list[ReportSection]:
    gap = "CAST(predicted_iou AS DOUBLE) - CAST(detector_score AS DOUBLE)"
    detector = ReportSection(
        key="sure-detector",
        group="Scores that disagree",
        title="The detector is sure, the mask is not",
        note="detector_score high, predicted_iou low.",
        where="predicted_iou IS NOT NULL AND detector_score IS NOT NULL",
        order_by=gap,
        number=number,
        column="detector_score",
    )
    mask = replace(
        detector,
        key="sure-mask",
        title="The mask is sure, the detector is not",
        note="predicted_iou high, detector_score low.",
        order_by=f"{gap} DESC",
    )
    return [detector, mask]


def _rejected(reason: str, number: int) -> ReportSection:
    return ReportSection(
        key=f"rejected-{reason}",
        group="Not accepted",
        title=reason,
        note="A random choice of the boxes with this reject_reason.",
        where=f"split_part(reject_reason, ':', 1) = {literal(reason)}",
        order_by=SHUFFLED,
        number=number,
    )
