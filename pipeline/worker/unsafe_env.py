"""Environment variables that switch off a protection of a library below us, refused wherever work is done.

The command line checks its own environment before it starts (`jobs.terminal.environment`); a cluster's
workers have the environment of their nodes, so each stage checks again before it opens anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pipeline.errors import SystemicFault

LOOSENING: dict[str, str] = {
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR": "lets a Parquet file run code when Ray Data is loaded",
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA": "lets a Parquet file run code when Ray Data is loaded",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE": "lets a Parquet file run code when Ray Data is loaded",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "lets a checkpoint run code when it is loaded",
}
_OFF = ("", "0", "false", "no", "off")


def set_in(environ: Mapping[str, str], known: Mapping[str, str] = LOOSENING) -> dict[str, str]:
    """Those of the `known` variables that are set in `environ`, and why each is refused."""
    return {name: why for name, why in known.items() if environ.get(name, "").strip().lower() not in _OFF}


def refuse_here() -> None:
    """None when nothing loosens the libraries of this process.

    Raises:
        SystemicFault: `environment`, naming the machine and every variable.
    """
    found = set_in(os.environ)
    if found:
        reasons = "; ".join(f"{name} {why}" for name, why in found.items())
        raise SystemicFault(
            "environment",
            f"a worker on {os.uname().nodename} refuses to work with its environment: {reasons}. Unset "
            f"{' '.join(found)} on that node, restart Ray there and start again",
        )
