"""End this process with code 5 and a sentence when its Ray has died, before Ray does it in its own way.

Ray notices the death of its node process (raylet) after 15 s and prints that process's log; of the death of
its coordinator (GCS) after 60 s, and then its C++ ends this process with code 1, which no Python code
sees. Until then calls hang or raise whatever they were doing. A thread looks first.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from hqlabel.pipeline.errors import HqlabelError, SystemicFault

_PRIVATE_POLL_S, _JOINED_POLL_S = 0.02, 0.5
_CONFIRM_S = 0.5
_CONNECT_S = 2.0
_OUTAGE_SHARE = 0.6
"""Of the time after which Ray's C++ ends a process that cannot reach the coordinator."""
_RECONNECT = "gcs_rpc_server_reconnect_timeout_s"
_PARTS = {"raylet": "its node process (raylet)", "gcs_server": "its coordinator (GCS)"}


class RayWatch:
    """Calls `on_death` with the fault, from a thread, when Ray has died before `close`."""

    def __init__(self, on_death: Callable[[SystemicFault], None]) -> None:
        self._on_death = on_death
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-watch", daemon=True)
        self._answered, self._patience_s = 0.0, 0.0

    def start(self) -> None:
        """Begin, before `ray.init`: Ray may die while it starts."""
        self._thread.start()

    def close(self) -> None:
        """Take no death for a fault from here on, because Ray is about to be ended."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @contextlib.contextmanager
    def first_to_tell(self) -> Iterator[None]:
        """Let this watch tell of Ray's death within the block, rather than what then failed."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, HqlabelError) or isinstance(error, SystemicFault):
                self._thread.join(_CONFIRM_S)
            raise

    def _watch(self) -> None:
        worker: Any = importlib.import_module("ray._private.worker")
        poll_s = _PRIVATE_POLL_S
        while not self._closed.wait(poll_s):
            node = worker._global_node  # from the moment that its processes run
            if node is None:
                continue
            private = bool(node.all_processes)
            poll_s = _PRIVATE_POLL_S if private else _JOINED_POLL_S
            what = ended_process(node) if private else self._ended_cluster(node)
            if what and not self._closed.is_set():
                self._on_death(SystemicFault("resources", what))
                return

    def _ended_cluster(self, node: Any) -> str | None:
        """Return what has ended of a cluster that was joined, by whether it takes connections."""
        if not _takes_connections(node.raylet_socket_name):
            return f"Ray's {_PARTS['raylet'].removeprefix('its ')} on this machine has ended"
        if _takes_connections(node.gcs_address):
            self._answered = time.monotonic()
            self._patience_s = self._patience_s or _OUTAGE_SHARE * _patience_s()
            return None
        outage_s = time.monotonic() - self._answered
        if outage_s < self._patience_s:
            return None  # one with a store of its own may be started again meanwhile
        return (
            f"Ray's {_PARTS['gcs_server'].removeprefix('its ')} at {node.gcs_address} has not answered for "
            f"{outage_s:.0f} s: it has ended, or the network to it"
        )


def ended_process(node: Any) -> str | None:
    """Return which of the processes of a private Ray has ended, that all others depend on."""
    for kind, name in _PARTS.items():
        for info in node.all_processes.get(kind, ()):
            code = info.process.poll()
            if code is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                return f"Ray has died: {name} {how}, such as by the system when memory ran out"
    return None


def _takes_connections(address: str) -> bool:
    """Return whether something listens at a socket's path or at `host:port`; a busy one counts."""
    try:
        if address.startswith(("/", "unix:")):
            with socket.socket(socket.AF_UNIX) as one:
                one.settimeout(_CONNECT_S)
                one.connect(address.removeprefix("unix:").removeprefix("//"))
        else:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except BlockingIOError:  # its queue is full
        return True
    except OSError:
        return False
    return True


def _patience_s() -> float:
    """Return how long Ray's C++ lets the coordinator be unreachable, before it ends this process."""
    state: Any = importlib.import_module("ray._private.state")
    by_default = os.environ.get(f"RAY_{_RECONNECT}", "60")
    return float(state.state.get_system_config().get(_RECONNECT, by_default))
