"""The two local passes of a step, and the sums of gradients before them, over any shards and by any kernel.

The caller sums over ranks between the passes::

    update = Update(kernel, shards, options, step=…, active=…, grad_scale=…)
    square_sums = update.moments_and_norms()          pass 1: m, v; Σw², Σu² of this rank's shards
    all_reduce(square_sums)                           the caller's: over ranks, in place
    ratios = rule.ratios_of_sums(square_sums, options)
    for index in update.apply(step_sizes):            pass 2: w, shard by shard as each is written
        gather(index)                                 the caller's
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.core import rule
from sharded_lamb.core.rule import ParameterOptions
from sharded_lamb.kernels import Kernel, Shard
from sharded_lamb.kernels.incoming import GradientCopy, fill_together


class Update:
    """Pass 1 and pass 2 of one step over this rank's shards. Knows no process group and no parameter's shape.

    Args:
        step: [P] fp64, this step included.
        active: [P] bool, which parameters are updated; the others' memory is left as it is.
        grad_scale: fp64 scalar (or [P]) for all gradients: clip factor times inverse loss scale.
    """

    def __init__(
        self,
        kernel: Kernel,
        shards: Sequence[Shard],
        options: ParameterOptions,
        *,
        step: Tensor,
        active: Tensor,
        grad_scale: Tensor,
    ) -> None:
        self._kernel, self._shards = kernel, shards
        self._step = step
        vectors = rule.coefficients(options, step, active, grad_scale)
        self._by_compute = _by_compute(shards)
        self._tables = {dtype: rule.table(vectors, dtype) for dtype in self._by_compute}

    def moments_and_norms(self) -> Tensor:
        """Pass 1: writes moments. Returns [SUMS, P] fp64 on the device: this rank's part of `rule.SUMS`."""
        faults.point("pass-1")
        square_sums = torch.zeros(
            len(rule.SUMS), len(self._step), dtype=torch.float64, device=self._step.device
        )
        for dtype, shards in self._by_compute.items():
            self._kernel.moments_and_norms(shards, self._tables[dtype], square_sums)
        return square_sums

    def apply(self, step_sizes: Tensor) -> Iterator[int]:
        """Pass 2: writes weights. Yields the index of each shard once its weights are written.

        Args:
            step_sizes: [P] fp64, `rule.step_sizes`.
        """
        faults.point("pass-2")
        rounded = {dtype: step_sizes.to(dtype) for dtype in self._by_compute}
        for indices in _applied_together(self._shards):
            dtype = self._shards[indices[0]].compute
            self._kernel.apply([self._shards[i] for i in indices], self._tables[dtype], rounded[dtype])
            yield from indices


def gradient_square_sums(
    kernel: Kernel, shards: Sequence[Shard], parameters: int, device: torch.device
) -> Tensor:
    """[P] fp64 on ``device``: Σg² of this rank's part of each parameter, 0 where it has none."""
    sums = torch.zeros(parameters, dtype=torch.float64, device=device)
    for alike in _by_compute(shards).values():
        kernel.square_sums(alike, sums)
    return sums


def collect_gradients(kernel: Kernel, copies: Sequence[GradientCopy], sums: Tensor) -> None:
    """Copy segments of whole gradients into flat shards, and add Σg² to ``sums`` [P] fp64.

    On a CPU shard by shard, each in one sweep; on a GPU, where a call is a launch, all at once.
    """
    shards = [shard for shard, _, _ in copies]
    if _one_by_one(shards):
        for shard, segments, grads in copies:
            kernel.collect(shard, segments, grads, sums)
        return
    fill_together([(shard.grad, segments, grads) for shard, segments, grads in copies])
    for alike in _by_compute(shards).values():
        kernel.square_sums(alike, sums)


def _one_by_one(shards: Sequence[Shard]) -> bool:
    """Whether all shards are on a CPU, where a call costs nothing and one shard's memory stays in the cache."""
    return all(shard.device.type == "cpu" for shard in shards)


def _by_compute(shards: Sequence[Shard]) -> dict[torch.dtype, list[Shard]]:
    groups: dict[torch.dtype, list[Shard]] = {}
    for shard in shards:
        groups.setdefault(shard.compute, []).append(shard)
    return groups


def _applied_together(shards: Sequence[Shard]) -> Iterator[list[int]]:
    """The indices of the shards of each call of pass 2: one on a CPU, so that it travels while the next is computed.

    On a GPU a call is a launch: an eighth of the shards, so that a step is a handful of launches. The last come first:
    buckets are filled from a model's end, and the next forward begins at its beginning.
    """
    size = 1 if _one_by_one(shards) else -(-len(shards) // 8)
    together: list[int] = []
    for index in reversed(range(len(shards))):
        if len(together) == size or (together and shards[index].compute != shards[together[0]].compute):
            yield together
            together = []
        together.append(index)
    if together:
        yield together
