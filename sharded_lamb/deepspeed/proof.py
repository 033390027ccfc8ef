"""The mapping is proved before anything is written: by what all ranks hold, and by what the model holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_lamb.collectives import Collectives
from sharded_lamb.deepspeed.mapping import OptimizerPartitions, Row, model_slice, tensor_slice


def prove(rows: Sequence[Row], held: OptimizerPartitions, collectives: Collectives) -> None:
    """Before the first step. One all-reduce of [2, P] fp64 over all ranks.

    Raises:
        ValueError: on every rank: over all ranks' partitions some parameter's elements are not there exactly once, or
            a partition's values are not those of the model's own parameter in its dtype.
    """
    counts = torch.zeros(
        2, len(rows), dtype=torch.float64
    )  # elements held; elements that differ from the model's
    for partition in held.partitions:
        for segment in partition.segments:
            if segment.length:
                counts[0, segment.param] += segment.length
                ours, models = (
                    tensor_slice(partition.tensor, segment),
                    model_slice(rows[segment.param][1], segment),
                )
                counts[1, segment.param] += _unlike(ours, models)
    collectives.all_reduce_small(counts)
    for param in sorted({param for partition in held.partitions for param in partition.params}):
        name, p, _ = rows[param]
        numel = getattr(p, "ds_numel", p.numel())
        there, unlike = (int(count) for count in counts[:, param])
        if there != numel * (1 if held.sharded else collectives.world_size):
            raise ValueError(
                f"ShardedLamb cannot map DeepSpeed's partitions ({held.kind}): of {name!r} with {numel} elements the "
                f"ranks hold {there}. Its trust ratio would be wrong, so it stops here"
            )
        if unlike:
            raise ValueError(
                f"{unlike} of {numel} elements of {name!r} differ between the model and the weights that DeepSpeed "
                f"updates ({held.kind}): the next step would undo what was written to the model. Load weights before "
                f"deepspeed.initialize or with load_checkpoint, or call refresh_fp32_params() on the engine's optimizer"
            )


def _unlike(ours: Tensor, models: Tensor) -> int:
    rounded = ours.to(models.dtype)
    models = models.to(rounded.device)
    return int(((rounded != models) & ~(rounded.isnan() & models.isnan())).sum())
