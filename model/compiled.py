"""torch.compile and CUDA graphs, for a model whose calls have one shape: one switch, for GPUs.

`compile_calls` replaces two functions of a model: `SamHQ.embed` (pictures to their embeddings) and
`MaskDecoder.decode_tokens` (the tokens of some prompts to their masks). Each is compiled as a whole; its
work on the GPU is recorded once as a CUDA graph, and played back from then on.

Only calls of the shape that was named go that way. All others (points, an image that memory did not suffice
for) go the model's own, whose last bits may differ. Which way a call goes is a matter of its shape alone, so
equal inputs still give equal bytes.

torch.compile can record graphs by itself (`mode="reduce-overhead"`), but these belong to the thread that
compiled, and a job calls its model from several.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch

from model.records import CallShape
from model.sam_hq import SamHQ

Outputs = tuple[torch.Tensor, ...]
Record = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]
"""Runs what works on fixed tensors; gives its results, and what writes new ones in their place."""

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
    """None; calls of `call_shape` with boxes alone, asking for `mask_tokens`, run compiled from now on.

    The first call of each kind takes minutes. `backend`: one of torch.compile's. `record`: how calls are
    recorded; None: as CUDA graphs on the model's device.
    """
    # Without `deterministic`, each process would time kernels and take the faster ones, whose sums differ.
    options: dict[str, Any] = {"options": {"deterministic": True}} if backend == "inductor" else {}
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend, **options)
    keep = record or partial(record_cuda_graph, device=model.device)
    side, decoder = model.config.image_size, model.mask_decoder
    pictures = (call_shape.images_per_call, 3, side, side)
    tokens = (call_shape.boxes_per_call, decoder.tokens_of_a_box, decoder.mask_tokens.embedding_dim)
    roads: tuple[tuple[Any, str, tuple[int, ...], tuple[Any, ...]], ...] = (
        (model, "embed", pictures, ()),
        (decoder, "decode_tokens", tokens, (mask_tokens,)),
    )
    for owner, name, shape, constants in roads:
        own = getattr(owner, name)
        setattr(owner, name, OneShape(own, Recorded(compiled(own), keep), shape, constants))


class OneShape:
    """A function with a fast road for first arguments of one shape and some constants as its last."""

    def __init__(
        self,
        own: Callable[..., Outputs],
        fast: Callable[..., Outputs],
        shape: tuple[int, ...],
        constants: tuple[Any, ...],
    ) -> None:
        self._own, self._fast, self._shape, self._constants = own, fast, shape, constants

    def __call__(self, first: torch.Tensor, *others: Any) -> Outputs:
        """The function's tensors."""
        ending = others[len(others) - len(self._constants) :]
        fits = tuple(first.shape) == self._shape and ending == self._constants
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

    def __call__(self, *given: Any) -> Outputs:
        """The function's tensors, new ones at every call."""
        with self._lock:
            if self._recording is None:
                inputs = _with_each_tensor(given, torch.clone)
                self._recording = inputs, *self._record(lambda: self._function(*inputs))
            inputs, outputs, play = self._recording
            for ours, theirs in zip(_tensors(inputs), _tensors(given), strict=True):
                ours.copy_(theirs)
            play()
            return tuple(output.clone() for output in outputs)


def record_cuda_graph(
    run: Callable[[], Outputs], *, device: torch.device
) -> tuple[Outputs, Callable[[], None]]:
    """What `run` gives, and what makes the GPU write it anew from what its inputs hold then. See `Record`."""
    with torch.cuda.device(device):
        # Elsewhere than on the usual stream, as https://docs.pytorch.org/docs/stable/notes/cuda.html has it.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_RUNS_BEFORE_RECORDING):
                run()
        torch.cuda.current_stream().wait_stream(aside)
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
    """The same tuples and dataclasses around other tensors."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_with_each_tensor(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _with_each_tensor(getattr(value, field.name), change) for field in fields(value)}
        return replace(value, **parts)
    return value
