"""The device that the model computes on: number format, precision, host threads, compiled calls."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from hqlabel.model.records import CallShape
    from hqlabel.model.sam_hq import SamHQ

P = ParamSpec("P")
T = TypeVar("T")

Dtype = Literal["float32", "bfloat16"]

MAX_PENDING = 8
"""Tasks of a `HostThread` that are not done; the next submission waits. Bounds what they hold in memory."""


_LEAST_GAIN = 1.1
"""bfloat16 costs last bits, so where it gains less than a tenth, `auto` is float32."""


def probe_dtype(device: str | torch.device) -> Dtype:
    """Return the faster of `bfloat16` and `float32` on the device: what `auto` means.

    Instructions for bfloat16 are no promise of speed: Xeons multiply with AVX-512 BF16 at 0.6 times the rate
    of float32 where AMX is hidden from them, Zen 4 at 2.3 times. So on a CPU without AMX a product of the
    model's size is timed in both, 0.2 s of one core, once in a process.
    """
    device = torch.device(device)
    if not multiplies_bfloat16(device):
        return "float32"
    if device.type == "cuda" or "amx_bf16" in _cpu_features():
        return "bfloat16"
    return "bfloat16" if _bfloat16_gain() >= _LEAST_GAIN else "float32"


def multiplies_bfloat16(device: str | torch.device) -> bool:
    """Return whether the device has instructions for bfloat16. Without them it is emulated, 80 times slower.

    CUDA: compute capability 8.0 (Ampere) or newer. CPU: AMX, AVX-512 BF16 or Arm's BF16 instructions, as
    Linux reports them.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(_cpu_features() & {"amx_bf16", "avx512_bf16", "bf16"})


EMULATED = (
    "bfloat16 on a device without instructions for it is emulated, some 80 times slower than float32; use "
    "dtype='float32'"
)


@cache
def _bfloat16_gain() -> float:
    """Return how many times as fast as float32 this CPU multiplies bfloat16: CPU time, the least of five."""
    images, weights = torch.ones(256, 768), torch.ones(3072, 768)
    times_s: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(6):  # the first of each prepares the kernel
        for dtype, measured_s in times_s.items():
            a, b = images.to(dtype), weights.to(dtype)
            began_s = time.process_time()
            torch.nn.functional.linear(a, b)
            measured_s.append(time.process_time() - began_s)
    return min(times_s[torch.float32][1:]) / max(min(times_s[torch.bfloat16][1:]), 1e-9)


def device_kind(device: str | torch.device) -> str:
    """Return what decides the last bits of sums besides the number format: a GPU's name, a CPU's vectors."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


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
    """Runs the host's tasks, in order of submission, while the GPU computes the next masks.

    `own_thread`: run them in a thread, so that the caller can queue the GPU's next work; else at once.
    """

    def __init__(self, *, own_thread: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="host-work") if own_thread else None
        self._pending: deque[Future[Any]] = deque()

    def submit(self, task: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Return the future result of a task; without a thread it is already done."""
        if self._pool is None:
            done: Future[T] = Future()
            done.set_result(task(*args, **kwargs))
            return done
        while len(self._pending) >= MAX_PENDING:
            self._pending.popleft().exception()  # waits; an error is for the caller of `result`
        future = self._pool.submit(task, *args, **kwargs)
        self._pending.append(future)
        return future


# Compiled calls, for a GPU and a model whose calls have one shape

Outputs = tuple[torch.Tensor, ...]
Record = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]
"""Runs a function of fixed tensors; returns its results, and a function that computes them anew in place."""

_RUNS_BEFORE_RECORDING = 3
"""Compiling, and what libraries choose and allocate at their first calls, must not be recorded."""


def compile_calls(
    model: SamHQ,
    call_shape: CallShape,
    mask_tokens: tuple[int, ...],
    *,
    backend: str = "inductor",
    record: Record | None = None,
) -> None:
    """Compile the calls of `call_shape` with boxes alone that ask for `mask_tokens`.

    Two functions of the model are replaced: `SamHQ.embed` (images to their embeddings) and
    `MaskDecoder.decode_tokens` (the tokens of some prompts to their masks). Each is compiled as a whole; its
    work on the GPU is recorded once as a CUDA graph, and played back from then on. Calls of any other shape
    (points, an image that memory did not suffice for) run the model's own functions, whose last bits may
    differ. Which of the two a call runs depends on its shape alone, so equal inputs still give equal bytes.

    torch.compile can record graphs by itself (`mode="reduce-overhead"`), but these belong to the thread that
    compiled, and a job calls its model from several.

    The first call of each kind takes minutes. `backend`: one of torch.compile's. `record`: how calls are
    recorded; None: as CUDA graphs on the model's device.
    """
    for function in model.compile_constants:
        torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]
    # Without `deterministic`, each process would time kernels and take the faster ones, whose sums differ.
    options: dict[str, Any] = {"options": {"deterministic": True}} if backend == "inductor" else {}
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend, **options)
    keep = record or partial(record_cuda_graph, device=model.device)
    side, decoder = model.config.image_size, model.mask_decoder
    images = (call_shape.images_per_call, 3, side, side)
    tokens = (call_shape.boxes_per_call, decoder.tokens_of_a_box, decoder.mask_tokens.embedding_dim)
    functions: tuple[tuple[Any, str, tuple[int, ...], tuple[Any, ...]], ...] = (
        (model, "embed", images, ()),
        (decoder, "decode_tokens", tokens, (mask_tokens,)),
    )
    for owner, name, shape, constants in functions:
        own = getattr(owner, name)
        setattr(owner, name, OneShape(own, Recorded(compiled(own), keep), shape, constants))


class OneShape:
    """A function with a fast path for first arguments of one shape and some constants as its last."""

    def __init__(
        self,
        own: Callable[..., Outputs],
        fast: Callable[..., Outputs],
        shape: tuple[int, ...],
        constants: tuple[Any, ...],
    ) -> None:
        self._own, self._fast, self._shape, self._constants = own, fast, shape, constants

    def __call__(self, first: torch.Tensor, *others: Any) -> Outputs:
        """Return the function's tensors."""
        last = others[len(others) - len(self._constants) :]
        fits = tuple(first.shape) == self._shape and last == self._constants
        return (self._fast if fits else self._own)(first, *others)


class Recorded:
    """A function of tensors that is recorded at its first call and played back at every later one.

    The tensors may lie in tuples and dataclasses; all else among the arguments must stay as it was at the
    first call. The inputs and outputs of the recording are kept for good, and the caller gets copies.
    """

    def __init__(self, function: Callable[..., Outputs], record: Record) -> None:
        self._function, self._record = function, record
        self._lock = threading.Lock()
        self._recording: tuple[Any, Outputs, Callable[[], None]] | None = None

    def __call__(self, *arguments: Any) -> Outputs:
        """Return the function's tensors, new ones at every call."""
        with self._lock:
            if self._recording is None:
                inputs = _with_each_tensor(arguments, torch.clone)
                self._recording = inputs, *self._record(lambda: self._function(*inputs))
            inputs, outputs, play = self._recording
            for kept, new in zip(_tensors(inputs), _tensors(arguments), strict=True):
                kept.copy_(new)
            play()
            return tuple(output.clone() for output in outputs)


def record_cuda_graph(
    run: Callable[[], Outputs], *, device: torch.device
) -> tuple[Outputs, Callable[[], None]]:
    """Return the results of `run`, and a function that has the GPU compute them anew. See `Record`."""
    with torch.cuda.device(device):
        # On another stream than the usual, see https://docs.pytorch.org/docs/stable/notes/cuda.html.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_RUNS_BEFORE_RECORDING):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
    return outputs, graph.replay


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _with_each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the same tuples and dataclasses around other tensors."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_with_each_tensor(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _with_each_tensor(getattr(value, field.name), change) for field in fields(value)}
        return replace(value, **parts)
    return value
