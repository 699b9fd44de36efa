"""How many processes of which kind a cluster can hold: arithmetic on nodes, without Ray.

Ray places what fits and lets the rest wait in silence, for ever: a pool of actors that takes every
core leaves none for the tasks that feed it, and the job stops without a message. So the
requests are worked out here, and refused with a reason, before anything starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.settings import ClusterSettings

COMMIT_CPUS = 0.05
"""Request of a commit task. With a whole core, finished units waited behind decoding (38 of 40, measured)."""

CPU_ACTOR_BYTES = 4 * 2**30
"""Memory to reckon for a model process on the CPU: weights, features and one call of the decoder."""

# Just below a round number, so that the cores that decoding fills always leave a rest for commit tasks.
_DECODE_CPUS = 0.95
_DECODE_CPUS_AT_LEAST = 0.14
_COMMIT_TASKS_AT_LEAST = 4
_COMMIT_TASKS_PER_GPU_ACTOR = 2
_ACTOR_CPUS_OF_ONE = 0.5
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one live node offers to Ray, all of it taken as free. `memory_bytes`: 0 where unknown."""

    cpus: float
    gpus: float = 0.0
    memory_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What each kind of process asks Ray for, and how many actors and commit tasks there may be."""

    actors_min: int
    actors_max: int
    gpus_per_actor: float
    cpus_per_actor: float
    decode_cpus: float
    commit_cpus: float = COMMIT_CPUS
    commit_tasks: int = _COMMIT_TASKS_AT_LEAST
    """Without a bound Ray Data reserves a sixth of all cores for commits, and on two cores that is what the
    second decode task would have needed."""

    def for_units(self, units: int) -> Requests:
        """Return the same without model processes that none of that many units would ever reach."""
        most, least = min(self.actors_max, units), min(self.actors_min, units)
        return replace(self, actors_max=most, actors_min=least)


def fit(settings: ClusterSettings, nodes: Sequence[Node], cpu_threads: int = 1) -> Requests:
    """Return the requests for these nodes; however Ray packs the actors, some node keeps room for a task.

    `cpu_threads`: of a model process on a CPU (`model.cpu_threads`).

    Raises:
        SystemicFault: `resources`, with what is requested, what there is, and what to set.
    """
    largest = max((node.cpus for node in nodes), default=0.0)
    if largest < 1:
        raise _refused(f"the largest of {len(nodes)} nodes offers {largest:g} CPU cores, wanted at least 1")
    gpus = settings.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0
    hosts = [node for node in nodes if not gpus or node.gpus + _EPSILON >= gpus]
    if not hosts:
        most = max(node.gpus for node in nodes)
        raise _refused(
            f"cluster.gpus_per_actor is {gpus:g}, the node with most GPUs has {most:g}; set it to 0 for CPU"
        )
    actor_cpus = settings.cpus_per_actor or (_ACTOR_CPUS_OF_ONE if largest < 2 else 1.0)
    if not gpus and settings.cpus_per_actor is None:
        cores = actor_cpus if cpu_threads == 1 else float(cpu_threads)
        actor_cpus = min(cores, _share_of_actor(nodes, settings.actors, cpu_threads))
    least = settings.decode_cpus or _DECODE_CPUS_AT_LEAST
    placing = _Placing(nodes=tuple(nodes), actor_cpus=actor_cpus, gpus=gpus, decode_cpus=least)
    actors = settings.actors or _default_actors(placing, cpu_threads)
    if settings.decode_cpus is None:
        placing = _with_more_for_decoding(placing, min(actors, placing.places()))  # others may still come
    if not gpus and placing.decode_cpus == actor_cpus:
        # Ray fuses neighbours with equal requests: the actor would decode.
        placing = replace(placing, decode_cpus=placing.decode_cpus - 0.01)
    actors_min = min(settings.actors_min or actors, actors)
    _check(placing, actors, actors_min)
    return Requests(
        actors_min=actors_min,
        actors_max=actors,
        gpus_per_actor=gpus,
        cpus_per_actor=actor_cpus,
        decode_cpus=placing.decode_cpus,
        commit_tasks=_commit_tasks(actors, gpus),
    )


def still_fits(requests: Requests, before: Sequence[Node], now: Sequence[Node]) -> bool:
    """Return whether the nodes of now hold the actors of those before, and a task that feeds them."""
    actors = min(requests.actors_max, _placing_of(requests, before).places())
    placing = _placing_of(requests, now)
    room = placing.most_actors_with_room()
    return actors <= placing.places() and (room is None or actors <= room)


def _placing_of(requests: Requests, nodes: Sequence[Node]) -> _Placing:
    return _Placing(
        nodes=tuple(nodes),
        actor_cpus=requests.cpus_per_actor,
        gpus=requests.gpus_per_actor,
        decode_cpus=requests.decode_cpus,
    )


@dataclass(frozen=True, kw_only=True)
class _Placing:
    """Nodes with the requests of one actor and of one decode task."""

    nodes: tuple[Node, ...]
    actor_cpus: float
    gpus: float
    decode_cpus: float

    def actors_on(self, node: Node) -> int:
        """Return how many actors fit on an empty node."""
        by_cpus = math.floor(node.cpus / self.actor_cpus + _EPSILON)
        return min(by_cpus, math.floor(node.gpus / self.gpus + _EPSILON)) if self.gpus else by_cpus

    def places(self) -> int:
        return sum(self.actors_on(node) for node in self.nodes)

    def most_actors_with_room(self) -> int | None:
        """Return the largest pool that cannot crowd out a decode task on every node; None when no pool can.

        The worst packing puts on each node just enough actors to leave less than a task's request.
        """
        crowding = 0
        for node in self.nodes:
            room = node.cpus - self.decode_cpus
            if room < -_EPSILON:
                continue
            needed = math.floor(room / self.actor_cpus + _EPSILON) + 1
            if self.actors_on(node) < needed:
                return None
            crowding += needed
        return max(crowding - 1, 0)


def _commit_tasks(actors: int, gpus: float) -> int:
    """Return how many commits may run: a model on the CPU is too slow to need more than a few."""
    return max(_COMMIT_TASKS_AT_LEAST, _COMMIT_TASKS_PER_GPU_ACTOR * actors if gpus else 0)


def _with_more_for_decoding(placing: _Placing, actors: int) -> _Placing:
    """Give each decode task a core; where actors and commits leave less, a bit less than half of that, so
    that two tasks run: with one alone, an image that does not arrive would hold up every other unit."""
    requested = actors * placing.actor_cpus + _commit_tasks(actors, placing.gpus) * COMMIT_CPUS
    half = (sum(node.cpus for node in placing.nodes) - requested) / 2
    share = (math.floor(100 * half + _EPSILON) - 1) / 100
    more = replace(placing, decode_cpus=min(_DECODE_CPUS, share))
    room = more.most_actors_with_room()
    fits = room is None or min(actors, placing.places()) <= room
    return more if more.decode_cpus > placing.decode_cpus and fits else placing


def _share_of_actor(nodes: Sequence[Node], actors: int | None, threads: int) -> float:
    """Return what two decode tasks and some commits leave for each of the actors, in steps of 0.05: users who
    ask for two model processes on two cores mean two slower ones. Never below a tenth of a core.

    `actors` None: on every node one for as many cores as a model has threads. Decoding takes a tenth of what
    a model on the CPU takes, so a core kept free for it would mostly wait: on two cores that cost three
    eighths of the rate.
    """
    others = 2 * _DECODE_CPUS_AT_LEAST + _COMMIT_TASKS_AT_LEAST * COMMIT_CPUS
    if actors is None:
        shares = [
            (node.cpus - others) / _actors_by_threads(node, threads) for node in nodes if node.cpus >= 1
        ]
    else:
        shares = [(sum(node.cpus for node in nodes) - others) / actors]
    return max(math.floor(20 * min(shares) + _EPSILON) / 20, 0.1)


def _actors_by_threads(node: Node, threads: int) -> int:
    return max(math.floor(node.cpus / threads), 1 if node.cpus >= 1 else 0)


def _default_actors(placing: _Placing, threads: int) -> int:
    """Return one actor for every place, as long as decoding keeps room and memory lasts (on the CPU)."""
    room = placing.most_actors_with_room()
    places = placing.places() if room is None else min(placing.places(), room)
    if not placing.gpus:
        places = min(places, sum(_actors_by_threads(node, threads) for node in placing.nodes))
        by_memory = sum(int(node.memory_bytes // CPU_ACTOR_BYTES) for node in placing.nodes)
        known = all(node.memory_bytes for node in placing.nodes)
        places = min(places, max(1, by_memory)) if known else places
    return max(places, 1)


def _check(placing: _Placing, actors: int, actors_min: int) -> None:
    one = f"{placing.actor_cpus:g} CPU cores" + (f" and {placing.gpus:g} GPUs" if placing.gpus else "")
    offers = ", ".join(
        f"{node.cpus:g} CPU cores" + (f" + {node.gpus:g} GPUs" if node.gpus else "") for node in placing.nodes
    )
    if actors_min > placing.places():
        raise _refused(
            f"{actors_min} model processes of {one} each are wanted and {placing.places()} can be placed on "
            f"the nodes ({offers}); lower cluster.actors, or cluster.cpus_per_actor"
        )
    room = placing.most_actors_with_room()
    if room is not None and min(actors, placing.places()) > room:
        fix = f"set cluster.actors to {room}, or lower" if room else "lower"
        raise _refused(
            f"{actors} model processes of {one} each can leave no node with the {placing.decode_cpus:g} CPU "
            f"cores that decoding needs (nodes: {offers}); {fix} cluster.cpus_per_actor"
        )


def _refused(reason: str) -> SystemicFault:
    return SystemicFault("resources", reason)
