"""The memory that the two passes run over, in two forms: one flat run of whole blocks, or pieces that lie anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_lamb.kernels import formats
from sharded_lamb.kernels.state_format import StateFormat


@dataclass(frozen=True, slots=True, weakref_slot=True)
class FlatShard:
    """The memory that one rank updates in one bucket; flat tensors of one length, whole blocks."""

    weight: (
        Tensor  # [n] masters as their format stores them; the parameters' own memory where that is updated
    )
    model: (
        Tensor | None
    )  # [n] model dtype: the parameters' memory, which is gathered, where masters are separate
    grad: Tensor  # [n] compute dtype: gradients averaged over ranks; 0 in padding
    exp_avg: Tensor  # [n] state dtype
    exp_avg_sq: Tensor  # [n] state dtype
    block_param: Tensor  # [n / BLOCK] int64: the parameter each block belongs to

    @property
    def master_format(self) -> StateFormat:
        """How ``weight`` stores the masters."""
        return formats.of_memory(self.weight.dtype)

    @property
    def compute(self) -> torch.dtype:
        """The dtype that elements are computed in."""
        return self.grad.dtype

    @property
    def device(self) -> torch.device:
        return self.grad.device


@dataclass(frozen=True, slots=True)
class LocalContribution:
    """This rank's own gradients where they lie: summed after the first ``row`` rows of what others handed over."""

    row: int
    grads: Sequence[Tensor | None]  # one a segment, without gaps in memory; None stands for zeros


@dataclass(frozen=True, slots=True)
class ReceivedShards:
    """What is averaged to a shard's gradient: the sum of all parts, in order, over ``divisor``."""

    parts: Tensor  # [k, n] any floating-point dtype
    divisor: int
    own: LocalContribution | None = None  # one part more, which lies elsewhere


@dataclass(frozen=True, slots=True, weakref_slot=True)
class ScatteredShard:
    """Pieces of memory on one device: DTensors' local parts, another framework's partitions, or whole tensors.

    A piece is a contiguous run of elements of one parameter. Its blocks are counted from its own start and its last
    one may be short. Entry i of every sequence is piece i's; all tensors of a sequence have one dtype.
    """

    params: tuple[int, ...]  # the parameter of each piece
    weight: Sequence[Tensor]  # [n_i] as in `FlatShard`
    grad: Sequence[Tensor]  # [n_i] any floating-point dtype
    exp_avg: Sequence[Tensor]  # [n_i] state dtype
    exp_avg_sq: Sequence[Tensor]  # [n_i] state dtype
    model: Sequence[Tensor] | None = None  # [n_i] model dtype, where masters are separate

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(piece.numel() for piece in self.weight)

    @property
    def master_format(self) -> StateFormat:
        """How ``weight`` stores the masters."""
        return formats.of_memory(self.weight[0].dtype)

    @property
    def compute(self) -> torch.dtype:
        """The dtype that elements are computed in."""
        return torch.promote_types(self.weight[0].dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.weight[0].device


Shard = FlatShard | ScatteredShard
