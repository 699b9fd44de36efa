"""What ends with what: a private Ray's processes and folder with its driver, and the driver with its Ray."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hqlabel.jobs.cluster import ray_watch
from hqlabel.jobs.cluster.ray_watch import RayWatch
from hqlabel.pipeline.errors import SystemicFault

ROOT = Path(__file__).parents[3]
ASLEEP = "import time; print('ready', flush=True); time.sleep(60)"


@pytest.fixture
def private_tmp() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="hq", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_what_writes_into_the_session_ends_with_its_killed_driver_and_the_folder_goes(
    private_tmp: Path,
) -> None:
    driver = python(
        """
        import subprocess, sys, tempfile
        tempfile.tempdir = sys.argv[1]
        from hqlabel.jobs.cluster import ray_cluster as cluster
        with cluster._private_folder() as folder:
            (folder / "log").write_text("")
            sleeper = [sys.executable, "-c", sys.argv[2]]
            writer = subprocess.Popen(sleeper, stdout=(folder / "log").open("a"), start_new_session=True)
            reader = subprocess.Popen(sleeper, stdin=(folder / "log").open(), stdout=subprocess.DEVNULL)
            print(folder, writer.pid, reader.pid, flush=True)
            sys.stdin.read()
        """,
        str(private_tmp), "import time; time.sleep(60)",
    )  # fmt: skip
    folder, writer, reader = line_of(driver).split()
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 20
    while (Path(folder).exists() or is_alive(writer)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(folder).exists()
    assert not is_alive(writer)
    assert is_alive(reader), "who only reads a log, such as `tail`, is none of Ray's"
    subprocess.run(["kill", reader], check=True)


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def deaths() -> list[SystemicFault]:
    return []


def watch_of(node: SimpleNamespace, deaths: list[SystemicFault], monkeypatch: pytest.MonkeyPatch) -> RayWatch:
    module = SimpleNamespace(_global_node=node)
    monkeypatch.setattr(ray_watch.importlib, "import_module", lambda _: module)
    watch = RayWatch(deaths.append)
    watch.start()
    return watch


@pytest.mark.parametrize(("kind", "name"), [("raylet", "raylet"), ("gcs_server", "GCS")])
def test_a_killed_process_of_a_private_ray_is_told_at_once_and_by_name(
    kind: str, name: str, deaths: list[SystemicFault], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = python(ASLEEP)
    line_of(process)
    node = SimpleNamespace(all_processes={kind: [SimpleNamespace(process=process)]})
    watch = watch_of(node, deaths, monkeypatch)
    time.sleep(0.1)
    assert not deaths
    process.send_signal(signal.SIGKILL)
    watch._thread.join(5)
    [fault] = deaths
    assert (fault.code, fault.exit_code) == ("resources", 5)
    assert f"({name}) was killed by signal 9" in fault.message


def test_a_ray_that_is_ended_on_purpose_is_no_fault(
    deaths: list[SystemicFault], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = python(ASLEEP)
    line_of(process)
    node = SimpleNamespace(all_processes={"raylet": [SimpleNamespace(process=process)]})
    watch = watch_of(node, deaths, monkeypatch)
    watch.close()
    process.kill()
    process.wait()
    time.sleep(0.1)
    assert not deaths


def test_a_joined_cluster_is_lost_with_the_local_raylet_or_after_an_outage(
    deaths: list[SystemicFault], monkeypatch: pytest.MonkeyPatch, private_tmp: Path
) -> None:
    monkeypatch.setattr(ray_watch, "_JOINED_POLL_S", 0.05)
    monkeypatch.setattr(ray_watch, "_patience_s", lambda: 1.0)
    with socket.socket(socket.AF_UNIX) as raylet, socket.create_server(("127.0.0.1", 0)) as gcs:
        raylet.bind(str(private_tmp / "raylet"))
        raylet.listen()
        node = SimpleNamespace(
            all_processes={}, raylet_socket_name=str(private_tmp / "raylet"),
            gcs_address=f"127.0.0.1:{gcs.getsockname()[1]}",
        )  # fmt: skip
        watch = watch_of(node, deaths, monkeypatch)
        time.sleep(0.3)
        assert not deaths
        gcs.close()
        time.sleep(0.2)
        assert not deaths, "a coordinator may be started again"
        watch._thread.join(5)
        assert "has not answered for" in deaths.pop().message
        raylet.close()
        watch_of(node, deaths, monkeypatch)._thread.join(5)
        assert "raylet) on this machine has ended" in deaths.pop().message


def test_what_failed_because_ray_died_waits_for_the_watch_to_tell(
    deaths: list[SystemicFault], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = python(ASLEEP)
    line_of(process)
    node = SimpleNamespace(all_processes={"raylet": [SimpleNamespace(process=process)]})
    watch = watch_of(node, deaths, monkeypatch)

    def call() -> None:
        process.kill()
        raise RuntimeError("a call to Ray")

    with pytest.raises(RuntimeError), watch.first_to_tell():
        call()
    assert len(deaths) == 1
