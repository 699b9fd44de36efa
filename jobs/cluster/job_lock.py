"""The driver's mark on a job: taken when there is something to write, given back however the command ends."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Self

from jobs.job_setup.slices import WHOLE, Slice
from jobs.terminal.signals import Interrupts
from pipeline.job.driver_lock import Owner
from pipeline.storage.store import Store


class Ownership:
    """At most one `Owner`, taken at the first `take` or `require`; a context manager that releases it.

    The drivers of several slices have a mark each, below the job's own: they must not shut each other
    out. Publishing is for the one that holds the job's own mark.
    """

    def __init__(self, store: Store, interrupts: Interrupts, part: Slice = WHOLE) -> None:
        self._store = store if part == WHOLE else _store_of_slice(store, part)
        self._interrupts = interrupts
        self._owner: Owner | None = None

    def take(self) -> Owner:
        """The owner, from now on; raises `JobRefused` naming another driver that is alive."""
        if self._owner is None:
            self._owner = Owner.take(self._store)
            self._interrupts.give_back_on_exit(self._owner.release)
        return self._owner

    def require(self, what: str) -> None:
        """None when the job is ours (taken now if it was not yet); `JobRefused` when another has it."""
        self.take().require(what)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owner is not None:
            self._interrupts.give_back()


def _store_of_slice(store: Store, part: Slice) -> Store:
    folder = f"{store.place.uri.rstrip('/')}/owner/slice-{part.index}-of-{part.count}"
    return Store(replace(store.place, uri=folder))
