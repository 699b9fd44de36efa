"""The chain of stages on Ray Data.

    units ──► prepare (CPU tasks) ──► segment (actors) ──► commit (light tasks) ──► outcomes

One row is one unit, so no block shaping can split or mix units. Adjacent stages request different resources,
so that Ray Data does not fuse them. A systemic fault travels to the driver as a value: exceptions come back
wrapped and rewritten, and Ray would log each with a trace. An exception that does come through is a bug, and
ends the job.

What Ray Data 2.60 does by itself is switched off where it would lose rows (`max_errored_blocks`) or
never end (`actor_task_retry_on_errors`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from hqlabel.model.records import Fit
from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.images.decode_process import DecodeChild
from hqlabel.pipeline.job_context import JobContext, UnitOutcome
from hqlabel.pipeline.ray_execution import live_counts, metrics, node_watch
from hqlabel.pipeline.ray_execution.placement import Requests
from hqlabel.pipeline.ray_execution.private_ray_data import without_side_actors
from hqlabel.pipeline.ray_execution.ray_errors import raise_original
from hqlabel.pipeline.settings import ClusterSettings, Limits
from hqlabel.pipeline.stages.commit import commit_unit, read_outcome
from hqlabel.pipeline.stages.crash_log import Restart, Stage
from hqlabel.pipeline.stages.prepare import prepare_unit
from hqlabel.pipeline.stages.rows_between_stages import UNIT_COLUMN, UnitRow, pack, unit_to_json, unpack
from hqlabel.pipeline.stages.segment import SegmentWorker
from hqlabel.pipeline.storage.output_store import Store
from hqlabel.pipeline.worker import logs

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


# ---------------------------------------------------------------------------------------------
# The driver
# ---------------------------------------------------------------------------------------------


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
    shared: bool = True,
) -> None:
    """Commit every unit, and pass each outcome to `on_outcome` in the order of the commits.

    Returns early once `should_stop` is true; it is called after every outcome. Ray must be running.
    `epoch`: the number of this driver (`Owner.number`), under which deaths of workers are counted. `shared`:
    others may hold cores of this Ray, so that it is tried whether a task finds a place.

    Raises:
        SystemicFault: what the first unit to meet one met, or `resources` when nothing can be placed or
            Ray makes no progress. What is committed stays, and the rest can be done later.
        Exception: a bug in a stage, as the exception that was raised there.
    """
    remaining = len(unit_ids)
    with contextlib.closing(
        _outcomes(unit_ids, context, cluster, epoch=epoch, retry=retry, shared=shared)
    ) as outcomes:
        for outcome in outcomes:
            remaining -= 1
            metrics.record(context.run_id, metrics.of_progress(remaining))
            on_outcome(outcome)
            if should_stop():
                return


def _outcomes(
    unit_ids: Sequence[int],
    context: JobContext,
    cluster: ClusterSettings,
    *,
    epoch: int,
    retry: Retry | None,
    shared: bool,
) -> Generator[UnitOutcome, None, None]:
    """Yield the outcome of every unit, wave by wave; units of lost nodes are begun anew in the next wave."""
    patience_s = node_watch.NODES_GONE_S + cluster.wait_for_nodes_s
    threads = context.model.cpu_threads
    requests = node_watch.check_resources(cluster, threads)
    if shared:  # nobody else can hold the cores of a private Ray, and the task's worker takes seconds
        node_watch.prove_room(node_watch.NO_MODEL_S + patience_s)
    pending = list(unit_ids)
    while pending:
        wave = [_first_row(unit_id, context, retry) for unit_id in pending[:UNITS_PER_WAVE]]
        finished: set[int] = set()
        try:
            fitting = requests.for_units(len(wave))
            with _ray_data_changed(shared):
                yield from _run_wave(wave, context, fitting, epoch, patience_s, finished)
            pending = pending[len(wave) :]
        except node_watch.NodesLost:
            pending = [unit_id for unit_id in pending if unit_id not in finished]
        if pending:
            # nodes may have joined, or be lost
            requests = node_watch.requests_for_remaining_nodes(cluster, threads)
        # Ray ends an actor when nothing refers to it any more; one in a cycle would hold its place on.
        gc.collect()


def _run_wave(
    units: Sequence[UnitRow],
    context: JobContext,
    requests: Requests,
    epoch: int,
    patience_s: float,
    finished: set[int],
) -> Iterator[UnitOutcome]:
    """Yield the outcomes of one watched execution; ids of units whose outcome came go into `finished`.

    Raises:
        NodesLost: nodes are gone for longer than `patience_s`, and the requests no longer fit.
    """
    watch = node_watch.new_watch(requests, patience_s, context.run_id)
    with _data_context_overrides(context, watch), raise_original():
        dataset = chain(units, context, requests, epoch=epoch)  # takes the overrides with it from here
        # Not `iter_batches`, which sends the figures of all blocks so far to an actor with every batch.
        for bundle in dataset.iter_internal_ref_bundles():
            for table in ray.get([block.ref for block in bundle.blocks]):
                outcome = read_outcome(table)
                finished.add(outcome.unit_id)
                watch.state.last_outcome = time.monotonic()
                yield outcome


def _first_row(unit_id: int, context: JobContext, retry: Retry | None) -> UnitRow:
    if retry is None:
        return UnitRow(unit_id=unit_id, generation=context.first_generation)
    return UnitRow(unit_id=unit_id, generation=retry.generations[unit_id], redo_codes=retry.codes)


def chain(
    units: Sequence[UnitRow], context: JobContext, requests: Requests, *, epoch: int
) -> ray.data.Dataset:
    """Return the three stages over these units, not yet started; what comes out is read by read_outcome."""
    rows: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    grows = requests.actors_max > requests.actors_min
    actors = ray.data.ActorPoolStrategy(
        min_size=requests.actors_min,
        max_size=requests.actors_max,
        max_tasks_in_flight_per_actor=UNITS_AT_ACTOR_OF_GROWING_POOL if grows else UNITS_AT_ACTOR,
        max_concurrent_calls_per_actor=_CALLS_PER_ACTOR,
    )
    commits = ray.data.TaskPoolStrategy(size=min(requests.commit_tasks, len(units)))
    # Not `from_arrow`, which would run a task of a whole core for each table's size.
    items = [{UNIT_COLUMN: unit_to_json(unit)} for unit in units]
    return (
        ray.data.from_items(items, override_num_blocks=len(units))
        .map_batches(
            prepare,  # type: ignore[arg-type]  # Ray's types know no tables of Arrow's
            fn_kwargs={"context": context, "epoch": epoch},
            num_cpus=requests.decode_cpus,
            **rows,
        )
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
            commit,  # type: ignore[arg-type]
            fn_kwargs={"context": context, "epoch": epoch},
            compute=commits,
            num_cpus=requests.commit_cpus,
            **rows,
        )
    )


# ---------------------------------------------------------------------------------------------
# The stages, in Ray's processes
# ---------------------------------------------------------------------------------------------


def prepare(table: pa.Table, context: JobContext, epoch: int) -> pa.Table:
    """Stage one: fetch and decode the unit that `table` names; schema rows_between_stages.UNIT_ROW."""
    logs.keep_in_this_process()
    began = time.monotonic()
    detector = context.detector
    decoder = _decode_process(
        context.limits,
        context.weights.input_side,
        context.weights.fit,
        context.decoder,
        detector and detector.longest_side,
        context.draft_jpeg,
    )
    store = Store(context.output)
    unit, arena = prepare_unit(unpack(table), context, store, decoder, _restart(store, epoch, "prepare"))
    metrics.record(context.run_id, metrics.of_prepared(unit, time.monotonic() - began))
    return pack(unit, arena)


def _restart(store: Store, epoch: int, stage: Stage) -> Restart | None:
    """Return how to begin a task again whose process died; None at its first start."""
    core: Any = ray._private.worker.global_worker.core_worker  # type: ignore[attr-defined]
    return Restart(store, epoch=epoch, stage=stage) if core.get_current_task_attempt_number() else None


@functools.lru_cache(maxsize=1)
def _decode_process(
    limits: Limits, side: int, fit: Fit, decoder: str, detector_side: int | None, draft_jpeg: bool
) -> DecodeChild:
    """Return this worker process's decoder; it serves every unit that the process gets."""
    return DecodeChild(
        limits, side, fit=fit, decoder=decoder, detector_side=detector_side, draft_jpeg=draft_jpeg
    )


class Segment:
    """Stage two: one actor with the model, and the detector where there is one.

    A unit in, the unit with its masks out, schema rows_between_stages.UNIT_ROW.
    """

    def __init__(self, context: JobContext, epoch: int, use_gpu: bool) -> None:
        logs.keep_in_this_process()
        self._run_id = context.run_id
        mine = ray.get_runtime_context()
        restarted = mine.get_actor_id() if mine.was_current_actor_reconstructed else None
        tell = live_counts.Teller(context.run_id, epoch, mine.get_actor_id() or "")
        self._worker = SegmentWorker(context, epoch=epoch, use_gpu=use_gpu, restarted=restarted, tell=tell)

    def __call__(self, table: pa.Table) -> pa.Table:
        """See the class."""
        began = time.monotonic()
        unit = self._worker.run(unpack(table))
        metrics.record(self._run_id, metrics.of_segmented(unit, time.monotonic() - began))
        return pack(unit)


def commit(table: pa.Table, context: JobContext, epoch: int) -> pa.Table:
    """Stage three: put the unit's file into the store; what read_outcome reads."""
    logs.keep_in_this_process()
    began = time.monotonic()
    unit = unpack(table)
    store = Store(context.output)
    answer = commit_unit(unit, context, store, _restart(store, epoch, "commit"))
    try:
        outcome = read_outcome(answer)
        samples = metrics.of_committed(unit, outcome, time.monotonic() - began)
    except SystemicFault as fault:
        logs.event("fault", level=logging.ERROR, run_id=context.run_id, unit_id=unit.unit_id, code=fault.code,
                   message=fault.message)  # fmt: skip
        samples = metrics.of_fault(fault.code)
    metrics.record(context.run_id, samples)
    return answer


# ---------------------------------------------------------------------------------------------
# Ray Data's settings
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _data_context_overrides(context: JobContext, watch: type[node_watch.NodeWatch]) -> Iterator[None]:
    """Set Ray Data's options for the block, here and in what it starts; restore them afterwards."""
    ctx = ray.data.DataContext.get_current()
    overrides = {
        "max_errored_blocks": 0,
        "actor_task_retry_on_errors": False,
        "raise_original_map_exception": True,
        "enable_progress_bars": False,
        "actor_init_retry_on_errors": True,  # three tries in a process; systemic faults do not raise there
        "execution_no_progress_timeout_s": _no_progress_s(context),
        "custom_execution_callback_classes": [watch],
    }
    before = {name: getattr(ctx, name) for name in overrides}
    order, logger = ctx.execution_options.preserve_order, logging.getLogger("ray.data")
    level = logger.level
    try:
        for name, value in overrides.items():
            setattr(ctx, name, value)
        ctx.execution_options.preserve_order = False
        logger.setLevel(logging.CRITICAL)  # what goes wrong is raised; Ray's own message would repeat it
        yield
    finally:
        for name, value in before.items():
            setattr(ctx, name, value)
        ctx.execution_options.preserve_order = order
        logger.setLevel(level)


def _no_progress_s(context: JobContext) -> float:
    """Return how long nothing may finish: two hours, or twice what one unit may take within its limits."""
    return max(NO_PROGRESS_AT_LEAST_S, 2 * context.images_per_unit * context.limits.segment_timeout_s)


@contextlib.contextmanager
def _ray_data_changed(shared: bool) -> Iterator[None]:
    """Change in what Ray Data starts, for the block, what no option of it changes."""
    with _actors_by_value(), contextlib.nullcontext() if shared else without_side_actors():
        yield


@contextlib.contextmanager
def _actors_by_value() -> Iterator[None]:
    """Let Ray Data pass its actors their arguments as values for the block; restore its own way afterwards.

    It passes them references to objects and another actor (Ray 2.60). Ray cannot make those anew when it
    restarts an actor (https://github.com/ray-project/ray/issues/53727), and its C++ logs so on stderr for
    every actor of every run. The driver holds these references as long as the actors live, so nothing was
    ever lost; but values, some 15 kB, need no such care, and no message has to be hidden.
    """
    operators: Any = importlib.import_module("ray.data._internal.execution.operators.actor_pool_map_operator")
    pool, tracker = operators.ActorPoolMapOperator, operators.get_or_create_actor_location_tracker
    start = pool._start_actor

    def tracked() -> _ActorLocations:
        tracker()  # there is one, so that it has a name to be found by
        return _ActorLocations()

    def start_by_value(self: Any, *args: Any) -> Any:
        values = {"_map_transformer_ref": self._map_transformer, "_data_context_ref": self.data_context}
        kept = {name: vars(self).pop(name) for name in values if name in vars(self)}
        vars(self).update(values)
        try:
            return start(self, *args)
        finally:
            for name in values:
                del vars(self)[name]
            vars(self).update(kept)

    operators.get_or_create_actor_location_tracker = tracked
    pool._start_actor = start_by_value
    try:
        yield
    finally:
        operators.get_or_create_actor_location_tracker = tracker
        pool._start_actor = start


class _ActorLocations:
    """Ray Data's actor that knows where the others are, found by its name where it is needed."""

    @property
    def update_actor_location(self) -> Any:
        """The method of that actor."""
        actor: Any = ray.get_actor("ActorLocationTracker", namespace="ActorLocationTracker")
        return actor.update_actor_location
