"""What the fault tests share: the record of what landed, and small jobs in stores of every kind."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from hqlabel.pipeline.job_context import Place
from tests.conftest import make_place
from tests.faults import chain

RESULTS = "FAULT_RESULTS"
"""Names the file into which every test writes a line; tools/fault_table.py makes a table of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one test saw. `rows`: of the fault matrix. None: does not apply, or was not measured."""

    rows: tuple[int, ...]
    fault: str
    landed: int
    lost: int = 0
    doubled: int = 0
    repeated: int | None = None
    recover_s: float | None = None
    code: str = ""


class Record:
    """Writes results down; a result without a landed fault, or with a loss, fails its test."""

    def __call__(self, *rows: int, fault: str, landed: int, **seen: object) -> None:
        result = Result(rows=rows, fault=fault, landed=landed, **seen)  # type: ignore[arg-type]
        assert result.landed > 0, f"no fault landed: {fault}"
        assert (result.lost, result.doubled) == (0, 0), result
        if os.environ.get(RESULTS):
            with open(os.environ[RESULTS], "a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(result), ensure_ascii=False) + "\n")


@pytest.fixture
def record() -> Record:
    return Record()


@pytest.fixture(scope="session")
def small_job(tmp_path_factory: pytest.TempPathFactory) -> chain.SmallJob:
    return chain.make_small_job(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def wanted(small_job: chain.SmallJob, tmp_path_factory: pytest.TempPathFactory) -> chain.Seen:
    """The tables of the small job when nothing disturbs it."""
    made = small_job.at(Place(uri=str(tmp_path_factory.mktemp("undisturbed") / "out")))
    chain.run_job(made)
    return chain.look(made.store)


@pytest.fixture(params=["local", "s3", "memory"])
def any_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request.param, tmp_path, request)
