"""Proves the mapping before the first update, against the other ranks' partitions and the model's values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.core.layout import Segment
from sharded_lamb.deepspeed.mapping import OptimizerPartitions, Partition, Row, model_slice, tensor_slice


def prove(rows: Sequence[Row], partitions: OptimizerPartitions, collectives: Collectives) -> None:
    """Check the mapping before the first step. Collective: one all-reduce of [4, P] fp64 over all ranks.

    Raises:
        ValueError: on every rank: the ranks' element counts do not sum to a parameter's numel; a partition's values,
            in the model's dtype, differ from the model's; or a parameter that every rank has differs between ranks.
    """
    measures = torch.zeros(4, len(rows), dtype=torch.float64, device="cpu")
    for partition in partitions.local:
        for segment in partition.segments:
            if segment.length:
                measures[:, segment.param] += _measure(
                    partition, segment, rows[segment.param][1], partitions.sharded
                )
    collectives.all_reduce_small(measures)
    for param in sorted({param for partition in partitions.local for param in partition.params}):
        name, p, _ = rows[param]
        numel = getattr(p, "ds_numel", p.numel())
        _check(name, numel, measures[:, param].tolist(), partitions, collectives.world_size)


def _measure(partition: Partition, segment: Segment, p: Tensor, sharded: bool) -> Tensor:
    """[4] fp64: number of elements; number that differ from the model's; Σw²; (Σw²)², to compare replicas."""
    if sharded:
        weights, model = tensor_slice(partition.tensor, segment), model_slice(p, segment)
    else:
        weights, model = partition.tensor.detach(), p.detach()
    square = float(torch.linalg.vector_norm(weights, dtype=torch.float64)) ** 2
    return torch.tensor(
        [segment.length, _differing(weights, model), square, square**2], dtype=torch.float64, device="cpu"
    )


def _check(name: str, numel: int, measures: list[float], partitions: OptimizerPartitions, world: int) -> None:
    elements, differing, squares, fourths = measures
    copies = 1 if partitions.sharded else world
    if elements != numel * copies:
        raise ValueError(
            f"ShardedLamb cannot map DeepSpeed's partitions ({partitions.kind}): of {name!r} with {numel} elements "
            f"the ranks hold {elements / copies:g}. Its trust ratio would be wrong, so it stops here"
        )
    if differing:
        raise ValueError(
            f"{differing / copies:g} of {numel} elements of {name!r} differ between the model and the weights that "
            f"DeepSpeed updates ({partitions.kind}): the next step would overwrite the model's weights. Load weights "
            f"before deepspeed.initialize, with load_checkpoint(load_module_only=True) or with optimizer states, or "
            f"call refresh_fp32_params() on the engine's optimizer"
        )
    if not partitions.sharded and world * fourths - squares**2 > 1e-9 * squares**2:
        raise ValueError(
            f"{name!r} is not the same on all {world} ranks, although it is not sharded: its ratio would be that of "
            f"a slice or of a diverged copy. Tensor parallelism is not supported, with or without ZeRO"
        )


def _differing(weights: Tensor, model: Tensor) -> int:
    """Number of elements that differ in the model's dtype."""
    rounded = weights.to(model.dtype)
    model = model.to(rounded.device)
    return int(((rounded != model) & ~(rounded.isnan() & model.isnan())).sum())
