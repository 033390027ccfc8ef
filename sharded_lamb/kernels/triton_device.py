# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-redef"
# ruff: noqa: SIM300 (ruff takes capitals for constants, to be on the right of a comparison)
"""Device code: `sharded_lamb.core.rule` for tiles of blocks, in Triton. Importing this module imports Triton.

A program computes TILE blocks of one run as a [2 TILE, HALF] tensor of the compute dtype: the first halves of the
blocks, then the second ones. A row is one warp's, so that sums over a block need no memory between warps. On an H100
(`bench/results/gpu-tiles.json`) fp32's pass 1 moves as many bytes a second as 99 % of a copy; as [TILE, BLOCK] 38 %, as
[2, TILE, HALF], which has fewer registers and loads, 80 %: measure a change. Every arithmetic step is one
correctly rounded IEEE operation, as in the rule: ``div_rn``, ``sqrt_rn``, and no fused multiply-add
(``enable_fp_fusion=False``). A run-table column (`triton_runs.ROW`) and a dtype identify memory; int16 weights are
`remainders`.

Arguments have no types because Triton interprets annotations.
"""

import triton
import triton.language as tl

from sharded_lamb.core import layout
from sharded_lamb.core.rule import COLUMNS, FLUSH_STEPS
from sharded_lamb.kernels.triton_codes import load_moment, random_bits, store_moment
from sharded_lamb.kernels.triton_memory import (
    BLOCK,
    EXP_AVG_AT,
    EXP_AVG_SQ_AT,
    GRAD_AT,
    HALF,
    TILE,
    WEIGHT_AT,
    load_masters,
    load_resynced,
    memory_of,
    params_of_rows,
    store_masters,
    tile_of_program,
    tile_offsets,
    widened,
)

HALVINGS = tl.constexpr(layout.BLOCK.bit_length() - 2)
HALVES = tl.constexpr((8, *([2] * (layout.BLOCK.bit_length() - 2))))
LANES = tl.constexpr(256)
LANE_HALVINGS = tl.constexpr(8)
LANE_HALVES = tl.constexpr((2,) * 8)
DEPTH, UNROLL = tl.constexpr(32), tl.constexpr(16)

TABLE_COLUMNS = tl.constexpr(len(COLUMNS))
GRAD_SCALE = tl.constexpr(COLUMNS.index("grad_scale"))
L2 = tl.constexpr(COLUMNS.index("l2"))
BETA1 = tl.constexpr(COLUMNS.index("beta1"))
C1 = tl.constexpr(COLUMNS.index("c1"))
BETA2 = tl.constexpr(COLUMNS.index("beta2"))
C2 = tl.constexpr(COLUMNS.index("c2"))
UNBIAS1 = tl.constexpr(COLUMNS.index("unbias1"))
UNBIAS2 = tl.constexpr(COLUMNS.index("unbias2"))
EPS_INSIDE = tl.constexpr(COLUMNS.index("eps_inside"))
EPS_OUTSIDE = tl.constexpr(COLUMNS.index("eps_outside"))
DECAY = tl.constexpr(COLUMNS.index("decay"))
OPPOSED = tl.constexpr(COLUMNS.index("opposed"))
SALT = tl.constexpr(COLUMNS.index("salt"))
FLUSH_EVERY = tl.constexpr(FLUSH_STEPS)


@triton.jit
def _coefficient(table, params, COLUMN: tl.constexpr):
    """[2 TILE, 1]: each row's coefficient."""
    return tl.load(table + params * TABLE_COLUMNS + COLUMN)[:, None]


# -- the rule ------------------------------------------------------------------------------------------


@triton.jit
def _divided(x, y, COMPUTE: tl.constexpr):
    if COMPUTE == tl.float32:
        quotient = tl.math.div_rn(x, y)
    else:
        quotient = x / y
    return quotient


@triton.jit
def _root(x, COMPUTE: tl.constexpr):
    if COMPUTE == tl.float32:
        root = tl.math.sqrt_rn(x)
    else:
        root = tl.math.sqrt(x)
    return root


@triton.jit
def _flushed(moment, table, params, COMPUTE: tl.constexpr):
    """`sharded_lamb.core.rule.flush_subnormals`."""
    smallest = tl.full((1, 1), 2.0**-126 if COMPUTE == tl.float32 else 2.0**-1022, COMPUTE)
    is_due = _coefficient(table, params, SALT).to(tl.int64) % FLUSH_EVERY == 0
    return tl.where((tl.abs(moment) < smallest) & is_due, tl.zeros_like(moment), moment)


@triton.jit
def _denominator(v, table, params, COMPUTE: tl.constexpr):
    """`sharded_lamb.core.rule.denominators`."""
    inside = v * _coefficient(table, params, UNBIAS2) + _coefficient(table, params, EPS_INSIDE)
    return _root(inside, COMPUTE) + _coefficient(table, params, EPS_OUTSIDE)


@triton.jit
def _direction(m, denominator, w, table, params, COMPUTE: tl.constexpr):
    """`sharded_lamb.core.rule.direction`."""
    step = _divided(m * _coefficient(table, params, UNBIAS1), denominator, COMPUTE)
    return step + w * _coefficient(table, params, DECAY)


@triton.jit
def _cautious_direction(m, g, denominator, w, table, params, COMPUTE: tl.constexpr):
    """`sharded_lamb.core.rule.cautious_direction`; ``g``: scaled."""
    step = _divided(m * _coefficient(table, params, UNBIAS1), denominator, COMPUTE)
    mask = tl.where(step * g > 0, tl.full((1, 1), 1, COMPUTE), _coefficient(table, params, OPPOSED))
    return step * mask + w * _coefficient(table, params, DECAY), mask


@triton.jit
def _gradient_direction(g, denominator, w, table, params, COMPUTE: tl.constexpr):
    """`sharded_lamb.core.rule.gradient_direction`."""
    return _divided(g, denominator, COMPUTE) + w * _coefficient(table, params, DECAY)


@triton.jit
def _scaled_gradient(g, w, table, params):
    """`sharded_lamb.core.rule.scaled_gradients`."""
    scale = _coefficient(table, params, GRAD_SCALE)
    g = tl.where(scale == 0, tl.zeros_like(g), g)  # 0 x nan would be nan
    return g * scale + w * _coefficient(table, params, L2)


@triton.jit
def _random(m, table, params):
    """`block_codes.random_halves`; not computed where no moment is rounded with them."""
    random = random_bits(m.to(tl.float32), _coefficient(table, params, SALT))
    return random & 0x7FFFF, random >> 13


@triton.jit
def _sums(x):
    """[2 TILE, HALF] → [TILE], Σx by halving: each sum is of two, so that its order is no compiler's choice."""
    total = tl.sum(tl.reshape(x, (2, TILE, HALF)), axis=0)
    total = tl.reshape(total, HALVES)
    for _ in tl.static_range(HALVINGS):
        total = tl.sum(total, axis=1)
    return total


# -- the launches --------------------------------------------------------------------------------------


@triton.jit
def square_sums(
    runs, tile_run, block_slot, sums, GRAD: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Writes Σg² of each block to its slot of ``sums``."""
    row, start, block, left = tile_of_program(runs, tile_run, ALIGNED)
    offsets, mask, blocks = tile_offsets(left)
    grad = tl.load(memory_of(row, GRAD_AT, start, GRAD, ALIGNED) + offsets, mask=mask, other=0)
    grad = widened(grad, GRAD, COMPUTE)
    slots = tl.load(block_slot + block + tl.arange(0, TILE), mask=blocks, other=0)
    tl.store(sums + slots, _sums(grad * grad), mask=blocks)


@triton.jit(do_not_specialize=["count", "numel", "divisor"])
def average(
    runs,
    tile_run,
    parts,
    block_slot,
    sums,
    count,
    numel,
    divisor,
    WIRE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ADD: tl.constexpr,
):
    """grad ← Σ parts / divisor (+ grad); writes Σg² of each block to its slot of ``sums``.

    ``parts``: [count, numel], bfloat16 as int16; ``numel``: of the shard, whole blocks. ``grad``: compute dtype.
    """
    row, start, block, left = tile_of_program(runs, tile_run, ALIGNED)
    offsets, mask, blocks = tile_offsets(left)
    total = widened(tl.load(parts + start + offsets, mask=mask, other=0), WIRE, COMPUTE)
    for i in range(1, count):
        part = parts + start + tl.multiple_of(i * numel.to(tl.int64), BLOCK)
        total += widened(tl.load(part + offsets, mask=mask, other=0), WIRE, COMPUTE)
    total = _divided(total, tl.full((1, 1), 0, COMPUTE) + divisor.to(COMPUTE), COMPUTE)
    grad = memory_of(row, GRAD_AT, start, COMPUTE, ALIGNED)
    if ADD:
        total = tl.load(grad + offsets, mask=mask, other=0) + total
    tl.store(grad + offsets, total, mask=mask)
    slots = tl.load(block_slot + block + tl.arange(0, TILE), mask=blocks, other=0)
    tl.store(sums + slots, _sums(total * total), mask=blocks)


@triton.jit
def weight_norms(
    runs,
    tile_run,
    block_slot,
    sums,
    WEIGHT: tl.constexpr,
    MODEL: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """LARS's pass 1: writes Σw² of each block to its slot of ``sums``."""
    row, start, block, left = tile_of_program(runs, tile_run, ALIGNED)
    offsets, mask, blocks = tile_offsets(left)
    weight = memory_of(row, WEIGHT_AT, start, WEIGHT, ALIGNED)
    stored = tl.load(weight + offsets, mask=mask, other=0)
    w = load_resynced(weight, stored, row, start, offsets, mask, WEIGHT, MODEL, COMPUTE, ALIGNED)
    slots = tl.load(block_slot + block + tl.arange(0, TILE), mask=blocks, other=0)
    tl.store(sums + slots, _sums(w * w), mask=blocks)


@triton.jit
def apply_momentum(
    runs,
    tile_run,
    block_param,
    table,
    step_sizes,
    gradient_step_sizes,
    WEIGHT: tl.constexpr,
    MODEL: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """LARS's pass 2: m ← β1 m + c1 d; w ← w - step_size m - gradient_step_size d; writes the model's copy of w."""
    row, start, block, left = tile_of_program(runs, tile_run, ALIGNED)
    offsets, mask, _ = tile_offsets(left)
    params = params_of_rows(block_param, block, left)

    weight = memory_of(row, WEIGHT_AT, start, WEIGHT, ALIGNED)
    grad = memory_of(row, GRAD_AT, start, GRAD, ALIGNED)
    stored = tl.load(weight + offsets, mask=mask, other=0)
    g = widened(tl.load(grad + offsets, mask=mask, other=0), GRAD, COMPUTE)
    m = load_moment(row, EXP_AVG_AT, start, offsets, mask, EXP_AVG, True, COMPUTE, ALIGNED)
    w = load_masters(stored, row, start, offsets, mask, WEIGHT, MODEL, COMPUTE, ALIGNED)

    g = _scaled_gradient(g, w, table, params)
    m = _flushed(m, table, params, COMPUTE)
    m = m * _coefficient(table, params, BETA1) + g * _coefficient(table, params, C1)
    random, _ = _random(m, table, params)
    m = store_moment(m, random, row, EXP_AVG_AT, start, offsets, mask, EXP_AVG, True, COMPUTE, ALIGNED)
    w = w - m * tl.load(step_sizes + params)[:, None]
    w = w - g * tl.load(gradient_step_sizes + params)[:, None]
    store_masters(weight, w, row, start, offsets, mask, WEIGHT, MODEL, ALIGNED)


@triton.jit
def moments_and_norms(
    runs,
    tile_run,
    block_param,
    block_slot,
    table,
    weight_sums,
    update_sums,
    third_sums,
    mask_sums,
    WEIGHT: tl.constexpr,
    MODEL: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NESTEROV: tl.constexpr,
    CAUTION: tl.constexpr,
):
    """Pass 1: m, v ← g; writes Σw² and Σu², with NESTEROV of both directions, of each block to its slot of the sums.

    With CAUTION: `sharded_lamb.core.rule.CAUTION_SUMS`.
    """
    row, start, block, left = tile_of_program(runs, tile_run, ALIGNED)
    offsets, mask, blocks = tile_offsets(left)
    params = params_of_rows(block_param, block, left)

    weight = memory_of(row, WEIGHT_AT, start, WEIGHT, ALIGNED)
    grad = memory_of(row, GRAD_AT, start, GRAD, ALIGNED)
    stored = tl.load(weight + offsets, mask=mask, other=0)
    g = widened(tl.load(grad + offsets, mask=mask, other=0), GRAD, COMPUTE)
    m = load_moment(row, EXP_AVG_AT, start, offsets, mask, EXP_AVG, True, COMPUTE, ALIGNED)
    v = load_moment(row, EXP_AVG_SQ_AT, start, offsets, mask, EXP_AVG_SQ, False, COMPUTE, ALIGNED)
    w = load_resynced(weight, stored, row, start, offsets, mask, WEIGHT, MODEL, COMPUTE, ALIGNED)

    g = _scaled_gradient(g, w, table, params)
    m = _flushed(m, table, params, COMPUTE)
    m = m * _coefficient(table, params, BETA1) + g * _coefficient(table, params, C1)
    v = _flushed(v, table, params, COMPUTE)
    v = v * _coefficient(table, params, BETA2) + g * g * _coefficient(table, params, C2)
    random, random_2 = _random(m, table, params)
    m = store_moment(m, random, row, EXP_AVG_AT, start, offsets, mask, EXP_AVG, True, COMPUTE, ALIGNED)
    v = store_moment(
        v, random_2, row, EXP_AVG_SQ_AT, start, offsets, mask, EXP_AVG_SQ, False, COMPUTE, ALIGNED
    )

    denominator = _denominator(v, table, params, COMPUTE)
    if CAUTION:
        u, agreement = _cautious_direction(m, g, denominator, w, table, params, COMPUTE)
    else:
        u = _direction(m, denominator, w, table, params, COMPUTE)
    slots = tl.load(block_slot + block + tl.arange(0, TILE), mask=blocks, other=0)
    tl.store(weight_sums + slots, _sums(w * w), mask=blocks)
    tl.store(update_sums + slots, _sums(u * u), mask=blocks)
    if NESTEROV:
        u = _gradient_direction(g, denominator, w, table, params, COMPUTE)
        tl.store(third_sums + slots, _sums(u * u), mask=blocks)
    if CAUTION:
        tl.store(third_sums + slots, _sums(u * w), mask=blocks)
        tl.store(mask_sums + slots, _sums(agreement), mask=blocks)


@triton.jit
def apply(
    runs,
    tile_run,
    block_param,
    table,
    step_sizes,
    gradient_step_sizes,
    WEIGHT: tl.constexpr,
    MODEL: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NESTEROV: tl.constexpr,
    CAUTION: tl.constexpr,
):
    """Pass 2: u from m and v, with NESTEROV also u₂ from g; w ← w - step_size u; writes the model's copy of w.

    GRAD: None without NESTEROV and CAUTION, which alone read gradients.
    """
    row, start, block, left = tile_of_program(runs, tile_run, ALIGNED)
    offsets, mask, _ = tile_offsets(left)
    params = params_of_rows(block_param, block, left)

    weight = memory_of(row, WEIGHT_AT, start, WEIGHT, ALIGNED)
    stored = tl.load(weight + offsets, mask=mask, other=0)
    w = load_masters(stored, row, start, offsets, mask, WEIGHT, MODEL, COMPUTE, ALIGNED)
    m = load_moment(row, EXP_AVG_AT, start, offsets, mask, EXP_AVG, True, COMPUTE, ALIGNED)
    v = load_moment(row, EXP_AVG_SQ_AT, start, offsets, mask, EXP_AVG_SQ, False, COMPUTE, ALIGNED)

    denominator = _denominator(v, table, params, COMPUTE)
    if NESTEROV or CAUTION:
        g = tl.load(memory_of(row, GRAD_AT, start, GRAD, ALIGNED) + offsets, mask=mask, other=0)
        g = _scaled_gradient(widened(g, GRAD, COMPUTE), w, table, params)
    if CAUTION:
        u, _ = _cautious_direction(m, g, denominator, w, table, params, COMPUTE)
    else:
        u = _direction(m, denominator, w, table, params, COMPUTE)
    if NESTEROV:
        along = _gradient_direction(g, denominator, w, table, params, COMPUTE)
        w = w - u * tl.load(step_sizes + params)[:, None]
        w = w - along * tl.load(gradient_step_sizes + params)[:, None]
    else:
        w = w - u * tl.load(step_sizes + params)[:, None]
    store_masters(weight, w, row, start, offsets, mask, WEIGHT, MODEL, ALIGNED)


@triton.jit(do_not_specialize=["columns", "slots"])
def add_by_parameter(block_sums, first_slots, sums, columns, slots):
    """Adds each parameter's block sums to ``sums`` [planes, columns] fp64; grid (columns, planes).

    The order does not depend on the grid: a lane adds DEPTH consecutive blocks one by one, with a stride of
    LANES x DEPTH blocks; then lanes are summed by halving. The first lane starts from the value in ``sums``, so that up
    to DEPTH blocks are added one by one in the order of the call. UNROLL blocks are loaded at once.
    """
    param, plane = tl.program_id(0), tl.program_id(1)
    low, high = tl.load(first_slots + param), tl.load(first_slots + param + 1)
    lane = tl.arange(0, LANES)
    target = sums + plane * columns + param
    before = tl.load(target)
    total = tl.where(lane == 0, before, tl.zeros_like(before))
    source = block_sums + plane.to(tl.int64) * slots
    for first in range(low, high, LANES * DEPTH):
        for i in tl.range(0, tl.minimum(high - first, DEPTH), loop_unroll_factor=UNROLL):
            slot = first + lane * DEPTH + i
            total += tl.load(source + slot, mask=slot < high, other=0).to(tl.float64)
    total = tl.reshape(total, LANE_HALVES)
    for _ in tl.static_range(LANE_HALVINGS):
        total = tl.sum(total, axis=0)
    tl.store(target, total)
