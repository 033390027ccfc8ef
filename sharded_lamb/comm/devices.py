"""The device of a rank, its backend and its queue of work: CUDA, ROCm and every other `torch.accelerator`."""

import os

import torch
import torch.distributed as dist

OF_HERE = "default: the accelerator, where there is one"
"""Help of ``--device``."""


def of_this_rank(kind: str | None = None) -> torch.device:
    """The CPU, or this rank's accelerator, by LOCAL_RANK, which becomes the current one.

    Args:
        kind: "cpu", "cuda", "xpu" …; None: the accelerator, where there is one.

    Raises:
        ValueError: another kind of device than this machine has.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = ["cpu", *([] if accelerator is None else [accelerator.type])]
    kind = kind or kinds[-1]
    if kind not in kinds:
        raise ValueError(f"--device {kind}: expected {' or '.join(kinds)} on this machine")
    if kind == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    torch.accelerator.set_device_index(local)
    return torch.device(kind, local)


def backends(device: torch.device) -> str:
    """For ``init_process_group``: gloo for the CPU, beside the accelerator's own backend."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def join_ranks(kind: str | None = None) -> torch.device:
    """Joins torchrun's process group, if there is one; this rank's device, as `of_this_rank`. Collective."""
    device = of_this_rank(kind)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backends(device))
    return device


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what was launched."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
