"""Storage formats of state (masters and moments).

A format defines the storage dtype, the dtype of the values, and the conversion between the two. Flat memory and
DTensors' local shards allocate the storage, state dicts and checkpoints hold the values, plan counts the bytes, and
kernels load and store accordingly. `formats` lists all formats; kernels, which only see memory, look a format up by its
storage dtype, so no two formats of one kind of state share one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sharded_lamb.core.layout import BLOCK


class StateFormat(Protocol):
    """Stateless. ``stored``: ``shape(n)`` ``storage``; ``values``: [n] ``value``; ``weight``: [n], the model's weights.

    Zeros decode to zeros: moments start from zeroed memory.
    """

    @property
    def name(self) -> str:
        """Name in messages and tables."""

    @property
    def storage(self) -> torch.dtype:
        """Dtype of the memory."""

    @property
    def value(self) -> torch.dtype:
        """Dtype of the values, in state dicts and checkpoints."""

    @property
    def block_bytes(self) -> int:
        """Bytes of `sharded_lamb.core.layout.BLOCK` elements."""

    def shape(self, numel: int) -> tuple[int, ...]:
        """The shape of the memory of ``numel`` elements."""

    def part(self, stored: Tensor, start: int, length: int) -> Tensor:
        """A view of the memory of elements [start, start + length)."""

    @property
    def beside_weight(self) -> bool:
        """Whether ``weight`` and ``stored`` together make the values: such masters always round to their weights."""

    def key(self, kind: str) -> str:
        """The key of ``kind`` in ``optimizer.state``; differs from ``kind`` if ``stored`` does not hold the values.

        State dicts and checkpoints hold values, under the key ``kind``.
        """

    def decode(self, stored: Tensor, weight: Tensor | None) -> Tensor:
        """The values: ``stored`` itself if it holds them unencoded, else new memory, also of padding."""

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """(memory to store, the model's weights if the format determines them); the copy casts."""

    @property
    def rounds_randomly(self) -> bool:
        """Whether a step rounds moments with random numbers: to nearest, they would not follow small changes."""

    def encode_randomly(self, values: Tensor, random: Tensor) -> Tensor:
        """Moments [blocks, BLOCK] of a step as memory. ``random``: like ``values``, integers below 2¹⁹."""

    def reset(self, stored: Tensor, weight: Tensor) -> None:
        """Set masters equal to weights, after the weights were overwritten."""


class OneByOne:
    """Formats that store each element on its own, in the dtype ``storage``."""

    __slots__ = ()

    @property
    def rounds_randomly(self) -> bool:
        return False

    @property
    def storage(self) -> torch.dtype:
        raise NotImplementedError

    @property
    def block_bytes(self) -> int:
        return BLOCK * self.storage.itemsize

    def shape(self, numel: int) -> tuple[int, ...]:
        return (numel,)

    def part(self, stored: Tensor, start: int, length: int) -> Tensor:
        return stored[start : start + length]

    def encode_randomly(self, values: Tensor, random: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class PlainFormat(OneByOne):
    """Values in memory of their own dtype.

    bfloat16 has a step of 0.4 to 0.8 %, and a second moment changes by 0.1 %: to nearest it would stay where it is.
    """

    storage: torch.dtype
    beside_weight = False

    @property
    def rounds_randomly(self) -> bool:
        return self.storage == torch.bfloat16

    @property
    def name(self) -> str:
        return str(self.storage).removeprefix("torch.")

    @property
    def value(self) -> torch.dtype:
        return self.storage

    def key(self, kind: str) -> str:
        return kind

    def decode(self, stored: Tensor, weight: Tensor | None) -> Tensor:
        return stored

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        return values, None

    def encode_randomly(self, values: Tensor, random: Tensor) -> Tensor:
        single = values.to(torch.float32)
        bits = single.view(torch.int32) + (random >> 3).to(torch.int32)
        rounded = (bits & -0x10000).view(torch.float32)
        return torch.where(single.isfinite(), rounded, single).to(torch.bfloat16)

    def reset(self, stored: Tensor, weight: Tensor) -> None:
        stored.copy_(weight)


def nbytes(form: StateFormat, numel: int) -> int:
    """Bytes of the memory of ``numel`` elements."""
    return math.prod(form.shape(numel)) * form.storage.itemsize


OF_WEIGHTS = ("master", "ema")
"""Kinds of state that start as the model's weights; the others start as zeros."""


@dataclass(frozen=True, slots=True)
class StoredState:
    """One kind of state in this rank's memory, of a bucket or of a DTensor's local shard."""

    kind: str  # "master", "ema", "exp_avg" or "exp_avg_sq": the key in state dicts and checkpoints
    format: StateFormat
    numel: int
    stored: Tensor  # `StateFormat.shape` of ``numel``
    weight: Tensor | None = None  # [n] the model's, for `OF_WEIGHTS`

    @property
    def key(self) -> str:
        """Key in ``optimizer.state``."""
        return self.format.key(self.kind)

    @property
    def is_by_element(self) -> bool:
        """Whether ``stored`` is [numel]."""
        return self.stored.dim() == 1

    def reset(self) -> None:
        """Store the state of a new optimizer: the model's weights, or zeros."""
        if self.weight is None:
            self.stored.zero_()
        else:
            self.format.reset(self.stored, self.weight)

    def values(self) -> Tensor:
        """[n] the values; the memory itself if it holds them unencoded."""
        return self.format.decode(self.stored, self.weight).reshape(-1)[: self.numel]

    def empty(self) -> Tensor:
        """[n] memory to receive values: the state's own if it holds values unencoded."""
        if self.stored.dtype == self.format.value:
            return self.stored
        return torch.empty(self.numel, dtype=self.format.value, device=self.stored.device)

    def part(self, start: int, length: int) -> "StoredState":
        """Elements [start, start + length): views."""
        weight = None if self.weight is None else self.weight[start : start + length]
        return replace(self, numel=length, stored=self.format.part(self.stored, start, length), weight=weight)

    def store(self, values: Tensor) -> None:
        """Store values of any floating-point dtype. Does not write the model's weights: the model loads those."""
        if values is not self.stored:
            stored, _ = self.format.encode(values.detach())
            self.stored.copy_(stored)


Moments = tuple[StateFormat, StateFormat]
"""The formats of the first and the second moment, which have one storage dtype."""


def moments(
    formats: Moments, numel: int, exp_avg: Tensor, exp_avg_sq: Tensor | None
) -> Iterator[StoredState]:
    """Both moments, or the first alone, of ``numel`` elements."""
    yield StoredState("exp_avg", formats[0], numel, exp_avg)
    if exp_avg_sq is not None:
        yield StoredState("exp_avg_sq", formats[1], numel, exp_avg_sq)
