"""fp32 masters kept as what bfloat16 weights lack of them: 16 bits an element, beside the weights themselves.

A bfloat16 number is the upper half of a float32. The master is the weight in that place and a signed remainder, both as
integers::

    master bits = (weight bits << 16) + remainder         -0x8000 <= remainder <= 0x7fff

The weight is the master's rounding (to nearest, ties to even), so together they have the bits of every master but one
in 131,072: a tie above an even weight would need +0x8000. It becomes its neighbour towards 0, a unit in the last place
of float32 away, in every backend. A nan's remainder is 0.

What is joined rounds to the weight, whatever the remainder: a weight that somebody wrote has another one's beside it,
which is cut where it would lead elsewhere.
"""

import torch
from torch import Tensor

DTYPE = torch.int16
"""Of remainders; nothing else that kernels run over has it."""

HIGHEST = 0x7FFF
INFINITY = 0x7F80
"""Bits of bfloat16's, without the sign."""


def joined(model: Tensor, remainder: Tensor) -> Tensor:
    """[…] bfloat16 weights and int16 remainders → fp32 masters, in new memory."""
    upper = model.view(torch.int16).to(torch.int32)
    magnitude, lower = upper & 0x7FFF, remainder.to(torch.int32)
    # Below 0 are the largest numbers of the other sign, above infinity are nans, and a tie goes to the even neighbour.
    lowest = torch.where(magnitude == 0, 0, (upper & 1) - 0x8000)
    lower = torch.where(magnitude == INFINITY, lower.clamp(max=0), torch.maximum(lower, lowest))
    return ((upper << 16) + lower).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """[…] fp32 masters → (bfloat16 weights, int16 remainders), in new memory."""
    model = master.to(torch.bfloat16)
    lower = master.view(torch.int32) - (model.view(torch.int16).to(torch.int32) << 16)
    return model, torch.where(master.isnan(), 0, lower.clamp(max=HIGHEST)).to(DTYPE)
