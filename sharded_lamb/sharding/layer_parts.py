"""Which elements of a rank's part of a parameter belong to which layer (`sharded_lamb.core.layers`)."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sharded_lamb.core.layers import Layers, RatioBlocks, check_order, count_blocks
from sharded_lamb.core.layout import BLOCK, Segment
from sharded_lamb.core.parameters import shape_of
from sharded_lamb.sharding.buckets import Precision, memory_strides
from sharded_lamb.sharding.dtensors import is_dtensor
from sharded_lamb.sharding.placements import local_part, mesh_device

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def check_blocks(name: str, p: Tensor, ratio_blocks: RatioBlocks) -> None:
    """Raises ValueError as `count_blocks` and `check_order`, for this rank's part of a parameter."""
    blocks = count_blocks(name, shape_of(p), ratio_blocks)
    if blocks > 1 and p.layout is torch.strided and not hasattr(p, "ds_shape"):
        part = local_part(p) if is_dtensor(p) else p
        check_order(name, part.shape, memory_strides(part), blocks)


def check_coded_blocks(name: str, p: Tensor, ratio_blocks: RatioBlocks, precision: Precision) -> None:
    """Raises ValueError where a ratio block would begin inside a block of 8-bit moments, which has one scale."""
    shape = shape_of(p)
    blocks = count_blocks(name, shape, ratio_blocks)
    part = local_part(p) if is_dtensor(p) else p
    if blocks > 1:
        unit = part[:1].numel() if is_dtensor(p) else part.numel() // blocks
        check_coded_unit(name, shape, blocks, unit, precision)


def check_coded_unit(name: str, shape: Sequence[int], blocks: int, unit: int, precision: Precision) -> None:
    """`check_coded_blocks` where ratio blocks begin at multiples of ``unit`` elements."""
    if len(precision.moments[0].shape(BLOCK)) > 1 and unit % BLOCK:
        raise ValueError(
            f"parameter {name!r} of shape {tuple(shape)} has {blocks} ratio blocks and 8-bit moments, which share a "
            f"scale between {BLOCK} elements: a ratio block would begin at a multiple of {unit}. Give its group "
            f"state_dtype=torch.bfloat16, or a pattern of ratio_blocks that does not match it"
        )


def segments_of_part(param: int, p: "DTensor", layers: Layers) -> list[Segment]:
    """The segments of this rank's part, one per layer that it has elements of, or several under strided shards.

    ``param`` is the layer, ``start`` and ``shard_start`` are in the flattened part.
    """
    part, first = local_part(p), layers.slice(param).start
    blocks = layers.counts[param]
    if blocks == 1 or not part.numel():
        return [Segment(first, 0, part.numel(), 0)]
    held = _first_indices(p) // (p.shape[0] // blocks)
    segments, start, numel = [], 0, part.numel() // part.shape[0]
    for block, run in groupby(held.tolist()):
        length = len(list(run)) * numel
        segments.append(Segment(first + block, start, length, start))
        start += length
    return segments


def _first_indices(p: "DTensor") -> Tensor:
    """[rows of this rank's part] int64: their indices in the first dimension of the whole tensor. Not collective."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [
        placement if getattr(placement, "dim", None) == 0 else Replicate() for placement in p.placements
    ]
    indices = torch.arange(p.shape[0], device=mesh_device(p.device_mesh))
    return local_part(distribute_tensor(indices, p.device_mesh, placements, src_data_rank=None))
