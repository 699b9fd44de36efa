"""The process in which the parts of a GPU day run; `supervise.py` starts it and listens.

It tells of each part when it begins and what came of it. After a part that failed it ends: a CUDA error stays
with its process. It ends with the one that started it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu_day.parts import Part
from benchmarks.gpu_day.setting import Setting, Wrong
from benchmarks.gpu_day.supervise import RESTART
from hqlabel.pipeline.worker.process_env import prepare_for_torch

ERROR_LINES = 12


def main(descriptor: str, order: str) -> int:
    """The exit status: 0 when nothing more can be begun in time."""
    os.set_inheritable(int(descriptor), False)
    send = Connection(int(descriptor), readable=False)
    prepare_for_torch(os.environ)  # as a job's model processes are
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    asked = json.loads(order)
    parts = [Part(**values) for values in asked["parts"]]
    missing = _missing(parts)
    setting = Setting(rehearse=asked["rehearse"], device="cpu" if asked["rehearse"] else "cuda")
    send.send(("device", _device_name(setting), importlib.metadata.version("torch"), missing))
    for part in parts:
        if time.time() + part.expected_s > asked["deadline"]:
            continue  # a shorter one may still fit
        if not _do(part, setting, send, missing):
            return RESTART
    return 0


def _do(part: Part, setting: Setting, send: Connection, missing: dict[str, list[str]]) -> bool:
    """Return whether this process is fit for another part."""
    lacks = [module for module in part.needs if module in missing]
    if lacks:
        send.send(("ended", part.name, 0.0, [], None, ", ".join(lacks)))
        return True
    send.send(("begun", part.name))
    print(f"--- {part.name}", flush=True)
    began = time.time()
    rows: list[dict[str, Any]] = []
    error = None
    try:
        module, _, function = part.function.partition(":")
        measure = getattr(importlib.import_module(module), function)
        rows = measure(setting, **part.arguments)
    except Exception as raised:
        traceback.print_exc()
        rows = raised.rows if isinstance(raised, Wrong) else []
        last = "".join(traceback.format_exception(raised)).splitlines()[-ERROR_LINES:]
        error = "\n".join([f"{type(raised).__name__}: {raised}".splitlines()[0], *last])
    send.send(("ended", part.name, time.time() - began, rows, error, None))
    gc.collect()
    return error is None


def _device_name(setting: Setting) -> str | None:
    """The device's name; None where there is none."""
    if setting.rehearse:
        return "CPU (rehearsal)"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _missing(parts: Sequence[Part]) -> dict[str, list[str]]:
    """The steps that lack a module, by its name."""
    wanted = {module for part in parts for module in part.needs}
    absent = sorted(module for module in wanted if importlib.util.find_spec(module) is None)
    return {
        module: list(dict.fromkeys(part.step for part in parts if module in part.needs)) for module in absent
    }


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
