"""Encodings of messages, block by block: `ShardedLamb`'s ``gather_dtype`` and ``reduce_dtype``.

A message has one row per block of `BLOCK` elements, so that its bits do not depend on where shards end. Decoding is
exact: ranks that decode one message hold the same bits, which are those that the sender decodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from sharded_lamb.core.layout import BLOCK

CHUNK_BLOCKS = 1024
"""256 K elements: the temporaries of an encoding stay in a CPU's cache. On other devices memory bounds a chunk."""

_E4M3_BITS = 9  # the largest float8_e4m3fn, 448, is 0.875 x 2⁹
_SMALLEST_NORMAL = 2.0**-6
_BELOW_CODES = (1 << 20) - 1  # bits of a float32's fraction that float8_e4m3fn lacks
_BIAS = 127  # of the exponent of float32


class WireFormat(Protocol):
    """Stateless, and equal to others of its kind."""

    @property
    def storage(self) -> torch.dtype:
        """Dtype of messages."""

    @property
    def row(self) -> int:
        """Elements of the message for one block."""

    @property
    def rounds_randomly(self) -> bool:
        """Whether ``random`` counts."""

    def encode(self, values: Tensor, random: Tensor | None = None) -> Tensor:
        """[blocks, BLOCK] floating point → [blocks, row] ``storage``.

        ``random``: [blocks, BLOCK] int32, uniform: rounds up or down by chance, with the right mean; None: to nearest.
        """

    def decode(self, message: Tensor, dtype: torch.dtype) -> Tensor:
        """[blocks, row] → [blocks, BLOCK] ``dtype``: that of the values that were encoded, or a wider one."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Values rounded to a narrower dtype: |error| ≤ 2⁻⁸ |w| for bfloat16's normal numbers."""

    storage: torch.dtype
    row: int = BLOCK
    rounds_randomly: bool = False  # always to nearest: no measurement shows the error of 8 significant bits

    def encode(self, values: Tensor, random: Tensor | None = None) -> Tensor:
        """See `WireFormat`."""
        return values.to(self.storage)

    def decode(self, message: Tensor, dtype: torch.dtype) -> Tensor:
        """See `WireFormat`."""
        return message.to(dtype)


@dataclass(frozen=True, slots=True)
class ScaledFloat8:
    """float8_e4m3fn codes c and an exponent e per block: w ≈ c 2ᵉ, with the least e for which all |c| ≤ 448.

    257 bytes per block: 256 codes, then e + 127. Multiplying by a power of two is exact, so the only error is that of
    rounding w 2⁻ᵉ to a code: |error| ≤ max(|w| / 16, 2⁻¹⁷ max |w| of the block, 2⁻¹³⁶). A value that rounds beyond the
    largest finite number of its dtype becomes that number. Non-finite values become NaN and do not count in e.

    By chance |error| < max(|w| / 8, 2⁻¹⁶ max |w| of the block, 2⁻¹³⁵), and the mean is w to within 2⁻³⁷ of the block's
    largest.
    """

    storage: torch.dtype = torch.uint8
    row: int = BLOCK + 1
    rounds_randomly: bool = True

    def encode(self, values: Tensor, random: Tensor | None = None) -> Tensor:
        """See `WireFormat`."""
        values = values.float()
        largest = values.abs().amax(1, keepdim=True)  # not finite if any is not
        if values.device.type != "cpu" or not largest.isfinite().all():
            is_finite = values.isfinite()
            values = torch.where(is_finite, values, torch.nan)  # casts may saturate infinities
            largest = torch.where(is_finite, values, 0).abs_().amax(1, keepdim=True)
        mantissa, exponent = torch.frexp(largest)
        exponent = (exponent - _E4M3_BITS + (mantissa > 0.875)).clamp_(1 - _BIAS, _BIAS)
        scaled = values * _power_of_2(-exponent)
        if random is not None:
            scaled = _rounded_by_chance(scaled, random)
        codes = scaled.to(torch.float8_e4m3fn)
        return torch.cat((codes.view(torch.uint8), (exponent + _BIAS).to(torch.uint8)), 1)

    def decode(self, message: Tensor, dtype: torch.dtype) -> Tensor:
        """See `WireFormat`."""
        codes, exponent = message[:, :BLOCK], message[:, BLOCK:].int() - _BIAS
        values = _float8_values(message.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)
        largest = torch.finfo(dtype).max
        return values.mul_(_power_of_2(exponent)).clamp_(-largest, largest).to(dtype)


def _rounded_by_chance(scaled: Tensor, random: Tensor) -> Tensor:
    """fp32 in [-448, 448] or NaN → one of the two neighboring codes, by the last 20 bits of ``random``: int32.

    Adding the smallest normal number to magnitudes below it gives them its exponent, hence the spacing of their codes.
    """
    magnitude = scaled.abs()
    added = (magnitude < _SMALLEST_NORMAL).float() * _SMALLEST_NORMAL
    bits = (magnitude + added).view(torch.int32)
    codes = (bits + (random & _BELOW_CODES)).bitwise_and_(~_BELOW_CODES).view(torch.float32)
    return (codes - added).copysign_(scaled)


@cache
def _float8_values(device: torch.device) -> Tensor:
    """[256] fp32 by code. A table: torch's conversion from float8 takes 4 times as long on a CPU."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def _power_of_2(exponent: Tensor) -> Tensor:
    """2 to the ``exponent``: int32 in [-126, 127] → fp32, exact (torch.pow need not be)."""
    return (exponent + _BIAS).bitwise_left_shift(23).view(torch.float32)


_FORMATS: dict[torch.dtype, WireFormat] = {
    torch.bfloat16: Cast(torch.bfloat16),
    torch.float8_e4m3fn: ScaledFloat8(),
}

GATHER_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FORMATS}
"""The values of ``gather_dtype`` by their names in commands; for ``reduce_dtype``, those that have a format."""


def chunks(blocks: int, device: torch.device) -> Iterator[slice]:
    """Ranges of ``blocks`` that are encoded or decoded at once."""
    size = CHUNK_BLOCKS if device.type == "cpu" else 1 << 14
    return (slice(low, min(low + size, blocks)) for low in range(0, blocks, size))


def of_gather(gather_dtype: torch.dtype | None, model: torch.dtype) -> WireFormat | None:
    """The format of parameters of dtype ``model``; None: they travel as they are.

    Those are float64 parameters, which are float64 throughout, and parameters that are no wider than ``gather_dtype``.
    """
    if gather_dtype is None or model == torch.float64 or model.itemsize <= gather_dtype.itemsize:
        return None
    return _FORMATS[gather_dtype]


def of_reduce(reduce_dtype: torch.dtype | None, grads: torch.dtype) -> WireFormat | None:
    """The format of gradients of dtype ``grads``; None: they are not encoded."""
    if reduce_dtype not in _FORMATS or grads.itemsize <= reduce_dtype.itemsize:
        return None
    return _FORMATS[reduce_dtype]


def check_gather_dtype(value: object) -> None:
    """Raises ValueError for a ``gather_dtype`` without a format."""
    if value is not None and value not in _FORMATS:
        names = ", ".join(map(str, _FORMATS))
        raise ValueError(
            f"gather_dtype must be one of None, {names}, got {value!r}: float16 lacks float32's range, and integers "
            f"need a scale per block, which float8_e4m3fn has"
        )
