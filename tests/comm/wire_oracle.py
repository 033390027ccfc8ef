"""What ranks receive of encoded parameters and gradients, in float64: written from the formats' definitions alone."""

import math

import numpy as np
import torch
from torch import Tensor

BLOCK = 256
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)
"""The finite magnitudes of float8_e4m3fn by code."""


def received(weights: Tensor, gather: torch.dtype) -> Tensor:
    """``weights``, of one parameter in memory order, as all ranks hold them after a gather; of the same dtype."""
    values = weights.detach().double().flatten().numpy()
    rounded = to_bfloat16(values) if gather == torch.bfloat16 else by_block(values, weights.dtype)
    return torch.from_numpy(rounded).to(weights.dtype).view(weights.shape)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """8 significant bits, to nearest even, above 2⁻¹²⁶; multiples of 2⁻¹³³ below."""
    _, exponents = np.frexp(values)
    quantum = np.exp2(np.maximum(exponents - 8.0, -133.0))
    with np.errstate(invalid="ignore"):
        rounded = np.rint(values / quantum) * quantum
    return np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, rounded), rounded)


def by_block(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    parts = [values[at : at + BLOCK] for at in range(0, len(values), BLOCK)]
    return np.concatenate([one_block(part, torch.finfo(dtype).max) for part in parts] or [values])


def exponent_of(values: np.ndarray) -> int:
    """The least exponent with which all finite values of a block have a code."""
    top = np.abs(values[np.isfinite(values)]).max(initial=0.0)
    return 0 if top == 0 else next(e for e in range(-126, 128) if top <= math.ldexp(448.0, e))


def one_block(values: np.ndarray, largest: float) -> np.ndarray:
    finite, exponent = np.isfinite(values), exponent_of(values)
    scaled = np.where(finite, values, 0.0) / math.ldexp(1.0, exponent)
    codes = to_code(np.abs(scaled))
    decoded = np.copysign(E4M3[codes] * math.ldexp(1.0, exponent), scaled)
    return np.where(finite, np.clip(decoded, -largest, largest), np.nan)


def to_code(magnitudes: np.ndarray) -> np.ndarray:
    """The nearest code; of two that are equally near, the even one."""
    between = (E4M3[:-1] + E4M3[1:]) / 2
    low, high = np.searchsorted(between, magnitudes, "left"), np.searchsorted(between, magnitudes, "right")
    return np.where(low % 2 == 0, low, high)


# -- gradients -------------------------------------------------------------------------------------------


def contribution(grad: Tensor, reduce: torch.dtype, step: int) -> np.ndarray:
    """What the owner reads of a rank's gradient [n], in memory order; ``step``: those that the parameter has had."""
    values = grad.detach().flatten().float().double().numpy()
    if reduce == torch.bfloat16:
        return to_bfloat16(values)
    blocks = [values[at : at + BLOCK] for at in range(0, len(values), BLOCK)]
    return np.concatenate([by_chance(block, step) for block in blocks] or [values])


def by_chance(values: np.ndarray, step: int) -> np.ndarray:
    """A block, each element rounded up if its distance from the code below, in 2⁻²⁰ of the distance between the two
    codes, and a random number below 2²⁰ add up to 2²⁰."""
    finite, exponent = np.isfinite(values), exponent_of(values)
    scaled = np.abs(np.where(finite, values, 0.0)) / math.ldexp(1.0, exponent)
    below = np.minimum(np.searchsorted(E4M3, scaled, "right") - 1, len(E4M3) - 2)
    distance = (scaled - E4M3[below]) / (E4M3[below + 1] - E4M3[below])
    up = np.rint(distance * 2**20) + random_numbers(values, step) % 2**20 >= 2**20
    magnitude = E4M3[below + up] * math.ldexp(1.0, exponent)
    clipped = np.minimum(magnitude, np.finfo(np.float32).max)
    return np.where(finite, np.copysign(clipped, values), np.nan)


def random_numbers(values: np.ndarray, step: int) -> np.ndarray:
    """The hash "lowbias32" of the bits of float32 numbers, keyed by those of the step."""
    mask = 0xFFFFFFFF
    key = int(np.float32(step).view(np.uint32)) * 0x9E3779B1 & mask
    numbers = []
    for bits in values.astype(np.float32).view(np.uint32).tolist():
        mixed = (bits ^ key) * 0x21F0AAAD & mask
        mixed = (mixed ^ mixed >> 15) * 0xD35A2D97 & mask
        numbers.append(mixed ^ mixed >> 15)
    return np.array(numbers, dtype=np.int64)
