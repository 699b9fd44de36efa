"""What the page's script knows of the boxes it shows: to filter them, to pick some, and to hand those on.

All SQL is written here, where names are quoted once; the script (templates/report.js) only joins it with
AND and OR. A name that a command line or a page could change is told by its md5 instead.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hqlabel.jobs.report.queries import SCORES, literal
from hqlabel.jobs.results.read_tables import Row
from hqlabel.pipeline.storage.uri_rules import masked

CSV_COLUMNS = (
    *("image_id", "instance_index", "box_id", "category_id", "category_name", *SCORES),
    *("area", "num_components", "accepted", "reject_reason", "qc_flags", "image_uri"),
)
_MOST_BYTES = 200  # of a name: all that a page shows, picked, is below the 128 kB of an argument
_STATES = {
    "accepted": ("accepted", "accepted"),
    "marked": ("marked, with a mask", "NOT accepted AND area > 0"),
    "no mask": ("no mask", "NOT accepted AND coalesce(area, 0) = 0"),
}
"""What every row is one of: how it is said, and its SQL."""
_BECAUSE = "because of "


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One line of a list to filter by: `value` is what a box has, `where` the SQL of all such rows."""

    value: str
    text: str
    where: str


def equals(column: str, value: str | int | None) -> str:
    """Return the SQL that a column has this value; of a text that is no plain one, its md5."""
    if value is None:
        return f"{column} IS NULL"
    if isinstance(value, int):
        return f"{column} = {value}"
    if value.isprintable() and len(value.encode()) <= _MOST_BYTES and masked(value) == value:
        return f"{column} = {literal(value)}"
    digest = hashlib.md5(value.encode(), usedforsecurity=False).hexdigest()
    return f"md5({column}) = '{digest}'"


def class_name(row: Row) -> str:
    """Return the class of a row of `instances`, as a page writes it."""
    category = row["category_id"]
    return str(row["category_name"] or ("object" if category is None else f"class {category}"))


def class_where(row: Row) -> str:
    """Return the SQL of a row's class; equal for rows of one class alone."""
    name, number = row["category_name"], row["category_id"]
    return " AND ".join([equals("category_name", name), equals("category_id", number)])


def states(row: Row) -> list[str]:
    """Return the states of a row: one of _STATES, and the rule or fault for which it is not accepted."""
    kept = "accepted" if row["accepted"] else "marked" if row["area"] else "no mask"
    reason = row["reject_reason"]
    return [kept] if reason is None else [kept, f"{_BECAUSE}{reason.split(':', 1)[0]}"]


def boxes_json(rows: Iterable[Row]) -> str:
    """Return what the script knows of these rows, as JSON without credentials."""
    found = [
        {
            "image": equals("image_id", row["image_id"]),
            "index": row["instance_index"],
            "kind": class_where(row),
            "states": states(row),
            "cells": [_cell(row[column]) for column in CSV_COLUMNS],
        }
        for row in rows
    ]
    return json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def class_choices(rows: Sequence[Row]) -> list[Choice]:
    """Return the classes of these rows, the commonest first."""
    number = Counter(map(class_where, rows))
    called = {class_where(row): class_name(row) for row in rows}
    return [
        Choice(value=where, text=f"{called[where]} ({found:,})", where=where)
        for where, found in number.most_common()
    ]


def state_choices(rows: Sequence[Row]) -> list[Choice]:
    """Return the states of these rows, then the reasons why some are not accepted."""
    number = Counter(state for row in rows for state in states(row))
    found = [
        Choice(value=state, text=f"{said} ({number.pop(state):,})", where=where)
        for state, (said, where) in _STATES.items()
        if state in number
    ]
    for state, times in number.most_common():
        where = f"split_part(reject_reason, ':', 1) = {literal(state.removeprefix(_BECAUSE))}"
        found.append(Choice(value=state, text=f"{state} ({times:,})", where=where))
    return found


def _cell(value: Any) -> str | int | float | bool | None:
    """Return a value as JSON can hold it and as it was: scores are float32, and 0.7 is none of them."""
    if isinstance(value, list):
        return ";".join(map(str, value))
    if isinstance(value, float):
        return float(str(np.float32(value))) if math.isfinite(value) else None
    return masked(value) if isinstance(value, str) else value
