"""What Ray would print over a job's progress goes into a file, and one line says which."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from hqlabel.jobs.cluster import ray_cluster
from hqlabel.jobs.cluster.ray_messages import messages_kept


def test_what_ray_would_print_is_kept_in_a_closed_file_that_is_named_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray._private.worker as worker

    printed = worker.print_to_stdstream
    with messages_kept(lambda: tmp_path):
        for line in ("file_system_monitor: /tmp is over 95% full", "2 workers killed due to memory pressure"):
            worker.print_to_stdstream(
                {"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False
            )
    assert worker.print_to_stdstream is printed
    (file,) = tmp_path.iterdir()
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"Ray has something to say of this machine or cluster: {file}\n")
    kept = file.read_text().splitlines()
    assert [line.partition(" raylet: ")[2] for line in kept] == [
        "file_system_monitor: /tmp is over 95% full",
        "2 workers killed due to memory pressure",
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_silent_ray_leaves_no_file(tmp_path: Path) -> None:
    with messages_kept(lambda: tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_messages_are_kept_for_a_week(tmp_path: Path) -> None:
    for name, days in (("ray-new.log", 6), ("ray-old.log", 8)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - days * 24 * 3600,) * 2)
    ray_cluster._remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ray-new.log"]
