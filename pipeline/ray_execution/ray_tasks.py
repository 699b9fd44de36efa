"""Plain functions as Ray tasks: the parts of a publish, and a probe of a node like the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from hqlabel.pipeline.ray_execution.node_watch import check_resources
from hqlabel.pipeline.ray_execution.ray_errors import raise_original
from hqlabel.pipeline.settings import ClusterSettings
from hqlabel.pipeline.worker.process_env import refuse_unsafe_env

T = TypeVar("T")
A = TypeVar("A")


def map_parts(function: Callable[[A], T], arguments: Sequence[A], *, num_cpus: float = 0.9) -> Iterator[T]:
    """Yield `function` of every argument, each from its own Ray task, in the order they finish.

    Few at a time, so that neither arguments nor results pile up. `function` and `arguments` must pickle.

    Raises:
        Exception: what `function` raised.
    """
    task: Any = ray.remote(num_cpus=num_cpus, max_retries=3)(_check_env_and_call)
    cpus = ray.cluster_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
    most = max(2, int(cpus / num_cpus))
    waiting = iter(arguments)
    running: list[Any] = []
    with raise_original():
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
    """Return `function(use_gpu)` of a process placed like a model's: to probe what such a node can do.

    Raises:
        SystemicFault: `resources`.
        Exception: what `function` raised.
    """
    requests = check_resources(cluster, cpu_threads)
    remote: Any = ray.remote(num_cpus=requests.cpus_per_actor, num_gpus=requests.gpus_per_actor)
    task = remote(_check_env_and_call)
    with raise_original():
        result: T = ray.get(task.remote(function, requests.gpus_per_actor > 0))
    return result


class RayTasks:
    """Calls of functions as Ray tasks of one core each, with their results in Ray's object store.

    Ray calls again where a process or a result is lost, and writes results that do not fit into its memory
    to a disk.
    """

    def start(self, function: Callable[..., Any], *arguments: Any, returns: int = 1) -> Any:
        """Begin a call; return a reference, or `returns` of them for a function that returns a list.

        References among the arguments are given to the function as what they stand for.
        """
        task: Any = ray.remote(num_cpus=1, max_retries=_RETRIES, num_returns=returns)(_check_env_and_apply)
        return task.options(name=function.__name__).remote(function, *arguments)

    def fold(self, function: Callable[..., Any], *arguments: Any, over: Sequence[Any]) -> Any:
        """Begin a call with an iterator of what references stand for as last argument."""
        return self.start(_apply_over, function, arguments, list(over))

    def result(self, handle: Any) -> Any:
        """Return what a reference stands for, waiting for it; raises what its function raised."""
        with raise_original():
            return ray.get(handle)


_RETRIES = 5


def _apply_over(function: Callable[..., Any], arguments: Sequence[Any], references: Sequence[Any]) -> Any:
    return function(*arguments, (ray.get(one) for one in references))


def _check_env_and_apply(function: Callable[..., Any], *arguments: Any) -> Any:
    refuse_unsafe_env()
    return function(*arguments)


def _check_env_and_call(function: Callable[[A], T], argument: A) -> T:
    refuse_unsafe_env()
    return function(argument)
