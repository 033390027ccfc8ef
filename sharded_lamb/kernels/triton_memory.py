# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-redef"
# ruff: noqa: SIM300 (ruff takes capitals for constants, to be on the right of a comparison)
"""A program's tile in memory, in Triton: where it lies, its dtypes, and masters beside the model's weights.

See `triton_device`, whose launches call these. Importing this module imports Triton. Arguments have no types because
Triton interprets annotations.
"""

import triton
import triton.language as tl

from sharded_lamb.core import layout
from sharded_lamb.kernels.triton_runs import ALIGNMENT, ROW

BLOCK = tl.constexpr(layout.BLOCK)
TILE = tl.constexpr(8)
HALF = tl.constexpr(layout.BLOCK // 2)
VECTOR = tl.constexpr(ALIGNMENT)

ROW_LENGTH = tl.constexpr(len(ROW))
WEIGHT_AT = tl.constexpr(ROW.index("weight"))
MODEL_AT = tl.constexpr(ROW.index("model"))
GRAD_AT = tl.constexpr(ROW.index("grad"))
EXP_AVG_AT = tl.constexpr(ROW.index("exp_avg"))
EXP_AVG_SQ_AT = tl.constexpr(ROW.index("exp_avg_sq"))
NUMEL_AT = tl.constexpr(ROW.index("numel"))
FIRST_TILE_AT = tl.constexpr(ROW.index("first_tile"))
FIRST_BLOCK_AT = tl.constexpr(ROW.index("first_block"))


# -- a program's tile ----------------------------------------------------------------------------------


@triton.jit
def tile_of_program(runs, tile_run, ALIGNED: tl.constexpr):
    """(row of the run, the tile's first element in it, the tile's first block in the call, remaining elements)."""
    tile = tl.program_id(0)
    row = runs + tl.load(tile_run + tile) * ROW_LENGTH
    first = (tile - tl.load(row + FIRST_TILE_AT)) * TILE
    start = first * BLOCK
    left = tl.minimum(tl.load(row + NUMEL_AT) - start, TILE * BLOCK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, VECTOR)
    return row, start, tl.load(row + FIRST_BLOCK_AT) + first, left


@triton.jit
def tile_offsets(left):
    """(offsets of a tile's elements [2 TILE, HALF], their mask, the mask of its blocks [TILE])."""
    rows = tl.arange(0, 2 * TILE)
    first = (rows % TILE) * BLOCK + (rows // TILE) * HALF
    offsets = first[:, None] + tl.arange(0, HALF)[None, :]
    return offsets, offsets < left, tl.arange(0, TILE) * BLOCK < left


@triton.jit
def params_of_rows(block_param, block, left):
    """[2 TILE]: the parameter of each row."""
    blocks = tl.arange(0, 2 * TILE) % TILE
    return tl.load(block_param + block + blocks, mask=blocks * BLOCK < left, other=0)


@triton.jit
def memory_of(row, COLUMN: tl.constexpr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a tile's first element. bfloat16 is loaded and stored as bits: see `rounded_to`."""
    address = tl.load(row + COLUMN)
    if DTYPE == tl.bfloat16:
        memory = address.to(tl.pointer_type(tl.uint16)) + start
    else:
        memory = address.to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        memory = tl.multiple_of(memory, VECTOR)
    return memory


@triton.jit
def widened(stored, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """Memory of DTYPE in the compute dtype; exact, except float64 computed in float32."""
    if DTYPE == tl.bfloat16:
        value = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = stored
    return value.to(COMPUTE)


@triton.jit
def rounded_to(value, DTYPE: tl.constexpr):
    """``value`` rounded to DTYPE, to nearest even; 16-bit dtypes through float32, as torch does.

    bfloat16 with integers: Triton's interpreter truncates.
    """
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where(value != value, 0x7FC0, nearest).to(tl.uint16)  # a nan's bits would overflow
    elif DTYPE == tl.float16:
        stored = value.to(tl.float32).to(tl.float16)
    else:
        stored = value.to(DTYPE)
    return stored


@triton.jit
def _joined(model, remainder, WEIGHT: tl.constexpr):
    """`remainders.joined`; ``model``: bfloat16 as bits."""
    magnitude = (model & 0x7FFF).to(tl.int32)
    lower = remainder.to(tl.int32)
    if WEIGHT == tl.int8:
        lower = lower << 8
    lower = tl.maximum(lower, tl.where(magnitude == 0, 0, (magnitude & 1) - 0x8000))
    lower = tl.where(magnitude == 0x7F80, tl.minimum(lower, 0), lower)
    return ((model.to(tl.uint32) << 16) + lower.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _remainder(master, model, WEIGHT: tl.constexpr):
    """`remainders.split`: the master minus ``model``, the rounded master, both as bits."""
    lower = (master.to(tl.uint32, bitcast=True) - (model.to(tl.uint32) << 16)).to(tl.int32, bitcast=True)
    lower = tl.where(master != master, 0, tl.minimum(lower, 0x7FFF))
    if WEIGHT == tl.int8:
        lower = tl.minimum((lower + 0x7F + ((lower >> 8) & 1)) >> 8, 0x7F)
    return lower.to(WEIGHT)


# -- masters --------------------------------------------------------------------------------------------


@triton.jit
def _resync_masters(
    memory,
    stored,
    model,
    offsets,
    mask,
    WEIGHT: tl.constexpr,
    MODEL: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The masters; those that no longer round to the model's weight are replaced by it, also in memory."""
    if MODEL == tl.float64:
        WIDE: tl.constexpr = tl.float64
    else:
        WIDE: tl.constexpr = COMPUTE
    written = widened(tl.load(model + offsets, mask=mask, other=0), MODEL, WIDE)
    agrees = widened(rounded_to(widened(stored, WEIGHT, WIDE), MODEL), MODEL, WIDE) == written
    resynced = rounded_to(written, WEIGHT)
    tl.store(memory + offsets, resynced, mask=mask & (agrees == 0))
    return tl.where(agrees, stored, resynced)


@triton.jit
def load_masters(
    stored,
    row,
    start,
    offsets,
    mask,
    WEIGHT: tl.constexpr,
    MODEL: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Masters in the compute dtype; ``stored``: loaded from the memory of weights."""
    if WEIGHT == tl.int16 or WEIGHT == tl.int8:
        model = memory_of(row, MODEL_AT, start, MODEL, ALIGNED)
        w = _joined(tl.load(model + offsets, mask=mask, other=0), stored, WEIGHT)
    else:
        w = widened(stored, WEIGHT, COMPUTE)
    return w


@triton.jit
def load_resynced(
    memory,
    stored,
    row,
    start,
    offsets,
    mask,
    WEIGHT: tl.constexpr,
    MODEL: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`load_masters` after `_resync_masters`, where a format needs it."""
    if WEIGHT == tl.int16 or WEIGHT == tl.int8:
        w = load_masters(stored, row, start, offsets, mask, WEIGHT, MODEL, COMPUTE, ALIGNED)
    elif MODEL is not None:
        model = memory_of(row, MODEL_AT, start, MODEL, ALIGNED)
        w = widened(
            _resync_masters(memory, stored, model, offsets, mask, WEIGHT, MODEL, COMPUTE), WEIGHT, COMPUTE
        )
    else:
        w = widened(stored, WEIGHT, COMPUTE)
    return w


@triton.jit
def store_masters(
    memory,
    w,
    row,
    start,
    offsets,
    mask,
    WEIGHT: tl.constexpr,
    MODEL: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Stores masters, and the model's weights if masters are separate."""
    if MODEL is not None:
        model = memory_of(row, MODEL_AT, start, MODEL, ALIGNED)
        rounded = rounded_to(w, MODEL)
        tl.store(model + offsets, rounded, mask=mask)
    if WEIGHT == tl.int16 or WEIGHT == tl.int8:
        tl.store(memory + offsets, _remainder(w, rounded, WEIGHT), mask=mask)
    else:
        tl.store(memory + offsets, rounded_to(w, WEIGHT), mask=mask)
