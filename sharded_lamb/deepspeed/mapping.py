"""Maps the tensors that DeepSpeed steps to segments of parameters.

DeepSpeed replaces the parameters of every group by its own tensors::

    ZeRO 1, 2, BF16_Optimizer   one per group: this rank's equal part of the group's flat buffer, cut at any element
                                rank 0 |b b b|w w w w w|   rank 1 |w w w|n n n · ·|      · padding
    ZeRO 3                      one per subgroup: this rank's equal part of every parameter
                                rank 0 |b b|w w w w|n n|   rank 1 |b ·|w w w w|n ·|
    no ZeRO                     the parameters, or fp32 copies of their shapes

The first step proves the mapping (`sharded_lamb.deepspeed.proof`): the `OptimizerPartitions` of all ranks contain every
element of every parameter exactly once, with the values of the model's parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from sharded_lamb.core.layout import Segment
from sharded_lamb.sharding.buckets import flattened, memory_strides

Row = tuple[str, Tensor, dict[str, Any]]
"""(name, parameter, its group), the model's."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One tensor that DeepSpeed steps, and this rank's segments in it.

    ``segments`` index elements of the flattened parameter and of the flattened ``tensor``; they exclude padding.
    ``params``: all parameters with a segment in this partition on any rank.
    """

    tensor: Tensor
    params: tuple[int, ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class OptimizerPartitions:
    """This rank's partitions. ``sharded``: other ranks have the rest; else every rank has all parameters."""

    kind: str
    local: tuple[Partition, ...]
    sharded: bool


def find_partitions(
    optimizer: Any, rows: Sequence[Row], param_groups: Sequence[dict[str, Any]]
) -> OptimizerPartitions:
    """Read DeepSpeed's records of how it partitioned ``rows``.

    Parameters may carry records of an earlier engine, so the stepped tensors and their owner decide.

    Args:
        optimizer: the calling optimizer, which DeepSpeed wraps.
        rows: the parameters that it was constructed with.
        param_groups: its groups, whose "params" DeepSpeed has replaced since.

    Raises:
        ValueError: unsupported partitioning, or an unsupported memory layout of a parameter.
    """
    owners = [getattr(p, "_z3_optimizer", None) for _, p, _ in rows]
    zero = next((owner for owner in owners if getattr(owner, "optimizer", None) is optimizer), None)
    if zero is not None:
        return OptimizerPartitions("ZeRO-3", tuple(_zero3(zero, rows)), sharded=True)
    if all(_is_stepped_whole(rows, group) for group in param_groups):
        _check_averaging()
        return OptimizerPartitions("whole parameters", tuple(_whole(rows, param_groups)), sharded=False)
    return OptimizerPartitions("ZeRO-1 or ZeRO-2", tuple(_zero12(rows, param_groups)), sharded=True)


def _unmapped(reason: str) -> ValueError:
    return ValueError(
        f"ShardedLamb cannot map DeepSpeed's partitions to parameters: {reason}. Trust ratios would be wrong, so it "
        f"stops here. Supported are ZeRO 0 to 3 over all ranks, with or without CPU offload; no tensor, pipeline or "
        f"expert parallelism, MiCS, ZenFlow, SuperOffload or NVMe"
    )


def _check_group(name: str, group: Any) -> None:
    size, world = dist.get_world_size(group=group), dist.get_world_size()
    if size != world:
        raise _unmapped(f"{name!r} is partitioned over {size} of {world} ranks")


def _check_averaging() -> None:
    """Without ZeRO, only the group that averages gradients shows whether every rank has all parameters."""
    size, world = dist.get_world_size(group=groups._get_sequence_data_parallel_group()), dist.get_world_size()
    if size != world:
        raise _unmapped(f"gradients are averaged over {size} of {world} ranks")


def _zero3(zero: Any, rows: Sequence[Row]) -> Iterator[Partition]:
    index = {p: i for i, (_, p, _) in enumerate(rows)}
    if type(zero).__name__ != "DeepSpeedZeroOptimizer_Stage3":
        raise _unmapped(f"parameters belong to a {type(zero).__name__}")
    for tensor, params in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        unexpected = [p for p in params if p not in index]
        if unexpected:
            raise _unmapped(f"a subgroup has a parameter (ds_id {unexpected[0].ds_id}) of no parameter group")
        segments, offset = [], 0
        for p in params:
            _check_group(rows[index[p]][0], p.ds_process_group)
            part = p.partition_numel()
            start = dist.get_rank(group=p.ds_process_group) * part
            length = min(max(p.ds_numel - start, 0), part)  # the rest of the part is uninitialized memory
            segments.append(Segment(index[p], start if length else 0, length, offset))
            offset += part
        if offset != tensor.numel():
            raise _unmapped(f"a subgroup of {offset} elements has a partition of {tensor.numel()}")
        yield Partition(tensor, tuple(index[p] for p in params), tuple(segments))


def _zero12(rows: Sequence[Row], param_groups: Sequence[dict[str, Any]]) -> Iterator[Partition]:
    for group in param_groups:
        members = [
            (i, row[0], row[1])
            for i, row in enumerate(rows)
            if row[2] is group and hasattr(row[1], "_dp_group")
        ]
        tensors: list[Tensor] = group["params"]
        if not members and not tensors:
            continue
        if len(tensors) != 1 or tensors[0].dim() != 1 or not members:
            raise _unmapped(f"a group of {len(members)} parameters is stepped as {len(tensors)} tensors")
        (tensor,) = tensors
        storages = {p.untyped_storage().data_ptr() for _, _, p in members}
        if len(storages) != 1:
            raise _unmapped(f"parameters of one group are in {len(storages)} flat buffers")
        segments = []
        for i, name, p in members:
            _check_group(name, p._dp_group)
            low = dist.get_rank(group=p._dp_group) * tensor.numel()
            offset = int(p.storage_offset())
            start, stop = max(low, offset), min(low + tensor.numel(), offset + p.numel())
            if start < stop:
                segments.append(Segment(i, start - offset, stop - start, start - low))
        yield Partition(tensor, tuple(i for i, _, _ in members), tuple(segments))


def _stepped_one_by_one(rows: Sequence[Row], group: dict[str, Any]) -> list[tuple[int, Tensor]]:
    """A group's parameters if stepped one by one: all, or if DeepSpeed made copies, the trained ones."""
    members = [(i, row[1]) for i, row in enumerate(rows) if row[2] is group]
    if len(group["params"]) == len(members):
        return members
    return [(i, p) for i, p in members if p.requires_grad and p.numel()]


def _is_stepped_whole(rows: Sequence[Row], group: dict[str, Any]) -> bool:
    return [t.shape for t in group["params"]] == [p.shape for _, p in _stepped_one_by_one(rows, group)]


def _whole(rows: Sequence[Row], param_groups: Sequence[dict[str, Any]]) -> Iterator[Partition]:
    for group in param_groups:
        for (i, _), tensor in zip(_stepped_one_by_one(rows, group), group["params"], strict=True):
            if tensor.numel() and memory_strides(tensor) != tensor.stride():
                raise ValueError(
                    f"parameter {rows[i][0]!r} of shape {tuple(tensor.shape)} and strides {tensor.stride()} does not "
                    f"fill its memory, so it cannot be updated in place: make it contiguous before initialize()"
                )
            yield Partition(tensor, (i,), (Segment(i, 0, tensor.numel(), 0),))


def model_slice(p: Tensor, segment: Segment) -> Tensor:
    """[segment.length] view of the segment in the model's parameter, as DeepSpeed stores it on this rank."""
    if hasattr(p, "ds_tensor"):
        part: Tensor = p.ds_tensor
        return part.view(-1)[: segment.length]
    return flattened(p.detach(), memory_strides(p))[segment.start : segment.start + segment.length]


def tensor_slice(tensor: Tensor, segment: Segment) -> Tensor:
    """[segment.length] view of the segment in a stepped tensor, its moments or its gradient."""
    flat = flattened(tensor, memory_strides(tensor))
    return flat[segment.shard_start : segment.shard_start + segment.length]
