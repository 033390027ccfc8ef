"""The mapping is proved before anything is written: by what all ranks hold, and by what the model holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.core.layout import Segment
from sharded_lamb.deepspeed.mapping import OptimizerPartitions, Partition, Row, model_slice, tensor_slice


def prove(rows: Sequence[Row], held: OptimizerPartitions, collectives: Collectives) -> None:
    """Before the first step. One all-reduce of [4, P] fp64 over all ranks.

    Raises:
        ValueError: on every rank: over all ranks' partitions some parameter's elements are not there exactly once; a
            partition's values are not those of the model's own parameter in its dtype; or a parameter that every rank
            should hold whole is another one on another rank.
    """
    measures = torch.zeros(4, len(rows), dtype=torch.float64)
    for partition in held.partitions:
        for segment in partition.segments:
            if segment.length:
                measures[:, segment.param] += _measure(
                    partition, segment, rows[segment.param][1], held.sharded
                )
    collectives.all_reduce_small(measures)
    for param in sorted({param for partition in held.partitions for param in partition.params}):
        name, p, _ = rows[param]
        _check(
            name, getattr(p, "ds_numel", p.numel()), measures[:, param].tolist(), held, collectives.world_size
        )


def _measure(partition: Partition, segment: Segment, p: Tensor, sharded: bool) -> Tensor:
    """[4] fp64: elements; those that differ from the model's; Σw² and its square, which replicas agree in."""
    if sharded:
        ours, models = tensor_slice(partition.tensor, segment), model_slice(p, segment)
    else:
        ours, models = partition.tensor.detach(), p.detach()
    square = float(torch.linalg.vector_norm(ours, dtype=torch.float64)) ** 2
    return torch.tensor([segment.length, _unlike(ours, models), square, square**2], dtype=torch.float64)


def _check(name: str, numel: int, measures: list[float], held: OptimizerPartitions, world: int) -> None:
    there, unlike, squares, fourths = measures
    copies = 1 if held.sharded else world
    if there != numel * copies:
        raise ValueError(
            f"ShardedLamb cannot map DeepSpeed's partitions ({held.kind}): of {name!r} with {numel} elements the ranks "
            f"hold {there / copies:g}. Its trust ratio would be wrong, so it stops here"
        )
    if unlike:
        raise ValueError(
            f"{unlike / copies:g} of {numel} elements of {name!r} differ between the model and the weights that "
            f"DeepSpeed updates ({held.kind}): the next step would undo what was written to the model. Load weights "
            f"before deepspeed.initialize, with load_checkpoint(load_module_only=True) or with optimizer states, or "
            f"call refresh_fp32_params() on the engine's optimizer"
        )
    if not held.sharded and world * fourths - squares**2 > 1e-9 * squares**2:
        raise ValueError(
            f"{name!r} is not the same on all {world} ranks, although nothing cuts it: its ratio would be that of "
            f"a slice or of a copy that went astray. Tensor parallelism is not supported without ZeRO, nor with it"
        )


def _unlike(ours: Tensor, models: Tensor) -> int:
    rounded = ours.to(models.dtype)
    models = models.to(rounded.device)
    return int(((rounded != models) & ~(rounded.isnan() & models.isnan())).sum())
