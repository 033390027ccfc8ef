"""fp32 masters stored as their low 16 bits, or 8 of them, beside bfloat16 weights that hold the high 16.

A bfloat16 number is the upper half of a float32. As integers, a master is its weight shifted by 16 bits plus a signed
remainder::

    master bits = (weight bits << 16) + remainder         -0x8000 <= remainder <= 0x7fff

The weight is the rounded master (to nearest, ties to even), so the two represent every master exactly but one in
131,072: a tie above an even weight would need +0x8000. Every backend replaces it by its neighbour towards 0, one ulp of
float32 away. The remainder of a nan is 0.

With 8 bits the remainder is rounded to a multiple of 0x100 (to nearest, ties to even), from -0x8000 to 0x7f00: a master
of 24 bits, of which 15 are the fraction's, within 2⁻¹⁶ of the fp32 one, or 2⁻¹⁵ where that is nearly a tie above its
weight. A step that changes a weight by less is lost.

A joined master always rounds to its weight: after the user writes a weight, the stored remainder belongs to the old
one, and `joined` clamps it where the master would round to another weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sharded_lamb.kernels.state_format import OneByOne

STORAGE = {16: torch.int16, 8: torch.int8}
"""{bits of a remainder: dtype of the memory}."""

HIGHEST = 0x7FFF
INFINITY = 0x7F80
"""Bits of bfloat16's infinity, without the sign."""


def joined(model: Tensor, remainder: Tensor) -> Tensor:
    """[…] bfloat16 weights and int16 or int8 remainders → fp32 masters, in new memory."""
    upper = model.view(torch.int16).to(torch.int32)
    magnitude, lower = upper & 0x7FFF, remainder.to(torch.int32)
    if remainder.dtype == STORAGE[8]:
        lower = lower << 8
    # Bits below 0 are numbers of the other sign, bits above infinity are nans; a tie rounds to the even weight.
    lowest = torch.where(magnitude == 0, 0, (upper & 1) - 0x8000)
    lower = torch.where(magnitude == INFINITY, lower.clamp(max=0), torch.maximum(lower, lowest))
    return ((upper << 16) + lower).view(torch.float32)


def split(master: Tensor, bits: int = 16) -> tuple[Tensor, Tensor]:
    """[…] fp32 masters → (bfloat16 weights, remainders), in new memory."""
    model = master.to(torch.bfloat16)
    lower = master.view(torch.int32) - (model.view(torch.int16).to(torch.int32) << 16)
    lower = torch.where(master.isnan(), 0, lower.clamp(max=HIGHEST))
    if bits == 8:
        lower = ((lower + 0x7F + ((lower >> 8) & 1)) >> 8).clamp(max=HIGHEST >> 8)
    return model, lower.to(STORAGE[bits])


@dataclass(frozen=True, slots=True)
class RemainderFormat(OneByOne):
    """The `StateFormat` of masters under ``store_param_remainders``: of 16 bits, or of 8."""

    bits: int
    value: ClassVar[torch.dtype] = torch.float32
    beside_weight: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.bits}-bit remainders of float32"

    @property
    def storage(self) -> torch.dtype:
        return STORAGE[self.bits]

    def key(self, kind: str) -> str:
        assert kind == "master"
        return "remainder"

    def decode(self, stored: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return joined(weight, stored)

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, remainder = split(values.to(torch.float32), self.bits)
        return remainder, weight

    def reset(self, stored: Tensor, weight: Tensor) -> None:
        stored.zero_()
