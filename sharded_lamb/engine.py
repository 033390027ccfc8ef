"""Two local passes around one small all-reduce: the seam that every layout and every kernel shares."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharded_lamb import rule
from sharded_lamb.kernels import Kernel, Shard
from sharded_lamb.rule import ParameterOptions


def gradient_square_sums(
    kernel: Kernel, shards: Sequence[Shard], parameters: int, device: torch.device
) -> Tensor:
    """[P] fp64 on ``device``: Σg² of what this rank holds of each parameter, which may be nothing."""
    sums = torch.zeros(parameters, dtype=torch.float64, device=device)
    for shard in shards:
        kernel.square_sums(shard, sums)
    return sums


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
    tables: dict[torch.dtype, Tensor] = {}
    for shard in shards:
        dtype = shard.compute
        if dtype not in tables:
            tables[dtype] = rule.table(vectors, dtype)

    square_sums = torch.zeros(2, len(step), dtype=torch.float64, device=step.device)
    for shard in shards:
        kernel.moments_and_norms(shard, tables[shard.compute], square_sums)
    sum_over_ranks(square_sums)

    weight_norm, update_norm = rule.norms(square_sums, options.wide)
    ratios = rule.trust_ratios(weight_norm, update_norm, options)
    sizes = rule.step_sizes(lr, ratios, options, step, active)
    for index, shard in enumerate(shards):
        dtype = shard.compute
        kernel.apply(shard, tables[dtype], sizes.to(dtype))
        written(index)
    return ratios
