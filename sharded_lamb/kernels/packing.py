"""How pieces of memory that lie anywhere are cut into chunks that are computed at once. Integers only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sharded_lamb.core.layout import BLOCK


@dataclass(frozen=True, slots=True)
class Run:
    """Elements [start, start + length) of a piece; ``start`` is a multiple of BLOCK."""

    piece: int
    start: int
    length: int

    @property
    def blocks(self) -> int:
        return -(-self.length // BLOCK)

    @property
    def padding(self) -> int:
        """Elements that its last block lacks."""
        return self.blocks * BLOCK - self.length


Chunk = tuple[Run, ...]
"""One run of whole blocks, used where it lies; or several, whose blocks are copied side by side."""


@lru_cache(maxsize=64)
def pack(lengths: tuple[int, ...], chunk_blocks: int) -> tuple[Chunk, ...]:
    """Chunks of at most ``chunk_blocks`` blocks that cover pieces of ``lengths`` elements.

    Long runs of whole blocks are chunks of their own. What remains (ends of pieces, small pieces) is packed, so that
    ten thousand small tensors are a few hundred chunks. A block never holds elements of two pieces.
    """
    alone: list[Chunk] = []
    rest: list[Run] = []
    for piece, length in enumerate(lengths):
        for run in _runs(piece, length, chunk_blocks):
            if run.padding == 0 and run.blocks * 4 >= chunk_blocks:
                alone.append((run,))
            else:
                rest.append(run)
    return (*alone, *_side_by_side(rest, chunk_blocks))


def _runs(piece: int, length: int, chunk_blocks: int) -> Iterator[Run]:
    """Full chunks, then the whole blocks that are left, then the short block."""
    start = 0
    while start < length:
        left = length - start
        size = min(left - left % BLOCK, chunk_blocks * BLOCK) or left
        yield Run(piece, start, size)
        start += size


def _side_by_side(runs: Sequence[Run], chunk_blocks: int) -> Iterator[Chunk]:
    filling: list[Run] = []
    blocks = 0
    for run in runs:
        if filling and blocks + run.blocks > chunk_blocks:
            yield tuple(filling)
            filling, blocks = [], 0
        filling.append(run)
        blocks += run.blocks
    if filling:
        yield tuple(filling)
