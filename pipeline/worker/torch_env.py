"""What native libraries of a model process read from its environment, once, when they are loaded.

By default GNU's OpenMP, which PyTorch computes with, lets a thread that has nothing to do spin for a while.
On cores that other processes want too, such as those that decode, the spinning threads keep the working ones
from running: with two threads beside one busy process a picture took 10 to 20 times as long.

And large tensors come from the system page by page, 4 KiB each, every time one is made: 260,000 page faults
for one picture of ViT-B. In pages of 2 MiB there are a tenth of them.
"""

from __future__ import annotations

from collections.abc import MutableMapping

_SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def prepare_for_torch(environ: MutableMapping[str, str]) -> None:
    """None; `environ` asks idle threads to sleep, and PyTorch for huge pages.

    To be called before torch is imported. What a person has set of these variables holds.
    """
    if not any(name in environ for name in _SPINNING):
        environ["OMP_WAIT_POLICY"] = "passive"
    environ.setdefault(_HUGE_PAGES, "1")
