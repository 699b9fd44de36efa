"""Remove each guard in a copy of the tree and run its tests: `python -m tests.mutants [PART OF A PATH ...]`.

A guard whose absence no test notices survives, and the command ends with 1 unless the list has a reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.guards import MUTANTS, Mutant

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 600
_NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache", "*.egg-info")


def run(tree: Path, tests: Sequence[str]) -> str | None:
    """What failed first (`timeout` for a hang), None when all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:logging"]
    command += ["-m", "not faults and not gpu and not network", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" - ")[0].partition(" ")[2] if lines else f"exit code {done.returncode}"


def try_mutant(tree: Path, mutant: Mutant) -> str | None:
    """What the tests of one mutant said of it; the copy is as before afterwards."""
    path = tree / mutant.file
    text = path.read_text()
    assert text.count(mutant.snippet) == 1, f"{mutant.file} has not once: {mutant.snippet}"
    path.write_text(text.replace(mutant.snippet, mutant.replacement))
    try:
        return run(tree, mutant.tests)
    finally:
        path.write_text(text)


def main(wanted: Sequence[str]) -> int:
    mutants = [one for one in MUTANTS if not wanted or any(part in one.file for part in wanted)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(REPOSITORY, tree, symlinks=True, ignore=_NOT_COPIED)
        for tests in dict.fromkeys(one.tests for one in mutants):
            if (failed := run(tree, tests)) is not None:
                sys.stdout.write(f"{' '.join(tests)} fails without any mutant: {failed}\n")
                return 1
        sys.stdout.write("| file | guard removed | seen by |\n|---|---|---|\n")
        for mutant in mutants:
            killer = try_mutant(tree, mutant)
            reason = f"survives: {mutant.survives_because}" if mutant.survives_because else "**SURVIVED**"
            survivors += killer is None and not mutant.survives_because
            guard = " ".join(mutant.snippet.split()).replace("|", "\\|")
            sys.stdout.write(f"| {mutant.file} | `{guard}` | {killer or reason} |\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(mutants)} mutants, {survivors} survived without a reason\n")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
