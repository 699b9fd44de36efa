"""What a retry takes from its call, and what has to be as the job began; no image is done for it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from hqlabel.jobs.cluster import run_units
from hqlabel.jobs.cluster.run_units import Work
from hqlabel.jobs.commands import retry
from hqlabel.jobs.job_setup.saved_job import SavedJob
from hqlabel.jobs.load_config import ConfigSources
from hqlabel.pipeline.errors import JobRefused, SystemicFault
from hqlabel.pipeline.job_context import JobDetector, Place
from hqlabel.pipeline.job_state.driver_lock import latest_number
from hqlabel.pipeline.settings import FilterSettings, Limits
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.clean_output import clean
from hqlabel.pipeline.tables.manifest import read_manifest
from hqlabel.pipeline.tables.publish_tables import publish
from tests.jobs.cli.test_cli import run
from tests.pipeline.made_units import MadeJob, make_job

CALL = ("--checkpoint", "w", "--code", "denied", "--set", "limits.max_failure_rate=1")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeJob:
    """A finished job of whose images none was denied, and its weights, found by any name."""
    made = make_job(Store(Place(uri=str(tmp_path / "out"))))
    made.commit(failing=("img-00007.jpg",))
    monkeypatch.setattr(retry, "read_checkpoint", lambda _: made.context.weights)
    monkeypatch.setattr(retry, "write_contact_sheet", lambda *_, **__: None)  # its images are in no store
    return made


def test_it_says_which_limits_hold_for_the_images_done_again(made: MadeJob) -> None:
    output, limit = made.store.place.uri, Limits().max_image_pixels

    code, _, said = run("retry", "--output", output, *CALL, "--set", "limits.max_image_pixels=50000")
    same, _, nothing = run("retry", "--output", output, *CALL)

    assert (code, same) == (0, 0), said
    assert f"limits.max_image_pixels: 50000 for the images done again, {limit} for all others" in said
    assert "limits." not in nothing


def test_other_weights_than_the_job_began_with_are_refused(
    made: MadeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(made.context.weights, sha256="6" * 64)
    monkeypatch.setattr(retry, "read_checkpoint", lambda _: other)

    code, _, said = run("retry", "--output", made.store.place.uri, *CALL)

    assert code == 4
    assert f"sha256 {'6' * 64}, the job began with {'5' * 64}" in said
    assert read_manifest(made.store) is None


def test_another_detector_than_the_job_began_with_is_refused(
    made: MadeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = JobDetector(name="yolo", fingerprint="f" * 64)
    monkeypatch.setattr(retry, "read_detector", lambda _: SimpleNamespace(settings=other))

    code, _, said = run("retry", "--output", made.store.place.uri, *CALL)

    assert code == 4
    assert f"fingerprint {'f' * 64}, the job began with None; a retry needs the same detector" in said


def test_the_jobs_detector_is_named_again_and_never_taken_from_the_output(
    made: MadeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    began_with = JobDetector(name="yolo\x1b[2J", fingerprint="f" * 64)
    context = dataclasses.replace(made.context, detector=began_with)
    job = dataclasses.replace(made.job, context=context)
    config = ConfigSources(sets=("model.checkpoint=w",)).load()
    saved = SavedJob(config=config, store=made.store, job=job, pictures=context)
    monkeypatch.setattr(retry, "open_saved", lambda *_: saved)

    code, _, said = run("retry", "--output", made.store.place.uri, *CALL)

    assert code in (2, 4)
    assert "is never taken from an output: name it again with --detector yolo" in said
    assert "\x1b" not in said


def test_a_job_that_was_cleaned_is_not_retried(made: MadeJob) -> None:
    publish(made.store, made.job, FilterSettings(), require_owner=lambda what: None)
    clean(made.store, require_owner=lambda what: None)

    with pytest.raises(JobRefused, match="removed by clean, so it cannot be retried"):
        retry.find_targets(made.store, made.job, ())


class Quiet(contextlib.nullcontext):
    """A progress that says nothing and asks no Ray."""

    def watching(self, read: object) -> contextlib.nullcontext:
        return contextlib.nullcontext(read)


def test_work_that_is_reported_done_and_is_not_in_the_store_is_a_fault(
    made: MadeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    monkeypatch.setattr(run_units, "_run_pass", lambda work, units, *_: passes.append(list(units)))
    left = iter([[0, 1, 2], [1, 2], [1, 2]])
    work = Work(
        config=ConfigSources().load(), store=made.store, job=made.job, show_progress=False,
        machine=SimpleNamespace(begin=list, start=list), owner=SimpleNamespace(number=1), interrupts=None,
    )  # fmt: skip
    monkeypatch.setattr(run_units, "_new_progress", lambda *_, **__: Quiet())

    with pytest.raises(SystemicFault, match=r"2 units are not in the store although .*, such as unit 1"):
        run_units.run_pending(work, lambda: next(left), total_images=12, done_images=0)
    assert passes == [[0, 1, 2], [1, 2]]


def test_the_last_unit_of_a_plan_may_be_short(made: MadeJob) -> None:
    assert run_units.images_in(made.job, range(made.job.units)) == made.job.plan["images"] == 22
    assert run_units.images_in(made.job, [5]) == 2


def test_a_code_that_no_image_has_is_refused(made: MadeJob) -> None:
    output = made.store.place.uri

    code, _, said = run("retry", "--output", output, "--checkpoint", "w", "--code", "not-a-code")

    assert code == 2
    assert "--code not-a-code: no such code; known: " in said


def test_the_job_is_taken_before_it_is_looked_at(made: MadeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    drivers = []
    monkeypatch.setattr(retry, "find_targets", lambda store, *_: drivers.append(latest_number(store)) or {})

    code, _, said = run("retry", "--output", made.store.place.uri, *CALL)

    assert code == 0, said
    assert drivers == [1]
