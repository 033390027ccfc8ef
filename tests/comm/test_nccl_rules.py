"""What holds on NCCL, with its rules played by gloo: tests on CPUs see none of it otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import init_device_mesh

from sharded_lamb import ShardedLamb
from sharded_lamb.comm import collectives
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.groups import OwnedGroup
from sharded_lamb.comm.topology import Topology
from tests.harness import run_ranks

NAME_OF_BACKEND = collectives._backend


def reduced_as_nccl(output: Tensor, full: Tensor, group: dist.ProcessGroup, op: Any) -> None:
    """A ring in the dtype of ``full``, rounding at each hop; AVG multiplies each rank's part before."""
    world, here = group.size(), group.rank()
    parts = [torch.empty_like(full) for _ in range(world)]
    dist.all_gather(parts, full, group=group)
    if op == dist.ReduceOp.AVG:
        parts = [part / world for part in parts]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    output.copy_(total.view(world, -1)[here])


@contextmanager
def nccl() -> Iterator[None]:
    """Groups say that they are NCCL's, and reduce-scatters follow its rules."""

    def said(group: dist.ProcessGroup, device: torch.device) -> str:
        return "nccl" if NAME_OF_BACKEND(group, device) == "gloo" else "none"

    with (
        mock.patch.object(collectives, "_backend", said),
        mock.patch.object(collectives, "_reduce_scatter", reduced_as_nccl),
    ):
        yield


def averaged(rank: int, dtype: torch.dtype, axes: tuple[int, ...]) -> tuple[int, Tensor]:
    """Skipped steps, and the averages of gradients whose sum overflows float16."""
    mesh = None if len(axes) == 1 else init_device_mesh("cpu", axes)
    weight = nn.Parameter(torch.ones(300, dtype=dtype))
    with nccl():
        optimizer = ShardedLamb([("weight", weight)], lr=0.01, stage=2, mesh=mesh)
        (weight.float() * torch.full((300,), 40_000.0 + 64 * rank)).sum().backward()
        norm = float(optimizer.clip_grad_norm_(1e30))
        optimizer.step()
    return optimizer.skipped_steps, torch.tensor(norm / 300**0.5)


def test_averages_of_16_bit_gradients_do_not_overflow() -> None:
    for axes in ((2,), (1, 2), (2, 2)):
        world = axes[0] * axes[-1] if len(axes) == 2 else 2
        mean = 40_000.0 + 64 * (world - 1) / 2
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for skipped, actual in run_ranks(world, averaged, dtype, axes):
                assert skipped == 0, (axes, dtype)
                torch.testing.assert_close(
                    actual, torch.tensor(mean), rtol=2e-3 if dtype != torch.bfloat16 else 1e-2, atol=0
                )


def batches_of_whole_states(rank: int) -> int:
    weight = nn.Parameter(torch.ones(300))
    optimizer = ShardedLamb([("weight", weight)], lr=0.01)
    with mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as batch:
        optimizer.load_full_state_dict(optimizer.full_state_dict())
    return batch.call_count


def test_whole_states_travel_in_batches() -> None:
    """Outside of batches NCCL makes a communicator for every pair of ranks, with memory of its own."""
    sent, received = run_ranks(2, batches_of_whole_states)
    assert sent == received > 0


def on_a_gpu_with_gloo(rank: int) -> str:
    try:
        Collectives(Topology.of(None, None), torch.device("cuda", 0))
    except RuntimeError as error:
        return str(error)
    return ""


def test_gloo_is_refused_for_parameters_on_a_gpu() -> None:
    for message in run_ranks(2, on_a_gpu_with_gloo):
        assert "cuda:0" in message
        assert "cpu:gloo,cuda:nccl" in message


def device_bound_while_grouping(rank: int, ranks: list[int]) -> tuple[object, object]:
    """The device that the default group is bound to inside torch's construction of a group, and after it."""
    default, seen = c10d._get_default_group(), []
    make = c10d._new_process_group_helper

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(default.bound_device_id)
        default.bound_device_id = None  # gloo connects no devices
        return make(*arguments, **{**options, "device_id": None})

    bound = torch.device("cuda", rank)
    default.bound_device_id = bound
    try:
        with mock.patch.object(c10d, "_new_process_group_helper", watched):
            if rank in ranks:
                group = OwnedGroup(ranks)
                dist.barrier(group.pg)  # none ends while another still connects
                group.end()
            return (seen or ["absent"])[0], default.bound_device_id
    finally:
        default.bound_device_id = None


def test_a_group_of_some_ranks_splits_no_communicator_of_all() -> None:
    """With ``init_process_group(device_id=…)`` that is collective over all ranks, and the others do not come."""
    some = run_ranks(3, device_bound_while_grouping, [0, 2])
    assert some[0] == (None, torch.device("cuda", 0))
    assert some[2] == (None, torch.device("cuda", 2))
    assert some[1][0] == "absent"
    for rank, (inside, _) in enumerate(run_ranks(2, device_bound_while_grouping, [0, 1])):
        assert inside == torch.device("cuda", rank)
