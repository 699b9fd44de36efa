"""The device that the model computes on: its number format, its precision, and the host's work next to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

Dtype = Literal["float32", "bfloat16"]

MAX_PENDING = 8
"""Tasks of a `HostThread` that are not done; the next submission waits. Bounds what they hold in memory."""


def probe_dtype(device: str | torch.device) -> Dtype:
    """Return `bfloat16` if the device multiplies it natively, else `float32`.

    CUDA: compute capability 8.0 (Ampere) or newer. CPU: AMX, AVX-512 BF16 or Arm's BF16 instructions, as
    Linux reports them; without them bfloat16 is emulated, several times slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    if device.type == "cpu" and _cpu_features() & {"amx_bf16", "avx512_bf16", "bf16"}:
        return "bfloat16"
    return "float32"


def _cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return what every core of this machine can do, by Linux's names; empty on other systems."""
    if not cpuinfo.exists():
        return set()
    lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines())
    cores = [set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")]
    return set.intersection(*cores) if cores else set()


def set_cpu_threads(threads: int) -> None:
    """Set PyTorch's number of CPU threads for this process.

    On a CPU it is part of what makes equal bytes: kernels divide their work by it, and the last bits of some
    sums follow (float32 products of few rows, softmax along an inner axis, 1x1 convolutions).
    """
    torch.set_num_threads(threads)


def use_full_precision() -> None:
    """Turn TF32 and cuDNN's search for algorithms off for this process.

    Both would change masks, the second from run to run.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    # The CPU allocator raises a bare RuntimeError.
    return isinstance(error, RuntimeError) and ("out of memory" in text or "defaultcpuallocator" in text)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the host's tensor on `device`.

    To a GPU it goes by pinned memory and without waiting. A plain copy waits until the GPU has finished all
    that is queued, and then has nothing to do while the host prepares the next thing.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostThread:
    """Does the host's part of finished numbers, in order of submission, while a device makes the next ones.

    `own_thread`: in one thread, so that the caller can queue the GPU's next work; else at once.
    """

    def __init__(self, *, own_thread: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="host-work") if own_thread else None
        self._pending: deque[Future[Any]] = deque()

    def submit(self, task: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Return the future result of a task; without a thread it is there already."""
        if self._pool is None:
            done: Future[T] = Future()
            done.set_result(task(*args, **kwargs))
            return done
        while len(self._pending) >= MAX_PENDING:
            self._pending.popleft().exception()  # waits; an error is for the caller of `result`
        future = self._pool.submit(task, *args, **kwargs)
        self._pending.append(future)
        return future
