"""Any boxes, tables, pictures, prompts, truth: an outcome or a listed error, in bounded time and memory.

Prompts go from a table of ten or more through every stage, the real model too, to committed rows; they are
counted one by one. A hundred examples of each kind run always. The long form takes FUZZ_EXAMPLES of
each, 25,000 unless told otherwise, and prints what came out:
`FUZZ_EXAMPLES=25000 pytest -m faults tests/faults/test_fuzz.py -s`.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.settings import Limits
from tests.e2e.scenes import small_checkpoint
from tests.faults import fuzzing

SHORT = 100
LONG = int(os.environ.get("FUZZ_EXAMPLES", "25000"))
FINDS = json.loads((Path(__file__).parent / "finds.json").read_text())
MEMORY_MIB = 1024
REPORT_EVERY = 500
CASES = {
    "boxes": fuzzing.box_cases,
    "tables": fuzzing.table_cases,
    "coco": fuzzing.coco_cases,
    "pictures": fuzzing.picture_cases,
    "prompts": fuzzing.prompt_cases,
    "truths": fuzzing.truth_cases,
}


@pytest.fixture(scope="module")
def child() -> Iterator[DecodeChild]:
    limits = Limits(decode_timeout_s=30, decode_memory_bytes=MEMORY_MIB * 2**20)
    child = DecodeChild(limits, side=64)
    yield child
    child.close()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzzing.PromptStages]:
    child = DecodeChild(Limits(), side=fuzzing.SIDE)
    folder = tmp_path_factory.mktemp("prompts")
    yield fuzzing.PromptStages(folder=folder, checkpoint=small_checkpoint(folder / "small"), child=child)
    child.close()


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzzing.TruthJudge]:
    judge = fuzzing.TruthJudge(tmp_path_factory.mktemp("truths"), bound_s=25, budget_mib=MEMORY_MIB)
    yield judge
    judge.close()


@pytest.fixture
def targets(
    child: DecodeChild, stages: fuzzing.PromptStages, judge: fuzzing.TruthJudge, tmp_path: Path
) -> dict[str, Callable[[Any], str]]:
    inputs = fuzzing.Inputs(tmp_path)
    return {
        "boxes": fuzzing.judge_boxes,
        "tables": inputs.plan_table,
        "coco": inputs.plan_coco,
        "pictures": lambda case: fuzzing.decode_picture(child, case),
        "prompts": stages.run,
        "truths": judge.judge,
    }


def say(text: str) -> None:
    sys.stdout.write(f"\n{text}")
    sys.stdout.flush()


def examples_of(kind: str, count: int) -> int:
    """So many examples of a kind hold `count` of its things."""
    return -(-count // fuzzing.PROMPTS_A_TABLE) if kind == "prompts" else count


def run(kind: str, target: Callable[[Any], str], *, examples: int, bound_s: float, steady: bool) -> str:
    """Runs the target over `examples` cases; what came out, in words. `steady`: the same cases every time."""
    tally = fuzzing.Tally()
    # A table of prompts takes the model's time, most of a second, and more where others use the machine too:
    # its own time counts, and what waits for ever is for the deadlines of the stages to end.
    clock = time.process_time if kind == "prompts" else time.perf_counter

    @seed(int(os.environ.get("FUZZ_SEED", "1")))
    @settings(
        max_examples=examples,
        derandomize=steady,
        database=None,
        deadline=None,
        phases=[
            Phase.generate,
            *([] if kind == "prompts" else [Phase.shrink]),
        ],  # each takes the model's time
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES[kind])
    def check(case: Any) -> None:
        tally.measure(target, case, bound_s=bound_s, budget_mib=MEMORY_MIB, clock=clock)
        if sum(tally.outcomes.values()) % REPORT_EVERY == 0:
            say(f"fuzz {kind}: {tally}")

    check()
    return str(tally)


@pytest.mark.parametrize("kind", CASES)
def test_anything_gives_an_outcome_or_a_listed_error(
    kind: str, targets: dict[str, Callable[[Any], str]]
) -> None:
    run(kind, targets[kind], examples=examples_of(kind, SHORT), bound_s=25, steady=True)


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", CASES)
def test_very_many_of_anything(
    kind: str,
    targets: dict[str, Callable[[Any], str]],
    stages: fuzzing.PromptStages,
    judge: fuzzing.TruthJudge,
) -> None:
    found = run(kind, targets[kind], examples=examples_of(kind, LONG), bound_s=5, steady=False)
    say(f"fuzz {kind}: {found}")
    if kind == "prompts":
        rows = ", ".join(f"{reason} {count:,}" for reason, count in stages.rows.most_common())
        say(f"fuzz {kind}: {sum(stages.rows.values()):,} prompts: {rows}")
    if kind == "truths":
        say(f"fuzz {kind}: the process grew by {judge.most_mib:.0f} MiB at most")


@pytest.mark.parametrize("find", FINDS, ids=lambda find: find["what"])
def test_what_was_found_once_stays_mended(find: dict[str, str], child: DecodeChild, tmp_path: Path) -> None:
    body = base64.b64decode(find["bytes"])
    if find["kind"] == "picture":
        assert fuzzing.decode_bytes(child, body) == find["outcome"]
    else:
        assert fuzzing.Inputs(tmp_path).plan(find["name"], body) == find["outcome"]
