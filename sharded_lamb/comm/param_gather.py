"""The all-gather of updated parameters: the outbound counterpart of `gradients.exchange`."""

from typing import Protocol

from torch import Tensor

from sharded_lamb.comm.collectives import Collectives, Pending


class ParamGather(Protocol):
    """The all-gather of one bucket, reused in every step. All ranks make both calls in the same order."""

    def start(self) -> None:
        """Start to send this rank's updated shard; it must not change before `finish`."""

    def finish(self) -> None:
        """Wait, and complete the whole bucket. Does nothing if no gather was started."""


class InPlaceGather:
    """All-gather of the weights in place; needs no completion after the wait."""

    def __init__(self, flat: Tensor, collectives: Collectives) -> None:
        """``flat``: [bucket] model dtype; rank r's shard is the r-th equal part."""
        self._flat, self._collectives = flat, collectives
        self._pending: Pending | None = None

    def start(self) -> None:
        """See `ParamGather`."""
        self._pending = self._collectives.all_gather(self._flat)

    def finish(self) -> None:
        """See `ParamGather`."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
