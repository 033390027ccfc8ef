"""Two local passes around one small all-reduce: the seam that every layout and every kernel shares."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.core import rule
from sharded_lamb.core.rule import ParameterOptions
from sharded_lamb.kernels import Kernel, Shard
from sharded_lamb.kernels.incoming import GradientCopy, fill_together


def gradient_square_sums(
    kernel: Kernel, shards: Sequence[Shard], parameters: int, device: torch.device
) -> Tensor:
    """[P] fp64 on ``device``: Σg² of what this rank holds of each parameter, which may be nothing."""
    sums = torch.zeros(parameters, dtype=torch.float64, device=device)
    for alike in _by_compute(shards).values():
        kernel.square_sums(alike, sums)
    return sums


def collect_gradients(kernel: Kernel, takings: Sequence[GradientCopy], sums: Tensor) -> None:
    """Whole gradients' segments into flat shards, and Σg² of them added to ``sums`` [P] fp64.

    On a CPU shard by shard, each in one sweep; on a GPU, where a call is a launch, all at once.
    """
    shards = [shard for shard, _, _ in takings]
    if _one_by_one(shards):
        for shard, segments, grads in takings:
            kernel.collect(shard, segments, grads, sums)
        return
    fill_together([(shard.grad, segments, grads) for shard, segments, grads in takings])
    for alike in _by_compute(shards).values():
        kernel.square_sums(alike, sums)


def _one_by_one(shards: Sequence[Shard]) -> bool:
    """Whether all shards are a CPU's, where a call costs nothing and one shard's memory stays in the cache."""
    return all(shard.device.type == "cpu" for shard in shards)


def _by_compute(shards: Sequence[Shard]) -> dict[torch.dtype, list[Shard]]:
    groups: dict[torch.dtype, list[Shard]] = {}
    for shard in shards:
        groups.setdefault(shard.compute, []).append(shard)
    return groups


def _applied_together(shards: Sequence[Shard]) -> Iterator[list[int]]:
    """Which shards pass 2 takes at once: on a CPU one, so that it can travel while the next is computed.

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


def lamb_step(
    kernel: Kernel,
    shards: Sequence[Shard],
    options: ParameterOptions,
    *,
    lr: Tensor,
    step: Tensor,
    active: Tensor,
    grad_scale: Tensor,
    sum_over_ranks: Callable[[Tensor], None],
    written: Callable[[int], None],
) -> Tensor:
    """One LAMB step of this rank's shards.

    Args:
        lr, step, active: [P]; ``step`` counts this step, ``active`` says which parameters move.
        grad_scale: scalar for all gradients (clip factor and inverse loss scale).
        sum_over_ranks: the packed all-reduce, in place on [2, P] fp64: Σw², Σu².
        written: called with a shard's index once its weights are written.

    Returns:
        [P] fp64 trust ratios.
    """
    vectors = rule.coefficients(options, step, active, grad_scale)
    groups = _by_compute(shards)
    tables = {dtype: rule.table(vectors, dtype) for dtype in groups}

    faults.point("pass-1")
    square_sums = torch.zeros(2, len(step), dtype=torch.float64, device=step.device)
    for dtype, alike in groups.items():
        kernel.moments_and_norms(alike, tables[dtype], square_sums)
    sum_over_ranks(square_sums)

    weight_norm, update_norm = rule.norms(square_sums, options.wide)
    ratios = rule.trust_ratios(weight_norm, update_norm, options)
    sizes = rule.step_sizes(lr, ratios, options, step, active)
    narrow = {dtype: sizes.to(dtype) for dtype in groups}
    faults.point("pass-2")
    for together in _applied_together(shards):
        dtype = shards[together[0]].compute
        kernel.apply([shards[index] for index in together], tables[dtype], narrow[dtype])
        for index in together:
            written(index)
    return ratios
