"""How a kind of state (masters, a moment) is stored. Whoever holds state asks its format, and no one else knows.

A format gives the dtype of the memory, the dtype of the values that it stands for, and the way between the two. Flat
memory and DTensors' local parts allocate by it, state dicts and checkpoints hold its values, plan counts its bytes, and
the kernels' loads and stores follow it. `formats` lists all formats; kernels, which see memory alone, find a format by
its storage dtype, so no two formats share one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StateFormat(Protocol):
    """Stateless. ``stored``: [n] ``storage``; ``values``: [n] ``value``; ``weight``: [n], the model's own weights.

    Memory of zeros stands for zeros: moments start so.
    """

    @property
    def name(self) -> str:
        """For messages and tables."""

    @property
    def storage(self) -> torch.dtype:
        """Dtype of the memory."""

    @property
    def value(self) -> torch.dtype:
        """Dtype of the values: what state dicts and checkpoints hold."""

    @property
    def beside_weight(self) -> bool:
        """Whether values are made of ``weight`` and ``stored``: such masters always agree with their weights."""

    def key(self, kind: str) -> str:
        """The key of ``kind`` in ``optimizer.state``; not ``kind`` itself where ``stored`` does not hold the values.

        State dicts and checkpoints hold values, and call them ``kind``.
        """

    def decode(self, stored: Tensor, weight: Tensor | None) -> Tensor:
        """The values: ``stored`` itself where it holds them as they are, else new memory."""

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what is stored, the model's weights where the format decides them); casts are left to the copy."""

    def reset(self, stored: Tensor, weight: Tensor) -> None:
        """Write the masters of weights that were written as a whole: equal to them."""


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


@dataclass(frozen=True, slots=True)
class StoredState:
    """One kind of state in this rank's memory: of a bucket, or of a DTensor's local part."""

    kind: str  # "master", "exp_avg" or "exp_avg_sq": the key in state dicts and checkpoints
    format: StateFormat
    stored: Tensor  # [n]
    weight: Tensor | None = None  # [n] the model's, for a format beside it

    @property
    def key(self) -> str:
        """In ``optimizer.state``."""
        return self.format.key(self.kind)

    def values(self) -> Tensor:
        """[n] the memory itself where the format allows it."""
        return self.format.decode(self.stored, self.weight)

    def empty(self) -> Tensor:
        """[n] memory to receive values in: the state's own where it holds values as they are."""
        if self.stored.dtype == self.format.value:
            return self.stored
        return torch.empty_like(self.stored, dtype=self.format.value)

    def store(self, values: Tensor) -> None:
        """Take values of any floating-point dtype. Leaves weights beside alone: the model loads those."""
        if values is not self.stored:
            stored, _ = self.format.encode(values.detach().to(self.format.value))
            self.stored.copy_(stored)


def moments(format: StateFormat, exp_avg: Tensor, exp_avg_sq: Tensor) -> Iterator[StoredState]:
    """Both moments, which have one format."""
    yield StoredState("exp_avg", format, exp_avg)
    yield StoredState("exp_avg_sq", format, exp_avg_sq)
