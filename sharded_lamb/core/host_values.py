"""Values of the host as tensors, wherever ``torch.set_default_device`` points."""

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """``torch.tensor(values)`` on ``device``; a GPU copies from pinned memory, and the host does not wait.

    Raises:
        RuntimeError: a CUDA graph is being captured; its replays would copy from memory that is reused since.
    """
    pin = device.type == "cuda"
    if pin and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and this step needs values of the host that changed since the step before "
            "it (a learning rate, other options, which parameters have gradients): run a step with them first, or keep "
            "the learning rate in a tensor on the device"
        )
    host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=pin)
    return host.to(device, non_blocking=True)


def as_tensor(value: Any) -> Tensor:
    """A tensor as it is; a number as a tensor on the CPU (``torch.as_tensor`` moves both to the default device)."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


class HostCopy:
    """A copy of a tensor on its way to the host: from a GPU into pinned memory, and the host does not wait.

    A tensor on a CPU is not copied.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.cpu()
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> Tensor:
        """The values, on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
