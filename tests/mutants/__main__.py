"""Remove each guard in a copy of the tree and run its tests: `python -m tests.mutants [PART OF A PATH ...]`.

A guard whose absence no test notices survives, and the command ends with 1 unless the list has a reason.
With `--results FILE` each outcome is appended to FILE, and what FILE says was noticed is not tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
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
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:  # a mutant may leave processes behind, and Ctrl-C does not reach a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == 0:
        return None
    lines = [line for line in printed.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" - ")[0].partition(" ")[2] if lines else f"exit code {process.returncode}"


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


def read_results(path: Path) -> dict[tuple[str, str, str], str | None]:
    """What noticed each mutant in earlier calls, by file, snippet and replacement; the last call counts."""
    if not path.exists():
        return {}
    outcomes = [json.loads(line) for line in path.read_text().splitlines()]
    return {(one["file"], one["snippet"], one["replacement"]): one["seen_by"] for one in outcomes}


def say(mutant: Mutant, killer: str | None) -> None:
    """Print the mutant's row of the table."""
    reason = f"survives: {mutant.survives_because}" if mutant.survives_because else "**SURVIVED**"
    guard = " ".join(mutant.snippet.split()).replace("|", "\\|")
    sys.stdout.write(f"| {mutant.file} | `{guard}` | {killer or reason} |\n")
    sys.stdout.flush()


def fails_without(tree: Path, killer: str, mutant: Mutant) -> bool:
    """Return whether what has seen the mutant fails in the unbroken tree too, and so has seen nothing."""
    return run(tree, [killer] if "::" in killer else mutant.tests) is not None


def main(wanted: Sequence[str], results: Path | None) -> int:
    """Try every mutant of the wanted files that the results do not have as noticed; 1 when one survives."""
    mutants = [one for one in MUTANTS if not wanted or any(part in one.file for part in wanted)]
    known = read_results(results) if results else {}
    survivors = unclear = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(REPOSITORY, tree, symlinks=True, ignore=_NOT_COPIED)
        sys.stdout.write("| file | guard removed | seen by |\n|---|---|---|\n")
        for mutant in mutants:
            killer = known.get(mutant[:3])
            if killer is None:
                killer = try_mutant(tree, mutant)
                if killer and fails_without(tree, killer, mutant):
                    say(mutant, f"unclear: also without the change fails {killer}")
                    unclear += 1
                    continue
                if results:
                    with results.open("a") as file:
                        file.write(json.dumps({**mutant._asdict(), "seen_by": killer}) + "\n")
            say(mutant, killer)
            survivors += killer is None and not mutant.survives_because
    sys.stdout.write(f"{len(mutants)} mutants, {survivors} survived without a reason, {unclear} unclear\n")
    return int(survivors + unclear > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("wanted", nargs="*", metavar="PART OF A PATH")
    parser.add_argument("--results", type=Path, metavar="FILE")
    asked = parser.parse_args()
    # As Ctrl-C: the tests that run are ended, and the copy is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(asked.wanted, asked.results))
