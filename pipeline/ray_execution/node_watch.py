"""Whether the cluster can hold what a job requests: checked before work begins, and watched while it runs.

Ray reports neither that nothing can be placed nor that lost nodes do not come back; it waits in silence.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
import ray.exceptions
from ray.autoscaler.sdk import request_resources
from ray.data._internal.execution.execution_callback import ExecutionCallback

from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.ray_execution import metrics
from hqlabel.pipeline.ray_execution.placement import Node, Requests, fit, still_fits
from hqlabel.pipeline.settings import ClusterSettings

NODES_GONE_S = 60.0
"""How long nodes may be gone and nothing finish, before the rest is begun anew on the remaining ones."""
NO_MODEL_S = 600.0
"""How long no model process may run and nothing finish; weights take less to load."""
_POLL_S = 1.0


# ---------------------------------------------------------------------------------------------
# Before work begins
# ---------------------------------------------------------------------------------------------


def live_nodes() -> list[Node]:
    """Return what each live node of the running cluster offers."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [
        Node(cpus=one.get("CPU", 0.0), gpus=one.get("GPU", 0.0), memory_bytes=one.get("memory", 0.0))
        for one in alive
    ]


def check_resources(cluster: ClusterSettings, cpu_threads: int = 1) -> Requests:
    """Return the requests that fit the running cluster; wait for nodes as long as the settings allow.

    Raises:
        SystemicFault: `resources`, with what is missing.
    """
    if cluster.wait_for_nodes_s > 0:
        with _request_nodes(cluster):
            return _wait_until_it_fits(cluster, cpu_threads)
    return fit(cluster, live_nodes(), cpu_threads)


def _wait_until_it_fits(cluster: ClusterSettings, cpu_threads: int) -> Requests:
    deadline = time.monotonic() + cluster.wait_for_nodes_s
    while True:
        try:
            return fit(cluster, live_nodes(), cpu_threads)
        except SystemicFault:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _request_nodes(cluster: ClusterSettings) -> Iterator[None]:
    """Request a node for each actor from the autoscaler, if there is one; take it back after the block."""
    gpus = 0 if cluster.gpus_per_actor == 0 else 1
    request_resources(bundles=[{"CPU": 2, "GPU": gpus}] * (cluster.actors_min or cluster.actors or 1))
    try:
        yield
    finally:
        request_resources(bundles=[])


def requests_for_remaining_nodes(cluster: ClusterSettings, cpu_threads: int) -> Requests:
    """Return the requests for the live nodes; fewer actors than the settings where those do not fit."""
    try:
        return fit(cluster, live_nodes(), cpu_threads)
    except SystemicFault:
        any_number = cluster.model_copy(update={"actors": None, "actors_min": None})
        return fit(any_number, live_nodes(), cpu_threads)


def prove_room(timeout_s: float) -> None:
    """Run a task of one core: Ray Data begins with such tasks, and would wait for a place in silence.

    Raises:
        SystemicFault: `resources`, when the task found no place in time.
    """
    task: Any = ray.remote(num_cpus=1)(_do_nothing)
    try:
        ray.get(task.remote(), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise SystemicFault(
            "resources",
            f"a task of one CPU core, with which work begins, has found no place for {timeout_s / 60:.0f} "
            f"min; {_free_resources()} of the whole cluster are free. Something else holds the rest "
            "(`ray status` lists what waits)",
        ) from None


def _do_nothing() -> None:
    """Be placed, which is all that this task is for."""


def _free_resources() -> str:
    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return f"{free.get('CPU', 0.0):g} CPU cores and {free.get('GPU', 0.0):g} GPUs"


# ---------------------------------------------------------------------------------------------
# While it runs
# ---------------------------------------------------------------------------------------------


class NodesLost(Exception):
    """Nodes were lost, and the requests no longer fit the cluster."""


@dataclass(kw_only=True)
class WatchState:
    """What a watch of one execution needs; `last_outcome`: when the last unit finished (time.monotonic)."""

    requests: Requests
    patience_s: float
    run_id: str
    last_outcome: float = field(default_factory=time.monotonic)


class NodeWatch(ExecutionCallback):
    """Ends an execution with NodesLost when nodes are gone, do not come back, and nothing finishes.

    A lost node's actors start again where there is room, and may leave none for the tasks that feed them;
    or there is no room, and the units that were handed to them wait. Ray reports neither, and waits on.
    Ray Data makes the object itself, without arguments: `new_watch` makes a class that holds the state.
    """

    state: WatchState

    def __init__(self) -> None:
        self._most = live_nodes()
        self._last_fit = self._last_poll = self._last_model = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        """Check nodes and queues, once a second; called many times a second, in the thread that schedules."""
        now = time.monotonic()
        if now < self._last_poll + _POLL_S:
            return
        self._last_poll = now
        self._check_queues(executor, now)
        try:
            nodes = live_nodes()
        except Exception:  # a failed query is no sign of anything; what Ray itself notices, it raises
            return
        if still_fits(self.state.requests, self._most, nodes):
            self._most, self._last_fit = nodes, now
        elif now - max(self._last_fit, self.state.last_outcome) > self.state.patience_s:
            raise NodesLost

    def _check_queues(self, executor: Any, now: float) -> None:
        try:
            queues = _queues(executor)
        except Exception:  # these are inner parts of Ray Data, and no job shall end for want of a metric
            return
        metrics.record(self.state.run_id, metrics.of_queues(*queues))
        timeout_s = NO_MODEL_S + self.state.patience_s
        if queues.processes["running"] or not (queues.waiting["prepare"] or queues.waiting["segment"]):
            self._last_model = now
        elif now - max(self._last_model, self.state.last_outcome) > timeout_s:
            raise SystemicFault("resources", _no_model(self.state.requests, timeout_s))


def new_watch(requests: Requests, patience_s: float, run_id: str) -> type[NodeWatch]:
    """Return a class for one execution, from which Ray Data makes the watch."""

    class Watch(NodeWatch):
        state = WatchState(requests=requests, patience_s=patience_s, run_id=run_id)

    return Watch


class _Queues(NamedTuple):
    waiting: dict[str, int]
    processes: dict[str, int]


def _queues(executor: Any) -> _Queues:
    """Return the queues before the stages and the states of the model processes, as of now."""
    stages: dict[str, Any] = dict(
        zip(("prepare", "segment", "commit"), list(executor._topology)[1:], strict=True)
    )
    states = {stage: executor._topology[operator] for stage, operator in stages.items()}
    waiting = {stage: state.total_enqueued_input_blocks() for stage, state in states.items()}
    pool = stages["segment"].get_actor_info()
    processes = {state: getattr(pool, state) for state in ("running", "pending", "restarting")}
    return _Queues(waiting, processes)


def _no_model(requests: Requests, seconds: float) -> str:
    """Return why nothing moves, for users: what one model process requests, and what of it is free."""
    gpus = f" and {requests.gpus_per_actor:g} GPUs" if requests.gpus_per_actor else ""
    return (
        f"no model process has been running for {seconds / 60:.0f} min; each asks for "
        f"{requests.cpus_per_actor:g} CPU cores{gpus} on one node, and {_free_resources()} of the whole "
        "cluster are free. Either something else holds them (`ray status` lists what waits), or the model "
        "does not come up (the log of its worker has the reason)"
    )
