"""Tables without a manifest, without units, with a newer unit, read while they are replaced."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest

from hqlabel.jobs.results.read_tables import require_published, row_groups
from hqlabel.pipeline import failpoints, schema
from hqlabel.pipeline.errors import DamageFound, JobRefused
from hqlabel.pipeline.failpoints import FailPointReached
from hqlabel.pipeline.settings import FilterSettings
from hqlabel.pipeline.storage import checksummed_parquet, read_objects
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables import clean_output, publish_tables
from hqlabel.pipeline.tables.clean_output import clean
from hqlabel.pipeline.tables.job_status import status
from hqlabel.pipeline.tables.manifest import MANIFEST_KEY, look_for_manifest, read_manifest, write_manifest
from hqlabel.pipeline.tables.published_parts import finished_units, held_parts, open_part, read_part
from hqlabel.pipeline.tables.unit_files import list_committed
from hqlabel.pipeline.tables.verify_output import verify
from tests.pipeline.made_units import commit_units
from tests.pipeline.tables.test_publish_tables import MadeJob, make_job, no_check, run, table, tables

HIGH = FilterSettings(min_predicted_iou=0.9)


def name_fewer_parts(store: Store, left: int) -> None:
    """The manifest still says `complete`, and `cleaned` if it did, but names only so many parts."""
    content = json.loads(store.read(MANIFEST_KEY))
    content["parts"] = content["parts"][:left]
    store.put(MANIFEST_KEY, json.dumps(content).encode())


DAMAGE: dict[str, Callable[[Store], None]] = {
    "gone": lambda store: store.delete([MANIFEST_KEY]),
    "without parts": lambda store: name_fewer_parts(store, 0),
    "with fewer parts": lambda store: name_fewer_parts(store, 1),
    "cut": lambda store: store.put(MANIFEST_KEY, store.read(MANIFEST_KEY)[:200]),
    "empty": lambda store: store.put(MANIFEST_KEY, b""),
    "of another format": lambda store: store.put(MANIFEST_KEY, b'{"format": 99, "parts": []}'),
}


@pytest.fixture
def made(local_store: Store) -> MadeJob:
    """Six units in three parts, committed, unit 3 in its second generation, and published."""
    made = on_cpu(make_job(local_store))
    made.commit()
    made.commit([3], generation=1)
    run(made)
    return made


def on_cpu(made: MadeJob) -> MadeJob:
    """The job, whose units state the device that made them."""
    context = dataclasses.replace(made.context, lineage={**made.context.lineage, "device": "cpu"})
    return dataclasses.replace(made, job=dataclasses.replace(made.job, context=context))


def commit_late(made: MadeJob, unit_id: int) -> None:
    """The second generation of a unit, whose rows say `late`."""
    late = dataclasses.replace(made.context, run_id="late")
    commit_units(made.store, made.plan, late, [unit_id], generation=1)


def findings(made: MadeJob) -> list[str]:
    return [str(one) for one in verify(made.store, made.job).findings]


def by_an_earlier_version(made: MadeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same output as a version left it that stated nothing in footers and no seals in the manifest."""
    with monkeypatch.context() as patch:
        patch.setattr(publish_tables, "as_footer", lambda part: {})
        run(made, HIGH)
        run(made)
    content = json.loads(made.store.read(MANIFEST_KEY))
    del content["revision"]
    for part in content["parts"]:
        for name in ("images", "instances"):
            del part[name]["seal"]
    made.store.put(MANIFEST_KEY, json.dumps(content).encode())


@pytest.mark.parametrize(
    "damage",
    ["gone", "without parts", *(pytest.param(one, marks=pytest.mark.faults) for one in list(DAMAGE)[2:])],
)
@pytest.mark.parametrize("earlier", [False, True], ids=["now", "earlier version"])
@pytest.mark.parametrize("cleaned", [False, True], ids=["with units", "cleaned"])
def test_a_lost_manifest_is_made_again_and_no_row_is_lost(
    cleaned: bool, earlier: bool, damage: str, made: MadeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        by_an_earlier_version(made, monkeypatch)
        assert findings(made) == []
    if cleaned:
        clean(made.store, require_owner=no_check)
    before, counts = tables(made.store), read_manifest(made.store).counts
    DAMAGE[damage](made.store)
    assert any("`hqlabel publish` makes it again" in one for one in findings(made))
    for other in (read_manifest, require_published):
        with pytest.raises(DamageFound, match="`hqlabel publish` makes it again"):
            other(made.store)
    with pytest.raises(DamageFound, match="`hqlabel publish` makes it again"):
        clean(made.store, require_owner=no_check)

    again = run(made)

    assert counts.devices == {"cpu": 6}
    if cleaned and earlier:
        counts = dataclasses.replace(counts, devices={})  # the units are gone, and no footer states them
    assert (again.state, again.cleaned, again.counts) == ("complete", cleaned, counts)
    assert status(made.store, made.job).counts.devices == counts.devices
    assert tables(made.store) == before
    assert findings(made) == []
    assert finished_units(made.store, list(list_committed(made.store)), again) == set(range(6))
    clean(made.store, require_owner=no_check)
    assert tables(made.store) == before


@pytest.mark.parametrize("kept", [(), (3,), (0, 3, 5)])
def test_a_clean_that_was_cut_short_and_a_lost_manifest_lose_nothing(
    kept: tuple[int, ...], made: MadeJob
) -> None:
    before = tables(made.store)
    bodies = {unit.key: made.store.read(unit.key) for unit in list_committed(made.store).values()}
    clean(made.store, require_owner=no_check)
    for key, body in bodies.items():
        if int(key[6:14]) in kept:
            made.store.put(key, body)
    made.store.delete([MANIFEST_KEY])
    assert run(made).cleaned
    assert tables(made.store) == before
    assert findings(made) == []


def test_a_unit_that_came_after_clean_is_put_among_the_rows_that_are_there(made: MadeJob) -> None:
    """A retry that slept wrote it: clean does not delete it, publish takes it, whatever else is gone."""
    clean(made.store, require_owner=no_check)
    before = table(made.store, "images")
    commit_late(made, 1)
    assert any("publish again" in one for one in findings(made))
    with pytest.raises(JobRefused, match="newer than the published parts; publish first"):
        clean(made.store, require_owner=no_check)

    after = run(made)

    images = table(made.store, "images")
    assert images["image_id"].equals(before["image_id"])
    late = [
        row["unit_id"] for row in images.select(["unit_id", "run_id"]).to_pylist() if row["run_id"] == "late"
    ]
    assert set(late) == {1}
    assert (after.state, after.cleaned, after.parts[0].generations) == ("complete", True, {1: 1})
    assert findings(made) == []
    assert clean(made.store, require_owner=no_check).files == 1
    assert findings(made) == []


@pytest.mark.parametrize("place", ["publish.begun", "publish.images", "publish.part", "publish.parts"])
@pytest.mark.parametrize("lost", [False, True], ids=["manifest there", "manifest lost too"])
def test_such_a_publish_may_be_cut_short_anywhere(place: str, lost: bool, made: MadeJob) -> None:
    clean(made.store, require_owner=no_check)
    commit_late(made, 1)
    failpoints.arm({failpoints.VARIABLE: f"{place}=raise"})
    try:
        with pytest.raises(FailPointReached):
            run(made)
    finally:
        failpoints.arm({})
    if lost:
        made.store.delete([MANIFEST_KEY])
    assert run(made).parts[0].generations == {1: 1}
    assert table(made.store, "images").num_rows == 22
    assert findings(made) == []


@pytest.mark.parametrize("name", ["images/part-00001.parquet", "instances/part-00001.parquet"])
@pytest.mark.parametrize("manifest", [True, False], ids=["manifest there", "manifest lost too"])
def test_a_part_that_is_lost_after_clean_costs_only_its_units_which_are_named(
    name: str, manifest: bool, made: MadeJob
) -> None:
    before = tables(made.store)
    clean(made.store, require_owner=no_check)
    made.store.put(name, made.store.read(name)[:-50])
    if not manifest:
        made.store.delete([MANIFEST_KEY])
    with pytest.raises(DamageFound, match=r"units 2 to 3.*`hqlabel label` does these units again"):
        run(made)
    if manifest:  # the advice: move it away, and label
        made.store.delete(["images/part-00001.parquet", "instances/part-00001.parquet"])
        left = set(range(6)) - finished_units(made.store, [], read_manifest(made.store))
        assert left == {2, 3}
        made.commit([2, 3])
        run(made)
        assert tables(made.store) == before
        assert findings(made) == []


@pytest.mark.parametrize("place", ["", "clean.listed", "clean.marked"])
def test_clean_does_nothing_more_once_another_driver_has_the_job(
    place: str, made: MadeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    overtaken = [place == ""]
    monkeypatch.setattr(clean_output, "visit", lambda name: overtaken.append(name == place))

    def require_owner(_: str) -> None:
        if any(overtaken):
            raise JobRefused("another driver has this job")

    before = {key: made.store.read(key) for key in (entry.key for entry in made.store.list())}
    with pytest.raises(JobRefused, match="another driver"):
        clean(made.store, require_owner=require_owner)

    after = {key: made.store.read(key) for key in (entry.key for entry in made.store.list())}
    assert sorted(after) == sorted(before), "nothing is deleted"
    assert (after[MANIFEST_KEY] == before[MANIFEST_KEY]) == (place != "clean.marked")


def test_clean_looks_into_the_parts_themselves(made: MadeJob) -> None:
    """A manifest that claims a newer generation than a part has would have let its unit be deleted."""
    made.commit([0], generation=1)
    found = look_for_manifest(made.store)
    parts = [dataclasses.replace(found.manifest.parts[0], generations={0: 1}), *found.manifest.parts[1:]]
    write_manifest(made.store, dataclasses.replace(found.manifest, parts=tuple(parts)), found.entry)
    with pytest.raises(DamageFound, match="other generations of its units than the manifest says"):
        clean(made.store, require_owner=no_check)
    assert any("its footer states generations" in one for one in findings(made))
    assert 0 in list_committed(made.store)


def test_validate_finds_tables_that_are_older_than_the_units(made: MadeJob) -> None:
    made.commit([0], generation=1)
    assert any("generation 0 of this unit" in one and "publish again" in one for one in findings(made))
    run(made)
    assert findings(made) == []


def test_a_manifest_replaces_the_one_that_was_read_or_nothing(store: Store) -> None:
    made = make_job(store)
    made.commit()
    run(made)
    seen = look_for_manifest(store)
    run(made, HIGH)
    now = store.read(MANIFEST_KEY)
    for entry in (seen.entry, None):
        with pytest.raises(JobRefused, match="another command has published or cleaned here meanwhile"):
            write_manifest(store, seen.manifest, entry)
    assert store.read(MANIFEST_KEY) == now


def test_two_publishes_never_write_equal_files(made: MadeJob) -> None:
    """Or a store that tells versions apart by their bytes would let a sleeper replace the second's."""
    first = made.store.read("images/part-00000.parquet")
    run(made, HIGH)
    run(made)
    assert made.store.read("images/part-00000.parquet") != first


def test_a_reader_sees_the_tables_of_one_publish_or_is_told(made: MadeJob) -> None:
    manifest = require_published(made.store)
    columns = ["image_id"]
    first, *rest = manifest.parts
    assert sum(rows.num_rows for rows in row_groups(made.store, first.images, schema.IMAGES, columns)) == 8
    run(made, HIGH)
    for part in rest:
        for file, kind in ((part.images, schema.IMAGES), (part.instances, schema.INSTANCES)):
            with pytest.raises(JobRefused, match="were while they were read; start this command again"):
                list(row_groups(made.store, file, kind, columns))


def test_a_reader_in_the_middle_of_a_part_never_gets_bytes_of_two(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksummed_parquet, "ROW_GROUP_ROWS", 8)
    made = make_job(store, images_per_unit=8, units_per_part=3)
    monkeypatch.setattr(read_objects.blockwise, "__kwdefaults__", {"block": 512})
    made.commit()
    run(made)
    file = read_manifest(store).parts[0].images

    def read_while_another_publishes() -> None:
        with open_part(store, file, schema.IMAGES) as body:
            body.read_row_group(0)
            run(made, HIGH)
            for group in range(body.num_row_groups):
                body.read_row_group(group)

    with pytest.raises(JobRefused, match="were while they were read"):
        read_while_another_publishes()


def test_a_reader_does_not_take_half_published_tables_for_all(made: MadeJob) -> None:
    failpoints.arm({failpoints.VARIABLE: "publish.part=raise"})
    try:
        with pytest.raises(FailPointReached):
            run(made, HIGH)
    finally:
        failpoints.arm({})
    with pytest.raises(JobRefused, match="are being published now, or a publish was interrupted"):
        require_published(made.store)


def test_a_part_of_equal_size_from_an_earlier_publish_is_told_apart(made: MadeJob) -> None:
    earlier = made.store.read("images/part-00000.parquet")
    run(made, HIGH)
    run(made)
    manifest = read_manifest(made.store)
    assert manifest.parts[0].images.bytes == len(earlier)
    made.store.put("images/part-00000.parquet", earlier)
    assert sorted(held_parts(made.store, manifest)) == [1, 2]


def test_another_file_in_a_parts_place_is_damage_that_publish_mends(made: MadeJob) -> None:
    body = made.store.read("images/part-00000.parquet")
    run(made, HIGH)
    manifest = read_manifest(made.store)
    made.store.put("images/part-00000.parquet", body)  # by a process that no condition holds back
    with (
        pytest.raises(DamageFound, match="is not the file that the manifest names; publish again"),
        open_part(made.store, manifest.parts[0].images, schema.IMAGES),
    ):
        pass
    assert sorted(held_parts(made.store, manifest)) == [1, 2]
    assert findings(made)
    run(made, HIGH)
    assert findings(made) == []


def test_a_sleeping_publisher_replaces_no_part_of_a_later_driver(
    made: MadeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps after it has seen that the job is still its own, and before it writes."""
    [task, *_] = publish_tables._look(made.store, made.job, HIGH).due
    real = Store.put_if_unchanged
    slept = []

    def put(self: Store, key: str, data: bytes, seen: object) -> bool:
        if not slept and key.startswith("images/"):
            slept.append(key)
            monkeypatch.setattr(Store, "put_if_unchanged", real)
            made.store.put_if_absent("owner/7.json", json.dumps(_owner()).encode())
            made.commit([0], generation=1)
            run(made)
        return real(self, key, data, seen)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "put_if_unchanged", put)
    with pytest.raises(JobRefused, match="has taken over this job"):
        publish_tables.publish_part(task)
    assert slept
    assert findings(made) == []


def _owner() -> dict[str, object]:
    return {"token": "t", "host": "other", "pid": 1, "boot": "b", "pids": "p", "started": "1"}


def test_two_files_that_were_marked_by_two_filters_are_no_part(made: MadeJob) -> None:
    before = made.store.read("images/part-00000.parquet")
    run(made, HIGH)
    made.store.put("images/part-00000.parquet", before)
    newest = {unit.unit_id: unit.generation for unit in list_committed(made.store).values()}

    assert read_part(made.store, made.job, 0, newest) is None
    assert read_part(made.store, made.job, 1, newest) is not None


def test_a_part_of_generations_before_the_plans_first_one_is_no_part_of_it(made: MadeJob) -> None:
    later = dataclasses.replace(made.job, context=dataclasses.replace(made.context, first_generation=1))

    assert read_part(made.store, made.job, 0, {}) is not None
    assert read_part(made.store, later, 0, {}) is None


def test_a_part_of_another_plan_is_no_part_of_this_one(made: MadeJob) -> None:
    other = dataclasses.replace(made.job, context=dataclasses.replace(made.context, plan_sha256="0" * 64))

    assert read_part(made.store, made.job, 0, {}) is not None
    assert read_part(made.store, other, 0, {}) is None


def test_after_clean_the_units_of_a_cut_file_are_not_finished(made: MadeJob) -> None:
    clean(made.store, require_owner=no_check)
    manifest = read_manifest(made.store)
    assert finished_units(made.store, [], manifest) == set(range(6))
    made.store.put("images/part-00000.parquet", made.store.read("images/part-00000.parquet")[:-1])

    assert finished_units(made.store, [], manifest) == set(range(2, 6))


def test_files_of_another_part_are_not_taken_for_this_one(made: MadeJob) -> None:
    for table_name in ("images", "instances"):
        other = made.store.read(f"{table_name}/part-00001.parquet")
        made.store.put(f"{table_name}/part-00000.parquet", other)

    assert read_part(made.store, made.job, 0, {}) is None


def test_files_of_two_generations_are_a_part_while_the_newer_unit_is_there(made: MadeJob) -> None:
    before = made.store.read("instances/part-00000.parquet")
    commit_late(made, 0)
    run(made)
    made.store.put("instances/part-00000.parquet", before)

    found = read_part(made.store, made.job, 0, {0: 1, 1: 0})

    assert found is not None
    assert found.part.generation_of(0) == 0  # so that the newer one is published again
    assert read_part(made.store, made.job, 0, {}) is None


def test_beside_a_file_of_an_earlier_version_the_newer_unit_is_published_again(
    made: MadeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier version published a part; a later publish was cut short between its two files."""
    by_an_earlier_version(made, monkeypatch)
    before = made.store.read("instances/part-00000.parquet")
    commit_late(made, 0)
    run(made)
    made.store.put("instances/part-00000.parquet", before)

    found = read_part(made.store, made.job, 0, {0: 1, 1: 0})

    assert found is not None
    assert found.part.generation_of(0) == 0
    alone = read_part(made.store, made.job, 0, {})
    assert alone is not None
    assert alone.part.generation_of(0) == 1


def test_a_manifest_made_again_is_unlike_all_before(made: MadeJob) -> None:
    run(made, HIGH)
    clean(made.store, require_owner=no_check)
    made.store.delete([MANIFEST_KEY])

    run(made, HIGH)

    held = [read_part(made.store, made.job, index, {}) for index in range(3)]
    assert read_manifest(made.store).revision > max(one.publication for one in held if one is not None) > 1


def test_after_clean_files_older_than_the_manifest_says_are_not_taken_for_the_truth(made: MadeJob) -> None:
    keys = ("images/part-00000.parquet", "instances/part-00000.parquet")
    older = {key: made.store.read(key) for key in keys}
    commit_late(made, 0)
    run(made)
    clean(made.store, require_owner=no_check)
    for key, body in older.items():
        made.store.put(key, body)

    with pytest.raises(DamageFound, match=r"images/part-00000\.parquet or its instances are damaged or gone"):
        run(made)
