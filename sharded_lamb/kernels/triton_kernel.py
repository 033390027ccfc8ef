"""The Triton backend: each pass one launch over all shards of a call, and one that adds blocks up by parameter.

Launches a call: one for every form of memory (`triton_runs.Form`: dtypes, and aligned or not), whatever the number of
shards, pieces and parameters; for sums one more. Every arithmetic step is one IEEE operation, so bits are those of
`reference`, but for the last ones of fp64 sums over more than `triton_device.DEPTH` blocks of a parameter, whose order
is another fixed one (norms are rounded to fp32 before use).

Nothing waits for the device, and what the host must tell it (addresses) is copied once and kept. A step can be captured
as a **CUDA graph** after a step on the same memory: weights, gradients (``zero_grad(set_to_none=False)``) and state
stay where they are, and the learning rate, if it changes, is a tensor on the device. Otherwise capturing is an error.

Importing this module does not import Triton; making a `TritonKernel` does.
"""

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharded_lamb.core.layout import Segment
from sharded_lamb.kernels.incoming import StockIncoming, with_local_contribution
from sharded_lamb.kernels.shard import FlatShard, ReceivedShards, Shard
from sharded_lamb.kernels.triton_runs import Table, Tables

if TYPE_CHECKING:
    from types import ModuleType

WRITTEN = ("weight", "model", "exp_avg", "exp_avg_sq")

WARPS = 4
COMPILED_FOR = (8, 0)
"""The least CUDA compute capability that Triton compiles for."""


def usable(device: torch.device) -> str | None:
    """Why the Triton backend cannot update memory on ``device``; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'sharded-lamb[gpu]')"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu":
        return None if interpreted else "on a CPU, Triton only interprets (TRITON_INTERPRET=1, for tests)"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"triton has no {device.type} device here"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < COMPILED_FOR:
        found = "{}.{}".format(*torch.cuda.get_device_capability(device))
        return (
            f"triton needs compute capability {COMPILED_FOR[0]}.{COMPILED_FOR[1]}, and {device} has {found}"
        )
    return None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int, **constants: Any) -> None:
    """Every launch goes through here. Without fusion: a fused multiply-add rounds once where the rule rounds twice."""
    kernel[grid](*arguments, **constants, num_warps=WARPS, enable_fp_fusion=False)


class TritonKernel(StockIncoming):
    """A `sharded_lamb.kernels.Kernel` on CUDA memory (on a CPU's under TRITON_INTERPRET=1).

    Raises:
        ModuleNotFoundError: triton is not installed.
    """

    name = "triton"

    def __init__(self) -> None:
        from sharded_lamb.kernels import triton_device

        self._device: ModuleType = triton_device
        self._tables = Tables(triton_device.TILE.value)

    def average(
        self,
        shard: FlatShard,
        segments: Sequence[Segment],
        received: ReceivedShards,
        sums: Tensor,
        *,
        add: bool,
    ) -> None:
        """grad ← the average, or grad + that, and Σg², in one sweep."""
        parts, divisor = received.parts, received.divisor
        if received.own is not None:
            every = with_local_contribution(parts, segments, received.own, shard.compute)
            parts = torch.stack([row.to(shard.compute) for row in every])
        assert parts.is_contiguous()
        assert parts.shape[1:] == shard.grad.shape
        found = self._tables.of([shard], len(sums))
        if found is None:
            return
        table, rows = found
        slot, _ = table.slots
        constants = {"WIRE": self._dtype(parts.dtype), "COMPUTE": self._dtype(table.compute), "ADD": add}
        bits = parts.view(torch.int16) if parts.dtype == torch.bfloat16 else parts
        (run,) = table.launches
        arguments = rows, run.tile_run, bits, slot, table.block_sums, len(parts), parts.shape[1], divisor
        with _on(table.device):
            launch(self._device.average, (run.tiles,), *arguments, **constants, ALIGNED=run.form.aligned)
            self._add_up(table, sums.unsqueeze(0))

    def square_sums(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """Σg² per parameter, added to ``sums`` [P] fp64."""
        found = self._tables.of(shards, len(sums))
        if found is None:
            return
        table, rows = found
        slot, _ = table.slots
        with _on(table.device):
            self._launches(self._device.square_sums, ("grad",), table, rows, slot, table.block_sums)
            self._add_up(table, sums.unsqueeze(0))

    def moments_and_norms(self, shards: Sequence[Shard], table: Tensor, sums: Tensor) -> None:
        """m, v ← g, and Σw², Σu² per parameter, added to ``sums`` [SUMS, P] fp64."""
        found = self._tables.of(shards, len(table))
        if found is None:
            return
        where, rows = found
        slot, _ = where.slots
        arguments = where.block_param, slot, table, *where.block_sums.unbind()
        with _on(where.device):
            self._launches(self._device.moments_and_norms, (*WRITTEN, "grad"), where, rows, *arguments)
            self._add_up(where, sums)

    def apply(self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor) -> None:
        """w ← w - step_size u, u recomputed from m and v."""
        found = self._tables.of(shards, len(table))
        if found is None:
            return
        where, rows = found
        with _on(where.device):
            self._launches(self._device.apply, WRITTEN, where, rows, where.block_param, table, step_sizes)

    def _launches(
        self, kernel: Any, kinds: Sequence[str], table: Table, rows: Tensor, *arguments: Tensor
    ) -> None:
        """One a form. ``kinds``: the memory whose dtypes the kernel is compiled for."""
        for run in table.launches:
            dtypes = {kind.upper(): self._dtype(getattr(run.form, kind)) for kind in kinds}
            constants = {**dtypes, "COMPUTE": self._dtype(table.compute), "ALIGNED": run.form.aligned}
            launch(kernel, (run.tiles,), rows[run.low : run.high], run.tile_run, *arguments, **constants)

    def _add_up(self, table: Table, sums: Tensor) -> None:
        """Block sums of the planes of ``sums`` [planes, P], added to it."""
        assert sums.is_contiguous()
        assert sums.dtype == torch.float64
        _, first_slots = table.slots
        scratch = table.block_sums
        grid = table.params, len(sums)
        launch(
            self._device.add_by_parameter, grid, scratch, first_slots, sums, table.params, scratch.shape[1]
        )

    def _dtype(self, dtype: torch.dtype | None) -> Any:
        """Triton's; None stands for no memory."""
        return None if dtype is None else getattr(self._device.tl, str(dtype).removeprefix("torch."))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
