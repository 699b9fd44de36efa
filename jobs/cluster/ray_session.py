"""Where the model runs: the private Ray, started when work needs it, or the cluster that was named.

One object for the life of a command. It answers the three questions that come before work (do the
requests fit, on which kind of device, in which number format) without starting a private Ray for
them, so that a finished job costs no start of Ray at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Literal, Self

from hqlabel.jobs.cluster.ray_cluster import (
    ClusterInfo,
    address_to_join,
    refuse_local_output,
    starting_ray,
    usable_cpus,
)
from hqlabel.jobs.job_setup import resolve_settings
from hqlabel.jobs.load_config import Config
from hqlabel.jobs.terminal.signals import Interrupts
from hqlabel.pipeline.errors import JobRefused, SystemicFault, count
from hqlabel.pipeline.planning.partitioned_plan import Tasks
from hqlabel.pipeline.ray_execution.placement import Node, Requests, fit
from hqlabel.pipeline.tables.manifest import Part
from hqlabel.pipeline.tables.publish_tables import PartTask

RAY_MEMORY_SHARE = 0.7
"""What a private Ray leaves for processes; the rest is its object store."""

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvmap")
"""What is there on Linux when torch could find a GPU: of NVIDIA, AMD, WSL, Jetson (two)."""

SERIAL_BYTES = 64 * 2**20
"""Committed units of less than this together are published in seconds: less than a start of Ray takes."""


def memory_bytes() -> int:
    """Return the memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpus() -> int:
    """Return the GPUs of this machine; torch, which costs a second, is asked only where a driver is."""
    if not any(map(os.path.exists, _GPU_DRIVERS)):
        return 0
    import torch

    return torch.cuda.device_count()


class Machine:
    """Ray and what runs on it; a context manager that ends what it started. `joins`: a named cluster."""

    def __init__(self, config: Config, interrupts: Interrupts) -> None:
        self._config = config
        self._interrupts = interrupts
        self._cluster = config.cluster
        self._cpu_threads = config.model.cpu_threads
        self.joins = address_to_join(config.cluster.ray_address, os.environ) is not None
        self._stack = contextlib.ExitStack()
        self._started: Callable[[], ClusterInfo] | None = None
        self._info: ClusterInfo | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def check(self) -> Requests:
        """Return what each process will request; joins a named cluster for it, starts no private Ray.

        Raises:
            JobRefused: it does not fit, or the output cannot be reached from every node.
        """
        try:
            return self._requests()
        except SystemicFault as fault:
            raise JobRefused(f"nothing was begun: {fault.message}") from fault

    def _requests(self) -> Requests:
        if self.joins:
            self.start()
            from hqlabel.pipeline.ray_execution.node_watch import check_resources

            return check_resources(self._cluster, self._cpu_threads)
        cpus = float(self._config.cluster.cpus or usable_cpus())
        gpus, memory = float(_gpus()), RAY_MEMORY_SHARE * memory_bytes()
        return fit(self._cluster, [Node(cpus=cpus, gpus=gpus, memory_bytes=memory)], self._cpu_threads)

    def device(self) -> Literal["cuda", "cpu"]:
        """Return the kind of device that the model will run on."""
        return "cuda" if self.check().gpus_per_actor > 0 else "cpu"

    def dtype(self) -> str:
        """Return the number format of a new job, for which a node that will run the model is probed.

        Raises:
            SystemicFault: `device`: bfloat16 is configured, and such a node has no instructions for it.
        """
        configured = self._config.model.dtype
        if configured == "float32":
            return configured
        if configured == "auto":  # never refuses, and takes seconds: torch
            self.begin()
        from hqlabel.pipeline.stages.load_model import resolve_dtype

        if not self.joins:
            return resolve_dtype(configured, self.device() == "cuda")
        self.start()
        from hqlabel.pipeline.ray_execution.ray_tasks import run_on_model_node

        return run_on_model_node(partial(resolve_dtype, configured), self._cluster, self._cpu_threads)

    def begin(self) -> None:
        """Let Ray start while other things are done, if it has not begun: soon `start` will be called.

        Raises:
            JobRefused: no cluster there.
        """
        if self._started is None:
            ray = starting_ray(self._config.cluster, os.environ, on_death=self._interrupts.end_with)
            self._started = self._stack.enter_context(ray)
            self._interrupts.install()  # Ray has replaced our handler

    def start(self) -> ClusterInfo:
        """Return the running Ray, started or joined at the first call.

        Raises:
            JobRefused: no cluster there, or the output is a local path and there are several nodes.
            SystemicFault: `resources`, when a private Ray does not start.
        """
        if self._info is None:
            self.begin()
            assert self._started is not None, "it has begun"
            info = self._started()
            self._info = info
            uri = self._config.output.uri or ""
            refuse_local_output(
                info,
                uri,
                is_local=resolve_settings.is_local(uri),
                shared_paths=self._config.cluster.shared_paths,
            )
        return self._info

    def planning_tasks(self, uris: Sequence[str]) -> Tasks | None:
        """Return what runs the tasks of a plan in partitions, on a Ray that is started for it.

        None where other nodes would look for tables of this one on a disk of their own.

        Raises:
            JobRefused, SystemicFault: as `start`.
        """
        info = self.start()
        local = any(map(resolve_settings.is_local, uris))
        if local and info.nodes > 1 and not self._cluster.shared_paths:
            return None
        from hqlabel.pipeline.ray_execution.ray_tasks import RayTasks

        return RayTasks()

    def describe(self, units: int) -> str:
        """Return the machine as text, also before a private Ray starts; `units`: how many are to be done."""
        if self._info is not None:
            return str(self._info)
        requests = self.check()
        cpus = self._config.cluster.cpus or usable_cpus()
        processes = count(min(requests.actors_max, units), "model process", "model processes")
        return f"private Ray on this machine: {cpus} CPU cores, {processes} on {self.device()}"

    def map_parts(self, function: Callable[[PartTask], Part], tasks: Sequence[PartTask]) -> Iterable[Part]:
        """Yield `function` of every part, from Ray tasks in any order; do little work here, without Ray."""
        size = sum(unit.size for task in tasks for unit in task.part_units)
        if size < SERIAL_BYTES and (self._info is None or len(tasks) == 1):
            return map(function, tasks)
        self.start()
        from hqlabel.pipeline.ray_execution.ray_tasks import map_parts

        return map_parts(function, tasks)
