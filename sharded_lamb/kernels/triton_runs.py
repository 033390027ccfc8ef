"""The table of runs: where the memory of a call's shards lies, as one launch over all of it reads it on the device.

A *run* is memory without gaps: a flat shard, or a piece. Programs take *tiles*, some blocks of one run. Runs that agree
in their dtypes and in whether they are aligned share a launch, whatever shards they come from. Integers and small
tensors; nothing here knows Triton.
"""

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sharded_lamb.core.layout import BLOCK
from sharded_lamb.core.rule import SUMS
from sharded_lamb.kernels.shard import FlatShard, ScatteredShard, Shard

ROW = ("weight", "model", "grad", "exp_avg", "exp_avg_sq", "numel", "first_tile", "first_block")
"""A run's row, int64: addresses (0: no model), elements, its first tile in its launch, its first block in the call."""

ALIGNMENT = 16
"""Bytes of a vector load; and elements, so that one load lies wholly inside or outside of a run."""

KEPT_TABLES, KEPT_PLACES = 64, 4
"""Calls whose tables are kept, and places of their memory: gradients often take turns between a few."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Form:
    """What is compiled into a launch: the dtypes of its runs' memory, and whether all of it is aligned."""

    weight: torch.dtype
    model: torch.dtype | None
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    aligned: bool


class Memory:
    """The runs of one shard that have elements, read off once. ``structure`` and ``where`` are keys: bytes, whose hash
    Python computes once."""

    def __init__(self, shard: Shard) -> None:
        columns = _columns(shard)
        self.block_param = shard.block_param if isinstance(shard, FlatShard) else None
        numels = np.array(list(map(_NUMEL, columns[0])), dtype=np.int64)
        held = numels > 0
        self.numels = numels[held]
        pointers = [np.array(list(map(_POINTER, column)), dtype=np.int64) for column in columns if column]
        if not columns[1]:
            pointers.insert(1, np.zeros_like(numels))
        self.addresses: Integers = (
            np.stack(pointers, axis=1)[held] if len(numels) else np.zeros((0, 5), np.int64)
        )
        params = shard.params if isinstance(shard, ScatteredShard) else (0,)
        self.params = np.array(params, dtype=np.int64)[held]
        odd = np.bitwise_or.reduce(self.addresses, axis=1) | self.numels
        self.aligned = odd % ALIGNMENT == 0
        dtypes = tuple(column[0].dtype if column else None for column in columns)
        self.forms = [_form(dtypes, aligned) for aligned in (False, True)] if len(self.numels) else []
        # A flat shard's owners are told by their tensor, which lives as long as this.
        about = repr((dtypes, len(self.numels), None if self.block_param is None else id(self.block_param)))
        parts = about.encode(), self.numels.tobytes(), self.params.tobytes(), self.aligned.tobytes()
        self.structure, self.where = b"".join(parts), self.addresses.tobytes()


def _form(dtypes: Sequence[torch.dtype | None], aligned: bool) -> Form:
    weight, model, grad, exp_avg, exp_avg_sq = dtypes
    assert weight is not None
    assert grad is not None
    assert exp_avg is not None
    assert exp_avg_sq is not None
    return Form(weight, model, grad, exp_avg, exp_avg_sq, aligned)


_NUMEL: Any = Tensor.numel
_POINTER: Any = Tensor.data_ptr

Column = Sequence[Tensor]


def _columns(shard: Shard) -> tuple[Column, Column, Column, Column, Column]:
    """Weights, models, gradients, moments, moments of squares of a shard's runs; models may be none."""
    if isinstance(shard, ScatteredShard):
        return shard.weight, shard.model or (), shard.grad, shard.exp_avg, shard.exp_avg_sq
    model = () if shard.model is None else (shard.model,)
    return (shard.weight,), model, (shard.grad,), (shard.exp_avg,), (shard.exp_avg_sq,)


@dataclass(frozen=True, slots=True)
class Launch:
    """Runs of one form: rows [low, high) of the table, and which of them each tile belongs to."""

    form: Form
    low: int
    high: int
    tiles: int
    tile_run: Tensor  # [tiles] int32, counted from ``low``


class Table:
    """What the programs of one call read that does not depend on addresses; made without waiting for the device.

    ``tile_blocks``: blocks a tile.
    """

    def __init__(
        self,
        memories: Sequence[Memory],
        params: int,
        compute: torch.dtype,
        device: torch.device,
        tile_blocks: int,
    ) -> None:
        self.params, self.compute, self.device = params, compute, device
        self.owners = [memory.block_param for memory in memories]
        numels = np.concatenate([memory.numels for memory in memories])
        blocks = -(-numels // BLOCK)
        self.blocks = int(blocks.sum())
        first_block = np.cumsum(blocks) - blocks
        forms = list(dict.fromkeys(form for memory in memories for form in memory.forms))
        form_of = np.concatenate([_form_of(memory, forms) for memory in memories])
        self._order = np.argsort(form_of, kind="stable")
        tiles = -(-blocks // tile_blocks)
        first_tile = np.zeros_like(tiles)
        self.launches: list[Launch] = []
        low = 0
        for number, form in enumerate(forms):
            mine = np.flatnonzero(form_of == number)
            if len(mine):
                first_tile[mine] = np.cumsum(tiles[mine]) - tiles[mine]
                tile_run = self._spread(np.arange(len(mine)), tiles[mine])
                self.launches.append(Launch(form, low, low + len(mine), int(tiles[mine].sum()), tile_run))
                low += len(mine)
        self._shapes = np.stack([numels, first_tile, first_block], axis=1)
        self.block_param = self._block_param(memories, blocks)
        self._rows: OrderedDict[tuple[bytes, ...], Tensor] = OrderedDict()

    def _spread(self, values: Integers, counts: Integers) -> Tensor:
        """values[i] counts[i] times, int32."""
        repeats = _on_device(counts, self.device)
        spread = _on_device(values, self.device).repeat_interleave(repeats, output_size=int(counts.sum()))
        return spread.to(torch.int32)

    def _block_param(self, memories: Sequence[Memory], blocks: Integers) -> Tensor:
        """[blocks] int32, the parameter of each block of the call."""
        block_param = self._spread(np.concatenate([memory.params for memory in memories]), blocks)
        first = 0
        for memory in memories:
            count = int((-(-memory.numels // BLOCK)).sum())
            if memory.block_param is not None:
                block_param[first : first + count] = memory.block_param
            first += count
        return block_param

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """([blocks] int32, [params + 1] int32): each block's place where a parameter's blocks lie side by side, in
        the order of the call; and where those of each parameter begin."""
        owners, blocks = torch.sort(self.block_param, stable=True)
        numbers = torch.arange(self.blocks, dtype=torch.int32, device=self.device)
        slot = torch.empty_like(numbers).scatter_(0, blocks, numbers)
        params = torch.arange(self.params + 1, dtype=torch.int32, device=self.device)
        return slot, torch.searchsorted(owners, params, out_int32=True)

    @cached_property
    def block_sums(self) -> Tensor:
        """[SUMS, ≥ blocks] compute dtype: scratch for sums of squares of blocks, in the order of `slots`."""
        padded = -(-self.blocks // ALIGNMENT) * ALIGNMENT
        return torch.empty(len(SUMS), padded, dtype=self.compute, device=self.device)

    def rows(self, memories: Sequence[Memory]) -> Tensor:
        """[runs, 8] int64, see `ROW`; copied to the device where the memory was not there in a call before."""
        where = tuple(memory.where for memory in memories)
        if where in self._rows:
            self._rows.move_to_end(where)
            return self._rows[where]
        refuse_in_capture(self.device)
        addresses = np.concatenate([memory.addresses for memory in memories])
        host = np.concatenate([addresses, self._shapes], axis=1)[self._order]
        self._rows[where] = rows = _on_device(host, self.device)
        if len(self._rows) > KEPT_PLACES:
            self._rows.popitem(last=False)
        return rows


def _form_of(memory: Memory, forms: Sequence[Form]) -> Integers:
    """[runs] place of each run's form in ``forms``."""
    plain, aligned = (forms.index(form) for form in memory.forms) if memory.forms else (0, 0)
    return np.where(memory.aligned, aligned, plain)


def _on_device(values: Integers, device: torch.device) -> Tensor:
    """From pinned memory, so that the host does not wait."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(device: torch.device) -> None:
    """Raises RuntimeError while a CUDA graph is captured: a graph would repeat the copy from memory that is gone."""
    if _is_capturing(device):
        raise RuntimeError(
            "a CUDA graph is being captured, and this step's weights, gradients or state are not where they were in a "
            "step before: run a step on the same memory first, and keep gradients in place between steps "
            "(zero_grad(set_to_none=False))"
        )


class Tables:
    """The tables of the calls of late. A call whose shards are those of a call before makes nothing anew.

    What a captured CUDA graph reads is kept for good: the graph may be replayed at any time.
    """

    def __init__(self, tile_blocks: int) -> None:
        self.tile_blocks = tile_blocks
        self._memories: dict[int, tuple[weakref.ref[Shard], Memory]] = {}  # by id
        self._tables: OrderedDict[tuple[Any, ...], Table] = OrderedDict()
        self._captured: list[tuple[Table, Tensor]] = []

    def of(self, shards: Sequence[Shard], params: int) -> tuple[Table, Tensor] | None:
        """The table of a call and its rows; None where no shard has an element.

        Raises:
            RuntimeError: it must be made, and a CUDA graph is being captured.
        """
        memories = [self._memory(shard) for shard in shards]
        held = [shard for shard, memory in zip(shards, memories, strict=True) if len(memory.numels)]
        if not held:
            return None
        compute, device = held[0].compute, held[0].device
        key = params, compute, device, tuple(memory.structure for memory in memories)
        if key not in self._tables:
            refuse_in_capture(device)
            self._tables[key] = Table(memories, params, compute, device, self.tile_blocks)
            if len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        table = self._tables[key]
        rows = table.rows(memories)
        if _is_capturing(device):
            self._captured.append((table, rows))
        return table, rows

    def _memory(self, shard: Shard) -> Memory:
        known = self._memories.get(id(shard))
        if known is not None and known[0]() is shard:
            return known[1]
        memories, key, memory = self._memories, id(shard), Memory(shard)
        memories[key] = weakref.ref(shard, lambda _: memories.pop(key, None)), memory
        return memory
