"""Seconds by hand, from round speeds."""

from dataclasses import replace

import pytest

from sharded_lamb import shapes
from sharded_lamb.plan.costs import Costs, costs
from sharded_lamb.plan.machine import Group, Machine
from sharded_lamb.plan.sharding import Choices, Sharding
from sharded_lamb.plan.times import Computation, Times, times

MACHINE = Machine(
    update_bytes_per_second=1000.0,
    intra_bytes_per_second=100.0,
    inter_bytes_per_second=20.0,
    intra_latency=0.25,
    inter_latency=1.0,
    ranks_per_node=4,
)


def made(stage: int, shard: int, replicate: int = 1, **more: object) -> Costs:
    """Two buckets: 400 B are reduced and 200 B gathered of each; a small all-reduce of 50 B; 3000 B updated."""
    sharding = Sharding(stage, shard, replicate)
    reduces = [400, 400] if stage == 2 else []
    sums = [40, 40] if stage == 2 and replicate > 1 else []
    large = {"all_gather": [200, 200], "reduce_scatter": reduces, "all_reduce_replicas": sums}
    return replace(Costs(sharding, {}, large, [50], {}, 3000, 0), **more)


def of(cost: Costs, forward: float = 0.0, backward: float = 0.0, **choices: bool) -> Times:
    return times(cost, Choices(**choices), MACHINE, Computation(forward, backward))


def test_rings_inside_and_between_nodes() -> None:
    assert Group.of(MACHINE, 4).ring_seconds(MACHINE, [400]) == [3 * 0.25 + 400 / 100]
    # Two nodes of four: 80 B/s leave a node together, which is less than 100 inside.
    assert Group.of(MACHINE, 8).ring_seconds(MACHINE, [400]) == [6 * 0.25 + 1.0 + 400 / 80]
    # One rank of each node, each with its own 20 B/s.
    assert Group.of(MACHINE, 3, stride=4).ring_seconds(MACHINE, [400]) == [2 * 1.0 + 400 / 20]
    # Every other rank: two of a node.
    assert Group.of(MACHINE, 4, stride=2).ring_seconds(MACHINE, [400]) == [2 * 0.25 + 1.0 + 400 / 40]
    assert Group.of(MACHINE, 1).ring_seconds(MACHINE, [400]) == [0.0]


def test_all_reduces() -> None:
    assert Group.of(MACHINE, 4).all_reduce_seconds(MACHINE, [400]) == [2 * (3 * 0.25 + 300 / 100)]
    # 64 nodes: rings would take 2 x 63 hops, a tree 2 x 6.
    assert Group.of(MACHINE, 64, stride=4).all_reduce_seconds(MACHINE, [10]) == [2 * 6 * 1.0 + 2 * 10 / 20]
    assert Group.of(MACHINE, 4).small_seconds(MACHINE, [50]) == [2 * 3 * 0.25 + 2 * 50 / 100]
    assert Group.of(MACHINE, 32).small_seconds(MACHINE, [40]) == [2 * (3 * 0.25 + 3 * 1.0) + 2 * 40 / 80]


def test_a_step_with_nothing_to_hide_behind() -> None:
    results = of(made(2, 4))
    assert results.update == 3.0
    assert results.small == 2.5
    assert results.gradients == 2 * 4.75
    assert results.gathers == 2 * 2.75
    assert results.exposed == results.communication == 2.5 + 9.5 + 5.5
    assert results.optimizer == 3.0 + 17.5
    assert results.in_step == 3.0 + 2.5 + 5.5


def test_reductions_hide_behind_backward_but_for_a_bucket() -> None:
    assert of(made(2, 4), backward=3.0).exposed == 2.5 + 6.5 + 5.5
    assert of(made(2, 4), backward=100.0).exposed == 2.5 + 4.75 + 5.5
    assert of(made(2, 4), backward=100.0, overlap=False).exposed == 2.5 + 9.5 + 5.5


def test_gathers_hide_behind_the_next_forward_where_they_may() -> None:
    assert of(made(2, 4), forward=100.0).exposed == 2.5 + 9.5 + 5.5
    assert of(made(2, 4), forward=100.0, overlap_forward=True).exposed == 2.5 + 9.5 + 2.75
    assert of(made(2, 4), overlap_forward=True).in_step == 3.0 + 2.5


def test_replicas_and_the_other_stages() -> None:
    two_levels = of(made(2, 4, 2))
    assert two_levels.gradients == 9.5 + 2 * 2 * (1.0 + 20 / 20)
    assert two_levels.small == 2 * (3 * 0.25 + 1.0) + 2 * 50 / 80
    ddp = of(made(1, 4, around={"ddp_all_reduce": [400]}), backward=1.0)
    assert ddp.gradients == 7.5
    assert ddp.exposed == 2.5 + 7.5 + 5.5
    around = {"fsdp_all_gather": [200], "fsdp_all_gather_again": [200], "fsdp_reduce_scatter": [400]}
    placed = made(3, 4, around=around, large={})
    assert of(placed).communication == 2.5 + 2 * 2.75 + 4.75
    assert of(placed, forward=100.0, backward=5.0).exposed == 2.5 + 2.75 + 4.75
    assert of(placed).in_step == 3.0 + 2.5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_faster_machines_and_longer_computation_expose_no_more(stage: int) -> None:
    results = shapes.named("bert-base")
    for ranks in (1, 4, 64):
        cost = costs(results, Choices(), Sharding(stage, ranks))
        exposed = [
            times(cost, Choices(), machine, Computation(seconds, seconds)).exposed
            for machine in (MACHINE, replace(MACHINE, intra_bytes_per_second=1e9, inter_bytes_per_second=1e9))
            for seconds in (0.0, 0.1, 1e9)
        ]
        assert exposed == sorted(exposed, reverse=True)
        assert (exposed[-1] == 0) is (ranks == 1)
