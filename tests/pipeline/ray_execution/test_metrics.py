"""What each stage adds to the metrics, and that a running job's numbers reach Prometheus' text."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections import defaultdict

import pytest

from hqlabel.pipeline.job_context import UnitOutcome
from hqlabel.pipeline.ray_execution import metrics
from hqlabel.pipeline.ray_execution.chain import run_units
from hqlabel.pipeline.settings import ClusterSettings
from hqlabel.pipeline.stages.rows_between_stages import UnitRow
from tests.pipeline.made_jobs import BOXES, make_job, noise, png
from tests.pipeline.made_units import labelled, planned_box, planned_image

IMAGES = [planned_image("a", [planned_box(), planned_box()]), planned_image("b", [planned_box()])]
UNIT = UnitRow(unit_id=3, images=tuple(labelled(image) for image in IMAGES))


def outcome(**fields) -> UnitOutcome:
    counts = {"images": 4, "labelled": 2, "no_boxes": 0, "failed": 2, "instances": 9, "bytes": 700}
    values = {"unit_id": 3, "generation": 0, "repeated": False, "failed_by_code": {"empty": 2}, **counts}
    return UnitOutcome(**(values | fields))


def added(samples) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for sample in samples:
        assert set(sample.tags) == set(metrics.METRICS[sample.name].tags), sample
        found[" ".join([sample.name.removeprefix("hqlabel_"), *sample.tags.values()])] += sample.value
    return dict(found)


def test_a_prepared_unit_adds_bytes_and_the_times_of_its_images():
    assert added(metrics.of_prepared(UNIT, 2.5)) == {
        "stage_seconds prepare": 2.5,
        "read_bytes": 200,
        "image_seconds fetch": 0.002,
        "image_seconds decode": 0.004,
    }


def test_a_segmented_unit_adds_the_time_that_the_device_worked():
    assert added(metrics.of_segmented(UNIT, 1.5)) == {
        "stage_seconds segment": 1.5,
        "device_busy_seconds": 0.006,
        "image_seconds segment": 0.006,
    }


def test_a_commit_adds_images_by_status_and_failures_by_code():
    assert added(metrics.of_committed(UNIT, outcome(), 0.5)) == {
        "stage_seconds commit": 0.5,
        "units": 1,
        "masks": 3,
        "written_bytes": 700,
        "images labelled": 2,
        "images failed": 2,
        "failed_images empty": 2,
    }


def test_a_unit_that_was_there_before_adds_no_images_again():
    assert added(metrics.of_committed(UNIT, outcome(repeated=True), 0.5)) == {
        "stage_seconds commit": 0.5,
        "repeated_units": 1,
    }


def test_a_fault_and_the_queues_are_told():
    assert added(metrics.of_fault("disk")) == {"faults disk": 1}
    assert added(metrics.of_queues({"prepare": 4, "segment": 0}, {"running": 2})) == {
        "queue_units prepare": 4,
        "queue_units segment": 0,
        "model_processes running": 2,
    }
    assert added(metrics.of_progress(7)) == {"units_left": 7}


# ---------------------------------------------------------------------------------------------
# A real job
# ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(300)
def test_a_running_jobs_metrics_move_in_what_prometheus_scrapes(tmp_path):
    gate = tmp_path / "gate"
    pictures = {f"{i:02}.png": png(noise(i)) for i in range(24)} | {"05.png": b"<html>", "09.png": b""}
    job = make_job(
        tmp_path, pictures, {"03.png": []}, images_per_unit=2, run_id=f"scraped-{time.time_ns()}",
        lineage={"stub_sleep_s": "0.02"},
    )  # fmt: skip
    counted = threading.Event()

    def hold_after_four(outcome_: UnitOutcome) -> None:
        seen.append(outcome_)
        if len(seen) == 4:
            counted.set()
            while not gate.exists():
                time.sleep(0.1)

    seen: list[UnitOutcome] = []
    given = (job.unit_ids, job.context, ClusterSettings(actors=1))
    run = threading.Thread(target=run_units, args=given, kwargs={
        "epoch": 1, "on_outcome": hold_after_four, "should_stop": lambda: False,
    })  # fmt: skip
    run.start()
    assert counted.wait(200)
    during = scraped_until(job, lambda now: now.get("ray_hqlabel_units_left", -1) == 8)
    gate.touch()
    run.join(200)
    after = scraped_until(
        job, lambda now: now["ray_hqlabel_units_left"] == 0 and total(now, "ray_hqlabel_images") == 24
    )

    assert 0 < total(during, "ray_hqlabel_images")
    assert during["ray_hqlabel_model_processes{state=running}"] == 1
    assert "ray_hqlabel_queue_units{stage=segment}" in during
    assert {name: value for name, value in after.items() if "images" in name} == {
        "ray_hqlabel_images_total{status=labelled}": 21,
        "ray_hqlabel_images_total{status=no_boxes}": 1,
        "ray_hqlabel_images_total{status=failed}": 2,
        "ray_hqlabel_failed_images_total{code=not_an_image}": 1,
        "ray_hqlabel_failed_images_total{code=empty}": 1,
    }
    assert after["ray_hqlabel_units_total"] == 12
    assert after["ray_hqlabel_masks_total"] == 21 * len(BOXES)
    assert after["ray_hqlabel_written_bytes_total"] == sum(one.bytes for one in seen)
    assert after["ray_hqlabel_read_bytes_total"] > 10_000
    assert after["ray_hqlabel_device_busy_seconds_total"] >= 21 * 0.02
    for stage in ("prepare", "segment", "commit"):
        assert after[f"ray_hqlabel_stage_seconds_count{{stage={stage}}}"] == 12
    assert after["ray_hqlabel_units_left"] == 0
    named = {re.sub(r"^ray_|_total$|(_bucket|_count|_sum)$", "", key.split("{")[0]) for key in after}
    assert named >= set(metrics.METRICS) - {"hqlabel_faults", "hqlabel_repeated_units"}


def scraped_until(job, enough, timeout_s: float = 90) -> dict[str, float]:
    """The job's numbers by name and tags, as soon as they are enough; Ray hands them on every few seconds."""
    deadline = time.monotonic() + timeout_s
    while not enough(now := scrape(job.context.run_id)):
        assert time.monotonic() < deadline, now
        time.sleep(0.5)
    return now


def scrape(run_id: str) -> dict[str, float]:
    import ray

    found: dict[str, float] = defaultdict(float)
    for node in ray.nodes():
        place = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(place, timeout=10) as reply:
            text = reply.read().decode()
        for name, tags, value in re.findall(r"^(ray_hqlabel_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            known = dict(re.findall(r'(\w+)="([^"]*)"', tags))
            if known.get(metrics.RUN) == run_id:
                mine = [f"{k}={known[k]}" for k in ("status", "code", "stage", "step", "state") if k in known]
                found[name + (f"{{{','.join(mine)}}}" if mine else "")] += float(value)
    return dict(found)


def total(now: dict[str, float], name: str) -> float:
    return sum(value for key, value in now.items() if key.startswith(f"{name}_total"))
