"""Ray clusters of several nodes on this machine, each with the cores and GPUs that it is said to have."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.soak import FAST_DEATH_NOTICE, ray_token

REPOSITORY = Path(__file__).resolve().parents[2]
STORE = 100 * 2**20


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The worker nodes of a running cluster, by a name of ours; the head has no cores."""

    address: str
    cluster: Any
    workers: dict[str, Any] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, *, cpus: int, gpus: int = 0, **environment: str) -> None:
        """None, when the node has joined. Call it from the main thread: Ray sets signal handlers."""
        for tries_left in (3, 2, 1, 0):
            port = free_port()
            try:
                self.workers[name] = self.cluster.add_node(
                    num_cpus=cpus, num_gpus=gpus, object_store_memory=STORE, include_dashboard=False,
                    env_vars=environment, metrics_export_port=port,
                )  # fmt: skip
            except Exception:  # Ray gives a node 30 s to come up, which a busy machine may not keep
                if not tries_left:
                    raise
            else:
                self.ports[name] = port
                return

    def kill(self, name: str) -> None:
        """The node is gone without a word."""
        self.cluster.remove_node(self.workers.pop(name), allow_graceful=False)

    def prepared(self) -> dict[str, int]:
        """Units that each node has fetched and decoded, by what its metrics say."""
        return {name: _prepared(self.ports[name]) for name in self.workers}

    def model_nodes(self, trace: Path) -> Counter[str]:
        """How many images each living node's model processes were given, by the stub's trace files."""
        raylets = {node.all_processes["raylet"][0].process.pid: name for name, node in self.workers.items()}
        found: Counter[str] = Counter()
        for file in trace.glob("*.txt"):
            with contextlib.suppress(psutil.Error):
                parents = [one.pid for one in psutil.Process(int(file.stem)).parents()]
                for name in (raylets[pid] for pid in parents if pid in raylets):
                    found[name] += len(file.read_text().splitlines())
        return found


@contextlib.contextmanager
def cluster_of(**nodes: dict[str, Any]) -> Iterator[Nodes]:
    """A head and these nodes, such as `a={"cpus": 2, "gpus": 1}`; all end with the block."""
    with pytest.MonkeyPatch.context() as patch:
        folder = Path(tempfile.mkdtemp(prefix="hq", dir="/tmp"))  # socket paths must be short
        environment = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ray_token(), "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        for name, value in environment.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
        cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": FAST_DEATH_NOTICE})
        try:
            started = Nodes(address=cluster.address, cluster=cluster)
            for name, resources in nodes.items():
                started.add(name, **resources)
            yield started
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _prepared(port: int) -> int:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics",
        headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=20) as reply:
        text = reply.read().decode()
    counts = re.findall(r'^ray_hqlabel_stage_seconds_count\{.*stage="prepare".*\} (\S+)$', text, re.MULTILINE)
    return int(sum(map(float, counts)))


# ---------------------------------------------------------------------------------------------
# A head with a job API
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head without cores and one node, started with `ray start`; `environment` holds the token."""

    url: str
    environment: dict[str, str]

    def submit(self, *entrypoint: str, folder: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        """`ray job submit` from `cwd` with `folder` as working dir, until the job has ended."""
        command = [*_ray(), "job", "submit", "--address", self.url, "--working-dir", str(folder), "--"]
        return subprocess.run(
            [*command, *entrypoint], cwd=cwd, env=self.environment, text=True, timeout=400, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def get(self, path: str, token: str | None = None) -> tuple[int, str]:
        """(status, body) of a request to the dashboard, with the token or with none or another."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers)) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""


@contextlib.contextmanager
def head_with_job_api(port: int, dashboard: int) -> Iterator[Head]:
    """A head with dashboard on loopback and token authentication, and a node of two cores."""
    folder = Path(tempfile.mkdtemp(prefix="hq", dir="/tmp"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    others = [one for one in kept.pop("PYTHONPATH", "").split(os.pathsep) if one and Path(one) != REPOSITORY]
    environment = {
        **kept, "PYTHONPATH": os.pathsep.join(others), "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
        "RAY_TMPDIR": str(folder),
    }  # fmt: skip
    common = ["--block", "--object-store-memory", str(STORE)]
    head = ["--head", "--num-cpus=0", f"--port={port}", "--dashboard-host=127.0.0.1"]
    place = f"127.0.0.1:{port}"
    started: list[subprocess.Popen[bytes]] = []
    try:
        for options in ([*head, f"--dashboard-port={dashboard}"], ["--num-cpus=2", f"--address={place}"]):
            # A group of its own: what is started is ended, and nothing else, which `ray stop` would do.
            log = (folder / f"{len(started)}.log").open("wb")
            started.append(
                subprocess.Popen(
                    [*_ray(), "start", *options, *common], env=environment, cwd=folder, stdout=log,
                    stderr=log, start_new_session=True,
                )
            )  # fmt: skip
            _wait_until_up(folder, started, dashboard, environment["RAY_AUTH_TOKEN"], nodes=len(started))
        yield Head(url=f"http://127.0.0.1:{dashboard}", environment=environment)
    finally:
        family = [child for one in started for child in _family(one.pid)]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for one in started:
            one.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _ray() -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts"]


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _wait_until_up(
    folder: Path, started: list[subprocess.Popen[bytes]], dashboard: int, token: str, *, nodes: int
) -> None:
    deadline = time.monotonic() + 180
    head = Head(url=f"http://127.0.0.1:{dashboard}", environment={})
    while True:
        logs = "\n".join(file.read_text() for file in folder.glob("*.log"))
        assert all(one.poll() is None for one in started), logs
        with contextlib.suppress(OSError):
            status, body = head.get("/nodes?view=summary", token)
            if status == 200 and body.count('"state": "ALIVE"') + body.count('"state":"ALIVE"') >= nodes:
                return
        assert time.monotonic() < deadline, logs
        time.sleep(0.5)
