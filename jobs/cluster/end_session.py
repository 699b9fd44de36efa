"""Wait until a driver has ended, then end what is left of its private Ray and remove its folder.

The driver starts this file as a process of its own, before Ray: `end_session.py FOLDER`, with a
pipe as its input. The pipe closes however the driver ends, also by SIGKILL. Ray's own processes follow a
driver by themselves, but some wait a minute for the dead coordinator first, and nobody removes the objects
that were spilled. Standard library alone: it has to be up within milliseconds, and stays small.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import sys
import time

_PATIENCE_S = 10.0


def main(folder: str) -> None:
    """Wait, then end and remove what is below `folder`, which is this session's alone."""
    driver = os.getppid()
    sys.stdin.buffer.read()  # until the driver is gone, or closes it because Ray has ended
    end_processes(folder, keep=driver)
    shutil.rmtree(folder, ignore_errors=True)


def end_processes(folder: str, keep: int) -> None:
    """Kill the processes, but `keep`, that have a file below `folder` open for writing, until none is left.

    So have all of Ray's processes, their logs; titles overwrite their names and environments. Where there is
    no /proc (macOS), Ray's own means have to do.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        found = [pid for pid in _all_processes() if pid != keep and _writes_below(pid, folder)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(OSError):  # it has ended by itself
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _all_processes() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _writes_below(pid: int, folder: str) -> bool:
    files = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        for number in os.listdir(files):
            link = f"{files}/{number}"
            if os.readlink(link).startswith(folder + os.sep) and os.lstat(link).st_mode & stat.S_IWUSR:
                return True
    return False


if __name__ == "__main__":
    main(sys.argv[1])
