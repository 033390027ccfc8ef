"""Moments of 8 bits: a floating-point code of each element, and a power of two for each block of 256.

A block (`sharded_lamb.core.layout.BLOCK` elements) is 260 bytes: its origin, a float32, and a code per element. The
magnitude of a code has 4 bits of fraction f and an exponent e, as small floating-point formats do::

    value = origin x 2ᵉ x (1 + f/16)      e > 0
    value = origin x 2 x f/16             e = 0: f = 0 is 0

First moments have a sign and 3 bits of exponent, second moments 4. The origin is a power of two, at least 2⁻⁹⁵ (smaller
values share that scale), with which the block's largest value, and what it can be rounded up to, has a code. It is nan
in a block with a nan or an infinity, all of whose values are nan. Codes are exact numbers: values that are decoded and
encoded again stay the same, bfloat16 holds them, and zeroed memory is zeros.

Steps round stochastically, up with the probability that makes the mean right. To the nearest code, second moments,
which change by a thousandth a step, would stay where they are (`tests/kernels/test_block_codes.py`). The random numbers
are a hash of the first moment and of the step: the same on every backend and any number of ranks.

A second moment above 0 never becomes 0. It becomes no less than 16/17 of itself, or half of itself where it is below
2⁻¹³ of its block's largest, or 2⁻⁹⁴: rounding it makes a step at most 3.1 %, or 42 %, larger.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sharded_lamb.core.layout import BLOCK

FRACTION_BITS = 4
SHIFT = 23 - FRACTION_BITS
ORIGIN_BYTES = 4
BLOCK_BYTES = ORIGIN_BYTES + BLOCK
LOWEST = 32
"""float32's exponent field of the smallest origin, 2⁻⁹⁵."""
INFINITY, NAN = 0x7F800000, 0x7FC00000
HALF, ROUNDED_UP = 1 << (SHIFT - 1), (1 << SHIFT) - 1
NO_SIGN = 0x7FFFFFFF


def random_bits(moment: Tensor, salt: Tensor) -> Tensor:
    """[…] int32, all bits of which are random: a hash of float32 bits.

    ``moment``: the first, not rounded, or any other number; ``salt`` broadcasts to it: the step. The factors are those
    of "lowbias32" (Wellons, nullprogram.com/blog/2018/07/31), and the golden ratio; products wrap around.
    """
    hashed = _bits(moment) ^ (_bits(salt) * _signed(0x9E3779B1))
    for factor in (0x21F0AAAD, 0xD35A2D97):
        hashed.mul_(_signed(factor))
        hashed ^= (hashed >> 15).bitwise_and_(0x1FFFF)
    return hashed


def random_halves(random: Tensor) -> tuple[Tensor, Tensor]:
    """The integers below 2¹⁹ that round a first and a second moment."""
    return random & 0x7FFFF, (random >> 13) & 0x7FFFF


def _bits(values: Tensor) -> Tensor:
    return values.to(torch.float32).contiguous().view(torch.int32)


def _signed(factor: int) -> int:
    """The int32 with the bits of a number below 2³²."""
    return factor - (1 << 32) if factor >> 31 else factor


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """The `StateFormat` of one moment: the first, which is signed, or the second."""

    signed: bool
    storage: ClassVar[torch.dtype] = torch.uint8
    value: ClassVar[torch.dtype] = torch.bfloat16
    beside_weight: ClassVar[bool] = False
    rounds_randomly: ClassVar[bool] = True
    block_bytes: ClassVar[int] = BLOCK_BYTES

    @property
    def name(self) -> str:
        return "8-bit"

    @property
    def largest(self) -> int:
        """The largest magnitude of a code."""
        return 0x7F if self.signed else 0xFF

    def shape(self, numel: int) -> tuple[int, ...]:
        return -(-numel // BLOCK), BLOCK_BYTES

    def part(self, stored: Tensor, start: int, length: int) -> Tensor:
        assert start % BLOCK == 0, "a part of 8-bit moments begins with a block"
        return stored[start // BLOCK : -(-(start + length) // BLOCK)]

    def key(self, kind: str) -> str:
        return f"{kind}_codes"

    def decode(self, stored: Tensor, weight: Tensor | None) -> Tensor:
        origin = stored[:, :ORIGIN_BYTES].contiguous().view(torch.int32)
        codes = stored[:, ORIGIN_BYTES:].to(torch.int32)
        at_e = (((codes & self.largest) << SHIFT) + origin).view(torch.float32)
        least = origin.view(torch.float32) * 2
        values = at_e - (least - at_e).clamp(min=0)
        return torch.where(codes > self.largest, -values, values).to(self.value)

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """To the nearest codes."""
        flat = values.to(torch.float32).reshape(-1)
        return self._encode(pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK), HALF), None

    def encode_randomly(self, values: Tensor, random: Tensor) -> Tensor:
        return self._encode(values.to(torch.float32), random.to(torch.int32))

    def _encode(self, values: Tensor, added: Tensor | int) -> Tensor:
        bits = values.contiguous().view(torch.int32)
        magnitude = bits & NO_SIGN
        top = magnitude.amax(dim=1, keepdim=True)
        exponent = (top + ROUNDED_UP >> 23) - (self.largest >> FRACTION_BITS)
        origin = torch.where(top < INFINITY, exponent.clamp(min=LOWEST) << 23, NAN)
        least = origin.view(torch.float32) * 2
        number = magnitude.view(torch.float32)
        below = number < least
        shifted = (number + torch.where(below, least, 0.0)).view(torch.int32)
        codes = ((shifted + added) >> SHIFT) - (origin >> SHIFT) - (below.int() << FRACTION_BITS)
        if not self.signed:
            codes = torch.maximum(codes, (number > 0).int())
        codes = torch.where(top < INFINITY, codes, 0)
        if self.signed:
            codes = torch.where((bits < 0) & (codes > 0), codes | 0x80, codes)
        return torch.cat(
            [origin.view(-1).view(torch.uint8).view(-1, ORIGIN_BYTES), codes.to(torch.uint8)], dim=1
        )

    def reset(self, stored: Tensor, weight: Tensor) -> None:
        raise NotImplementedError("moments start as zeros")
