"""What the surroundings of a command must not bring along, checked before anything else is done.

Some environment variables switch off a protection of a library below us without a word. A job that
reads files from elsewhere does not start with one of them set; the reason is in `REFUSED`. The workers
of a cluster are checked where they work (`pipeline.worker.process_env`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pipeline.errors import JobRefused
from pipeline.worker import process_env

REFUSED: dict[str, str] = {
    **process_env.LOOSENING,
    "HQLABEL_FAILPOINT": "ends or stops the job at a named place; it is there for tests",
    "PYTHONSTARTUP": "runs a file in every Python that a job may start",
}


def dangerous_switches(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables set in `environ` that a job refuses to run with, and why."""
    return process_env.loosening_in(environ, REFUSED)


def refuse_dangerous_switches(environ: Mapping[str, str]) -> None:
    """Raise `JobRefused` naming every dangerous variable that is set."""
    found = dangerous_switches(environ)
    if found:
        reasons = "; ".join(f"{name} {why}" for name, why in found.items())
        raise JobRefused(f"refused to start with this environment: {reasons}. Unset: {' '.join(found)}")


def make_private() -> None:
    """Give files that this process and its children make to their owner alone (umask 077).

    Ray's session folder and its logs hold uris and error texts, and are made readable for all
    otherwise. Output files of a job on a shared disk are made by workers and inherit this too.
    """
    os.umask(0o077)
