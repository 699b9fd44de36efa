"""What is asked of a cluster always fits it, and what cannot fit is refused with the reason."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqlabel.pipeline.errors import SystemicFault
from hqlabel.pipeline.ray_execution.placement import COMMIT_CPUS, Node, fit, still_fits
from hqlabel.pipeline.settings import ClusterSettings

GIB = 2**30


@pytest.mark.parametrize("cpus", [1, 2, 3])
def test_small_machines_run_one_actor_two_decoders_and_a_commit_at_once(cpus):
    found = fit(ClusterSettings(actors=1), [Node(cpus=cpus)])

    assert (found.actors_min, found.actors_max, found.gpus_per_actor) == (1, 1, 0)
    assert found.cpus_per_actor + 2 * found.decode_cpus + found.commit_cpus <= cpus


@pytest.mark.parametrize(
    ("cpus", "gpus", "actors", "decoders"),
    [(1, 0, None, 2), (2, 0, None, 2), (2, 0, 2, 2), (4, 0, None, 2), (8, 0, None, 2), (64, 0, None, 3),
     (16, 0, 1, 15), (2, 1, None, 2), (4, 1, None, 2), (4, 4, None, 2), (8, 1, None, 7)],
)  # fmt: skip
def test_two_units_at_least_can_be_prepared_beside_the_actors_and_never_more_than_cores_are_left(
    cpus, gpus, actors, decoders
):
    found = fit(ClusterSettings(actors=actors), [Node(cpus=cpus, gpus=gpus)])

    left = cpus - found.actors_max * found.cpus_per_actor - found.commit_tasks * found.commit_cpus
    assert int(left / found.decode_cpus + 1e-6) == decoders


@pytest.mark.parametrize("cpus", [[1], [2], [3], [16], [2, 2], [1, 4], [1] * 8])
def test_a_model_on_the_cpu_gets_every_core_and_decoding_a_little_of_each(cpus):
    nodes = [Node(cpus=one) for one in cpus]

    found = fit(ClusterSettings(), nodes)

    assert found.actors_max == sum(cpus)
    assert all(int(one / found.cpus_per_actor) >= one for one in cpus)


def test_no_model_process_is_started_that_no_unit_would_reach():
    requests = fit(ClusterSettings(actors=6, actors_min=2), [Node(cpus=8)])

    one, four, many = (requests.for_units(units) for units in (1, 4, 100))

    assert [(r.actors_min, r.actors_max) for r in (one, four, many)] == [(1, 1), (2, 4), (2, 6)]
    assert one.decode_cpus == requests.decode_cpus


def test_actor_and_decode_requests_differ_wherever_fusion_could_join_them():
    for settings in (
        ClusterSettings(),
        ClusterSettings(cpus_per_actor=0.95),
        ClusterSettings(cpus_per_actor=2),
    ):
        found = fit(settings, [Node(cpus=8)])
        assert found.cpus_per_actor != found.decode_cpus


def test_gpus_are_used_where_they_are():
    nodes = [Node(cpus=8, gpus=1), Node(cpus=8, gpus=4), Node(cpus=16)]

    found = fit(ClusterSettings(), nodes)

    assert (found.actors_max, found.gpus_per_actor, found.cpus_per_actor) == (5, 1.0, 1.0)
    assert fit(ClusterSettings(gpus_per_actor=0.5), nodes).actors_max == 10
    assert fit(ClusterSettings(gpus_per_actor=0), nodes).gpus_per_actor == 0


def test_a_gpu_node_with_few_cores_still_keeps_one_for_decoding():
    assert fit(ClusterSettings(), [Node(cpus=4, gpus=8)]).actors_max == 3


def test_processes_on_the_cpu_are_bounded_by_memory():
    assert fit(ClusterSettings(), [Node(cpus=64, memory_bytes=16 * GIB)]).actors_max == 4
    assert fit(ClusterSettings(), [Node(cpus=64, memory_bytes=1 * GIB)]).actors_max == 1


def test_a_pool_may_begin_small():
    found = fit(ClusterSettings(actors=6, actors_min=2), [Node(cpus=8)])

    assert (found.actors_min, found.actors_max) == (2, 6)


def test_a_pool_that_waits_for_most_of_its_nodes_decodes_with_whole_cores_on_the_first():
    found = fit(ClusterSettings(actors=32, actors_min=1, gpus_per_actor=1), [Node(cpus=8, gpus=1)])

    assert (found.actors_min, found.actors_max, found.decode_cpus) == (1, 32, 0.95)


@pytest.mark.parametrize(("actors", "cpus", "each"), [(2, 2, 0.75), (3, 2, 0.5), (2, 8, 1.0), (2, 1, 0.25)])
def test_more_actors_than_cores_get_smaller_shares(actors, cpus, each):
    found = fit(ClusterSettings(actors=actors), [Node(cpus=cpus)])

    assert (found.actors_max, found.cpus_per_actor) == (actors, each)


@pytest.mark.parametrize(
    ("threads", "cpus", "actors", "each"), [(1, 2, 2, 0.75), (2, 2, 1, 1.5), (4, 16, 4, 3.85), (8, 4, 1, 3.5)]
)
def test_a_model_of_several_threads_takes_as_many_cores(threads, cpus, actors, each):
    found = fit(ClusterSettings(), [Node(cpus=cpus)], threads)

    assert (found.actors_max, found.cpus_per_actor) == (actors, each)
    assert fit(ClusterSettings(), [Node(cpus=8, gpus=1)], threads).cpus_per_actor == 1.0


@pytest.mark.parametrize(
    ("settings", "before", "now", "fits"),
    [
        (ClusterSettings(), [Node(cpus=8, gpus=1)] * 2, [Node(cpus=8, gpus=1)] * 2, True),
        (ClusterSettings(), [Node(cpus=8, gpus=1)] * 2, [Node(cpus=8, gpus=1)] * 3, True),
        (ClusterSettings(), [Node(cpus=8, gpus=1)] * 2, [Node(cpus=8, gpus=1)], False),
        (ClusterSettings(), [Node(cpus=8, gpus=1), Node(cpus=8)], [Node(cpus=8, gpus=1)], True),
        (ClusterSettings(actors=2), [Node(cpus=2)] * 2, [Node(cpus=2)], False),  # the actors take all of it
        (ClusterSettings(actors=1), [Node(cpus=2)] * 2, [Node(cpus=2)], True),
        (ClusterSettings(actors=1), [Node(cpus=2)], [], False),
    ],
)
def test_a_lost_node_is_noticed_where_it_takes_the_room_of_actors_or_of_what_feeds_them(
    settings, before, now, fits
):
    assert still_fits(fit(settings, before), before, now) is fits


def test_a_pool_that_waits_for_its_nodes_has_lost_none():
    growing = fit(ClusterSettings(actors=4, actors_min=1), [Node(cpus=8, gpus=1)])

    assert still_fits(growing, [Node(cpus=8, gpus=1)], [Node(cpus=8, gpus=1)])


@pytest.mark.parametrize(
    ("settings", "nodes", "says"),
    [
        (ClusterSettings(), [], "0 nodes offers 0 CPU cores"),
        (ClusterSettings(), [Node(cpus=0), Node(cpus=0.5)], "wanted at least 1"),
        (ClusterSettings(gpus_per_actor=1), [Node(cpus=4)], "most GPUs has 0; set it to 0"),
        (ClusterSettings(cpus_per_actor=8), [Node(cpus=4)], "0 can be placed"),
        (ClusterSettings(actors=4, cpus_per_actor=1), [Node(cpus=2), Node(cpus=1)], "3 can be placed"),
        (ClusterSettings(actors=2, cpus_per_actor=1), [Node(cpus=2)], "set cluster.actors to 1"),
        (
            ClusterSettings(actors=4, cpus_per_actor=1),
            [Node(cpus=2), Node(cpus=2)],
            "set cluster.actors to 3",
        ),
        (ClusterSettings(cpus_per_actor=1), [Node(cpus=1)], "; lower cluster.cpus_per_actor"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_reason(settings, nodes, says):
    with pytest.raises(SystemicFault, match=says) as caught:
        fit(settings, nodes)
    assert caught.value.code == "resources"


@given(
    cpus=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    gpus=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    actors=st.none() | st.integers(1, 8),
    cpus_per_actor=st.sampled_from([None, 0.5, 1.0, 1.5, 2.0]),
)
def test_however_the_actors_are_packed_a_task_finds_room(cpus, gpus, actors, cpus_per_actor):
    nodes = [Node(cpus=c, gpus=g) for c, g in zip(cpus, gpus, strict=False)]
    try:
        found = fit(ClusterSettings(actors=actors, cpus_per_actor=cpus_per_actor), nodes)
    except SystemicFault:
        return
    most = [
        min(int(n.cpus / found.cpus_per_actor), int(n.gpus) if found.gpus_per_actor else 99) for n in nodes
    ]
    for packing in itertools.product(*(range(m + 1) for m in most)):
        if sum(packing) <= found.actors_max:
            rests = [n.cpus - p * found.cpus_per_actor for n, p in zip(nodes, packing, strict=True)]
            assert max(rests) >= found.decode_cpus - 1e-6, (packing, found)
    assert found.actors_min <= sum(most)
    assert found.commit_cpus == COMMIT_CPUS
