"""Row 8 on four nodes: the job spreads, uses a node that joins, and loses nothing with one that dies."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.clusters import REPOSITORY, cluster_of, free_port, head_with_job_api
from tests.faults.commands import Command, wait_for
from tests.faults.conftest import Record
from tests.pipeline.made_jobs import BOXES, noise, png

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
IMAGES = 240
SHARED = ("--set", "cluster.shared_paths=true")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Pictures and boxes, and the tables of an undisturbed run over them."""

    folder: Path

    def command(self, out: Path) -> Command:
        return Command(folder=self.folder, out=out)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    made = tmp_path_factory.mktemp("data")
    (made / "images").mkdir()
    ids = [f"{number:03}.png" for number in range(IMAGES)]
    for number, name in enumerate(ids):
        (made / "images" / name).write_bytes(png(noise(number)))
    pq.write_table(pa.table({"image_id": ids, "boxes": [BOXES] * IMAGES}), made / "boxes.parquet")
    return Data(folder=made)


def test_row_8_a_job_on_four_nodes_of_two_kinds_takes_up_one_and_loses_one(
    data: Data, tmp_path: Path, record: Record
) -> None:
    """Three nodes with a GPU, one with cores alone; a fourth GPU joins, then the first one dies for good."""
    gpu = {"cpus": 2, "gpus": 1}
    command = data.command(tmp_path / "out")
    with cluster_of(a=gpu, b=gpu, c=gpu, d={"cpus": 2}) as nodes:
        pool = ("--set", "cluster.actors=4", "--set", "cluster.actors_min=2")
        process = command.start("--ray-address", nodes.address, *SHARED, *pool, "--json", sleep_s=1.0)
        wait_for(lambda: len(nodes.model_nodes(command.trace)) >= 2, "work on two GPUs", 300)
        wait_for(lambda: command.units() >= 4, "four commits")
        nodes.add("e", **gpu)
        joined = time.monotonic()
        wait_for(lambda: nodes.model_nodes(command.trace)["e"] > 0, "work on the node that joined", 200)
        joined_s = time.monotonic() - joined
        wait_for(lambda: command.units() >= 8, "eight commits")
        spread, models = nodes.prepared(), nodes.model_nodes(command.trace)
        nodes.kill("a")
        struck, committed = time.monotonic(), command.units()
        recovered = wait_for(lambda: command.units() > committed, "another commit")
        out, err = process.communicate(timeout=500)
        whole_s = time.monotonic() - struck
    assert process.returncode == 0, out + err
    ids = command.table("images")["image_id"].to_pylist()
    assert sorted(ids) == [f"{number:03}.png" for number in range(IMAGES)]
    assert json.loads(out)["counts"]["status"] == {"labelled": IMAGES}
    assert committed < IMAGES // 4, "it was over before the node was lost"
    assert sum(number > 0 for number in spread.values()) >= 4, f"units prepared by node: {spread}"
    assert len(models) >= 3, f"images by the node of their model: {models}"
    repeated = command.calls() - IMAGES
    figures = {
        "units prepared by node": spread,
        "images by the node of their model": dict(models),
        "seconds until the joined node's model worked": round(joined_s, 1),
        "seconds from the loss to the next commit": round(recovered, 1),
        "seconds from the loss to the end": round(whole_s, 1),
        "images given to a model again": repeated,
    }
    sys.stderr.write(f"{json.dumps(figures)}\n")
    record(8, fault="one of four nodes SIGKILL, for good, after a fifth joined", landed=1, repeated=repeated,
           recover_s=recovered, code="0", lost=IMAGES - len(set(ids)),
           doubled=len(ids) - len(set(ids)))  # fmt: skip


def test_a_node_whose_environment_loosens_torch_is_refused_by_name(
    data: Data, tmp_path: Path, record: Record
) -> None:
    command = data.command(tmp_path / "out")
    with cluster_of() as nodes:
        nodes.add("loose", cpus=2, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
        said = command.run("--ray-address", nodes.address, *SHARED, code=5)
    assert "environment: a worker on" in said
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in said
    assert command.units() == 0
    record(52, fault="a node with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", landed=1, code="5")


@pytest.fixture
def head(aws_environment: None):
    with head_with_job_api(free_port(), free_port()) as started:
        yield started


def test_a_submitted_job_brings_its_code_says_how_far_it_is_and_its_exit_code_arrives(
    head, data: Data, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = tmp_path / "out"
    label = [
        *("env", "STUB_SLEEP_S=0.2", sys.executable, "-m", "tests.faults.stub_cli", "label"),
        *("--output", str(out)),
        *("--images", str(data.folder / "images"), "--boxes", str(data.folder / "boxes.parquet")),
        *("--set", "model.dtype=float32", "--set", "output.images_per_unit=4", *SHARED),
    ]

    done = head.submit(*label, folder=REPOSITORY, cwd=elsewhere)
    failed = head.submit(*label, "--limit", "3", folder=REPOSITORY, cwd=elsewhere)

    assert done.returncode == 0, done.stdout
    assert re.search(r"\d\d:\d\d:\d\d  [\d,]+ of 240 images .* images/s", done.stdout), done.stdout
    assert "done: 240 images" in done.stdout
    assert (failed.returncode, "exit code 4" in failed.stdout) == (1, True), failed.stdout
    token = head.environment["RAY_AUTH_TOKEN"]
    jobs = json.loads(head.get("/api/jobs/", token)[1])
    assert sorted(job["driver_exit_code"] for job in jobs) == [0, 4]
    assert {job["driver_node_id"] for job in jobs} == {head_node_id(head, token)}, "a driver not on the head"
    assert head.get("/api/jobs/")[0] == 401
    assert head.get("/api/jobs/", "0" * 64)[0] == 403


def head_node_id(head, token: str) -> str:
    nodes = json.loads(head.get("/nodes?view=summary", token)[1])["data"]["summary"]
    [found] = [node["raylet"]["nodeId"] for node in nodes if node["raylet"].get("isHeadNode")]
    return found
