"""What the host does with finished numbers, beside the device that makes the next ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

MOST_BEGUN = 8
"""Pieces of work begun and not done; whoever brings more waits. Bounds what they hold in memory."""


class HostWork:
    """Does pieces of work in the order they are brought.

    `aside`: in a thread, so that who brings them can tell a GPU what to do next; else at once.
    """

    def __init__(self, *, aside: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="host-work") if aside else None
        self._begun: deque[Future[Any]] = deque()

    def begin(self, work: Callable[[], T]) -> Callable[[], T]:
        """Return what waits for the work's result and gives it, or raises what the work raised."""
        if self._pool is None:
            result = work()
            return lambda: result
        while len(self._begun) >= MOST_BEGUN:
            self._begun.popleft().exception()  # waits; an error is for who asks for the result
        future = self._pool.submit(work)
        self._begun.append(future)
        return future.result
