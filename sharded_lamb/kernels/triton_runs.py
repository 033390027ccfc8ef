"""The table of runs: where the memory of a call's shards lies, as one launch over all of it reads it on the device.

A *run* is memory without gaps: a flat shard, or a piece. Programs take *tiles*, some blocks of one run. Runs that agree
in their dtypes and in whether they are aligned share a launch, whatever shards they come from. Integers and small
tensors; nothing here knows Triton.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.kernels.shard import PieceShard, Shard
from sharded_lamb.layout import BLOCK

ROW = ("weight", "model", "grad", "exp_avg", "exp_avg_sq", "numel", "first_tile", "first_block")
"""A run's row, int64: addresses (0: no model), elements, its first tile in its launch, its first block in the call."""

ALIGNMENT = 16
"""Bytes of a vector load; and elements, so that one load lies wholly inside or outside of a run."""

KEPT_TABLES, KEPT_PLACES = 64, 4
"""Calls whose tables are kept, and places of their memory: gradients often take turns between a few."""


@dataclass(frozen=True, slots=True)
class Form:
    """What is compiled into a launch: the dtypes of its runs' memory, and whether all of it is aligned."""

    weight: torch.dtype
    model: torch.dtype | None
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    aligned: bool


Owner = int | Tensor
"""The parameter of a run; or [blocks] int64, that of each of its blocks."""

Addresses = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Run:
    form: Form
    numel: int
    owner: Owner
    addresses: Addresses

    @property
    def structure(self) -> tuple[Any, ...]:
        """All but the addresses. A flat shard's owners are told by their tensor, which a table keeps alive."""
        return self.form, self.numel, id(self.owner) if isinstance(self.owner, Tensor) else self.owner


def _runs(shard: Shard) -> Iterator[_Run]:
    """Those that have elements."""
    weights, models, grads, ms, vs, owners = _columns(shard)
    if not owners:
        return
    model_dtype = models[0].dtype if models else None
    plain, aligned = (
        Form(weights[0].dtype, model_dtype, grads[0].dtype, ms[0].dtype, vs[0].dtype, aligned)
        for aligned in (False, True)
    )
    for i, owner in enumerate(owners):
        numel = weights[i].numel()
        if numel == 0:
            continue
        model = models[i].data_ptr() if models else 0
        addresses = weights[i].data_ptr(), model, grads[i].data_ptr(), ms[i].data_ptr(), vs[i].data_ptr()
        bits = numel | addresses[0] | model | addresses[2] | addresses[3] | addresses[4]
        yield _Run(plain if bits % ALIGNMENT else aligned, numel, owner, addresses)


Column = Sequence[Tensor]


def _columns(shard: Shard) -> tuple[Column, Column, Column, Column, Column, Sequence[Owner]]:
    """(weights, models, gradients, moments, moments of squares, owners) of a shard's runs; models may be none."""
    if isinstance(shard, PieceShard):
        return shard.weight, shard.model or (), shard.grad, shard.exp_avg, shard.exp_avg_sq, shard.params
    model = () if shard.model is None else (shard.model,)
    return (shard.weight,), model, (shard.grad,), (shard.exp_avg,), (shard.exp_avg_sq,), (shard.block_param,)


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
        self, runs: Sequence[_Run], params: int, compute: torch.dtype, device: torch.device, tile_blocks: int
    ) -> None:
        self.params, self.compute, self.device = params, compute, device
        self.owners = [run.owner for run in runs]
        blocks = [-(-run.numel // BLOCK) for run in runs]
        self.blocks = sum(blocks)
        forms = list(dict.fromkeys(run.form for run in runs))
        self.order = sorted(range(len(runs)), key=lambda run: forms.index(runs[run].form))
        first_block = list(accumulate(blocks, initial=0))
        first_tile = [0] * len(runs)
        self.launches: list[Launch] = []
        low = 0
        for form in forms:
            mine = [run for run in self.order if runs[run].form == form]
            tiles = [-(-blocks[run] // tile_blocks) for run in mine]
            for run, first in zip(mine, accumulate(tiles, initial=0), strict=False):
                first_tile[run] = first
            tile_run = self._spread(range(len(mine)), tiles)
            self.launches.append(Launch(form, low, low + len(mine), sum(tiles), tile_run))
            low += len(mine)
        self._shapes = [(runs[run].numel, first_tile[run], first_block[run]) for run in range(len(runs))]
        self.block_param = self._block_param(blocks, first_block)
        self._rows: OrderedDict[tuple[Addresses, ...], Tensor] = OrderedDict()

    def _spread(self, values: Sequence[int], counts: Sequence[int]) -> Tensor:
        """values[i] counts[i] times, int32."""
        total = sum(counts)
        repeats = _on_device(counts, torch.int64, self.device)
        return _on_device(values, torch.int32, self.device).repeat_interleave(repeats, output_size=total)

    def _block_param(self, blocks: Sequence[int], first_block: Sequence[int]) -> Tensor:
        """[blocks] int32, the parameter of each block of the call."""
        params = [0 if isinstance(owner, Tensor) else owner for owner in self.owners]
        block_param = self._spread(params, blocks)
        for owner, first, count in zip(self.owners, first_block, blocks, strict=False):
            if isinstance(owner, Tensor):
                block_param[first : first + count] = owner
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
        """[2, ≥ blocks] compute dtype: scratch for sums of squares of blocks, in the order of `slots`."""
        padded = -(-self.blocks // ALIGNMENT) * ALIGNMENT
        return torch.empty(2, padded, dtype=self.compute, device=self.device)

    def rows(self, addresses: tuple[Addresses, ...]) -> Tensor:
        """[runs, 8] int64, see `ROW`; copied to the device where the memory was not there in a call before."""
        if addresses in self._rows:
            self._rows.move_to_end(addresses)
            return self._rows[addresses]
        refuse_in_capture(self.device)
        host = [(*addresses[run], *self._shapes[run]) for run in self.order]
        self._rows[addresses] = rows = _on_device(host, torch.int64, self.device)
        if len(self._rows) > KEPT_PLACES:
            self._rows.popitem(last=False)
        return rows


def _on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """From pinned memory, so that the host does not wait."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


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
        self._tables: OrderedDict[tuple[Any, ...], Table] = OrderedDict()
        self._captured: list[tuple[Table, Tensor]] = []

    def of(self, shards: Sequence[Shard], params: int) -> tuple[Table, Tensor] | None:
        """The table of a call and its rows; None where no shard has an element.

        Raises:
            RuntimeError: it must be made, and a CUDA graph is being captured.
        """
        found = [(shard, list(_runs(shard))) for shard in shards]
        runs = [run for _, held in found for run in held]
        if not runs:
            return None
        compute, device = next((shard.compute, shard.device) for shard, held in found if held)
        key = params, compute, device, tuple(run.structure for run in runs)
        if key not in self._tables:
            refuse_in_capture(device)
            self._tables[key] = Table(runs, params, compute, device, self.tile_blocks)
            if len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        table = self._tables[key]
        rows = table.rows(tuple(run.addresses for run in runs))
        if _is_capturing(device):
            self._captured.append((table, rows))
        return table, rows
