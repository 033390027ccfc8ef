"""The two passes with stock torch operations, chunk by chunk: the reference that other backends must match.

Sums of squares have a fixed order: within a block of `BLOCK` elements by halving (first half plus second half, eight
times) in the compute dtype, over blocks in fp64. Every step is one IEEE addition, so the bits of a block's sum depend
only on its 256 values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from sharded_lamb.core import rule
from sharded_lamb.core.host_values import to_device
from sharded_lamb.core.layout import BLOCK
from sharded_lamb.core.rule import COLUMNS, MOMENTS, Coefficients, PerTensor
from sharded_lamb.kernels import formats, packing
from sharded_lamb.kernels.block_codes import random_bits, random_halves
from sharded_lamb.kernels.incoming import StockIncoming
from sharded_lamb.kernels.shard import FlatShard, ScatteredShard, Shard
from sharded_lamb.kernels.state_format import StateFormat

CHUNK_BLOCKS = 256
"""64 K elements: a chunk's dozen temporaries stay in a CPU's cache. For a GPU, see `_chunk_blocks`."""

KINDS = ("weight", "grad", "exp_avg", "exp_avg_sq")
"""Fields that both forms of shard have."""


def block_square_sums(x: Tensor) -> Tensor:
    """[blocks, BLOCK] → [blocks], Σx² by halving."""
    return block_sums(x * x)


def block_sums(total: Tensor) -> Tensor:
    """[blocks, BLOCK] → [blocks], sums by halving."""
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def add_by_parameter(sums: Tensor, block_param: Tensor, block_sums: Tensor) -> None:
    """sums[block_param[i]] += block_sums[i], in fp64."""
    sums.index_add_(0, block_param, block_sums.to(torch.float64))


def resync_master(weight: Tensor, written: Tensor) -> Tensor:
    """The master; where it no longer rounds to the model's weight, which the user therefore wrote, that weight."""
    return torch.where(weight.to(written.dtype) == written, weight, written.to(weight.dtype))


def _chunk_blocks(device: torch.device, blocks: int) -> int:
    # On a GPU, memory for temporaries bounds a chunk, not cache: 4 M elements, few launches.
    return CHUNK_BLOCKS if device.type == "cpu" else min(blocks, 1 << 14)


class _Chunk:
    """Blocks of a shard as [blocks, BLOCK] tensors of the compute dtype. ``kind`` names a field of the shard."""

    def __init__(self, table: Tensor, block_param: Tensor) -> None:
        self.table, self.block_param = table, block_param

    @cached_property
    def k(self) -> PerTensor:
        rows = self.table[self.block_param]
        return Coefficients(*([rows[:, column : column + 1]] for column in range(len(COLUMNS))))

    masters: StateFormat
    has_model = False
    """Whether masters are separate from the model's weights."""

    def stored(self, kind: str) -> Tensor:
        """[blocks, BLOCK] in the storage dtype: a view if the memory is whole blocks, else a copy."""
        raise NotImplementedError

    def write(self, kind: str, value: Tensor) -> None:
        """Copy ``value`` to the memory of ``kind``."""
        raise NotImplementedError

    def load_gradients(self) -> Tensor:
        """Gradients in the compute dtype."""
        return self.stored("grad").to(self.table.dtype)

    def load_moment(self, kind: str) -> Tensor:
        """A moment in the compute dtype; a copy, unless it is stored as such."""
        stored = self.stored(kind)
        return formats.of_moment(kind, stored.dtype).decode(stored, None).to(self.table.dtype)

    def store_moments(self, moments: Sequence[Tensor]) -> list[Tensor]:
        """Store the first moment, or both, and return them as they read back, rounded to the storage dtype."""
        read_back: list[Tensor] = []
        halves: tuple[Tensor, ...] = ()
        for index, value in enumerate(moments):
            kind = MOMENTS[index]
            stored = self.stored(kind)
            form = formats.of_moment(kind, stored.dtype)
            if form.rounds_randomly:
                halves = halves or random_halves(random_bits(moments[0], self.k.salt[0]))
                self.write(kind, form.encode_randomly(value, halves[index]))
            else:
                self.write(kind, form.encode(value)[0])
            read_back.append(value if stored.dtype == value.dtype else self.load_moment(kind))
        return read_back

    def resync_masters(self) -> None:
        """Replace masters of weights that the user wrote; a format beside the weight needs no resync."""
        if self.has_model and not self.masters.beside_weight:
            masters = self.masters.decode(self.stored("weight"), None)
            stored, _ = self.masters.encode(resync_master(masters, self.stored("model")))
            self.write("weight", stored)

    def load_masters(self) -> Tensor:
        """Masters in the compute dtype."""
        weight = self.stored("model") if self.masters.beside_weight else None
        return self.masters.decode(self.stored("weight"), weight).to(self.table.dtype)

    def store_masters(self, values: Tensor) -> None:
        """Store masters, and the model's weights if masters are separate."""
        stored, weight = self.masters.encode(values)
        self.write("weight", stored)
        if self.has_model:
            self.write("model", values if weight is None else weight)


class _FlatChunk(_Chunk):
    """Blocks from ``low`` on of one contiguous range of memory."""

    def __init__(self, flat: dict[str, Tensor | None], table: Tensor, block_param: Tensor, low: int) -> None:
        super().__init__(table, block_param)
        self.flat, self.blocks = flat, slice(low, low + len(block_param))
        self.has_model = flat["model"] is not None
        self.masters = formats.of_memory(self.stored("weight").dtype)

    def stored(self, kind: str) -> Tensor:
        flat = self.flat[kind]
        assert flat is not None
        by_block = flat if flat.dim() == 2 else flat[: len(flat) // BLOCK * BLOCK].view(-1, BLOCK)
        return by_block[self.blocks]

    def write(self, kind: str, value: Tensor) -> None:
        stored = self.stored(kind)
        if stored.data_ptr() != value.data_ptr():
            stored.copy_(value)


class _PackedChunk(_Chunk):
    """Runs of several pieces, copied into contiguous blocks; short blocks are padded with 0."""

    def __init__(
        self, shard: ScatteredShard, runs: packing.Chunk, table: Tensor, block_param: Tensor
    ) -> None:
        super().__init__(table, block_param)
        self.shard, self.runs, self.has_model = shard, runs, shard.model is not None
        self.masters = shard.master_format
        self.sizes = [size for run in runs for size in (run.length, run.padding)]

    def _slices(self, kind: str) -> list[Tensor]:
        pieces: Sequence[Tensor] = getattr(self.shard, kind)
        if pieces[0].dim() == 2:  # 8-bit moments
            return [
                pieces[run.piece][run.start // BLOCK : run.start // BLOCK + run.blocks] for run in self.runs
            ]
        return [pieces[run.piece][run.start : run.start + run.length] for run in self.runs]

    def stored(self, kind: str) -> Tensor:
        slices = self._slices(kind)
        if slices[0].dim() == 2:
            return torch.cat(slices)
        zeros = slices[0].new_zeros(BLOCK)
        parts = []
        for memory, run in zip(slices, self.runs, strict=True):
            parts += [memory, zeros[: run.padding]]
        return torch.cat(parts).view(-1, BLOCK)

    def write(self, kind: str, value: Tensor) -> None:
        slices = self._slices(kind)
        if slices[0].dim() == 2:
            torch._foreach_copy_(slices, list(torch.split(value, [run.blocks for run in self.runs])))
        else:
            torch._foreach_copy_(slices, list(torch.split(value.view(-1), self.sizes)[::2]))


@lru_cache(maxsize=1024)
def _owners(params: tuple[int, ...], blocks: tuple[int, ...], device: torch.device) -> Tensor:
    """[sum of blocks] int64: the parameter of each block of packed runs."""
    return torch.tensor(params, device="cpu").repeat_interleave(torch.tensor(blocks, device="cpu")).to(device)


def _chunks(shards: Sequence[Shard], table: Tensor) -> Iterator[_Chunk]:
    for shard in shards:
        yield from _flat_chunks(shard, table) if isinstance(shard, FlatShard) else _piece_chunks(shard, table)


def _flat_chunks(shard: FlatShard, table: Tensor) -> Iterator[_Chunk]:
    flat = {kind: getattr(shard, kind) for kind in (*KINDS, "model")}
    blocks = len(shard.block_param)
    size = _chunk_blocks(shard.device, blocks)
    for low in range(0, blocks, size):
        yield _FlatChunk(flat, table, shard.block_param[low : low + size], low)


def _piece_chunks(shard: ScatteredShard, table: Tensor) -> Iterator[_Chunk]:
    shard = replace(shard, grad=shard.gradients(), grad_starts=None)
    lengths, device = shard.lengths, shard.device
    blocks = sum(-(-length // BLOCK) for length in lengths)
    param_of = to_device(shard.params, None, device)
    for runs in packing.pack(lengths, _chunk_blocks(device, blocks)):
        run = runs[0]
        if len(runs) == 1 and not run.padding:
            columns = {kind: getattr(shard, kind) for kind in (*KINDS, "model")}
            flat = {kind: column and column[run.piece] for kind, column in columns.items()}
            owner = param_of[run.piece].expand(run.blocks)
            yield _FlatChunk(flat, table, owner, run.start // BLOCK)
        else:
            owners = tuple(shard.params[run.piece] for run in runs)
            block_param = _owners(owners, tuple(run.blocks for run in runs), device)
            yield _PackedChunk(shard, runs, table, block_param)


class ReferenceKernel(StockIncoming):
    """The pure backend: stock torch on any device; temporaries have the length of a chunk."""

    name = "torch"

    def square_sums(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """Adds Σg² per parameter to ``sums`` [P] fp64."""
        no_coefficients = sums.new_zeros(len(sums), len(COLUMNS), dtype=shards[0].compute)
        for chunk in _chunks(shards, no_coefficients):
            add_by_parameter(sums, chunk.block_param, block_square_sums(chunk.load_gradients()))

    def moments_and_norms(self, shards: Sequence[Shard], table: Tensor, sums: Tensor) -> None:
        """m, v ← g; adds Σw², Σu² and, with a third row, Σu₂² per parameter to ``sums`` [1 + D, P] fp64.

        With a fourth row: `rule.CAUTION_SUMS`.
        """
        for chunk in _chunks(shards, table):
            chunk.resync_masters()
            w, m, v = chunk.load_masters(), chunk.load_moment("exp_avg"), chunk.load_moment("exp_avg_sq")
            scaled = _scaled_gradients(chunk, w)
            rule.flush_subnormals([m, v], chunk.k.salt[0])
            rule.update_moments([m], [v], scaled, chunk.k)
            m, v = chunk.store_moments([m, v])
            if len(sums) == len(rule.CAUTION_SUMS):
                u, mask = _cautious_direction(chunk, w, m, v)
                terms = [w * w, u * u, u * w, mask]
            else:
                terms = [x * x for x in (w, *_directions(chunk, w, m, v, len(sums) - 1))]
            for total, values in zip(sums, terms, strict=True):
                add_by_parameter(total, chunk.block_param, block_sums(values))

    def weight_norms(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """Adds Σw² per parameter to ``sums`` [P] fp64."""
        no_coefficients = sums.new_zeros(len(sums), len(COLUMNS), dtype=shards[0].compute)
        for chunk in _chunks(shards, no_coefficients):
            chunk.resync_masters()
            add_by_parameter(sums, chunk.block_param, block_square_sums(chunk.load_masters()))

    def apply_momentum(self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor) -> None:
        """m ← β1 m + c1 d; w ← w - step_sizes[0] m - step_sizes[1] d."""
        for chunk in _chunks(shards, table):
            w, m = chunk.load_masters(), chunk.load_moment("exp_avg")
            scaled = rule.scaled_gradients([_gradients(chunk)], [w], chunk.k)
            rule.flush_subnormals([m], chunk.k.salt[0])
            rule.update_momentum([m], scaled, chunk.k)
            (m,) = chunk.store_moments([m])
            for direction, sizes in zip(([m], scaled), step_sizes, strict=True):
                rule.descend([w], direction, [sizes[chunk.block_param].unsqueeze(1)])
            chunk.store_masters(w)

    def apply(
        self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor, *, caution: bool = False
    ) -> None:
        """w ← w - step_size u, one direction after the other; u recomputed from m and v, and from g where it counts."""
        for chunk in _chunks(shards, table):
            w, m, v = chunk.load_masters(), chunk.load_moment("exp_avg"), chunk.load_moment("exp_avg_sq")
            if caution:
                updates = [_cautious_direction(chunk, w, m, v)[0]]
            else:
                updates = _directions(chunk, w, m, v, len(step_sizes))
            for u, sizes in zip(updates, step_sizes, strict=True):
                rule.descend([w], [u], [sizes[chunk.block_param].unsqueeze(1)])
            chunk.store_masters(w)


def _gradients(chunk: _Chunk) -> Tensor:
    return torch.where(chunk.k.grad_scale[0] == 0, 0, chunk.load_gradients())  # 0 x nan would be nan


def _scaled_gradients(chunk: _Chunk, w: Tensor) -> list[Tensor]:
    return rule.scaled_gradients([_gradients(chunk)], [w], chunk.k)


def _cautious_direction(chunk: _Chunk, w: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """u and μ of `rule`."""
    denominator = rule.denominators([v], chunk.k)
    (u,), (mask,) = rule.cautious_direction([m], _scaled_gradients(chunk, w), denominator, [w], chunk.k)
    return u, mask


def _directions(chunk: _Chunk, w: Tensor, m: Tensor, v: Tensor, count: int) -> list[Tensor]:
    """The first ``count`` directions of `rule`: u, u₂."""
    denominator = rule.denominators([v], chunk.k)
    updates = rule.direction([m], denominator, [w], chunk.k)
    if count == 2:
        updates += rule.gradient_direction(_scaled_gradients(chunk, w), denominator, [w], chunk.k)
    return updates
