"""What Ray says of itself, kept in a file: a full disk of a node, workers killed for memory, lost nodes.

Ray prints such messages, long and in colour, over the progress of a job (2.60). What of them concerns the job
it tells by itself, in a sentence or in the rows; the rest is for those who look into the machine.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from hqlabel.jobs.terminal import console

SUFFIX = ".log"


class RayMessages:
    """Writes messages to a file in the folder that `place` returns, and at the first says where."""

    def __init__(self, place: Callable[[], Path]) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._file: TextIO | None = None

    def write(self, data: Mapping[str, Any], *_: Any, **__: Any) -> None:
        """Keep `data["lines"]`, with the time; called by Ray from its threads instead of its own printing."""
        with self._lock, contextlib.suppress(OSError):  # a full disk, of which Ray may be telling
            if self._file is None:
                self._file = self._open()
            now = time.strftime("%Y-%m-%dT%H:%M:%S")
            self._file.writelines(f"{now} {data.get('pid')}: {line}\n" for line in data["lines"])
            self._file.flush()

    def _open(self) -> TextIO:
        handle, path = tempfile.mkstemp(prefix="ray-", suffix=SUFFIX, dir=self._place())
        console.say(f"Ray has something to say of this machine or cluster: {path}")
        return os.fdopen(handle, "w", encoding="utf-8", errors="replace")

    def close(self) -> None:
        """Close the file, if there is one; it stays."""
        with self._lock:
            if self._file is not None:
                self._file.close()


@contextlib.contextmanager
def messages_kept(place: Callable[[], Path]) -> Iterator[None]:
    """Keep what Ray would print within the block; to be entered before `ray.init`."""
    worker: Any = importlib.import_module("ray._private.worker")
    messages, printed = RayMessages(place), worker.print_to_stdstream
    worker.print_to_stdstream = messages.write
    try:
        yield
    finally:
        worker.print_to_stdstream = printed
        messages.close()
