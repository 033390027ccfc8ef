"""The Triton backend: one launch per pass over all shards of a call, and one that sums blocks by parameter.

Launches per call: one for every form of memory (`triton_runs.Form`: dtypes, aligned or not), for any number of
shards, pieces and parameters; one more for sums. Every arithmetic step is one IEEE operation, so bits equal those of
`reference`, except the last bits of fp64 sums over more than `triton_device.DEPTH` blocks of a parameter, which have a
different fixed order (norms are rounded to fp32 before use).

Nothing synchronizes with the device; addresses are copied to it once and cached. A step, with or without its backward,
can be captured as a **CUDA graph** after a step like it: the same parameters have gradients, at any addresses of the
same alignment, and a learning rate that changes is a tensor on the device. Otherwise capturing raises RuntimeError.

Importing this module does not import Triton; constructing a `TritonKernel` does.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharded_lamb.core.layout import Segment
from sharded_lamb.core.rule import CAUTION_SUMS, NESTEROV_SUMS
from sharded_lamb.kernels.incoming import StockIncoming, with_local_contribution
from sharded_lamb.kernels.shard import FlatShard, ReceivedShards, Shard
from sharded_lamb.kernels.triton_runs import Table, Tables

if TYPE_CHECKING:
    from types import ModuleType

WRITTEN = ("weight", "model", "exp_avg", "exp_avg_sq")

WARPS, PASS_1_WARPS = 4, 8
"""The latter where no 16-bit copy of the weights is beside them (`bench/results/gpu-tiles.json`): on an H100 pass 1
takes 2.78 ms with 8 warps and 2.96 with 4 for BERT-large in fp32. With copies the compiler's layout for 8 warps sums
across warps.
"""
NO_CONSTANTS: Mapping[str, Any] = MappingProxyType({})
COMPILED_FOR = (8, 0)
"""The lowest CUDA compute capability that Triton compiles for."""


def usable(device: torch.device) -> str | None:
    """The reason why the Triton backend does not work on ``device``; None if it works."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'sharded-lamb[gpu]')"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu":
        return None if interpreted else "on a CPU, Triton only interprets (TRITON_INTERPRET=1, for tests)"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"triton has no {device.type} device here"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < COMPILED_FOR:
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
        return f"triton needs compute capability {COMPILED_FOR[0]}.{COMPILED_FOR[1]}, and {device} has {capability}"
    return None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int, warps: int = WARPS, **constants: Any
) -> None:
    """Launch a kernel without fusion: a fused multiply-add rounds once where the rule rounds twice."""
    kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)


class TritonKernel(StockIncoming):
    """A `sharded_lamb.kernels.Kernel` for CUDA memory (for CPU memory under TRITON_INTERPRET=1).

    Raises:
        ModuleNotFoundError: triton is not installed.
    """

    name = "triton"

    def __init__(self) -> None:
        from sharded_lamb.kernels import triton_device, triton_memory

        self._device: ModuleType = triton_device
        self._tables = Tables(triton_memory.TILE.value)

    def average(
        self,
        shard: FlatShard,
        segments: Sequence[Segment],
        received: ReceivedShards,
        sums: Tensor,
        *,
        add: bool,
    ) -> None:
        """grad ← average, or grad + average, and Σg², in one sweep."""
        parts, divisor = received.parts, received.divisor
        if received.own is not None:
            all_parts = with_local_contribution(parts, segments, received.own, shard.compute)
            parts = torch.stack([part.to(shard.compute) for part in all_parts])
        assert parts.is_contiguous()
        assert parts.shape[1:] == shard.grad.shape
        lookup = self._tables.of([shard], len(sums))
        if lookup is None:
            return
        table, rows = lookup
        slot, _ = table.slots
        constants = {"WIRE": self._dtype(parts.dtype), "COMPUTE": self._dtype(table.compute), "ADD": add}
        bits = parts.view(torch.int16) if parts.dtype == torch.bfloat16 else parts
        (run,) = table.launches
        arguments = rows, run.tile_run, bits, slot, table.block_sums, len(parts), parts.shape[1], divisor
        with _on(table.device):
            launch(self._device.average, (run.tiles,), *arguments, **constants, ALIGNED=run.form.aligned)
            self._add_up(table, sums.unsqueeze(0))

    def square_sums(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """Adds Σg² per parameter to ``sums`` [P] fp64."""
        lookup = self._tables.of(shards, len(sums))
        if lookup is None:
            return
        table, rows = lookup
        slot, _ = table.slots
        with _on(table.device):
            self._launches(self._device.square_sums, ("grad",), table, rows, slot, table.block_sums)
            self._add_up(table, sums.unsqueeze(0))

    def moments_and_norms(self, shards: Sequence[Shard], table: Tensor, sums: Tensor) -> None:
        """m, v ← g; adds Σw² and Σu² of each direction, or caution's sums, by parameter to ``sums`` [1 + D, P]."""
        lookup = self._tables.of(shards, len(table))
        if lookup is None:
            return
        runs, rows = lookup
        slot, _ = runs.slots
        arguments = runs.block_param, slot, table, *runs.block_sums.unbind()
        constants = {"NESTEROV": len(sums) == len(NESTEROV_SUMS), "CAUTION": len(sums) == len(CAUTION_SUMS)}
        kernel = self._device.moments_and_norms
        with _on(runs.device):
            kinds = (*WRITTEN, "grad")
            self._launches(kernel, kinds, runs, rows, *arguments, warps=PASS_1_WARPS, constants=constants)
            self._add_up(runs, sums)

    def weight_norms(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """Adds Σw² per parameter to ``sums`` [P] fp64."""
        lookup = self._tables.of(shards, len(sums))
        if lookup is None:
            return
        runs, rows = lookup
        slot, _ = runs.slots
        with _on(runs.device):
            kinds = ("weight", "model")
            self._launches(self._device.weight_norms, kinds, runs, rows, slot, runs.block_sums[0])
            self._add_up(runs, sums.unsqueeze(0))

    def apply_momentum(self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor) -> None:
        """m ← β1 m + c1 d; w ← w - step_sizes[0] m - step_sizes[1] d."""
        lookup = self._tables.of(shards, len(table))
        if lookup is None:
            return
        runs, rows = lookup
        arguments = runs.block_param, table, *step_sizes.unbind()
        with _on(runs.device):
            kinds = ("weight", "model", "grad", "exp_avg")
            self._launches(self._device.apply_momentum, kinds, runs, rows, *arguments)

    def apply(
        self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor, *, caution: bool = False
    ) -> None:
        """w ← w - step_size u for each direction, u recomputed from m and v, and from g where it counts."""
        lookup = self._tables.of(shards, len(table))
        if lookup is None:
            return
        runs, rows = lookup
        arguments = runs.block_param, table, step_sizes[0], step_sizes[-1]
        nesterov = len(step_sizes) == 2
        kinds = (*WRITTEN, "grad") if nesterov or caution else WRITTEN
        constants = {"NESTEROV": nesterov, "CAUTION": caution, "GRAD": None}
        with _on(runs.device):
            self._launches(self._device.apply, kinds, runs, rows, *arguments, constants=constants)

    def _launches(
        self,
        kernel: Any,
        kinds: Sequence[str],
        table: Table,
        rows: Tensor,
        *arguments: Tensor,
        warps: int = WARPS,
        constants: Mapping[str, Any] = NO_CONSTANTS,
    ) -> None:
        """One launch per form.

        Args:
            kinds: the memory whose dtypes the kernel is compiled for.
            warps: of a program, for weights without a copy.
            constants: more for which it is compiled.
        """
        for run in table.launches:
            dtypes = {kind.upper(): self._dtype(getattr(run.form, kind)) for kind in kinds}
            form = {**constants, **dtypes, "COMPUTE": self._dtype(table.compute), "ALIGNED": run.form.aligned}
            form["warps"] = warps if run.form.model is None else WARPS
            launch(kernel, (run.tiles,), rows[run.low : run.high], run.tile_run, *arguments, **form)

    def _add_up(self, table: Table, sums: Tensor) -> None:
        """Adds the block sums of each plane to ``sums`` [planes, P]."""
        assert sums.is_contiguous()
        assert sums.dtype == torch.float64
        _, first_slots = table.slots
        scratch = table.block_sums
        grid = table.params, len(sums)
        launch(
            self._device.add_by_parameter, grid, scratch, first_slots, sums, table.params, scratch.shape[1]
        )

    def _dtype(self, dtype: torch.dtype | None) -> Any:
        """Triton's dtype; None: no memory."""
        return None if dtype is None else getattr(self._device.tl, str(dtype).removeprefix("torch."))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` current: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
