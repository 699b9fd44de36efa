"""Named places at which a test may end, stop or interrupt the process; nothing happens there otherwise.

`HQLABEL_FAILPOINT=name=action` or `name=action@3` arms one place: `kill` ends the process at the third
visit as SIGKILL does, `stop` stops it until SIGCONT, `raise` raises `FailPointReached`. That is all it
can do: no path, no code and no text of the variable goes anywhere, and the command line refuses to start
with it set (`hqlabel.pipeline.worker.process_env`). A value that cannot be read is an error at import.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLE = "HQLABEL_FAILPOINT"
ACTIONS = ("kill", "stop", "raise")

# Every place there is, in the order in which a job meets them; a test visits each one.
NAMES = (
    "job.created",  # job.json is stored, the store is not yet proved
    "owner.created",  # the mark is stored, its heart has not begun
    "owner.taken",  # the first beat is written
    "plan.file",  # one file of the plan is stored, others may not be
    "plan.written",
    "retry.listed",  # the job is ours and the failed images are known, nothing is done again
    "unit.read",  # the plan's rows are read, nothing is fetched
    "attempt.started",  # the start is noted, the model has not begun
    "attempt.image",  # an image is noted as the one in work
    "unit.segmented",  # masks are made, nothing is built
    "unit.built",  # the table is checked, nothing is written
    "retry.replaced",  # redone rows are next to the kept ones, in memory
    "disk.written",  # bytes are in a temporary file, not yet synced
    "disk.synced",  # the temporary file is safe, the name is not there
    "disk.named",  # the file has its name, its folder is not yet synced
    "commit.created",  # the unit's file was sent and not yet read back
    "commit.done",
    "publish.listed",  # the job is ours and looked at, nothing is written
    "manifest.writing",  # the manifest is made, not sent
    "publish.begun",  # the manifest is "publishing"
    "publish.putting",  # a part is made and the job is still ours, the part is not sent
    "publish.images",  # a part has its images, not its instances
    "publish.part",  # both files of a part are stored
    "publish.parts",  # all parts are stored, the manifest does not name them
    "publish.categories",
    "publish.done",
    "clean.listed",  # every part is proved, nothing is marked
    "clean.marked",  # the manifest is "cleaned", nothing is deleted
    "clean.deleting",  # the job is still ours, the deletes are not sent
    "disk.deleting",  # some files are deleted, others not
    "clean.deleted",  # files are deleted, open uploads are not yet dropped
    "owner.releasing",  # the work is over, the mark is still ours
)


class FailPointReached(BaseException):
    """What the action `raise` raises; no Exception, so that no handler takes it for an error of the work."""


@dataclass(kw_only=True)
class _Armed:
    name: str
    action: str
    visits_left: int


def parse(text: str) -> _Armed:
    """Return the place that a value of the variable arms; ValueError with what is allowed."""
    name, _, rest = text.partition("=")
    action, _, visit = rest.partition("@")
    if name not in NAMES or action not in ACTIONS or not (visit or "1").isdecimal() or visit == "0":
        wanted = f"name=action@visit with a name of failpoints.NAMES and one of {', '.join(ACTIONS)}"
        raise ValueError(f"{VARIABLE}={text!a}: wanted {wanted}")
    return _Armed(name=name, action=action, visits_left=int(visit or 1))


def arm(environ: Mapping[str, str]) -> None:
    """Arm the place that the environment names, or none. Run at import."""
    global _armed
    _armed = parse(environ[VARIABLE]) if environ.get(VARIABLE) else None


def visit(name: str) -> None:
    """Act when this very place is armed and it is its turn."""
    if _armed is None:
        return
    if name not in NAMES:
        raise ValueError(f"failpoint {name!r} is not in failpoints.NAMES")
    if name != _armed.name:
        return
    _armed.visits_left -= 1
    if _armed.visits_left:
        return
    if _armed.action == "raise":
        raise FailPointReached(name)
    os.kill(os.getpid(), signal.SIGKILL if _armed.action == "kill" else signal.SIGSTOP)


_armed: _Armed | None = None
arm(os.environ)
