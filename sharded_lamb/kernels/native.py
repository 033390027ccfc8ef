"""The two passes in C++ (`lamb.cpp`, `blocks.h`), with the bits of `reference` on any number of threads."""

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
from sharded_lamb.core.rule import COLUMNS
from sharded_lamb.kernels import compiling
from sharded_lamb.kernels.remainders import RemainderFormat
from sharded_lamb.kernels.shard import FlatShard, ReceivedShards, ScatteredShard, Shard

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, RemainderFormat.storage: 4}
NO_MODEL = -1
SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}

RUN = 13
"""64-bit fields of lamb.cpp's ``Run``: five pointers, block_param, numel, param, first_block, four dtypes."""


SLICE = 6
"""64-bit fields of lamb.cpp's ``Slice``: pointer, dtype, place in the shard, length, parameter, first block."""


@lru_cache(maxsize=1)
def library() -> Any:
    """`lamb.cpp`, compiled.

    Raises:
        compiling.CompileError: it cannot be.
    """
    found = compiling.load(Path(__file__).with_name("lamb.cpp"))
    for name in ("lamb_run_bytes", "lamb_slice_bytes", "lamb_coefficients_bytes"):
        getattr(found, name).restype = ctypes.c_int64
    assert found.lamb_run_bytes() == RUN * 8, "lamb.cpp's Run and what is laid out here differ"
    assert found.lamb_slice_bytes() == SLICE * 8, "lamb.cpp's Slice and what is laid out here differ"
    assert found.lamb_coefficients_bytes() == len(COLUMNS) * 4, "lamb.cpp's Coefficients are not rule's"
    word, pointer = ctypes.c_int64, ctypes.c_void_p
    for suffix in SUFFIXES.values():
        signatures = {
            "square_sums": (pointer, word, word, pointer, pointer, word),
            "moments_and_norms": (pointer, word, pointer, word, pointer, pointer, word),
            "apply": (pointer, word, pointer, pointer, word),
            "average": (pointer, pointer, word, pointer, *[word] * 7, pointer, pointer, word),
        }
        for name, arguments in signatures.items():
            function = getattr(found, f"lamb_{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
    return found


_POINTER: Any = Tensor.data_ptr
Table = npt.NDArray[np.int64]


def _runs(shards: Sequence[Shard]) -> Table:
    """[runs, RUN]: where everything lies. Both moments have one dtype."""
    rows: list[tuple[int, ...]] = []
    first_block = 0
    for shard in shards:
        for row in [_flat_run(shard)] if isinstance(shard, FlatShard) else _piece_runs(shard):
            rows.append((*row[:8], first_block, *row[8:]))
            first_block += -(-row[6] // BLOCK)
    return np.array(rows, dtype=np.int64).reshape(-1, RUN)


def _flat_run(shard: FlatShard) -> tuple[int, ...]:
    assert shard.exp_avg.dtype == shard.exp_avg_sq.dtype
    model = shard.model
    return (
        shard.weight.data_ptr(),
        0 if model is None else model.data_ptr(),
        shard.grad.data_ptr(),
        shard.exp_avg.data_ptr(),
        shard.exp_avg_sq.data_ptr(),
        shard.block_param.data_ptr(),
        shard.weight.numel(),
        0,
        DTYPES[shard.weight.dtype],
        NO_MODEL if model is None else DTYPES[model.dtype],
        DTYPES[shard.grad.dtype],
        DTYPES[shard.exp_avg.dtype],
    )


def _piece_runs(shard: ScatteredShard) -> list[tuple[int, ...]]:
    assert shard.exp_avg[0].dtype == shard.exp_avg_sq[0].dtype
    models = shard.model
    dtypes = (
        DTYPES[shard.weight[0].dtype],
        NO_MODEL if models is None else DTYPES[models[0].dtype],
        DTYPES[shard.grad[0].dtype],
        DTYPES[shard.exp_avg[0].dtype],
    )
    model = [0] * len(shard.params) if models is None else [piece.data_ptr() for piece in models]
    pieces = zip(shard.params, shard.weight, model, shard.grad, shard.exp_avg, shard.exp_avg_sq, strict=True)
    return [
        (w.data_ptr(), copy, g.data_ptr(), m.data_ptr(), v.data_ptr(), 0, w.numel(), param, *dtypes)
        for param, w, copy, g, m, v in pieces
    ]


class CppKernel:
    """Compiled on first use for this machine's processor; CPU tensors only.

    Threads are torch's (``torch.get_num_threads()``). Raises `compiling.CompileError` where nothing can be compiled.
    """

    name = "cpp"

    def __init__(self) -> None:
        self._library = library()
        self._places: dict[int, tuple[Sequence[Segment], Table]] = {}
        self._block_sums = {dtype: torch.empty(0, dtype=dtype) for dtype in SUFFIXES}

    def square_sums(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """Σg² per parameter, added to ``sums`` [P] fp64."""
        self._summed("square_sums", shards, 1, None, sums)

    def moments_and_norms(self, shards: Sequence[Shard], table: Tensor, sums: Tensor) -> None:
        """m, v ← g, and Σw², Σu² per parameter, added to ``sums`` [2, P] fp64."""
        self._summed("moments_and_norms", shards, 2, table, sums)

    def apply(self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor) -> None:
        """w ← w - step_size u, u recomputed from m and v."""
        runs = _runs(shards)
        assert table.is_contiguous()
        assert step_sizes.is_contiguous()
        assert table.dtype == step_sizes.dtype
        self._function("apply", table.dtype)(
            runs.ctypes.data, len(runs), table.data_ptr(), step_sizes.data_ptr(), torch.get_num_threads()
        )

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
        parts, own = received.parts, received.own
        assert parts.is_contiguous()
        assert parts.shape[1:] == shard.grad.shape
        rows = parts.data_ptr(), len(parts), DTYPES[parts.dtype], shard.grad.numel()
        slices = self._slices(segments, [] if own is None else own.grads)
        self._average(shard, slices, (*rows, -1 if own is None else own.row), received.divisor, add, sums)

    def collect(
        self, shard: FlatShard, segments: Sequence[Segment], grads: Sequence[Tensor | None], sums: Tensor
    ) -> None:
        """grad ← segments of ``grads``, and Σg², in one sweep."""
        self._average(shard, self._slices(segments, grads), (0, 0, 0, 0, 0), 1, False, sums)

    def _average(
        self, shard: FlatShard, slices: Table, parts: tuple[int, ...], divisor: int, add: bool, sums: Tensor
    ) -> None:
        """``parts``: lamb.cpp's ``Parts``."""
        threads = torch.get_num_threads()
        block_sums = self._scratch(shard.compute, len(shard.block_param) if threads > 1 else 0)
        self._function("average", shard.compute)(
            shard.grad.data_ptr(),
            slices.ctypes.data,
            len(slices),
            *parts,
            divisor,
            add,
            len(sums),
            sums.data_ptr(),
            block_sums.data_ptr(),
            threads,
        )

    def _slices(self, segments: Sequence[Segment], grads: Sequence[Tensor | None]) -> Table:
        """[segments, SLICE]; without ``grads`` they lie nowhere."""
        places = self._places_of(segments)
        slices = np.zeros((len(segments), SLICE), dtype=np.int64)
        slices[:, 2:] = places[:, 1:]
        dtypes = {grad.dtype for grad in grads if grad is not None}
        for dtype in dtypes:
            given: Any = slice(None)
            found = grads
            if len(dtypes) > 1 or any(grad is None for grad in grads):
                given = [i for i, grad in enumerate(grads) if grad is not None and grad.dtype == dtype]
                found = [grads[i] for i in given]
            pointers = np.array(list(map(_POINTER, found)), dtype=np.int64)
            slices[given, 0] = pointers + dtype.itemsize * places[given, 0]
            slices[given, 1] = DTYPES[dtype]
        return slices

    def _places_of(self, segments: Sequence[Segment]) -> Table:
        """[segments, 5] first element of the parameter, place in the shard, length, parameter, first block."""
        known, table = self._places.get(id(segments), (None, None))
        if table is None or known is not segments:
            rows = [(s.start, s.shard_start, s.length, s.param) for s in segments]
            table = np.zeros((len(rows), 5), dtype=np.int64)
            table[:, :4] = np.array(rows, dtype=np.int64).reshape(-1, 4)
            table[1:, 4] = np.cumsum(-(-table[:-1, 2] // BLOCK))
            self._places[id(segments)] = segments, table
        return table

    def _summed(
        self, name: str, shards: Sequence[Shard], kinds: int, table: Tensor | None, sums: Tensor
    ) -> None:
        runs, dtype, threads = _runs(shards), shards[0].compute, torch.get_num_threads()
        assert sums.is_contiguous()
        assert sums.dtype == torch.float64
        tables = []
        if table is not None:
            assert table.is_contiguous()
            assert table.dtype == dtype
            tables = [table.data_ptr()]
        blocks = int(runs[-1, 8] - (-runs[-1, 6] // BLOCK)) if len(runs) else 0
        block_sums = self._scratch(dtype, blocks * kinds if threads > 1 else 0)
        self._function(name, dtype)(
            runs.ctypes.data,
            len(runs),
            *tables,
            sums.shape[-1],
            sums.data_ptr(),
            block_sums.data_ptr(),
            threads,
        )

    def _scratch(self, dtype: torch.dtype, numel: int) -> Tensor:
        """Block sums of a call, kept: as much as the largest call needed."""
        if self._block_sums[dtype].numel() < numel:
            self._block_sums[dtype] = torch.empty(numel, dtype=dtype)
        return self._block_sums[dtype]

    def _function(self, name: str, dtype: torch.dtype) -> Any:
        return getattr(self._library, f"lamb_{name}_{SUFFIXES[dtype]}")
