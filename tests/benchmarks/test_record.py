"""A benchmark's output is written down with date, commit, machine, versions and command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import record


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    page = tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n\nWords.\n")
    monkeypatch.setattr(record, "PAGE", page)
    return page


def test_a_run_is_shown_and_written_down_after_those_before_it(
    page: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for word in ("first", "second"):
        assert record.main([sys.executable, "-c", f"print('| {word} |')"]) == 0

    text = page.read_text()
    assert capfd.readouterr().out == "| first |\n| second |\n"
    assert text.startswith("# Benchmarks\n\nWords.\n\n# As printed\n")
    assert text.count("# As printed") == 1
    assert text.index("| first |\n```") < text.index("| second |\n```")
    for fact in (record.commit(), record.cpu_name(), "CPU cores", "Python 3.", "torch 2.", "print("):
        assert fact in text, fact


def test_a_command_that_fails_leaves_nothing(page: Path) -> None:
    before = page.read_text()

    assert record.main([sys.executable, "-c", "print(1); raise SystemExit(3)"]) == 3
    assert page.read_text() == before


def test_programs_are_those_of_this_environment(page: Path) -> None:
    assert record.main(["python", "-c", "import sys; print(sys.prefix)"]) == 0
    assert sys.prefix in page.read_text()
