"""Two commands at once: one pauses at a step, another runs to its end, the first goes on; by barriers.

Every pair of commands meets at every step between looking and the last write, on a disk and on S3. Whoever
sleeps loses its job to the other; whoever waits keeps it. Whatever they do, no row may get lost or old.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.tables.manifest import read_manifest
from tests.conftest import make_place
from tests.faults.conftest import Record
from tests.faults.racing import Pause, Race, make_race

pytestmark = pytest.mark.timeout(1800)

PUBLISHING = (
    *("publish.listed", "manifest.writing", "publish.begun", "publish.putting", "publish.images"),
    *("publish.part", "publish.putting@3", "publish.parts", "publish.categories", "manifest.writing@2"),
    *("publish.done", "owner.releasing"),
)
WORKING = ("unit.read", "unit.built", "commit.created", "commit.done")
STEPS = {
    "label": (*WORKING, *PUBLISHING),
    "filter": ("owner.created", "owner.taken", *PUBLISHING),
    "retry": ("retry.listed", "retry.replaced", *WORKING, *PUBLISHING),
    "clean": ("clean.listed", "manifest.writing", "clean.marked", "clean.deleting", "clean.deleted"),
}
BEFORE = {"label": ("label-begun",), "filter": ("label",), "retry": ("label",), "clean": ("label", "retry")}
PAIRS = [(first, second) for first in STEPS for second in STEPS]


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Race]:
    """Outputs to start from: `begun` (two of four units), `labelled` (one image failed), `retried`."""
    folder = tmp_path_factory.mktemp("stages")
    begun = make_race(folder / "job", Place(uri=str(folder / "begun")))
    assert begun.start(*begun.arguments("label"), failpoint="commit.done=kill@2").go_on() == -9
    labelled = begun.copied_to(Place(uri=str(folder / "labelled")), folder / "calls-labelled")
    assert labelled.run("label") == 0
    retried = labelled.copied_to(Place(uri=str(folder / "retried")), folder / "calls-retried")
    retried.mend()
    assert retried.run("retry") == 0
    assert retried.findings() == []
    return {"begun": begun, "labelled": labelled, "retried": retried}


START = {"label": "begun", "filter": "labelled", "retry": "labelled", "clean": "labelled"}


def meet(
    race: Race,
    first: str,
    step: str,
    second: str,
    pause: Pause,
    stages: dict[str, Race],
    *,
    to_the_end: bool = False,
) -> bool:
    """Whether the first command came to the step, where the second ran to its end; both left all right."""
    name, _, visit = step.partition("@")
    place = f"{name}=stop@{visit or 1}"
    sleeper = race.start(*race.arguments(first), failpoint=place, pause=pause)
    reached = sleeper.until_reached()
    known = race.newest_generations() if reached else {}
    codes = {"second": race.run(second) if reached else 0, "first": sleeper.go_on()}
    what = f"{first} at {step} ({pause}), {second} meanwhile: {codes}; {sleeper.said[-300:]}"
    assert set(codes.values()) <= {0, 4}, what
    # Until the owner's heart beats there is nobody to wait for; once all is published there is nothing to do.
    unguarded = ("owner.created", "owner.taken", "owner.releasing", "publish.done")
    if pause == "wait" and reached and step not in unguarded:
        # Another label finds a job that was published once as done as it was, and waits for nobody.
        idle = second == "label" and START[first] == "labelled"
        assert codes["first"] == 0, what
        assert codes["second"] in ((0, 4) if idle else (4,)), what
    retried = (first, codes["first"]) == ("retry", 0) or (second, codes["second"], reached) == (
        "retry",
        0,
        True,
    )
    check(race, what, stages, known, retried=retried)
    if to_the_end:
        go_on_to_the_end(race, what, stages)
    return reached


def check(race: Race, what: str, stages: dict[str, Race], known: dict[int, int], *, retried: bool) -> None:
    """Nothing lost as it lies there, nothing lost or old after the commands were called again."""
    generations = race.newest_generations()
    assert all(generations[unit] >= generation for unit, generation in known.items()), what
    findings = race.findings()
    assert all("interrupted" in str(one) for one in findings), f"{what}: {findings}"
    if retried:
        # A second retry does a unit again that the first has committed and not yet published.
        assert 1 <= max(generations.values()) <= 1 + max(known.values(), default=0), what
    assert race.run("publish" if set(generations) == set(range(4)) else "label") == 0, what
    assert race.findings() == [], what
    mended = max(race.newest_generations().values()) > 0
    assert mended or not retried, what
    assert race.rows() == stages["retried" if mended else "labelled"].rows(), what


def go_on_to_the_end(race: Race, what: str, stages: dict[str, Race]) -> None:
    """What else there is to call may be called, and ends where it does without a race."""
    cleaned = read_manifest(race.store).cleaned  # type: ignore[union-attr]
    mended = max(race.newest_generations().values()) > 0
    if not cleaned:
        assert race.run("retry") == 0
    assert race.run("clean") == 0
    assert race.findings() == [], what
    assert race.rows() == stages["labelled" if cleaned and not mended else "retried"].rows(), what


QUICK = [
    ("filter", "publish.listed", "retry", "stop"),
    ("clean", "clean.listed", "retry", "stop"),
    ("filter", "publish.putting", "retry", "stop"),
    pytest.param("retry", "unit.built", "clean", "stop", marks=pytest.mark.faults),
    pytest.param("clean", "clean.deleting", "filter", "wait", marks=pytest.mark.faults),
]


@pytest.mark.parametrize(("first", "step", "second", "pause"), QUICK)
def test_row_61_two_commands_meet_at_a_step(
    first: str, step: str, second: str, pause: Pause, stages: dict[str, Race], tmp_path: Path, record: Record
) -> None:
    stages["retried"].mend()
    race = stages[START[first]].copied_to(Place(uri=str(tmp_path / "out")), tmp_path / "calls")
    assert meet(race, first, step, second, pause, stages, to_the_end=True)
    record(61, fault=f"{first} pauses at {step}, {second} runs", landed=1, code="0 or 4")


AFTER = ("status", "label", "retry", "filter", "publish", "validate", "clean")


@pytest.mark.parametrize(
    ("first", "step"),
    [
        pytest.param("clean", "disk.deleting@2", marks=pytest.mark.faults),
        *(pytest.param("clean", step, marks=pytest.mark.faults) for step in STEPS["clean"]),
        *(pytest.param("filter", step, marks=pytest.mark.faults) for step in PUBLISHING),
        *(pytest.param("retry", step, marks=pytest.mark.faults) for step in STEPS["retry"]),
    ],
)
def test_row_62_after_a_killed_command_every_other_may_be_called(
    first: str, step: str, stages: dict[str, Race], tmp_path: Path, record: Record
) -> None:
    """In turn, and in turn from the last: no row is lost or old, and clean ends it."""
    name, _, visit = step.partition("@")
    stages["retried"].mend()
    for number, order in enumerate((AFTER, AFTER[::-1])):
        folder = tmp_path / str(number)
        race = stages[START[first]].copied_to(Place(uri=str(folder / "out")), folder / "calls")
        killed = race.start(*race.arguments(first), failpoint=f"{name}=kill@{visit or 1}")
        assert killed.go_on() == -9
        codes = {one: race.run(one) for one in order}
        assert set(codes.values()) <= {0, 4, 6}, codes
        assert race.run("publish") in (0, 4), codes
        assert race.findings() == [], codes
        mended = max(race.newest_generations().values()) > 0
        assert race.rows() == stages["retried" if mended else "labelled"].rows(), codes
        assert race.run("clean") == 0, codes
    record(62, fault=f"{first} killed at {step}, then every command", landed=2, code="-9, then 0 or 4")


def test_row_62_status_and_validate_while_clean_deletes(
    stages: dict[str, Race], tmp_path: Path, record: Record
) -> None:
    race = stages["labelled"].copied_to(Place(uri=str(tmp_path / "out")), tmp_path / "calls")
    cleaning = race.start(*race.arguments("clean"), failpoint="disk.deleting=stop@3", pause="wait")
    assert cleaning.until_reached()
    assert [race.run(name) for name in ("status", "validate", "clean")] == [0, 0, 4]
    assert cleaning.go_on() == 0
    assert race.findings() == []
    record(62, fault="status, validate and clean while clean deletes", landed=1, code="0, 0, 4")


@pytest.mark.faults
@pytest.mark.parametrize("pause", ["stop", "wait"])
@pytest.mark.parametrize("kind", ["local", "s3"])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_row_61_every_pair_meets_at_every_step(
    first: str,
    second: str,
    kind: str,
    pause: Pause,
    stages: dict[str, Race],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record: Record,
) -> None:
    landed = 0
    stages["retried"].mend()
    for step in STEPS[first]:
        place = make_place(kind, tmp_path / step, request)
        race = stages[START[first]].copied_to(place, tmp_path / step / "calls")
        assert meet(race, first, step, second, pause, stages), f"{first} never comes to {step}"
        landed += 1
    record(61, fault=f"{first} {pause}s at each step, {second} runs, {kind}", landed=landed, code="0 or 4")
