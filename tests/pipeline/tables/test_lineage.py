"""What footers state of the processes that made a unit's rows, and that what is counted of it is true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from hqlabel.jobs.cluster.run_units import _Devices
from hqlabel.pipeline.job_context import Place, UnitOutcome
from hqlabel.pipeline.job_state.job_file import open_job
from hqlabel.pipeline.planning.make_plan import write_plan
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.stages.rows_between_stages import UnitRow
from hqlabel.pipeline.tables.clean_output import clean
from hqlabel.pipeline.tables.job_status import status
from hqlabel.pipeline.tables.lineage import devices_of, footer_of
from hqlabel.pipeline.tables.publish_tables import publish
from hqlabel.pipeline.tables.unit_files import read_generation
from tests.fakes import BoxSegmenter
from tests.faults.chain import SmallJob, do_unit, make_small_job
from tests.pipeline.made_jobs import noise, png

LARGE = "08.png"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallJob:
    """A job of four units, done on one kind of device, of which one picture is over the limit of pixels."""
    made = make_small_job(tmp_path).at(Place(uri=str(tmp_path / "out")))
    (made.pictures / LARGE).write_bytes(png(noise(8, 200, 200)))
    limits = made.context.limits.model_copy(update={"max_image_pixels": 20_000})
    made = replace(made, job=replace(made.job, context=replace(made.context, limits=limits)))
    monkeypatch.setattr(BoxSegmenter, "device_kind", "GPU of old", raising=False)
    job = open_job(made.store, made.job)
    write_plan(made.store, made.plan)
    for unit in range(job.units):
        do_unit(UnitRow(unit_id=unit), job.context)
    return made


def test_a_retry_with_another_limit_and_device_states_both_of_them(made, monkeypatch) -> None:
    before = read_generation(made.store, 2, 0)
    monkeypatch.setattr(BoxSegmenter, "device_kind", "GPU of now", raising=False)
    limits = made.context.limits.model_copy(update={"max_image_pixels": 50_000})
    do_unit(UnitRow(unit_id=2, generation=1, redo_codes=("too_large",)), replace(made.context, limits=limits))
    after = read_generation(made.store, 2, 1)

    assert [row["image_id"] for row in before.to_pylist() if row["error_code"] == "too_large"] == [LARGE]
    assert [row["status"] for row in after.to_pylist() if row["image_id"] == LARGE] == ["labelled"]
    first, second = footer_of(before), footer_of(after)
    assert json.loads(first["limits"])["max_image_pixels"] == 20_000
    assert {name: second[name] for name in first if name != "file_sha256"} == {
        name: value for name, value in first.items() if name != "file_sha256"
    }
    [redone] = json.loads(second["redone"])
    assert (redone["generation"], redone["images"], redone["device"]) == (1, 1, "GPU of now")
    assert json.loads(redone["limits"])["max_image_pixels"] == 50_000
    assert devices_of(after) == ["GPU of now", "GPU of old"]


def test_units_are_counted_by_the_kinds_of_device_that_made_them(made, monkeypatch) -> None:
    job = open_job(made.store, made.job)
    assert status(made.store, job).counts.devices == {"GPU of old": 4}
    monkeypatch.setattr(BoxSegmenter, "device_kind", "GPU of now", raising=False)
    do_unit(UnitRow(unit_id=2, generation=1, redo_codes=("too_large",)), made.context)

    manifest = publish(made.store, job, FilterSettings(), require_owner=lambda what: None)

    assert manifest.counts.devices == {"GPU of now": 1, "GPU of old": 4}
    assert status(made.store, job).counts.devices == manifest.counts.devices


def test_another_kind_of_device_is_warned_of_once_and_the_same_never(made, capsys) -> None:
    seen = _Devices(made.store, made.job)
    outcome = UnitOutcome(
        unit_id=0, generation=0, images=1, labelled=1, no_boxes=0, failed=0, instances=1, bytes=1,
        repeated=False, device="GPU of old",
    )  # fmt: skip

    seen.see(outcome)
    assert capsys.readouterr().err == ""
    seen.see(replace(outcome, device="GPU of now"))
    seen.see(replace(outcome, device="GPU of now"))

    said = capsys.readouterr().err
    assert said.count("made on GPU of now now, earlier ones on GPU of old") == 1
    assert "differ in bytes, not in meaning" in said


def test_a_retry_merged_into_a_cleaned_part_keeps_the_devices_of_all_units(made, monkeypatch) -> None:
    job = open_job(made.store, made.job)
    publish(made.store, job, FilterSettings(), require_owner=lambda what: None)
    monkeypatch.setattr(BoxSegmenter, "device_kind", "GPU of now", raising=False)
    do_unit(UnitRow(unit_id=2, generation=1, redo_codes=("too_large",)), made.context)
    late = {entry.key: made.store.read(entry.key) for entry in made.store.list("units/")}
    made.store.delete([key for key in late if ".g1." in key])
    clean(made.store, require_owner=lambda what: None)
    for key in late:
        if ".g1." in key:
            made.store.put(key, late[key])

    manifest = publish(made.store, job, FilterSettings(), require_owner=lambda what: None)

    assert manifest.counts.devices == {"GPU of now": 1, "GPU of old": 4}


def test_names_of_devices_in_a_footer_of_anybody_are_bounded() -> None:
    kinds = json.dumps(["x" * 10**6, "\x1b[31m", *map(str, range(10_000))])
    deep = "[" * 100_000
    for stated in ({"kept_devices": kinds}, {"redone": deep}, {"device": "y" * 10**6}):
        metadata = {f"hqlabel.{name}": value for name, value in stated.items()}
        found = devices_of(pa.table({"a": [1]}).replace_schema_metadata(metadata))
        assert len(found) <= 100
        assert all(len(kind) <= 200 and kind.isprintable() for kind in found)
