"""The two passes in stock torch operations, chunk by chunk: the definition that other backends must match.

Sums of squares have one order: within a block of `BLOCK` elements by halving (first half plus second
half, eight times) in the compute dtype, over blocks in fp64. Every step of it is one IEEE addition, so the
bits of a block's sum depend on its 256 values and nothing else.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sharded_lamb import rule
from sharded_lamb.kernels.shard import FlatShard
from sharded_lamb.layout import BLOCK
from sharded_lamb.rule import COLUMNS, Coefficients, PerTensor

CHUNK_BLOCKS = 256
"""64 K elements: the dozen temporaries of a chunk stay in a CPU's cache. On a GPU, see `_chunk_blocks`."""


def block_square_sums(x: Tensor) -> Tensor:
    """[blocks, BLOCK] → [blocks], Σx² by halving."""
    total = x * x
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def add_by_parameter(sums: Tensor, block_param: Tensor, block_sums: Tensor) -> None:
    """sums[block_param[i]] += block_sums[i], in fp64."""
    sums.index_add_(0, block_param, block_sums.to(torch.float64))


def _chunk_blocks(device: torch.device, blocks: int) -> int:
    # On a GPU a chunk is bounded by memory for temporaries, not by cache: 4 M elements, a few launches.
    return CHUNK_BLOCKS if device.type == "cpu" else min(blocks, 1 << 14)


class _Chunk:
    """Blocks [low, high) of a shard as [blocks, BLOCK] tensors of the compute dtype."""

    def __init__(self, shard: FlatShard, table: Tensor, low: int, high: int) -> None:
        self.shard, self.table, self.span = shard, table, slice(low * BLOCK, high * BLOCK)
        self.block_param = shard.block_param[low:high]
        rows = table[self.block_param]
        self.k: PerTensor = Coefficients(*([rows[:, column : column + 1]] for column in range(len(COLUMNS))))

    def load(self, flat: Tensor) -> Tensor:
        return flat[self.span].view(-1, BLOCK).to(self.table.dtype)

    def store(self, flat: Tensor, value: Tensor) -> Tensor:
        """Writes ``value`` and returns it as it reads back, rounded to the dtype of ``flat``."""
        place = flat[self.span].view(-1, BLOCK)
        if place.data_ptr() != value.data_ptr():  # `load` gives the memory itself where dtypes agree
            place.copy_(value)
        return value if flat.dtype == value.dtype else self.load(flat)

    def adopt_written_weights(self) -> None:
        """Where the model's weight is no longer what the master rounds to, someone wrote it: it wins."""
        model = self.shard.model
        if model is not None:
            weight, written = self.shard.weight[self.span], model[self.span]
            weight.copy_(torch.where(weight.to(written.dtype) == written, weight, written.to(weight.dtype)))


class ReferenceKernel:
    """Stock torch on any device; every temporary is a chunk long."""

    name = "torch"

    def square_sums(self, shard: FlatShard, sums: Tensor) -> None:
        """Σg² per parameter, added to ``sums`` [P] fp64."""
        blocks = len(shard.block_param)
        size = _chunk_blocks(shard.grad.device, blocks)
        for low in range(0, blocks, size):
            grad = shard.grad[low * BLOCK : (low + size) * BLOCK].view(-1, BLOCK)
            add_by_parameter(sums, shard.block_param[low : low + size], block_square_sums(grad))

    def moments_and_norms(self, shard: FlatShard, table: Tensor, sums: Tensor) -> None:
        """m, v ← g, and Σw², Σu² per parameter, added to ``sums`` [2, P] fp64."""
        for chunk in self._chunks(shard, table):
            chunk.adopt_written_weights()
            w, m, v = (chunk.load(x) for x in (shard.weight, shard.exp_avg, shard.exp_avg_sq))
            g = rule.scaled_gradients([chunk.load(shard.grad)], [w], chunk.k)
            rule.update_moments([m], [v], g, chunk.k)
            m, v = chunk.store(shard.exp_avg, m), chunk.store(shard.exp_avg_sq, v)
            (u,) = rule.direction([m], [v], [w], chunk.k)
            add_by_parameter(sums[0], chunk.block_param, block_square_sums(w))
            add_by_parameter(sums[1], chunk.block_param, block_square_sums(u))

    def apply(self, shard: FlatShard, table: Tensor, step_sizes: Tensor) -> None:
        """w ← w - step_size u, u recomputed from m and v."""
        for chunk in self._chunks(shard, table):
            w, m, v = (chunk.load(x) for x in (shard.weight, shard.exp_avg, shard.exp_avg_sq))
            u = rule.direction([m], [v], [w], chunk.k)
            rule.descend([w], u, [step_sizes[chunk.block_param].unsqueeze(1)])
            chunk.store(shard.weight, w)
            if shard.model is not None:
                chunk.store(shard.model, w)

    def _chunks(self, shard: FlatShard, table: Tensor) -> Iterator[_Chunk]:
        blocks = len(shard.block_param)
        size = _chunk_blocks(shard.weight.device, blocks)
        for low in range(0, blocks, size):
            yield _Chunk(shard, table, low, min(low + size, blocks))
