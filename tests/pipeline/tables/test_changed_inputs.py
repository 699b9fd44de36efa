"""A job whose inputs changed: what is equal keeps its rows, the rest is done, and no kill loses anything."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from hqlabel.jobs.results.read_tables import require_published
from hqlabel.pipeline.errors import JobRefused
from hqlabel.pipeline.job_context import EarlierPlan, Place
from hqlabel.pipeline.job_state.driver_lock import Owner
from hqlabel.pipeline.job_state.job_file import JOB_KEY, Job, open_job, require_job
from hqlabel.pipeline.job_state.plan_files import iter_plan
from hqlabel.pipeline.planning.make_plan import write_plan
from hqlabel.pipeline.settings import FilterSettings, Limits
from hqlabel.pipeline.stages.rows_between_stages import UnitRow
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.changed_inputs import Changes, _overlapping, compare, going_on, take_over
from hqlabel.pipeline.tables.clean_output import clean
from hqlabel.pipeline.tables.job_status import status
from hqlabel.pipeline.tables.manifest import read_manifest
from hqlabel.pipeline.tables.publish_tables import publish
from hqlabel.pipeline.tables.unit_files import list_committed, read_generation, unit_key
from hqlabel.pipeline.tables.verify_output import verify
from tests.faults import chain
from tests.faults.chain import SmallJob, as_job, do_unit, read_table
from tests.pipeline import made_jobs
from tests.pipeline.made_jobs import noise, png

BEFORE = [f"{n:02}.png" for n in range(11)]
AFTER = ["000.png", *(name for name in BEFORE if name != "04.png"), "99.png"]
CHANGED = ("07.png", "08.png")
POINTS = ("disk.written", "disk.named", "unit.built", "commit.created")
BOX = [[2.0, 3.0, 30.0, 20.0]]


def make(folder: Path, names: list[str], changed: tuple[str, ...] = ()) -> SmallJob:
    """A job over these pictures, in units of 3; those of `changed` have another box."""
    boxes = {name: [[2.0, 3.0, 40.0, 25.0]] if name in changed else BOX for name in names}
    pictures = {name: png(noise(int(name[:-4]))) for name in names}
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    made = made_jobs.make_job(
        folder, pictures, boxes, images_per_unit=3, place=Place(uri=str(folder / "planned")),
        limits=Limits(segment_timeout_s=20),
    )  # fmt: skip
    context = replace(made.context, output=Place(uri=str(folder / "out")))
    return SmallJob(job=as_job(context, made.plan), plan=made.plan, pictures=folder / "pictures", mended=b"")


def work(store: Store, job: Job, *, units: int | None = None) -> None:
    """Do what is pending, or so many units of it; publish when all is done."""
    with Owner.take(store, takeover_after_s=0.5, beat_every_s=0.1) as owner:
        first = job.context.first_generation
        pending = [unit for unit in range(job.units) if unit not in list_committed(store, first)]
        for unit_id in pending[:units]:
            do_unit(UnitRow(unit_id=unit_id, generation=first), job.context, epoch=owner.number)
        if units is None:
            publish(store, job, FilterSettings(), require_owner=owner.require)


def go_on(folder: Path, names: list[str], changed: tuple[str, ...] = ()) -> None:
    """What `label --accept-changed-inputs` does, with a stub for the model; started again it goes on."""
    new = make(folder, names, changed)
    store = new.store
    before = require_job(store, access=new.context.access)
    if before.context.plan_sha256 != new.plan.sha256:
        job = going_on(store, before, new.job)
        write_plan(store, new.plan)
        take_over(store, before, job)
    job = open_job(store, new.job)
    work(store, job)


@pytest.fixture
def done(tmp_path: Path) -> SmallJob:
    made = make(tmp_path, BEFORE)
    job = open_job(made.store, made.job)
    write_plan(made.store, made.plan)
    work(made.store, job)
    return made


def rows_of(store: Store) -> dict[str, dict]:
    return {row["image_id"]: row for row in read_table(store, "images").to_pylist()}


def masks_of(store: Store) -> list[tuple]:
    """Every row of the tables as a glob reads them, without paths and times."""
    images = [(row["image_id"], row["status"]) for row in read_table(store, "images").to_pylist()]
    names = ("image_id", "instance_index", "prompt_bbox", "segmentation", "predicted_iou", "stability_score")
    instances = read_table(store, "instances").to_pylist()
    return [*images, *([row[name] for name in names] for row in instances)]


def fresh(folder: Path, names: list[str], changed: tuple[str, ...]) -> list[tuple]:
    """What a job of the new inputs alone publishes."""
    made = make(folder, names, changed)
    job = open_job(made.store, made.job)
    write_plan(made.store, made.plan)
    work(made.store, job)
    return masks_of(made.store)


def test_unchanged_images_keep_their_rows_and_the_others_are_done(done, tmp_path) -> None:
    store, before = done.store, rows_of(done.store)
    new = make(tmp_path, AFTER, CHANGED)
    said = compare(store, require_job(store), new.plan.table)

    go_on(tmp_path, AFTER, CHANGED)

    assert said == Changes(unchanged=8, done=8, changed=2, new=2, gone=1)
    assert "5 images differ (2 changed, 2 new, 1 gone), 8 are as before, 8 of them done" in str(said)
    after = rows_of(store)
    assert sorted(after) == sorted(AFTER)
    kept = [name for name in AFTER if name in before and name not in CHANGED]
    for name in kept:
        assert {**after[name], "unit_id": 0} == {**before[name], "unit_id": 0}
    redone = [name for name in AFTER if name not in kept]
    assert all(after[name]["processed_at"] > before["00.png"]["processed_at"] for name in redone)
    assert masks_of(store) == fresh(tmp_path / "fresh", AFTER, CHANGED)
    assert verify(store, require_job(store)).findings == []
    assert status(store, require_job(store)).complete
    clean(store, require_owner=lambda what: None, first_generation=2)
    assert store.list("units/") == []
    assert verify(store, require_job(store)).findings == []


def test_what_a_worker_of_the_old_plan_still_commits_is_no_unit_of_the_new_one(done, tmp_path) -> None:
    store, before = done.store, require_job(done.store)
    stored = store.read(JOB_KEY)
    new = make(tmp_path, AFTER)
    job = going_on(store, before, new.job)
    write_plan(store, new.plan)
    take_over(store, before, job)

    store.put_if_absent(unit_key(0, 1), store.read(unit_key(0, 0)))  # a retry that was under way

    assert list_committed(store, job.context.first_generation) == {}
    archive = f"previous/{before.context.plan_sha256[:16]}.g0"
    assert store.read(f"{archive}/{JOB_KEY}") == stored
    assert read_manifest(store).parts == ()  # it is of no plan that the job has now


def test_a_job_in_the_middle_keeps_what_it_has_done_and_may_change_again(tmp_path) -> None:
    made = make(tmp_path, BEFORE)
    job = open_job(made.store, made.job)
    write_plan(made.store, made.plan)
    work(made.store, job, units=2)
    both = (read_generation(made.store, unit, 0).to_pylist() for unit in (0, 1))
    done_before = {row["image_id"] for rows in both for row in rows}
    new = make(tmp_path, AFTER, CHANGED)
    assert compare(made.store, require_job(made.store), new.plan.table).done == len(done_before - {"04.png"})
    taken = going_on(made.store, require_job(made.store), new.job)
    write_plan(made.store, new.plan)
    take_over(made.store, require_job(made.store), taken)
    work(made.store, open_job(made.store, new.job), units=1)

    go_on(tmp_path, BEFORE, ("07.png",))

    assert masks_of(made.store) == fresh(tmp_path / "fresh", BEFORE, ("07.png",))
    assert len(list((tmp_path / "out" / "previous").iterdir())) == 2
    assert verify(made.store, require_job(made.store)).findings == []


def test_an_image_that_begins_a_unit_of_the_plan_before_is_looked_for_there(tmp_path) -> None:
    made = make(tmp_path, BEFORE)
    write_plan(made.store, made.plan)
    plan = EarlierPlan(
        plan_sha256=made.plan.sha256, units=made.job.units, first_generation=0, stop_generation=1
    )
    first = [table["image_id"].to_pylist() for table in iter_plan(made.store, made.plan.sha256)]

    assert len(first) > 1
    for unit_id, ids in enumerate(first):
        assert list(_overlapping(made.store, plan, ids[:1])) == [unit_id]
        assert list(_overlapping(made.store, plan, ids)) == [unit_id]
    assert list(_overlapping(made.store, plan, [first[0][-1], first[1][0]])) == [0, 1]


@pytest.mark.parametrize("units", [0, 1])
def test_a_change_that_was_cut_short_calls_no_table_damaged(units: int, done: SmallJob, tmp_path) -> None:
    store, new = done.store, make(tmp_path, AFTER, CHANGED)
    taken = going_on(store, require_job(store), new.job)
    write_plan(store, new.plan)
    take_over(store, require_job(store), taken)
    job = open_job(store, new.job)
    if units:
        work(store, job, units=units)
    advice = "the tables are those of the plan before; run `hqlabel label` again"
    with pytest.raises(JobRefused, match=advice):
        publish(store, job, FilterSettings(), require_owner=lambda what: None)
    with pytest.raises(JobRefused, match=advice):
        require_published(store)
    assert [advice in str(one) for one in verify(store, job).findings] == [True]
    work(store, job)
    assert verify(store, job).findings == []


def test_fewer_parts_and_cleaned_jobs_are_refused(done, tmp_path) -> None:
    small = make(tmp_path, BEFORE[:2])
    with pytest.raises(JobRefused, match=r"has 1 part, and images/part-00001.parquet would be left"):
        going_on(done.store, require_job(done.store), small.job)
    clean(done.store, require_owner=lambda what: None)
    new = make(tmp_path, AFTER)
    with pytest.raises(JobRefused, match="removed by clean"):
        going_on(done.store, require_job(done.store), new.job)


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_step_of_the_change_loses_nothing(point: str, done: SmallJob, tmp_path: Path) -> None:
    store, times = done.store, {name: row["processed_at"] for name, row in rows_of(done.store).items()}
    shutil.copytree(tmp_path / "out", tmp_path / "as it was")
    wanted = fresh(tmp_path / "fresh", AFTER, CHANGED)
    for visit in range(1, 60):
        code = chain.in_child(go_on, tmp_path, AFTER, CHANGED, failpoint=f"{point}=kill@{visit}")
        stored = json.loads(store.read(JOB_KEY))["context"]["plan_sha256"]
        if stored == done.plan.sha256:  # the old job is whole
            work(store, open_job(store, done.job))
            assert sorted(rows_of(store)) == BEFORE
        go_on(tmp_path, AFTER, CHANGED)

        assert masks_of(store) == wanted
        assert verify(store, require_job(store)).findings == []
        after = rows_of(store)
        assert all(after[n]["processed_at"] == times[n] for n in times if n in after and n not in CHANGED)
        if code != -signal.SIGKILL:
            assert visit > 3, "no kill landed"
            return
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "as it was", tmp_path / "out")
    raise AssertionError("it was killed at every visit")
