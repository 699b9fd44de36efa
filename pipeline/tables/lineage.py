"""What a unit's footer states of the processes that made its rows: the first generation, and retries."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pyarrow as pa

from hqlabel.pipeline.errors import clean_text

_OF_A_GENERATION = ("device", "code_version", "limits")
"""What may differ between the generations of a unit; all else is the job's identity."""


def redone_footer(
    before: pa.Table, now: Mapping[str, str], *, generation: int, images: int
) -> dict[str, str]:
    """Return the lineage of a retried unit: as of the generation before, and what made the rows done again.

    `before`: the rows of that generation, with its footer; `now`: the lineage of this process.
    """
    lineage = footer_of(before) or dict(now)
    redone = json.loads(lineage.get("redone", "[]"))
    made_by = {name: now[name] for name in _OF_A_GENERATION if name in now}
    redone.append({"generation": generation, "images": images, **made_by})
    return {**lineage, "redone": json.dumps(redone)}


def footer_of(table: pa.Table) -> dict[str, str]:
    """Return the lineage that came with a unit's rows, keys without the `hqlabel.` prefix."""
    found = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return {key.removeprefix("hqlabel."): value for key, value in found.items() if key.startswith("hqlabel.")}


_MOST_KINDS, _LONGEST_KIND = 100, 200
"""Of device names in one footer, which may be anybody's: a job has a few of at most 60 characters."""


def devices_of(table: pa.Table, *, generation: int | None = None) -> list[str]:
    """Return the kinds of device that made rows of a unit, by the footer that came with them.

    `generation`: up to which the rows are meant; all by default.
    """
    lineage = footer_of(table)
    try:
        redone = json.loads(lineage.get("redone", "[]"))
        kinds = {lineage.get("device")}
        kinds |= {
            one.get("device") for one in redone if generation is None or one["generation"] <= generation
        }
        kinds.update(json.loads(lineage.get("kept_devices", "[]")))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):  # somebody else's footer
        kinds = {lineage.get("device")}
    named = sorted(kind for kind in kinds if isinstance(kind, str) and kind)
    return [clean_text(kind)[:_LONGEST_KIND] for kind in named[:_MOST_KINDS]]
