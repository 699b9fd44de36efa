"""Rows 1, 2, 4, 8, 11, 14, 15, 40, 45: the real command on a real Ray whose processes end or do not fit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.soak import Soak, Wanted, cluster_of_nodes, is_actor
from tests.faults.commands import IMAGES, REPOSITORY, Command, alive, make_folder, wait_for
from tests.faults.conftest import Record
from tests.pipeline.made_jobs import png

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[str]:
    command = Command(folder=folder, out=folder / "undisturbed")
    command.run()
    assert command.calls() == IMAGES
    return command.digests()


@pytest.fixture
def command(folder: Path, tmp_path: Path) -> Command:
    return Command(folder=folder, out=tmp_path / "out")


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_rows_1_and_2_a_driver_that_is_ended_in_the_middle(
    sign: signal.Signals, command: Command, wanted: list[str], record: Record
) -> None:
    process = command.start(sleep_s=0.2)
    wait_for(lambda: command.units() >= 2, "two commits")
    family = psutil.Process(process.pid).children(recursive=True)
    sent = time.monotonic()
    process.send_signal(sign)
    process.communicate(timeout=60)
    ended_s = time.monotonic() - sent
    graceful = sign in (signal.SIGTERM, signal.SIGINT)
    assert process.returncode == (130 if graceful else -sign)
    if graceful:
        assert ended_s < 3.0
    committed = command.units()
    assert committed < IMAGES // 4, "it was over before the signal came"
    again = command.start(sleep_s=0)
    recovered = wait_for(lambda: command.units() > committed, "another commit")
    out, err = again.communicate(timeout=400)
    assert again.returncode == 0, out + err
    wait_for(lambda: not any(alive(one) for one in family), "the end of the old workers", 60)
    assert command.digests() == wanted
    repeated = command.calls() - IMAGES
    assert repeated <= 3 * 4 + 1, "more than what a model process may have in work"
    record(1 if sign == signal.SIGKILL else 2, fault=f"driver {sign.name}; it ended {ended_s:.1f} s later",
           landed=1, repeated=repeated, recover_s=recovered, code=f"{process.returncode}, then 0",
           **command.lost_and_doubled())  # fmt: skip


def test_row_4_a_model_process_killed_twice(command: Command, wanted: list[str], record: Record) -> None:
    process = command.start(sleep_s=0.2)
    landed, recover = 0, []
    for least in (1, 4):
        wait_for(lambda: command.units() >= least, "a commit")  # noqa: B023
        actors = [one for one in psutil.Process(process.pid).children(recursive=True) if is_actor(one)]
        known, units = len(list(command.trace.iterdir())), command.units()
        for actor in actors:
            actor.kill()
            landed += 1
        recover.append(
            wait_for(
                lambda: len(list(command.trace.iterdir())) > known and command.units() > units,  # noqa: B023
                "work of a new process",
            )
        )
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert command.digests() == wanted
    repeated = command.calls() - IMAGES
    record(4, fault="model process SIGKILL in mid-unit", landed=landed, repeated=repeated,
           recover_s=max(recover), code="0", **command.lost_and_doubled())  # fmt: skip


def test_row_5_workers_of_all_stages_killed_at_random(
    command: Command, wanted: list[str], record: Record
) -> None:
    """Tasks that fetch, decode and commit die too; Ray runs them again, and a commit twice is one commit."""
    process = command.start(sleep_s=0.1)
    wait_for(lambda: command.units() >= 1, "a commit")
    landed = 0
    for _ in range(6):
        workers = [one for one in psutil.Process(process.pid).children(recursive=True) if is_task(one)]
        if process.poll() is None and workers:
            workers[landed % len(workers)].kill()
            landed += 1
        time.sleep(0.4)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert command.digests() == wanted
    record(4, 5, fault="worker of any stage SIGKILL", landed=landed, repeated=command.calls() - IMAGES,
           code="0", **command.lost_and_doubled())  # fmt: skip


@pytest.mark.parametrize("failpoint", ["commit.created=kill@3", "unit.segmented=kill@4"])
def test_row_17_every_worker_dies_at_a_fail_point_again_and_again(
    failpoint: str, command: Command, wanted: list[str], record: Record
) -> None:
    """Each process of the stage is killed at its third or fourth unit, as long as there are any.

    A unit that was committed by a process that died right afterwards is told as done before.
    """
    process = command.start("--json", sleep_s=0, HQLABEL_FAILPOINT=failpoint)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert command.digests() == wanted
    again = command.calls() - IMAGES
    landed = again // 4 if "segmented" in failpoint else json.loads(out)["this_run"]["repeated"] // 4
    record(17, fault=f"{failpoint} in every worker of a real Ray", landed=landed, repeated=again,
           code="0", **command.lost_and_doubled())  # fmt: skip


def is_task(process: psutil.Process) -> bool:
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return title.startswith("ray::MapBatches")


def test_row_11_a_lost_head_ends_the_driver_and_another_cluster_goes_on(
    command: Command, wanted: list[str], record: Record
) -> None:
    shared = ("--set", "cluster.shared_paths=true", "--set", "cluster.cpus_per_actor=0.5")
    shared = (*shared, "--set", "cluster.decode_cpus=0.4")
    with cluster_of_nodes() as nodes:
        process = command.start("--ray-address", nodes.address, *shared, sleep_s=0.3)
        wait_for(lambda: command.units() >= 1, "a commit")
        struck = time.monotonic()
        nodes.kill_head()
        out, err = process.communicate(timeout=300)
        seconds = time.monotonic() - struck
    assert process.returncode == 5, out + err
    assert "hqlabel: resources: Ray's" in err
    assert "Traceback" not in err
    committed = command.units()
    assert committed < IMAGES // 4
    command.run()
    assert command.digests() == wanted
    record(11, fault="GCS of the cluster SIGKILL", landed=1, repeated=command.calls() - IMAGES,
           recover_s=seconds, code=f"{process.returncode}, then 0", **command.lost_and_doubled())  # fmt: skip


@pytest.mark.parametrize("starts", ["always", "twice"])
def test_row_14_a_model_that_cannot_be_made(
    starts: str, command: Command, wanted: list[str], record: Record
) -> None:
    """For ever: the cause is said and the job ends. At the first two starts only: nobody notices."""
    marks = command.out.parent / "starts"
    marks.mkdir()
    began = time.monotonic()
    if starts == "twice":
        command.run(STUB_FAILS_TO_START=f"2:{marks}")
        assert command.digests() == wanted
        code = "0"
    else:
        said = command.run(STUB_FAILS_TO_START=f"99:{marks}", code=5)
        assert "the stub's weights are broken" in said
        assert command.units() == 0
        code = "5"
    landed = len(list(marks.iterdir()))
    seconds = time.monotonic() - began
    record(14, fault=f"model's start raises {starts}", landed=landed, recover_s=seconds, code=code)


def test_row_15_what_does_not_fit_is_refused_at_once(command: Command, record: Record) -> None:
    began = time.monotonic()
    said = command.run("--set", "cluster.cpus=1", "--set", "cluster.cpus_per_actor=4", code=4)
    seconds = time.monotonic() - began
    assert "4 CPU cores" in said
    assert not command.out.exists() or command.units() == 0
    record(15, fault="an actor of 4 cores on a Ray of 1", landed=1, recover_s=seconds, code="4")


OBJECT_STORE = """
import sys, pickle
import numpy as np
import ray
from dataclasses import replace
from pathlib import Path
from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.ray_execution.chain import run_units
from hqlabel.pipeline.settings import ClusterSettings
job, spill = pickle.loads(Path(sys.argv[1]).read_bytes()), sys.argv[2]
limit = {} if spill == "-" else {"object_store_memory": 80 * 2**20, "object_spilling_directory": spill}
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, **limit)
held = []
while limit:
    try:
        held.append(ray.put(np.ones(16 * 2**20, np.uint8)))
    except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError) as error:
        print(f"full after {len(held)} objects of 16 MiB: {type(error).__name__}")
        break
try:
    run_units(job.unit_ids, job.context, ClusterSettings(), epoch=1, on_outcome=lambda _: None,
              should_stop=lambda: False)
except SystemicFault as fault:
    print(f"hqlabel: {fault}", file=sys.stderr)
    sys.exit(fault.exit_code)
"""


def test_row_45_a_full_object_store_slows_or_stops_the_job(tmp_path: Path, record: Record) -> None:
    """Decoded units of 24 MiB over a store of 80 MiB that may spill 30 MiB, all of it taken before."""
    import pickle

    import numpy as np
    from PIL import Image

    from hqlabel.pipeline.job_context import Weights
    from hqlabel.pipeline.settings import Limits
    from hqlabel.pipeline.storage.output_store import Store
    from hqlabel.pipeline.tables.unit_files import list_committed
    from tests.pipeline.made_jobs import make_job

    spill = tmp_path / "spill"
    spill.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(spill)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    rng = np.random.default_rng(0)
    pictures = {
        f"{n:02}.png": png(Image.fromarray(rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)))
        for n in range(24)
    }
    job = make_job(
        tmp_path / "job", pictures, images_per_unit=8, lineage={"stub_sleep_s": "0.4"},
        limits=Limits(segment_timeout_s=60),
        weights=Weights(source="none", sha256="0" * 64, architecture="stub", input_side=1024),
    )  # fmt: skip
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(job))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_worker_niceness": "0"}
    began = time.monotonic()
    try:
        command = [sys.executable, "-c", OBJECT_STORE, str(tmp_path / "job.pickle"), str(spill)]
        tight = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
    finally:
        subprocess.run(["umount", "-l", str(spill)], check=False)
    seconds = time.monotonic() - began
    assert "full after" in tight.stdout, tight.stderr[-2000:]
    assert tight.returncode in (0, 5), tight.stderr[-2000:]
    if tight.returncode == 5:
        assert "hqlabel: disk:" in tight.stderr
    store = Store(job.context.output)
    command = [sys.executable, "-c", OBJECT_STORE, str(tmp_path / "job.pickle"), "-"]
    left = set(job.unit_ids) - set(list_committed(store))
    if left:
        subprocess.run(command, env=environment, check=True, timeout=400)
    assert sorted(list_committed(store)) == job.unit_ids
    record(45, fault="object store of 80 MiB and its 30 MiB to spill full", landed=1,
           recover_s=seconds, code=f"{tight.returncode}, then 0")  # fmt: skip


def test_rows_1_4_8_16_a_soak_of_twenty_kills(tmp_path: Path, record: Record) -> None:
    """Drivers, model processes and nodes, at random moments, over a job of 3,000 images."""
    wanted = Wanted(drivers=8, actors=8, nodes=4)
    soak = Soak(tmp_path / "state", images=3_000)
    totals = soak.run(seconds=840, wanted=wanted)
    assert totals.sound, totals
    assert totals.rounds >= 1, totals
    assert totals.kills >= 20, totals
    recover = {kind: max(times) for kind, times in totals.recover_s.items() if times}
    repeated = totals.calls - totals.images_done
    for row, kind, landed in (
        (1, "driver", totals.driver_kills),
        (4, "actor", totals.actor_kills),
        (8, "node", totals.node_kills),
        (16, "", totals.kills),
    ):
        record(
            row, fault=f"soak: {kind or 'all'} kills", landed=landed, lost=totals.lost,
            doubled=totals.doubled, repeated=None if kind else repeated, recover_s=recover.get(kind),
            code="same bytes",
        )  # fmt: skip
