"""`--slice i/n`: which units of a plan belong to this driver."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.errors import UsageError

_SLICE = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The `index`-th of `count` parts, from 1."""

    index: int = 1
    count: int = 1

    @property
    def text(self) -> str | None:
        """`2/4`, or None for the whole plan."""
        return None if self.count == 1 else f"{self.index}/{self.count}"

    def units(self, total: int) -> range:
        """Return the slice of `total` units: consecutive; the sizes of slices differ by at most one."""
        return range(total * (self.index - 1) // self.count, total * self.index // self.count)


WHOLE = Slice()


def parse_slice(text: str | None) -> Slice:
    """Return the slice that `i/n` names, the whole plan for None. Raises `UsageError`."""
    if text is None:
        return WHOLE
    match = _SLICE.fullmatch(text)
    part = Slice(index=int(match[1]), count=int(match[2])) if match else None
    if part is None or not 1 <= part.index <= part.count:
        raise UsageError(f"--slice {text}: wanted i/n with i from 1 to n, such as 2/4")
    return part
