"""The CUDA stream on which stage 2 reduces gradients."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ReductionStream:
    """A stream beside that of backward, on which buckets are copied, received and averaged.

    Backward's stream never waits for another rank, so a rank whose backward has a collective of the user's (SyncBN)
    reaches it. All of a reduction is on this stream, also where autograd runs a hook on another stream than the rest.
    On a CPU, or without other ranks, there is no such stream, and operations run where they are called.
    """

    def __init__(self, device: torch.device, *, has_peers: bool) -> None:
        needed = device.type == "cuda" and has_peers
        self._stream = torch.cuda.Stream(device) if needed else None  # type: ignore[no-untyped-call]

    @property
    def blocks_host(self) -> bool:
        """Whether waiting for a message blocks the host; else it blocks this stream only."""
        return self._stream is None

    @contextmanager
    def entered(self, *reads: Iterable[Tensor | None]) -> Iterator[None]:
        """Operations inside run on this stream, after all that were started on the current one.

        Args:
            reads: memory of the current stream that they use: it is not reused before they have completed.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for tensors in reads:
            for tensor in tensors:
                if tensor is not None:
                    tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The current stream waits for all that was started on this one."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
