"""How far a job is: a live bar on a terminal, one plain line every 30 s in a log, on stderr.

They are written by threads of their own, so that they keep coming when nothing moves: a stall is
seen as a rate that falls, not as silence. Time left comes from the last three minutes, because the
start (loading the model, filling the pipe) does not predict the rest.

Images count as done when the model is done with them, though their unit is committed only later; what is
counted for good are outcomes of units alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import count
from hqlabel.pipeline.job_context import LiveCount, UnitOutcome

Mode = Literal["live", "lines", "silent"]
LINE_EVERY_S = 30.0
_WINDOW_S = 180.0
_LIVE_PER_SECOND = 4
_WATCH_EVERY_S = 1.0


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


@dataclass(frozen=True)
class _Sample:
    """Where it was: images done by then, and the seconds that the processes there had spent in the model."""

    at: float
    images: int
    busy_s: float


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
        self._samples: deque[_Sample] = deque([_Sample(self._began, 0, 0.0)])
        self._committed: set[int] = set()
        self._in_work = (0, 0)
        self._busy_s, self._processes = 0.0, 0
        self._live: Live | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._mode == "live":
            self._live = Live(
                get_renderable=self._bar,
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

    @contextlib.contextmanager
    def watching(self, read: Callable[[], Sequence[LiveCount]]) -> Iterator[None]:
        """Ask meanwhile, each second, how far the model processes are within their units."""
        if self._mode == "silent":
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_WATCH_EVERY_S):
                with contextlib.suppress(Exception):  # Ray is away for a moment: what it said last stays
                    self.see(read())

        thread = threading.Thread(target=watch, name="watch-units", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=1.0)

    def see(self, live: Sequence[LiveCount]) -> None:
        """Take note of how far the model processes are; may be called from any thread."""
        with self._lock:
            units: dict[int, tuple[int, int]] = {}
            for one in live:
                for unit, told in one.units.items():
                    if unit not in self._committed:  # of a unit begun again, the farther counts
                        units[unit] = max(units.get(unit, (0, 0)), told)
            self._in_work = (sum(done for done, _ in units.values()), sum(bad for _, bad in units.values()))
            self._busy_s, self._processes = sum(one.busy_s for one in live), len(live)
            self._sample()

    def add(self, outcome: UnitOutcome) -> None:
        """Count one finished unit; may be called from any thread."""
        with self._lock:
            self._counts = self._counts.plus(outcome)
            self._codes.update(outcome.failed_by_code)
            self._committed.add(outcome.unit_id)
            # Until the next look: this unit's images are counted now.
            self._in_work = (max(0, self._in_work[0] - outcome.images), 0)
            self._sample()

    def counts(self) -> CallCounts:
        """Return what `add` has counted."""
        with self._lock:
            return self._counts

    def line(self) -> str:
        """Return the progress in one line of plain text, failures first."""
        with self._lock:
            failed, moves, kept = self._failed(), self._moves(), self._kept_now()
            done, total = self._done(), self._total - self._kept_now()
        images = f"{done:,} of {count(total, 'image')} ({console.share(done, total)})"
        return " · ".join([*failed, images, *moves, *([f"{kept:,} kept"] if kept else [])])

    def _bar(self) -> Group:
        """Return the progress in two lines of a terminal: a bar, and under it failures first."""
        with self._lock:
            failed, moves, kept = self._failed(), self._moves(), self._kept_now()
            done, total = self._done(), self._total - kept
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        images = f"{done:,} of {count(total, 'image')}  {console.share(done, total)}"
        grid.add_row(ProgressBar(total=max(total, 1), completed=done), Text(images))
        text = Text(failed[0] if failed else "", style="bold red")
        rest = " · ".join([*moves, *([f"{kept:,} kept"] if kept else [])])
        text.append(" · " * bool(failed) + rest, style="default not bold")
        text.no_wrap, text.overflow = True, "ellipsis"
        return Group(grid, text)

    def _done(self) -> int:
        return min(self._total, self._done_before + self._counts.anew + self._in_work[0])

    def _kept_now(self) -> int:
        return max(self._kept, self._counts.kept)

    def _failed(self) -> list[str]:
        failed, worst = self._counts.failed + self._in_work[1], self._codes.most_common(1)
        return [f"{failed:,} failed" + (f" (most: {worst[0][0]})" if worst else "")] if failed else []

    def _moves(self) -> list[str]:
        """Return how fast it goes, how long it will take, and how busy the model is."""
        now, total = self._clock(), self._total - self._kept_now()
        self._forget_old(now)
        done, images_per_s, busy = self._done(), *self._rates(now)
        if images_per_s <= 0 and self._counts.units:
            return [f"nothing finished in the last {console.duration(now - self._samples[-1].at)}"]
        if images_per_s <= 0:
            waiting = f"no image finished yet, {console.duration(now - self._began)}"
            return [*([self._beginning] if self._beginning else []), waiting]
        left = console.duration(max(0, total - done) / images_per_s)
        parts = [f"{console.rate(images_per_s)} images/s"]
        parts.append(f"about {left} left" if done < total else "finishing")
        return [*parts, *([f"model busy {round(100 * busy)}%"] if busy is not None else [])]

    def _sample(self) -> None:
        """Take note of where it is now, unless that is where it was."""
        now, images = self._clock(), self._counts.anew + self._in_work[0]
        if self._samples[-1].images == 0 < images and self._busy_s and not self._counts.units:
            # Nothing is said of the start, minutes perhaps: the rate begins with the first call of the model.
            begun = max(self._began, now - self._busy_s / self._processes)
            self._samples = deque([_Sample(begun, 0, 0.0)])
        if images != self._samples[-1].images:
            self._samples.append(_Sample(now, images, self._busy_s))
        self._forget_old(now)

    def _rates(self, now: float) -> tuple[float, float | None]:
        """Return images a second, and the share of time that model processes spend in the model."""
        first, last = self._samples[0], self._samples[-1]
        seconds = max(min(now - first.at, _WINDOW_S), 1e-9)
        images = self._counts.anew + self._in_work[0] - first.images
        busy_s, busy_over = last.busy_s - first.busy_s, (last.at - first.at) * self._processes
        busy = min(1.0, busy_s / busy_over) if busy_over > 0 and busy_s > 0 else None
        return images / seconds, busy

    def _forget_old(self, now: float) -> None:
        """Keep the samples inside the window, and the last one before it: the state when it began."""
        while len(self._samples) > 1 and self._samples[1].at <= now - _WINDOW_S:
            self._samples.popleft()

    def _write_lines(self) -> None:
        while not self._over.wait(self._every):
            console.say(f"{time.strftime('%H:%M:%S')}  {self.line()}")


def choose_mode(*, wanted: bool, is_terminal: bool) -> Mode:
    """Return `live` on a terminal, `lines` in a log, `silent` when progress is not wanted."""
    if not wanted:
        return "silent"
    return "live" if is_terminal else "lines"
