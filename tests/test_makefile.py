"""`make` is the door: it explains itself, and its targets are the ones that the pages promise."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make(*arguments: str) -> str:
    """What `make` would print or run, without running it."""
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_make_alone_explains_itself() -> None:
    lines = [line.split() for line in make().splitlines()]

    assert {"setup", "demo", "check", "test", "faults", "bench", "gpu"} <= {words[1] for words in lines}
    assert all(len(words) > 3 for words in lines), "every target says what it is for"


def test_make_test_checks_first_and_leaves_out_what_needs_more_than_this_machine() -> None:
    plan = make("--dry-run", "test")

    checks = [
        plan.index(tool) for tool in ("ruff check", "ruff format --check", "mypy", "lint-imports", "pytest")
    ]
    assert checks == sorted(checks)
    assert '-m "not faults and not gpu and not network"' in plan


def test_setup_is_torch_first_then_the_locked_list_then_the_project() -> None:
    plan = make("--dry-run", "--always-make", "setup")

    torch, locked, project = (
        plan.index(text) for text in ("grep '^torch=='", "--require-hashes -r requirements.lock", "-e .")
    )
    assert torch < locked < project
    assert plan.count("--no-deps") == 2


def test_the_ci_run_bounds_its_stages_and_calls_make_test() -> None:
    script = (ROOT / ".ci" / "run").read_text()

    stages = [line.split() for line in script.splitlines() if line.startswith("stage ")]
    assert [words[1] for words in stages] == ["setup", "check", "test"]
    assert stages[-1][3:] == ["make", "test"]
    assert sum(int(words[2]) for words in stages) <= 75 * 60
    assert "timeout" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
