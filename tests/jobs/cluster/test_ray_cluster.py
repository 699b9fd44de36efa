"""Which Ray is used, and how closed a private one is."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hqlabel.jobs.cluster import ray_cluster as cluster
from hqlabel.jobs.cluster.ray_cluster import ClusterInfo, address_to_join, refuse_local_output
from hqlabel.jobs.cluster.ray_watch import RayWatch
from hqlabel.pipeline.errors import JobRefused, SystemicFault, UsageError

ROOT = Path(__file__).parents[3]


def test_a_cluster_is_joined_only_when_one_is_named() -> None:
    assert address_to_join(None, {}) is None
    assert address_to_join(None, {"RAY_ADDRESS": ""}) is None
    assert address_to_join("local", {"RAY_ADDRESS": "10.0.0.1:6379"}) is None
    assert address_to_join(None, {"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    assert address_to_join("10.0.0.2:6379", {"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.2:6379"


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "https://head"])
def test_addresses_that_cannot_be_joined_say_what_to_do(address: str) -> None:
    with pytest.raises(UsageError, match="ray job submit"):
        address_to_join(address, {})


def test_several_nodes_refuse_an_output_on_their_own_disks() -> None:
    one = ClusterInfo(address="local", private=True, nodes=1, cpus=2, gpus=0)
    two = ClusterInfo(address="10.0.0.1:6379", private=False, nodes=2, cpus=2, gpus=0)
    refuse_local_output(one, "/out", is_local=True, shared_paths=False)
    refuse_local_output(two, "s3://b/out", is_local=False, shared_paths=False)
    refuse_local_output(two, "/nfs/out", is_local=True, shared_paths=True)
    with pytest.raises(JobRefused, match=r"/out is a local path, and the cluster has 2 nodes"):
        refuse_local_output(two, "/out", is_local=True, shared_paths=False)


@pytest.fixture
def private_tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short temporary folder of this test alone: sockets need short paths."""
    folder = Path(tempfile.mkdtemp(prefix="hq", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_sessions_are_private_and_removed_at_the_end(private_tmp: Path) -> None:
    with cluster._private_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        with cluster._private_folder() as second:  # a second process of this user leaves the first alone
            assert second != folder
        assert folder.is_dir()
    assert not folder.exists()


def test_the_session_of_a_killed_process_is_removed_by_the_next(private_tmp: Path) -> None:
    code = """
        import os, signal, sys, tempfile
        tempfile.tempdir = sys.argv[1]
        from hqlabel.jobs.cluster import ray_cluster as cluster
        with cluster._private_folder() as folder:
            (folder / "spilled").write_text("much")
            print(folder, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(private_tmp)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    left = Path(done.stdout.strip())
    assert left.is_dir()
    with cluster._private_folder():
        assert not left.exists()


def test_what_a_process_left_before_it_had_marked_its_folder_is_removed_after_an_hour(
    private_tmp: Path,
) -> None:
    with cluster._private_folder() as folder:
        root = folder.parent
    for name in ("rnew", "rold"):
        (root / name).mkdir()
    for name in ("mnew", "mold"):
        (root / name).touch()
    for path in (root / "rold", root / "mold"):
        os.utime(path, (time.time() - 4000,) * 2)
    with cluster._private_folder() as folder:
        assert sorted(path.name for path in root.iterdir()) == sorted([folder.name, "mnew", "rnew"])


ENTER_OFTEN = """
    import os, sys, tempfile
    tempfile.tempdir = sys.argv[1]
    from hqlabel.jobs.cluster import ray_cluster as cluster
    for _ in range(int(sys.argv[2])):
        with cluster._private_folder() as folder:
            (folder / "session").write_text("mine")
            assert sorted(os.listdir(folder)) == ["in-use", "session"], "removed as abandoned"
"""


@pytest.mark.parametrize(("processes", "times"), [(3, 20), pytest.param(6, 200, marks=pytest.mark.faults)])
def test_processes_that_enter_at_once_never_take_each_other_for_dead(
    processes: int, times: int, private_tmp: Path
) -> None:
    call = [sys.executable, "-c", textwrap.dedent(ENTER_OFTEN), str(private_tmp), str(times)]
    racers = [subprocess.Popen(call, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(processes)]
    errors = [process.communicate(timeout=300)[1][-300:] for process in racers]
    assert [process.returncode for process in racers] == [0] * processes, errors
    assert list((private_tmp / f"hqlabel-{os.getuid()}").iterdir()) == []


def test_a_mark_is_locked_before_it_can_be_seen(private_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked a moment later, it would be taken for a dead process's by whoever looks in between."""
    rename, moved = os.rename, []

    def watched(made: str, place: Path) -> None:
        with open(made) as mark, pytest.raises(BlockingIOError):
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        moved.append(place.name)
        rename(made, place)

    monkeypatch.setattr(os, "rename", watched)
    with cluster._private_folder():
        assert moved == ["in-use"]


def test_a_folder_that_others_may_write_is_refused(private_tmp: Path) -> None:
    (private_tmp / f"hqlabel-{os.getuid()}").mkdir(mode=0o777)
    (private_tmp / f"hqlabel-{os.getuid()}").chmod(0o777)
    with pytest.raises(JobRefused, match="not this user's alone"), cluster._private_folder():
        pass


RAY_SCRIPT = """
    import json, os, psutil, re, stat, time
    from hqlabel.jobs.terminal import console
    from hqlabel.jobs.cluster.ray_cluster import running_ray
    from hqlabel.pipeline.settings import ClusterSettings
    with running_ray(ClusterSettings(cpus=1), os.environ) as info:
        import ray
        token = os.environ["RAY_AUTH_TOKEN_PATH"]
        folder = os.path.dirname(token)
        loaded = ray.get(ray.remote(num_cpus=0.1)(lambda: "ray.data" in __import__("sys").modules).remote())

        def with_another():  # a new worker may take long on a busy machine
            open(f"{folder}/worker-{os.getpid()}", "w").close()
            while sum(name.startswith("worker-") for name in os.listdir(folder)) < 2:
                time.sleep(0.1)
            return os.getpid()

        task = ray.remote(num_cpus=0.3)(with_another)
        workers = set(ray.get([task.remote() for _ in range(3)], timeout=60))
        servers = [one for one in psutil.Process().children() if one.name() in ("raylet", "gcs_server")]
        for one in servers:
            one.terminate()  # it goes on: a SIGTERM is for the driver
        time.sleep(2.5)  # Ray looks every 200 ms for workers that had nothing to do for a second
        lines = [" ".join(one.cmdline()) for one in psutil.Process().children(recursive=True)]
        console.data(json.dumps({
            "info": str(info), "mode": os.environ["RAY_AUTH_MODE"],
            "token": oct(stat.S_IMODE(os.stat(token).st_mode)),
            "dashboard": ray._private.worker.global_worker.node.webui_url,
            "folder": oct(stat.S_IMODE(os.stat(folder).st_mode)),
            "answer": ray.get(ray.remote(num_cpus=0.1)(lambda: 7).remote()),
            "usage": os.environ["RAY_USAGE_STATS_ENABLED"],
            "autoscaler": os.environ["RAY_DATA_CLUSTER_AUTOSCALER"],
            "beside": [line for line in lines if re.search("ray::.*Agent|(agent|main|monitor)[.]py", line)],
            "listed": any("raylet/raylet" in line for line in lines),
            "loaded": loaded, "terminated": [one.is_running() for one in servers],
            "workers": len(workers) > 1, "lost": sum(not os.path.exists(f"/proc/{pid}") for pid in workers),
        }))
    with running_ray(ClusterSettings(cpus=1), os.environ) as info:  # again in one process, as benchmarks do
        again = ray.get(ray.remote(num_cpus=0.1)(lambda: 8).remote())
    print(os.path.exists(folder), again, os.environ.get("RAY_AUTH_TOKEN_PATH"))
"""


@pytest.mark.slow
def test_a_private_ray_is_closed_and_leaves_nothing(private_tmp: Path) -> None:
    environ = {**os.environ, "TMPDIR": str(private_tmp), "RAY_ADDRESS": ""}
    done = subprocess.run(
        [sys.executable, "-c", "import os; os.umask(0)\n" + textwrap.dedent(RAY_SCRIPT)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    facts, left = done.stdout.splitlines()
    assert json.loads(facts) == {
        "info": "private Ray on this machine: 1 CPU cores, no GPU",
        "mode": "token",
        "token": "0o600",
        "dashboard": "",
        "folder": "0o700",
        "answer": 7,
        "usage": "0",
        "autoscaler": "V2",  # the one that does not round shares of cores off
        "beside": [],  # none that takes seconds to start, and listens
        "listed": True,
        "loaded": True,
        "terminated": [True, True],
        "workers": True,  # more than a core's
        "lost": 0,
    }
    assert left == "False 8 None"
    assert done.stderr == ""


class FakeRay:
    """Its start takes until it is let go, and its processes are a thread's, as on Linux."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.let_go, self.fault = threading.Event(), fault
        self.thread: threading.Thread | None = None
        self.did: list[str] = []

    def start(self) -> tuple[ClusterInfo, RayWatch]:
        self.thread = threading.current_thread()
        self.let_go.wait(10)
        if self.fault is not None:
            raise self.fault
        self.did.append("started")
        info = ClusterInfo(address="local", private=True, nodes=1, cpus=2, gpus=0)
        return info, SimpleNamespace(close=lambda: self.did.append("unwatched"))  # type: ignore[return-value]

    def shutdown(self) -> None:
        assert self.thread is not None
        assert self.thread.is_alive(), "Linux has ended Ray's processes with the thread that started them"
        self.did.append("ended")


def test_ray_starts_while_other_things_are_done_and_ends_after_its_start() -> None:
    ray = FakeRay()
    start = cluster._Start(ray.start)
    threading.Timer(0.2, ray.let_go.set).start()
    assert ray.did == []
    start.end(ray)  # type: ignore[arg-type]  # half started, it could not be ended
    assert ray.did == ["started", "unwatched", "ended"]
    assert start.result().cpus == 2
    assert ray.thread is not None
    ray.thread.join(10)
    assert not ray.thread.is_alive()


def test_what_kept_ray_from_starting_rises_where_it_is_needed_and_nowhere_else() -> None:
    ray = FakeRay(SystemicFault("resources", "no room"))
    start = cluster._Start(ray.start)
    ray.let_go.set()
    with pytest.raises(SystemicFault, match="no room"), start.first_to_tell():
        start.result()
    start.end(ray)  # type: ignore[arg-type]
    assert ray.did == []
