"""What every part of `hqlabel bench` hands back: a table for people that programs can read, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures of one part. `rows`: texts, one a column of `head`. `figures`: the numbers, for programs."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Sequence[dict[str, Any]]
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """The numbers and what they are of."""
        return {"title": self.title, "figures": list(self.figures), "notes": list(self.notes)}
