"""When a driver may be called dead, and that every start proves its store; more: test_job_file.py."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.job_state.driver_lock import Holder, Owner, this_process
from hqlabel.pipeline.storage import cloud_buckets as buckets
from hqlabel.pipeline.storage.output_store import Store

ROOT = Path(__file__).parents[3]
JUDGE = """
    import json, os, sys
    from hqlabel.pipeline.job_state.driver_lock import Holder, _state_and_start
    if len(sys.argv) > 2:
        os.setgid(65534), os.setuid(65534)
    holder = Holder(**json.loads(sys.argv[1]))
    print(holder.is_surely_dead(), _state_and_start(holder.pid) != ("", ""))
"""


def judge(holder: Holder, *, wrapped: str = "exec", as_nobody: bool = False) -> tuple[str, str]:
    """Whether another process calls `holder` dead, and whether it sees it in its /proc."""
    call = [sys.executable, "-c", textwrap.dedent(JUDGE), json.dumps(dataclasses.asdict(holder))]
    script = f'{wrapped} "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "judge", *call, *(["nobody"] if as_nobody else [])],
        capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("this machine lets nobody make namespaces")
    assert done.returncode == 0, done.stderr
    dead, seen = done.stdout.split()
    return dead, seen


def gone_process() -> int:
    """The number of a process that has ended and was waited for."""
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


def test_another_process_of_this_machine_is_judged_by_the_kernel() -> None:
    mine = this_process()
    assert judge(mine) == ("False", "True")
    assert judge(dataclasses.replace(mine, pid=gone_process()))[0] == "True"
    assert judge(dataclasses.replace(mine, started="17"))[0] == "True"  # the number was given out again


@pytest.mark.skipif(os.getuid() != 0, reason="needs the right to mount")
def test_a_living_driver_that_proc_hides_is_not_called_dead() -> None:
    """With hidepid=2 another user's processes are not in /proc."""
    hidden = "unshare --mount true || exit 77; exec unshare --mount bash -c '" + (
        'mount -t proc -o hidepid=2 proc /proc && exec "$@"\' judge'
    )
    assert judge(this_process(), wrapped=hidden, as_nobody=True) == ("False", "False")
    gone = dataclasses.replace(this_process(), pid=gone_process())
    assert judge(gone, wrapped=hidden, as_nobody=True)[0] == "True"


@pytest.mark.skipif(os.getuid() != 0, reason="needs the right to make namespaces")
def test_a_driver_in_another_pid_namespace_of_this_kernel_is_not_judged() -> None:
    """As in two containers that share a disk: the same boot, and numbers that mean nothing to each other."""
    apart = "unshare --pid --fork true || exit 77; exec unshare --pid --fork --mount-proc"
    assert judge(this_process(), wrapped=apart)[0] == "False"


@pytest.mark.parametrize(
    "unknown",
    [{"boot": ""}, {"pids": ""}, {"started": ""}, {"host": "another"}, {"pids": "pid:[1]"}, {"boot": "b"},
     {"pid": 0}, {"pid": -1}, {"pid": 2**70}],
)  # fmt: skip
def test_without_all_that_tells_processes_apart_nothing_is_known(unknown: dict[str, object]) -> None:
    gone = dataclasses.replace(this_process(), pid=gone_process())
    assert gone.is_surely_dead()
    assert not dataclasses.replace(gone, **unknown).is_surely_dead()  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "header"), [("create", "If-None-Match"), ("replace_if", "If-Match")])
def test_a_store_that_ignores_conditions_is_refused_at_every_start(
    method: str, header: str, s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store may have been changed for another since the job began."""
    Owner.take(s3_store).release()

    def replace(self: buckets.S3Backend, path: str, data: bytes, *_: object, timeout_s: float) -> None:
        self.replace(path, data, timeout_s=timeout_s)

    monkeypatch.setattr(buckets.S3Backend, method, replace)
    for _ in range(2):
        with pytest.raises(JobRefused, match=f"{header} is ignored"):
            Owner.take(s3_store, takeover_after_s=0.2)
