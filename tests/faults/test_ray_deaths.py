"""Row 11: a private Ray's processes and its driver killed at the start, in the work and at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.commands import Command, make_folder
from tests.faults.conftest import Record
from tests.faults.ray_kills import MOMENTS, TARGETS, strike

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[str]:
    command = Command(folder=folder, out=folder / "undisturbed")
    command.run()
    return command.digests()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("target", TARGETS)
def test_row_11_a_killed_process_ends_the_job_with_5_or_nobody_notices(
    target: str, moment: str, folder: Path, tmp_path: Path, wanted: list[str], record: Record
) -> None:
    """`python -m tests.faults.ray_kills` does the same many times, and prints a table."""
    seen = strike(Command(folder=folder, out=tmp_path / "out"), wanted, target, moment, seed=0)
    assert seen.landed, seen
    assert seen.sound, seen
    code = f"{seen.code}" if seen.again is None else f"{seen.code}, then {seen.again}"
    record(11, fault=f"{target} SIGKILL, {moment}; {len(seen.left)} processes left after 10 s", landed=1,
           lost=seen.lost, doubled=seen.doubled, recover_s=seen.ended_s, code=code)  # fmt: skip
