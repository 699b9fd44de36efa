"""Files of outputs, exports and reports follow the umask."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.scenes import DataSet
from tests.jobs.made_outputs import MadeImage, make_output


def hqlabel(umask: int, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hqlabel", *arguments],
        cwd=tempfile.gettempdir(),
        env={**os.environ, "RAY_worker_niceness": "0"},
        umask=umask,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def modes(place: Path) -> Iterator[tuple[str, int, bool]]:
    for path in (place, *place.rglob("*")):
        yield str(path), stat.S_IMODE(path.stat().st_mode), path.is_dir()


def unlike(place: Path, umask: int) -> list[str]:
    return [
        f"{path}: {mode:o}"
        for path, mode, is_dir in modes(place)
        if mode != (0o777 if is_dir else 0o666) & ~umask
    ]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_exports_and_reports_follow_the_umask(tmp_path: Path, umask: int) -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[5:20, 10:40] = 1
    output = make_output(tmp_path / "out", [MadeImage(image_id="a", masks=[mask])])
    made = tmp_path / "made"

    hqlabel(umask, "export", "coco", "--output", output, "--to", str(made / "coco"))
    hqlabel(umask, "report", "--output", output, "--to", str(made / "report.html"))

    assert {path.name for path in made.iterdir()} >= {"coco", "report.html"}
    assert [] == unlike(made, umask)


def test_the_results_of_a_job_follow_the_umask(data_set: DataSet, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"

    hqlabel(
        0o027, "label", "--images", str(data_set.images), "--boxes", str(data_set.boxes), "--checkpoint",
        str(checkpoint), "--output", str(output), "--limit", "2", "--set", "cluster.actors=1",
        "--set", "limits.max_failure_rate=1",
    )  # fmt: skip

    names = {path.relative_to(output).parts[0] for path in output.rglob("*") if path.is_file()}
    assert names >= {"config.yaml", "job.json", "manifest.json", "units", "plan", "images", "instances"}
    assert [] == unlike(tmp_path / "deep", 0o027)
