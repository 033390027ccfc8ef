"""What an optimizer made in the process goes with it: groups, threads, descriptors, hooks, handles in ``.grad``."""

import contextlib
import gc
import os
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import init_device_mesh

from sharded_lamb import ShardedLamb
from sharded_lamb.comm.groups import OwnedGroup, timeout_of_default
from tests.harness import run_ranks
from tests.training import assert_follows, average, backward, oracle_run, own_gradients, parameters, weights

WAYS = ("deleted", "closed", "beside a scheduler", "failed in backward", "taken over", "two at once")


def count(model: nn.Module) -> dict[str, int]:
    gc.collect()
    hooks = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())  # type: ignore[attr-defined]
    hooks += sum(len(part._forward_pre_hooks) + len(part._state_dict_pre_hooks) for part in model.modules())
    edges = [torch.autograd.graph.get_gradient_edge(p).node for p in model.parameters()]
    nodes = [len(getattr(edge, "pre_hooks", ()) or ()) for edge in edges]
    return {
        "groups": len(dist.distributed_c10d._world.pg_map),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "hooks": hooks + sum(nodes),
        "gradients": sum(p.grad is not None for p in model.parameters()),
    }


def trained(model: nn.Module, opt: ShardedLamb) -> None:
    model(torch.ones(4, 16)).square().mean().backward()
    opt.step()


def fails(_: Tensor) -> None:
    raise ArithmeticError("in backward")


def constructed_in_an_except_clause(*args: Any, **options: Any) -> ShardedLamb:
    try:
        raise ArithmeticError
    except ArithmeticError:
        return ShardedLamb(*args, **options)


def live_and_end(model: nn.Module, way: str, mesh: Any, kept: list[Any]) -> None:
    make = constructed_in_an_except_clause if way == "taken over" else ShardedLamb
    opt = make(model.named_parameters(), lr=1e-2, stage=2, mesh=mesh, bucket_mb=1e-4)
    opt.overlap_forward(model)
    trained(model, opt)
    if way == "closed":
        opt.close()
        opt.close()
        kept.append(opt)
    elif way == "beside a scheduler":
        torch.optim.lr_scheduler.LinearLR(opt)
    elif way == "failed in backward":
        model.zero_grad()
        handle = next(iter(model.parameters())).register_hook(fails)
        with pytest.raises(ArithmeticError):
            trained(model, opt)
        dist.barrier()  # the other rank still reduces over the group that this one is about to end
        handle.remove()
    elif way == "taken over":
        kept[:] = [opt, torch.optim.lr_scheduler.LinearLR(opt)]
    elif way == "two at once":
        other = nn.Linear(16, 16)
        trained(other, ShardedLamb(other.named_parameters(), stage=2))
    if way != "taken over":
        opt.zero_grad() if way == "deleted" else None


def settled(model: nn.Module, wanted: dict[str, int]) -> dict[str, int]:
    """The counts once they are what is wanted, or after five seconds: gloo closes connections in its own time."""
    for _ in range(100):
        if (now := count(model)) == wanted:
            break
        time.sleep(0.05)
    return now


def one_after_another(rank: int, way: str, axes: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    mesh = init_device_mesh("cpu", axes) if axes else None
    model, kept, seen = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3)), [], []  # type: ignore[var-annotated]
    start = count(model)
    for _ in range(6):
        live_and_end(model, way, mesh, kept)
        seen.append(count(model))
    if way == "taken over":
        kept[0].close()
    most = {what: max(now[what] for now in seen[:3]) for what in start}
    least = {what: min(now[what] for now in seen[3:]) for what in start}
    return start, most, least, settled(model, start)


def assert_flat(most: dict[str, int], least: dict[str, int]) -> None:
    """The last three of six optimizers cost no more than the first three did: one thing left by each would show."""
    assert {what: (most[what], least[what]) for what in most if least[what] > most[what]} == {}


@pytest.mark.parametrize("way", WAYS)
def test_many_optimizers_cost_what_one_does(way: str) -> None:
    for start, most, least, end in run_ranks(2, one_after_another, way, ()):
        assert_flat(most, least)
        assert end == start


@pytest.mark.parametrize("axes", [(2, 1), (1, 2)])
def test_many_optimizers_on_a_mesh_cost_what_one_does(axes: tuple[int, ...]) -> None:
    for start, most, least, end in run_ranks(2, one_after_another, "deleted", axes):
        assert_flat(most, least)
        assert end["hooks"] == start["hooks"]


def deleted_at_different_times(rank: int) -> list[int]:
    pair = dist.new_group([0, 1])
    kept, groups = [], []
    for _ in range(4):
        for group in (None, pair):
            if group is not None and rank == 2:
                continue
            params = parameters()
            opt = ShardedLamb(params.items(), stage=2, process_group=group)
            backward(params, own_gradients(rank, 0))
            opt.step()
            if rank:
                kept.append(opt)
            del opt
        groups.append(len(dist.distributed_c10d._world.pg_map))
    return groups


def test_ranks_delete_optimizers_at_different_times() -> None:
    first, *_ = run_ranks(3, deleted_at_different_times)
    assert first == [first[0]] * 4


def cycles_nobody_collects(rank: int) -> int:
    """The most groups at any time, of models with schedulers that only the garbage collector frees."""
    most = 0
    gc.disable()
    try:
        for _ in range(14):
            model = nn.Linear(4, 4)
            torch.optim.lr_scheduler.LinearLR(ShardedLamb(model.named_parameters()))
            most = max(most, len(dist.distributed_c10d._world.pg_map))
    finally:
        gc.enable()
    return most


def test_reference_cycles_do_not_pile_up() -> None:
    assert max(run_ranks(2, cycles_nobody_collects)) <= 10


# -- taking over ------------------------------------------------------------------------------------------------


def take_over(rank: int, stage: int) -> tuple[dict[str, Tensor], str, list[str]]:
    params = parameters()
    old = ShardedLamb(params.items(), stage=stage, lr=1.0)
    if stage == 2:
        backward(params, own_gradients(rank, 9))  # reduced, and dropped with the old optimizer
    start = {name: p.detach().clone() for name, p in params.items()}
    assert all(torch.equal(value, start[name]) for name, value in weights().items())
    with pytest.raises(ValueError, match=r"call close\(\) on the other one first.*a scheduler"):
        ShardedLamb(params.items(), stage=stage)
    new = constructed_in_an_except_clause(params.items(), stage=stage)
    errors = []
    for call in (old.step, old.zero_grad, lambda: old.clip_grad_norm_(1.0), lambda: old.add_param_group({})):
        with pytest.raises(RuntimeError, match=r"took over 'embed\.weight'") as caught:
            call()
        errors.append(str(caught.value))
    for step in range(3):
        if stage == 2:
            backward(params, own_gradients(rank, step))
        else:
            averaged = average(own_gradients(r, step) for r in range(2))
            for name, p in params.items():
                p.grad = averaged[name].float()  # type: ignore[union-attr]
        new.step()
        new.zero_grad()
    assert len(old.state_dict()["state"]) == len(params)
    return {name: p.detach().clone() for name, p in params.items()}, errors[0], errors


@pytest.mark.parametrize("stage", [1, 2])
def test_an_optimizer_constructed_in_an_except_clause_takes_over_the_parameters(stage: int) -> None:
    averaged = [average(own_gradients(rank, step) for rank in range(2)) for step in range(3)]
    oracle = oracle_run(weights(), averaged)
    for results, error, _ in run_ranks(2, take_over, stage):
        assert_follows(results, oracle)
        assert "a scheduler or a wrapper may still hold this one" in error


def recovered(rank: int) -> int:
    """Construct again where the failed optimizer is held by the traceback, out of reach."""
    model = nn.Linear(6, 4)

    def train() -> None:
        optimizer = ShardedLamb(model.named_parameters(), stage=2)
        trained_with = model(torch.ones(2, 6)).sum()
        trained_with.backward()
        optimizer.step()
        raise MemoryError

    try:
        train()
    except MemoryError:
        opt = ShardedLamb(model.named_parameters(), stage=2)
        model(torch.ones(2, 6)).sum().backward()
        opt.step()
    return len(model.weight._post_accumulate_grad_hooks)  # type: ignore[attr-defined]


def test_construct_again_in_the_except_clause() -> None:
    assert run_ranks(2, recovered) == [1] * 2
    assert recovered(0) == 1


def closed_alone() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = ShardedLamb([p], stage=2)
    p.sum().backward()
    opt.close()
    assert p.grad is None
    with pytest.raises(RuntimeError, match=r"closed: close\(\) was called"):
        opt.step()


def test_close_without_ranks() -> None:
    closed_alone()


def use_an_ended_group(rank: int) -> None:
    opt = ShardedLamb(parameters().items())
    opt.close()
    with pytest.raises(RuntimeError, match="closed with the optimizer"):
        opt.full_state_dict()


def test_collectives_of_a_closed_optimizer() -> None:
    run_ranks(2, use_an_ended_group)


def connected_late(rank: int) -> bool:
    """Whether rank 1 has a group while rank 0, which has heard from it, is still connecting."""
    store, make = c10d._get_default_store(), c10d._new_process_group_helper
    seen = [False]

    def made(*args: Any, **kwargs: Any) -> Any:
        result = make(*args, **kwargs)
        with contextlib.suppress(RuntimeError):
            store.wait(["has a group"], timedelta(seconds=1))
            seen[0] = True
        return result

    with mock.patch.object(c10d, "_new_process_group_helper", made if rank == 0 else make):
        group = OwnedGroup([0, 1])
    if rank == 1:
        store.set("has a group", "")
    group.end()
    return seen[0]


def test_no_rank_has_a_group_before_all_have_connected() -> None:
    """One that ended it sooner would break the others' construction."""
    assert run_ranks(2, connected_late) == [False, False]


def destroyed_first(rank: int) -> int:
    """Deleted after the default group, and after the next default group was made."""
    opt = ShardedLamb(parameters().items())
    group, timeout = OwnedGroup([0, 1]), timeout_of_default(torch.device("cpu"))
    dist.destroy_process_group()
    assert not group.is_alive
    group.end()
    store = dist.PrefixStore("again", dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"])))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    new = ShardedLamb(parameters().items())
    del opt
    gc.collect()
    params = parameters()
    new = ShardedLamb(params.items(), stage=2)
    backward(params, own_gradients(rank, 0))
    new.step()
    return len(dist.distributed_c10d._world.pg_map)


def test_the_default_group_may_go_first() -> None:
    assert run_ranks(2, destroyed_first) == [2] * 2
