"""Rows 24, 25, 27 to 29: several drivers, folders of something else, changed settings, damaged files."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hqlabel.pipeline.errors import DamageFound, JobRefused
from hqlabel.pipeline.job_context import Place
from hqlabel.pipeline.job_state.driver_lock import Owner, current_holder
from hqlabel.pipeline.job_state.job_file import JOB_KEY, Job, open_job, read_job
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.clean_output import clean
from hqlabel.pipeline.tables.manifest import read_manifest
from hqlabel.pipeline.tables.unit_files import list_committed
from hqlabel.pipeline.tables.verify_output import verify
from tests.conftest import make_place
from tests.faults import chain
from tests.faults.chain import SmallJob, look, lost_and_doubled, run_job, start_child
from tests.faults.conftest import Record

pytestmark = pytest.mark.timeout(600)


def everything(store: Store) -> dict[str, bytes]:
    """Every file but the drivers' marks."""
    keys = [entry.key for entry in store.list() if not entry.key.startswith("owner/")]
    return {key: store.read(key) for key in keys}


# ---------------------------------------------------------------------------------------------
# Two drivers
# ---------------------------------------------------------------------------------------------


def race(place: Place, rounds: int, barrier: Any, won: Any) -> None:
    store = Store(place)
    for _ in range(rounds):
        barrier.wait(60)
        try:
            with Owner.take(store, takeover_after_s=20.0, beat_every_s=0.1) as owner:
                won.put(owner.number)
                barrier.wait(60)  # held until the other has tried
        except JobRefused:
            barrier.wait(60)
        barrier.wait(60)


@pytest.mark.parametrize(
    ("kind", "rounds"),
    [
        ("local", 4),
        pytest.param("local", 20, marks=pytest.mark.faults),
        pytest.param("s3", 20, marks=pytest.mark.faults),
    ],
)
def test_row_24_of_two_drivers_behind_a_barrier_one_wins(
    kind: str, rounds: int, tmp_path: Path, request: pytest.FixtureRequest, record: Record
) -> None:
    place = make_place(kind, tmp_path, request)
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(2), context.Queue()
    racers = [context.Process(target=race, args=(place, rounds, barrier, won)) for _ in range(2)]
    for racer in racers:
        racer.start()
    numbers = sorted(won.get(timeout=120) for _ in range(rounds))
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0, 0]
    assert numbers == list(range(1, rounds + 1)), "a round with two winners, or with none"
    assert won.empty()
    record(24, fault=f"two drivers behind a barrier, {rounds} rounds, {kind}", landed=rounds, code="one wins")


def test_row_24_two_drivers_that_both_work_make_one_job(
    small_job: SmallJob, wanted: chain.Seen, tmp_path: Path, record: Record
) -> None:
    """Started together: who is not the owner ends without a word in the store."""
    made = small_job.at(Place(uri=str(tmp_path / "out")))
    both = [start_child(run_job, made) for _ in range(2)]
    for child in both:
        child.join(120)
    assert {child.exitcode for child in both} <= {0, 1}
    run_job(made)
    assert look(made.store) == wanted
    lost, doubled = lost_and_doubled(made.store, made)
    record(
        24, fault="two drivers started together", landed=1, lost=lost, doubled=doubled, code="0 and 0 or 4"
    )


# Places at which a driver is paused until another has finished the job.
PAUSES = ("unit.built", "commit.created", "publish.begun", "publish.images", "publish.parts")


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", PAUSES)
def test_row_25_a_paused_driver_that_wakes_changes_nothing(
    name: str,
    kind: str,
    small_job: SmallJob,
    wanted: chain.Seen,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record: Record,
) -> None:
    """Meanwhile the other has finished, retried and published again: newer rows than the sleeper's."""
    made = small_job.at(make_place(kind, tmp_path, request))
    sleeper = start_child(run_job, made, failpoint=f"{name}=stop")
    assert sleeper.pid is not None
    wait_until_stopped(sleeper.pid)
    run_job(made, until="retry")
    before = everything(made.store)

    os.kill(sleeper.pid, signal.SIGCONT)
    sleeper.join(120)

    assert sleeper.exitcode == 1, "it should have found another driver's mark"
    assert {k: v for k, v in everything(made.store).items() if k in before} == before
    assert verify(made.store, read_job(made.store)).findings == []  # type: ignore[arg-type]
    run_job(made)
    assert look(made.store) == wanted
    record(25, fault=f"SIGSTOP at {name}, takeover, SIGCONT, {kind}", landed=1, code="4 of the sleeper")


def wait_until_stopped(pid: int) -> None:
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < end, "the driver never came to its fail point"
        time.sleep(0.02)


def test_row_1_a_dead_drivers_mark_is_taken_over_at_once(
    small_job: SmallJob, wanted: chain.Seen, any_place: Place, record: Record
) -> None:
    if any_place.uri.startswith("memory"):
        pytest.skip("a store of this process dies with the driver")
    made = small_job.at(any_place)
    assert chain.in_child(run_job, made, failpoint="commit.created=kill@2") == -signal.SIGKILL
    began = time.monotonic()
    with Owner.take(made.store, takeover_after_s=60) as owner:
        seconds = time.monotonic() - began
        assert owner.number == 2
    run_job(made)
    assert seconds < 20
    assert current_holder(made.store)[0] == 3  # type: ignore[index]
    assert look(made.store) == wanted
    record(1, fault="driver killed after its second commit", landed=1, recover_s=seconds, code="-9, then 0")


# ---------------------------------------------------------------------------------------------
# Another job, other settings
# ---------------------------------------------------------------------------------------------


def test_row_27_a_folder_of_something_else_is_left_as_it_is(
    small_job: SmallJob, any_place: Place, record: Record
) -> None:
    landed = 0
    for number, files in enumerate(
        (
            {"diary.txt": b"not yours"},
            {"instances/part-00000.parquet": b"PAR1"},
            {JOB_KEY: b'{"product": "hqlabel", "format": 99}'},
            {JOB_KEY: b'{"product": "another"}'},
            {JOB_KEY: b""},
        )
    ):
        made = small_job.at(replace(any_place, uri=f"{any_place.uri}-{number}"))
        for key, body in files.items():
            made.store.put(key, body)
        with pytest.raises(JobRefused):
            open_job(made.store, made.job)
        assert everything(made.store) == files
        landed += 1
    record(27, fault="folder of another product, version or kind", landed=landed, code="4")


def test_row_28_every_field_of_the_identity_refuses_a_resume(
    small_job: SmallJob, tmp_path: Path, record: Record
) -> None:
    made = small_job.at(Place(uri=str(tmp_path / "out")))
    run_job(made, until="label")
    before, landed = everything(made.store), 0
    for path in leaves(made.job.identity):
        identity = changed(made.job.identity, path)
        with pytest.raises(JobRefused, match="another job") as caught:
            open_job(made.store, replace(made.job, identity=identity))
        assert str(path[-1]) in str(caught.value)
        landed += 1
    assert everything(made.store) == before
    assert landed > 15
    record(28, fault="one field of the identity changed, each in turn", landed=landed, code="4")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict) and value:
        return [leaf for key, below in value.items() for leaf in leaves(below, (*path, key))]
    return [path]


def changed(identity: Any, path: tuple[Any, ...]) -> dict[str, Any]:
    tree = at = copy.deepcopy(dict(identity))
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = "changed"
    return tree


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------

DAMAGE = {
    "deleted": None,
    "cut": lambda body: body[: len(body) // 2],
    "emptied": lambda body: b"",
    "garbage": lambda body: b"<html>" * 50,
    "flipped": lambda body: body[:200] + bytes([body[200] ^ 4]) + body[201:],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_row_29_damage_to_any_file_is_named_and_never_published(
    how: str, small_job: SmallJob, tmp_path: Path, record: Record
) -> None:
    made = small_job.at(Place(uri=str(tmp_path / "out")))
    run_job(made, until="retry")
    job, landed = require(made.store), 0
    files = [entry.key for entry in made.store.list() if entry.key.endswith(".parquet")]
    assert {key.split("/")[0] for key in files} == {"plan", "units", "images", "instances"}
    for key in [*files, "manifest.json"]:
        if how == "flipped" and key == "manifest.json":
            continue  # a flip inside a count or a date is still JSON
        body = made.store.read(key)
        harm(made.store, key, how)
        found = verify(made.store, job).findings
        landed += 1
        superseded = how == "deleted" and key == "units/00000001.g0.parquet"  # g1 is what counts
        lost_manifest = (
            how == "deleted" and key == "manifest.json"
        )  # then nothing is published, which is sound
        named = {key if one.key == "plan/" and key.startswith("plan/") else one.key for one in found}
        assert superseded or lost_manifest or (found and key in named), (key, found)
        if key.startswith("units/") and found:
            assert found[0].unit_id == int(key[6:14])
        made.store.put(key, body)
    assert verify(made.store, job).findings == []
    record(29, fault=f"file {how}, each in turn", landed=landed, code="6 of validate")


def test_row_29_a_damaged_unit_is_not_published_and_a_lost_one_is_done_again(
    small_job: SmallJob, wanted: chain.Seen, tmp_path: Path, record: Record
) -> None:
    made = small_job.at(Place(uri=str(tmp_path / "out")))
    assert chain.in_child(run_job, made, failpoint="publish.begun=kill") == -signal.SIGKILL
    key = list_committed(made.store)[2].key
    body = made.store.read(key)
    for how in ("cut", "flipped", "garbage", "emptied"):
        harm(made.store, key, how)
        with pytest.raises(DamageFound, match="unit 2"):
            run_job(made)
        assert read_manifest(made.store).state == "publishing"  # type: ignore[union-attr]
        made.store.put(key, body)
    harm(made.store, key, "deleted")
    run_job(made)
    assert look(made.store) == wanted
    record(29, fault="committed unit damaged before publishing", landed=5, code="6, then 0")


def harm(store: Store, key: str, how: str) -> None:
    change = DAMAGE[how]
    if change is None:
        store.delete([key])
    else:
        store.put(key, change(store.read(key)))


def require(store: Store) -> Job:
    job = read_job(store)
    assert job is not None
    return job


def test_clean_deletes_what_this_job_made_and_the_parts_have_replaced(
    small_job: SmallJob, any_place: Place
) -> None:
    """Foreign files that look like ours stay; a neighbour whose name begins with ours stays whole."""
    made = small_job.at(any_place)
    neighbour = small_job.at(replace(any_place, uri=any_place.uri + "-next"))
    run_job(neighbour, until="retry")
    run_job(made, until="retry")
    foreign = {
        "units/00000000.g0.parquet.bak": b"1",
        "attempts/mine.json": b"2",
        "units/x/y": b"3",
        "z": b"4",
    }
    for key, body in foreign.items():
        made.store.put(key, body)
    before, beside = everything(made.store), everything(neighbour.store)

    with Owner.take(made.store, takeover_after_s=0.5) as owner:
        clean(made.store, require_owner=owner.require)

    after = everything(made.store)
    gone = before.keys() - after.keys()
    assert gone
    assert all(key.startswith(("units/0000000", "attempts/0000000")) for key in gone)
    assert not gone & foreign.keys()
    assert everything(neighbour.store) == beside
    kept = {k: v for k, v in before.items() if k not in gone and k != "manifest.json"}
    assert {k: v for k, v in after.items() if k != "manifest.json"} == kept
    assert json.loads(after["manifest.json"])["cleaned"]
