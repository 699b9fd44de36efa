"""Where the parts of a GPU day run, and the device's clock and memory.

What asks `on_gpu`, here and in the parts, is what a rehearsal on a CPU does not run. Keep it short. torch is
imported where it is needed: the process of the parts looks at the time before.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

_SIZES_HW = {1: (864, 1152), 3: (1536, 2048), 12: (3000, 4000), 48: (6000, 8000)}


class Wrong(ArithmeticError):
    """The device computes something else than it should; the rows that show it are kept."""

    def __init__(self, message: str, rows: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a part runs. `rehearse`: with small models, small pictures and few of everything."""

    rehearse: bool
    device: str

    @property
    def on_gpu(self) -> bool:
        """Whether there is a device to wait for."""
        return self.device == "cuda"

    def size_hw(self, megapixels: int) -> tuple[int, int]:
        """The upright size of a picture; in a rehearsal a sixth of its sides."""
        height, width = _SIZES_HW[megapixels]
        return (height // 6, width // 6) if self.rehearse else (height, width)

    def fewer(self, number: int, rehearsed: int) -> int:
        """The number, or in a rehearsal the other."""
        return rehearsed if self.rehearse else number

    def wait(self) -> None:
        """Wait until the device has done all that is queued."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def now(self) -> float:
        """Seconds of a clock, after all that is queued."""
        self.wait()
        return time.perf_counter()

    def held_bytes(self) -> int:
        """What lies on the device now; the peak is counted from here on. 0 without a GPU."""
        if not self.on_gpu:
            return 0
        import torch

        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_bytes(self) -> tuple[int, int]:
        """The most that lay there since, in tensors and as reserved from the device."""
        if not self.on_gpu:
            return 0, 0
        import torch

        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
