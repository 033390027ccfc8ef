"""Storage formats of state (masters and moments).

A format defines the storage dtype, the dtype of the values, and the conversion between the two. Flat memory and
DTensors' local shards allocate the storage, state dicts and checkpoints hold the values, plan counts the bytes, and
kernels load and store accordingly. `formats` lists all formats; kernels, which only see memory, look a format up by its
storage dtype, so no two formats share one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StateFormat(Protocol):
    """Stateless. ``stored``: [n] ``storage``; ``values``: [n] ``value``; ``weight``: [n], the model's weights.

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
    def beside_weight(self) -> bool:
        """Whether ``weight`` and ``stored`` together make the values: such masters always round to their weights."""

    def key(self, kind: str) -> str:
        """The key of ``kind`` in ``optimizer.state``; differs from ``kind`` if ``stored`` does not hold the values.

        State dicts and checkpoints hold values, under the key ``kind``.
        """

    def decode(self, stored: Tensor, weight: Tensor | None) -> Tensor:
        """The values: ``stored`` itself if it holds them unencoded, else new memory."""

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """(memory to store, the model's weights if the format determines them); the copy casts."""

    def reset(self, stored: Tensor, weight: Tensor) -> None:
        """Set masters equal to weights, after the weights were overwritten."""


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """Values in memory of their own dtype."""

    storage: torch.dtype
    beside_weight = False

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

    def reset(self, stored: Tensor, weight: Tensor) -> None:
        stored.copy_(weight)


OF_WEIGHTS = ("master", "ema")
"""Kinds of state that start as the model's weights; the others start as zeros."""


@dataclass(frozen=True, slots=True)
class StoredState:
    """One kind of state in this rank's memory, of a bucket or of a DTensor's local shard."""

    kind: str  # "master", "ema", "exp_avg" or "exp_avg_sq": the key in state dicts and checkpoints
    format: StateFormat
    stored: Tensor  # [n]
    weight: Tensor | None = None  # [n] the model's, for `OF_WEIGHTS`

    @property
    def key(self) -> str:
        """Key in ``optimizer.state``."""
        return self.format.key(self.kind)

    def reset(self) -> None:
        """Store the state of a new optimizer: the model's weights, or zeros."""
        if self.weight is None:
            self.stored.zero_()
        else:
            self.format.reset(self.stored, self.weight)

    def values(self) -> Tensor:
        """[n] the values; the memory itself if it holds them unencoded."""
        return self.format.decode(self.stored, self.weight)

    def empty(self) -> Tensor:
        """[n] memory to receive values: the state's own if it holds values unencoded."""
        if self.stored.dtype == self.format.value:
            return self.stored
        return torch.empty_like(self.stored, dtype=self.format.value)

    def store(self, values: Tensor) -> None:
        """Store values of any floating-point dtype. Does not write the model's weights: the model loads those."""
        if values is not self.stored:
            stored, _ = self.format.encode(values.detach().to(self.format.value))
            self.stored.copy_(stored)


def moments(format: StateFormat, exp_avg: Tensor, exp_avg_sq: Tensor | None) -> Iterator[StoredState]:
    """Both moments, or the first alone; they share one format."""
    yield StoredState("exp_avg", format, exp_avg)
    if exp_avg_sq is not None:
        yield StoredState("exp_avg_sq", format, exp_avg_sq)
