"""Divides scattered pieces of memory into chunks that are computed together. Integers only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sharded_lamb.core.layout import BLOCK


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Elements [start, start + length) of a piece; ``start`` is a multiple of BLOCK."""

    piece: int
    start: int
    length: int

    @property
    def blocks(self) -> int:
        return -(-self.length // BLOCK)

    @property
    def padding(self) -> int:
        """Elements missing from its last block."""
        return self.blocks * BLOCK - self.length


Chunk = tuple[BlockRun, ...]
"""One run of whole blocks, used in place; or several, whose blocks are copied into contiguous memory."""


@lru_cache(maxsize=64)
def pack(lengths: tuple[int, ...], chunk_blocks: int) -> tuple[Chunk, ...]:
    """Chunks of at most ``chunk_blocks`` blocks that cover pieces of ``lengths`` elements.

    A long run of whole blocks is one chunk. The rest (ends of pieces, small pieces) is packed, so that ten thousand
    small tensors make a few hundred chunks. A block never holds elements of two pieces.
    """
    alone: list[Chunk] = []
    rest: list[BlockRun] = []
    for piece, length in enumerate(lengths):
        for run in _runs(piece, length, chunk_blocks):
            if run.padding == 0 and run.blocks * 4 >= chunk_blocks:
                alone.append((run,))
            else:
                rest.append(run)
    return (*alone, *_packed(rest, chunk_blocks))


def _runs(piece: int, length: int, chunk_blocks: int) -> Iterator[BlockRun]:
    """Full chunks, then the remaining whole blocks, then the short block."""
    start = 0
    while start < length:
        left = length - start
        size = min(left - left % BLOCK, chunk_blocks * BLOCK) or left
        yield BlockRun(piece, start, size)
        start += size


def _packed(runs: Sequence[BlockRun], chunk_blocks: int) -> Iterator[Chunk]:
    filling: list[BlockRun] = []
    blocks = 0
    for run in runs:
        if filling and blocks + run.blocks > chunk_blocks:
            yield tuple(filling)
            filling, blocks = [], 0
        filling.append(run)
        blocks += run.blocks
    if filling:
        yield tuple(filling)
