"""What ranks receive through a compressed gather, in float64: written from the formats' definitions alone."""

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


def one_block(values: np.ndarray, largest: float) -> np.ndarray:
    finite = np.isfinite(values)
    top = np.abs(values[finite]).max(initial=0.0)
    exponent = next(e for e in range(-126, 128) if top <= math.ldexp(448.0, e))
    if top == 0:
        exponent = 0
    scaled = np.where(finite, values, 0.0) / math.ldexp(1.0, exponent)
    codes = to_code(np.abs(scaled))
    decoded = np.copysign(E4M3[codes] * math.ldexp(1.0, exponent), scaled)
    return np.where(finite, np.clip(decoded, -largest, largest), np.nan)


def to_code(magnitudes: np.ndarray) -> np.ndarray:
    """The nearest code; of two that are equally near, the even one."""
    between = (E4M3[:-1] + E4M3[1:]) / 2
    low, high = np.searchsorted(between, magnitudes, "left"), np.searchsorted(between, magnitudes, "right")
    return np.where(low % 2 == 0, low, high)
