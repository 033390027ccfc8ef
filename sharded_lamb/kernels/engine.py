"""The two local passes of a step, and the gradient sums before them, over any shards with any kernel.

The caller all-reduces between the passes::

    update = Update(kernel, options, step=…, active=…, grad_scale=…)
    square_sums = update.moments_and_norms(shards)    pass 1: m, v; Σw², Σu² of this rank's shards
    all_reduce(square_sums)                           by the caller: sum over ranks, in place
    ratios = rule.ratios_of_sums(square_sums, options)
    for index in update.apply(shards, step_sizes, are_gathered=…):   pass 2: w, one shard after the other
        gather(index)                                 by the caller
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.core import rule
from sharded_lamb.core.rule import ParameterOptions
from sharded_lamb.kernels import Kernel, Shard


class Update:
    """Pass 1 and pass 2 of one step over this rank's shards, without a process group or parameters' shapes.

    The passes may see the same memory cut in other ways: gradients lie in pieces where weights are one range.

    Args:
        step: [P] fp64, this step included.
        active: [P] bool, the parameters to update; memory of the others keeps its bits.
        grad_scale: fp64 scalar (or [P]), multiplied with the gradients: clip factor times inverse loss scale.
    """

    def __init__(
        self,
        kernel: Kernel,
        options: ParameterOptions,
        *,
        step: Tensor,
        active: Tensor,
        grad_scale: Tensor,
    ) -> None:
        self._kernel = kernel
        self._step = step
        self._coefficients = rule.coefficients(options, step, active, grad_scale)
        self._tables: dict[torch.dtype, Tensor] = {}

    def moments_and_norms(self, shards: Sequence[Shard]) -> Tensor:
        """Pass 1: writes moments. Returns [SUMS, P] fp64 on the device: `rule.SUMS` of this rank's shards."""
        faults.point("pass-1")
        square_sums = torch.zeros(
            len(rule.SUMS), len(self._step), dtype=torch.float64, device=self._step.device
        )
        for dtype, alike in _by_compute(shards).items():
            self._kernel.moments_and_norms(alike, self._table(dtype), square_sums)
        return square_sums

    def apply(self, shards: Sequence[Shard], step_sizes: Tensor, *, are_gathered: bool) -> Iterator[int]:
        """Pass 2: writes weights. Yields the index of each shard once its weights are written.

        Args:
            step_sizes: [P] fp64, `rule.step_sizes`.
            are_gathered: the caller sends shards to other ranks meanwhile.
        """
        faults.point("pass-2")
        rounded = {dtype: step_sizes.to(dtype) for dtype in _by_compute(shards)}
        for indices in _batches(shards, are_gathered=are_gathered):
            dtype = shards[indices[0]].compute
            self._kernel.apply([shards[i] for i in indices], self._table(dtype), rounded[dtype])
            yield from indices

    def _table(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._tables:
            self._tables[dtype] = rule.table(self._coefficients, dtype)
        return self._tables[dtype]


def gradient_square_sums(
    kernel: Kernel, shards: Sequence[Shard], parameters: int, device: torch.device
) -> Tensor:
    """[P] fp64 on ``device``: Σg² over this rank's elements of each parameter, 0 if it has none."""
    sums = torch.zeros(parameters, dtype=torch.float64, device=device)
    for alike in _by_compute(shards).values():
        kernel.square_sums(alike, sums)
    return sums


def _one_by_one(shards: Sequence[Shard]) -> bool:
    """Whether all shards are on a CPU, where a call is cheap and one shard's memory stays in cache."""
    return all(shard.device.type == "cpu" for shard in shards)


def _by_compute(shards: Sequence[Shard]) -> dict[torch.dtype, list[Shard]]:
    groups: dict[torch.dtype, list[Shard]] = {}
    for shard in shards:
        groups.setdefault(shard.compute, []).append(shard)
    return groups


def _batches(shards: Sequence[Shard], *, are_gathered: bool) -> Iterator[list[int]]:
    """The shard indices of each call of pass 2: one on a CPU, so that its all-gather overlaps the next shard's update.

    On a GPU a call is a launch: an eighth of the shards each, so that a step has few launches, or all of them where
    nothing is sent. The last shard is first: buckets start at the model's end, and the next forward reads its beginning
    first.
    """
    size = 1 if _one_by_one(shards) else -(-len(shards) // (8 if are_gathered else 1))
    batch: list[int] = []
    for index in reversed(range(len(shards))):
        if len(batch) == size or (batch and shards[index].compute != shards[batch[0]].compute):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
