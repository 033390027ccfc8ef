"""How updated parameters travel to the ranks that share them: the outbound counterpart of `gradients.exchange`."""

from typing import Protocol

from torch import Tensor

from sharded_lamb.comm.collectives import Collectives, Pending


class ParamGather(Protocol):
    """The gather of one bucket, again in every step. Both calls are made in one order on every rank."""

    def start(self) -> None:
        """Send this rank's shard, whose weights are written; it must not change before `finish`."""

    def finish(self) -> None:
        """Wait, and complete: the whole bucket then holds what its ranks wrote. Does nothing if none was started."""


class InPlaceGather:
    """Weights as they are, from place to place: nothing is left to complete after the wait."""

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
