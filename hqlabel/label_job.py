"""A whole job from Python: the command `hqlabel label` as a child process, and its tables.

A child, because a job starts and ends its own Ray, handles signals, and may end its process; none of that
is for a notebook or a server to bear. It can be killed and called again: what is done is not done again.
"""

from __future__ import annotations

import collections
import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from hqlabel.jobs.job_setup.resolve_settings import output_place
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.jobs.results.read_tables import require_published
from hqlabel.pipeline.schema import IMAGES, INSTANCES
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.published_parts import open_part

_OVER_BUDGET = 3
_LINES_KEPT = 20


class JobEnded(RuntimeError):
    """A job that ended before its tables were whole.

    `exit_code`: of the command: 2 usage, 4 refused before work, 5 stopped by a fault, 130 interrupted. After
    5 and 130 the same call goes on from there.
    """

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class LabelledTables:
    """A finished job. `output`: its folder or uri; `summary`: what `hqlabel label --json` prints.

    `over_budget`: more images failed than limits.max_failure_rate allows; the tables are whole nevertheless.
    """

    output: str
    summary: Mapping[str, Any]
    over_budget: bool
    store: Store

    @functools.cached_property
    def images(self) -> pa.Table:
        """Return one row an image, as docs/schema.md describes it."""
        return self._read("images", IMAGES)

    @functools.cached_property
    def instances(self) -> pa.Table:
        """Return one row a box, with its mask as COCO RLE, as docs/schema.md describes it."""
        return self._read("instances", INSTANCES)

    def _read(self, name: Literal["images", "instances"], schema: pa.Schema) -> pa.Table:
        """Return a whole table in memory; of millions of images, read the files with your engine instead."""
        tables = []
        for part in require_published(self.store).parts:
            with open_part(self.store, getattr(part, name), schema) as file:
                tables.append(file.read())
        return pa.concat_tables(tables) if tables else schema.empty_table()


def label(
    *,
    images: str | Path,
    output: str | Path,
    boxes: str | Path | None = None,
    checkpoint: str | Path = "demo",
    detector: str | None = None,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> LabelledTables:
    """Label images and return the tables; call it again with the same arguments to resume or to reopen.

    Args:
        images: a folder, a pattern, a table or a uri, as for `hqlabel label --images`.
        output: a folder or uri for this job alone.
        boxes: a file of boxes; None where `images` is a table that has them, or with a `detector`.
        checkpoint: `demo`, a file, a folder, a uri or a hub id.
        detector: such as `hf:PekingU/rtdetr_r50vd`, to find the boxes.
        settings: any others by dotted name, such as `{"model.dtype": "float32"}` (docs/configuration.md).
        quiet: write nothing to stderr; else what the command writes.

    Raises:
        UsageError: a setting that does not exist or cannot have this value.
        JobEnded: the job was refused or stopped; the text is the command's own.
    """
    flags = {
        "--images": images,
        "--boxes": boxes,
        "--checkpoint": checkpoint,
        "--detector": detector,
        "--output": output,
    }
    sets = [f"{name}={json.dumps(value)}" for name, value in (settings or {}).items()]
    config = ConfigSources(flags={"output.uri": str(output)}, sets=sets).load()
    command = [sys.executable, "-m", "hqlabel", "label", "--json", *(["--no-progress"] if quiet else [])]
    for flag, value in flags.items():
        command += [] if value is None else [flag, str(value)]
    for text in sets:
        command += ["--set", text]
    exit_code, out, last_lines = _run(command, quiet=quiet)
    if exit_code not in (0, _OVER_BUDGET):
        raise JobEnded(exit_code, "\n".join(last_lines) or f"hqlabel label ended with exit code {exit_code}")
    return LabelledTables(
        output=str(output),
        summary=json.loads(out),
        over_budget=exit_code == _OVER_BUDGET,
        store=Store(output_place(config)),
    )


def _run(command: list[str], *, quiet: bool) -> tuple[int, str, list[str]]:
    """Run the command; return its exit code, its stdout and its last lines on stderr, which are passed on."""
    last: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            for line in child.stderr:  # stdout is one line of JSON: it fits the pipe meanwhile
                last.append(line.rstrip("\n"))
                if not quiet:
                    sys.stderr.write(line)
            out = child.stdout.read()
        except BaseException:
            child.terminate()  # the job ends within three seconds and can be resumed
            raise
    return child.returncode, out, list(last)
