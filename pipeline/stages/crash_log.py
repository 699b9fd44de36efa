"""How often work was started, counted outside the process: an image that kills its worker must not loop.

Ray restarts a dead actor and its task for ever. So every start of a unit leaves a mark in the store before
the work, in `attempts/<unit>.g<generation>/`. From the second start on a unit is done image by image and the
image in work is written down; one that was in work at two deaths is given up as `crashed` (or
`timeout`, where the process ended itself for that), after three deaths in all. Deaths of the driver are
not an image's fault: with it all workers go, and an innocent image may be in work. So marks of other
drivers count only in bulk. Processes that die while they load their model are counted likewise.

The stages before and after the model are tasks, of which Ray counts the starts: `Restart` marks those alone
that follow a death, in folders of their own, and charges images by the same rule.

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
from typing import Any, Literal

from hqlabel.pipeline.errors import HqlabelError, ImageError, SystemicFault, text_of
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.settings import Limits
from hqlabel.pipeline.storage.bounded_json import read_json, reason
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.storage.request_retries import shown_uri
from hqlabel.pipeline.worker import logs

DEATHS_UNDER_ONE_DRIVER = 2
DEATHS_UNDER_ANY_DRIVER = 4
MAX_DEATHS_IN_LOADING = 3
MAX_UNEXPLAINED_DEATHS = 5
Stage = Literal["prepare", "segment", "commit"]

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
    """The marks of one job. `epoch`: the number of its driver (`Owner.number`); `stage`: whose they are."""

    def __init__(self, store: Store, *, epoch: int, stage: Stage = "segment") -> None:
        self._store = store
        self._epoch = epoch
        self._stage = stage

    def note_start(self, unit_id: int, generation: int = 0) -> Start:
        """Mark this start in the store before any work; one request when there was none before."""
        earlier = 0
        while not self._store.put_if_absent(self._key(unit_id, generation, earlier), self._mark(earlier)):
            earlier += 1
        visit("attempt.started")
        crashed = self._crashed(unit_id, generation) if earlier else {}
        if earlier:
            logs.event(
                "unit_started_again",
                level=logging.WARNING,
                stage=self._stage,
                unit_id=unit_id,
                earlier_starts=earlier,
                given_up=crashed,
            )
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
        return f"{self._folder(unit_id, generation)}{number:04d}.{kind}.json"

    def _folder(self, unit_id: int, generation: int) -> str:
        stage = "" if self._stage == "segment" else f".{self._stage}"
        return f"attempts/{unit_id:08d}.g{generation}{stage}/"

    def unexplained(self, start: Start) -> int:
        """Return how many starts before this one, under this driver, ended and charged no image."""
        starts = self._marks(start.unit_id, start.generation, "start")
        images = self._marks(start.unit_id, start.generation, "image")
        charged = {number for number, mark in images.items() if isinstance(mark.get("image_id"), str)}
        mine = {number for number, mark in starts.items() if mark.get("epoch") == self._epoch}
        return len(mine - charged - {start.earlier})

    def _marks(self, unit_id: int, generation: int, kind: str) -> dict[int, dict[str, Any]]:
        """Return the marks of a kind, by the number of their start."""
        folder, ending = self._folder(unit_id, generation), f".{kind}.json"
        keys = [entry.key for entry in self._store.list(folder) if entry.key.endswith(ending)]
        return {int(key.removeprefix(folder).removesuffix(ending)): _read(self._store, key) for key in keys}

    def _crashed(self, unit_id: int, generation: int) -> dict[str, str]:
        """Return the images to give up, by the image marks of every start that ended with one in work."""
        found = self._marks(unit_id, generation, "image").values()
        marks = [mark for mark in found if isinstance(mark.get("image_id"), str)]
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


class Restart:
    """A task of `prepare` or `commit` whose process died: Ray starts each again for ever.

    The first start of a task asks nothing of the store. From the second one on, which Ray counts, its unit is
    done image by image under marks, like a unit of a model process that died.
    """

    def __init__(self, store: Store, *, epoch: int, stage: Stage) -> None:
        self._crash_log = CrashLog(store, epoch=epoch, stage=stage)
        self._stage = stage

    def begin(self, unit_id: int, generation: int) -> TaskStart:
        """Mark this start of the unit, before any work.

        Raises:
            SystemicFault: `resources`, after too many deaths with no image in work.
        """
        start = self._crash_log.note_start(unit_id, generation)
        unexplained = self._crash_log.unexplained(start)
        if unexplained >= MAX_UNEXPLAINED_DEATHS:
            raise SystemicFault(
                "resources",
                f"{unexplained} processes died one after another in {self._stage} of unit {unit_id}, none of "
                "them with an image in work; Ray's log on their nodes has the reason, most likely a lack of "
                "memory",
            )
        return TaskStart(crash_log=self._crash_log, start=start, stage=self._stage)


@dataclass(frozen=True, kw_only=True)
class TaskStart:
    """A start of a task whose earlier processes died."""

    crash_log: CrashLog
    start: Start
    stage: Stage

    def begin(self, image_id: str, uri: str) -> ImageError | None:
        """Note the image as the one in work; return its error instead where it has ended too many before."""
        if image_id in self.start.crashed:
            died = f"the process that had it in {self.stage} died each time; twice it was tried alone"
            return ImageError("crashed", f"{shown_uri(uri)}: {died}")
        self.crash_log.note_image(self.start, image_id)
        return None

    def end(self) -> None:
        """Note that all are done, and no image is in work."""
        self.crash_log.note_image(self.start, None)


def _read(store: Store, key: str) -> dict[str, Any]:
    try:
        return dict(read_json(store, key))
    except (ValueError, TypeError) as error:
        raise HqlabelError(
            f"{store.place.uri}/{key} cannot be read ({reason(error)}); delete this one file"
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
    text = text_of(error)
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
