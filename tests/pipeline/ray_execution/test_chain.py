"""The chain on a real Ray: every image ends in its row, whatever dies on the way."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from hqlabel.model.records import PreparedImage, Prompts, resize_longest_side
from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.ray_execution import live_counts, node_watch
from hqlabel.pipeline.ray_execution.chain import Retry, chain, run_units
from hqlabel.pipeline.ray_execution.node_watch import check_resources
from hqlabel.pipeline.ray_execution.placement import Node, Requests, fit
from hqlabel.pipeline.ray_execution.ray_tasks import RayTasks, map_parts, run_on_model_node
from hqlabel.pipeline.settings import ClusterSettings, Limits
from hqlabel.pipeline.stages.rows_between_stages import UnitRow
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.tables.unit_files import list_committed, read_committed
from tests.conftest import make_place
from tests.fakes import box_masks, harmful_picture, trouble
from tests.pipeline.made_jobs import SIDE, make_job, noise, png

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(180)]


def run(job, unit_ids=None, *, epoch=1, should_stop=lambda: False, cluster=None, **options):
    """The outcomes of a run, in the order of their commits."""
    outcomes = []
    run_units(
        job.unit_ids if unit_ids is None else unit_ids,
        job.context,
        cluster or ClusterSettings(actors=1),
        epoch=epoch,
        on_outcome=outcomes.append,
        should_stop=lambda: should_stop(outcomes) if should_stop.__code__.co_argcount else should_stop(),
        **options,
    )
    return outcomes


def rows(job):
    """Every committed row by image id, and a proof that there is one for each planned image."""
    store = Store(job.context.output)
    found = [
        row for unit in list_committed(store).values() for row in read_committed(store, unit).to_pylist()
    ]
    assert [row["image_id"] for row in found] == job.plan.table["image_id"].to_pylist()
    return {row["image_id"]: row for row in found}


def plan_operators(dataset):
    """The names of the operators that Ray makes of a dataset, first to last, after its optimizer ran."""
    from ray.data._internal.logical.optimizers import get_execution_plan

    plan, _ = get_execution_plan(dataset._logical_plan)
    names, operator = [], plan.dag
    while True:
        names.append(operator.name)
        if not operator.input_dependencies:
            return names[::-1]
        (operator,) = operator.input_dependencies


def failures(found):
    return {image_id: row["error_code"] for image_id, row in found.items() if row["status"] == "failed"}


def plain_masks(data, boxes):
    """What a plain loop over the model gives for one image."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    prompts = Prompts(boxes_xyxy=np.array(boxes, np.float32))
    small = resize_longest_side(pixels, SIDE)
    masks = box_masks(PreparedImage(pixels_hwc=small, size_hw=pixels.shape[:2], prompts=prompts))
    return list(zip(masks.counts, masks.predicted_iou.tolist(), strict=True))


def test_no_stage_is_fused_with_another(tmp_path):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    wanted = ["Input", "MapBatches(prepare)", "MapBatches(Segment)", "MapBatches(commit)"]
    machines = [[Node(cpus=1)], [Node(cpus=2)], [Node(cpus=64)], [Node(cpus=8, gpus=2)]]

    for nodes in machines:
        for settings in (ClusterSettings(), ClusterSettings(cpus_per_actor=0.4, decode_cpus=0.4)):
            requests = fit(settings, nodes)
            dataset = chain([UnitRow(unit_id=0)], job.context, requests, epoch=1)
            assert plan_operators(dataset) == wanted, (nodes, settings)


def test_equal_requests_would_be_fused_so_the_check_above_is_one(tmp_path):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    requests = Requests(actors_min=1, actors_max=1, gpus_per_actor=0, cpus_per_actor=1.0, decode_cpus=1.0)

    names = plan_operators(chain([UnitRow(unit_id=0)], job.context, requests, epoch=1))

    assert "MapBatches(prepare)->MapBatches(Segment)" in names


@pytest.mark.parametrize("kind", ["local", pytest.param("s3", marks=pytest.mark.faults)])
def test_a_job_answers_every_image_and_every_box_and_a_retry_mends_what_can_be(tmp_path, kind, request):
    pictures = {f"{i:02}.png": png(noise(i, 40 + i, 64)) for i in range(20)}
    pictures |= {"20.png": b"", "21.png": trouble("exit"), "22.png": png(noise(1))[:700], "23.png": b"<html>"}
    boxes = {"03.png": [], "04.png": None, "05.png": [[9, 9, 1, 1]], "06.png": [[1, 2, 30, 20]] * 40}
    job = make_job(tmp_path, pictures, boxes, place=make_place(kind, tmp_path, request))

    outcomes = run(job)

    found = rows(job)
    assert failures(found) == {
        "04.png": "boxes_missing",
        "05.png": "no_usable_box",
        "20.png": "empty",
        "21.png": "crashed",
        "22.png": "truncated",
        "23.png": "not_an_image",
    }
    assert found["03.png"]["status"] == "no_boxes"
    for image_id, row in found.items():
        given = job.boxes[image_id] or []
        assert len(row["instances"]) == len(given), image_id
        if row["status"] == "labelled":
            masks = [(one["segmentation"]["counts"], one["predicted_iou"]) for one in row["instances"]]
            assert masks == plain_masks(pictures[image_id], given), image_id
    assert sorted(outcome.unit_id for outcome in outcomes) == job.unit_ids
    assert sum(outcome.images for outcome in outcomes) == 24
    assert sum(outcome.failed for outcome in outcomes) == 6
    assert sum(outcome.instances for outcome in outcomes) == sum(
        len(one["instances"]) for one in found.values()
    )

    told = live_counts.read(job.context.run_id, 1)
    images = {unit: done for one in told for unit, (done, _) in one.units.items()}
    assert images
    assert all(0 < done <= job.context.images_per_unit for done in images.values())
    assert sum(one.busy_s for one in told) > 0
    live_counts.forget(job.context.run_id, 1)
    assert live_counts.read(job.context.run_id, 1) == []

    (tmp_path / "pictures" / "20.png").write_bytes(png(noise(66)))
    retried = run(job, [5], retry=Retry(generations={5: 1}, codes=("empty", "truncated")))

    assert [(o.unit_id, o.generation, o.failed) for o in retried] == [(5, 1, 3)]
    assert {i for i, row in rows(job).items() if row["instances"] != found[i]["instances"]} == {"20.png"}
    assert all(rows(job)[i] == found[i] for i in found if i not in ("20.png", "22.png"))


def test_a_model_process_killed_in_mid_unit_loses_and_doubles_nothing(tmp_path):
    trace = tmp_path / "trace"
    trace.mkdir()
    pictures = {f"{i:02}.png": png(noise(i)) for i in range(16)}
    job = make_job(tmp_path, pictures, lineage={"stub_trace": str(trace), "stub_sleep_s": "0.15"})
    killed = []

    def kill_once():
        while not killed:
            for file in trace.glob("*.txt"):
                if len(file.read_text().splitlines()) >= 6:
                    os.kill(int(file.stem), signal.SIGKILL)
                    killed.append(file.stem)
                    return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_once, daemon=True)
    killer.start()
    outcomes = run(job)
    killer.join(10)

    assert killed
    assert {row["status"] for row in rows(job).values()} == {"labelled"}
    assert sorted(outcome.unit_id for outcome in outcomes) == job.unit_ids
    again = [row for row in rows(job).values() if row["attempts"] == 2]
    assert again
    assert sum(outcome.begun_before for outcome in outcomes) == len(again)
    worked = sum(len(file.read_text().splitlines()) for file in trace.glob("*.txt"))
    assert 16 < worked <= 16 + 2 * 4 + 1  # two units at most were in the actor, and one blank image


# Ray's C++ says each of its warnings once in a process, so only a new process can hear it.
OTHERS_WARNING = """
import sys
from pathlib import Path

import ray

from hqlabel.pipeline.ray_execution.chain import run_units
from hqlabel.pipeline.settings import ClusterSettings
from tests.pipeline.made_jobs import make_job, noise, png


class Other:
    def __init__(self, _):
        pass


ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         object_store_memory=300 * 2**20)
job, others = make_job(Path(sys.argv[1]), {"a.png": png(noise(1))}), []


def start_another(_):
    others.append(ray.remote(num_cpus=0, max_restarts=1)(Other).remote(ray.put(1)))


run_units(job.unit_ids, job.context, ClusterSettings(actors=1), epoch=1, on_outcome=start_another,
          should_stop=lambda: False)
print("others", len(others))
"""


def test_ray_has_nothing_to_warn_of_and_its_warnings_of_others_still_arrive(tmp_path):
    command = [sys.executable, "-c", OTHERS_WARNING, str(tmp_path)]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=150, cwd=Path(__file__).parents[3]
    )

    assert (ended.returncode, ended.stdout.strip()) == (0, "others 1"), ended.stderr
    lines = [line for line in ended.stderr.splitlines() if "core_worker" in line]
    assert len(lines) == 1, "Ray's C++ warns of ours, or is not heard any more"
    assert "Actor with class name: 'Other'" in lines[0]
    assert "constructor arguments in the object store" in lines[0]


def test_images_that_kill_or_hang_the_model_are_failed_and_their_neighbours_are_labelled(tmp_path):
    pictures = {f"{i:02}.png": png(noise(i)) for i in range(12)}
    pictures |= {"01.png": png(harmful_picture("exit")), "06.png": png(harmful_picture("sleep"))}
    job = make_job(tmp_path, pictures, limits=Limits(segment_timeout_s=1.0))

    run(job)

    assert failures(rows(job)) == {"01.png": "crashed", "06.png": "timeout"}
    assert sum(row["status"] == "labelled" for row in rows(job).values()) == 10


def test_one_slow_unit_holds_back_no_other(tmp_path):
    gate = tmp_path / "gate"
    pictures = {f"{i:02}.png": png(noise(i)) for i in range(8)} | {"00.png": trouble(f"until:{gate}")}
    job = make_job(tmp_path, pictures, limits=Limits(decode_timeout_s=120))

    outcomes = run_holding(job, gate, after=1)

    assert [outcome.unit_id for outcome in outcomes] == [1, 0]
    assert failures(rows(job)) == {"00.png": "not_an_image"}


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_units_held_in_preparing_and_in_the_model_let_all_others_pass(tmp_path):
    gate = tmp_path / "gate"
    pictures = {f"{i:02}.png": png(noise(i)) for i in range(40)}
    pictures |= {"08.png": trouble(f"until:{gate}"), "00.png": png(harmful_picture("until"))}
    limits = Limits(decode_timeout_s=400, segment_timeout_s=400)
    job = make_job(tmp_path, pictures, limits=limits, lineage={"stub_until": str(gate)})
    began = time.monotonic()

    outcomes = run_holding(job, gate, after=7, hold_s=60, cluster=ClusterSettings(actors=2))

    # Ten units. One more may have been handed to the actor that is held, and waits there.
    passed = {outcome.unit_id for outcome in outcomes[:7]}
    assert time.monotonic() - began >= 60
    assert passed.isdisjoint({0, 2})
    assert {outcome.unit_id for outcome in outcomes[7:]} >= {0, 2}
    assert failures(rows(job)) == {"08.png": "not_an_image"}
    assert sum(row["status"] == "labelled" for row in rows(job).values()) == 39


def run_holding(job, gate, *, after, hold_s=0, **options):
    """The outcomes of a run whose gate opens after so many of them, and so many seconds after its start."""
    began = time.monotonic()

    def open_gate(done):
        if len(done) == after:
            time.sleep(max(0.0, hold_s - (time.monotonic() - began)))
            gate.touch()
        return False

    return run(job, should_stop=open_gate, **options)


def test_a_systemic_fault_rises_as_itself_and_marks_nothing(tmp_path):
    job = make_job(tmp_path, {f"{i}.png": png(noise(i)) for i in range(8)})
    weights = replace(job.context.weights, source=str(tmp_path / "missing.pth"))
    broken = replace(
        job.context, weights=weights, segmenter="hqlabel.pipeline.stages.load_model:load_segmenter"
    )

    with pytest.raises(SystemicFault, match=r"missing\.pth") as caught:
        run(replace(job, context=broken))

    assert (caught.value.code, caught.value.exit_code) == ("weights", 5)
    assert list_committed(Store(job.context.output)) == {}


def test_a_lost_plan_stops_the_job(tmp_path):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    context = replace(job.context, plan_sha256="0" * 64)

    with pytest.raises(SystemicFault, match="plan/0000"):
        run(replace(job, context=context))


def test_a_bug_costs_the_image_that_meets_it_and_one_that_all_meet_stops_the_job(tmp_path):
    pictures = {f"{i}.png": png(noise(i)) for i in range(8)}
    one = make_job(tmp_path / "one", pictures | {"2.png": trouble("bug")})
    every = make_job(tmp_path / "every", dict.fromkeys(pictures, trouble("bug")))

    run(one)
    with pytest.raises(SystemicFault, match="a bug in the decoder") as caught:
        run(every)

    assert failures(rows(one)) == {"2.png": "internal"}
    assert caught.value.code == "internal"
    assert list_committed(Store(every.context.output)) == {}


def test_a_picture_that_kills_the_process_that_prepares_it_is_failed_after_three_deaths(tmp_path):
    pictures = {f"{i:02}.png": png(noise(i)) for i in range(12)} | {"05.png": trouble("kill-parent")}
    job = make_job(tmp_path, pictures)

    outcomes = run(job)

    assert failures(rows(job)) == {"05.png": "crashed"}
    assert "prepare" in rows(job)["05.png"]["error_message"]
    assert sorted(outcome.unit_id for outcome in outcomes) == job.unit_ids
    marks = [entry.key for entry in Store(job.context.output).list("attempts/00000001.g0.prepare/")]
    assert sum(key.endswith(".start.json") for key in marks) == 3  # the first start of all leaves none
    assert Store(job.context.output).list("attempts/00000000.g0.prepare/") == []


def test_a_run_that_is_told_to_stop_stops_and_the_rest_can_be_done_later(tmp_path):
    pictures = {f"{i:02}.png": png(noise(i)) for i in range(40)}
    job = make_job(tmp_path, pictures, lineage={"stub_sleep_s": "0.2"})
    store = Store(job.context.output)

    told = []

    def stop_at_the_second(done):
        told.append(time.monotonic())
        return len(done) >= 2

    outcomes = run(job, should_stop=stop_at_the_second)
    stopped = time.monotonic() - told[-1]
    time.sleep(2)
    after = len(list_committed(store))
    time.sleep(2)

    assert len(outcomes) == 2
    assert 2 <= after < 10
    assert len(list_committed(store)) == after, "something still works"
    assert stopped < 30
    run(job, [unit_id for unit_id in job.unit_ids if unit_id not in list_committed(store)])
    assert {row["status"] for row in rows(job).values()} == {"labelled"}


def test_the_rest_is_begun_anew_when_nodes_are_gone_and_nothing_finishes(tmp_path, monkeypatch):
    gate = tmp_path / "gate"
    pictures = {f"{i:02}.png": png(noise(i)) for i in range(12)} | {"04.png": png(harmful_picture("until"))}
    limits = Limits(segment_timeout_s=120)
    job = make_job(tmp_path, pictures, limits=limits, lineage={"stub_until": str(gate)})
    whole, began_anew = node_watch.live_nodes(), []

    def nodes():
        held = list((tmp_path / "out" / "attempts").glob("00000001.g0/*"))
        return [Node(cpus=0.1)] if held and not gate.exists() else whole

    def requests_for_remaining_nodes(cluster, cpu_threads):
        gate.touch()
        began_anew.append(fit(cluster, nodes()))
        return began_anew[-1]

    monkeypatch.setattr(node_watch, "live_nodes", nodes)
    monkeypatch.setattr(node_watch, "requests_for_remaining_nodes", requests_for_remaining_nodes)
    monkeypatch.setattr(node_watch, "NODES_GONE_S", 2.0)

    outcomes = run(job)

    assert len(began_anew) == 1
    assert sorted(outcome.unit_id for outcome in outcomes) == job.unit_ids
    assert {row["status"] for row in rows(job).values()} == {"labelled"}
    assert rows(job)["04.png"]["attempts"] == 2


def test_many_units_go_in_waves_and_on_a_private_ray_no_actor_starts_but_the_models(tmp_path, monkeypatch):
    monkeypatch.setattr("hqlabel.pipeline.ray_execution.chain.UNITS_PER_WAVE", 2)
    job = make_job(tmp_path, {f"{i}.png": png(noise(i)) for i in range(3)}, images_per_unit=1)
    start, started = ray.actor.ActorClass._remote, []

    def listed(self, *args, **kwargs):
        started.append(self.__ray_metadata__.class_name)
        return start(self, *args, **kwargs)

    monkeypatch.setattr(ray.actor.ActorClass, "_remote", listed)
    outcomes = run(job, shared=False)

    assert [{o.unit_id for o in outcomes[at : at + 2]} for at in (0, 2)] == [{0, 1}, {2}]
    assert started == ["MapWorker(MapBatches(Segment))"] * 2  # each process of another costs a second


def test_what_cannot_be_placed_is_refused_before_any_work(tmp_path):
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    began = time.monotonic()

    with pytest.raises(SystemicFault, match=r"set cluster\.actors to 1") as caught:
        run(job, cluster=ClusterSettings(actors=2, cpus_per_actor=1))

    assert caught.value.code == "resources"
    assert time.monotonic() - began < 5
    assert check_resources(ClusterSettings()).actors_max == 2
    with pytest.raises(SystemicFault, match="gpus_per_actor"):
        check_resources(ClusterSettings(gpus_per_actor=1, wait_for_nodes_s=1.5))


@pytest.mark.parametrize(
    ("held", "asked", "reason"),
    [
        (1.5, 1.0, r"a task of one CPU core, .* no place for 0 min; 0\.5 CPU cores and 0 GPUs of the whole"),
        (1.0, 1.5, r"no model process .* 1\.5 CPU cores on one node"),
    ],
)
def test_cores_that_somebody_else_holds_are_said_and_not_waited_for(
    tmp_path, monkeypatch, held, asked, reason
):
    """Before anything can begin, and when all but the model can: Ray would wait in silence, for hours."""
    job = make_job(tmp_path, {"a.png": png(noise(1))})
    monkeypatch.setattr(node_watch, "NO_MODEL_S", 4.0)
    monkeypatch.setattr(node_watch, "NODES_GONE_S", 4.0)
    other = ray.remote(num_cpus=held)(Holder).remote()
    ray.get(other.ping.remote())
    try:
        with pytest.raises(SystemicFault, match=reason) as caught:
            run(job, cluster=ClusterSettings(cpus_per_actor=asked))
    finally:
        ray.kill(other)

    assert caught.value.code == "resources"
    assert list_committed(Store(job.context.output)) == {}


class Holder:
    """Somebody else's actor."""

    def ping(self) -> None: ...


def test_workers_log_each_unit_and_each_failed_image_as_json(tmp_path):
    job = make_job(tmp_path, {"a.png": png(noise(1)), "b.png": b"<html>"}, run_id=f"logged-{time.time_ns()}")

    run(job)

    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    text = [line for file in logs.glob("worker-*.err") for line in file.read_text().splitlines()]
    lines = [json.loads(line) for line in text if job.context.run_id in line]
    assert [(one["event"], one["unit_id"]) for one in lines] == [("unit_committed", 0), ("image_failed", 0)]
    assert (lines[0]["labelled"], lines[0]["failed_by_code"]) == (1, {"not_an_image": 1})
    assert (lines[1]["image_id"], lines[1]["code"]) == ("b.png", "not_an_image")


def test_parts_are_mapped_over_tasks_and_their_errors_rise_as_themselves():
    assert sorted(map_parts(_double, range(7))) == [0, 2, 4, 6, 8, 10, 12]
    assert list(map_parts(_double, [])) == []
    with pytest.raises(SystemicFault, match="disk: full"):
        list(map_parts(_fill_disk, [1]))


def test_tasks_take_each_others_results_and_their_errors_rise_as_themselves():
    tasks = RayTasks()
    three, six = tasks.start(_with_its_double, 3, returns=2)

    assert tasks.result(tasks.start(_add, three, six)) == 9
    assert tasks.result(tasks.fold(_sum_from, 100, over=[three, six])) == 109
    with pytest.raises(SystemicFault, match="disk: full"):
        tasks.result(tasks.start(_double, tasks.start(_fill_disk, 1)))


def test_a_probe_runs_where_the_model_would():
    use_gpu, pid = run_on_model_node(_where, ClusterSettings())

    assert not use_gpu
    assert pid != os.getpid()


def _double(value):
    return 2 * value


def _with_its_double(value):
    return [value, 2 * value]


def _add(one, other):
    return one + other


def _sum_from(start, values):
    return start + sum(values)


def _fill_disk(value):
    raise SystemicFault("disk", "full")


def _where(use_gpu):
    return use_gpu, os.getpid()
