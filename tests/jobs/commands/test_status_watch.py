"""`hqlabel status --watch`: what it shows while a job goes on, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from hqlabel.jobs.commands import status
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.job_status import status as look
from tests.e2e import commands
from tests.pipeline.made_units import MadeJob, make_job


@pytest.fixture
def made(tmp_path: Path) -> MadeJob:
    """A job of 22 images in 6 units, one of them committed."""
    made = make_job(Store(Place(uri=str(tmp_path / "out"))))
    made.commit([0])
    return made


def test_a_log_gets_a_line_a_look_until_all_is_committed_and_stdout_the_last_state(
    made: MadeJob, capsys: pytest.CaptureFixture[str]
) -> None:
    def commit_the_rest() -> None:
        for unit_id in range(1, 6):
            made.commit([unit_id], failing=("img-00007.jpg",))
            time.sleep(0.2)

    worker = threading.Thread(target=commit_the_rest)
    worker.start()
    config = ConfigSources(flags={"output.uri": made.store.place.uri})
    code = status.run(config, json=True, watch=True, every_s=0.05)
    worker.join()

    out, err = capsys.readouterr()
    assert code == 0
    assert json.loads(out)["images"] == {
        "planned": 22,
        "done": 22,
        "by_status": {"no_boxes": 5, "labelled": 15, "failed": 2},
        "failed_by_code": {"not_found": 1, "no_usable_box": 1},
    }
    done = [int(line.split()[1]) for line in err.splitlines()]
    assert done[0] == 4
    assert done == sorted(done)
    assert len(set(done)) >= 3, "nothing was seen to move"
    assert "\x1b" not in err


def test_a_unit_is_read_once_however_often_one_looks(made: MadeJob) -> None:
    seen: dict = {}
    first = look(made.store, made.job, seen=seen)
    Path(made.store.place.uri, next(iter(seen))).write_bytes(b"")  # reading it again would find damage
    made.commit([1])

    second = look(made.store, made.job, seen=seen)

    assert (first.units_done, second.units_done) == (1, 2)
    assert second.counts.images == 8


def test_ctrl_c_ends_a_watch_with_130(made: MadeJob) -> None:
    process = commands.start("status", "--output", made.store.place.uri, "--watch")
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)

    assert "4 of 22 images (18.2%)" in first
    assert (process.returncode, out) == (130, "")


def test_a_terminal_gets_one_picture_drawn_anew(made: MadeJob) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(commands.REPOSITORY)}
        words = ["-m", "hqlabel", "status", "--watch", "--output", made.store.place.uri]
        os.execv(sys.executable, [sys.executable, *words])
    shown = ""
    while "committed" not in shown:
        shown += _read(terminal)
    os.kill(pid, signal.SIGINT)
    while part := _read(terminal):
        shown += part
    _, state = os.waitpid(pid, 0)

    assert os.waitstatus_to_exitcode(state) == 130
    assert "4 of 22 done (18.2%)" in shown
    assert "\x1b[?25l" in shown, "the cursor was not hidden: this was no live picture"
    assert shown.rstrip().count("\x1b[?25h") >= 1, "the cursor stays hidden"


def _read(terminal: int, timeout_s: float = 60) -> str:
    ready, _, _ = select.select([terminal], [], [], timeout_s)
    assert ready, "nothing more came from the terminal"
    try:
        return os.read(terminal, 4096).decode()
    except OSError:  # what Linux says when the other end is closed
        return ""
