"""Jobs that are killed, refused or fed broken files, and what is in the table at the end."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e import commands
from tests.e2e.scenes import DataSet, make_data_set, small_checkpoint

UNITS = ("--set", "output.images_per_unit=4", "--set", "model.dtype=float32", "--set", "cluster.actors=1")


def arguments(data: DataSet, checkpoint: Path, output: Path, *extra: str) -> list[str]:
    inputs = ["--images", str(data.images), "--boxes", str(data.boxes), "--checkpoint", str(checkpoint)]
    return ["label", *inputs, "--output", str(output), *UNITS, *extra]


@pytest.fixture(scope="session")
def undisturbed(few_images: DataSet, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job that nothing disturbs, not even Ray."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    commands.label_here(*arguments(few_images, checkpoint, output))
    return output


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 200) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)


def assert_same_tables(output: Path, wanted: Path) -> None:
    for ours, theirs in zip(commands.tables(output), commands.tables(wanted), strict=True):
        assert commands.lasting(ours).equals(commands.lasting(theirs))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "planned": lambda output: (output / "plan").is_dir(),
    "owned": lambda output: (output / "owner").is_dir(),
    "first unit": lambda output: len(list((output / "units").glob("*.parquet"))) >= 1,
    "third unit": lambda output: len(list((output / "units").glob("*.parquet"))) >= 3,
    "last unit": lambda output: len(list((output / "units").glob("*.parquet"))) >= 6,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "sign"),
    [
        ("first unit", signal.SIGKILL),
        pytest.param("third unit", signal.SIGTERM, marks=pytest.mark.faults),
    ],
)
def test_a_killed_job_started_again_gives_the_undisturbed_tables(
    moment: str,
    sign: signal.Signals,
    few_images: DataSet,
    checkpoint: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    kill_and_resume(moment, sign, few_images, checkpoint, undisturbed, tmp_path / "out")


@pytest.mark.faults
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
def test_every_moment_of_a_kill(
    moment: str,
    sign: signal.Signals,
    few_images: DataSet,
    checkpoint: Path,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    kill_and_resume(moment, sign, few_images, checkpoint, undisturbed, tmp_path / "out")


def kill_and_resume(
    moment: str, sign: signal.Signals, data: DataSet, checkpoint: Path, undisturbed: Path, output: Path
) -> None:
    process = commands.start(*arguments(data, checkpoint, output))
    wait_for(lambda: MOMENTS[moment](output), moment)
    sent = time.monotonic()
    process.send_signal(sign)
    process.communicate(timeout=60)
    ended_s = time.monotonic() - sent
    assert process.returncode == (-signal.SIGKILL if sign == signal.SIGKILL else 130), "no fault landed"
    if sign != signal.SIGKILL:
        assert ended_s < 3
    committed = commands.contents(output / "units") if (output / "units").is_dir() else {}
    said = commands.run(*arguments(data, checkpoint, output)).stderr

    assert_same_tables(output, undisturbed)
    after = commands.contents(output / "units")
    assert all(after[name] == was for name, was in committed.items()), "a committed unit was written again"
    assert begun_before(said) == done_again(output)


def begun_before(said: str) -> int:
    """How many images a summary calls begun before and done again."""
    found = re.search(r"(\d+) of them begun before and done again", said)
    return int(found[1]) if found else 0


def done_again(output: Path) -> int:
    """How many images of the published table were begun more than once."""
    images, _ = commands.tables(output)
    return sum(attempts > 1 for attempts in images["attempts"].to_pylist())


@pytest.mark.slow
def test_another_model_box_file_or_mask_setting_is_refused_by_name(
    few_images: DataSet, checkpoint: Path, undisturbed: Path, tmp_path: Path
) -> None:
    before = commands.contents(undisturbed)
    other = small_checkpoint(tmp_path / "other", seed=1)
    boxes = tmp_path / "boxes.parquet"
    pq.write_table(pq.read_table(few_images.boxes).slice(1), boxes)
    cases = {
        "weights": arguments(few_images, other, undisturbed),
        "boxes": [str(boxes) if part == str(few_images.boxes) else part
                  for part in arguments(few_images, checkpoint, undisturbed)],
        "hq_token_only": arguments(few_images, checkpoint, undisturbed, "--set", "model.hq_token_only=true"),
    }  # fmt: skip
    for field, case in cases.items():
        result = commands.run_here(*case, code=4)
        assert field in result.stderr, f"{field} is not named in: {result.stderr}"
        assert "Traceback" not in result.stderr
    owners = {name for name in commands.contents(undisturbed) if name.startswith("owner/")}
    assert {k: v for k, v in commands.contents(undisturbed).items() if k not in owners} == {
        k: v for k, v in before.items() if k not in owners
    }


@pytest.mark.slow
def test_a_new_threshold_needs_only_publish(undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(undisturbed, copy)
    commands.run_here("publish", "--output", str(copy), "--set", "filter.min_area_px=200")
    _, instances = commands.tables(copy)
    _, unfiltered = commands.tables(undisturbed)

    rejected = [r for r in instances.to_pylist() if r["reject_reason"] == "area"]
    assert rejected
    assert all(r["area"] < 200 and not r["accepted"] for r in rejected)
    marks = ["accepted", "reject_reason"]
    assert (
        commands.lasting(instances)
        .drop_columns(marks)
        .equals(commands.lasting(unfiltered).drop_columns(marks))
    )
    assert commands.unit_names(copy) == commands.unit_names(undisturbed)


@pytest.mark.slow
def test_broken_images_end_as_their_rows_say_and_retry_mends_only_them(
    checkpoint: Path, tmp_path: Path
) -> None:
    data = make_data_set(tmp_path / "data", images=12, most_boxes=4)
    names = [name for name, boxes in sorted(data.boxes_by_id.items()) if len(boxes)]
    table = pq.read_table(data.boxes).to_pylist()
    by_id = {row["image_id"]: row for row in table}
    by_id[names[4]]["boxes"][0][2] = float("nan")
    rows = [{**row, "image_uri": f"images/{row['image_id']}"} for row in by_id.values()]
    schema = pq.read_schema(data.boxes).append(pa.field("image_uri", pa.string()))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), data.boxes)
    good = (data.images / names[1]).read_bytes()
    (data.images / names[0]).unlink()
    (data.images / names[1]).write_bytes(good[: len(good) // 2])
    output = tmp_path / "out"
    command = ["label", "--boxes", str(data.boxes), "--checkpoint", str(checkpoint), "--output", str(output),
               *UNITS]  # fmt: skip
    text = commands.label_here(*command, code=3).stderr
    assert "over the failure budget: " in text
    assert "allow more: --set limits.max_failure_rate=0." in text
    images, instances = commands.tables(output)
    status = {r["image_id"]: (r["status"], r["error_code"]) for r in images.to_pylist()}
    assert status[names[0]] == ("failed", "not_found")
    assert status[names[1]] == ("failed", "truncated")
    assert status[names[4]][0] in ("labelled", "failed")
    nan_rows = [r for r in instances.to_pylist() if r["image_id"] == names[4] and r["instance_index"] == 0]
    assert [r["reject_reason"] for r in nan_rows] == ["box_not_finite"] or status[names[4]][
        1
    ] == "no_usable_box"
    assert "not_found" in text
    assert "truncated" in text

    (data.images / names[1]).write_bytes(good)
    before = {r["image_id"]: r for r in commands.lasting(images).to_pylist()}
    again = ("retry", "--output", str(output), "--code", "truncated", "--checkpoint", str(checkpoint))
    commands.label_here(*again, "--allow-root", str(data.images), code=3)  # one is still missing
    again, _ = commands.tables(output)
    changed = [r["image_id"] for r in commands.lasting(again).to_pylist() if r != before[r["image_id"]]]
    assert changed == [names[1]]
    assert {r["image_id"]: r["status"] for r in again.to_pylist()}[names[1]] == "labelled"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["checkpoint", "bucket", "output", "foreign"])
def test_what_cannot_work_is_refused_before_any_work(
    case: str, few_images: DataSet, checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    output, weights, extra = tmp_path / "out", checkpoint, []
    if case == "checkpoint":
        weights = tmp_path / "missing"
    if case in ("bucket", "output"):
        place = ["--images" if case == "bucket" else "--output", "s3://no-such-bucket/there"]
        moto = request.getfixturevalue("moto_s3")
        extra = [*place, "--set", f"storage.s3.endpoint_url={moto.endpoint}"]
    if case == "foreign":
        output.mkdir()
        (output / "diary.txt").write_text("not yours")
    command = arguments(few_images, weights, output)
    if extra:
        at = command.index(extra[0])
        del command[at : at + 2]
    result = commands.run_here(*command, *extra, code=4)

    assert "Traceback" not in result.stderr
    sentence = [line for line in result.stderr.splitlines() if line.startswith("hqlabel:")]
    assert len(sentence) == 1
    assert [p.name for p in output.rglob("*")] == (["diary.txt"] if case == "foreign" else [])


@pytest.mark.faults
def test_an_actor_killed_in_mid_unit_costs_nothing(
    few_images: DataSet, checkpoint: Path, undisturbed: Path, tmp_path: Path
) -> None:
    import psutil

    output = tmp_path / "out"
    process = commands.start(*arguments(few_images, checkpoint, output))
    wait_for(lambda: MOMENTS["first unit"](output), "first unit")
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if _is_actor(p)]
    assert workers, "no actor process was found to kill"
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    out, err = process.communicate(timeout=240)

    assert process.returncode == 0, out + err
    assert_same_tables(output, undisturbed)
    assert begun_before(err) == done_again(output)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_lost_node_costs_nothing_but_time(
    few_images: DataSet, checkpoint: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    output = tmp_path / "out"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **_QUICK_TO_NOTICE})
    try:
        node = cluster.add_node(num_cpus=2)
        process = commands.start(
            *arguments(few_images, checkpoint, output, "--set", "cluster.actors=2"),
            "--ray-address", cluster.address, "--set", "cluster.shared_paths=true",
        )  # fmt: skip
        try:
            wait_for(lambda: MOMENTS["first unit"](output) or process.poll() is not None, "first unit")
            before = len(commands.unit_names(output))
            cluster.remove_node(node, allow_graceful=False)
            out, err = process.communicate(timeout=400)
        finally:
            process.kill()
    finally:
        cluster.shutdown()

    assert process.returncode == 0, out + err
    assert 1 <= before < 6, "the node was lost after the work"
    assert_same_tables(output, undisturbed)
    assert begun_before(err) == done_again(output)


# A node that is silent for five seconds is lost; Ray's own settings wait half a minute.
_QUICK_TO_NOTICE = {
    "_system_config": {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 5,
    }
}


def _is_actor(process: object) -> bool:
    import psutil

    assert isinstance(process, psutil.Process)
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return title.startswith("ray::") and "egment" in title
