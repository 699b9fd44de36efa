"""A job over tiny images whose drivers, model processes and nodes are killed until it has had enough.

    python -m benchmarks.soak STATE --images 20000 --seconds 400

Rounds: one job of all images each, driven by `hqlabel label` with a stub of a model on a Ray cluster of
two worker nodes on this machine. A driver is killed after a few commits and started again until the
round is complete; then the tables are held against those of an undisturbed run. STATE keeps the totals
and the unfinished round, so the next call goes on where this one ended. Prints the totals as JSON and
ends with 1 when anything was lost, doubled or different, or when no fault landed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
PICTURES = 16
FAST_DEATH_NOTICE = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
    "gcs_rpc_server_reconnect_timeout_s": 8,
}
STALL_S = 180.0


@dataclass(kw_only=True)
class Totals:
    """What was done so far, over all calls. `calls`: images that went through the stub, blanks too."""

    images: int = 0
    driver_kills: int = 0
    actor_kills: int = 0
    node_kills: int = 0
    rounds: int = 0
    images_done: int = 0
    calls: int = 0
    lost: int = 0
    doubled: int = 0
    different_rounds: int = 0
    bad_ends: list[str] = field(default_factory=list)
    recover_s: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        """All kills that hit a living process."""
        return self.driver_kills + self.actor_kills + self.node_kills

    @property
    def sound(self) -> bool:
        """Whether nothing went wrong in the rounds that were finished."""
        return not (self.lost or self.doubled or self.different_rounds or self.bad_ends)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Kills at which the soak is done; it goes on to the end of the round."""

    drivers: int = 60
    actors: int = 60
    nodes: int = 20

    def reached(self, totals: Totals) -> bool:
        """Whether there were as many of each kind."""
        done = (totals.driver_kills, totals.actor_kills, totals.node_kills)
        return all(
            n >= wanted for n, wanted in zip(done, (self.drivers, self.actors, self.nodes), strict=True)
        )


def main() -> None:
    """Go on with the soak in STATE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument(
        "--kills", type=int, nargs=3, default=(60, 60, 20), metavar=("DRIVER", "ACTOR", "NODE")
    )
    given = parser.parse_args()
    wanted = Wanted(drivers=given.kills[0], actors=given.kills[1], nodes=given.kills[2])
    totals = Soak(given.state, images=given.images).run(seconds=given.seconds, wanted=wanted)
    shown = asdict(totals) | {
        "recover_s": {
            kind: {"median": round(statistics.median(times), 1), "max": round(max(times), 1)}
            for kind, times in totals.recover_s.items()
            if times
        }
    }
    print(json.dumps(shown, indent=1))
    sys.exit(0 if totals.sound and totals.kills else 1)


class Soak:
    """The soak whose state is in a folder."""

    def __init__(self, state: Path, *, images: int, images_per_unit: int = 64) -> None:
        self.state = state.resolve()
        self.images_per_unit = images_per_unit
        self.state.mkdir(parents=True, exist_ok=True)
        self.totals = self._load(images)
        self.out, self.trace = self.state / "round" / "out", self.state / "round" / "trace"
        if not (self.state / "inputs" / "boxes.parquet").exists():
            _write_inputs(self.state / "inputs", images)

    def run(self, *, seconds: float, wanted: Wanted) -> Totals:
        """The totals, after the wanted kills and the end of their round, or after so many seconds."""
        began = time.monotonic()
        with cluster_of_nodes() as nodes:
            if not (self.state / "reference.json").exists():
                self._make_reference(nodes.address)
            # A bad end is the verdict: the same start would only end in the same way again.
            while time.monotonic() - began < seconds and self.totals.sound and not self._finished(wanted):
                self._drive(nodes, rest=wanted.reached(self.totals))
        self.totals.seconds += time.monotonic() - began
        self._save()
        return self.totals

    def _finished(self, wanted: Wanted) -> bool:
        return wanted.reached(self.totals) and not self.out.exists()

    # -- one driver ------------------------------------------------------------------------------

    def _drive(self, nodes: _Nodes, *, rest: bool) -> None:
        """One driver, from its start to its death or, with `rest`, to its own end."""
        rng = random.Random()
        self.trace.mkdir(parents=True, exist_ok=True)
        process = self._start(nodes.address, self.out, self.trace)
        try:
            if not rest:
                self._disturb(process, nodes, rng)
            code = _end_of(process, STALL_S * 4)
        finally:
            process.kill()
        if code == 0:
            self._close_round()
        elif code != -signal.SIGKILL:
            said = (self.state / "driver.log").read_text()[-600:]
            self.totals.bad_ends.append(f"exit code {code}: {said}")
        self._save()

    def _disturb(self, process: subprocess.Popen[bytes], nodes: _Nodes, rng: random.Random) -> None:
        """Kills at random moments of one driver's life; the driver itself last."""
        if rng.random() < 0.45:  # in its start: while it reads, joins, plans, starts its model
            time.sleep(rng.uniform(0.5, 12.0))
        elif self._wait_units(process, 1):
            kinds = rng.choices(("actor", "node", ""), weights=(6, 2, 1), k=3)
            for kind in filter(None, kinds):
                self._timed(kind, process, _kill_actor if kind == "actor" else nodes.kill_one)
            time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            process.kill()
            if process.wait() == -signal.SIGKILL:
                self.totals.driver_kills += 1
                self._since_kill = time.monotonic()

    _since_kill: float | None = None

    def _timed(self, kind: str, process: subprocess.Popen[bytes], kill: Callable[[], bool]) -> bool:
        units, workers = self._units(), self._workers()
        if process.poll() is not None or not kill():
            return False
        struck = time.monotonic()
        setattr(self.totals, f"{kind}_kills", getattr(self.totals, f"{kind}_kills") + 1)

        def recovered() -> bool:
            new_worker = kind == "node" or self._workers() > workers
            return process.poll() is not None or (new_worker and self._units() > units)

        if self._wait(recovered) and process.poll() is None:
            self.totals.recover_s.setdefault(kind, []).append(time.monotonic() - struck)
        return True

    def _wait_units(self, process: subprocess.Popen[bytes], more: int) -> bool:
        wanted = self._units() + more
        first = self._units() + 1
        self._wait(lambda: self._units() >= first or process.poll() is not None)
        if self._since_kill is not None and process.poll() is None:
            self.totals.recover_s.setdefault("driver", []).append(time.monotonic() - self._since_kill)
            self._since_kill = None
        self._wait(lambda: self._units() >= wanted or process.poll() is not None)
        return process.poll() is None

    def _wait(self, condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + STALL_S
        while not condition():
            if time.monotonic() > end:
                self.totals.bad_ends.append(f"no progress for {STALL_S:g} s")
                return False
            time.sleep(0.02)
        return True

    def _units(self) -> int:
        folder = self.out / "units"
        return sum(name.endswith(".parquet") for name in os.listdir(folder)) if folder.is_dir() else 0

    def _workers(self) -> int:
        """How many model processes have begun an image in this round."""
        return len(os.listdir(self.trace))

    def _start(self, address: str, out: Path, trace: Path | None) -> subprocess.Popen[bytes]:
        inputs = self.state / "inputs"
        command = [
            *(sys.executable, "-m", "tests.faults.stub_cli", "label", "--no-progress"),
            *("--boxes", str(inputs / "boxes.parquet"), "--output", str(out), "--ray-address", address),
        ]
        for setting in (
            *(f"output.images_per_unit={self.images_per_unit}", "model.dtype=float32", "cluster.actors=1"),
            *("cluster.shared_paths=true", "cluster.cpus_per_actor=0.5", "cluster.decode_cpus=0.6"),
        ):
            command += ["--set", setting]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "STUB_TRACE": str(trace or "")}
        # As for a submitted job, whose code is there already: packing it again costs each driver seconds.
        environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = "{}"
        with (self.state / "driver.log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    # -- what came out ---------------------------------------------------------------------------

    def _make_reference(self, address: str) -> None:
        out = self.state / "reference"
        shutil.rmtree(out, ignore_errors=True)
        code = _end_of(self._start(address, out, None), 900)
        if code != 0:
            raise RuntimeError(
                f"the undisturbed run ended with {code}: {(self.state / 'driver.log').read_text()}"
            )
        ids, digests = _read_out(out)
        if ids != self._planned():
            raise RuntimeError("the undisturbed run does not hold the planned images")
        (self.state / "reference.json").write_text(json.dumps(digests))
        shutil.rmtree(out)

    def _planned(self) -> list[str]:
        return [
            str(i) for i in pq.read_table(self.state / "inputs" / "boxes.parquet")["image_id"].to_pylist()
        ]

    def _close_round(self) -> None:
        """Count what is in the tables of a finished round, and forget the round."""
        from hqlabel.pipeline.job_context import Place
        from hqlabel.pipeline.job_state.job_file import require_job
        from hqlabel.pipeline.storage.output_store import Store
        from hqlabel.pipeline.tables.verify_output import verify

        ids, digests = _read_out(self.out)
        planned, totals = self._planned(), self.totals
        totals.rounds += 1
        totals.images_done += len(ids)
        totals.lost += len(set(planned) - set(ids))
        totals.doubled += len(ids) - len(set(ids))
        totals.different_rounds += digests != json.loads((self.state / "reference.json").read_text())
        totals.calls += sum(len(file.read_text().splitlines()) for file in self.trace.glob("*.txt"))
        store = Store(Place(uri=str(self.out)))
        totals.bad_ends += [f"validate: {one}" for one in verify(store, require_job(store)).findings]
        self._since_kill = None
        shutil.rmtree(self.state / "round")

    def _load(self, images: int) -> Totals:
        path = self.state / "totals.json"
        if not path.exists():
            return Totals(images=images)
        totals = Totals(**json.loads(path.read_text()))
        if totals.images != images:
            raise SystemExit(
                f"{path}: a soak over {totals.images} images; choose another folder for {images}"
            )
        return totals

    def _save(self) -> None:
        path = self.state / "totals.json"
        path.with_suffix(".new").write_text(json.dumps(asdict(self.totals), indent=1))
        path.with_suffix(".new").rename(path)


class _Nodes:
    """The cluster's worker nodes; each can be lost and is replaced."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self.address: str = cluster.address
        self._workers = [self._add(), self._add()]

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)

    def kill_head(self) -> None:
        """The cluster's memory of itself (GCS) is gone without a word."""
        self._cluster.head_node.kill_gcs_server()

    def kill_one(self) -> bool:
        """Whether a living node was killed without a word, and replaced."""
        node = random.choice(self._workers)
        raylet = node.all_processes["raylet"][0].process
        if raylet.poll() is not None:
            return False
        self._workers.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)
        self._workers.append(self._add())
        return bool(raylet.poll() is not None)


@functools.lru_cache(maxsize=1)
def ray_token() -> str:
    """The token of every cluster that this process starts: Ray reads it once and keeps it."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def cluster_of_nodes() -> Iterator[_Nodes]:
    """A Ray cluster on this machine: a head without cores and two nodes of one core each."""
    folder = Path(tempfile.mkdtemp(prefix="soak", dir="/tmp"))
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": ray_token(),
        "RAY_worker_niceness": "0",
    }
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": str(folder)}
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20,
        "_system_config": FAST_DEATH_NOTICE,
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield _Nodes(cluster)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _kill_actor() -> bool:
    """Whether a living model process was killed."""
    actors = [one for one in psutil.Process().children(recursive=True) if is_actor(one)]
    if not actors:
        return False
    try:
        os.kill(random.choice(actors).pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def is_actor(process: psutil.Process) -> bool:
    """Whether this is one of Ray's processes with a model."""
    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return title.startswith("ray::") and "egment" in title


def _end_of(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    try:
        return process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return 124


def _read_out(out: Path) -> tuple[list[str], list[str]]:
    """The image ids in their order, and the digests of both tables without what may differ."""
    from tests.table_digest import mask_columns_digest

    tables = []
    for name in ("images", "instances"):
        tables.append(
            pa.concat_tables(pq.read_table(part) for part in sorted((out / name).glob("*.parquet")))
        )
    return tables[0]["image_id"].to_pylist(), [mask_columns_digest(table) for table in tables]


def _write_inputs(folder: Path, images: int) -> None:
    """A few tiny pictures under many ids, each id with its own boxes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        picture = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        picture.save(folder / f"{number}.png")
    (folder / "images").mkdir()
    for number in range(images):
        os.link(folder / f"{number % PICTURES}.png", folder / "images" / f"{number:08d}.png")
    start = rng.uniform(0, (40, 30), (images, 2, 2))
    boxes = np.concatenate([start, start + rng.uniform(2, (24, 18), (images, 2, 2))], axis=2).round(2)
    columns = {
        "image_id": [f"{number:08d}" for number in range(images)],
        "image_uri": [f"images/{number:08d}.png" for number in range(images)],
        "boxes": boxes.tolist(),
    }
    pq.write_table(pa.table(columns), folder / "part.parquet")
    (folder / "part.parquet").rename(folder / "boxes.parquet")


if __name__ == "__main__":
    main()
