"""Ray Data on a private Ray, without the three actors that it starts beside every execution.

Each is a process of its own, which imports Ray Data (a second of a core, 100 MB) before the first unit is
begun: on two cores a fifth of what a job of eight images costs. One collects figures for a dashboard that is
not there; one shares the cluster among its users, and here is one; one tells on which node each model process
runs, and here is one node. No option disables them (Ray 2.60).
"""

from __future__ import annotations

import contextlib
import importlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray


@contextlib.contextmanager
def without_side_actors() -> Iterator[None]:
    """Let executions that begin within the block start no actors but those of their stages."""
    execution = "ray.data._internal.execution"
    executor: Any = importlib.import_module(f"{execution}.streaming_executor")
    pool: Any = importlib.import_module(f"{execution}.operators.actor_pool_map_operator")
    stats: Any = importlib.import_module("ray.data._internal.stats")._StatsManager
    with contextlib.ExitStack() as stack:
        for holder, name, value in (
            (executor, "create_cluster_autoscaler", _fixed_cluster),
            (pool, "get_or_create_actor_location_tracker", _OneNode),
            (pool, "get_actor_locations", _on_any_node),
            (stats, "gen_dataset_id_from_stats_actor", staticmethod(lambda: uuid.uuid4().hex)),
            (stats, "register_dataset_to_stats_actor", staticmethod(_do_nothing)),
            (stats, "update_execution_metrics", staticmethod(_do_nothing)),
            (stats, "update_iteration_metrics", staticmethod(_do_nothing)),
        ):
            stack.enter_context(replaced(holder, name, value))
        yield


@contextlib.contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Let `holder.name` be `value` for the block."""
    kept = vars(holder)[name]
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, kept)


def _do_nothing(*_: Any, **__: Any) -> None:
    """Take the place of what tells an actor something."""


def _on_any_node(actors: tuple[str, ...]) -> dict[str, str | None]:
    return dict.fromkeys(actors)


def _fixed_cluster(*_: Any, **__: Any) -> Any:
    """Return the scaling of a cluster that has what it has."""
    base: Any = importlib.import_module("ray.data._internal.cluster_autoscaler").ClusterAutoscaler
    options: Any = importlib.import_module("ray.data._internal.execution.interfaces.execution_options")
    total = options.ExecutionResources.from_resource_dict(ray.cluster_resources())  # type: ignore[no-untyped-call]

    class Fixed(base):  # type: ignore[misc]
        try_trigger_scaling = on_executor_shutdown = _do_nothing

        def get_total_resources(self) -> Any:
            return total

    return Fixed()


class _OneNode:
    """In the place of the actor that a model process tells where it is."""

    class update_actor_location:  # a method of an actor, of which `remote` is called
        remote: Callable[..., None] = staticmethod(_do_nothing)
