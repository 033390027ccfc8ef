"""The two passes in C++ (`lamb.cpp` and its headers), with the bits of `reference` on any number of threads."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sharded_lamb.core.layout import BLOCK, Segment
from sharded_lamb.core.rule import CAUTION_SUMS, COLUMNS
from sharded_lamb.kernels import compiling, prebuilt
from sharded_lamb.kernels.block_codes import BlockFormat
from sharded_lamb.kernels.remainders import STORAGE
from sharded_lamb.kernels.shard import FlatShard, ReceivedShards, ScatteredShard, Shard

SOURCE = Path(__file__).with_name("lamb.cpp")
DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    STORAGE[16]: 4,
    STORAGE[8]: 5,
    BlockFormat.storage: 6,
}
NO_MODEL = -1
SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}

RUN = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("weight", "model", "grad", "exp_avg", "exp_avg_sq"),  # addresses; model, exp_avg_sq 0: none
            "block_param",  # address of [blocks] int64; 0: all blocks are ``param``'s
            *("numel", "param", "first_block"),
            *("weight_dtype", "model_dtype", "grad_dtype", "state_dtype"),
        )
    ]
)
"""lamb.cpp's ``Run``."""

SLICE = np.dtype(
    [(name, np.int64) for name in ("source", "dtype", "shard_start", "length", "param", "first_block")]
)
"""lamb.cpp's ``Slice``; ``source``: an address."""


@lru_cache(maxsize=1)
def library() -> Any:
    """The compiled `lamb.cpp`: the wheel's, else compiled on first use.

    Raises:
        compiling.CompileError: no library in the wheel, and no compiler, or the build failed.
    """
    return typed(prebuilt.load(SOURCE) or compiling.load(SOURCE))


def typed(lib: ctypes.CDLL) -> Any:
    """A library of `lamb.cpp` with its functions' signatures."""
    for name in ("lamb_run_bytes", "lamb_slice_bytes", "lamb_coefficients_bytes"):
        getattr(lib, name).restype = ctypes.c_int64
    assert lib.lamb_run_bytes() == RUN.itemsize, "lamb.cpp's Run and native.RUN differ"
    assert lib.lamb_slice_bytes() == SLICE.itemsize, "lamb.cpp's Slice and native.SLICE differ"
    assert lib.lamb_coefficients_bytes() == len(COLUMNS) * 4, (
        "lamb.cpp's Coefficients and rule.Coefficients differ"
    )
    word, pointer = ctypes.c_int64, ctypes.c_void_p
    for suffix in SUFFIXES.values():
        signatures = {
            "square_sums": (pointer, word, word, pointer, pointer, word),
            "moments_and_norms": (pointer, word, word, pointer, word, pointer, pointer, word),
            "apply": (pointer, word, word, pointer, word, pointer, word),
            "weight_norms": (pointer, word, word, pointer, pointer, word),
            "apply_momentum": (pointer, word, pointer, word, pointer, word),
            "average": (pointer, pointer, word, pointer, *[word] * 7, pointer, pointer, word),
        }
        for name, arguments in signatures.items():
            function = getattr(lib, f"lamb_{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
    return lib


_POINTER: Any = Tensor.data_ptr
Table = npt.NDArray[np.void]  # of RUN or SLICE


def _runs(shards: Sequence[Shard]) -> Table:
    """[runs] of `RUN`: the memory of all ``shards``. Both moments have one dtype."""
    parts = [
        np.array([_flat_run(shard)], RUN) if isinstance(shard, FlatShard) else _scattered_runs(shard)
        for shard in shards
    ]
    runs = parts[0] if len(parts) == 1 else np.concatenate(parts)
    blocks = -(-runs["numel"] // BLOCK)
    runs["first_block"] = np.cumsum(blocks) - blocks
    return runs


def _flat_run(shard: FlatShard) -> tuple[int, ...]:
    model, second = shard.model, shard.exp_avg_sq
    assert second is None or shard.exp_avg.dtype == second.dtype
    weight, grad, exp_avg = map(Tensor.data_ptr, (shard.weight, shard.grad, shard.exp_avg))
    copy, exp_avg_sq = (0 if memory is None else memory.data_ptr() for memory in (model, second))
    numel, owners = shard.weight.numel(), shard.block_param.data_ptr()
    dtypes = _dtypes(shard.weight, model, shard.grad, shard.exp_avg)
    return weight, copy, grad, exp_avg, exp_avg_sq, owners, numel, 0, 0, *dtypes


def _scattered_runs(shard: ScatteredShard) -> Table:
    """Serves all calls of a step: both passes, and the sums of gradients before them."""
    if "cpp" not in shard.current:
        shard.current["cpp"] = _with_gradients(shard)
    runs: Table = shard.current["cpp"]
    return runs


def _with_gradients(shard: ScatteredShard) -> Table:
    if "cpp" not in shard.derived:
        shard.derived["cpp"] = _without_gradients(shard)
    runs: Table = shard.derived["cpp"].copy()
    addresses = np.array(list(map(_POINTER, shard.grad)), np.int64)
    if shard.grad_starts is not None:
        addresses += shard.grad[0].itemsize * np.array(shard.grad_starts, np.int64)
    runs["grad"], runs["grad_dtype"] = addresses, DTYPES[shard.grad[0].dtype]
    return runs


def _without_gradients(shard: ScatteredShard) -> Table:
    assert not shard.exp_avg_sq or shard.exp_avg[0].dtype == shard.exp_avg_sq[0].dtype
    runs = np.zeros(len(shard.params), RUN)
    runs["param"], runs["numel"] = shard.params, shard.lengths
    runs["weight_dtype"], runs["state_dtype"] = DTYPES[shard.weight[0].dtype], DTYPES[shard.exp_avg[0].dtype]
    runs["model_dtype"] = DTYPES[shard.model[0].dtype] if shard.model else NO_MODEL
    for name in ("weight", "model", "exp_avg", "exp_avg_sq"):
        tensors = getattr(shard, name)
        if tensors is not None:
            runs[name] = list(map(_POINTER, tensors))
    return runs


def _dtypes(weight: Tensor, model: Tensor | None, grad: Tensor, exp_avg: Tensor) -> tuple[int, int, int, int]:
    return (
        DTYPES[weight.dtype],
        NO_MODEL if model is None else DTYPES[model.dtype],
        DTYPES[grad.dtype],
        DTYPES[exp_avg.dtype],
    )


class CppKernel:
    """The C++ backend, from the wheel or compiled on first use for this machine's processor; CPU tensors only.

    Uses ``torch.get_num_threads()`` threads.

    Raises:
        compiling.CompileError: no library in the wheel, and no compiler, or the build failed.
    """

    name = "cpp"

    def __init__(self) -> None:
        self._library = library()
        self._templates: dict[int, tuple[Sequence[Segment], Table, npt.NDArray[np.int64]]] = {}
        self._block_sums = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in SUFFIXES}

    def square_sums(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """Adds Σg² per parameter to ``sums`` [P] fp64."""
        self._summed("square_sums", shards, 1, (), sums)

    def moments_and_norms(self, shards: Sequence[Shard], table: Tensor, sums: Tensor) -> None:
        """m, v ← g; adds Σw² and Σu² of each direction, or caution's sums, by parameter to ``sums`` [1 + D, P]."""
        assert table.is_contiguous()
        assert table.dtype == shards[0].compute
        self._summed("moments_and_norms", shards, len(sums), (len(sums) - 1, table.data_ptr()), sums)

    def apply(
        self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor, *, caution: bool = False
    ) -> None:
        """w ← w - step_size u for each direction, u recomputed from m and v, and from g where it counts."""
        runs = _runs(shards)
        assert table.is_contiguous()
        assert step_sizes.is_contiguous()
        assert table.dtype == step_sizes.dtype
        directions, parameters = step_sizes.shape
        update = len(CAUTION_SUMS) - 1 if caution else directions
        sizes = update, table.data_ptr(), parameters, step_sizes.data_ptr()
        self._function("apply", table.dtype)(runs.ctypes.data, len(runs), *sizes, torch.get_num_threads())

    def weight_norms(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """Adds Σw² per parameter to ``sums`` [P] fp64."""
        self._summed("weight_norms", shards, 1, (), sums)

    def apply_momentum(self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor) -> None:
        """m ← β1 m + c1 d; w ← w - step_sizes[0] m - step_sizes[1] d."""
        runs = _runs(shards)
        assert table.is_contiguous()
        assert step_sizes.is_contiguous()
        assert table.dtype == step_sizes.dtype
        arguments = table.data_ptr(), step_sizes.shape[1], step_sizes.data_ptr(), torch.get_num_threads()
        self._function("apply_momentum", table.dtype)(runs.ctypes.data, len(runs), *arguments)

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
        parts, own = received.parts, received.own
        assert parts.is_contiguous()
        assert parts.shape[1:] == shard.grad.shape
        rows = parts.data_ptr(), len(parts), DTYPES[parts.dtype], shard.grad.numel()
        slices = self._slices(segments, [] if own is None else own.grads)
        threads = torch.get_num_threads()
        block_sums = self._scratch(shard.compute, len(shard.block_param) if threads > 1 else 0)
        self._function("average", shard.compute)(
            shard.grad.data_ptr(),
            slices.ctypes.data,
            len(slices),
            *rows,
            -1 if own is None else own.row,
            received.divisor,
            add,
            len(sums),
            sums.data_ptr(),
            block_sums.data_ptr(),
            threads,
        )

    def _slices(self, segments: Sequence[Segment], grads: Sequence[Tensor | None]) -> Table:
        """[segments] of `SLICE`; without ``grads`` the source is 0."""
        slices, starts = self._templates_of(segments)
        slices = slices.copy()
        dtypes = {grad.dtype for grad in grads if grad is not None}
        for dtype in dtypes:
            rows: Any = slice(None)
            sources = grads
            if len(dtypes) > 1 or any(grad is None for grad in grads):
                rows = [i for i, grad in enumerate(grads) if grad is not None and grad.dtype == dtype]
                sources = [grads[i] for i in rows]
            pointers = np.array(list(map(_POINTER, sources)), dtype=np.int64)
            slices["source"][rows] = pointers + dtype.itemsize * starts[rows]
            slices["dtype"][rows] = DTYPES[dtype]
        return slices

    def _templates_of(self, segments: Sequence[Segment]) -> tuple[Table, npt.NDArray[np.int64]]:
        """([segments] of `SLICE` without sources, [segments] first element of each in its parameter), cached."""
        cached, slices, starts = self._templates.get(id(segments), (None, None, None))
        if slices is None or starts is None or cached is not segments:
            rows = [(0, 0, s.shard_start, s.length, s.param, 0) for s in segments]
            slices = np.array(rows, dtype=SLICE)
            blocks = -(-slices["length"] // BLOCK)
            slices["first_block"] = np.cumsum(blocks) - blocks
            starts = np.array([s.start for s in segments], dtype=np.int64)
            self._templates[id(segments)] = segments, slices, starts
        return slices, starts

    def _summed(
        self, name: str, shards: Sequence[Shard], kinds: int, arguments: Sequence[int], sums: Tensor
    ) -> None:
        runs, dtype, threads = _runs(shards), shards[0].compute, torch.get_num_threads()
        assert sums.is_contiguous()
        assert sums.dtype == torch.float64
        blocks = int((-(-runs["numel"] // BLOCK)).sum())
        block_sums = self._scratch(dtype, blocks * kinds if threads > 1 else 0)
        self._function(name, dtype)(
            runs.ctypes.data,
            len(runs),
            *arguments,
            sums.shape[-1],
            sums.data_ptr(),
            block_sums.data_ptr(),
            threads,
        )

    def _scratch(self, dtype: torch.dtype, numel: int) -> Tensor:
        """Memory for the block sums of a call, reused; as large as the largest call needed."""
        if self._block_sums[dtype].numel() < numel:
            self._block_sums[dtype] = torch.empty(numel, dtype=dtype, device="cpu")
        return self._block_sums[dtype]

    def _function(self, name: str, dtype: torch.dtype) -> Any:
        return getattr(self._library, f"lamb_{name}_{SUFFIXES[dtype]}")
