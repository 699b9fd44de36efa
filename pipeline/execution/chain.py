"""The chain of stages on Ray Data: the only file that knows Ray.

    units ──► prepare (CPU tasks) ──► segment (actors) ──► commit (light tasks) ──► outcomes

One row is one unit, so no block shaping can split or mix them. Every stage states its requests, none is
like its neighbour's, and so none is fused with another. A systemic fault travels as a value to the
driver: exceptions come back wrapped and rewritten, and Ray would log each with a trace. An exception that
does come through is a bug, and ends the job.

What Ray Data 2.60 does by itself is switched off where it would lose rows (`max_errored_blocks`) or
never end (`actor_task_retry_on_errors`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import ray
import ray.data
import ray.data.exceptions
import ray.exceptions
from ray.autoscaler.sdk import request_resources
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.util import metrics as ray_metrics

from pipeline.errors import SystemicFault, clean_text
from pipeline.execution import metrics
from pipeline.execution.placement import Node, Requests, fit, still_fits
from pipeline.images.decode_process import DecodeChild
from pipeline.settings import ClusterSettings, JobContext, Limits, UnitOutcome
from pipeline.stages.commit import commit_unit, read_outcome
from pipeline.stages.hand_over import UnitRow, pack, unpack
from pipeline.stages.prepare import prepare_unit
from pipeline.stages.segment import SegmentWorker
from pipeline.storage.store import Store
from pipeline.worker import logs
from pipeline.worker.process_env import refuse_unsafe_env

_ray: Any = ray  # some of it has no types

T = TypeVar("T")
A = TypeVar("A")

UNITS_PER_WAVE = 5000
"""Units of one Ray Data execution. Ray keeps some 20 KB a unit on the driver until an execution ends, and a
new one costs the actors' start; with 64 images a unit this is 320,000 images."""

UNITS_AT_ACTOR = 2
"""One in the model and one about to be: Ray gives back none that it has handed to an actor, so whatever waits
there waits also behind a unit that takes minutes."""
UNITS_AT_ACTOR_OF_GROWING_POOL = 4
"""Ray enlarges a pool only from 1.75 times its concurrent calls on."""
_CALLS_PER_ACTOR = 2  # while one unit is in the model, the next is read and the last one sent off
NO_PROGRESS_AT_LEAST_S = 2 * 3600.0
NODES_GONE_S = 60.0
"""How long nodes may be gone and nothing finish, before the rest is begun anew on those that are left."""
NO_MODEL_S = 600.0
"""How long no model process may run and nothing finish; weights take less to load."""
_POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Which rows of committed units to do again. `generations`: of each unit, the one to be written.

    `codes`: the error codes whose images are done again; empty: all failed images.
    """

    generations: Mapping[int, int]
    codes: tuple[str, ...] = ()


def run_units(
    unit_ids: Sequence[int],
    context: JobContext,
    cluster: ClusterSettings,
    *,
    epoch: int,
    on_outcome: Callable[[UnitOutcome], None],
    should_stop: Callable[[], bool],
    retry: Retry | None = None,
) -> None:
    """None, after every unit is committed and told to `on_outcome`, in the order of their commits.

    Returns early once `should_stop` is true; it is asked after every outcome. Ray must be running.
    `epoch`: the number of this driver (`Owner.number`), under which deaths of workers are counted.

    Raises:
        SystemicFault: what the first unit to meet one met, or `resources` when nothing can be placed or
            Ray makes no progress. What is committed stays, and the rest can be done later.
        Exception: a bug in a stage, as the exception that was raised there.
    """
    requests = check_resources(cluster, context.model.cpu_threads)
    _prove_room(requests, NO_MODEL_S + NODES_GONE_S + cluster.wait_for_nodes_s)
    left = list(unit_ids)
    unfinished = len(left)
    while left:
        units = [_first_row(unit_id, retry) for unit_id in left[:UNITS_PER_WAVE]]
        mine = requests.for_units(len(units))
        watch = _watch(mine, NODES_GONE_S + cluster.wait_for_nodes_s, context.run_id)
        finished = set()
        try:
            with contextlib.closing(_outcomes(units, context, mine, epoch, watch)) as outcomes:
                for outcome in outcomes:
                    finished.add(outcome.unit_id)
                    watch.last_outcome = time.monotonic()
                    unfinished -= 1
                    _record(context.run_id, metrics.of_progress(unfinished))
                    on_outcome(outcome)
                    if should_stop():
                        return
            left = left[len(units) :]
            if left:  # nodes may have joined
                requests = _requests_for_what_is_left(cluster, context.model.cpu_threads)
        except _NodesGone:
            left = [unit_id for unit_id in left if unit_id not in finished]
            requests = _requests_for_what_is_left(cluster, context.model.cpu_threads)
        # Ray ends an actor when nothing refers to it any more; one in a cycle would hold its place on.
        gc.collect()


def _prove_room(requests: Requests, patience_s: float) -> None:
    """None, once a task of one core has run: Ray Data begins with such tasks, and would wait in silence.

    Raises:
        SystemicFault: `resources`.
    """
    task: Any = ray.remote(num_cpus=1)(_answer)
    try:
        ray.get(task.remote(), timeout=patience_s)
    except ray.exceptions.GetTimeoutError:
        raise SystemicFault("resources", _no_model(requests, patience_s)) from None


def _answer() -> None:
    """A task that has only to be placed."""


def _first_row(unit_id: int, retry: Retry | None) -> UnitRow:
    if retry is None:
        return UnitRow(unit_id=unit_id)
    return UnitRow(unit_id=unit_id, generation=retry.generations[unit_id], redo_codes=retry.codes)


def _outcomes(
    units: Sequence[UnitRow], context: JobContext, requests: Requests, epoch: int, watch: type[_Watch]
) -> Generator[UnitOutcome, None, None]:
    with _settings(context, watch), _unwrapped():
        batches = iter(
            chain(units, context, requests, epoch=epoch).iter_batches(
                batch_size=1, batch_format="pyarrow", prefetch_batches=0
            )
        )
        for batch in batches:
            yield read_outcome(batch)


def chain(
    units: Sequence[UnitRow], context: JobContext, requests: Requests, *, epoch: int
) -> ray.data.Dataset:
    """The three stages over these units, not yet started; each row that comes out is a commit.OUTCOME."""
    rows: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    grows = requests.actors_max > requests.actors_min
    actors = ray.data.ActorPoolStrategy(
        min_size=requests.actors_min,
        max_size=requests.actors_max,
        max_tasks_in_flight_per_actor=UNITS_AT_ACTOR_OF_GROWING_POOL if grows else UNITS_AT_ACTOR,
        max_concurrent_calls_per_actor=_CALLS_PER_ACTOR,
    )
    commits = ray.data.TaskPoolStrategy(size=min(requests.commit_tasks, len(units)))
    first: Any = prepare  # Ray's types know no tables of Arrow's
    last: Any = commit
    return (
        ray.data.from_items([_item(unit) for unit in units], override_num_blocks=len(units))
        .map_batches(first, fn_kwargs={"context": context}, num_cpus=requests.decode_cpus, **rows)
        .map_batches(
            Segment,
            fn_constructor_kwargs={
                "context": context,
                "epoch": epoch,
                "use_gpu": requests.gpus_per_actor > 0,
            },
            compute=actors,
            num_cpus=requests.cpus_per_actor,
            num_gpus=requests.gpus_per_actor,
            **rows,
        )
        .map_batches(
            last, fn_kwargs={"context": context}, compute=commits, num_cpus=requests.commit_cpus, **rows
        )
    )


def _item(unit: UnitRow) -> dict[str, Any]:
    """A unit that is only named yet. `from_arrow` would run a task of a whole core for each table's size."""
    return {"unit_id": unit.unit_id, "generation": unit.generation, "redo_codes": json.dumps(unit.redo_codes)}


def _named(table: pa.Table) -> UnitRow:
    (item,) = table.to_pylist()
    codes = json.loads(item["redo_codes"])
    return UnitRow(
        unit_id=item["unit_id"],
        generation=item["generation"],
        redo_codes=None if codes is None else tuple(codes),
    )


def prepare(table: pa.Table, context: JobContext) -> pa.Table:
    """Stage one: the unit that `table` names, fetched and decoded; schema rows.TRAVEL."""
    logs.keep_in_this_process()
    began = time.monotonic()
    detector = context.detector
    child = _child(
        context.limits,
        context.weights.input_side,
        context.decoder,
        detector and detector.longest_side,
        context.draft_jpeg,
    )
    unit, arena = prepare_unit(_named(table), context, Store(context.output), child)
    _record(context.run_id, metrics.of_prepared(unit, time.monotonic() - began))
    return pack(unit, arena)


@functools.lru_cache(maxsize=1)
def _child(
    limits: Limits, side: int, decoder: str, detector_side: int | None, draft_jpeg: bool
) -> DecodeChild:
    """This worker process's decoder; it serves every unit the process is given."""
    return DecodeChild(limits, side, decoder=decoder, detector_side=detector_side, draft_jpeg=draft_jpeg)


class Segment:
    """Stage two: one actor with the model, and the detector where there is one.

    A unit in, the unit with its masks out, schema rows.TRAVEL.
    """

    def __init__(self, context: JobContext, epoch: int, use_gpu: bool) -> None:
        logs.keep_in_this_process()
        self._run_id = context.run_id
        mine = ray.get_runtime_context()
        restarted = mine.get_actor_id() if mine.was_current_actor_reconstructed else None
        self._worker = SegmentWorker(context, epoch=epoch, use_gpu=use_gpu, restarted=restarted)

    def __call__(self, table: pa.Table) -> pa.Table:
        """See the class."""
        began = time.monotonic()
        unit = self._worker.run(unpack(table))
        _record(self._run_id, metrics.of_segmented(unit, time.monotonic() - began))
        return pack(unit)


def commit(table: pa.Table, context: JobContext) -> pa.Table:
    """Stage three: the outcome, after the unit's file is in the store; schema commit.OUTCOME."""
    logs.keep_in_this_process()
    began = time.monotonic()
    unit = unpack(table)
    answer = commit_unit(unit, context, Store(context.output))
    try:
        outcome = read_outcome(answer)
        samples = metrics.of_committed(unit, outcome, time.monotonic() - began)
    except SystemicFault as fault:
        logs.event("fault", level=logging.ERROR, run_id=context.run_id, unit_id=unit.unit_id, code=fault.code,
                   message=fault.message)  # fmt: skip
        samples = metrics.of_fault(fault.code)
    _record(context.run_id, samples)
    return answer


def _record(run_id: str, samples: Iterable[metrics.Sample]) -> None:
    """None; the samples are with Ray, whose agent on this node offers them to Prometheus."""
    for sample in samples:
        meter, tags = _meter(sample.name), {**sample.tags, metrics.RUN: run_id}
        if isinstance(meter, ray_metrics.Counter):
            meter.inc(sample.value, tags)
        elif isinstance(meter, ray_metrics.Gauge):
            meter.set(sample.value, tags)
        else:
            meter.observe(sample.value, tags)


@functools.cache
def _meter(name: str) -> ray_metrics.Counter | ray_metrics.Gauge | ray_metrics.Histogram:
    metric = metrics.METRICS[name]
    tags = (*metric.tags, metrics.RUN)
    if metric.kind == "counter":
        return ray_metrics.Counter(name, metric.meaning, tag_keys=tags)
    if metric.kind == "gauge":
        return ray_metrics.Gauge(name, metric.meaning, tag_keys=tags)
    return ray_metrics.Histogram(name, metric.meaning, boundaries=list(metric.boundaries), tag_keys=tags)


def plan_operators(dataset: ray.data.Dataset) -> list[str]:
    """The names of the operators that Ray makes of a dataset, first to last, after its optimizer ran."""
    from ray.data._internal.logical.optimizers import get_execution_plan

    plan, _ = get_execution_plan(dataset._logical_plan)
    names, operator = [], plan.dag
    while True:
        names.append(operator.name)
        if not operator.input_dependencies:
            return names[::-1]
        (operator,) = operator.input_dependencies


class _NodesGone(Exception):
    """Nodes were lost, and what was asked of the cluster no longer fits it."""


class _Watch(ExecutionCallback):
    """Ends an execution with _NodesGone when nodes are gone, do not come back, and nothing finishes.

    A lost node's actors start again where there is room, and may leave none for the tasks that feed them;
    or there is no room, and the units that were handed to them wait. Ray says neither, and waits on.
    Ray Data makes the object itself, without arguments: its class holds what it must know.
    """

    requests: Requests
    patience_s: float
    last_outcome: float
    run_id: str

    def __init__(self) -> None:
        self._most = _nodes()
        self._fitted = self._looked = self._modelled = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        """Asked many times a second, in the thread that schedules."""
        now = time.monotonic()
        if now < self._looked + _POLL_S:
            return
        self._looked = now
        self._look_at_queues(executor, now)
        try:
            nodes = _nodes()
        except Exception:  # a look that fails is no sign of anything; what Ray itself notices, it raises
            return
        if still_fits(self.requests, self._most, nodes):
            self._most, self._fitted = nodes, now
        elif now - max(self._fitted, self.last_outcome) > self.patience_s:
            raise _NodesGone

    def _look_at_queues(self, executor: Any, now: float) -> None:
        try:
            queues = _queues(executor)
        except Exception:  # these are inner parts of Ray Data, and no job shall end for want of a metric
            return
        _record(self.run_id, metrics.of_queues(*queues))
        if queues.processes["running"] or not (queues.waiting["prepare"] or queues.waiting["segment"]):
            self._modelled = now
        elif now - max(self._modelled, self.last_outcome) > NO_MODEL_S + self.patience_s:
            raise SystemicFault("resources", _no_model(self.requests, NO_MODEL_S + self.patience_s))


class _Queues(NamedTuple):
    waiting: dict[str, int]
    processes: dict[str, int]


def _queues(executor: Any) -> _Queues:
    """The queues before the stages and the states of the model processes, as Ray Data sees them now."""
    stages: dict[str, Any] = dict(
        zip(("prepare", "segment", "commit"), list(executor._topology)[1:], strict=True)
    )
    states = {stage: executor._topology[operator] for stage, operator in stages.items()}
    waiting = {stage: state.total_enqueued_input_blocks() for stage, state in states.items()}
    pool = stages["segment"].get_actor_info()
    processes = {state: getattr(pool, state) for state in ("running", "pending", "restarting")}
    return _Queues(waiting, processes)


def _no_model(requests: Requests, seconds: float) -> str:
    """Why nothing moves, for people: what one model process asks for, and what Ray has left of it."""
    gpus = f" and {requests.gpus_per_actor:g} GPUs" if requests.gpus_per_actor else ""
    free = _ray.available_resources()
    left = f"{free.get('CPU', 0.0):g} CPU cores and {free.get('GPU', 0.0):g} GPUs"
    return (
        f"no model process has been running for {seconds / 60:.0f} min; each asks for "
        f"{requests.cpus_per_actor:g} CPU cores{gpus} on one node, and {left} of the whole cluster are free. "
        "Either somebody else holds them (`ray status` lists what waits), or the model does not come up (the "
        "log of its worker says why)"
    )


def _watch(requests: Requests, patience_s: float, run_id: str) -> type[_Watch]:
    values = {
        "requests": requests,
        "patience_s": patience_s,
        "last_outcome": time.monotonic(),
        "run_id": run_id,
    }
    return type("_WatchOfOneExecution", (_Watch,), values)


def _requests_for_what_is_left(cluster: ClusterSettings, cpu_threads: int) -> Requests:
    """The requests for the nodes that are left; fewer actors than were asked for, where they do not fit."""
    try:
        return fit(cluster, _nodes(), cpu_threads)
    except SystemicFault:
        any_number = cluster.model_copy(update={"actors": None, "actors_min": None})
        return fit(any_number, _nodes(), cpu_threads)


def check_resources(cluster: ClusterSettings, cpu_threads: int = 1) -> Requests:
    """The requests that fit the running cluster; waits for nodes as long as the settings allow.

    Raises:
        SystemicFault: `resources`, saying what is missing.
    """
    if cluster.wait_for_nodes_s > 0:
        with _asking_for_nodes(cluster):
            return _wait_until_it_fits(cluster, cpu_threads)
    return fit(cluster, _nodes(), cpu_threads)


def _wait_until_it_fits(cluster: ClusterSettings, cpu_threads: int) -> Requests:
    deadline = time.monotonic() + cluster.wait_for_nodes_s
    while True:
        try:
            return fit(cluster, _nodes(), cpu_threads)
        except SystemicFault:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _asking_for_nodes(cluster: ClusterSettings) -> Iterator[None]:
    """Asks the autoscaler, if there is one, for a node an actor; takes the request back afterwards."""
    gpus = 0 if cluster.gpus_per_actor == 0 else 1
    request_resources(bundles=[{"CPU": 2, "GPU": gpus}] * (cluster.actors_min or cluster.actors or 1))
    try:
        yield
    finally:
        request_resources(bundles=[])


def _nodes() -> list[Node]:
    alive = [node["Resources"] for node in _ray.nodes() if node["Alive"]]
    return [
        Node(cpus=one.get("CPU", 0.0), gpus=one.get("GPU", 0.0), memory_bytes=one.get("memory", 0.0))
        for one in alive
    ]


def map_parts(function: Callable[[A], T], arguments: Sequence[A], *, num_cpus: float = 0.9) -> Iterator[T]:
    """`function` of every argument, each in a Ray task of its own, in the order they finish.

    Few at a time, so that neither arguments nor results pile up. `function` and `arguments` must pickle.

    Raises:
        Exception: what `function` raised.
    """
    task: Any = ray.remote(num_cpus=num_cpus, max_retries=3)(_safely)
    most = max(2, int(_ray.cluster_resources().get("CPU", 1) / num_cpus))
    waiting = iter(arguments)
    running: list[Any] = []
    with _unwrapped():
        while True:
            for argument in waiting:
                running.append(task.remote(function, argument))
                if len(running) >= most:
                    break
            if not running:
                return
            done, running = ray.wait(running, num_returns=1)
            yield ray.get(done[0])


def run_on_model_node(function: Callable[[bool], T], cluster: ClusterSettings, cpu_threads: int = 1) -> T:
    """`function(use_gpu)` in a process placed like a model's: to probe what such a node can do.

    Raises:
        SystemicFault: `resources`.
        Exception: what `function` raised.
    """
    requests = check_resources(cluster, cpu_threads)
    task: Any = ray.remote(num_cpus=requests.cpus_per_actor, num_gpus=requests.gpus_per_actor)(_safely)
    with _unwrapped():
        result: T = ray.get(task.remote(function, requests.gpus_per_actor > 0))
    return result


def _safely(function: Callable[[A], T], argument: A) -> T:
    refuse_unsafe_env()
    return function(argument)


@contextlib.contextmanager
def _settings(context: JobContext, watch: type[_Watch]) -> Iterator[None]:
    """Ray Data's settings for the block, of this process and of what it starts; restored afterwards."""
    ctx = ray.data.DataContext.get_current()
    wanted = {
        "max_errored_blocks": 0,
        "actor_task_retry_on_errors": False,
        "raise_original_map_exception": True,
        "enable_progress_bars": False,
        "actor_init_retry_on_errors": True,  # three tries in a process; systemic faults do not raise there
        "execution_no_progress_timeout_s": _no_progress_s(context),
        "custom_execution_callback_classes": [watch],
    }
    before = {name: getattr(ctx, name) for name in wanted}
    order, logger = ctx.execution_options.preserve_order, logging.getLogger("ray.data")
    level = logger.level
    try:
        for name, value in wanted.items():
            setattr(ctx, name, value)
        ctx.execution_options.preserve_order = False
        logger.setLevel(logging.CRITICAL)  # what goes wrong is raised; its own words would be said twice
        with _actors_by_value():
            yield
    finally:
        for name, value in before.items():
            setattr(ctx, name, value)
        ctx.execution_options.preserve_order = order
        logger.setLevel(level)


@contextlib.contextmanager
def _actors_by_value() -> Iterator[None]:
    """Let Ray Data hand its actors their arguments as values for the block; restore its own way afterwards.

    It hands them references to objects and another actor (Ray 2.60). Ray cannot make those anew when it
    restarts an actor (https://github.com/ray-project/ray/issues/53727), and its C++ says so on stderr for
    every actor of every run. The driver holds these references as long as the actors live, so nothing was
    ever lost; but values, some 15 kB, need no such care, and no message has to be hidden.
    """
    operators: Any = importlib.import_module("ray.data._internal.execution.operators.actor_pool_map_operator")
    pool, tracker = operators.ActorPoolMapOperator, operators.get_or_create_actor_location_tracker
    start = pool._start_actor

    def start_by_value(self: Any, *args: Any) -> Any:
        tracker()  # there is one, so that it has a name to be found by
        values = {"_map_transformer_ref": self._map_transformer, "_data_context_ref": self.data_context}
        kept = {name: vars(self).pop(name) for name in values if name in vars(self)}
        vars(self).update(values)
        try:
            return start(self, *args)
        finally:
            for name in values:
                del vars(self)[name]
            vars(self).update(kept)

    operators.get_or_create_actor_location_tracker = _ActorLocations
    pool._start_actor = start_by_value
    try:
        yield
    finally:
        operators.get_or_create_actor_location_tracker = tracker
        pool._start_actor = start


class _ActorLocations:
    """Ray Data's actor that knows where the others are, found by its name where it is asked."""

    @property
    def update_actor_location(self) -> Any:
        """The method of that actor."""
        return _ray.get_actor("ActorLocationTracker", namespace="ActorLocationTracker").update_actor_location


def _no_progress_s(context: JobContext) -> float:
    """How long nothing at all may finish: two hours, or what one unit may lawfully take twice over."""
    return max(NO_PROGRESS_AT_LEAST_S, 2 * context.images_per_unit * context.limits.segment_timeout_s)


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Lets what was raised in a task rise here as itself, and gives Ray's own ends their meaning."""
    try:
        yield
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        raise _translated(error) from error


def _translated(error: BaseException) -> BaseException:
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        return _translated(cause) if isinstance(cause, Exception) else error
    if isinstance(error, ray.exceptions.OutOfDiskError | ray.exceptions.ObjectStoreFullError):
        return SystemicFault("disk", f"Ray's object store: {_first_line(error)}")
    if isinstance(error, ray.data.exceptions.ExecutionTimeoutError):
        return SystemicFault("resources", f"nothing has finished for hours: {_first_line(error)}")
    if isinstance(error, ray.exceptions.ActorDiedError):
        return SystemicFault("resources", f"a model process does not start: {_last_line(error)}")
    if isinstance(error, ray.exceptions.RayError):
        return SystemicFault("resources", f"Ray: {_first_line(error)}")
    return error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return clean_text(lines[0])


def _last_line(error: BaseException) -> str:
    return clean_text((str(error).strip().splitlines() or [type(error).__name__])[-1].strip())
