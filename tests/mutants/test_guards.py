"""The list of guards fits the tree: each snippet is there once, its tests exist, and there are many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.guards import MUTANTS, Mutant

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: f"{one.file}: {one.snippet[:40]}")
def test_a_guard_is_there_once_and_its_tests_exist(mutant: Mutant) -> None:
    assert (REPOSITORY / mutant.file).read_text().count(mutant.snippet) == 1
    assert mutant.snippet != mutant.replacement
    assert all((REPOSITORY / test.partition("::")[0]).exists() for test in mutant.tests if "/" in test)


def test_there_are_many_guards_of_all_three_packages() -> None:
    assert len(MUTANTS) >= 150
    assert {one.file.partition("/")[0] for one in MUTANTS} == {"jobs", "model", "pipeline"}
