"""Random numbers without state: hashes and permutations as functions of a key and an index.

Every random choice about the data is `hash(seed, purpose, global sample index, position)`. The only state of the data
is one index, and neither world size nor accumulation nor a restart changes a draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 6  # 4 make a strong pseudo-random permutation of ideal round functions; 2 more for short halves


def mix(values: U64) -> U64:
    """splitmix64's finalizer: a bijection of 64-bit words; every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        z = values + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return z ^ (z >> np.uint64(31))


def key_of(*parts: int | str) -> int:
    """One 64-bit key from a seed and the names of a purpose."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        words = part.encode() if isinstance(part, str) else part.to_bytes(16, "little", signed=True)
        padded = np.frombuffer(words + b"\0" * (-len(words) % 8), np.uint64)
        for word in padded:
            key = mix(key ^ word)
        key = mix(key ^ np.uint64(len(words)))
    return int(key[0])


def draw(key: int, index: U64 | I64) -> U64:
    """A random 64-bit word for every index (any shape)."""
    return mix(mix(np.asarray(index).astype(np.uint64)) ^ np.uint64(key))


def uniform(key: int, index: U64 | I64) -> NDArray[np.float64]:
    """A uniform number in [0, 1) for every index."""
    return (draw(key, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Permutation:
    """A keyed permutation of 0 … size-1, evaluated at single indices: a Feistel network with cycle walking.

    It shuffles any number of samples without a table in memory.
    """

    size: int
    key: int

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError(f"size={self.size}: expected a positive number of indices to permute")

    def __call__(self, index: I64) -> I64:
        """The image of each index in [0, size); same shape."""
        index = np.asarray(index, np.int64)
        assert bool(((index >= 0) & (index < self.size)).all()), "index outside of the permutation"
        out = self._encrypt(index.astype(np.uint64))
        # The network permutes the next power of four: walk along the cycle until the value is inside.
        outside = out >= np.uint64(self.size)
        while bool(outside.any()):
            out[outside] = self._encrypt(out[outside])
            outside = out >= np.uint64(self.size)
        return out.astype(np.int64)

    def _encrypt(self, value: U64) -> U64:
        half_bits = max(1, ((self.size - 1).bit_length() + 1) // 2)
        shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
        left, right = value >> shift, value & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (draw(self.key + number & (1 << 64) - 1, right) & mask)
        return (left << shift) | right
