"""Runs `hqlabel`, as people do in a process of its own or in this one, and reads what it leaves."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hqlabel.jobs.cli import main as cli
from hqlabel.jobs.commands import label, retry

REPOSITORY = Path(__file__).resolve().parents[2]

# What may differ between two runs of one job: when, how long, by whom.
PASSING_COLUMNS = ("run_id", "processed_at", "fetch_ms", "decode_ms", "detect_ms", "segment_ms", "attempts")


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A started `hqlabel`, with signals at their defaults and output to pipes, in a folder of its own choice:
    from the repository's, Python would find the package even where an installed one is not found.

    A job has one model process unless `arguments` say otherwise: a second one takes seconds of both cores to
    begin, and most of these jobs are a few pictures. `cluster.actors=null` is the product's own choice.
    """
    if arguments[0] in ("label", "retry") and not any("cluster.actors" in one for one in arguments):
        arguments = (*arguments, "--set", "cluster.actors=1")
    return subprocess.Popen(
        [sys.executable, "-m", "hqlabel", *arguments],
        cwd=tempfile.gettempdir(),
        env={**os.environ, "RAY_worker_niceness": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        restore_signals=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )


def run(
    *arguments: str, code: int | None = 0, timeout_s: float = 280, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A finished `hqlabel`; fails with its output when the exit code is not `code` (None: any)."""
    process = start(*arguments, **environment)
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"hqlabel {arguments} still ran after {timeout_s} s\n{out}\n{err}") from None
    assert code is None or process.returncode == code, (
        f"hqlabel {arguments} ended with {process.returncode}, wanted {code}\n{out}\n{err}"
    )
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def run_here(*arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """The same without a process, which costs seconds: for a command that starts no Ray."""
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert code is None or result.exit_code == code, (
        f"hqlabel {arguments} ended with {result.exit_code}, wanted {code}\n{result.stdout}\n{result.stderr}"
    )
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def label_here(*arguments: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """`label` or `retry` in this process, its units one after the other without Ray.

    For what Ray's part of the way cannot change; the masks are the same bytes.
    """
    from tests.faults.racing import run_without_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label, "run_pending", run_without_ray)
        patch.setattr(retry, "run_pending", run_without_ray)
        return run_here(*arguments, code=code)


def tables(output: Path) -> tuple[pa.Table, pa.Table]:
    """The published `images` and `instances`, read by a plain glob as other people's tools do."""
    return _read(output / "images"), _read(output / "instances")


def _read(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(part) for part in sorted(folder.glob("*.parquet")))


def lasting(table: pa.Table) -> pa.Table:
    """The table without the columns that may differ between two runs."""
    return table.drop_columns([name for name in PASSING_COLUMNS if name in table.column_names])


def unit_names(output: Path) -> list[str]:
    """The committed units, by file name."""
    return sorted(path.name for path in (output / "units").glob("*.parquet"))


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and modification time of every file below a folder."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
