"""The memory of the two passes, in two forms: one flat range of whole blocks, or scattered pieces."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.kernels import formats
from sharded_lamb.kernels.state_format import StateFormat


@dataclass(frozen=True, slots=True, weakref_slot=True)
class FlatShard:
    """The memory of one rank's shard of one bucket: flat tensors of one length, whole blocks."""

    weight: Tensor  # [n] storage dtype of masters; without separate masters, the parameters' memory
    model: Tensor | None  # [n] model dtype: the parameters' memory, if masters are separate
    grad: Tensor  # [n] compute dtype: averaged gradients, 0 in padding; [0] if a `ScatteredShard` reads them in place
    exp_avg: Tensor  # [n] state dtype
    exp_avg_sq: Tensor | None  # [n] state dtype; None: LARS has none
    block_param: Tensor  # [n / BLOCK] int64: the parameter (the layer, see `Kernel`) of each block

    @property
    def master_format(self) -> StateFormat:
        """The storage format of ``weight``."""
        return formats.of_memory(self.weight.dtype)

    @property
    def compute(self) -> torch.dtype:
        """The compute dtype."""
        return self.grad.dtype

    @property
    def device(self) -> torch.device:
        return self.grad.device


@dataclass(frozen=True, slots=True)
class LocalContribution:
    """This rank's own gradients, used in place: summed after the first ``row`` received parts."""

    row: int
    grads: Sequence[Tensor | None]  # one per segment, without gaps in memory; None: zeros


@dataclass(frozen=True, slots=True)
class ReceivedShards:
    """The parts of a shard's gradient: their sum, in order, divided by ``divisor``, is the average."""

    parts: Tensor  # [k, n] any floating-point dtype
    divisor: int
    own: LocalContribution | None = None  # one more part, which no message carried


@dataclass(frozen=True, slots=True, weakref_slot=True)
class ScatteredShard:
    """Pieces of memory on one device: DTensors' local shards, another framework's partitions, or whole tensors.

    A piece is a contiguous range of elements of one parameter. Its blocks start at its first element, and its last
    block may be short. Entry i of every sequence belongs to piece i; all tensors of a sequence have one dtype.
    """

    params: tuple[int, ...]  # the parameter of each piece
    weight: Sequence[Tensor]  # [n_i] as `FlatShard.weight`
    grad: Sequence[
        Tensor
    ]  # [≥ grad_start_i + n_i], any shape without gaps in memory and floating-point dtype
    exp_avg: Sequence[Tensor]  # [n_i] state dtype
    exp_avg_sq: Sequence[Tensor] | None  # [n_i] state dtype; None: LARS has none
    model: Sequence[Tensor] | None = None  # [n_i] model dtype, if masters are separate
    grad_starts: Sequence[int] | None = None  # the first element of each piece in its gradient; None: 0
    derived: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a kernel has computed, by its name, from all fields but ``grad``."""
    current: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a kernel has computed, by its name, from all fields."""

    def with_gradients(self, grads: Sequence[Tensor]) -> "ScatteredShard":
        """The same pieces with other gradients; what is derived from the rest stays."""
        return replace(self, grad=grads, current={})

    def gradients(self) -> list[Tensor]:
        """[n_i] views of the pieces' gradients, in memory order."""
        starts = self.grad_starts or [0] * len(self.grad)
        return [
            grad.as_strided((length,), (1,), grad.storage_offset() + start)
            for grad, length, start in zip(self.grad, self.lengths, starts, strict=True)
        ]

    def chosen(self, pieces: Sequence[int]) -> "ScatteredShard":
        """Some of the pieces, by index."""
        columns = self._columns()
        return _of_columns({name: column and [column[i] for i in pieces] for name, column in columns.items()})

    @staticmethod
    def joined(shards: Sequence["ScatteredShard"]) -> "ScatteredShard":
        """The pieces of several shards with the same dtypes."""
        columns = [shard._columns() for shard in shards]
        return _of_columns(
            {
                name: column and list(chain.from_iterable(each[name] for each in columns))
                for name, column in columns[0].items()
            }
        )

    def _columns(self) -> dict[str, Any]:
        return {kind.name: getattr(self, kind.name) for kind in fields(self) if kind.compare}

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(piece.numel() for piece in self.weight)

    @property
    def master_format(self) -> StateFormat:
        """The storage format of ``weight``."""
        return formats.of_memory(self.weight[0].dtype)

    @property
    def compute(self) -> torch.dtype:
        """The compute dtype."""
        return torch.promote_types(self.weight[0].dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.weight[0].device


def _of_columns(columns: dict[str, Any]) -> ScatteredShard:
    return ScatteredShard(**{**columns, "params": tuple(columns["params"])})


Shard = FlatShard | ScatteredShard
