"""Shared by tests that train: parameters and gradients drawn by name, and the float64 oracle of the same run.

Losses are linear in the parameters, so every rank's gradients are known before the run; the oracle gets their average
over ranks.
"""

import io
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

from sharded_lamb import ShardedLamb
from tests.oracle import OracleLamb

Shape = tuple[int, ...]
Draw = Callable[[int, int], dict[str, Tensor | None]]
"""(rank, step) → that rank's gradients; None or absent: no gradient."""

# One element, primes, no element, less than a block, several blocks.
SHAPES: dict[str, Shape] = {
    "embed.weight": (67, 31),
    "norm.weight": (17,),
    "norm.bias": (17,),
    "empty": (0, 3),
    "fc.weight": (37, 23),
    "fc.bias": (1,),
    "scale": (),
}


def draw(shape: Shape, *key: object) -> Tensor:
    """Standard normal fp32 numbers that depend on ``key`` alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    return torch.randn(shape, generator=generator)


def weights(shapes: Mapping[str, Shape] = SHAPES) -> dict[str, Tensor]:
    return {name: draw(shape, "weight", name) for name, shape in shapes.items()}


def parameters(
    shapes: Mapping[str, Shape] = SHAPES, dtype: torch.dtype = torch.float32
) -> dict[str, Parameter]:
    return {name: Parameter(value.to(dtype)) for name, value in weights(shapes).items()}


def own_gradients(rank: int, step: int, shapes: Mapping[str, Shape] = SHAPES) -> dict[str, Tensor | None]:
    return {name: draw(shape, "gradient", name, rank, step) for name, shape in shapes.items()}


def average(gradients: Iterable[Mapping[str, Tensor | None]]) -> dict[str, Tensor | None]:
    """The average over ranks in fp64; None counts as zero on some ranks, and stays None on all."""
    per_rank = list(gradients)
    names = dict.fromkeys(name for grads in per_rank for name in grads)
    averaged: dict[str, Tensor | None] = {}
    for name in names:
        present = [grads[name].double() for grads in per_rank if grads.get(name) is not None]  # type: ignore[union-attr]
        averaged[name] = torch.stack(present).sum(0) / len(per_rank) if present else None
    return averaged


def backward(
    params: Mapping[str, Parameter],
    gradients: Mapping[str, Tensor | None],
    order: Iterable[str] | None = None,
) -> None:
    """A backward that produces ``gradients``; hooks fire in the reverse of ``order``."""
    used = [name for name in (order or params) if gradients.get(name) is not None]
    if used:
        loss_of(params, gradients, used).backward()


def loss_of(
    params: Mapping[str, Parameter], gradients: Mapping[str, Tensor | None], used: Iterable[str] | None = None
) -> Tensor:
    terms = [(params[name] * gradients[name].to(params[name].dtype)).sum() for name in (used or params)]  # type: ignore[union-attr]
    return torch.stack([term.double() for term in terms]).sum()


def give(params: Mapping[str, Parameter], gradients: Mapping[str, Tensor | None]) -> None:
    """Assign ``gradients`` to ``.grad``, as after a reduction by DDP."""
    for name, p in params.items():
        grad = gradients.get(name)
        p.grad = None if grad is None else grad.to(p.dtype, copy=True)


def train(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, Parameter],
    *,
    stage: int,
    rank: int,
    world: int,
    steps: Iterable[int],
    gradients: Draw = own_gradients,
) -> None:
    """``stage`` 1: assign averaged gradients; 2: run this rank's backward."""
    for step in steps:
        if stage == 1:
            give(params, average(gradients(r, step) for r in range(world)))
        else:
            backward(params, gradients(rank, step))
        optimizer.step()
        optimizer.zero_grad()


def run(
    rank: int,
    world: int,
    stage: int,
    options: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype] | None = None,
    draw: Draw = own_gradients,
    steps: int = 4,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train ``steps`` steps; return this rank's weights and trust ratios."""
    dtypes = dtypes or {}
    params = {name: Parameter(value.to(dtypes.get(name, torch.float32))) for name, value in weights().items()}
    opt = ShardedLamb(params.items(), stage=stage, bucket_mb=0.004, **options)
    train(opt, params, stage=stage, rank=rank, world=world, steps=range(steps), gradients=draw)
    return copies(params), opt.trust_ratios()


def bytes_covered(storages: Iterable[tuple[int, int]]) -> int:
    """Bytes of (address, size) pairs, counted once where some cover the same memory, as parameters and buckets do."""
    total = end = 0
    for address, size in sorted(storages):
        total += max(0, address + size - max(address, end))
        end = max(end, address + size)
    return total


def copies(params: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Copies of the current values, outside flat buckets."""
    return {name: p.detach().clone() for name, p in params.items()}


def oracle_run(
    start: Mapping[str, Tensor], averaged: Iterable[Mapping[str, Tensor | None]], **options: Any
) -> OracleLamb:
    oracle = OracleLamb({name: value.double().numpy() for name, value in start.items()}, **options)
    for grads in averaged:
        oracle.step({name: None if g is None else g.numpy() for name, g in grads.items()})
    return oracle


def oracle_of_ranks(
    world: int, steps: Iterable[int], gradients: Draw = own_gradients, start: Any = None, **options: Any
) -> OracleLamb:
    """The oracle of `train` on ``world`` ranks."""
    averaged = (average(gradients(rank, step) for rank in range(world)) for step in steps)
    return oracle_run(weights() if start is None else start, averaged, **options)


def assert_follows(weights: Mapping[str, Tensor], oracle: OracleLamb, tolerance: float = 2e-6) -> None:
    """Norm-wise relative error per parameter."""
    assert weights.keys() == oracle.params.keys()
    for name, value in weights.items():
        expected = oracle.params[name]
        gap = float(np.linalg.norm(value.detach().double().numpy() - expected))
        assert gap <= tolerance * float(np.linalg.norm(expected)), f"{name}: off by {gap}"


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    differing = [name for name, value in actual.items() if not torch.equal(value, expected[name])]
    assert not differing, f"bits differ in {differing}"


def grouped(params: Mapping[str, Parameter], stage: int, lr: float = 0.02, **options: Any) -> ShardedLamb:
    """An optimizer with two groups of different options."""
    named = list(params.items())
    groups = [{"params": named[:3], "weight_decay": 0.2}, {"params": named[3:], "lr": lr / 2}]
    return ShardedLamb(groups, lr=lr, stage=stage, bucket_mb=0.004, max_grad_norm=5.0, **options)


def renew(params: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The same values in new parameters, as after a restart."""
    return {name: Parameter(p.detach().clone()) for name, p in params.items()}


def bits_of(opt: ShardedLamb, params: Mapping[str, Parameter]) -> dict[str, Tensor]:
    bits = copies(params)
    for name, p in params.items():
        bits.update({f"{name}/{key}": value.clone() for key, value in opt.state[p].items()})
    return bits


def through_bytes(state: Any) -> Any:
    """Save and load as a file, with weights_only."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    with torch.serialization.safe_globals([_StridedShard]):  # torch 2.11 does not list it
        return torch.load(stream, weights_only=True)
