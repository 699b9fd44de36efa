"""Committed units become tables that never show half a row or two; and everything can be proved later."""

from __future__ import annotations

import dataclasses
import datetime as dt
import io
import json
import os
import pickle
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask

from hqlabel.pipeline import schema
from hqlabel.pipeline.errors import DamageFound, JobRefused
from hqlabel.pipeline.job_state.driver_lock import this_process
from hqlabel.pipeline.job_state.job_file import mask_settings
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.storage import checksummed_parquet
from hqlabel.pipeline.storage.backend import Entry
from hqlabel.pipeline.storage.checksummed_parquet import write_body
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables import publish_tables
from hqlabel.pipeline.tables.clean_output import clean
from hqlabel.pipeline.tables.images_and_instances import flatten_unit
from hqlabel.pipeline.tables.job_status import status
from hqlabel.pipeline.tables.manifest import MANIFEST_KEY, look_for_manifest, read_manifest, write_manifest
from hqlabel.pipeline.tables.publish_tables import publish_part
from hqlabel.pipeline.tables.published_parts import finished_units
from hqlabel.pipeline.tables.unit_files import (
    CommittedUnit,
    footer,
    list_committed,
    put_unit,
    read_committed,
)
from hqlabel.pipeline.tables.unit_table import build_unit_table
from hqlabel.pipeline.tables.verify_output import verify
from tests.pipeline.made_units import (
    WHEN,
    MadeJob,
    build_unit,
    footer_of,
    labelled,
    make_context,
    make_job,
    make_plan,
    planned_box,
    planned_image,
    unit_of,
)
from tests.table_digest import mask_columns_digest

NO_FILTERS = FilterSettings()


def run(made: MadeJob, filters: FilterSettings = NO_FILTERS, **how):
    return publish_tables.publish(
        made.store, made.job, filters, **{"require_owner": lambda what: None, **how}
    )


def table(store: Store, name: str) -> pa.Table:
    """All parts of a published table, as a glob reads them."""
    files = [store.read(e.key) for e in store.list(f"{name}/")]
    return pa.concat_tables([pq.read_table(io.BytesIO(body)).replace_schema_metadata() for body in files])


def bytes_of(store: Store) -> dict[str, bytes]:
    return {e.key: store.read(e.key) for e in store.list() if not e.key.startswith("owner/")}


@pytest.fixture
def made(local_store) -> MadeJob:
    return make_job(local_store)


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


def test_every_image_and_every_box_has_its_row_in_order(store: Store):
    made = make_job(store)
    made.commit()
    manifest = run(made)
    images, instances = table(store, "images"), table(store, "instances")
    planned = made.plan.to_pylist()
    assert images.schema.equals(schema.IMAGES)
    assert instances.schema.equals(schema.INSTANCES)
    assert images["image_id"].to_pylist() == [row["image_id"] for row in planned]
    assert images["num_boxes"].to_pylist() == [len(row["boxes"]) for row in planned]
    keys = list(zip(instances["image_id"].to_pylist(), instances["instance_index"].to_pylist(), strict=True))
    assert keys == [(row["image_id"], n) for row in planned for n in range(len(row["boxes"]))]
    given = [box["given"] for row in planned for box in row["boxes"]]
    assert instances["prompt_bbox_given"].to_pylist() == given
    counts = manifest.counts
    assert (counts.images, counts.boxes) == (22, len(given))
    assert counts.masks == sum(images["num_instances"].to_pylist())
    assert (
        counts.accepted == sum(images["num_accepted"].to_pylist()) == sum(instances["accepted"].to_pylist())
    )
    assert sum(counts.status.values()) == 22
    assert manifest.state == "complete"
    assert [e.key for e in store.list("images/")] == [f"images/part-{n:05d}.parquet" for n in range(3)]


def test_published_rows_are_the_units_rows():
    unit = build_unit(make_plan(8), 1, make_context(), failing={"img-00006.jpg"})
    flat = flatten_unit(unit, NO_FILTERS)
    rows = flat.instances.to_pylist()
    for image in unit.to_pylist():
        mine = [row for row in rows if row["image_id"] == image["image_id"]]
        assert len(mine) == len(image["instances"])
        for row, instance in zip(mine, image["instances"], strict=True):
            assert row["reject_reason"] == instance["box_error"]
            assert row["accepted"] == (instance["box_error"] is None)
            assert {**instance, **row}.items() >= {**row}.items()
            assert all(row[name] == instance[name] for name in instance if name != "box_error")
    failed = next(
        row
        for row in flat.images.to_pylist()
        if row["status"] == "failed" and row["error_code"] == "not_found"
    )
    assert (failed["num_instances"], failed["num_accepted"]) == (0, 0)
    assert flat.counts.failed["not_found"] == 1
    assert flat.counts.rejected["image_failed"] == failed["num_boxes"]


def test_a_unit_without_any_box_publishes_tables_with_the_whole_schema(local_store):
    made = make_job(local_store, 1)  # the first image of a made plan has no boxes
    made.commit()
    run(made)
    assert table(local_store, "instances").num_rows == 0
    assert table(local_store, "instances").schema.equals(schema.INSTANCES)
    assert verify(local_store, made.job).findings == []


def test_a_box_as_given_with_nan_survives_publishing(local_store):
    odd = planned_box((float("nan"), 1.0, 2.0, 3.0))
    result = labelled(planned_image("a", [planned_box(), odd]))
    unit = build_unit_table([result], make_context(), processed_at=WHEN)
    rows = flatten_unit(unit, NO_FILTERS).instances
    np.testing.assert_equal(rows["prompt_bbox_given"].to_pylist()[1], odd["given"])
    assert rows["reject_reason"].to_pylist() == [None, "box_not_finite"]


def test_globs_read_right_in_duckdb_and_polars_and_masks_go_into_pycocotools(made: MadeJob):
    made.commit()
    run(made)
    folder = made.store.place.uri
    sql = f"select count(*), count(distinct (image_id, instance_index)) from '{folder}/instances/*.parquet'"
    rows, distinct = duckdb.sql(sql).fetchall()[0]
    frame = polars.read_parquet(f"{folder}/instances/*.parquet")
    assert rows == distinct == frame.height == table(made.store, "instances").num_rows
    query = f"select segmentation, area from '{folder}/instances/*.parquet' where accepted"
    for segmentation, area in duckdb.sql(query).fetchall():
        assert coco_mask.decode(segmentation).sum() == area


def test_categories_and_manifest_are_plain_json(made: MadeJob):
    made.commit()
    run(made)
    assert json.loads(made.store.read("categories.json")) == [{"id": 1, "name": "cat"}]
    content = json.loads(made.store.read(MANIFEST_KEY))
    assert content["state"] == "complete"
    assert content["counts"]["images"] == 22
    assert read_manifest(made.store) == run(made)


def test_the_footer_of_a_part_tells_lineage_and_filters(made: MadeJob):
    made.commit()
    run(made, FilterSettings(min_area_px=3))
    file = pq.ParquetFile(io.BytesIO(made.store.read("instances/part-00000.parquet")))
    entries = footer_of(file)
    assert entries["weights_sha256"] == "5" * 64
    assert json.loads(entries["filters"])["min_area_px"] == 3


def test_the_footer_says_all_that_the_model_was_asked_for(made: MadeJob):
    masks = mask_settings(made.job.context)
    wanted = masks.pop("call_shape") | masks

    told = footer(made.job.context)

    assert {name: told.get(name) for name in wanted} == {name: str(value) for name, value in wanted.items()}


def test_row_groups_are_filled_over_units(made: MadeJob, monkeypatch):
    made.commit()
    monkeypatch.setattr(
        publish_tables.checksummed_parquet.ParquetSink.__init__, "__kwdefaults__", {"row_group_rows": 5}
    )
    run(made)
    file = pq.ParquetFile(io.BytesIO(made.store.read("images/part-00000.parquet")))
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [5, 3]
    assert verify(made.store, made.job).findings == []


# ---------------------------------------------------------------------------------------------
# When
# ---------------------------------------------------------------------------------------------


def test_only_whole_ranges_are_published(made: MadeJob):
    made.commit([0, 1, 3, 4, 5])
    manifest = run(made)
    assert manifest.state == "partial"
    assert [(p.index, p.first_unit, p.stop_unit) for p in manifest.parts] == [(0, 0, 2), (2, 4, 6)]
    assert table(made.store, "images").num_rows == 14
    first = made.store.read("images/part-00000.parquet")
    made.commit([2])
    assert run(made).state == "complete"
    assert made.store.read("images/part-00000.parquet") == first
    assert verify(made.store, made.job).findings == []


def test_publishing_again_changes_nothing(store: Store):
    made = make_job(store)
    made.commit()
    manifest = run(made)
    before = bytes_of(store)

    def never(*_: object):
        raise AssertionError("nothing is due")

    assert run(made, mapper=lambda f, tasks: never() if tasks else [], require_owner=never) == manifest
    assert bytes_of(store) == before


def test_a_new_filter_marks_rows_and_touches_no_unit(made: MadeJob):
    made.commit()
    run(made)
    before, masks = bytes_of(made.store), table(made.store, "instances")
    rows = tables(made.store)
    manifest = run(made, FilterSettings(min_predicted_iou=0.9))
    after = table(made.store, "instances")
    assert after.num_rows == masks.num_rows
    assert 0 < manifest.counts.accepted < sum(masks["accepted"].to_pylist())
    assert manifest.counts.rejected["predicted_iou"] > 0
    unmarked = ("accepted", "reject_reason")
    assert mask_columns_digest(after, without=unmarked) == mask_columns_digest(masks, without=unmarked)
    assert {k: v for k, v in bytes_of(made.store).items() if k.startswith("units/")} == {
        k: v for k, v in before.items() if k.startswith("units/")
    }
    run(made)
    assert tables(made.store) == rows


def test_a_retried_unit_publishes_its_part_alone(made: MadeJob):
    made.commit(failing={"img-00009.jpg"})
    assert run(made).counts.failed["not_found"] == 1
    before = bytes_of(made.store)
    made.commit([2], generation=1)
    manifest = run(made)
    assert manifest.parts[1].generations == {2: 1}
    assert "not_found" not in manifest.counts.failed
    changed = {key for key, body in bytes_of(made.store).items() if before.get(key) != body}
    assert changed == {
        "images/part-00001.parquet",
        "instances/part-00001.parquet",
        "units/00000002.g1.parquet",
        "manifest.json",
    }
    assert verify(made.store, made.job).findings == []


def tables(store: Store) -> dict[str, str]:
    """Digests of all rows; the files also say in which publish they were made."""
    return {name: mask_columns_digest(table(store, name), without=()) for name in ("images", "instances")}


def test_a_lost_or_cut_part_is_published_again(made: MadeJob):
    made.commit()
    run(made)
    before = tables(made.store)
    made.store.delete(["images/part-00001.parquet"])
    made.store.put("instances/part-00002.parquet", b"cut")
    run(made)
    assert tables(made.store) == before


def test_files_of_somebody_else_among_the_tables_are_refused(made: MadeJob):
    made.commit()
    made.store.put("instances/part-old.parquet", b"")
    with pytest.raises(JobRefused, match=r"instances/part-old\.parquet and 0 more are no files of this job"):
        run(made)


def test_who_is_not_the_owner_writes_nothing(made: MadeJob):
    made.commit()
    before = bytes_of(made.store)

    def refuse(what: str) -> None:
        raise JobRefused(f"taken over before {what}")

    with pytest.raises(JobRefused, match="taken over before publish"):
        run(made, require_owner=refuse)
    assert bytes_of(made.store) == before


def test_an_owner_lost_while_parts_are_made_leaves_no_manifest_of_them(made: MadeJob):
    made.commit()
    asked = []

    def lost_at_the_last(what: str) -> None:
        asked.append(what)
        if len(asked) == 3:  # twice before the first write, once before the last
            raise JobRefused("taken over")

    with pytest.raises(JobRefused):
        run(made, require_owner=lost_at_the_last)
    assert read_manifest(made.store).state == "publishing"
    assert run(made).state == "complete"


def takes_over(store: Store) -> None:
    """Another driver takes the job."""
    store.put("owner/2.json", json.dumps(dataclasses.asdict(this_process())).encode())


def first_part(made: MadeJob, driver: int) -> publish_tables.PartTask:
    units = tuple(unit for unit in list_committed(made.store).values() if unit.unit_id < 2)
    return publish_tables.PartTask(
        context=made.context, index=0, part_units=units, filters=NO_FILTERS, driver=driver
    )


def test_a_worker_of_a_driver_that_was_overtaken_puts_no_part(made: MadeJob):
    made.commit()
    takes_over(made.store)

    with pytest.raises(JobRefused, match="has taken over this job"):
        publish_tables.publish_part(first_part(made, driver=1))
    assert made.store.list("images/") == []
    publish_tables.publish_part(first_part(made, driver=2))
    assert len(made.store.list("images/")) == 1


def test_a_part_is_not_put_over_one_that_a_later_driver_has_put_meanwhile(made: MadeJob, monkeypatch):
    made.commit()

    def visit(point: str) -> None:
        if point == "publish.putting":
            takes_over(made.store)
            made.store.put("images/part-00000.parquet", b"of the later driver")

    monkeypatch.setattr(publish_tables, "visit", visit)
    with pytest.raises(JobRefused, match="has taken over this job"):
        publish_tables.publish_part(first_part(made, driver=1))
    assert made.store.read("images/part-00000.parquet") == b"of the later driver"


def test_a_part_that_somebody_keeps_writing_is_given_up(made: MadeJob, monkeypatch):
    made.commit()
    monkeypatch.setattr(Store, "put_if_unchanged", lambda *_: False)

    with pytest.raises(JobRefused, match="another process keeps writing it"):
        publish_tables.publish_part(first_part(made, driver=0))


def test_the_filters_are_saved_before_the_manifest_says_that_the_tables_have_them(made: MadeJob):
    made.commit()
    states = []

    run(made, save_filters=lambda: states.append(read_manifest(made.store).state))

    assert states == ["publishing"]
    assert read_manifest(made.store).state == "complete"


def test_parts_can_be_made_in_any_order_in_other_processes(made: MadeJob):
    made.commit()

    def elsewhere(function, tasks):
        jobs = [pickle.dumps((function, task)) for task in reversed(tasks)]
        with ThreadPoolExecutor(3) as pool:
            yield from pool.map(lambda job: (lambda f, task: f(task))(*pickle.loads(job)), jobs)

    manifest = run(made, mapper=elsewhere)
    assert [part.index for part in manifest.parts] == [0, 1, 2]
    before = bytes_of(made.store)
    made.store.delete([MANIFEST_KEY])
    run(made)
    assert {k: v for k, v in bytes_of(made.store).items() if "part-" in k} == {
        k: v for k, v in before.items() if "part-" in k
    }


def test_a_damaged_unit_stops_the_publish_and_is_named(made: MadeJob):
    made.commit()
    key = "units/00000003.g0.parquet"
    body = bytearray(made.store.read(key))
    body[len(body) // 2] ^= 4
    made.store.put(key, bytes(body))
    with pytest.raises(DamageFound, match=r"unit 3 \(units/00000003\.g0\.parquet\)"):
        run(made)
    assert made.store.list("images/part-00001") == []


def test_a_unit_in_the_place_of_another_is_found(made: MadeJob):
    made.commit()
    made.store.put("units/00000003.g0.parquet", made.store.read("units/00000002.g0.parquet"))
    with pytest.raises(DamageFound, match=r"unit 3 .* rows of another unit"):
        run(made)


def test_the_units_of_a_part_are_read_several_at_a_time(made: MadeJob, monkeypatch):
    made.commit()
    read, met = read_committed, threading.Barrier(2)

    def read_with_another(store: Store, unit: CommittedUnit) -> pa.Table:
        met.wait(timeout=20)  # raises when no second read comes
        return read(store, unit)

    monkeypatch.setattr(publish_tables, "read_committed", read_with_another)
    (task, *_) = publish_tables._look(made.store, made.job, NO_FILTERS).due
    assert len(task.part_units) == 2
    publish_part(task)


def _publish_and_die(made: MadeJob, filters: FilterSettings, after: int) -> int:
    """Publishes in a child that is killed after so many writes; its exit code."""
    child = os.fork()
    if child == 0:
        store = made.store
        real, left = store.put_if_unchanged, [after]

        def put(key: str, data: bytes, seen: Entry | None) -> bool:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(key, data, seen)

        Store.put_if_unchanged = lambda self, key, data, seen: put(key, data, seen)
        run(made, filters)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_publish_killed_between_any_two_writes_is_finished_by_the_next(local_store):
    made = make_job(local_store)
    made.commit()
    other = FilterSettings(min_predicted_iou=0.9)
    run(made, other)
    wanted = tables(local_store)
    run(made)
    for kills in range(20):
        code = _publish_and_die(made, other, kills)
        for name in ("images", "instances"):  # what a reader sees meanwhile
            ids = table(local_store, name).select(["image_id"])
            assert ids.num_rows == (22 if name == "images" else ids.num_rows)
        if code == 0:
            break
        assert code == -9
        run(made)  # with the old filters: must undo what the dead one had begun
        rows = table(local_store, "instances")
        assert rows["reject_reason"].to_pylist().count("predicted_iou") == 0
        assert verify(local_store, made.job).findings == []
    assert kills == 8  # the manifest twice, three parts of two files: a ninth write never comes
    assert tables(local_store) == wanted


def test_globs_never_see_a_doubled_row_while_parts_appear(made: MadeJob):
    """DuckDB and Polars read all the time, while units are committed and their parts published."""
    made.commit([0, 1])
    run(made)
    folder, stop, seen = made.store.place.uri, threading.Event(), []

    def watch() -> None:
        glob = f"{folder}/images/*.parquet"
        connection = duckdb.connect()
        while not stop.is_set():
            ids = polars.read_parquet(glob)["image_id"]
            seen.append((len(ids), ids.n_unique()))
            query = f"select count(*), count(distinct image_id) from '{glob}'"
            seen.append(connection.sql(query).fetchall()[0])

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(watch)
        for unit_ids in ([2], [3], [4], [5]):
            before = len(seen)
            made.commit(unit_ids)
            run(made)
            while len(seen) < before + 2 and not reader.done():  # both have looked at what stands now
                time.sleep(0.01)
        stop.set()
        reader.result()
    assert len(seen) > 4
    assert set(seen) <= {(8, 8), (16, 16), (22, 22)}


def test_a_part_that_is_replaced_is_whole_for_whoever_opens_it(made: MadeJob):
    """A new filter replaces parts. A reader that opens a file once never meets half of it."""
    made.commit()
    run(made)
    key, stop, seen = "instances/part-00001.parquet", threading.Event(), set()

    def watch() -> None:
        while not stop.is_set():
            with open(f"{made.store.place.uri}/{key}", "rb") as file:
                body = file.read()
            checksummed_parquet.check_seal(body, key)
            seen.add(checksummed_parquet.read_body(body, schema.INSTANCES, key).num_rows)

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(watch)
        for n in range(6):
            run(made, FilterSettings(min_area_px=n))
        stop.set()
        reader.result()
    assert len(seen) == 1


def test_a_damaged_manifest_is_named_and_does_not_cost_the_units(made: MadeJob):
    made.commit()
    run(made)
    before = tables(made.store)
    for damage in (lambda: made.store.put(MANIFEST_KEY, b"{"), lambda: made.store.delete([MANIFEST_KEY])):
        damage()
        with pytest.raises(DamageFound, match=r"manifest\.json .* `hqlabel publish` makes it again"):
            read_manifest(made.store)
        [finding] = verify(made.store, made.job).findings
        assert "`hqlabel publish` makes it again" in finding.message
        assert run(made).state == "complete"
        assert tables(made.store) == before
        assert verify(made.store, made.job).findings == []


@pytest.mark.parametrize(
    "counts",
    [
        {"images": -5}, {"boxes": 10**300}, {"boxes": 2**63}, {"rejected": {"x" * 100_000: 1}},
        {"failed": {"two\nlines": 1}}, {"status": {"\x1b[2J": 1}}, {"devices": {"cpu": -1}},
    ],
)  # fmt: skip
def test_counts_that_no_part_has_are_damage_of_the_manifest(made: MadeJob, counts: dict[str, object]):
    made.commit()
    run(made)
    content = json.loads(made.store.read(MANIFEST_KEY))
    content["parts"][0]["counts"] |= counts
    made.store.put(MANIFEST_KEY, json.dumps(content).encode())
    with pytest.raises(DamageFound, match=r"manifest\.json .* `hqlabel publish` makes it again") as damage:
        read_manifest(made.store)
    assert len(str(damage.value)) < 2000
    assert str(damage.value).isprintable()
    assert run(made).state == "complete"


def test_memory_is_bounded_by_the_part_not_by_the_job(made: MadeJob):
    """No more units are held than are read at a time, and the one before them."""
    made.commit()
    held, most = [0], [0]
    real = read_committed

    def counting(store, unit):
        out = real(store, unit)
        held[0] += 1
        most[0] = max(most[0], held[0])
        weakref.finalize(out, lambda: held.__setitem__(0, held[0] - 1))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish_tables, "read_committed", counting)
        patch.setattr(publish_tables, "READERS", 2)
        job = dataclasses.replace(made.job, units_per_part=6)
        (task,) = publish_tables._look(made.store, job, NO_FILTERS).due
        publish_part(task)
    assert most[0] <= 3


# ---------------------------------------------------------------------------------------------
# validate
# ---------------------------------------------------------------------------------------------


def test_a_sound_job_has_no_findings_and_says_what_was_read(store: Store):
    made = make_job(store)
    made.commit()
    run(made)
    found = verify(store, made.job, sample=None)
    assert found.findings == []
    assert (found.units, found.units_left, found.parts, found.images, found.plan_files) == (6, 0, 3, 22, 1)
    assert found.masks_decoded == read_manifest(store).counts.masks
    assert verify(store, made.job, sample=0).masks_decoded == 0
    assert 0 < verify(store, made.job, sample=2).masks_decoded <= 6


def test_an_unfinished_job_is_sound(made: MadeJob):
    assert verify(made.store, made.job).findings == []
    made.commit([1, 4])
    found = verify(made.store, made.job)
    assert (found.findings, found.units, found.units_left) == ([], 2, 4)


def test_one_flipped_bit_in_any_file_is_found_and_the_file_named(local_store):
    made = make_job(local_store, 8, units_per_part=1)
    made.commit()
    made.commit([1], generation=1)
    run(made)
    rng = np.random.default_rng(0)
    files = [e.key for e in made.store.list() if e.key.endswith(".parquet")]
    assert len(files) == 1 + 3 + 4
    for key in files:
        body = made.store.read(key)
        for place in rng.integers(0, len(body), 5):
            flipped = bytearray(body)
            flipped[place] ^= 1 << int(rng.integers(8))
            made.store.put(key, bytes(flipped))
            assert {f.key for f in verify(made.store, made.job).findings} == {key}, place
        made.store.put(key, body)
    assert verify(made.store, made.job).findings == []


def findings(made: MadeJob) -> str:
    return "\n".join(map(str, verify(made.store, made.job).findings))


def test_a_whole_file_in_the_place_of_another_is_found(made: MadeJob):
    made.commit()
    run(made)
    first, second = (f"images/part-0000{n}.parquet" for n in (0, 1))
    made.store.put(first, made.store.read(second))
    assert f"{first}: its sha256 is not the one in the manifest" in findings(made)


def test_files_that_are_gone_or_too_many_are_found(made: MadeJob):
    made.commit()
    run(made)
    made.store.delete(["units/00000003.g0.parquet", "instances/part-00001.parquet"])
    made.store.put("images/copy.parquet", b"")
    made.store.put("units/note.txt", b"")
    made.commit([0], generation=3)
    rows = unit_of(made.plan, 0)
    made.store.put("units/00000099.g0.parquet", made.store.read("units/00000000.g0.parquet"))
    assert rows.num_rows == 4
    text = findings(made)
    for words in (
        "units/00000003.g0.parquet (unit 3): the committed file is gone",
        "instances/part-00001.parquet: store: ",
        "images/copy.parquet: the manifest does not name this file",
        "units/note.txt: this is no file of a unit",
        "units/00000099.g0.parquet (unit 99): the plan has no such unit",
    ):
        assert words in text, text


def test_a_unit_that_does_not_answer_the_plan_is_found(made: MadeJob):
    made.commit([1, 2])
    made.store.put("units/00000001.g0.parquet", made.store.read("units/00000002.g0.parquet"))
    assert (
        "units/00000001.g0.parquet (unit 1): image_id 'img-00008.jpg', planned 'img-00004.jpg'"
        in findings(made)
    )


def test_a_wrong_mask_in_a_sealed_file_is_found(made: MadeJob):
    """Only the content is wrong: every checksum is right."""
    made.commit([1])
    unit = read_committed(made.store, list_committed(made.store)[1])
    rows = unit.to_pylist()
    next(i for r in rows for i in r["instances"] if i["area"])["area"] += 1
    wrong = pa.Table.from_pylist(rows, schema=schema.UNIT)
    made.store.put("units/00000001.g0.parquet", write_body(wrong, footer(made.context)))
    found = verify(made.store, made.job, sample=None).findings
    assert "the mask has" in str(found[0])


def test_doubled_rows_in_a_sealed_part_are_found(made: MadeJob):
    made.commit()
    manifest = run(made)
    part = manifest.parts[0]
    rows = checksummed_parquet.read_body(made.store.read(part.images.key), schema.IMAGES, "x")
    body = checksummed_parquet.write_body(pa.concat_tables([rows, rows.slice(0, 1)]), {})
    made.store.put(part.images.key, body)
    text = findings(made)
    assert "is there twice or out of order" in text
    assert "9 rows, the manifest states 8" in text


def test_an_interrupted_publish_is_a_finding(made: MadeJob):
    made.commit()
    run(made)
    found = look_for_manifest(made.store)
    write_manifest(made.store, dataclasses.replace(found.manifest, state="publishing", parts=()), found.entry)
    assert "a publish was interrupted; run publish again" in findings(made)
    made.store.put(MANIFEST_KEY, b"")
    assert "manifest.json cannot be read" in findings(made)


def test_a_lost_plan_file_is_found(made: MadeJob):
    made.commit()
    made.store.delete([e.key for e in made.store.list("plan/")])
    assert "plan: 0 units, job.json states 6" in findings(made)


# ---------------------------------------------------------------------------------------------
# clean
# ---------------------------------------------------------------------------------------------


def no_check(what: str) -> None:
    pass


def test_clean_removes_what_the_parts_have_replaced_and_nothing_else(store: Store):
    made = make_job(store)
    made.commit(failing={"img-00009.jpg"})
    made.commit([2], generation=1)
    run(made)
    kept = ("attempts/readme", "units/mine.parquet", "notes.txt", "units/00000001.g0.parquet.bak")
    for key in (*kept, "attempts/00000001.g0/0000.start.json"):
        store.put(key, b"x")
    before = bytes_of(store)
    cleaned = clean(store, require_owner=no_check)
    after = bytes_of(store)
    gone = set(before) - set(after)
    assert gone == {
        *(f"units/{n:08d}.g0.parquet" for n in range(6)),
        "units/00000002.g1.parquet",
        "attempts/00000001.g0/0000.start.json",
    }
    assert (cleaned.files, cleaned.bytes) == (8, sum(len(before[key]) for key in gone))
    assert {k: v for k, v in after.items() if k != MANIFEST_KEY} == {
        k: v for k, v in before.items() if k not in gone and k != MANIFEST_KEY
    }
    assert clean(store, require_owner=no_check).files == 0


def test_after_clean_the_job_is_still_done(made: MadeJob):
    made.commit()
    run(made)
    before = status(made.store, made.job)
    clean(made.store, require_owner=no_check)
    manifest = read_manifest(made.store)
    assert finished_units(made.store, list(list_committed(made.store)), manifest) == set(range(6))
    after = status(made.store, made.job)
    assert after.complete
    assert after.counts == before.counts
    assert verify(made.store, made.job).findings == []
    assert run(made) == manifest
    with pytest.raises(JobRefused, match="were removed, by clean or otherwise"):
        run(made, FilterSettings(min_area_px=5))


def test_clean_refuses_what_is_not_published(made: MadeJob):
    for prepare in (lambda: None, lambda: made.commit([0, 1]), lambda: run(made)):
        prepare()
        before = bytes_of(made.store)
        with pytest.raises(JobRefused, match="not every unit is published"):
            clean(made.store, require_owner=no_check)
        assert bytes_of(made.store) == before
    made.commit()
    run(made)
    made.commit([0], generation=1)
    with pytest.raises(JobRefused, match=r"g1\.parquet is newer than the published parts"):
        clean(made.store, require_owner=no_check)


def test_clean_trusts_no_part_it_has_not_read(made: MadeJob):
    made.commit()
    run(made)
    body = bytearray(made.store.read("instances/part-00002.parquet"))
    body[50] ^= 1
    made.store.put("instances/part-00002.parquet", bytes(body))
    with pytest.raises(DamageFound, match=r"part-00002\.parquet: its sha256"):
        clean(made.store, require_owner=no_check)
    assert len(list_committed(made.store)) == 6


def test_clean_asks_for_the_owner_first(made: MadeJob):
    made.commit()
    run(made)

    def refuse(what: str) -> None:
        raise JobRefused(f"{what} is left to it")

    with pytest.raises(JobRefused, match="clean is left to it"):
        clean(made.store, require_owner=refuse)
    assert not read_manifest(made.store).cleaned


def test_a_clean_that_was_killed_is_finished_by_the_next(made: MadeJob, monkeypatch):
    made.commit()
    run(made)

    def die(keys):
        raise KeyboardInterrupt

    monkeypatch.setattr(made.store, "delete", die)
    with pytest.raises(KeyboardInterrupt):
        clean(made.store, require_owner=no_check)
    monkeypatch.undo()
    assert status(made.store, made.job).complete
    made.store.delete(["units/00000000.g0.parquet"])
    assert status(made.store, made.job).complete
    assert clean(made.store, require_owner=no_check).files == 5


# ---------------------------------------------------------------------------------------------
# status
# ---------------------------------------------------------------------------------------------


def test_status_counts_from_the_store_alone(store: Store):
    made = make_job(store)
    empty = status(store, made.job)
    assert (empty.units_done, empty.complete, empty.images_per_s, empty.eta_s) == (0, False, None, None)
    made.commit([0, 1, 2], failing={"img-00009.jpg"})
    run(made)  # part 0 is published, unit 2 is not
    found = status(store, made.job)
    assert (found.images, found.units, found.units_done, found.units_counted) == (22, 6, 3, 3)
    assert found.units_published == 2
    assert found.counts.images == 12
    assert found.counts.failed["not_found"] == 1
    assert sum(found.counts.status.values()) == 12


def test_status_and_the_tables_agree(made: MadeJob):
    made.commit()
    before = status(made.store, made.job).counts
    after = run(made).counts
    assert (before.images, before.boxes, before.masks, before.status, before.failed) == (
        after.images, after.boxes, after.masks, after.status, after.failed,
    )  # fmt: skip
    assert status(made.store, made.job).counts == after


def test_a_retry_after_publishing_is_counted_anew(made: MadeJob):
    made.commit(failing={"img-00009.jpg"})
    run(made)
    made.commit([2], generation=1)
    found = status(made.store, made.job)
    assert found.counts.images == 22
    assert "not_found" not in found.counts.failed


def test_the_rate_comes_from_the_times_of_commits(made: MadeJob):
    for n, at in ((0, -9000), (1, 0), (2, 10), (3, 20)):  # the first long before: a pause
        when = WHEN + dt.timedelta(seconds=at)
        body = write_body(build_unit(made.plan, n, made.context, when=when), footer(made.context))
        put_unit(made.store, n, 0, body)
    found = status(made.store, made.job)
    assert found.images_per_s == pytest.approx(8 / 20)
    assert found.eta_s == pytest.approx(6 / (8 / 20))  # units of 4 and 2 images are left
    assert found.last_commit_at == WHEN + dt.timedelta(seconds=20)


def test_status_reads_only_so_many_units_and_says_so(made: MadeJob):
    made.commit()
    found = status(made.store, made.job, read_at_most=2)
    assert (found.units_done, found.units_counted) == (6, 2)


def test_no_part_of_another_plan_is_kept(made: MadeJob):
    made.commit()
    run(made)
    context = dataclasses.replace(made.context, plan_sha256="f" * 64)
    other = dataclasses.replace(made, job=dataclasses.replace(made.job, context=context))

    run(other)

    for entry in (*made.store.list("images/"), *made.store.list("instances/")):
        footer = pq.read_metadata(io.BytesIO(made.store.read(entry.key))).metadata
        assert footer[b"hqlabel.plan_sha256"] == b"f" * 64


def test_an_image_that_two_units_have_is_never_published_twice():
    twice = pa.table({"image_id": ["a", "b", "b"]})
    with pytest.raises(DamageFound, match="unit 1: image 'b' is out of order"):
        publish_tables._follows(1, twice, None)
    with pytest.raises(DamageFound, match="unit 2: image 'b' is out of order"):
        publish_tables._follows(2, twice.slice(2), b"b")
    assert publish_tables._follows(2, twice.slice(2), b"a") == b"b"
