"""What native libraries of a model process read from its environment, once, when they are loaded.

By default GNU's OpenMP, which PyTorch computes with, lets a thread that has nothing to do spin for a while.
On cores that other processes want too, such as those that decode, the spinning threads keep the working ones
from running: with two threads beside one busy process a picture took 10 to 20 times as long.
"""

from __future__ import annotations

from collections.abc import MutableMapping

_SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def share_cores(environ: MutableMapping[str, str]) -> None:
    """None; `environ` asks idle threads to sleep. To be called before torch is imported.

    What a person has set of OMP_WAIT_POLICY and GOMP_SPINCOUNT holds.
    """
    if not any(name in environ for name in _SPINNING):
        environ["OMP_WAIT_POLICY"] = "passive"
