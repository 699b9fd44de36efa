"""Start a private Ray on this machine, or join the cluster that was named; nothing else.

A private Ray is closed: no dashboard, token authentication with its own token, files for the
owner alone, never another cluster that happens to run here. Importing Ray and starting it costs
seconds, so this file is imported only by the commands that compute.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hqlabel
from hqlabel.jobs.cluster.ray_messages import SUFFIX, messages_kept
from hqlabel.jobs.cluster.ray_watch import RayWatch, ended_process
from hqlabel.jobs.terminal.console import stdout_for_data_alone
from hqlabel.jobs.terminal.signals import Interrupted
from hqlabel.pipeline.errors import JobRefused, SystemicFault, UsageError, clean_text
from hqlabel.pipeline.settings import ClusterSettings

if TYPE_CHECKING:
    from types import ModuleType

# A socket path has at most 107 bytes; our folder, Ray's session and its socket names take 76 of them.
_LONGEST_ROOT = 31
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_IN_USE = "in-use"
_UNMARKED_S, _MESSAGES_S = 3600.0, 7 * 24 * 3600.0
_END_SESSION = Path(__file__).with_name("end_session.py")
_CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
_PACKAGE = Path(hqlabel.__file__).parent


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """What a running Ray offers. `private`: started by this process, and ended with it."""

    address: str
    private: bool
    nodes: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        where = "private Ray on this machine" if self.private else f"Ray at {self.address}"
        gpus = f", {self.gpus:g} GPUs" if self.gpus else ", no GPU"
        nodes = "" if self.nodes == 1 else f", {self.nodes} nodes"
        return f"{where}: {self.cpus:g} CPU cores{gpus}{nodes}"


def address_to_join(wanted: str | None, environ: Mapping[str, str]) -> str | None:
    """Return the address of the cluster to join, or None for a private Ray.

    `wanted` (from the command or the configuration) goes before RAY_ADDRESS, which `ray job submit`
    sets for its entrypoint; `local` asks for a private Ray in any case. Raises `UsageError`.
    """
    address = wanted or environ.get("RAY_ADDRESS") or None
    if address in (None, "local"):
        return None
    if address.startswith("ray://"):
        raise UsageError(
            f"--ray-address {address}: the Ray Client is not supported, because the job would end with this "
            "terminal; submit it instead: ray job submit --working-dir . -- python -m hqlabel label ..."
        )
    if address.startswith(("http://", "https://")):
        raise UsageError(
            f"--ray-address {address} is a dashboard; give the cluster's host:port (often port 6379), or "
            f"submit the job: ray job submit --address {address} --working-dir . -- "
            "python -m hqlabel label ..."
        )
    return address


@contextlib.contextmanager
def running_ray(
    section: ClusterSettings,
    environ: MutableMapping[str, str],
    on_death: Callable[[SystemicFault], None] = lambda _: None,
) -> Iterator[ClusterInfo]:
    """Yield what `starting_ray` does, once it runs."""
    with starting_ray(section, environ, on_death) as ready:
        yield ready()


@contextlib.contextmanager
def starting_ray(
    section: ClusterSettings,
    environ: MutableMapping[str, str],
    on_death: Callable[[SystemicFault], None] = lambda _: None,
) -> Iterator[Callable[[], ClusterInfo]]:
    """Yield a function that returns a Ray to work on, until the block ends.

    A private one starts meanwhile, and the function waits for it. `environ` is this process's, and gets Ray's
    switches. `on_death` is called from a thread when Ray dies, and is expected to end the process.

    Raises:
        UsageError: an address of a kind that cannot be joined.
        JobRefused: no cluster answers at the address.
        SystemicFault: `resources`, by the function, when a private Ray does not start.
    """
    address = address_to_join(section.ray_address, environ)
    with stdout_for_data_alone():
        if address is None:
            # Ray Data's other autoscaler (its default from 2.60 on) asks for shares of cores, of which the
            # coordinator then drops what is left below a whole core: of 2.0 cores 1.95 stayed, and one of
            # two decode tasks. There is nothing to scale here.
            environ.setdefault("RAY_DATA_CLUSTER_AUTOSCALER", "V2")
            # Its processes work in this one's environment, and no agent is there that could make another.
            environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
            environ.pop(_JOB_VARIABLE, None)
            with _private_folder() as folder, _token_in(folder / "auth_token", environ):
                ray = _import_ray(environ)
                with messages_kept(_private_root):
                    start = _Start(lambda: _start_private(ray, section, folder, on_death))
                    with _unless_interrupted(lambda: start.end(ray)), start.first_to_tell():
                        yield start.result
        else:
            if _JOB_VARIABLE not in environ:  # a submitted job goes by what its cluster was started with
                environ.setdefault("RAY_AUTH_MODE", "token")
            ray = _import_ray(environ)
            with messages_kept(_private_root):
                info = _join(ray, address, environ)
                watch = RayWatch(on_death)
                watch.start()
                unwatch, end_ray = _unless_interrupted(watch.close), _unless_interrupted(ray.shutdown)
                with unwatch, end_ray, watch.first_to_tell():
                    yield lambda: info


def refuse_local_output(info: ClusterInfo, output_uri: str, *, is_local: bool, shared_paths: bool) -> None:
    """Raise `JobRefused` when several nodes would each write to their own disk."""
    if is_local and info.nodes > 1 and not shared_paths:
        raise JobRefused(
            f"the output {output_uri} is a local path, and the cluster has {info.nodes} nodes with a disk "
            "each; give a store such as s3://bucket/folder or, when it is one shared folder on all of them, "
            "--set cluster.shared_paths=true"
        )


def usable_cpus() -> int:
    """Return the CPU cores that this process may use, by its affinity and container's quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota_cpus(_CGROUP_CPU) or cores))


def _quota_cpus(path: Path) -> int | None:
    """Return whole cores of a cgroup v2 quota (`200000 100000` is 2), None without one."""
    try:
        quota, period = path.read_text().split()
        return int(int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return None


@contextlib.contextmanager
def _unless_interrupted(clean_up: Callable[[], None]) -> Iterator[None]:
    """Clean up at the end of a block, but not after a signal.

    The process then ends within seconds, while cleaning up takes longer: a private Ray ends with the process.
    """
    try:
        yield
    except Interrupted:
        raise
    except BaseException:
        clean_up()
        raise
    clean_up()


def _import_ray(environ: MutableMapping[str, str]) -> ModuleType:
    """Return Ray, imported after the switches that it reads while it is imported."""
    environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # By default a worker beyond one a core ends after a second without a task, and its successor's imports
    # cost two seconds of a core: on two cores that was two thirds of what the chain did.
    environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    # Leave CUDA_VISIBLE_DEVICES of CPU tasks as it is.
    environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


@contextlib.contextmanager
def _token_in(path: Path, environ: MutableMapping[str, str]) -> Iterator[None]:
    """Let a private Ray accept the user's token meanwhile or, without one, a new one in `path`."""
    environ["RAY_AUTH_MODE"] = "token"
    if environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH"):
        yield
        return
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(_own_token())
    environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    try:
        yield
    finally:
        del environ["RAY_AUTH_TOKEN_PATH"]  # the file goes with its folder


@lru_cache(maxsize=1)
def _own_token() -> str:
    """Return the token of every private Ray of this process: Ray reads it once and keeps it."""
    return secrets.token_hex(32)


class _Start:
    """A start of a private Ray in a thread, so that its seconds are not waited for before Ray is needed.

    The thread lives until that Ray has ended: Linux ends Ray's processes with the thread that started them.
    """

    def __init__(self, start: Callable[[], tuple[ClusterInfo, RayWatch]]) -> None:
        self._start = start
        self._came: tuple[ClusterInfo, RayWatch] | None = None
        self._error: BaseException | None = None
        self._done, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="ray-start", daemon=True).start()

    def _run(self) -> None:
        try:
            self._came = self._start()
        except BaseException as error:  # raised where Ray is needed
            self._error = error
        self._done.set()
        self._over.wait()

    def result(self) -> ClusterInfo:
        """Wait until Ray runs; raises what its start raised."""
        self._done.wait()
        if self._came is None:
            assert self._error is not None, "it has ended one way or the other"
            raise self._error
        return self._came[0]

    @contextlib.contextmanager
    def first_to_tell(self) -> Iterator[None]:
        """Let the watch of a Ray that runs tell of its death, rather than what then failed."""
        try:
            yield
        except Exception:
            if self._came is None:
                raise
            with self._came[1].first_to_tell():
                raise

    def end(self, ray: ModuleType) -> None:
        """End Ray, once it has started: half started, its C++ would end this process with it."""
        self._done.wait()
        if self._came is not None:
            self._came[1].close()
            ray.shutdown()
        self._over.set()


def _start_private(
    ray: ModuleType, section: ClusterSettings, folder: Path, on_death: Callable[[SystemicFault], None]
) -> tuple[ClusterInfo, RayWatch]:
    # Ray gives its processes 30 s to come up, which a busy machine may need twice.
    for name in ("s", "t"):
        watch = RayWatch(on_death)
        watch.start()
        try:
            with _without_side_processes():
                ray.init(
                    address="local",
                    num_cpus=section.cpus or usable_cpus(),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _skip_env_hook=True,
                    # A worker imports this while others are busy, before it takes its first task.
                    _system_config={"preload_python_modules": ["ray.data"]},
                    _temp_dir=str(folder / name),  # Ray opens this folder to all; the one above stays closed
                )
            _end_by_sigkill()
            return _info(ray, "local", private=True), watch
        except Exception as error:
            watch.close()
            ray.shutdown()
            fault = error
    raise SystemicFault("resources", f"Ray does not start on this machine: {_reason(fault)}") from fault


@contextlib.contextmanager
def _without_side_processes() -> Iterator[None]:
    """Start Ray meanwhile without its dashboard, autoscaler, log monitor and agents.

    A private Ray needs none of them, and no option disables them (Ray 2.60). The dashboard asks the cloud's
    metadata service (169.254.169.254) what cloud this is, though usage reports are off; the autoscaler offers
    its figures to every network with ray[default] installed. The raylet takes nothing on before its agents,
    for metrics and runtime environments, have told their ports: seconds, of which nothing is used here.
    """
    services: Any = importlib.import_module("ray._private.services")
    node: Any = importlib.import_module("ray._private.node").Node
    worker: Any = importlib.import_module("ray._private.worker")
    start_process, connect = services.start_ray_process, worker.connect

    def start_without_agents(command: list[str], kind: str, *args: Any, **kwargs: Any) -> Any:
        own = _without_agents(command) if kind == "raylet" else command
        with _sigterm_blocked():
            return start_process(own, kind, *args, **kwargs)

    def connect_to_living(started: Any, *args: Any, **kwargs: Any) -> Any:
        ended = ended_process(started)
        if ended is not None:  # connecting, Ray's C++ would end this process too, with code 1
            raise RuntimeError(ended)
        return connect(started, *args, **kwargs)

    replaced = [
        (worker, "connect", connect_to_living),
        (services, "start_api_server", lambda *_, **__: ("", None)),  # no address, no process
        (services, "start_ray_process", start_without_agents),
        (node, "start_monitor", lambda _: None),
        (node, "start_log_monitor", lambda _: None),
    ]
    kept = [(holder, name, getattr(holder, name)) for holder, name, _ in replaced]
    for holder, name, value in replaced:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, name, value in kept:
            setattr(holder, name, value)


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Let processes that start meanwhile never receive SIGTERM, as Ray does with SIGINT.

    A raylet that receives one leaves its cluster in good order, and Ray's C++ then ends the driver with 1
    before any Python code sees it. So SIGTERM is for the driver alone, and ends everything.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_by_sigkill() -> None:
    """Let `ray.shutdown` not wait for answers to SIGTERM, which this Ray's processes do not receive."""
    worker: Any = importlib.import_module("ray._private.worker")
    node = worker._global_node
    end = node.kill_all_processes
    node.kill_all_processes = lambda **_: end(check_alive=False, allow_graceful=False)


def _without_agents(command: list[str]) -> list[str]:
    """Return the raylet's command with a process in the place of each agent that waits for its end.

    The raylet ends with an agent, so there must be one. -1 for a port means a service that is not offered.
    """
    raylet: Any = importlib.import_module("ray._raylet")
    values = dict(word.removeprefix("--").split("=", 1) for word in command if "=" in word)
    for service in ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN", "RUNTIME_ENV_AGENT"):
        raylet.persist_port(
            values["session_dir"], values["node_id"], getattr(raylet, f"{service}_PORT_NAME"), -1
        )
    waiting = subprocess.list2cmdline([sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"])
    agents = ("--dashboard_agent_command=", "--runtime_env_agent_command=")
    changed = [f"{word.partition('=')[0]}={waiting}" if word.startswith(agents) else word for word in command]
    # With first workers the raylet answers a driver only when they have come: seconds in which Ray's C++
    # keeps all of Python waiting, and ends this process with code 1 if the raylet dies.
    first = "--num_prestart_python_workers="
    return [f"{first}0" if word.startswith(first) else word for word in changed]


def _join(ray: ModuleType, address: str, environ: Mapping[str, str]) -> ClusterInfo:
    options: dict[str, Any] = {}
    if _JOB_VARIABLE not in environ:  # a submitted job has brought its code as working_dir
        options["runtime_env"] = {"py_modules": [str(_PACKAGE)]}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:
        raise JobRefused(
            f"no Ray cluster can be joined at {address}: {_reason(error)}. Check `ray status` there, and "
            "that RAY_AUTH_MODE and the token here are those of the cluster"
        ) from error
    return _info(ray, address, private=False)


def _info(ray: ModuleType, address: str, *, private: bool) -> ClusterInfo:
    total = ray.cluster_resources()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return ClusterInfo(
        address=address,
        private=private,
        nodes=len(alive),
        cpus=float(total.get("CPU", 0)),
        gpus=float(total.get("GPU", 0)),
    )


def _reason(error: BaseException) -> str:
    first = str(error).strip().splitlines()[:1]
    return clean_text(first[0] if first else type(error).__name__)


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """Yield this process's own folder for Ray's session.

    However this process ends, a small one that waits for that ends Ray's processes and removes the folder.
    """
    root = _private_root()
    _remove_abandoned(root)
    folder = Path(tempfile.mkdtemp(prefix="r", dir=root))
    with _held_mark(root, folder), _ended_with_this_process(folder):
        yield folder


@contextlib.contextmanager
def _ended_with_this_process(folder: Path) -> Iterator[None]:
    """End what Ray started and remove its folder after the block or, without a word, after this process."""
    command = [sys.executable, "-I", "-S", str(_END_SESSION), str(folder)]
    nothing = subprocess.DEVNULL
    # A session of its own: no Ctrl-C and no closed terminal reach it.
    ender = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing, start_new_session=True
    )
    with _unless_interrupted(lambda: _end(ender)):
        yield


def _end(ender: subprocess.Popen[bytes]) -> None:
    ender.communicate()  # closes the pipe, and waits


@contextlib.contextmanager
def _held_mark(root: Path, folder: Path) -> Iterator[None]:
    """Hold the mark of a folder in use; the kernel releases it however the process dies.

    It is locked before it moves into the folder: a mark that is there and free, even for the moment between
    making and locking it, is what others take for a dead process's, and remove with the whole folder.
    """
    descriptor, made = tempfile.mkstemp(prefix="m", dir=root)
    with os.fdopen(descriptor, "w") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        os.rename(made, folder / _IN_USE)
        yield


def _private_root() -> Path:
    """Return a folder under the temporary folder that belongs to this user and is closed to others."""
    base = Path(tempfile.gettempdir())
    root = base / f"hqlabel-{os.getuid()}"
    if len(os.fsencode(root)) > _LONGEST_ROOT:
        root = Path("/tmp") / root.name
    root.mkdir(mode=0o700, exist_ok=True)
    state = root.lstat()
    if root.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise JobRefused(
            f"the folder {root} for Ray's files is not this user's alone; remove it, or set TMPDIR to another"
        )
    return root


def _remove_abandoned(root: Path) -> None:
    """Remove the sessions whose process was killed; their spilled objects may fill the disk.

    What has no mark is of a process killed within the milliseconds before it had one, or while it removed its
    folder, unless it is new: then its process may be about to mark it. Messages of Ray stay for a week.
    """
    for path in root.iterdir():
        mark = path / _IN_USE
        with contextlib.suppress(OSError):
            if mark.exists():
                with mark.open("r") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            elif time.time() - path.stat().st_mtime > (_MESSAGES_S if path.suffix == SUFFIX else _UNMARKED_S):
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
