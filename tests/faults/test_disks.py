"""Rows 43 and 44: a disk that is full or fails stops the job, and the rest is done when it is mended."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.job_state.job_file import read_job
from hqlabel.pipeline.tables.verify_output import verify
from tests.faults import chain
from tests.faults.chain import SmallJob, in_child, look, lost_and_doubled, run_job
from tests.faults.conftest import Record

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system; the test with a limit on file sizes stands in")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


def test_row_43_a_full_disk_stops_the_job_and_room_lets_it_go_on(
    small_job: SmallJob, wanted: chain.Seen, small_disk: Path, record: Record
) -> None:
    made = small_job.at(Place(uri=str(small_disk / "out")))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(256 * 1024 - 36 * 1024))  # room for the job's first files
    began = time.monotonic()
    with pytest.raises(SystemicFault) as caught:
        run_job(made)
    seconds = time.monotonic() - began
    assert (caught.value.code, caught.value.exit_code) == ("disk", 5)
    assert list(small_disk.rglob("*.tmp")) == [], "half a file was left"
    job = read_job(made.store)
    assert job is None or all("interrupted" in str(one) for one in verify(made.store, job).findings)

    filler.unlink()
    run_job(made)

    assert look(made.store) == wanted
    lost, doubled = lost_and_doubled(made.store, made)
    record(
        43,
        fault="disk full (tmpfs)",
        landed=1,
        lost=lost,
        doubled=doubled,
        recover_s=seconds,
        code="5, then 0",
    )


def _limited(made: SmallJob, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        run_job(made)
    except SystemicFault as fault:
        os._exit(fault.exit_code if fault.code == "disk" else 99)


def test_row_43_a_file_that_may_not_grow_is_not_committed(
    small_job: SmallJob, wanted: chain.Seen, tmp_path: Path, record: Record
) -> None:
    landed = 0
    for size in (500, 5_000, 9_000):
        made = small_job.at(Place(uri=str(tmp_path / str(size))))
        assert in_child(_limited, made, size) == 5, size
        assert list(tmp_path.rglob("*.tmp")) == []
        run_job(made)
        assert look(made.store) == wanted
        landed += 1
    record(43, fault="file size limit reached (EFBIG)", landed=landed, code="5, then 0")


SYNC = """
import sys, pickle
from tests.faults.chain import run_job
with open(sys.argv[1], "rb") as file:
    run_job(pickle.load(file))
"""


@pytest.mark.faults
@pytest.mark.parametrize("call", ["fsync:error=EIO", "link:error=EIO"])
def test_row_44_a_disk_that_fails_a_call_is_tried_again_or_stops_the_job(
    call: str, small_job: SmallJob, wanted: chain.Seen, tmp_path: Path, record: Record
) -> None:
    import pickle

    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    name = call.split(":")[0]
    landed, codes = 0, set()
    for when in (2, 5, 9):
        made = small_job.at(Place(uri=str(tmp_path / f"{when}")))
        (tmp_path / "made").write_bytes(pickle.dumps(made))
        log = tmp_path / "strace"
        command = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={name}", "-e"]
        command += [f"inject={call}:when={when}", sys.executable, "-c", SYNC, str(tmp_path / "made")]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=200
        )
        landed += log.read_text().count("(INJECTED)")
        codes.add(done.returncode)
        assert done.returncode in (0, 1), done.stderr[-800:]
        if done.returncode:
            assert "SystemicFault: disk" in done.stderr, done.stderr[-800:]
        run_job(made)
        assert look(made.store) == wanted
    code = " or ".join(str(5 if one else 0) for one in sorted(codes))
    record(44, fault=f"strace {call}", landed=landed, code=code)
