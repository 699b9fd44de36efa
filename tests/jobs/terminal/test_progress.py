"""The progress line: what it counts, and what it says when nothing moves."""

from __future__ import annotations

import io
import sys
import time

import pytest
from rich.console import Console

from hqlabel.jobs.terminal.progress import Progress, choose_mode
from hqlabel.pipeline.job_context import LiveCount, UnitOutcome


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def outcome(unit: int, *, failed: int = 0, repeated: bool = False, kept: int = 0) -> UnitOutcome:
    return UnitOutcome(
        unit_id=unit,
        generation=0,
        images=10,
        labelled=10 - failed,
        no_boxes=0,
        failed=failed,
        instances=30,
        bytes=1000,
        repeated=repeated,
        kept=kept,
        failed_by_code={"not_found": failed} if failed else {},
    )


def test_the_line_counts_rates_and_what_is_left() -> None:
    clock = Clock()
    progress = Progress(total_images=1000, done_images=500, mode="silent", clock=clock)
    assert progress.line() == "500 of 1,000 images (50%) · no image finished yet, 0.0 s"
    slow = Progress(total_images=9, done_images=0, mode="silent", clock=clock, beginning="it is compiled")
    assert slow.line() == "0 of 9 images (0%) · it is compiled · no image finished yet, 0.0 s"
    clock.now += 10
    progress.add(outcome(0))
    progress.add(outcome(1, failed=2))
    assert progress.line() == (
        "2 failed (most: not_found) · 520 of 1,000 images (52%) · 2.00 images/s · about 4 min 00 s left"
    )


def test_rows_that_are_kept_are_not_counted_as_done() -> None:
    clock = Clock()
    known = Progress(total_images=40, done_images=0, kept_images=35, mode="silent", clock=clock)
    found = Progress(total_images=40, done_images=0, mode="silent", clock=clock)
    assert known.line() == "0 of 5 images (0%) · no image finished yet, 0.0 s · 35 kept"
    clock.now += 10
    known.add(outcome(0, kept=8))
    found.add(outcome(0, kept=8))
    assert known.line() == "2 of 5 images (40%) · 0.20 images/s · about 15.0 s left · 35 kept"
    assert found.line() == "2 of 32 images (6.2%) · 0.20 images/s · about 2 min 30 s left · 8 kept"
    assert (known.counts().images, known.counts().kept, known.counts().anew) == (10, 8, 2)


def test_time_left_goes_by_the_last_minutes_and_not_by_the_start() -> None:
    clock = Clock()
    progress = Progress(total_images=100_000, done_images=0, mode="silent", clock=clock)
    clock.now += 600  # a model that takes ten minutes to load
    for unit in range(400):
        clock.now += 1
        progress.add(outcome(unit))
    assert "10.0 images/s" in progress.line()


def test_a_stall_is_said() -> None:
    clock = Clock()
    progress = Progress(total_images=1000, done_images=0, mode="silent", clock=clock)
    clock.now += 1
    progress.add(outcome(0))
    clock.now += 400
    progress.add(outcome(1))
    clock.now += 60
    assert "images/s" in progress.line()
    clock.now += 300
    assert "nothing finished in the last 6 min 00 s" in progress.line()


def test_counts_add_up_and_repeats_are_kept_apart() -> None:
    progress = Progress(total_images=20, done_images=0, mode="silent")
    progress.add(outcome(0, failed=1))
    progress.add(outcome(1, repeated=True))
    counts = progress.counts()
    assert (counts.units, counts.images, counts.labelled, counts.failed) == (2, 20, 19, 1)
    assert (counts.instances, counts.bytes, counts.repeated) == (60, 2000, 10)


def test_a_log_gets_plain_lines_also_when_nothing_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress(total_images=20, done_images=0, mode="lines", line_every_s=0.02):
        time.sleep(0.2)
    lines = log.getvalue().splitlines()
    assert len(lines) >= 2
    assert all("0 of 20 images (0%) · no image finished yet" in line and "\x1b" not in line for line in lines)


def test_silence_when_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(
        total_images=20, done_images=0, mode=choose_mode(wanted=False, is_terminal=True)
    ) as progress:
        progress.add(outcome(0))
    assert capsys.readouterr() == ("", "")
    assert choose_mode(wanted=True, is_terminal=True) == "live"
    assert choose_mode(wanted=True, is_terminal=False) == "lines"


def test_it_moves_by_image_and_counts_none_twice_when_a_unit_is_committed() -> None:
    clock = Clock()
    progress = Progress(total_images=40, done_images=0, mode="silent", clock=clock)
    clock.now += 10
    progress.see([LiveCount(busy_s=4.0, units={0: (4, 0)}), LiveCount(busy_s=4.0, units={1: (6, 1)})])
    assert (
        progress.line()
        == "1 failed · 10 of 40 images (25%) · 2.50 images/s · about 12.0 s left · model busy 100%"
    )
    assert progress.counts().images == 0
    clock.now += 10
    progress.see([LiveCount(busy_s=12.0, units={0: (10, 0)}), LiveCount(busy_s=12.0, units={1: (10, 2)})])
    progress.add(outcome(0))
    progress.see([LiveCount(busy_s=12.0, units={0: (10, 0)}), LiveCount(busy_s=12.0, units={1: (10, 2)})])
    assert progress.line().startswith("2 failed · 20 of 40 images (50%) · 1.43 images/s")
    assert "model busy 86%" in progress.line()
    progress.add(outcome(1, failed=2))
    assert progress.line().startswith("2 failed (most: not_found) · 20 of 40 images (50%)")


def test_a_unit_begun_again_elsewhere_counts_once() -> None:
    progress = Progress(total_images=40, done_images=0, mode="silent", clock=Clock())
    progress.see([LiveCount(busy_s=1.0, units={3: (7, 0)}), LiveCount(busy_s=1.0, units={3: (2, 0)})])
    assert "7 of 40 images" in progress.line()


def test_failures_and_the_rate_are_seen_on_80_columns() -> None:
    clock = Clock()
    progress = Progress(total_images=1_000_000, done_images=0, mode="silent", clock=clock)
    clock.now += 10
    progress.add(outcome(0, failed=3))
    progress.see([LiveCount(busy_s=9.3, units={1: (25, 0)})])
    page = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    page.print(progress._bar())
    bar, text = page.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert bar.rstrip().endswith("35 of 1,000,000 images  <0.1%")
    assert text.startswith("3 failed (most: not_found) · 3.50 images/s · about ")
    assert text.rstrip().endswith("model busy 93%")
    assert max(len(bar), len(text)) <= 80


def test_what_is_told_is_asked_for_until_the_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hqlabel.jobs.terminal.progress._WATCH_EVERY_S", 0.01)
    progress = Progress(total_images=40, done_images=0, mode="lines")
    asked = []

    def read() -> list[LiveCount]:
        asked.append(1)
        if len(asked) == 1:
            raise ConnectionError("the cluster is away")
        return [LiveCount(busy_s=1.0, units={0: (5, 0)})]

    with progress.watching(read):
        deadline = time.monotonic() + 10
        while "5 of 40" not in progress.line() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "5 of 40" in progress.line()
    number = len(asked)
    time.sleep(0.1)
    assert len(asked) == number
