"""Point-to-point exchange of gradients: large slices from their own memory, the rest staged, in any layout."""

from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from sharded_lamb import ShardedLamb
from sharded_lamb.gradients import exchange as staging
from sharded_lamb.gradients.exchange import P2PExchange, Staging
from tests.harness import run_ranks
from tests.pairs import pairs

SHAPES = {
    "matrix": (64, 96),
    "bias": (5,),
    "channels": (8, 16, 3, 3),  # in channels_last
    "empty": (0, 4),
    "long": (7001,),
    "scalar": (),
    "last": (300, 3),
}


def parameters(dtype: torch.dtype) -> dict[str, Parameter]:
    values = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    values["channels"] = values["channels"].to(memory_format=torch.channels_last)
    return {name: Parameter(value) for name, value in values.items()}


def gradient(name: str, rank: int, step: int, dtype: torch.dtype) -> Tensor | None:
    """In any memory format; "long" is missing on the last rank, "last" on all in the second step."""
    seed = 1000 * rank + 10 * step + list(SHAPES).index(name)
    value = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed)).to(dtype)
    if name == "channels" and step != 1:
        value = value.to(memory_format=torch.channels_last)
    if name == "matrix" and step == 2:
        value = value.t().contiguous().t()
    missing = (name == "long" and rank == dist.get_world_size() - 1) or (name == "last" and step == 1)
    return None if missing else value


@dataclass
class Averaged:
    slices: list[
        dict[str, tuple[int, Tensor]]
    ]  # per step: first element in memory order, and the averaged slice
    sent: list[Counter[str]]


def averaged(
    rank: int,
    message_bytes: int,
    dtype: torch.dtype,
    wire: torch.dtype | None,
    kernel: str = "auto",
    uses_p2p: bool = True,
) -> Averaged:
    """Three rounds with gradients zeroed between, through the same staging memory."""
    result = Averaged([], [])
    with mock.patch.object(staging, "MESSAGE_BYTES", message_bytes):
        named = parameters(dtype)
        opt = ShardedLamb(named.items(), stage=2, bucket_mb=0.02, reduce_dtype=wire, lr=0.0, kernel=kernel)
        opt._collectives.uses_p2p = uses_p2p
        original = dist.isend
        for step in range(3):
            for name, p in named.items():
                p.grad = gradient(name, rank, step, dtype)
            memory = {p.grad.untyped_storage().data_ptr() for p in named.values() if p.grad is not None}
            sent: Counter[str] = Counter()

            def isend(tensor: Tensor, memory: set[int] = memory, sent: Counter[str] = sent, **kwargs: object):
                own = tensor.untyped_storage().data_ptr() in memory
                sent["from gradients" if own else "from staging"] += tensor.nbytes
                return original(tensor, **kwargs)

            with mock.patch.object(dist, "isend", isend):
                opt._gradients.ready(None)
            slices = {}
            for bucket in opt._store.buckets:
                for segment in bucket.segments:
                    part = bucket.slice_of(segment.param, bucket.shard.grad).clone()
                    slices[opt._store.names[segment.param]] = (segment.start, part)
            result.slices.append(slices)
            result.sent.append(sent)
            opt.zero_grad()
    return result


def in_memory_order(name: str, value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1).reshape(-1) if name == "channels" else value.reshape(-1)


@pairs(
    world=[2, 3],
    kernel=["cpp", "torch"],
    message_bytes=[1, 4096, 1 << 30, None],
    dtypes=[(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)],
)
def test_every_element_is_averaged_on_its_owner(
    world: int, kernel: str, message_bytes: int | None, dtypes: tuple[torch.dtype, torch.dtype | None]
) -> None:
    dtype, wire = dtypes
    """message_bytes None: one fused reduce-scatter, as on other backends than gloo."""
    uses_p2p = message_bytes is not None
    results = run_ranks(world, averaged, message_bytes or 0, dtype, wire, kernel, uses_p2p)
    expected = run_ranks(world, whole, dtype)[0]
    for step in range(3):
        averages = {name: torch.full((value.numel(),), torch.nan) for name, value in expected[step].items()}
        for result in results:
            for name, (start, part) in result.slices[step].items():
                averages[name][start : start + len(part)] = part
        for name, value in expected[step].items():
            if uses_p2p:
                assert torch.equal(averages[name], value), (step, name)
            else:  # the library sums in its own order and rounds to the wire's dtype
                eps = torch.finfo(wire or dtype).eps
                torch.testing.assert_close(averages[name], value, rtol=4 * eps, atol=4 * eps)


def whole(rank: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The averages, computed from all ranks' gradients in rank order."""
    world, steps = dist.get_world_size(), []
    for step in range(3):
        averages = {}
        for name, shape in SHAPES.items():
            total = torch.zeros(torch.Size(shape).numel())
            for other in range(world):
                grad = gradient(name, other, step, dtype)
                if grad is not None:
                    total += in_memory_order(name, grad.float())
            averages[name] = total / world
        steps.append(averages)
    return steps


def test_large_slices_are_sent_from_the_gradients() -> None:
    for result in run_ranks(2, averaged, 4096, torch.float32, None):
        assert result.sent[0]["from gradients"] > 0
        assert result.sent[0]["from staging"] > 0
    for result in run_ranks(2, averaged, 1 << 30, torch.float32, None):
        assert result.sent[0]["from gradients"] == 0
    for result in run_ranks(2, averaged, 1, torch.bfloat16, torch.float32):
        assert result.sent[0]["from gradients"] == 0  # of another dtype than the wire's


def _kinds(rank: int) -> list[type]:
    opt = ShardedLamb([Parameter(torch.ones(9))], stage=2)
    (bucket,) = opt._store.buckets
    memory = Staging([bucket], opt._collectives)
    assert memory.exchange(0, bucket) is memory.exchange(0, bucket)
    return [type(memory.exchange(0, bucket))]


def test_gloo_uses_p2p() -> None:
    assert run_ranks(2, _kinds) == [[P2PExchange], [P2PExchange]]
