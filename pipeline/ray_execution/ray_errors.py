"""What Ray raises -> the exception that was raised in the task, or the systemic fault that it means."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ray.data.exceptions
import ray.exceptions

from hqlabel.pipeline.errors import SystemicFault, clean_text


@contextlib.contextmanager
def raise_original() -> Iterator[None]:
    """Raise what a task raised as itself, and Ray's own errors as the systemic faults that they mean."""
    try:
        yield
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        raise _translated(error) from error


def _translated(error: BaseException) -> BaseException:
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        return _translated(cause) if isinstance(cause, Exception) else error
    if isinstance(error, ray.exceptions.OutOfDiskError | ray.exceptions.ObjectStoreFullError):
        return SystemicFault("disk", f"Ray's object store: {_line(error, 0)}")
    if isinstance(error, ray.data.exceptions.ExecutionTimeoutError):
        return SystemicFault("resources", f"nothing has finished for hours: {_line(error, 0)}")
    if isinstance(error, ray.exceptions.ActorDiedError):
        return SystemicFault("resources", f"a model process does not start: {_line(error, -1)}")
    if isinstance(error, ray.exceptions.RayError):
        return SystemicFault("resources", f"Ray: {_line(error, 0)}")
    return error


def _line(error: BaseException, place: int) -> str:
    """Return the first (0) or last (-1) line of a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return clean_text(lines[place].strip())
