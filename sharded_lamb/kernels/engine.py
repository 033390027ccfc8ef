"""The two local passes of a step, and the gradient sums before them, over any shards with any kernel.

The caller all-reduces between the passes::

    update = Update(kernel, options, step=…, active=…, grad_scale=…)
    sums = update.moments_and_norms(shards)           pass 1: m, v; Σw², Σu² of this rank's shards
    all_reduce(sums)                                  by the caller: sum over ranks, in place
    square_sums = update.square_sums(sums)
    ratios = rule.ratios_of_sums(square_sums, options, lr, …)
    for index in update.apply(units, step_sizes, lr, …):             pass 2: w, one unit after the other
        gather(index)                                 by the caller
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

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
        self._kernel, self._options = kernel, options
        self._step = step
        self._coefficients = rule.coefficients(options, step, active, grad_scale)
        self._tables: dict[torch.dtype, Tensor] = {}
        self._caution: Tensor | float = 1.0  # [P] fp64: c of `rule`

    def moments_and_norms(self, shards: Sequence[Shard]) -> Tensor:
        """Pass 1: writes moments, but not LARS's. Returns ``options.sums`` of this rank's shards: [sums, P] fp64."""
        faults.point("pass-1")
        sums = torch.zeros(
            len(self._options.sums), len(self._step), dtype=torch.float64, device=self._step.device
        )
        for dtype, alike in _by_compute(shards).items():
            if self._options.is_lars:
                self._kernel.weight_norms(alike, sums[0])
            else:
                self._kernel.moments_and_norms(alike, self._table(dtype), sums)
        return sums

    def square_sums(self, sums: Tensor) -> Tensor:
        """[1 + D, P] fp64: Σw², and Σu² of each direction. ``sums``: of pass 1, over all ranks. Call before pass 2."""
        if self._options.any_caution:
            sums, self._caution = rule.of_whole_update(sums, self._options)
        return sums

    def apply(
        self, units: Sequence[Sequence[Shard]], step_sizes: Tensor, lr: Tensor, *, are_gathered: bool
    ) -> Iterator[int]:
        """Pass 2: writes weights, and LARS's moments. Yields the index of each unit once its weights are written.

        Args:
            units: shards of one compute dtype each, perhaps none: a bucket's. They have the gradients of pass 1 where
                ``options.pass_2_reads_gradients``.
            step_sizes: [D, P] fp64, or LARS's [3, P]: `rule.step_sizes`.
            lr: [P] fp64.
            are_gathered: the caller sends units to other ranks meanwhile.
        """
        faults.point("pass-2")
        if self._options.any_caution:
            step_sizes = step_sizes * self._caution
        if self._options.any_decoupled or self._options.any_caution:
            decay = rule.decay_of_pass_2(lr, step_sizes, self._caution, self._options)
            self._coefficients, self._tables = replace(self._coefficients, decay=decay), {}
        if self._options.is_lars:
            self._coefficients, self._tables = replace(self._coefficients, c1=step_sizes[0]), {}
            step_sizes = step_sizes[1:]
        rounded: dict[torch.dtype, Tensor] = {}
        for indices in _batches(units, are_gathered=are_gathered):
            shards = [shard for index in indices for shard in units[index]]
            for dtype, alike in _by_compute(shards).items():
                if dtype not in rounded:
                    rounded[dtype] = step_sizes.to(dtype)
                table = self._table(dtype)
                if self._options.is_lars:
                    self._kernel.apply_momentum(alike, table, rounded[dtype])
                else:
                    self._kernel.apply(alike, table, rounded[dtype], caution=self._options.any_caution)
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


def _batches(units: Sequence[Sequence[Shard]], *, are_gathered: bool) -> Iterator[list[int]]:
    """The units of each call of pass 2: one on a CPU, so that its all-gather overlaps the next unit's update.

    On a GPU a call is a launch: an eighth of the units each, so that a step has few launches, or all of them where
    nothing is sent. The last unit is first: buckets start at the model's end, and the next forward reads its beginning
    first.
    """
    one_by_one = _one_by_one([shard for unit in units for shard in unit])
    size = 1 if one_by_one else max(1, -(-len(units) // (8 if are_gathered else 1)))
    last_first = range(len(units))[::-1]
    for start in range(0, len(units), size):
        yield list(last_first[start : start + size])
