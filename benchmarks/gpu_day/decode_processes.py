"""Processes that decode pictures for the model of this one. No torch: each of them imports this file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import Any

import numpy as np

from hqlabel.pipeline.images.decode_upright import decode_image

STEP = 8
"""Images that the model is given at once: two of its calls."""
Decoded = tuple[np.ndarray, tuple[int, int]]


class Decoder:
    """Processes that decode files into a buffer that all of them map, since a pipe would be the slowest part.

    The buffer is a file, because a container's shared memory is often small.
    """

    def __init__(self, pool: Pool, buffer: Path, processes: int, how: dict[str, Any]) -> None:
        self._pool, self._buffer, self._how = pool, buffer, how
        self._window = 4 * processes
        self._slots = self._window + 2 * STEP  # what is decoded, and what the model still reads
        side = how["side"]
        self._pixels = np.memmap(buffer, np.uint8, "w+", shape=(self._slots, side, side, 3))

    def decoded(self, names: Sequence[str]) -> Iterator[Decoded]:
        """Yield each file's pixels and upright size, in order; the pixels stay for the next `STEP` files."""
        pending: deque[tuple[int, AsyncResult[Any]]] = deque()
        for number, name in enumerate(names):
            slot = number % self._slots
            call = (name, str(self._buffer), self._slots, slot, self._how)
            pending.append((slot, self._pool.apply_async(decode_file, call)))
            if len(pending) == self._window:
                yield self._taken(*pending.popleft())
        while pending:
            yield self._taken(*pending.popleft())

    def _taken(self, slot: int, result: AsyncResult[Any]) -> Decoded:
        (height, width), size_hw = result.get()
        return np.asarray(self._pixels[slot, :height, :width]), size_hw


@lru_cache(maxsize=1)
def _mapped(buffer: str, slots: int, side: int) -> np.ndarray:
    return np.memmap(buffer, np.uint8, "r+", shape=(slots, side, side, 3))


def decode_file(name: str, buffer: str, slots: int, slot: int, how: dict[str, Any]) -> tuple[Any, Any]:
    """Put a picture's pixels into a slot, as the pipeline makes them; return its two sizes."""
    decoded = decode_image(Path(name).read_bytes(), max_pixels=10**9, **how)
    height, width = decoded.pixels_hwc.shape[:2]
    _mapped(buffer, slots, how["side"])[slot, :height, :width] = decoded.pixels_hwc
    return (height, width), decoded.size_hw
