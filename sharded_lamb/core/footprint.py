"""Cost of a layout: bytes and collectives of a step, computed from integers. Allocates nothing, sends nothing.

Names are those of `sharded_lamb.comm.collectives.Traffic`; a list holds the bytes that one rank sends, one entry a
collective.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sharded_lamb.core.layout import BLOCK, Bucket


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes per element of the memory of one bucket or DTensor shard, by role."""

    model: int  # parameters as forward reads them
    master: int  # stored masters; 0 where the update writes the parameters themselves
    state: float  # each of the two moments
    wire: float  # gradients in the reduce-scatter
    compute: int  # gradients as they are summed and stored
    beside_weight: bool = False  # decoding a master reads the parameter too (remainders)
    message: int | None = (
        None  # bytes per block in a compressed all-gather; None: parameters travel as they are
    )
    coded: bool = False  # whether gradients are encoded, which their owner decodes and sums


def large_sends(
    buckets: Iterable[tuple[Bucket, Widths]], *, reduces: bool, replicas: int
) -> dict[str, list[int]]:
    """Bytes of every collective of a step whose size grows with the model, by name, in bucket order.

    Args:
        reduces: whether this optimizer reduces gradients (stage 2).
        replicas: number of ranks that hold the same shard.
    """
    sends: dict[str, list[int]] = {"all_gather": [], "reduce_scatter": [], "all_reduce_replicas": []}
    for bucket, widths in buckets:
        others = bucket.shard_numel * (bucket.world_size - 1)
        if others:
            message = BLOCK * widths.model if widths.message is None else widths.message
            sends["all_gather"].append(others // BLOCK * message)
        if others and reduces:
            sends["reduce_scatter"].append(int(others * widths.wire))
        if reduces and replicas > 1:
            sends["all_reduce_replicas"].append(bucket.shard_numel * widths.compute)
    return sends


def small_sends(parameters: int, layers: int, sums: int, *, digest: int, agreements: int) -> list[int]:
    """Bytes of the packed fp64 all-reduces of a step on several ranks.

    Args:
        layers: parameters, and their ratio blocks instead of those that have some.
        sums: numbers per layer in (b), of `sharded_lamb.core.rule.sums_of`.
        digest: `sharded_lamb.comm.step_agreement.SLOTS`, in (b).
        agreements: number of times that all-reduce (a) is made; 0: (a) is packed into (b), see
            `sharded_lamb.gradients.summary`.
    """
    if not agreements:
        return [(parameters + (1 + sums) * layers + digest) * 8]
    return [(2 * parameters + layers + 1) * 8] * agreements + [(sums * layers + digest) * 8]


def staging_bytes(buckets: Sequence[tuple[Bucket, Widths]], *, in_flight: int, sums_here: bool) -> int:
    """Bytes of staging for the exchanges of stage 2 in flight at once, each as large as the largest bucket needs.

    ``sums_here``: this rank receives the other ranks' parts of its shard and sums them (gloo), instead of their sum. So
    it does with encoded gradients.
    """
    if not buckets:
        return 0
    sent = max(int(bucket.numel * widths.wire) for bucket, widths in buckets)
    others = buckets[0][0].world_size - 1
    received = max(
        int(bucket.shard_numel * widths.wire) * (others if sums_here or widths.coded else min(others, 1))
        for bucket, widths in buckets
    )
    return min(in_flight, len(buckets)) * (sent + received)


def update_bytes(numel: int, widths: Widths) -> int:
    """Bytes of memory traffic of the two passes over ``numel`` elements.

    40 B per element in fp32; 44 with a 16-bit model and fp32 masters; 40 with a 16-bit model and remainders.

    Pass 1 reads gradient, weight, m, v and writes m, v; pass 2 reads weight, m, v and writes the weight. Where masters
    are separate, pass 1 also reads the model's copy and pass 2 writes it; with a compressed all-gather the comparison
    and the encoding do, which read the masters once more each.
    """
    weight = widths.model + widths.master if widths.beside_weight else widths.master or widths.model
    copy = widths.model if widths.master and not widths.beside_weight else 0
    sweeps = 3 if widths.message is None else 5
    return int(numel * (widths.compute + sweeps * weight + 6 * widths.state + 2 * copy))
