"""The simulation's stubs answer a real plan, and its record goes on where a killed call ended."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.scale_model import tables
from benchmarks.simulation import State, UnitStub, made_unit
from hqlabel.pipeline.job_state.job_file import require_job
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.stages.commit import commit_unit, read_outcome
from hqlabel.pipeline.stages.rows_between_stages import UnitRow, pack, unpack
from hqlabel.pipeline.tables.publish_tables import publish

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"


def test_made_units_are_committed_published_and_found_sound(tmp_path: Path) -> None:
    state = State(tmp_path, 130)
    state.run("inputs")
    state.run("plan")
    store = state._store()
    job = require_job(store)
    stub = UnitStub(job.context, epoch=1, use_gpu=False, restarted=None)

    for unit_id in state._pending():
        prepared, arena = made_unit(UnitRow(unit_id=unit_id), job.context, store, None, None)
        done = stub.run(unpack(pack(prepared, arena)))
        assert read_outcome(commit_unit(unpack(pack(done)), job.context, store)).failed == 0
    manifest = publish(store, job, FilterSettings(), require_owner=lambda what: None)

    assert state._pending() == []
    assert (manifest.counts.images, manifest.counts.masks) == (130, 390)
    state.run("validate")
    assert state.calls("validate")[0]["images"] == 130


def test_a_killed_call_is_followed_by_the_next_one_of_the_same_step(tmp_path: Path) -> None:
    state = State(tmp_path, 130)
    state.run("inputs")
    (tmp_path / "plan-0.json").write_text(json.dumps({"done": False, "s": 3.0}))

    assert state.next_step() == "plan"
    state.run("plan")

    assert [call["done"] for call in state.calls("plan")] == [False, True]
    assert state.next_step() == "label"


def test_the_tables_of_the_page_are_what_the_model_gives() -> None:
    assert tables(15.0) in PAGE.read_text()
