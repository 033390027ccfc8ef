"""What a layout costs: bytes and calls of a step, from integers alone. Nothing is allocated, no rank is asked.

The names are those of `sharded_lamb.comm.collectives.Traffic`; a list holds the bytes that one rank hands to others, a
collective an entry.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sharded_lamb.core.layout import Bucket


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes an element of one bucket's or piece's memory, by role."""

    model: int  # the parameters, as forward reads them and as they are gathered
    master: int  # of what is kept of it; 0 where the parameters' own memory is what is updated
    state: int  # of each of the two moments
    wire: int  # gradients as they are exchanged
    compute: int  # gradients as they are summed and kept
    beside_weight: bool = False  # a master is read from the parameter and its own bytes together


def large_sends(
    buckets: Iterable[tuple[Bucket, Widths]], *, reduces: bool, replicas: int
) -> dict[str, list[int]]:
    """Bytes of every collective of a step that grows with the model, by name, in bucket order.

    Args:
        reduces: whether gradients are reduced here (stage 2).
        replicas: ranks that hold the same shard.
    """
    sends: dict[str, list[int]] = {"all_gather": [], "reduce_scatter": [], "all_reduce_replicas": []}
    for bucket, widths in buckets:
        others = bucket.shard_numel * (bucket.world_size - 1)
        if others:
            sends["all_gather"].append(others * widths.model)
        if others and reduces:
            sends["reduce_scatter"].append(others * widths.wire)
        if reduces and replicas > 1:
            sends["all_reduce_replicas"].append(bucket.shard_numel * widths.compute)
    return sends


def small_sends(parameters: int, sums: int, *, agreements: int) -> list[int]:
    """Bytes of the packed fp64 all-reduces of a step on several ranks.

    ``sums``: `sharded_lamb.core.rule.SUMS` a parameter.

    ``agreements``: how often (a) is made; 0: it travels with (b), see `sharded_lamb.gradients.summary`.
    """
    if not agreements:
        return [(2 + sums) * parameters * 8]
    return [(3 * parameters + 1) * 8] * agreements + [sums * parameters * 8]


def staging_bytes(buckets: Sequence[tuple[Bucket, Widths]], *, in_flight: int, sums_here: bool) -> int:
    """Memory of the exchanges of stage 2 that may be under way at once, each as large as any bucket needs.

    ``sums_here``: the other ranks' parts of this rank's shard are received and summed here (gloo), not their sum.
    """
    if not buckets:
        return 0
    sent = max(bucket.numel * widths.wire for bucket, widths in buckets)
    ranks = buckets[0][0].world_size
    received = 0 if ranks == 1 else sent // ranks * (ranks - 1 if sums_here else 1)
    return min(in_flight, len(buckets)) * (sent + received)


def update_bytes(numel: int, widths: Widths) -> int:
    """Memory traffic of the two passes over ``numel`` elements: 40 B an element in fp32, 42 with a 16-bit model.

    40 again where the masters of that are split.

    Pass 1 reads gradient, weight, m, v and writes m, v; pass 2 reads weight, m, v and writes the weight, and the
    model's copy of it where that lies apart.
    """
    weight = widths.model + widths.master if widths.beside_weight else widths.master or widths.model
    copy = widths.model if widths.master and not widths.beside_weight else 0
    return numel * (widths.compute + 3 * weight + 6 * widths.state + copy)
