# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-redef"
# ruff: noqa: SIM300 (ruff takes capitals for constants, to be on the right of a comparison)
"""Moments of a tile in Triton: of a floating-point dtype, or of 8 bits (`block_codes`), which have dtype uint8 here.

See `triton_device`, whose launches call these. Importing this module imports Triton. Arguments have no types because
Triton interprets annotations.
"""

import triton
import triton.language as tl

from sharded_lamb.kernels import block_codes
from sharded_lamb.kernels.triton_memory import BLOCK, HALF, TILE, memory_of, rounded_to, widened

BLOCK_BYTES = tl.constexpr(block_codes.BLOCK_BYTES)
ORIGIN_BYTES = tl.constexpr(block_codes.ORIGIN_BYTES)
SHIFT = tl.constexpr(block_codes.SHIFT)
FRACTIONS = tl.constexpr(1 << block_codes.FRACTION_BITS)
LOWEST = tl.constexpr(block_codes.LOWEST)
INFINITY = tl.constexpr(block_codes.INFINITY)
NAN = tl.constexpr(block_codes.NAN)
ROUNDED_UP = tl.constexpr(block_codes.ROUNDED_UP)
NO_SIGN = tl.constexpr(block_codes.NO_SIGN)


@triton.jit
def random_bits(moment, salt):
    """`block_codes.random_bits`; ``moment``: float32, ``salt``: broadcasts to it."""
    key = salt.to(tl.float32).to(tl.uint32, bitcast=True) * 0x9E3779B1
    hashed = (moment.to(tl.uint32, bitcast=True) ^ key) * 0x21F0AAAD
    hashed = (hashed ^ (hashed >> 15)) * 0xD35A2D97
    return hashed ^ (hashed >> 15)


@triton.jit
def _coded_blocks(row, COLUMN: tl.constexpr, start):
    """[2 TILE] pointers: the coded block of each row of the tile. 4 bytes are aligned."""
    blocks = start // BLOCK + tl.arange(0, 2 * TILE) % TILE
    memory = tl.load(row + COLUMN).to(tl.pointer_type(tl.uint8)) + blocks * BLOCK_BYTES
    return tl.multiple_of(memory, 4)


@triton.jit
def _codes(blocks):
    """[2 TILE, HALF] pointers."""
    first = tl.multiple_of(blocks + ORIGIN_BYTES + tl.arange(0, 2 * TILE) // TILE * HALF, 4)
    return first[:, None] + tl.arange(0, HALF)[None, :]


@triton.jit
def load_moment(
    row,
    COLUMN: tl.constexpr,
    start,
    offsets,
    mask,
    DTYPE: tl.constexpr,
    SIGNED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A moment in the compute dtype. SIGNED: the first."""
    if DTYPE == tl.uint8:
        memory = _coded_blocks(row, COLUMN, start)
        is_block = tl.max(mask.to(tl.int32), axis=1) > 0
        origins = memory.to(tl.pointer_type(tl.int32))
        origin = tl.load(origins, mask=is_block, other=0)[:, None]
        codes = tl.load(_codes(memory), mask=mask, other=0).to(tl.int32)
        if SIGNED:
            magnitude = codes & 0x7F
        else:
            magnitude = codes
        at_e = ((magnitude << SHIFT) + origin).to(tl.float32, bitcast=True)
        missing = origin.to(tl.float32, bitcast=True) * 2 - at_e
        value = at_e - tl.where(missing > 0, missing, 0)
        if SIGNED:
            value = tl.where(codes > 0x7F, -value, value)
        value = value.to(COMPUTE)
    else:
        stored = tl.load(memory_of(row, COLUMN, start, DTYPE, ALIGNED) + offsets, mask=mask, other=0)
        value = widened(stored, DTYPE, COMPUTE)
    return value


@triton.jit
def store_moment(
    value,
    random,
    row,
    COLUMN: tl.constexpr,
    start,
    offsets,
    mask,
    DTYPE: tl.constexpr,
    SIGNED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Stores a moment and returns it as it reads back. ``random``: below 2¹⁹, for 8 bits and bfloat16."""
    if DTYPE == tl.uint8:
        memory = _coded_blocks(row, COLUMN, start)
        codes, origin, back = _encoded(value.to(tl.float32), random, SIGNED)
        is_block = tl.max(mask.to(tl.int32), axis=1) > 0
        tl.store(memory.to(tl.pointer_type(tl.int32)), origin, mask=is_block)
        tl.store(_codes(memory), codes.to(tl.uint8), mask=mask)
        back = back.to(COMPUTE)
    else:
        if DTYPE == tl.bfloat16:
            stored = _rounded_randomly(value.to(tl.float32), random)
        else:
            stored = rounded_to(value, DTYPE)
        tl.store(memory_of(row, COLUMN, start, DTYPE, ALIGNED) + offsets, stored, mask=mask)
        back = widened(stored, DTYPE, COMPUTE)
    return back


@triton.jit
def _rounded_randomly(value, random):
    """`PlainFormat.encode_randomly` of bfloat16."""
    bits = ((value.to(tl.uint32, bitcast=True) + (random >> 3)) >> 16).to(tl.uint16)
    return tl.where(value - value == 0, bits, rounded_to(value, tl.bfloat16))


@triton.jit
def _encoded(value, random, SIGNED: tl.constexpr):
    """(codes [2 TILE, HALF] int32, origins' bits [2 TILE], the values that they are), of `BlockFormat`."""
    if SIGNED:
        LARGEST_E: tl.constexpr = 7
    else:
        LARGEST_E: tl.constexpr = 15
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & NO_SIGN
    top = _largest_of_block(magnitude)
    exponent = tl.maximum(((top + ROUNDED_UP) >> 23) - LARGEST_E, LOWEST)
    origin = tl.where(top < INFINITY, exponent << 23, NAN)

    scale = origin[:, None]
    least = scale.to(tl.float32, bitcast=True) * 2
    number = magnitude.to(tl.float32, bitcast=True)
    below = number < least
    raised = tl.where(below, least, 0.0)
    shifted = (number + raised).to(tl.int32, bitcast=True) + random.to(tl.int32, bitcast=True)
    codes = (shifted >> SHIFT) - (scale >> SHIFT) - tl.where(below, FRACTIONS, 0)
    if not SIGNED:
        codes = tl.maximum(codes, (number > 0).to(tl.int32))
    codes = tl.where((top < INFINITY)[:, None], codes, 0)

    at_e = ((codes << SHIFT) + scale).to(tl.float32, bitcast=True)
    back = at_e - tl.where(least - at_e > 0, least - at_e, 0)
    if SIGNED:
        is_negative = (bits < 0) & (codes > 0)
        back = tl.where(is_negative, -back, back)
        codes = tl.where(is_negative, codes | 0x80, codes)
    return codes, origin, back


@triton.jit
def _largest_of_block(x):
    """[2 TILE, HALF] → [2 TILE]: the largest of each row's block, which has two rows."""
    largest = tl.max(tl.reshape(tl.max(x, axis=1), (2, TILE)), axis=0)
    return tl.reshape(tl.broadcast_to(largest[None, :], (2, TILE)), (2 * TILE,))
