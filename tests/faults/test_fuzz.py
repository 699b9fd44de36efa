"""Any boxes, tables, COCO files, pictures, truth: an outcome or a listed error, in bounded time and memory.

A few hundred examples of each kind run always. The long form takes FUZZ_EXAMPLES of each, 25,000 unless
told otherwise: `FUZZ_EXAMPLES=25000 pytest -m faults tests/faults/test_fuzz.py -s` prints what came out.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from pipeline.decode_child import DecodeChild
from pipeline.records import Limits
from tests.faults import fuzzing

SHORT = 300
LONG = int(os.environ.get("FUZZ_EXAMPLES", "25000"))
FINDS = json.loads((Path(__file__).parent / "finds.json").read_text())
MEMORY_MIB = 1024
REPORT_EVERY = 500
CASES = {
    "boxes": fuzzing.box_cases,
    "tables": fuzzing.table_cases,
    "coco": fuzzing.coco_cases,
    "pictures": fuzzing.picture_cases,
    "truths": fuzzing.truth_cases,
}


@pytest.fixture(scope="module")
def child() -> Iterator[DecodeChild]:
    limits = Limits(decode_timeout_s=30, decode_memory_bytes=MEMORY_MIB * 2**20)
    child = DecodeChild(limits, side=64)
    yield child
    child.close()


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzzing.TruthJudge]:
    judge = fuzzing.TruthJudge(tmp_path_factory.mktemp("truths"), bound_s=25, budget_mib=MEMORY_MIB)
    yield judge
    judge.close()


@pytest.fixture
def targets(child: DecodeChild, judge: fuzzing.TruthJudge, tmp_path: Path) -> dict[str, Callable[[Any], str]]:
    inputs = fuzzing.Inputs(tmp_path)
    return {
        "boxes": fuzzing.judge_boxes,
        "tables": inputs.plan_table,
        "coco": inputs.plan_coco,
        "pictures": lambda case: fuzzing.decode_picture(child, case),
        "truths": judge.judge,
    }


def say(text: str) -> None:
    sys.stdout.write(f"\n{text}")
    sys.stdout.flush()


def run(kind: str, target: Callable[[Any], str], *, examples: int, bound_s: float, steady: bool) -> str:
    """Runs the target over `examples` cases; what came out, in words. `steady`: the same cases every time."""
    tally = fuzzing.Tally()

    @seed(int(os.environ.get("FUZZ_SEED", "1")))
    @settings(
        max_examples=examples,
        derandomize=steady,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES[kind])
    def check(case: Any) -> None:
        tally.measure(target, case, bound_s=bound_s, budget_mib=MEMORY_MIB)
        if sum(tally.outcomes.values()) % REPORT_EVERY == 0:
            say(f"fuzz {kind}: {tally}")

    check()
    return str(tally)


@pytest.mark.parametrize("kind", CASES)
def test_anything_gives_an_outcome_or_a_listed_error(
    kind: str, targets: dict[str, Callable[[Any], str]]
) -> None:
    run(kind, targets[kind], examples=SHORT, bound_s=25, steady=True)


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", CASES)
def test_very_many_of_anything(
    kind: str, targets: dict[str, Callable[[Any], str]], judge: fuzzing.TruthJudge
) -> None:
    say(f"fuzz {kind}: {run(kind, targets[kind], examples=LONG, bound_s=5, steady=False)}")
    if kind == "truths":
        say(f"fuzz {kind}: the process grew by {judge.most_mib:.0f} MiB at most")


@pytest.mark.parametrize("find", FINDS, ids=lambda find: find["what"])
def test_what_was_found_once_stays_mended(find: dict[str, str], child: DecodeChild, tmp_path: Path) -> None:
    body = base64.b64decode(find["bytes"])
    if find["kind"] == "picture":
        assert fuzzing.decode_bytes(child, body) == find["outcome"]
    else:
        assert fuzzing.Inputs(tmp_path).plan(find["name"], body) == find["outcome"]
