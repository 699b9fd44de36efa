"""The driver's lock on a job: taken when there is something to write, released however the command ends."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Self

from jobs.job_setup.job_slices import WHOLE, Slice
from jobs.terminal.signals import Interrupts
from pipeline.job_state.driver_lock import Owner
from pipeline.storage.output_store import Store


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
