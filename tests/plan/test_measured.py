"""Predictions equal the memory and traffic of real ranks, to the byte, and `--check` detects differences."""

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_lamb import ShardedLamb
from sharded_lamb.comm.wire_formats import _float8_values
from sharded_lamb.kernels import ReferenceKernel
from sharded_lamb.plan import costs as plan_costs
from sharded_lamb.plan import probe
from sharded_lamb.plan.check import Weights, _mesh, check, compare, measure
from sharded_lamb.plan.costs import costs, trainable
from sharded_lamb.plan.machine import PRESETS, Machine
from sharded_lamb.plan.sharding import Choices, Sharding
from tests.comm.test_traffic import spied
from tests.harness import run_ranks
from tests.plan.cases import CHOICES, UGLY
from tests.training import bytes_covered

CPU = torch.device("cpu")


def shardings_of(world: int) -> list[Sharding]:
    """Six ranks: for shards of uneven size in two levels alone."""
    two_levels = [Sharding(stage, world // 2, 2) for stage in (1, 2, 3)] if world > 2 else []
    return two_levels if world == 6 else [*(Sharding(stage, world) for stage in (1, 2, 3)), *two_levels]


def compared(rank: int, world: int) -> list[tuple[str, str, int, int]]:
    """All choices on two ranks; on four the last two in turn, on six the last."""
    results, last = [], list(CHOICES.items())[-2:]
    for place, sharding in enumerate(shardings_of(world)):
        for name, choices in CHOICES.items() if world == 2 else [last[place % 2 if world == 4 else 1]]:
            measured = measure(UGLY, choices, sharding, CPU, timed_steps=1)
            for row in compare(costs(UGLY, choices, sharding, rank), measured):
                results.append((f"{sharding}, {name}", row.what, row.predicted, row.measured))
    return results


@pytest.mark.parametrize("world", [2, 4, 6])
def test_bytes_and_calls_are_those_of_real_ranks(world: int) -> None:
    for rank, rows in enumerate(run_ranks(world, compared, world)):
        assert len(rows) > 10 * len(shardings_of(world))
        for setting, what, predicted, measured in rows:
            assert predicted == measured, f"rank {rank}, {setting}: {what}"


def held_and_sent(rank: int, stage: int, choices: Choices) -> tuple[dict[str, int], Counter[str]]:
    """Without the package's own counters: float tensors that exist because of the optimizer, and torch.distributed's
    calls in the third step."""

    def alive() -> set[tuple[int, int]]:
        gc.collect()
        wanted = (torch.float32, torch.bfloat16, torch.uint8, torch.int16, torch.int8)
        tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.dtype in wanted]
        return {(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors}

    params = {
        name: torch.nn.Parameter(torch.ones(shape, dtype=choices.model_dtype)) for name, shape in UGLY.items()
    }
    _float8_values(torch.device("cpu"))  # one KiB a process
    before = alive()
    opt = ShardedLamb(
        params.items(),
        stage=stage,
        bucket_mb=choices.bucket_mb,
        state_dtype=choices.state_dtype,
        reduce_dtype=choices.reduce_dtype,
        gather_dtype=choices.gather_dtype,
        store_param_remainders=choices.store_param_remainders,
        ratio_blocks=choices.ratio_blocks,
    )

    def step() -> None:
        opt.zero_grad()
        torch.stack([p.sum(dtype=torch.float32) for p in params.values()]).sum().backward()
        opt.step()

    step()
    step()
    with spied() as seen:
        step()
    opt.zero_grad()
    large = [
        new for new in alive() - before if new[1] >= 4 * len(params)
    ]  # not what is one number a parameter
    return {"held": bytes_covered(large)}, seen.sent


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("stage", [1, 2])
def test_tensors_that_exist_and_calls_of_torch_agree(stage: int, name: str) -> None:
    choices = CHOICES[name].of_stage(stage)
    predicted = costs(UGLY, choices, Sharding(stage, 2))
    # Parameters lie in the buckets' flat memory, which is one of the new tensors.
    expected = predicted.total_memory - predicted.memory["gradients"]
    for held, sent in run_ranks(2, held_and_sent, stage, choices):
        assert held["held"] == expected
        assert sent["isend"] == predicted.wire["all_gather"] + predicted.wire.get("reduce_scatter", 0)
        assert sent["all_reduce"] == predicted.wire["all_reduce_small"]


class SentByFsdp(TorchDispatchMode):
    """Bytes that a rank hands to others in the collectives of fully_shard, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            output, given = args[0], args[1]
            self.sent[name.removeprefix("c10d::")] += abs(output.nbytes - given.nbytes)
        elif name == "c10d::allreduce_":
            self.sent["allreduce_"] += sum(x.nbytes for x in args[0])
        return func(*args, **(kwargs or {}))


def fsdp_sends(rank: int, sharding: Sharding) -> Counter[str]:
    choices = CHOICES["bf16"]
    model = Weights(trainable(UGLY, sharding).values(), choices.model_dtype, CPU)
    fully_shard(model, mesh=_mesh(sharding, CPU), reshard_after_forward=True)
    with SentByFsdp() as mode:
        model().backward()
    return mode.sent


@pytest.mark.parametrize("sharding", [Sharding(3, 2), Sharding(3, 4), Sharding(3, 2, 2)], ids=str)
def test_what_fully_shard_sends_around_the_optimizer(sharding: Sharding) -> None:
    around = costs(UGLY, CHOICES["bf16"], sharding).around
    for sent in run_ranks(sharding.world_size, fsdp_sends, sharding):
        gathers = sum(around["fsdp_all_gather"]) + sum(around["fsdp_all_gather_again"])
        assert sent["_allgather_base_"] == gathers
        assert sent["_reduce_scatter_base_"] == sum(around["fsdp_reduce_scatter"])
        assert sent["allreduce_"] == sum(around.get("fsdp_all_reduce", ()))


# -- the check itself ---------------------------------------------------------------------------------


def one_buffer_more(*args: Any, **kwargs: Any) -> int:
    return 4096


def two_gathers(buckets: Any, **kwargs: Any) -> dict[str, list[int]]:
    sends = original_sends(buckets, **kwargs)
    return {**sends, "all_gather": sends["all_gather"] * 2}


def rows_rounded_down(shape: tuple[int, ...], ranks: int, rank: int) -> int:
    return torch.Size(shape).numel() // ranks


original_sends = plan_costs.large_sends


def checked(rank: int, planted: tuple[str, Callable[..., Any]] | None) -> int:
    choices = replace(CHOICES["fp32"], bucket_mb=32)
    machine = PRESETS["h100-nvlink-ib"]
    with mock.patch("sharded_lamb.plan.check.TIMED_STEPS", 1):
        if planted is None:
            return check(UGLY, choices, machine, CPU)
        with mock.patch.object(plan_costs, *planted):
            return check(UGLY, choices, machine, CPU)


@pytest.mark.parametrize(
    ("planted", "code"),
    [
        (None, 0),
        (("staging_bytes", one_buffer_more), 1),
        (("large_sends", two_gathers), 1),
        (("chunk_numel", rows_rounded_down), 1),
    ],
    ids=["as it is", "staging", "wire", "chunks"],
)
def test_check_passes_and_fails(planted: tuple[str, Callable[..., Any]] | None, code: int) -> None:
    assert run_ranks(2, checked, planted) == [code] * 2


def probed_by_hand(rank: int) -> tuple[Any, ...]:
    """The probe's machine from given times, and the arguments of the chosen kernel."""
    kernel = mock.MagicMock(wraps=ReferenceKernel())
    seconds = iter([0.5, 0.125, 0.375])

    def timed(work: Callable[[], Any], device: torch.device) -> float:
        work()
        return next(seconds)

    with (
        mock.patch.object(probe, "_median", timed),
        mock.patch.object(probe.kernels, "choose", return_value=kernel) as choose,
    ):
        machine = probe.probed(CPU)
    (((first,), _, sums), _), (((second,), _, _), _) = (
        kernel.moments_and_norms.call_args,
        kernel.apply.call_args,
    )
    assert first is second
    return machine, choose.call_args.args, first.weight.numel(), sums[0].item(), first.weight[-1].item()


def test_the_probe_times_the_kernel_that_optimizers_choose() -> None:
    for machine, chosen, numel, squares, last in run_ranks(2, probed_by_hand):
        assert chosen == ("auto", CPU)
        assert numel >= 1 << 22
        assert squares == numel  # of weights that are 1
        assert 0.99 < last < 1  # pass 2 wrote the end of it
        assert machine == Machine(40 * numel / 0.5, 2**22 / 0.25, 2**22 / 0.25, 0.125, 0.125, 2)


def one_rank_differs(rank: int) -> int:
    planted = ("chunk_numel", rows_rounded_down) if dist.get_rank() == 1 else None
    return checked(rank, planted)


def test_one_rank_that_differs_fails_all() -> None:
    assert run_ranks(2, one_rank_differs) == [1, 1]
