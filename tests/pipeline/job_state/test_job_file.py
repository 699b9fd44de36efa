"""One folder holds one job: what may change between two starts, what may not, and who may drive."""

from __future__ import annotations

import copy
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from hqlabel.pipeline.errors import HqlabelError, JobRefused
from hqlabel.pipeline.job_context import AccessRules, JobDetector, Place
from hqlabel.pipeline.job_state import driver_lock as owner
from hqlabel.pipeline.job_state.driver_lock import Holder, Owner, current_holder, this_process
from hqlabel.pipeline.job_state.job_file import (
    JOB_KEY,
    Job,
    differences,
    identity_of,
    open_job,
    read_job,
    require_job,
    units_per_part,
)
from hqlabel.pipeline.storage import cloud_buckets as buckets
from hqlabel.pipeline.storage.output_store import Store
from tests.pipeline.made_units import make_context

INPUTS = {
    "images": "s3://b/images",
    "boxes": "boxes.parquet",
    "files": [{"uri": "boxes.parquet", "size": 10, "sha256": "1"}],
}


DETECTOR = JobDetector(
    name="hf:there", fingerprint="f" * 64, prompts={"a": "b"}, license="apache-2.0", options={"o": 1}
)


def make_job(context=None, **fields) -> Job:
    context = context or make_context()
    context = dataclasses.replace(context, detector=DETECTOR)
    identity = identity_of(context, inputs=INPUTS, limit=None, protocol=1)
    plan = {"images": 10, "boxes": 20, "units": 3}
    values = {"identity": identity, "context": context, "plan": plan, "units_per_part": 2}
    values["categories"] = ({"id": 1, "name": "cat"},)
    return Job(**(values | fields))


# ---------------------------------------------------------------------------------------------
# Identity
# ---------------------------------------------------------------------------------------------


def leaves(value, path=()):
    """Every leaf of nested JSON with the path to it."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, below in items:
            yield from leaves(below, (*path, key))
    else:
        yield path, value


def put_in(tree, path, value):
    tree = copy.deepcopy(tree)
    at = tree
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return tree


FIELDS = [path for path, _ in leaves(make_job().identity)]


@pytest.mark.parametrize("path", FIELDS, ids=lambda p: ".".join(map(str, p)))
def test_every_field_of_the_identity_refuses_a_resume_and_is_named(local_store, path):
    job = make_job()
    open_job(local_store, job)
    before = local_store.read(JOB_KEY)
    changed = make_job(identity=put_in(job.identity, path, "CHANGED"))
    with pytest.raises(JobRefused) as caught:
        open_job(local_store, changed)
    name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")
    old = dict(leaves(job.identity))[path]
    assert f'{name}: the job there has {json.dumps(old)}, now "CHANGED"' in str(caught.value)
    assert local_store.read(JOB_KEY) == before


def test_the_identity_holds_everything_that_changes_masks():
    named = {".".join(str(p) for p in path) for path in FIELDS}
    wanted = {
        "schema_version", "model_protocol", "plan_sha256", "images_per_unit", "limit",
        "weights.sha256", "weights.input_side", "masks.dtype", "masks.call_shape.images_per_call",
        "masks.call_shape.boxes_per_call", "masks.multimask", "masks.hq_token_only",
        "masks.stability_offset", "masks.compiled", "masks.draft_jpeg", "masks.cpu_threads",
        "box_rules.box_format", "box_rules.box_frame",
        "detector.kind", "detector.fingerprint", "detector.prompts.a", "detector.longest_side",
        "detector.score_threshold",
        "detector.max_detections", "detector.images_per_call", "detector.options.o", "box_rules.min_score",
        "box_rules.top_k", "box_rules.nms_mode", "box_rules.nms_iou", "box_rules.expand",
        "box_rules.min_side_px",
        *(f"limits.{name}" for name in make_context().limits.identity()),
        "inputs.images", "inputs.boxes", "inputs.files.0.size", "inputs.files.0.sha256",
    }  # fmt: skip
    assert wanted <= named


def test_a_job_file_keeps_the_shape_that_earlier_outputs_have(local_store):
    open_job(local_store, make_job())
    stored = json.loads(local_store.read(JOB_KEY))
    masks = {
        "dtype": "float32", "call_shape": {"images_per_call": 1, "boxes_per_call": 16},
        "multimask": "single", "hq_token_only": False, "stability_offset": 1.0, "compiled": False,
        "draft_jpeg": False, "cpu_threads": 1,
    }  # fmt: skip
    assert stored["context"]["masks"] == stored["identity"]["masks"] == masks
    assert set(stored["context"]) == {
        "plan_sha256", "images_per_unit", "run_id", "weights", "masks", "box_rules", "limits", "detector",
        "lineage",
    }  # fmt: skip


def test_a_job_file_with_settings_of_a_later_version_is_refused(local_store):
    open_job(local_store, make_job())
    stored = json.loads(local_store.read(JOB_KEY))
    stored["context"]["limits"]["max_moons"] = 1
    local_store.put(JOB_KEY, json.dumps(stored).encode())
    with pytest.raises(JobRefused, match=r"written by another version.*max_moons"):
        require_job(local_store)


def test_machines_budget_lineage_and_code_may_change_between_resumes(local_store):
    first = open_job(local_store, make_job())
    context = dataclasses.replace(
        make_context(run_id="run-2"),
        lineage={"code_version": "other"},
        limits=make_context().limits.model_copy(
            update={"max_failure_rate": 0.5, "failure_rate_from_images": 9}
        ),
        access=AccessRules(roots=("/data",)),
        segmenter="tests.fakes:segmenter",
    )
    again = open_job(local_store, make_job(context, units_per_part=99))
    assert again.context.run_id == first.context.run_id == "run-1"
    assert again.units_per_part == 2
    assert again.created_at == first.created_at
    assert again.context.segmenter == "tests.fakes:segmenter"


def test_a_job_of_the_version_before_has_its_limits_compared_too(local_store):
    open_job(local_store, make_job())
    stored = json.loads(local_store.read(JOB_KEY))
    del stored["identity"]["limits"]
    local_store.put(JOB_KEY, json.dumps(stored).encode())

    assert open_job(local_store, make_job()).context.run_id == "run-1"
    limits = make_context().limits.model_copy(update={"max_image_pixels": 7})
    with pytest.raises(JobRefused, match=r"limits\.max_image_pixels: the job there has 89478485, now 7"):
        open_job(local_store, make_job(dataclasses.replace(make_context(), limits=limits)))


def test_a_detector_may_lie_elsewhere_but_a_class_of_ones_own_is_known_by_its_name():
    def identity(name):
        context = dataclasses.replace(make_context(), detector=DETECTOR.model_copy(update={"name": name}))
        return identity_of(context, inputs=INPUTS, limit=None, protocol=1)["detector"]

    assert identity("hf:here") == identity("hf:there")
    assert identity("hf:here") != identity("hf-zero-shot:here")
    assert identity("mine:One") != identity("mine:Two")
    assert "license" not in identity("mine:One")


def test_added_removed_and_retyped_fields_are_differences():
    old = {"a": 1, "b": {"c": [1, 2]}, "d": None, "e": True}
    new = {"a": 1.0, "b": {"c": [1]}, "f": 1, "e": 1}
    assert [(d.name, d.stored, d.now) for d in differences(old, new)] == [
        ("a", 1, 1.0),
        ("b.c[1]", 2, "(absent)"),
        ("d", None, "(absent)"),
        ("e", True, 1),
        ("f", "(absent)", 1),
    ]
    assert differences(old, copy.deepcopy(old)) == []


def test_a_long_list_of_differences_is_cut(local_store):
    open_job(local_store, make_job(identity={f"f{n}": 1 for n in range(30)}))
    with pytest.raises(JobRefused, match="and 10 more"):
        open_job(local_store, make_job(identity={f"f{n}": 2 for n in range(30)}))


def test_a_job_is_created_once_and_read_back(store: Store):
    assert read_job(store) is None
    job = make_job()
    assert open_job(store, job).identity == job.identity
    stored = require_job(store, access=AccessRules(roots=("/mine",)))
    assert stored.context.access.roots == ("/mine",)
    assert stored.context.output == store.place
    assert stored.context.model == job.context.model
    assert stored.context.weights == job.context.weights
    assert (stored.plan, stored.units, stored.categories) == (job.plan, 3, job.categories)


def test_a_job_file_names_no_code_and_no_readable_folders(local_store):
    context = dataclasses.replace(
        make_context(), segmenter="evil:run", decoder="evil:run", access=AccessRules(roots=("/secret",))
    )
    open_job(local_store, make_job(context))
    text = local_store.read(JOB_KEY).decode()
    assert "evil" not in text
    assert "/secret" not in text
    tampered = json.loads(text)
    tampered["context"] |= {"segmenter": "evil:run", "decoder": "evil:run", "access": {"roots": ["/"]}}
    local_store.put(JOB_KEY, json.dumps(tampered).encode())
    context = require_job(local_store).context
    assert "evil" not in (context.segmenter, context.decoder)
    assert context.access.roots == ()


def test_a_folder_with_other_files_is_refused_and_left_alone(store: Store):
    store.put("holiday.jpg", b"1")
    with pytest.raises(JobRefused, match=r"files but no job\.json \(holiday\.jpg\)"):
        open_job(store, make_job())
    assert [e.key for e in store.list()] == ["holiday.jpg"]


def test_owner_and_dot_files_do_not_make_a_folder_foreign(local_store):
    local_store.put("owner/1.json", b"{}")
    local_store.put(".DS_Store", b"")
    open_job(local_store, make_job())


def test_a_folder_without_a_job_has_nothing_to_retry(local_store):
    with pytest.raises(JobRefused, match="there is no job here"):
        require_job(local_store)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"product": "hqlabel", "format": 1}', b"\xff\xfe"]
)
def test_a_damaged_job_file_is_refused_and_kept(local_store, body):
    local_store.put(JOB_KEY, body)
    for call in (lambda: open_job(local_store, make_job()), lambda: require_job(local_store)):
        with pytest.raises(JobRefused, match=r"job\.json cannot be read"):
            call()
    assert local_store.read(JOB_KEY) == body


@pytest.mark.parametrize("inputs", ["x", ["x"], None, {"arguments": "x"}, {"arguments": None}])
def test_inputs_of_the_identity_that_are_none_are_blamed_on_the_job_file(local_store, inputs):
    open_job(local_store, make_job())
    stored = json.loads(local_store.read(JOB_KEY))
    stored["identity"]["inputs"] = inputs
    local_store.put(JOB_KEY, json.dumps(stored).encode())
    for read in (read_job, lambda store: open_job(store, make_job())):
        with pytest.raises(JobRefused, match=r"job\.json cannot be read \(.*identity\.inputs"):
            read(local_store)


def test_a_job_of_a_later_version_is_refused(local_store):
    open_job(local_store, make_job())
    content = json.loads(local_store.read(JOB_KEY))
    local_store.put(JOB_KEY, json.dumps(content | {"format": 99}).encode())
    with pytest.raises(JobRefused, match="format 99; this version reads up to 1"):
        read_job(local_store)


def test_a_store_that_overwrites_what_was_to_be_created_is_refused(s3_store, monkeypatch):
    monkeypatch.setattr(buckets.S3Backend, "create", buckets.S3Backend.replace)
    with pytest.raises(JobRefused, match="If-None-Match is ignored"):
        open_job(s3_store, make_job())


def test_many_processes_open_one_job_together(local_store):
    jobs = [make_job(make_context(run_id=f"run-{n}")) for n in range(6)]
    barrier, opened = threading.Barrier(6), []

    def run(job: Job) -> None:
        barrier.wait()
        opened.append(open_job(local_store, job).context.run_id)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 6
    assert len(set(opened)) == 1


@pytest.mark.parametrize(
    ("images", "boxes", "per_unit", "low", "high"),
    [(10**6, 10**7, 64, 1000, 3000), (10, 20, 64, 1, 20_000), (100, 0, 64, 1, 20_000), (0, 0, 1, 1, 20_000),
     (1000, 10**7, 4096, 1, 1), (10**6, None, 64, 1000, 3000)],
)  # fmt: skip
def test_parts_come_to_a_few_hundred_megabytes(images, boxes, per_unit, low, high):
    units = units_per_part(images=images, boxes=boxes, images_per_unit=per_unit)
    assert low <= units <= high
    if boxes and units not in (1, 20_000):
        assert 128e6 <= units * per_unit * (boxes / images) * 123 <= 512e6


# ---------------------------------------------------------------------------------------------
# The driver
# ---------------------------------------------------------------------------------------------

QUICK = {"takeover_after_s": 1.0, "beat_every_s": 0.1}


def elsewhere(**fields) -> Holder:
    """A driver on another machine, of which nothing can be known but its heartbeat."""
    values = (
        dataclasses.asdict(this_process()) | {"host": "other", "boot": "other-boot", "pid": 4711} | fields
    )
    return Holder(**values)


def put_holder(store: Store, holder: Holder, number: int = 1, beat: dict | None = None) -> None:
    store.put(f"owner/{number}.json", json.dumps(dataclasses.asdict(holder)).encode())
    if beat is not None:
        store.put(f"owner/{number}.beat.json", json.dumps(beat).encode())


def test_the_first_driver_owns_the_job_and_a_second_is_told_who(store: Store):
    with Owner.take(store, **QUICK) as first:
        assert first.number == 1
        assert first.is_ours()
        with pytest.raises(JobRefused, match=rf"process {os.getpid()} on .* is working on this job"):
            Owner.take(store, **QUICK)
        assert first.is_ours()
    assert not any(t.name == "hqlabel-owner" for t in threading.enumerate())


def test_after_a_release_nobody_waits(store: Store):
    Owner.take(store, **QUICK).release()
    started = time.monotonic()
    with Owner.take(store, takeover_after_s=30) as second:
        assert second.number == 2
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("beat", [None, {"token": "t", "beat": 7, "released": False}])
def test_a_silent_driver_elsewhere_is_replaced_after_the_wait(local_store, beat):
    put_holder(local_store, elsewhere(), beat=beat)
    started = time.monotonic()
    with Owner.take(local_store, **QUICK) as owner_:
        assert owner_.number == 2
    assert 1.0 <= time.monotonic() - started < 3


def test_a_beating_driver_elsewhere_is_not_replaced(local_store):
    put_holder(local_store, elsewhere(), beat={"beat": 0})
    stop = threading.Event()

    def beat() -> None:
        n = 0
        while not stop.wait(0.1):
            n += 1
            put_holder(local_store, elsewhere(), beat={"beat": n})

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(JobRefused, match="process 4711 on other is working"):
            Owner.take(local_store, **QUICK)
    finally:
        stop.set()
        heart.join()
    assert current_holder(local_store)[0] == 1


def test_a_clock_that_is_wrong_by_days_decides_nothing(local_store, monkeypatch):
    put_holder(local_store, elsewhere(), beat={"beat": 1})
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with Owner.take(local_store, **QUICK) as owner_:
        assert owner_.number == 2


def _own(place: Place, ready) -> None:
    Owner.take(Store(place), beat_every_s=0.1)
    ready.put(os.getpid())
    time.sleep(600)


@pytest.fixture
def other_driver(local_store):
    """A real driver in another process; (process, store)."""
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    process = context.Process(target=_own, args=(local_store.place, ready), daemon=True)
    process.start()
    ready.get(timeout=60)
    yield process, local_store
    process.kill()
    process.join()


def test_a_killed_driver_of_this_machine_is_replaced_at_once(other_driver):
    process, store = other_driver
    with pytest.raises(JobRefused, match=f"process {process.pid} on"):
        Owner.take(store, **QUICK)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    started = time.monotonic()
    with Owner.take(store, takeover_after_s=60) as owner_:
        assert owner_.number == 2
    assert time.monotonic() - started < 5


def test_a_paused_driver_is_replaced_and_stops_when_it_wakes(other_driver):
    process, store = other_driver
    os.kill(process.pid, signal.SIGSTOP)
    with Owner.take(store, **QUICK) as second:
        assert second.number == 2
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.5)
        assert second.is_ours()
        beats = store.read("owner/1.beat.json")
        time.sleep(0.5)
        assert store.read("owner/1.beat.json") == beats  # its heart has stopped


def test_a_replaced_driver_learns_it_by_itself_and_by_asking(local_store):
    first = Owner.take(local_store, **QUICK)
    put_holder(local_store, elsewhere(), number=2)
    assert first.lost.wait(5)
    assert not first.is_ours()
    with pytest.raises(
        JobRefused, match="process 4711 on other has taken over this job; publish is left to it"
    ):
        first.require("publish")
    first.release()


def test_a_process_number_used_again_is_not_taken_for_the_old_driver(local_store):
    mine = this_process()
    assert not mine.is_surely_dead()
    assert dataclasses.replace(mine, started="1").is_surely_dead()
    assert dataclasses.replace(mine, pid=2**22 + 1).is_surely_dead()


def test_of_a_process_in_another_container_or_boot_nothing_is_known():
    gone = dataclasses.replace(this_process(), pid=2**22 + 1)
    assert not dataclasses.replace(gone, pids="pid:[1]").is_surely_dead()
    assert not dataclasses.replace(gone, boot="b").is_surely_dead()
    assert not dataclasses.replace(gone, boot="").is_surely_dead()


def _race(place: Place, barrier, winners) -> None:
    store = Store(place)
    for _ in range(5):
        barrier.wait()
        try:
            with Owner.take(store, takeover_after_s=2.0, beat_every_s=0.1) as won:
                winners.put(won.number)
                barrier.wait()  # held until all have tried
        except JobRefused:
            barrier.wait()
        barrier.wait()


def test_two_drivers_at_once_have_one_winner_each_time(local_store):
    context = multiprocessing.get_context("spawn")
    barrier, winners = context.Barrier(2), context.Queue()
    racers = [context.Process(target=_race, args=(local_store.place, barrier, winners)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(timeout=120)
        assert racer.exitcode == 0
    numbers = sorted(winners.get(timeout=5) for _ in range(5))
    assert numbers == [1, 2, 3, 4, 5]
    assert winners.empty()


def test_a_heart_that_cannot_reach_the_store_keeps_trying(local_store, monkeypatch):
    with Owner.take(local_store, **QUICK) as owner_:
        real = owner_._beats.put
        failed = []

        def put(key: str, data: bytes) -> None:
            if len(failed) < 3:
                failed.append(key)
                raise HqlabelError("no store")
            real(key, data)

        monkeypatch.setattr(owner_._beats, "put", put)
        time.sleep(1.0)
        assert len(failed) == 3
        before = local_store.read("owner/1.beat.json")
        time.sleep(0.5)
        assert local_store.read("owner/1.beat.json") != before


def test_a_damaged_owner_file_is_named(local_store):
    local_store.put("owner/1.json", b"{")
    with pytest.raises(JobRefused, match=r"owner/1\.json cannot be read"):
        Owner.take(local_store, **QUICK)


def test_the_defaults_give_a_live_driver_several_beats_before_it_is_replaced():
    assert owner.TAKEOVER_AFTER_S >= 4 * owner.BEAT_EVERY_S


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("product", "another"),
        ("plan.images", -1),
        ("plan.boxes", True),
        ("plan.units", "3"),
        ("units_per_part", 0),
        ("context.plan_sha256", "../../elsewhere"),
    ],
)
def test_a_job_file_with_a_value_that_no_job_has_is_refused(local_store, name, value):
    open_job(local_store, make_job(make_context()))
    content = json.loads(local_store.read("job.json"))
    *folders, leaf = name.split(".")
    place = content
    for folder in folders:
        place = place[folder]
    place[leaf] = value
    local_store.put("job.json", json.dumps(content).encode())
    with pytest.raises(JobRefused, match=r"job\.json"):
        read_job(local_store)
