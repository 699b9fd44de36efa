"""A unit's number in, its images decoded out: what is fetched, what is kept, and what stops the job."""

from __future__ import annotations

import dataclasses
import io
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from hqlabel.model.records import resize_longest_side
from hqlabel.pipeline.errors import ImageError, SystemicFault
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.planning.make_plan import make_plan, write_plan
from hqlabel.pipeline.settings import InputSettings, Limits
from hqlabel.pipeline.stages.commit import commit_unit, read_outcome
from hqlabel.pipeline.stages.prepare import prepare_unit
from hqlabel.pipeline.stages.rows_between_stages import UnitRow
from hqlabel.pipeline.stages.segment import SegmentWorker
from hqlabel.pipeline.storage import read_archives
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.unit_files import list_committed, read_committed
from tests.fakes import trouble
from tests.pipeline.made_formats import hf_rows, sample, tar_of
from tests.pipeline.made_jobs import BOXES, SIDE, make_job, noise, png
from tests.table_digest import mask_columns_digest


@pytest.fixture(scope="module")
def child():
    made = DecodeChild(Limits(decode_timeout_s=2), SIDE, decoder="tests.fakes:troubled_decoder")
    yield made
    made.close()


def prepare(job, child, **unit):
    return prepare_unit(UnitRow(**unit), job.context, Store(job.context.output), child)[0]


def work(job, child, **unit):
    """The outcome of a unit, through all stages."""
    store = Store(job.context.output)
    ready, _ = prepare_unit(UnitRow(**unit), job.context, store, child)
    done = SegmentWorker(job.context, epoch=1, use_gpu=False).run(ready)
    return read_outcome(commit_unit(done, job.context, store))


def committed(job, unit_id=0):
    store = Store(job.context.output)
    return read_committed(store, list_committed(store)[unit_id])


def test_an_archive_that_is_not_the_planned_one_fails_its_images_and_the_tag_of_the_planned_one_is_kept(
    tmp_path, child
):
    made = make_job(tmp_path / "made", {"0.png": png(noise(0))})
    for name, first, other in [
        ("a.tar", tar_of(sample("a/1") | sample("b/3")), tar_of(sample("b/3") | sample("a/1"))),
        ("rows.parquet", hf_bytes(hf_rows()), hf_bytes(hf_rows().take([1, 0, 3, 2]))),
        ("touched.tar", tar_of(sample("a/1")), tar_of(sample("a/1"))),
    ]:
        path = tmp_path / name
        path.write_bytes(first)
        plan = make_plan(InputSettings(boxes=str(path)), images_per_unit=4)
        write_plan(Store(made.context.output), plan)
        context = dataclasses.replace(made.context, plan_sha256=plan.sha256, access=plan.access)
        job = dataclasses.replace(made, context=context, plan=plan)

        found = prepare(job, child, unit_id=0).images
        assert {image.error_code for image in found} == {None}
        opened = [image for image in found if image.source_bytes is not None]
        assert opened
        assert {image.source_etag for image in opened} == set(plan.table["source_version"].to_pylist())

        path.write_bytes(other)
        os.utime(path, ns=(1, 1))
        read_archives._groups._kept.clear()  # as in another process
        codes = {
            image.error_code for image in prepare(job, child, unit_id=0).images if image.planned["boxes"]
        }
        assert codes == {"changed"}, name


def hf_bytes(table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def test_each_unit_has_its_own_images_upright_and_resized(tmp_path, child):
    job = make_job(tmp_path, {f"{i}.png": png(noise(i, 90, 70)) for i in range(6)})

    second = prepare(job, child, unit_id=1)

    assert [image.planned["image_id"] for image in second.images] == ["4.png", "5.png"]
    for number, image in zip((4, 5), second.images, strict=True):
        expected = resize_longest_side(np.asarray(noise(number, 90, 70)), SIDE)
        assert np.array_equal(image.pixels_hwc, expected)
        assert (image.size_hw, image.stored_size_hw) == ((90, 70), (90, 70))
        assert image.source_bytes == len(png(noise(number, 90, 70)))
        assert image.fetch_ms > 0
        assert image.decode_ms > 0


def test_images_without_work_are_not_opened(tmp_path, child):
    bad = [[5, 5, 5, 5], [-9, -9, -1, -1]]
    job = make_job(
        tmp_path,
        {"a.png": b"never read", "b.png": b"never read", "c.png": png(noise(1))},
        {"a.png": [], "b.png": None, "c.png": bad},
    )

    found = prepare(job, child, unit_id=0)

    assert [image.error_code for image in found.images] == [None, None, None]
    assert [image.size_hw for image in found.images] == [None, None, (48, 64)]
    assert [image.pixels_hwc for image in found.images] == [None, None, None]


def test_every_kind_of_bad_image_costs_itself_alone(tmp_path, child):
    pictures = {
        "crash.png": trouble("crash"),
        "cut.png": png(noise(1))[:800],
        "good.png": png(noise(2)),
        "hang.png": trouble("sleep"),
        "html.png": b"<html></html>",
        "memory.png": trouble("bomb"),
        "none.png": b"",
    }
    job = make_job(tmp_path, pictures, images_per_unit=8)
    (tmp_path / "pictures" / "html.png").unlink()

    found = prepare(job, child, unit_id=0)

    assert {image.planned["image_id"].partition(".")[0]: image.error_code for image in found.images} == {
        "crash": "crashed",
        "cut": "truncated",
        "good": None,
        "hang": "timeout",
        "html": "not_found",
        "memory": "out_of_memory",
        "none": "empty",
    }


def test_a_store_that_refuses_all_images_stops_the_job(tmp_path, child, monkeypatch):
    def refuse(*_):
        raise ImageError("denied", "403 AccessDenied")

    monkeypatch.setattr("hqlabel.pipeline.images.fetch.fetch_object", refuse)
    job = make_job(tmp_path, {f"{i}.png": png(noise(i)) for i in range(3)})

    found = prepare(job, child, unit_id=0)

    assert found.fault.code == "denied"
    assert found.images == ()


def test_a_committed_unit_answers_every_planned_box(tmp_path, child):
    pictures = {"a.png": png(noise(1)), "b.png": b"x", "c.png": png(noise(3)), "d.png": png(noise(4))}
    job = make_job(tmp_path, pictures, {"c.png": [], "d.png": [BOXES[0], [1, 1, 1, 1]]})

    outcome = work(job, child, unit_id=0)

    assert (outcome.images, outcome.labelled, outcome.no_boxes, outcome.failed) == (4, 2, 1, 1)
    assert (outcome.instances, outcome.failed_by_code, outcome.repeated) == (6, {"not_an_image": 1}, False)
    assert outcome.seconds > 0
    assert committed(job)["status"].to_pylist() == ["labelled", "failed", "no_boxes", "labelled"]


def test_doing_a_unit_again_changes_nothing(tmp_path, child):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    work(job, child, unit_id=0)
    before = committed(job)

    outcome = work(job, child, unit_id=0)

    assert outcome.repeated
    assert committed(job).equals(before)


def test_a_retry_does_only_the_failed_images_asked_for(tmp_path, child):
    pictures = {"a.png": png(noise(1)), "b.png": b"x", "c.png": b"", "d.png": png(noise(4))}
    job = make_job(tmp_path, pictures)
    work(job, child, unit_id=0)
    first = committed(job).to_pylist()
    for name in ("b.png", "c.png"):
        (tmp_path / "pictures" / name).write_bytes(png(noise(9)))

    only = prepare(job, child, unit_id=0, generation=1, redo_codes=("not_an_image",))
    outcome = work(job, child, unit_id=0, generation=1, redo_codes=("not_an_image",))

    assert [image.planned["image_id"] for image in only.images] == ["b.png"]
    assert (outcome.generation, outcome.labelled, outcome.failed) == (1, 3, 1)
    second = committed(job).to_pylist()
    assert [second[i] == first[i] for i in range(4)] == [True, False, True, True]
    assert work(job, child, unit_id=0, generation=2, redo_codes=()).failed == 0
    third = committed(job).to_pylist()
    assert [third[i] == second[i] for i in range(4)] == [True, True, False, True]


def test_results_do_not_depend_on_how_units_are_cut(tmp_path, child):
    pictures = {f"{i}.png": png(noise(i)) for i in range(5)} | {"5.png": b"broken"}
    digests = []
    for size in (2, 3):
        job = make_job(tmp_path / str(size), pictures, images_per_unit=size)
        for unit_id in job.unit_ids:
            work(job, child, unit_id=unit_id)
        store = Store(job.context.output)
        tables = [read_committed(store, unit) for unit in list_committed(store).values()]
        rows = [row for table in tables for row in table.select(["image_id", "instances"]).to_pylist()]
        digests.append(rows)
        assert len({mask_columns_digest(table) for table in tables}) == len(tables)

    assert digests[0] == digests[1]


def test_a_fault_is_told_to_the_driver_as_itself(tmp_path, child):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    unit = UnitRow(unit_id=0, fault=SystemicFault("clock", "an hour slow"))

    with pytest.raises(SystemicFault, match="an hour slow") as caught:
        read_outcome(commit_unit(unit, job.context, Store(job.context.output)))

    assert caught.value.code == "clock"
    assert list_committed(Store(job.context.output)) == {}


def test_results_that_do_not_answer_the_plan_are_not_written(tmp_path, child):
    job = make_job(tmp_path, {"a.png": png(noise(1)), "b.png": png(noise(2))})
    done = SegmentWorker(job.context, epoch=1, use_gpu=False).run(prepare(job, child, unit_id=0))
    short = dataclasses.replace(done, images=done.images[:1])

    with pytest.raises(ValueError, match="1 rows, planned 2"):
        commit_unit(short, job.context, Store(job.context.output))

    assert list_committed(Store(job.context.output)) == {}
