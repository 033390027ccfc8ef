"""Whether a program has replaced the memory of tensors (``p.data = …``) since it was recorded."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_ADDRESS: Any = Tensor.data_ptr
_STRIDE: Any = Tensor.stride
_NUMEL: Any = Tensor.numel


class MemoryRecord:
    """Addresses, strides, sizes and dtypes of tensors. The caller keeps the recorded memory alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses: list[int] = list(map(_ADDRESS, tensors))
        self._strides: list[tuple[int, ...]] = list(map(_STRIDE, tensors))
        self._numels: list[int] = list(map(_NUMEL, tensors))
        self._dtypes = [tensor.dtype for tensor in tensors]

    def renew(self, position: int, tensor: Tensor) -> None:
        """Record one tensor anew."""
        self._addresses[position], self._strides[position] = tensor.data_ptr(), tensor.stride()
        self._numels[position], self._dtypes[position] = tensor.numel(), tensor.dtype

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are where the recorded ones were; about a microsecond each (addresses are read first)."""
        return (
            list(map(_ADDRESS, tensors)) == self._addresses
            and list(map(_STRIDE, tensors)) == self._strides
            and list(map(_NUMEL, tensors)) == self._numels
            and [tensor.dtype for tensor in tensors] == self._dtypes
        )

    def changed(self, tensors: Sequence[Tensor]) -> list[int]:
        """The positions of tensors that are not where the recorded ones were."""
        if self.fits(tensors):
            return []
        recorded = zip(self._addresses, self._strides, self._numels, self._dtypes, strict=True)
        return [
            position
            for position, (tensor, facts) in enumerate(zip(tensors, recorded, strict=True))
            if (tensor.data_ptr(), tensor.stride(), tensor.numel(), tensor.dtype) != facts
        ]
