"""How far model processes are within their units, told to the driver through Ray's key-value store.

What is committed is counted by units. A unit is 64 images, a minute and more on a CPU: without this, progress
would stand still for it. Nothing is decided by these numbers, and losing them loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time

from ray.experimental import internal_kv as kv

from hqlabel.pipeline.job_context import LiveCount

_AT_MOST_EVERY_S = 0.5
_UNITS_KEPT = 4  # more than one process has at a time


class Teller:
    """Tells the driver what one model process has done, at most twice a second."""

    def __init__(self, run_id: str, epoch: int, process: str) -> None:
        self._key = (_prefix(run_id, epoch) + process).encode()
        self._units: dict[int, tuple[int, int]] = {}
        self._busy_s = 0.0
        self._told = float("-inf")
        self._lock = threading.Lock()

    def __call__(self, unit_id: int, images: int, failed: int, busy_s: float) -> None:
        """Note that so many images of a unit have left the model; `busy_s`: of the last call."""
        with self._lock:
            self._busy_s += busy_s
            self._units.pop(unit_id, None)
            self._units[unit_id] = (images, failed)
            while len(self._units) > _UNITS_KEPT:
                del self._units[next(iter(self._units))]
            if time.monotonic() - self._told < _AT_MOST_EVERY_S:
                return
            self._told = time.monotonic()
            body = json.dumps({"busy_s": self._busy_s, "units": list(self._units.items())})
        with contextlib.suppress(Exception):  # Ray is ending, or its store is away for a moment
            kv._internal_kv_put(self._key, body.encode(), overwrite=True)


def read(run_id: str, epoch: int) -> list[LiveCount]:
    """Return what every model process of this driver has told last."""
    found = []
    for key in kv._internal_kv_list(_prefix(run_id, epoch)):
        body = kv._internal_kv_get(key)
        if body is not None:
            told = json.loads(body)
            units = {unit: (images, failed) for unit, (images, failed) in told["units"]}
            found.append(LiveCount(busy_s=told["busy_s"], units=units))
    return found


def forget(run_id: str, epoch: int) -> None:
    """Remove what was told, which else stays in a cluster for as long as it runs."""
    with contextlib.suppress(Exception):
        kv._internal_kv_del(_prefix(run_id, epoch), del_by_prefix=True)


def _prefix(run_id: str, epoch: int) -> str:
    return f"hqlabel-live/{run_id}/{epoch}/"
