"""hqlabel plan --sample: what is measured, what is carried over, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from hqlabel.jobs.commands.estimate import Measured, carry_over, sampled_plan
from hqlabel.pipeline.planning.make_plan import make_plan
from hqlabel.pipeline.settings import InputSettings
from tests.e2e import commands
from tests.e2e.scenes import DataSet, make_data_set
from tests.jobs.cli.test_cli import run


def arguments(data: DataSet, checkpoint: Path) -> list[str]:
    return [
        "--images", str(data.images), "--boxes", str(data.boxes), "--checkpoint", str(checkpoint),
        "--set", "model.dtype=float32",
    ]  # fmt: skip


def test_a_sample_is_spread_over_the_plan_in_units_for_every_actor(data_set: DataSet) -> None:
    plan = make_plan(
        InputSettings(images=str(data_set.images), boxes=str(data_set.boxes)), images_per_unit=64
    )

    small = sampled_plan(plan, 7, actors=1)
    whole = sampled_plan(plan, 1000, actors=1)

    ids = plan.table["image_id"].to_pylist()
    chosen = [ids.index(image_id) for image_id in small.table["image_id"].to_pylist()]
    assert chosen[0] == 0
    assert chosen[-1] == len(ids) - 1
    assert len(chosen) == 7
    assert max(np.diff(chosen)) <= 3
    assert whole.table.num_rows == 14
    assert len(set(whole.table["unit_id"].to_pylist())) >= 8
    assert small.sha256 != whole.sha256 != plan.sha256


def test_hours_money_and_bytes_follow_from_what_was_measured(data_set: DataSet) -> None:
    plan = make_plan(InputSettings(images=str(data_set.images), boxes=str(data_set.boxes)), images_per_unit=2)
    measured = Measured(
        images=10,
        images_per_unit=5,
        failed=0,
        boxes=30,
        masks=28,
        empty=2,
        start_s=36.0,
        images_per_s=0.01,
        row_bytes=5000,
        part_bytes=300,
        actors=4,
        gpus=4,
        device="cuda",
    )

    found = carry_over(measured, plan, left=14, usd_per_gpu_hour=2.5)

    assert found.hours == pytest.approx((36 + 1400) / 3600)
    assert found.gpu_hours == pytest.approx(4 * found.hours)
    assert found.usd == pytest.approx(10 * found.hours)
    assert found.bytes == 7300
    assert found.parts == 1
    assert carry_over(measured, plan, left=0, usd_per_gpu_hour=None).usd is None


@pytest.mark.slow
def test_a_sample_runs_the_whole_way_and_leaves_nothing(
    data_set: DataSet, checkpoint: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = sorted(os.listdir(tmp_path))

    done = commands.run(
        "plan", *arguments(data_set, checkpoint), "--output", str(tmp_path / "out"), "--sample", "14",
        "--json", "--set", "cost.usd_per_gpu_hour=3", "--set", "cluster.actors=1", TMPDIR=str(scratch),
    )  # fmt: skip

    found = json.loads(done.stdout)["estimate"]
    assert found["measured"]["images"] == 14
    assert found["measured"]["failed"] == 1, "the image that is cut"
    assert found["measured"]["images_per_s"] > 0
    assert found["hours"] > 0
    assert found["gpu_hours"] == 0
    assert found["usd"] == 0
    assert found["bytes"] > 1000
    assert sorted(os.listdir(tmp_path)) == before, "no output was made"
    assert not [name for name in os.listdir(scratch) if name.startswith("hqlabel-sample-")]


def test_a_sample_without_a_model_is_refused(data_set: DataSet) -> None:
    code, _, err = run(
        "plan", "--images", str(data_set.images), "--boxes", str(data_set.boxes), "--sample", "4"
    )

    assert code == 2
    assert "--checkpoint" in err


@pytest.mark.faults
@pytest.mark.timeout(2700)
def test_the_estimate_is_the_time_within_a_quarter(checkpoint: Path, tmp_path: Path) -> None:
    """Needs a machine that does nothing else meanwhile."""
    data = make_data_set(tmp_path / "data", images=3000, most_boxes=8)
    more = ["--output", str(tmp_path / "out"), "--set", "output.images_per_unit=16", "--json",
            "--set", "cluster.actors=null"]  # fmt: skip
    planned = commands.run("plan", *arguments(data, checkpoint), *more, "--sample", "400", timeout_s=1200)
    found = json.loads(planned.stdout)["estimate"]

    began = time.monotonic()
    done = commands.run("label", *arguments(data, checkpoint), *more, "--no-progress", timeout_s=1200)
    seconds = time.monotonic() - began

    size = json.loads(done.stdout)["bytes"]
    assert found["hours"] * 3600 == pytest.approx(seconds, rel=0.25)
    assert found["bytes"] == pytest.approx(size, rel=0.25)
