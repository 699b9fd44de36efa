"""The machine of a GPU day, and its ceilings: nothing that is measured later can be faster."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from typing import Any

import torch

from benchmarks.arithmetic import matrix_peak
from benchmarks.gpu_day.setting import Setting
from benchmarks.record import PACKAGES, cpu_name
from hqlabel.model.device import use_full_precision

Row = dict[str, Any]
_PACKAGES = (*PACKAGES, "triton", "numpy", "safetensors", "huggingface_hub", "pytest")


def facts(setting: Setting) -> list[Row]:
    """One row a fact."""
    found = {
        "Python": platform.python_version(),
        "processor": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "memory GiB": str(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30),
        "CUDA of torch": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        **{name: _version(name) for name in _PACKAGES},
    }
    if setting.on_gpu:
        about = torch.cuda.get_device_properties(0)
        found["device"] = about.name
        found["compute capability"] = f"{about.major}.{about.minor}"
        found["multiprocessors"] = str(about.multi_processor_count)
        found["device memory GiB"] = f"{about.total_memory / 2**30:.0f}"
    if setting.on_gpu and shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ]
        asked = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
        found["driver, clock, power limit"] = asked.stdout.strip()
    return [{"what": name, "value": value} for name, value in found.items()]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def ceilings(setting: Setting) -> list[Row]:
    """Rates of large products and of a copy, and the seconds of what is too small to matter."""
    if setting.on_gpu:
        use_full_precision()
    side = setting.fewer(8192, 256)
    rows = []
    for dtype in ("bfloat16", "float32"):
        rate = matrix_peak(dtype, setting.device, side=side)  # type: ignore[arg-type]
        rows.append({"what": f"{dtype} product of side {side}", "value": rate / 1e12, "unit": "TFLOP/s"})
    source = torch.randn(setting.fewer(2 << 30, 1 << 20) // 4, device=setting.device)
    copied = 2 * source.nbytes / _median_s(setting, source.clone)
    rows.append({"what": "copy on the device, read and written", "value": copied / 1e12, "unit": "TB/s"})
    host = torch.empty(setting.fewer(256 << 20, 1 << 20), dtype=torch.uint8, pin_memory=setting.on_gpu)
    there = torch.empty_like(host, device=setting.device)
    up = host.nbytes / _median_s(setting, lambda: there.copy_(host, non_blocking=True))
    down = host.nbytes / _median_s(setting, lambda: host.copy_(there, non_blocking=True))
    rows.append({"what": "pinned memory to the device", "value": up / 1e9, "unit": "GB/s"})
    rows.append({"what": "device to pinned memory", "value": down / 1e9, "unit": "GB/s"})
    small = torch.zeros(8, device=setting.device)
    began = setting.now()
    for _ in range(1000):
        small.add_(1)
    queued = time.perf_counter() - began
    total = setting.now() - began
    rows.append({"what": "a small operation, queued", "value": 1e3 * queued, "unit": "µs"})
    rows.append({"what": "a small operation, done", "value": 1e3 * total, "unit": "µs"})
    waits = _median_s(setting, small.sum().item)
    rows.append({"what": "to ask for one number", "value": 1e6 * waits, "unit": "µs"})
    return rows


def _median_s(setting: Setting, work: Any, rounds: int = 7) -> float:
    """Seconds of one call with all that it queued, the median after one that does not count."""
    times = []
    for _ in range(1 + rounds):
        began = setting.now()
        work()
        times.append(setting.now() - began)
    return statistics.median(times[1:])
