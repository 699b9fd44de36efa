"""How often work was started, counted outside the process: an image that kills its worker must not loop.

Ray restarts a dead actor and its task for ever. So every start of a unit leaves a mark in the store before
the work, in `attempts/<unit>.g<generation>/`. From the second start on a unit is done image by image and the
image in work is written down; one that was in work at two deaths is given up as `crashed` (or
`timeout`, where the process ended itself for that), after three deaths in all. Deaths of the driver are
not an image's fault: with it all workers go, and an innocent image may be in work. So marks of other
drivers count only in bulk. Processes that die while they load their model are counted likewise.

Nothing here needs a delete: a commit makes the marks of its unit meaningless.

`CallGuard` ends the process when a call of a model takes too long or its GPU is lost.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import secrets
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hqlabel.pipeline.errors import HqlabelError, SystemicFault
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.storage.output_store import Store

DEATHS_UNDER_ONE_DRIVER = 2
DEATHS_UNDER_ANY_DRIVER = 4
MAX_DEATHS_IN_LOADING = 3

EXIT_STATUS = 1
_BACKSTOP_S = 15.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a unit, to be worked on now.

    `earlier`: starts before this one that led to no commit. `crashed`: image ids that are to be written as
    `failed`, without being touched again, with the code: `crashed` or `timeout`.
    """

    unit_id: int
    generation: int
    earlier: int
    crashed: dict[str, str]

    @property
    def image_by_image(self) -> bool:
        """Whether the image in work must be noted with `CrashLog.note_image`."""
        return self.earlier > 0


class CrashLog:
    """The marks of one job. `epoch`: the number of its driver (`Owner.number`)."""

    def __init__(self, store: Store, *, epoch: int) -> None:
        self._store = store
        self._epoch = epoch

    def note_start(self, unit_id: int, generation: int = 0) -> Start:
        """Mark this start in the store before any work; one request when there was none before."""
        earlier = 0
        while not self._store.put_if_absent(self._key(unit_id, generation, earlier), self._mark(earlier)):
            earlier += 1
        visit("attempt.started")
        crashed = self._crashed(unit_id, generation) if earlier else {}
        return Start(unit_id=unit_id, generation=generation, earlier=earlier, crashed=crashed)

    def note_image(self, start: Start, image_id: str | None, *, code: str = "crashed") -> None:
        """Note the image that this start works on from now; None: nothing that could kill.

        `code`: what a death from here on means; `timeout` right before this process ends itself.
        """
        body = json.dumps({"epoch": self._epoch, "image_id": image_id, "code": code}).encode()
        self._store.put(self._key(start.unit_id, start.generation, start.earlier, "image"), body)
        visit("attempt.image")

    @contextlib.contextmanager
    def limit_load_crashes(self, restarted: str | None) -> Iterator[None]:
        """Count the processes of a worker that die while the block loads their model.

        Too little memory for the weights kills each one, and Ray would start the next for ever.
        `restarted`: the name of the worker, None when no process of it has died.

        Raises:
            SystemicFault: `resources`, at the start after `MAX_DEATHS_IN_LOADING` of them.
        """
        if restarted is None:
            yield
            return
        key = f"attempts/model.{self._epoch}.{restarted}.json"
        deaths = int(self._store.read(key)) if self._store.head(key) is not None else 0
        if deaths >= MAX_DEATHS_IN_LOADING:
            raise SystemicFault(
                "resources",
                f"{deaths} processes died one after another while they loaded the model, most likely for "
                "lack of memory; give the nodes more, or set fewer cluster.actors",
            )
        self._store.put(key, str(deaths + 1).encode())
        yield
        self._store.put(key, b"0")

    def _mark(self, number: int) -> bytes:
        # Unlike in every start, or a second one would count as the first one's repeated request.
        return json.dumps({"epoch": self._epoch, "number": number, "token": secrets.token_hex(8)}).encode()

    def _key(self, unit_id: int, generation: int, number: int, kind: str = "start") -> str:
        return f"{_folder(unit_id, generation)}{number:04d}.{kind}.json"

    def _crashed(self, unit_id: int, generation: int) -> dict[str, str]:
        """Return the images to give up, by the image marks of every start that ended with one in work."""
        entries = self._store.list(_folder(unit_id, generation))
        marks = [_read(self._store, one.key) for one in entries if one.key.endswith(".image.json")]
        marks = [mark for mark in marks if isinstance(mark.get("image_id"), str)]
        everywhere = Counter(mark["image_id"] for mark in marks)
        here = Counter(mark["image_id"] for mark in marks if mark["epoch"] == self._epoch)
        codes = {
            mark["image_id"]: "timeout" if mark.get("code") == "timeout" else "crashed" for mark in marks
        }
        return {
            image_id: codes[image_id]
            for image_id, deaths in sorted(everywhere.items())
            if here[image_id] >= DEATHS_UNDER_ONE_DRIVER or deaths >= DEATHS_UNDER_ANY_DRIVER
        }


def _folder(unit_id: int, generation: int) -> str:
    return f"attempts/{unit_id:08d}.g{generation}/"


def _read(store: Store, key: str) -> dict[str, Any]:
    body = store.read(key)
    try:
        return dict(json.loads(body))
    except (ValueError, TypeError) as error:
        raise HqlabelError(
            f"{store.place.uri}/{key} cannot be read ({error}); delete this one file"
        ) from error


class CallGuard:
    """Guards the calls of the models for one start of a unit."""

    def __init__(
        self, crash_log: CrashLog, start: Start, limits: Limits, end_process: Callable[[int], Any]
    ) -> None:
        self._crash_log, self._start = crash_log, start
        self._limits, self._end_process = limits, end_process

    @property
    def image_by_image(self) -> bool:
        """Whether an earlier process died of this unit; each image is then noted before it is tried."""
        return self._start.image_by_image

    def note_image(self, image_id: str | None) -> None:
        """Note the image that is tried from now on."""
        self._crash_log.note_image(self._start, image_id)

    def deadline(
        self, image_ids: Sequence[str], timeout_s: float | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Bound the block, a call with these images, by their time; after it the process ends."""
        if timeout_s is None:
            timeout_s = self._limits.segment_timeout_s * len(image_ids)
        return deadline(timeout_s, lambda: self._exit_on_timeout(image_ids))

    def exit_if_device_lost(self, error: BaseException) -> None:
        """End the process when the error shows that the device is gone."""
        if is_device_lost(error):
            _log.error("the GPU is lost to this process, which ends: %s", error)
            self._end_process(EXIT_STATUS)

    def _exit_on_timeout(self, image_ids: Sequence[str]) -> None:
        with contextlib.suppress(Exception):  # without the note, this counts as a crash
            if len(image_ids) == 1:
                self._crash_log.note_image(self._start, image_ids[0], code="timeout")
        self._end_process(EXIT_STATUS)


def is_device_lost(error: BaseException) -> bool:
    """Return whether the GPU is gone for this process: a CUDA error that is not about memory.

    After one, every later call in the process fails or gives wrong numbers.
    """
    text = str(error)
    lost = "CUDA error" in text or type(error).__name__ == "AcceleratorError"
    return lost and "out of memory" not in text.lower()


@contextlib.contextmanager
def deadline(timeout_s: float, on_timeout: Callable[[], None]) -> Iterator[None]:
    """Call `on_timeout` in another thread when the block takes too long; it ends the process.

    A block that never lets go of the interpreter also keeps that thread from running. For it there is
    Python's own watchdog, which needs no interpreter: it prints where all threads are and exits.
    """
    timer = threading.Timer(timeout_s, on_timeout)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(timeout_s + _BACKSTOP_S, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
