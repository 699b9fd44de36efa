"""Which units of a plan belong to this driver (`--slice i/n`), and its lock on them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.pipeline.errors import UsageError
from hqlabel.pipeline.job_state.driver_lock import Owner
from hqlabel.pipeline.storage.output_store import Store

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


class JobLock:
    """At most one `Owner`, taken at the first `take` or `require`; a context manager that releases it.

    The drivers of several slices have a lock each, below the job's own: they must not shut each other out.
    Publishing is for the one that holds the job's own lock.
    """

    def __init__(self, store: Store, interrupts: Interrupts, part: Slice = WHOLE) -> None:
        if part != WHOLE:
            folder = f"{store.place.uri.rstrip('/')}/owner/slice-{part.index}-of-{part.count}"
            store = Store(replace(store.place, uri=folder))
        self._store = store
        self._interrupts = interrupts
        self._owner: Owner | None = None

    def take(self) -> Owner:
        """Return the owner, from now on; raises `JobRefused` naming another driver that is alive."""
        if self._owner is None:
            self._owner = Owner.take(self._store)
            self._interrupts.give_back_on_exit(self._owner.release)
        return self._owner

    def require(self, what: str) -> None:
        """Take the job if it is not ours yet; raises `JobRefused` when another has it. Call before `what`."""
        self.take().require(what)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owner is not None:
            self._interrupts.give_back()
