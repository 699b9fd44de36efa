"""Who drives a job: one driver at a time, found without clocks and without any delete.

Each driver creates `owner/<n>.json` with the next number and counts in `owner/<n>.beat.json`. The
highest number owns the job. A newcomer watches the holder's counter on its own monotonic clock: if it
moves, the job is taken; if not, or if the holder was a process of this machine that is gone, the
newcomer takes n + 1. A paused driver that wakes up finds the higher number and stops. Two drivers at
once can waste work, and nothing else: commits are created if absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter
from pydantic_core import from_json

from hqlabel.pipeline.errors import HqlabelError, JobRefused, SystemicFault
from hqlabel.pipeline.failpoints import visit
from hqlabel.pipeline.storage.bounded_json import FEW_BYTES, read_json, reason
from hqlabel.pipeline.storage.output_store import NotFound, Store

BEAT_EVERY_S = 2.0
TAKEOVER_AFTER_S = 8.0
WATCH_EVERY_S = 0.25
BEAT_BUDGET_S = 20.0

_KEY = re.compile(r"owner/(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """One driver process, as its owner file states it. `boot`, `pids` and `started` tell pids of one
    machine apart: kernel boot id, pid and time namespaces, and the process's start time in clock ticks.
    """

    token: str
    host: str
    pid: int
    boot: str
    pids: str
    started: str

    def is_surely_dead(self) -> bool:
        """Return whether this was a process of this machine and namespaces, and is gone; False: unknown.

        /proc alone does not tell: with hidepid it hides the processes of others. The kernel does not hide
        from a signal whether there is such a process.
        """
        here = this_process()
        place = (self.boot, self.pids, self.host)
        if place != (here.boot, here.pids, here.host) or not all((*place, self.started, self.pid > 0)):
            return False
        try:
            os.kill(self.pid, 0)  # signal 0 only asks
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # there is one, of another user; or no number of a process
            pass
        state, started = _state_and_start(self.pid)
        return state in ("Z", "X") or started not in ("", self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Holder:
    """Return the record of the running process, with a token of its own."""
    pids, clock = _link("/proc/self/ns/pid"), _link("/proc/self/ns/time")
    return Holder(
        token=secrets.token_hex(16),
        host=socket.gethostname(),
        pid=os.getpid(),
        boot=_text("/proc/sys/kernel/random/boot_id"),
        pids=f"{pids} {clock}" if pids else "",
        started=_state_and_start(os.getpid())[1],
    )


def _text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def _state_and_start(pid: int) -> tuple[str, str]:
    """Return a process's state and its start in ticks since boot; "" when /proc does not show it."""
    after_name = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (after_name[0], after_name[19]) if len(after_name) > 19 else ("", "")


class Owner:
    """This process as the driver of a job, until `release`; a context manager.

    `number`: its place in the line of drivers. `lost`: set when a higher number was seen; the driver
    then stops starting work. Its heartbeat is a daemon thread.
    """

    def __init__(self, store: Store, number: int, holder: Holder, *, beat_every_s: float) -> None:
        self.number = number
        self.holder = holder
        self.lost = threading.Event()
        self._store = store
        self._beats = Store(store.place, budget_s=BEAT_BUDGET_S)
        self._every_s = beat_every_s
        self._stopped = threading.Event()
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="hqlabel-owner", daemon=True)

    @classmethod
    def take(
        cls,
        store: Store,
        *,
        takeover_after_s: float = TAKEOVER_AFTER_S,
        beat_every_s: float = BEAT_EVERY_S,
    ) -> Owner:
        """Return this process as the owner, heartbeat started; wait `takeover_after_s` for a silent holder.

        Raises:
            JobRefused: another driver is alive; names its host and process.
        """
        holder = this_process()
        while True:
            number = latest_number(store)
            if number:
                _wait_for_silence(store, number, takeover_after_s)
            body = json.dumps(asdict(holder)).encode()
            if store.put_if_absent(_owner_key(number + 1), body):
                visit("owner.created")
                store.refuse_unconditional(_owner_key(number + 1), body)
                owner = cls(store, number + 1, holder, beat_every_s=beat_every_s)
                owner._beat()
                visit("owner.taken")
                owner._thread.start()
                return owner

    def is_ours(self) -> bool:
        """Return whether no later driver has taken the job; asks the store."""
        if latest_number(self._store) > self.number:
            self.lost.set()
        return not self.lost.is_set()

    def require(self, what: str) -> None:
        """Raise JobRefused, naming the job's driver, unless it is ours. Called before every `what`."""
        if not self.is_ours():
            require_latest(self._store, self.number, what)

    @contextlib.contextmanager
    def blamed(self, what: str) -> Iterator[None]:
        """Meanwhile raise JobRefused for a fault of the store if a later driver, its cause, has the job."""
        try:
            yield
        except SystemicFault:
            self.require(what)
            raise

    def release(self) -> None:
        """Stop the heartbeat, so that the next driver need not wait."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=BEAT_BUDGET_S)
        visit("owner.releasing")
        with contextlib.suppress(HqlabelError):
            self._beat(released=True)

    def _beat(self, *, released: bool = False) -> None:
        self._count += 1
        beat = {"token": self.holder.token, "beat": self._count, "released": released}
        self._beats.put(_beat_key(self.number), json.dumps(beat).encode())

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            # A store that fails is the work's to report; the heart only misses a beat.
            with contextlib.suppress(HqlabelError, OSError):
                self._beat()
                if self._beats.head(_owner_key(self.number + 1)) is not None:
                    self.lost.set()
                    return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def require_latest(store: Store, number: int, what: str) -> None:
    """Raise JobRefused if a driver after `number` has taken the job. For a driver's workers."""
    latest = latest_number(store)
    if latest > number:
        now = _read_holder(store, latest)
        raise JobRefused(f"{store.place.uri}: {now} has taken over this job; {what} is left to it")


def current_holder(store: Store) -> tuple[int, Holder] | None:
    """Return (number, driver) that took the job last, alive or not; None when none ever did."""
    number = latest_number(store)
    return (number, _read_holder(store, number)) if number else None


def _owner_key(number: int) -> str:
    return f"owner/{number}.json"


def _beat_key(number: int) -> str:
    return f"owner/{number}.beat.json"


def latest_number(store: Store) -> int:
    """Return the number of the driver that took the job last; 0 when none ever did."""
    matches = (_KEY.fullmatch(entry.key) for entry in store.list("owner/"))
    return max((int(match.group(1)) for match in matches if match), default=0)


def _read_holder(store: Store, number: int) -> Holder:
    try:
        content = read_json(store, _owner_key(number), most=FEW_BYTES)
        known = {field.name: content[field.name] for field in fields(Holder)}
        return TypeAdapter(Holder).validate_python(known)
    except (ValueError, KeyError, TypeError) as error:
        raise JobRefused(
            f"{store.place.uri}/{_owner_key(number)} cannot be read ({reason(error)}); nothing was changed"
        ) from error


def _read_beat(store: Store, number: int) -> dict[str, Any] | None:
    """Return the last beat, None when there is none. One that cannot be read counts as a change."""
    try:
        body = store.read(_beat_key(number), most=FEW_BYTES)
    except NotFound:
        return None
    try:
        return dict(from_json(body))
    except (ValueError, TypeError):
        return {"unreadable": body.hex()}


def _wait_for_silence(store: Store, number: int, takeover_after_s: float) -> None:
    """Return once the holder has released, is dead, or was silent for long enough; else JobRefused."""
    holder = _read_holder(store, number)
    first = _read_beat(store, number)
    if (first or {}).get("released") or holder.is_surely_dead():
        return
    # Counted from here on this machine's own clock: the times of others are never compared.
    deadline = time.monotonic() + takeover_after_s
    while time.monotonic() < deadline:
        time.sleep(min(WATCH_EVERY_S, takeover_after_s))
        beat = _read_beat(store, number)
        if (beat or {}).get("released") or holder.is_surely_dead():
            return
        if beat != first:
            raise JobRefused(
                f"{store.place.uri}: {holder} is working on this job (driver {number}, its heart beats). "
                "Wait for it, or stop it; a killed driver is replaced without waiting."
            )
