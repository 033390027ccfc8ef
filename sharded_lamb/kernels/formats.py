"""The registry of state formats, and which one a kind of state has."""

import torch

from sharded_lamb.kernels.remainders import RemainderFormat
from sharded_lamb.kernels.state_format import PlainFormat, StateFormat

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

FORMATS: dict[torch.dtype, StateFormat] = {
    **{dtype: PlainFormat(dtype) for dtype in FLOATS},
    RemainderFormat.storage: RemainderFormat(),
}
"""By storage dtype. Kernels load and store each (`native.DTYPES`, `triton_device`; `reference` asks the format)."""


def of_memory(stored: torch.dtype) -> StateFormat:
    """The format of memory of this dtype."""
    return FORMATS[stored]


def of_moments(state_dtype: torch.dtype) -> StateFormat:
    """For ``state_dtype``."""
    return FORMATS[state_dtype]


def of_masters(
    model: torch.dtype, master: torch.dtype, *, store_param_remainders: bool
) -> StateFormat | None:
    """For ``master_dtype`` beside weights of dtype ``model``; None: the weights themselves are what steps update."""
    if master == model:
        return None
    if store_param_remainders and (model, master) == (torch.bfloat16, torch.float32):
        return FORMATS[RemainderFormat.storage]
    return FORMATS[master]
