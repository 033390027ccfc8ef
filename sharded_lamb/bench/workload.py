"""The workload of every candidate: parameters of given shapes, and a backward that yields known gradients.

Backward fills gradients from a small pool of random numbers, one pool a rank, into fresh memory, as a model's backward
does. It computes nothing else and keeps no copy, so time and memory are those of the optimizer and the reduction.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

POOL = 1_000_003
"""Numbers in a pool, 4 MB of fp32: a prime, so that no two large parameters get the same sequence."""

LAYER_NUMEL = 1 << 20
"""Parameters get gradients in layers of at least this many elements, the last layer first."""


class Workload:
    """Shapes, and the pools of weights (the same on every rank) and of gradients (one a rank)."""

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], rank: int, device: torch.device, seed: int = 0
    ) -> None:
        self.shapes = [tuple(shape) for shape in shapes.values()]
        self.device = device
        self.weights = _pool(seed, device)  # large enough that two steps show decay
        self.gradients = _pool(seed + 1 + rank, device) * 0.01

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def model(self) -> "Synthetic":
        """A new model with the initial weights."""
        return Synthetic(self)

    def gradient(self, param: int, step: int) -> Tensor:
        """[shape of ``param``] fp32, this rank's gradient at ``step``, in fresh memory."""
        return _runs(self.gradients, self.shapes[param], start=7919 * param + 104_729 * step)

    def weight(self, param: int) -> Tensor:
        """[shape of ``param``] fp32, in fresh memory."""
        return _runs(self.weights, self.shapes[param], start=7919 * param)


class Synthetic(nn.Module):
    """Each call counts a step and returns a loss; its backward gives every parameter its gradient of that step."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.workload = workload
        self.step = 0
        for index in range(len(workload.shapes)):
            self.register_parameter(f"p{index}", nn.Parameter(workload.weight(index)))
        self.layers = _layers([math.prod(shape) for shape in workload.shapes])

    def forward(self) -> Tensor:
        self.step += 1
        params = list(self.parameters())
        losses: list[Tensor] = []
        for layer in self.layers:
            given: Any = _Given.apply(self.workload, self.step, layer, *[params[index] for index in layer])  # type: ignore[no-untyped-call]
            losses.append(given)
        return torch.stack(losses).sum()


class _Given(torch.autograd.Function):
    """Returns 0; its backward returns the workload's gradients, whatever the incoming one is."""

    @staticmethod
    def forward(ctx: Any, workload: Workload, step: int, layer: range, *params: Tensor) -> Tensor:
        ctx.source = workload, step, layer
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        workload, step, layer = ctx.source
        return (None, None, None, *(workload.gradient(index, step) for index in layer))


def _layers(numels: Sequence[int]) -> list[range]:
    layers, first, elements = [], 0, 0
    for index, numel in enumerate(numels):
        elements += numel
        if elements >= LAYER_NUMEL:
            layers.append(range(first, index + 1))
            first, elements = index + 1, 0
    return [*layers, range(first, len(numels))] if first < len(numels) else layers


def _pool(seed: int, device: torch.device) -> Tensor:
    return torch.randn(POOL, generator=torch.Generator().manual_seed(seed), device="cpu").to(device)


def _runs(pool: Tensor, shape: tuple[int, ...], start: int) -> Tensor:
    """A new tensor, filled from the pool, cyclically, from ``start`` on."""
    filled = torch.empty(shape, device=pool.device)
    flat, done, place = filled.view(-1), 0, start % len(pool)
    while done < len(flat):
        size = min(len(flat) - done, len(pool) - place)
        flat[done : done + size].copy_(pool[place : place + size])
        done, place = done + size, 0
    return filled
