"""The registry of state formats, and the format of each kind of state."""

import torch

from sharded_lamb.kernels.block_codes import BlockFormat
from sharded_lamb.kernels.remainders import STORAGE, RemainderFormat
from sharded_lamb.kernels.state_format import Moments, PlainFormat, StateFormat

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CODES = (BlockFormat(signed=True), BlockFormat(signed=False))

MASTERS: dict[torch.dtype, StateFormat] = {
    **{dtype: PlainFormat(dtype) for dtype in FLOATS},
    **{dtype: RemainderFormat(bits) for bits, dtype in STORAGE.items()},
}
"""{storage dtype: format} of masters. Kernels load and store each (`native.DTYPES`, `triton_memory`; `reference` calls
it)."""

MOMENTS: dict[torch.dtype, Moments] = {
    **{dtype: (PlainFormat(dtype), PlainFormat(dtype)) for dtype in FLOATS},
    BlockFormat.storage: CODES,
}
"""{storage dtype: formats} of moments, likewise."""

STATE_DTYPES = {**{dtype: dtype for dtype in FLOATS}, torch.int8: BlockFormat.storage}
"""{option ``state_dtype``: storage dtype}."""


def of_memory(stored: torch.dtype) -> StateFormat:
    """The format of masters in memory of dtype ``stored``."""
    return MASTERS[stored]


def of_moment(kind: str, stored: torch.dtype) -> StateFormat:
    """The format of "exp_avg" or "exp_avg_sq" in memory of dtype ``stored``."""
    return MOMENTS[stored][kind == "exp_avg_sq"]


def of_moments(state_dtype: torch.dtype) -> Moments:
    """The formats of both moments for the option ``state_dtype``."""
    return MOMENTS[STATE_DTYPES[state_dtype]]


def of_masters(model: torch.dtype, master: torch.dtype, *, remainder_bits: int) -> StateFormat | None:
    """The format of ``master_dtype`` masters of ``model`` weights; None: steps update the weights themselves.

    ``remainder_bits``: of ``store_param_remainders``; 0: whole masters.
    """
    if master == model:
        return None
    if remainder_bits and (model, master) == (torch.bfloat16, torch.float32):
        return MASTERS[STORAGE[remainder_bits]]
    return MASTERS[master]
