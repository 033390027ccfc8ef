"""Uneven inputs: `Join` over DistributedDataParallel and `ShardedLamb`, as ZeroRedundancyOptimizer takes them."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from sharded_lamb import ShardedLamb
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.oracle import OracleLamb
from tests.training import assert_follows, average, draw, loss_of

SHAPES = {"embed": (67, 31), "norm": (17,), "empty": (0, 3), "one": (1,)}
BATCHES = (3, 1, 5)


class Model(nn.Module):
    """Its loss has the gradients ``draw(shape, "gradient", name, rank, step)``."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(draw(shape, "weight", name)))

    def forward(self, rank: int, step: int) -> Tensor:
        return loss_of(dict(self.named_parameters()), gradients(rank, step))


def gradients(rank: int, step: int) -> dict[str, Tensor | None]:
    """Zeros of a rank that has joined, as DDP counts them."""
    factor = float(step < BATCHES[rank])
    return {name: factor * draw(shape, "gradient", name, rank, step) for name, shape in SHAPES.items()}


def rate(step: int) -> float:
    return 0.02 / (1 + step)


def uneven(rank: int, clip: float | None, scaled: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """(weights before the final synchronization, weights after it, step count)"""
    model = DistributedDataParallel(Model(), find_unused_parameters=False)
    opt = ShardedLamb(model.module.named_parameters(), bucket_mb=0.002)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    before: dict[str, Tensor] = {}
    with Join([model, opt]):
        for step in range(BATCHES[rank]):
            opt.param_groups[0]["lr"] = rate(step)  # ranks that joined call no scheduler
            scaler.scale(model(rank, step)).backward()
            if clip is not None:
                scaler.unscale_(opt)
                opt.clip_grad_norm_(clip)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    after = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    return before, after, int(opt._store.step.max())


@pytest.mark.parametrize(("clip", "scaled"), [(None, False), (0.5, False), (None, True), (0.5, True)])
def test_joined_ranks_update_their_shards(clip: float | None, scaled: bool) -> None:
    results = run_ranks(3, uneven, clip, scaled)
    start = {name: draw(shape, "weight", name).double().numpy() for name, shape in SHAPES.items()}
    oracle = OracleLamb(start, max_grad_norm=clip)
    for step in range(max(BATCHES)):
        for options in oracle.options.values():
            options["lr"] = rate(step)
        averaged = average(gradients(rank, step) for rank in range(3))
        oracle.step({name: None if g is None else g.numpy() for name, g in averaged.items()})
    last = BATCHES.index(max(BATCHES))
    assert_follows(results[last][0], oracle)
    for _, after, steps in results:
        assert_follows(after, oracle)
        assert steps == max(BATCHES)


def within_groups(rank: int, how: str) -> int:
    """The steps of ranks 0 and 1 of 3, in a group or mesh of their own."""
    group = dist.new_group([0, 1])
    if rank == 2:
        return 0
    model = DistributedDataParallel(Model(), process_group=group)
    opt = ShardedLamb(model.module.named_parameters(), process_group=group)
    steps = 0
    with Join([model, opt]):
        for step in range(BATCHES[rank]):
            model(rank, step).backward()
            opt.step()
            opt.zero_grad()
            steps += 1
    return steps


def test_join_uses_the_process_group_of_the_optimizer() -> None:
    assert run_ranks(3, within_groups, "group") == [3, 1, 0]


def even_again(rank: int) -> tuple[int, int]:
    """All-reduces of a step inside `Join` and, after a `Join` that is disabled, outside."""
    model = DistributedDataParallel(Model())
    opt = ShardedLamb(model.module.named_parameters())
    counts = []
    for enable in (True, False):
        with Join([model, opt], enable=enable):
            for step in range(3):
                before = opt.traffic.calls["all_reduce_small"]
                model(0, step).backward()
                opt.step()
                opt.zero_grad()
        counts.append(opt.traffic.calls["all_reduce_small"] - before)
    return counts[0], counts[1]


def test_a_step_outside_join_sends_nothing_more() -> None:
    assert run_ranks(2, even_again) == [(3, 2)] * 2


def lone_join(rank: int) -> None:
    model = DistributedDataParallel(Model())
    opt = ShardedLamb(model.module.named_parameters())
    with model.join():
        for step in range(2):
            model(rank, step).backward()
            opt.step()


def stage_2(rank: int) -> None:
    Join([ShardedLamb(Model().named_parameters(), stage=2)])


def two_axes(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 1))
    opt = ShardedLamb(Model().named_parameters(), mesh=mesh)
    assert opt.join_process_group is dist.group.WORLD
    Join([opt, ShardedLamb(Model().named_parameters(), process_group=dist.new_group([0, 1]))])


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (lone_join, r"use `with Join([model, optimizer]):`"),
        (stage_2, "Join got a ShardedLamb of stage 2"),
        (two_axes, "multiple process groups"),
    ],
)
def test_errors_are_raised_on_every_rank(case, why: str) -> None:  # type: ignore[no-untyped-def]
    for kind, message in run_ranks_expecting_errors(2, case, timeout=30).values():
        assert kind == "ValueError"
        assert why in message
