"""SIGINT and SIGTERM: the job ends within three seconds with exit code 130, ready to resume.

`ray job stop` kills three seconds after its SIGTERM, so there is no long drain: what is committed is
safe, the rest is done again. A signal reaches us in two ways. Python runs the handler between two
bytecodes of the main thread, and it raises `Interrupted` there. A C call that takes long (a read, a
decode, Ray) delays that without limit; therefore the wake-up pipe of the interpreter is watched by a
thread, which releases the job's lock and ends the process when the main thread does not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from hqlabel.jobs.terminal import console
from hqlabel.pipeline.errors import HqlabelError

EXIT_INTERRUPTED = 130
GRACE_S = 2.4
_RELEASE_AFTER_S = 1.2
_SHOW_CURSOR = b"\x1b[?25h"  # a live progress line hides it
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Raised in the main thread by SIGINT or SIGTERM; no Exception, so nothing takes it for an error.

    No KeyboardInterrupt either: the command-line library would answer that with exit code 1.
    """


class Interrupts:
    """The state of interruption of this process; one for the life of a command.

    `requested` is set by the first signal. `on_exit` holds what must be given back even when the main
    thread is stuck (the job's lock); each runs at most once.
    """

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._releases: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._handled = False
        self._ending = threading.RLock()  # taken by the thread that ends the process, and never released
        self._wakeup: socket.socket | None = None

    def install(self) -> None:
        """Take over SIGINT and SIGTERM, also when the shell made them ignored; start the watcher once.

        Called again after `ray.init`, which replaces our SIGTERM handler by its own.
        """
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        sys.unraisablehook = _silent_about_interrupts
        if self._wakeup is None:
            reader, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            threading.Thread(target=self._watch, args=(reader,), name="interrupts", daemon=True).start()
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

    def give_back_on_exit(self, release: Callable[[], None]) -> None:
        """Remember `release`, to be called once by `give_back` or before the process is ended."""
        with self._lock:
            self._releases.append(release)

    def give_back(self) -> None:
        """Call everything remembered, last first, each at most once; errors are left to the next owner."""
        while True:
            with self._lock:
                if not self._releases:
                    return
                release = self._releases.pop()
            with contextlib.suppress(Exception):
                release()

    def wait_if_ending(self) -> None:
        """Wait for the end of the process where another thread is ending it; else keep others from it."""
        self._ending.acquire()

    def end_with(self, error: HqlabelError) -> None:
        """End the process with this error, in a thread that met it while the main one may be stuck."""
        self.wait_if_ending()
        console.say_error(error)
        release = threading.Thread(target=self.give_back, name="give-back", daemon=True)
        release.start()
        release.join(_RELEASE_AFTER_S)
        end_now(error.exit_code)

    def should_stop(self) -> bool:
        """Return whether a signal has come; long loops ask."""
        return self.requested.is_set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._handled:  # an impatient second Ctrl-C: nothing is lost by ending here
            end_now()
        self._handled = True  # not `requested`: the watcher may have set that before this ran
        self.requested.set()
        raise Interrupted

    def _watch(self, reader: socket.socket) -> None:
        wanted = {int(number) for number in _SIGNALS}
        while True:
            if wanted & set(reader.recv(64)):
                break
        self.requested.set()
        time.sleep(_RELEASE_AFTER_S)
        threading.Thread(target=self.give_back, name="give-back", daemon=True).start()
        time.sleep(GRACE_S - _RELEASE_AFTER_S)
        end_now()


def _silent_about_interrupts(unraisable: sys.UnraisableHookArgs) -> None:
    """Drop `Interrupted` where Python could not raise it; everything else is reported as ever.

    A signal may come while a finalizer or a weak reference's callback runs, whose exceptions Python prints
    and forgets. The watcher ends the process then.
    """
    if not isinstance(unraisable.exc_value, Interrupted):
        sys.__unraisablehook__(unraisable)


def end_now(code: int = EXIT_INTERRUPTED) -> None:
    """End the process at once, without finalizers; another one waits for that, and ends a private Ray."""
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        os.write(sys.__stderr__.fileno(), _SHOW_CURSOR)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
