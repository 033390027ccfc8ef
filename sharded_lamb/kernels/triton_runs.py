"""The run table: addresses and sizes of a call's memory, read on the device by one launch over all of it.

A *run* is contiguous memory: a flat shard, or a piece. A program computes one *tile*, a few blocks of one run. Runs
with equal dtypes and equal alignment share a launch, across shards. Integers and small tensors; independent of
Triton.
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
from sharded_lamb.core.rule import CAUTION_SUMS
from sharded_lamb.kernels.block_codes import BlockFormat
from sharded_lamb.kernels.shard import FlatShard, ScatteredShard, Shard

ROW = ("weight", "model", "grad", "exp_avg", "exp_avg_sq", "numel", "first_tile", "first_block")
"""A run's row, int64: addresses (model, exp_avg_sq 0: none), elements, first tile in its launch, first block in the
call."""

ALIGNMENT = 16
"""Bytes of a vector load; also elements, so that a vector load is entirely inside or outside a run."""

KEPT_TABLES, KEPT_PLACES = 64, 4
"""Cached tables, and cached row sets per table: gradients often alternate between a few addresses. A shard that is
called alone, as each bucket is in backward, keeps its table beside these."""

CODES = BlockFormat.storage

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Form:
    """Compile-time constants of a launch: the dtypes of its runs' memory, and whether all of it is aligned."""

    weight: torch.dtype
    model: torch.dtype | None
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype | None
    aligned: bool


class Memory:
    """The non-empty runs of one shard, extracted once. ``structure`` and ``where`` are keys: bytes, whose hash Python
    computes once."""

    def __init__(self, shard: Shard) -> None:
        columns = _columns(shard)
        self.block_param = shard.block_param if isinstance(shard, FlatShard) else None
        numels = np.array(list(map(_NUMEL, columns[0])), dtype=np.int64)
        nonempty = numels > 0
        self.numels = numels[nonempty]
        pointers = [
            np.array(list(map(_POINTER, column)), dtype=np.int64) if column else np.zeros_like(numels)
            for column in columns
        ]
        if isinstance(shard, ScatteredShard) and shard.grad_starts is not None:
            pointers[2] += shard.grad[0].itemsize * np.array(shard.grad_starts, np.int64)
        self.addresses: Integers = (
            np.stack(pointers, axis=1)[nonempty] if len(numels) else np.zeros((0, 5), np.int64)
        )
        params = shard.params if isinstance(shard, ScatteredShard) else (0,)
        self.params = np.array(params, dtype=np.int64)[nonempty]
        wide = [i for i, column in enumerate(columns) if i < 3 or not column or column[0].dtype != CODES]
        bits = np.bitwise_or.reduce(self.addresses[:, wide], axis=1) | self.numels
        self.aligned = bits % ALIGNMENT == 0
        dtypes = tuple(column[0].dtype if column else None for column in columns)
        self.forms = [_form(dtypes, aligned) for aligned in (False, True)] if len(self.numels) else []
        # The tensor's id identifies a flat shard's block_param: this object keeps the tensor alive.
        header = repr((dtypes, len(self.numels), None if self.block_param is None else id(self.block_param)))
        parts = header.encode(), self.numels.tobytes(), self.params.tobytes(), self.aligned.tobytes()
        self.structure, self.where = b"".join(parts), self.addresses.tobytes()
        self.table: dict[tuple[Any, ...], Table] = {}  # of the last call on this shard alone, by its key


def _form(dtypes: Sequence[torch.dtype | None], aligned: bool) -> Form:
    weight, model, grad, exp_avg, exp_avg_sq = dtypes
    assert weight is not None
    assert grad is not None
    assert exp_avg is not None
    return Form(weight, model, grad, exp_avg, exp_avg_sq, aligned)


_NUMEL: Any = Tensor.numel
_POINTER: Any = Tensor.data_ptr

Column = Sequence[Tensor]


def _columns(shard: Shard) -> tuple[Column, Column, Column, Column, Column]:
    """Weights, models, gradients, first and second moments of a shard's runs; models and the last may be empty."""
    if isinstance(shard, ScatteredShard):
        return shard.weight, shard.model or (), shard.grad, shard.exp_avg, shard.exp_avg_sq or ()
    model, second = (() if memory is None else (memory,) for memory in (shard.model, shard.exp_avg_sq))
    return (shard.weight,), model, (shard.grad,), (shard.exp_avg,), second


@dataclass(frozen=True, slots=True)
class Launch:
    """Runs of one form: rows [low, high) of the table, and the run of each tile."""

    form: Form
    low: int
    high: int
    tiles: int
    tile_run: Tensor  # [tiles] int32, relative to ``low``


class Table:
    """The address-independent inputs of one call's programs; built without a device synchronization.

    ``tile_blocks``: blocks per tile.
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
            members = np.flatnonzero(form_of == number)
            if len(members):
                first_tile[members] = np.cumsum(tiles[members]) - tiles[members]
                tile_run = self._spread(np.arange(len(members)), tiles[members])
                self.launches.append(
                    Launch(form, low, low + len(members), int(tiles[members].sum()), tile_run)
                )
                low += len(members)
        self._shapes = np.stack([numels, first_tile, first_block], axis=1)
        self.block_param = self._block_param(memories, blocks)
        self._rows: OrderedDict[tuple[bytes, ...], Tensor] = OrderedDict()
        self._copied_by_replays: list[Tensor] = []

    def _spread(self, values: Integers, counts: Integers) -> Tensor:
        """int32: values[i] repeated counts[i] times."""
        repeats = _on_device(counts, self.device)
        spread = _on_device(values, self.device).repeat_interleave(repeats, output_size=int(counts.sum()))
        return spread.to(torch.int32)

    def _block_param(self, memories: Sequence[Memory], blocks: Integers) -> Tensor:
        """[blocks] int32: the parameter of each block of the call."""
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
        """([blocks] int32, [params + 1] int32): each block's index after a stable sort by parameter, and each
        parameter's first index."""
        owners, blocks = torch.sort(self.block_param, stable=True)
        numbers = torch.arange(self.blocks, dtype=torch.int32, device=self.device)
        slot = torch.empty_like(numbers).scatter_(0, blocks, numbers)
        params = torch.arange(self.params + 1, dtype=torch.int32, device=self.device)
        return slot, torch.searchsorted(owners, params, out_int32=True)

    @cached_property
    def block_sums(self) -> Tensor:
        """[4, ≥ blocks] compute dtype: scratch for sums over blocks, in the order of `slots`."""
        padded = -(-self.blocks // ALIGNMENT) * ALIGNMENT
        return torch.empty(len(CAUTION_SUMS), padded, dtype=self.compute, device=self.device)

    def rows(self, memories: Sequence[Memory]) -> Tensor:
        """[runs, 8] int64, see `ROW`; copied to the device unless an earlier call used the same memory.

        In a CUDA graph each replay copies them, from memory that stays.
        """
        where = tuple(memory.where for memory in memories)
        if where in self._rows:
            self._rows.move_to_end(where)
            return self._rows[where]
        addresses = np.concatenate([memory.addresses for memory in memories])
        host = _pinned(np.concatenate([addresses, self._shapes], axis=1)[self._order], self.device)
        rows = host.to(self.device, non_blocking=True)
        if _is_capturing(self.device):
            self._copied_by_replays.append(host)
            return rows
        self._rows[where] = rows
        if len(self._rows) > KEPT_PLACES:
            self._rows.popitem(last=False)
        return rows


def _form_of(memory: Memory, forms: Sequence[Form]) -> Integers:
    """[runs] index of each run's form in ``forms``."""
    plain, aligned = (forms.index(form) for form in memory.forms) if memory.forms else (0, 0)
    return np.where(memory.aligned, aligned, plain)


def _pinned(values: Integers, device: torch.device) -> Tensor:
    """Memory from which a copy to ``device`` needs no synchronization."""
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" else host


def _on_device(values: Integers, device: torch.device) -> Tensor:
    return _pinned(values, device).to(device, non_blocking=True)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(device: torch.device) -> None:
    """Raises RuntimeError while a CUDA graph is captured: each replay would build the table anew."""
    if _is_capturing(device):
        raise RuntimeError(
            "a CUDA graph is being captured, and this step updates other parameters, or memory of other dtypes or "
            "alignment, than earlier steps: run a step like it first"
        )


class Tables:
    """Cache of the most recent calls' tables. A call on the shards of an earlier call builds nothing.

    Tables that a captured CUDA graph reads are never freed: the graph may be replayed at any time.
    """

    def __init__(self, tile_blocks: int) -> None:
        self.tile_blocks = tile_blocks
        self._memories: dict[int, tuple[weakref.ref[Shard], Memory]] = {}  # by id
        self._tables: OrderedDict[tuple[Any, ...], Table] = OrderedDict()
        self._captured: list[tuple[Table, Tensor]] = []

    def of(self, shards: Sequence[Shard], params: int) -> tuple[Table, Tensor] | None:
        """The table of a call and its rows; None if no shard has an element.

        Raises:
            RuntimeError: the table is not cached, and a CUDA graph is being captured.
        """
        memories = [self._memory(shard) for shard in shards]
        nonempty = [shard for shard, memory in zip(shards, memories, strict=True) if len(memory.numels)]
        if not nonempty:
            return None
        compute, device = nonempty[0].compute, nonempty[0].device
        key = params, compute, device, tuple(memory.structure for memory in memories)
        table = memories[0].table.get(key) or self._cached(key, memories)
        if len(memories) == 1:
            memories[0].table = {key: table}
        rows = table.rows(memories)
        if _is_capturing(device):
            self._captured.append((table, rows))
        return table, rows

    def _cached(self, key: tuple[Any, ...], memories: Sequence[Memory]) -> Table:
        if key not in self._tables:
            params, compute, device, _ = key
            refuse_in_capture(device)
            self._tables[key] = Table(memories, params, compute, device, self.tile_blocks)
            if len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def _memory(self, shard: Shard) -> Memory:
        cached = self._memories.get(id(shard))
        if cached is not None and cached[0]() is shard:
            return cached[1]
        memories, key, memory = self._memories, id(shard), Memory(shard)
        memories[key] = weakref.ref(shard, lambda _: memories.pop(key, None)), memory
        return memory
