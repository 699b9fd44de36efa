"""An image that kills its worker is given up, and no other image for it."""

from __future__ import annotations

import json
import os

import pytest

from hqlabel.pipeline.errors import HqlabelError
from hqlabel.pipeline.stages.crash_log import CrashLog, Restart
from hqlabel.pipeline.storage.output_store import Store


def test_starts_are_counted_across_processes_and_generations(store: Store):
    first = CrashLog(store, epoch=1).note_start(12)
    assert (first.earlier, first.image_by_image, first.crashed) == (0, False, {})
    second = CrashLog(store, epoch=1).note_start(12)
    assert (second.earlier, second.image_by_image) == (1, True)
    assert CrashLog(store, epoch=1).note_start(12).earlier == 2
    assert CrashLog(store, epoch=1).note_start(13).earlier == 0
    assert CrashLog(store, epoch=1).note_start(12, generation=1).earlier == 0


def run_unit(store: Store, *, epoch: int = 1, dies_at: str = "killer", code: str = "crashed"):
    """One start of unit 3 in its own process: what it gave up, or None when it died."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        crash_log = CrashLog(store, epoch=epoch)
        start = crash_log.note_start(3)
        for image in ("a", "killer", "c"):
            if start.image_by_image and image not in start.crashed:
                crash_log.note_image(start, image, code=code)
            if image == dies_at and image not in start.crashed:
                os._exit(137)
        if start.image_by_image:
            crash_log.note_image(start, None)
        os.write(writer, json.dumps(start.crashed).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if text else 137)
    return json.loads(text) if text else None


def test_an_image_that_kills_is_given_up_after_three_deaths(local_store):
    assert [run_unit(local_store) for _ in range(3)] == [None] * 3
    assert run_unit(local_store) == {"killer": "crashed"}


def test_deaths_at_different_images_give_nobody_up(local_store):
    for image in ("a", "killer", "c", "a"):
        assert run_unit(local_store, dies_at=image) is None
    assert run_unit(local_store, dies_at="nobody") == {}


def test_images_in_work_when_drivers_were_killed_are_not_given_up(local_store):
    for epoch in (1, 2, 3):
        assert run_unit(local_store, epoch=epoch) is None
    assert run_unit(local_store, epoch=4, dies_at="nobody") == {}


def test_an_image_that_takes_the_driver_along_is_given_up_in_the_end(local_store):
    for epoch in range(1, 6):
        assert run_unit(local_store, epoch=epoch) is None
    assert run_unit(local_store, epoch=6) == {"killer": "crashed"}


def test_an_image_that_runs_out_of_time_is_given_up_with_that_code(local_store):
    assert [run_unit(local_store, code="timeout") for _ in range(3)] == [None] * 3
    assert run_unit(local_store) == {"killer": "timeout"}


def test_a_start_that_ended_by_itself_charges_nobody(local_store):
    for _ in range(6):
        assert run_unit(local_store, dies_at="nobody") == {}


def test_a_first_start_writes_one_mark(local_store):
    CrashLog(local_store, epoch=1).note_start(3)
    assert [e.key for e in local_store.list()] == ["attempts/00000003.g0/0000.start.json"]


def test_a_damaged_mark_is_named(local_store):
    local_store.put("attempts/00000003.g0/0000.start.json", b"x")
    local_store.put("attempts/00000003.g0/0000.image.json", b"x")
    with pytest.raises(HqlabelError, match=r"0000\.image\.json cannot be read"):
        CrashLog(local_store, epoch=1).note_start(3)


def test_processes_that_die_while_they_load_the_model_stop_the_job_after_three(store: Store):
    def load(restarted: str | None, *, dies: bool) -> None:
        loading = CrashLog(store, epoch=1).limit_load_crashes(restarted)
        loading.__enter__()
        if not dies:
            loading.__exit__(None, None, None)

    load("actor", dies=False)
    for _ in range(3):
        load("actor", dies=True)
    with pytest.raises(HqlabelError, match="3 processes died one after another while they loaded the model"):
        load("actor", dies=True)
    load("another", dies=False)
    load(None, dies=True)


def test_a_task_that_dies_five_times_without_an_image_in_work_stops_the_job(store: Store):
    for _ in range(5):
        Restart(store, epoch=1, stage="prepare").begin(3, 0)
    with pytest.raises(HqlabelError, match="5 processes died one after another in prepare of unit 3"):
        Restart(store, epoch=1, stage="prepare").begin(3, 0)
