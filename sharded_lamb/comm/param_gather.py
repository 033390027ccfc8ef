"""The all-gather of updated parameters: the outbound counterpart of `gradients.exchange`."""

from typing import Protocol

import torch
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.pending import Pending
from sharded_lamb.comm.wire_formats import WireFormat, chunks
from sharded_lamb.core.layout import BLOCK

IN_FLIGHT = 4
"""Compressed messages that a rank holds at once; a gather beyond waits for the oldest."""


class ParamGather(Protocol):
    """The all-gather of one bucket, reused in every step. All ranks start and finish them in the same order."""

    def resync(self) -> None:
        """Before a step: read weights that the user wrote, where kernels do not. Local."""

    def start(self) -> None:
        """Start to send this rank's updated shard; it must not change before `finish`."""

    def finish(self) -> None:
        """Wait, and complete the whole bucket. Does nothing if no gather was started."""

    def message_bytes(self) -> int:
        """Bytes of memory for messages in flight."""


class InPlaceGather:
    """All-gather of the weights in place; needs no completion after the wait."""

    def __init__(self, flat: Tensor, collectives: Collectives) -> None:
        """``flat``: [bucket] model dtype; rank r's shard is the r-th equal part."""
        self._flat, self._collectives = flat, collectives
        self._pending: Pending | None = None

    def resync(self) -> None:
        """Does nothing: pass 1 compares masters with the weights in ``flat``."""

    def start(self) -> None:
        """See `ParamGather`."""
        self._pending = self._collectives.all_gather(self._flat)

    def finish(self) -> None:
        """See `ParamGather`."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def message_bytes(self) -> int:
        """0: messages are the weights themselves."""
        return 0


class CompressedGather:
    """All-gather of masters, rounded to the model's dtype and encoded; every rank decodes all parts, its own included.

    The kernels update masters alone. Between steps an element of this rank's shard of the model is what encoding and
    decoding its master gives (or, loaded from a run without this, its master's rounding). One that is neither was
    written by the user, and becomes the master. A scale depends on the masters of its block alone, so that nothing is
    stored for this comparison, and a weight that the user writes changes no other master.

    A step holds up to `IN_FLIGHT` messages, each as large as its bucket is in ``format``.
    """

    def __init__(
        self,
        flat: Tensor,
        masters: Tensor,
        collectives: Collectives,
        format: WireFormat,
        in_flight: "list[CompressedGather]",
    ) -> None:
        """Gathers ``masters`` into ``flat``.

        Args:
            flat: [bucket] model dtype; rank r's shard is the r-th equal part.
            masters: [shard] floating point: this rank's.
            in_flight: the gathers that were started, oldest first; shared by those of one optimizer.
        """
        self._parts = flat.view(collectives.shard_count, -1, BLOCK)  # [ranks, blocks, BLOCK]
        self._own = self._parts[collectives.topology.shard_rank]
        self._masters = masters.view(-1, BLOCK)
        self._collectives, self._format, self._in_flight = collectives, format, in_flight
        self._message: Tensor | None = None  # [ranks, blocks, row] storage dtype
        self._pending: Pending | None = None

    def resync(self) -> None:
        """Replace masters by the weights that the user wrote, and encode these, so that calling it again does nothing.

        On a CPU it writes only where it finds such weights.
        """
        for rows in chunks(len(self._own), self._own.device):
            masters, own = self._masters[rows], self._own[rows]
            rounded = masters.to(own.dtype)
            received = self._transferred(rounded)
            on_cpu = own.device.type == "cpu"
            if on_cpu and torch.equal(own, received):
                continue
            is_written = (own != received) & (own != rounded)
            if not on_cpu or is_written.any():
                masters.copy_(torch.where(is_written, own.to(masters.dtype), masters))
                own.copy_(self._transferred(masters.to(own.dtype)))

    def _transferred(self, weights: Tensor) -> Tensor:
        """What all ranks receive for ``weights``: [blocks, BLOCK] model dtype."""
        return self._format.decode(self._format.encode(weights), weights.dtype)

    def start(self) -> None:
        """See `ParamGather`. Writes this rank's shard of the model."""
        while len(self._in_flight) >= IN_FLIGHT:
            self._in_flight[0].finish()
        ranks, blocks, _ = self._parts.shape
        shape, storage = (ranks, blocks, self._format.row), self._format.storage
        self._message = torch.empty(shape, dtype=storage, device=self._own.device)
        part = self._message[self._collectives.topology.shard_rank]
        for rows in chunks(len(self._own), self._own.device):
            encoded = self._format.encode(self._masters[rows].to(self._own.dtype))
            part[rows] = encoded
            self._own[rows] = self._format.decode(encoded, self._own.dtype)
        self._pending = self._collectives.all_gather(self._message.view(-1))
        self._in_flight.append(self)

    def finish(self) -> None:
        """See `ParamGather`."""
        if self._pending is None or self._message is None:
            return
        self._pending.wait()
        for rank, (message, weights) in enumerate(zip(self._message, self._parts, strict=True)):
            if rank != self._collectives.topology.shard_rank:
                for rows in chunks(len(self._own), self._own.device):
                    weights[rows] = self._format.decode(message[rows], weights.dtype)
        self._message = self._pending = None
        self._in_flight.remove(self)

    def message_bytes(self) -> int:
        """See `ParamGather`."""
        return 0 if self._message is None else self._message.nbytes
