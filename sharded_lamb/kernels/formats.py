"""The registry of state formats, and the format of each kind of state."""

import torch

from sharded_lamb.kernels.remainders import STORAGE, RemainderFormat
from sharded_lamb.kernels.state_format import PlainFormat, StateFormat

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

FORMATS: dict[torch.dtype, StateFormat] = {
    **{dtype: PlainFormat(dtype) for dtype in FLOATS},
    **{dtype: RemainderFormat(bits) for bits, dtype in STORAGE.items()},
}
"""{storage dtype: format}. Kernels load and store each (`native.DTYPES`, `triton_device`; `reference` calls it)."""


def of_memory(stored: torch.dtype) -> StateFormat:
    """The format of memory of dtype ``stored``."""
    return FORMATS[stored]


def of_moments(state_dtype: torch.dtype) -> StateFormat:
    """The format of both moments for the option ``state_dtype``."""
    return FORMATS[state_dtype]


def of_masters(model: torch.dtype, master: torch.dtype, *, remainder_bits: int) -> StateFormat | None:
    """The format of ``master_dtype`` masters of ``model`` weights; None: steps update the weights themselves.

    ``remainder_bits``: of ``store_param_remainders``; 0: whole masters.
    """
    if master == model:
        return None
    if remainder_bits and (model, master) == (torch.bfloat16, torch.float32):
        return FORMATS[STORAGE[remainder_bits]]
    return FORMATS[master]
