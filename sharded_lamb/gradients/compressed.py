"""Encoded gradients on their way to the shards' owners, who decode and sum them: ``reduce_dtype``.

Every contribution is rounded alike, the owner's own too, and summed in the compute dtype in rank order, so that the
average has the same bits on every backend. What a rank sends depends on its gradient, block by block, and on the step
alone. On one rank gradients are rounded likewise.

Codes of 8 bits are rounded by chance: to nearest, an element below 2⁻¹⁸ of its block's largest would be 0 in every
step, and its weight would never change. The random numbers are those of 8-bit moments (`kernels.block_codes`): a hash
of the gradient's bits and of the number of steps that the parameter has had.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.pending import Pending
from sharded_lamb.comm.wire_formats import WireFormat, chunks
from sharded_lamb.core.layout import BLOCK
from sharded_lamb.kernels import ReceivedShards
from sharded_lamb.kernels.block_codes import random_bits
from sharded_lamb.sharding.buckets import FlatBucket, flattened


class CompressedExchange:
    """An `Exchange` of one message from each rank to each other one, point to point.

    Beside the messages it needs one decoded sum, [shard] compute dtype, until that is averaged.
    """

    reads_gradients = False

    def __init__(
        self, bucket: FlatBucket, sent: Tensor, received: Tensor, collectives: Collectives, format: WireFormat
    ) -> None:
        """``sent``: [bucket / BLOCK, row]; ``received``: [ranks - 1, shard / BLOCK, row]; ``format``'s storage."""
        self._bucket, self._collectives, self._format = bucket, collectives, format
        self._sent, self._received = sent, received
        plan, device = bucket.plan, bucket.flat.device
        ends = [offset + numel for offset, numel in zip(plan.offsets, plan.numels, strict=True)]
        self._chunks = [
            (rows, [*_overlaps(plan.offsets, ends, rows.start * BLOCK, rows.stop * BLOCK)])
            for rows in chunks(len(sent), device)
        ]
        owners = torch.full((len(sent),), plan.params[0], dtype=torch.int32, device="cpu")
        for param, offset, end in zip(plan.params, plan.offsets, ends, strict=True):
            owners[offset // BLOCK : -(-end // BLOCK)] = param
        self._owners = owners.to(device)  # the parameter of each block; in padding any

    def start(self, grads: Sequence[Tensor | None], steps: Tensor) -> Pending:
        """See `Exchange`."""
        with self._collectives.traffic.computing("encode gradients"):
            self._encode(grads, steps)
        ranks, here = self._collectives.shard_count, self._collectives.topology.shard_rank
        outgoing, incoming = [], []
        messages = self._sent.view(ranks, -1)
        for distance in range(1, ranks):  # all ranks exchange at the same distance at the same time
            source, target = (here - distance) % ranks, (here + distance) % ranks
            incoming.append((source, self._received[source - (source > here)].view(-1)))
            outgoing.append((target, messages[target]))
        return self._collectives.exchange(outgoing, incoming)

    def _encode(self, grads: Sequence[Tensor | None], steps: Tensor) -> None:
        flat = [
            None if grad is None else flattened(grad, strides)
            for grad, strides in zip(grads, self._bucket.strides, strict=True)
        ]
        compute, device = self._bucket.precision.compute, self._sent.device
        for rows, overlaps in self._chunks:
            values = torch.zeros((rows.stop - rows.start) * BLOCK, dtype=compute, device=device)
            targets, sources = [], []
            for position, start, length, at in overlaps:
                if (grad := flat[position]) is not None:
                    targets.append(values[at : at + length])
                    sources.append(grad[start : start + length])
            if targets:
                torch._foreach_copy_(targets, sources)
            values, random = values.view(-1, BLOCK), None
            if self._format.rounds_randomly:
                random = random_bits(values, steps[self._owners[rows]][:, None])
            self._sent[rows] = self._format.encode(values, random)

    def received(self, grads: Sequence[Tensor | None]) -> ReceivedShards:
        """See `Exchange`: one part, the sum over the ranks of the shard group."""
        ranks, here = self._collectives.shard_count, self._collectives.topology.shard_rank
        messages = [*self._received]
        messages.insert(here, self._sent.view(ranks, -1, self._format.row)[here])
        compute = self._bucket.precision.compute
        total = torch.empty(len(messages[0]), BLOCK, dtype=compute, device=self._sent.device)
        for rows in chunks(len(total), total.device):
            first, *others = (self._format.decode(m[rows], torch.float32).to(compute) for m in messages)
            for part in others:
                first += part
            total[rows] = first
        return ReceivedShards(total.view(1, -1), self._collectives.world_size)


def _overlaps(
    starts: Sequence[int], ends: Sequence[int], low: int, high: int
) -> "list[tuple[int, int, int, int]]":
    """(position, first element, number of elements, element of the chunk) of parameters inside [low, high)."""
    found = []
    for position, (start, end) in enumerate(zip(starts, ends, strict=True)):
        first, stop = max(start, low), min(end, high)
        if first < stop:
            found.append((position, first - start, stop - first, first - low))
    return found
