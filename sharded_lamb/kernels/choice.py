"""Backend selection: the fastest that works on a device, or the requested one."""

import logging
import os
from functools import lru_cache

import torch

from sharded_lamb.kernels import native, triton_kernel
from sharded_lamb.kernels.compiling import CompileError
from sharded_lamb.kernels.protocol import Kernel
from sharded_lamb.kernels.reference import ReferenceKernel

logger = logging.getLogger("sharded_lamb")

ENVIRONMENT = "SHARDED_LAMB_KERNEL"
"""Environment variable that names the backend for ``kernel="auto"``."""

NAMES = ("auto", "torch", "cpp", "triton")
CPU = torch.device("cpu")


def available(device: torch.device = CPU) -> list[str]:
    """The backends that work on ``device``."""
    return [name for name in NAMES[1:] if why_not(name, device) is None]


def load(name: str, device: torch.device = CPU) -> Kernel:
    """The backend ``name`` on ``device``.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend does not work on ``device``; the message gives the reason.
    """
    if name not in NAMES[1:]:
        raise ValueError(f"kernel must be one of {NAMES}, got {name!r}")
    reason = why_not(name, device)
    if reason is not None:
        raise RuntimeError(f"kernel {name!r} cannot run on {device}: {reason}")
    if name == "cpp":
        return native.CppKernel()
    if name == "triton":
        return triton_kernel.TritonKernel()
    return ReferenceKernel()


def choose(name: str, device: torch.device) -> Kernel:
    """The backend ``name``; "auto" selects the one that ``SHARDED_LAMB_KERNEL`` names, else the fastest that works.

    Warns once if the fastest for this kind of device does not work.

    Raises:
        ValueError: unknown name, in ``name`` or in the environment variable.
        RuntimeError: the named backend does not work on ``device``.
    """
    if name == "auto":
        name = os.environ.get(ENVIRONMENT) or "auto"
        if name not in NAMES:
            raise ValueError(f"{ENVIRONMENT} must name one of {NAMES}, got {name!r}")
    if name != "auto":
        return load(name, device)
    best = "cpp" if device.type == "cpu" else "triton"
    reason = why_not(best, device)
    if reason is None:
        return load(best, device)
    _warn(f"the {best} kernel cannot run on {device.type}, and stock torch operations are slower: {reason}")
    return load("torch", device)


def why_not(name: str, device: torch.device = CPU) -> str | None:
    """The reason why a backend does not work on a device; None if it works."""
    if name == "torch":
        return None
    if name == "cpp":
        return _why_no_cpp() if device.type == "cpu" else "it is for CPUs"
    return triton_kernel.usable(device)


@lru_cache(maxsize=1)
def _why_no_cpp() -> str | None:
    try:
        native.library()
    except CompileError as error:
        return str(error)
    return None


@lru_cache(maxsize=8)
def _warn(message: str) -> None:
    """Log once per process."""
    logger.warning(message)
