"""Environment variables of a process: those that switch a protection off, and those that PyTorch reads.

Some variables switch off a protection of a library silently. A command checks its own environment before it
starts; a cluster's workers have the environment of their nodes, so each stage checks again before it opens
anything.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, MutableMapping

from hqlabel.pipeline.errors import JobRefused, SystemicFault

LOOSENING: dict[str, str] = {
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR": "lets a Parquet file run code when Ray Data is loaded",
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA": "lets a Parquet file run code when Ray Data is loaded",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE": "lets a Parquet file run code when Ray Data is loaded",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "lets a checkpoint run code when it is loaded",
}
REFUSED: dict[str, str] = {
    **LOOSENING,
    "HQLABEL_FAILPOINT": "ends or stops the job at a named place; it is there for tests",
    "PYTHONSTARTUP": "runs a file in every Python that a job may start",
}
"""What a command refuses to start with, and why."""
_OFF = ("", "0", "false", "no", "off")


def loosening_in(environ: Mapping[str, str], known: Mapping[str, str] = LOOSENING) -> dict[str, str]:
    """Return those of the `known` variables that are set in `environ`, and why each is refused."""
    return {name: why for name, why in known.items() if environ.get(name, "").strip().lower() not in _OFF}


def refuse_unsafe_env() -> None:
    """Check this process's environment; every stage calls it before it opens anything.

    Raises:
        SystemicFault: `environment`, naming the machine and every variable that loosens a library.
    """
    found = loosening_in(os.environ)
    if found:
        raise SystemicFault(
            "environment",
            f"a worker on {os.uname().nodename} refuses to work with its environment: {_reasons(found)}. "
            f"Unset {' '.join(found)} on that node, restart Ray there and start again",
        )


def refuse_to_start(environ: Mapping[str, str]) -> None:
    """Raise JobRefused naming every variable of REFUSED that is set; every command calls it first."""
    found = loosening_in(environ, REFUSED)
    if found:
        raise JobRefused(
            f"refused to start with this environment: {_reasons(found)}. Unset: {' '.join(found)}"
        )


def _reasons(found: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {why}" for name, why in found.items())


def prepare_for_torch(environ: MutableMapping[str, str]) -> None:
    """Make idle threads sleep and PyTorch take huge pages; call it before torch is imported.

    By default GNU's OpenMP lets a thread that has nothing to do spin for a while. On cores that other
    processes want too, such as those that decode, the spinning threads keep the working ones from running:
    with two threads next to one busy process a picture took 10 to 20 times as long. And large tensors come
    from the system page by page, 4 KiB each, every time one is made: 260,000 page faults for one picture of
    ViT-B. In pages of 2 MiB there are a tenth of them. What a user has set of these variables holds.
    """
    if not any(name in environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        environ["OMP_WAIT_POLICY"] = "passive"
    environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


KEPT_BYTES = 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> bool:
    """Let this process reuse what its tensors free, where its C library is glibc; return whether it does.

    glibc returns blocks of more than 32 MiB to the system at once, and takes them anew, page by page, for the
    next tensor: 4 to 12 % of a model process's CPU time with ViT-B. Larger blocks than KEPT_BYTES, such as
    the whole frames of a 12-megapixel image, are still returned, so a process holds some 0.2 GiB more.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: its own rule holds
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, 2 * KEPT_BYTES))
