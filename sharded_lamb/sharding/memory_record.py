"""Whether a program has replaced the memory of tensors (``p.data = …``) since it was recorded."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

_FACTS: tuple[Any, ...] = (Tensor.data_ptr, Tensor.stride, Tensor.numel, operator.attrgetter("dtype"))


def _facts(tensors: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
    return zip(*(map(fact, tensors) for fact in _FACTS), strict=True)


class MemoryRecord:
    """Addresses, strides, sizes and dtypes of tensors. The caller keeps the recorded memory alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._recorded = list(_facts(tensors))

    def renew(self, position: int, tensor: Tensor) -> None:
        """Record one tensor anew."""
        (self._recorded[position],) = _facts([tensor])

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are where the recorded ones were; about 0.7 microseconds each."""
        alike = map(operator.eq, _facts(tensors), self._recorded)
        return len(tensors) == len(self._recorded) and all(alike)

    def changed(self, tensors: Sequence[Tensor]) -> list[int]:
        """The positions of tensors that are not where the recorded ones were."""
        if self.fits(tensors):
            return []
        return [
            position
            for position, (now, then) in enumerate(zip(_facts(tensors), self._recorded, strict=True))
            if now != then
        ]
