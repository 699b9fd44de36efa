"""How far a job is: one live line on a terminal, one plain line every 30 s in a log, on stderr.

The line is written by its own thread, so that it keeps coming when nothing moves: a stall is
seen as a rate that falls, not as silence. Time left comes from the last three minutes, because the
start (loading the model, filling the pipe) does not predict the rest.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import count
from hqlabel.pipeline.job_context import UnitOutcome

Mode = Literal["live", "lines", "silent"]
LINE_EVERY_S = 30.0
_WINDOW_S = 180.0
_LIVE_PER_SECOND = 4


@dataclass(frozen=True, kw_only=True)
class CallCounts:
    """What the units of this process have brought so far; images done before it are not in it."""

    units: int = 0
    images: int = 0
    labelled: int = 0
    no_boxes: int = 0
    failed: int = 0
    instances: int = 0
    bytes: int = 0
    repeated: int = 0
    """Images of units that were already committed when they were done again."""
    begun_before: int = 0
    """Images that a killed process had begun, and that were done again."""
    kept: int = 0
    """Images whose rows were taken over from before, of `images`."""

    @property
    def anew(self) -> int:
        """The images that were really done."""
        return self.images - self.kept

    def plus(self, outcome: UnitOutcome) -> CallCounts:
        """Return the counts with those of one more unit."""
        summed = ("images", "labelled", "no_boxes", "failed", "instances", "bytes", "begun_before", "kept")
        sums = {name: getattr(self, name) + getattr(outcome, name) for name in summed}
        repeated = self.repeated + (outcome.images if outcome.repeated else 0)
        return CallCounts(units=self.units + 1, repeated=repeated, **sums)


class Progress:
    """A context manager that shows progress and counts the outcomes given to `add`.

    `total_images`: planned; `done_images`: of these, done before this process began; `kept_images`: of these,
    in pending units and known to keep their rows. What is kept counts as nothing done. `beginning`: what
    takes long before the first image, as text.
    """

    def __init__(
        self,
        *,
        total_images: int,
        done_images: int,
        kept_images: int = 0,
        mode: Mode,
        beginning: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        line_every_s: float = LINE_EVERY_S,
    ) -> None:
        self._total, self._done_before = total_images, done_images
        self._kept = kept_images
        self._mode, self._clock, self._every = mode, clock, line_every_s
        self._beginning = beginning
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._counts = CallCounts()
        self._codes: Counter[str] = Counter()
        self._began = clock()
        self._samples: deque[tuple[float, int, int]] = deque([(self._began, 0, 0)])
        self._live: Live | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._mode == "live":
            self._live = Live(
                get_renderable=lambda: Text(self.line(), no_wrap=True, overflow="ellipsis"),
                console=Console(stderr=True),
                refresh_per_second=_LIVE_PER_SECOND,
                redirect_stdout=False,  # stdout is data
            )
            self._live.start()
        elif self._mode == "lines":
            self._thread = threading.Thread(target=self._write_lines, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._live is not None:
            self._live.stop()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def add(self, outcome: UnitOutcome) -> None:
        """Count one finished unit; may be called from any thread."""
        with self._lock:
            self._counts = self._counts.plus(outcome)
            self._codes.update(outcome.failed_by_code)
            now = self._clock()
            self._samples.append((now, self._counts.anew, self._counts.instances))
            self._forget_old(now)

    def counts(self) -> CallCounts:
        """Return what `add` has counted."""
        with self._lock:
            return self._counts

    def line(self) -> str:
        """Return the progress in one line of plain text."""
        with self._lock:
            now, counts = self._clock(), self._counts
            self._forget_old(now)
            images_per_s, boxes_per_s = self._rates(now)
            worst = self._codes.most_common(1)
        kept = max(self._kept, counts.kept)
        done, total = self._done_before + counts.anew, self._total - kept
        parts = [f"{done:,} of {count(total, 'image')} ({console.share(done, total)})"]
        if images_per_s > 0:
            boxes = "" if kept else f", {console.rate(boxes_per_s)} boxes/s"  # of a unit, kept ones with it
            parts.append(f"{console.rate(images_per_s)} images/s{boxes}")
            left = max(0, total - done) / images_per_s
            parts.append(f"about {console.duration(left)} left" if done < total else "finishing")
        elif counts.units:
            parts.append(f"nothing finished in the last {console.duration(now - self._samples[-1][0])}")
        else:
            parts.extend([self._beginning] if self._beginning else [])
            parts.append(f"no image finished yet, {console.duration(now - self._began)}")
        if counts.failed:
            parts.append(f"{counts.failed:,} failed" + (f" (most: {worst[0][0]})" if worst else ""))
        if kept:
            parts.append(f"{kept:,} kept")
        return " · ".join(parts)

    def _rates(self, now: float) -> tuple[float, float]:
        began, images, instances = self._samples[0]
        seconds = max(min(now - began, _WINDOW_S), 1e-9)
        return (self._counts.anew - images) / seconds, (self._counts.instances - instances) / seconds

    def _forget_old(self, now: float) -> None:
        """Keep the samples inside the window, and the last one before it: the state when it began."""
        while len(self._samples) > 1 and self._samples[1][0] <= now - _WINDOW_S:
            self._samples.popleft()

    def _write_lines(self) -> None:
        while not self._over.wait(self._every):
            console.say(f"{time.strftime('%H:%M:%S')}  {self.line()}")


def choose_mode(*, wanted: bool, is_terminal: bool) -> Mode:
    """Return `live` on a terminal, `lines` in a log, `silent` when progress is not wanted."""
    if not wanted:
        return "silent"
    return "live" if is_terminal else "lines"
