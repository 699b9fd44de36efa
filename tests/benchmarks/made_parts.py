"""Parts of a GPU day that do what a test says; the process of the parts imports this file."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_day.parts import Part
from benchmarks.gpu_day.setting import Setting, Wrong


def made(name: str, function: str = "note", **values: Any) -> Part:
    """A part of that function of this file, expected to take no time."""
    step, _, key = name.partition("/")
    given = {"expected_s": 0.0, **values}
    return Part(step=step, key=key, function=f"{__name__}:{function}", **given)


def note(setting: Setting, *, folder: str = "") -> list[dict[str, Any]]:
    """A row, its number one of numpy's; each time is counted in the folder."""
    if folder:
        with Path(folder, "noted").open("a") as file:
            file.write("once\n")
    return [{"what": f"noted on {setting.device}", "value": np.int64(os.getpid())}]


def fail(setting: Setting) -> list[dict[str, Any]]:
    raise ValueError("the logits are off by 3")


def differ(setting: Setting) -> list[dict[str, Any]]:
    raise Wrong("other bytes", [{"what": "equal images", "value": 3.0}])


def die(setting: Setting) -> list[dict[str, Any]]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def wait(setting: Setting, *, folder: str) -> list[dict[str, Any]]:
    """A row, once there is a file `go`; the process says who it is in the file `pid`."""
    Path(folder, "pid").write_text(str(os.getpid()))
    while not Path(folder, "go").exists():
        time.sleep(0.02)
    return [{"what": "waited", "value": 1.0}]
