"""The summary of gradients that all ranks need before any moment is written, in one packed all-reduce (a).

Slots of the fp64 vector, for P parameters, L layers (L = P without ratio blocks) and W ranks::

    [0, L)         Σg² of owned parts (non-finite: a gradient element was, or its square overflowed)
    [L, L+P)       number of ranks on which the parameter has a gradient
    [L+P, L+2P)    number of ranks with a left-over gradient that no reduction included (stage 2)
    [L+2P]         number of ranks on which GradScaler found an inf
    [L+2P+1, …)    on the first steps: Σg and Σg² of a rank's parts of replicated gradients, W slots per kind
"""

from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.core import rule
from sharded_lamb.core.host_values import to_device
from sharded_lamb.core.layers import Layers
from sharded_lamb.sharding.placements import Replicas

TOLERANCE = 1e-3
"""Relative tolerance for Σg² of the same averaged gradients over ranks; for Σg relative to √Σg²."""


@dataclass(frozen=True)
class GradientSummary:
    """The agreed summary, on the device of the update, the same bits on every rank."""

    square_sums: Tensor  # [L] fp64
    present: Tensor  # [P] fp64, number of ranks with a gradient
    left_over: Tensor  # [P] fp64, number of ranks with a left-over gradient
    bad: Tensor  # [L] bool: non-finite
    found_inf: Tensor  # bool
    totals: Tensor | None  # [2, kinds, W] Σg and Σg² of every rank's parts, by kind of `Replicas`
    agreed: bool = True  # False: this rank's own; see `summed`

    @property
    def any_bad(self) -> Tensor:
        return self.bad.any() | self.found_inf

    def norm(self, is_fp64: Tensor, scale: Tensor) -> Tensor:
        """Global norm of gradients times ``scale`` (scalar, or [L]), fp64. ``is_fp64``: [L].

        Rounded to fp32 (see `sharded_lamb.core.rule.norms`) unless all are ``is_fp64``.
        """
        if scale.ndim:
            return rule.norms((self.square_sums * scale * scale).sum(), is_fp64.all())
        return rule.norms(self.square_sums.sum(), is_fp64.all()) * scale

    def summed(self, square_sums: Tensor, present: Tensor) -> "GradientSummary":
        """The agreed summary of a `local_summary`, whose sums over ranks are given: (a) packed into (b)."""
        bad = ~square_sums.isfinite()
        return replace(self, square_sums=square_sums, present=present, bad=bad, agreed=True)

    def padded(self, layers: Layers) -> "GradientSummary":
        """The summary with more parameters, which have no gradient. ``layers``: of all."""
        return replace(
            self,
            square_sums=_padded(self.square_sums, len(layers)),
            present=_padded(self.present, len(layers.counts)),
            left_over=_padded(self.left_over, len(layers.counts)),
            bad=_padded(self.bad, len(layers)),
        )

    def without(self, removed: Collection[int], zeroed: Collection[int], layers: Layers) -> "GradientSummary":
        """The summary as if gradients of some parameters had not been there, or had been zero."""
        if not removed and not zeroed:
            return self
        device = self.present.device
        gone = _flags([param in removed for param in range(len(self.present))], device) > 0
        zero = _flags([param in zeroed for param in range(len(self.present))], device) > 0
        edited = layers.expand(gone | zero)
        return replace(
            self,
            square_sums=self.square_sums.masked_fill(edited, 0),
            present=self.present.masked_fill(gone, 0),
            bad=self.bad & ~edited,
        )

    def joined(self, other: "GradientSummary") -> "GradientSummary":
        """The summary of two sources, which share no parameter."""
        return GradientSummary(
            square_sums=self.square_sums + other.square_sums,
            present=self.present + other.present,
            left_over=self.left_over + other.left_over,
            bad=self.bad | other.bad,
            found_inf=self.found_inf | other.found_inf,
            totals=None,
        )


def agree(
    collectives: Collectives,
    square_sums: Tensor,
    present: Sequence[bool],
    left_over: Sequence[bool],
    found_inf: Tensor | None = None,
    totals: Tensor | None = None,
) -> GradientSummary:
    """Sum the summaries over ranks: one small all-reduce over all ranks, none if there is one rank.

    Args:
        square_sums: [L] fp64, Σg² of the parts that this rank owns.
        present, left_over: [P], this rank's.
        found_inf: GradScaler's, if one is in use.
        totals: [2, kinds] Σg and Σg² of this rank's parts, to compare over ranks.
    """
    topology, count, world = collectives.topology, len(present), collectives.world_size
    device, layers = square_sums.device, square_sums.numel()
    slots = 0 if totals is None else totals.numel() * world
    vector = torch.zeros(layers + 2 * count + 1 + slots, dtype=torch.float64, device=device)
    sums, of_parameters = vector[:layers], vector[layers:]
    sums.copy_(square_sums)
    of_parameters[:count] = _flags(present, device)
    if any(left_over):
        of_parameters[count : 2 * count] = _flags(left_over, device)
    if found_inf is not None:
        of_parameters[2 * count] = found_inf.to(device).reshape(())
    of_ranks = None
    if totals is not None:
        of_ranks = of_parameters[2 * count + 1 :].view(*totals.shape, world)
        of_ranks[..., topology.rank] = totals
    collectives.all_reduce_small(vector)
    return GradientSummary(
        square_sums=sums,
        present=of_parameters[:count],
        left_over=of_parameters[count : 2 * count],
        bad=~sums.isfinite(),
        found_inf=of_parameters[2 * count] > 0,
        totals=of_ranks,
    )


def _padded(values: Tensor, count: int) -> Tensor:
    """[count]: ``values``, then zeros."""
    return torch.cat([values, values.new_zeros(count - len(values))])


def _flags(flags: Sequence[bool], device: torch.device) -> Tensor:
    """[P] fp64, read-only."""
    if device.type == "cpu":
        return torch.from_numpy(np.array(flags, dtype=np.float64))  # torch.tensor takes ten times as long
    return _flags_on_device(tuple(flags), device)


@lru_cache(maxsize=16)
def _flags_on_device(flags: tuple[bool, ...], device: torch.device) -> Tensor:
    """Cached: steps pass the same flags, and a CUDA graph cannot include a copy from the host."""
    return to_device(flags, torch.float64, device)


def local_summary(square_sums: Tensor, present: Sequence[bool]) -> GradientSummary:
    """This rank's summary, for steps whose decisions need no other rank's: no clipping and no skipping."""
    counts = _flags(present, square_sums.device)
    return GradientSummary(
        square_sums=square_sums,
        present=counts,
        left_over=torch.zeros_like(counts),
        bad=torch.zeros_like(square_sums, dtype=torch.bool),
        found_inf=torch.zeros((), dtype=torch.bool, device=square_sums.device),
        totals=None,
        agreed=False,
    )


def inject_nan(grads: Sequence[Tensor | None]) -> None:
    """Fill gradients with nan, for the point "gradient" of `faults`."""
    for grad in grads:
        if grad is not None:
            grad.fill_(torch.nan)


def check_present(
    summary: GradientSummary, names: Sequence[str], world_size: int, dtensors: Container[int]
) -> None:
    """Check that every gradient is on all ranks or on none. Reads the device.

    Args:
        dtensors: indices of the parameters that are DTensors.

    Raises:
        ValueError: a gradient is on some ranks only.
    """
    partial = ((summary.present > 0) & (summary.present < world_size)).nonzero().flatten().tolist()
    if not partial:
        return
    first = partial[0]
    problem = (
        f"a gradient of {names[first]!r} on {int(summary.present[first])} of {world_size} ranks only (and of "
        f"{len(partial) - 1} more parameters)"
    )
    if first in dtensors:
        raise ValueError(
            f"there is {problem}, and it is a DTensor, of which every rank holds a part: run the same modules' "
            f"backward on all ranks of the mesh"
        )
    raise ValueError(
        f"stage=1 got {problem}: .grad must hold gradients averaged over ranks, as "
        f"DistributedDataParallel leaves them. Use DistributedDataParallel(find_unused_parameters=True), or "
        f"ShardedLamb(stage=2) on the bare model, which reduces gradients itself"
    )


def check_alike(summary: GradientSummary, replicas: Replicas) -> None:
    """Check that ranks with the same part of a gradient hold equal values. Reads the device.

    Raises:
        ValueError: they differ by more than `TOLERANCE`.
    """
    if summary.totals is None or not summary.totals.isfinite().all():
        return
    sums, squares = summary.totals.tolist()
    for kind, shard_indices in enumerate(replicas.shard_indices):
        scale = max(squares[kind])
        for rank, index in enumerate(shard_indices):
            first = shard_indices.index(index)
            total, square = sums[kind][rank], squares[kind][rank]
            gap, gap_of_squares = abs(total - sums[kind][first]), abs(square - squares[kind][first])
            if gap_of_squares > TOLERANCE * scale or gap > TOLERANCE * scale**0.5:
                problem = (
                    f"different gradients on rank {first} (Σg = {sums[kind][first]:.6g}, "
                    f"Σg² = {squares[kind][first]:.6g}) and on rank {rank} (Σg = {total:.6g}, Σg² = {square:.6g})"
                )
                raise ValueError(_mismatch_message(problem, replicas.kinds[kind]))


def _mismatch_message(problem: str, kind: str) -> str:
    if kind:
        return (
            f"DTensor parameters with {kind} have {problem}, which hold the same part of them: these ranks would "
            f"diverge. Gradients must be averaged over the axes that replicate, as fully_shard does on a 2-D mesh "
            f"(replicate, shard)"
        )
    return (
        f"stage=1 got {problem}: they are not averaged over ranks, and the "
        f"ranks would diverge. Wrap the model in DistributedDataParallel, or use "
        f"ShardedLamb(stage=2) on the bare model, which averages gradients itself"
    )
