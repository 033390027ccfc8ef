"""What all ranks must know of the gradients before any moment is written, in one packed all-reduce (a).

Slots of the fp64 vector, for P parameters and W ranks::

    [0, P)      Σg², each rank its slices (non-finite: a gradient element was, or its square overflows)
    [P, 2P)     on how many ranks the parameter has a gradient
    [2P, 3P)    on how many ranks gradient is left over that no reduction took (stage 2)
    [3P]        on how many ranks GradScaler found an inf
    [3P+1, …)   on the first steps of stage 1: Σg and Σg² of whole gradients, W slots each
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_lamb import rule
from sharded_lamb.collectives import Collectives

SquareSums = Callable[[], Tensor]
"""[P] fp64: Σg² of this rank's slices of every parameter, as the gradient shards are now."""

TOLERANCE = 1e-3
"""How far Σg² of the same averaged gradients may differ over ranks, relative; Σg likewise, of √Σg²."""


@dataclass(frozen=True)
class GradientFacts:
    """The agreed facts, on the device of the update, the same bits on every rank."""

    square_sums: Tensor  # [P] fp64
    present: Tensor  # [P] fp64, ranks that have a gradient
    left_over: Tensor  # [P] fp64
    bad: Tensor  # [P] bool: non-finite
    found_inf: Tensor  # bool
    totals: Tensor | None  # [2, W] Σg and Σg² of every rank's whole gradients

    @property
    def any_bad(self) -> Tensor:
        return self.bad.any() | self.found_inf

    def norm(self, wide: Tensor) -> Tensor:
        """Global gradient norm, fp64; rounded to fp32 (see `sharded_lamb.rule.norms`) unless all are ``wide``."""
        return rule.norms(self.square_sums.sum(), wide.all())


def agree(
    collectives: Collectives,
    square_sums: Tensor,
    present: Sequence[bool],
    left_over: Sequence[bool],
    found_inf: Tensor | None = None,
    totals: Tensor | None = None,
) -> GradientFacts:
    """Make this rank's facts everyone's. One small all-reduce over everyone; none on one rank.

    Args:
        square_sums: [P] fp64, Σg² of this rank's slices.
        present, left_over: [P], this rank's.
        found_inf: GradScaler's, if one is in use.
        totals: [2] Σg and Σg² of this rank's whole gradients, to compare over ranks.
    """
    topology, count, world = collectives.topology, len(present), collectives.world_size
    device = square_sums.device
    vector = torch.zeros(3 * count + 1 + (2 * world if totals is not None else 0), dtype=torch.float64)
    vector[count : 2 * count] = torch.tensor(present, dtype=torch.float64)
    vector[2 * count : 3 * count] = torch.tensor(left_over, dtype=torch.float64)
    vector = vector.to(device, non_blocking=True)
    if topology.is_first_replica:
        vector[:count] = square_sums
    if found_inf is not None:
        vector[3 * count] = found_inf.to(device).reshape(())
    if totals is not None:
        vector[3 * count + 1 :].view(2, world)[:, topology.rank] = totals
    collectives.all_reduce_small(vector)
    sums = vector[:count]
    return GradientFacts(
        square_sums=sums,
        present=vector[count : 2 * count],
        left_over=vector[2 * count : 3 * count],
        bad=~sums.isfinite(),
        found_inf=vector[3 * count] > 0,
        totals=vector[3 * count + 1 :].view(2, world) if totals is not None else None,
    )


def check_gradient(name: str, grad: Tensor) -> None:
    """Raises TypeError for a sparse gradient, as torch's own Adam does."""
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {name!r} has layout {grad.layout}: LAMB needs dense gradients "
            f"(torch.nn.Embedding(sparse=False))"
        )


def check_averaged(facts: GradientFacts, names: Sequence[str], world_size: int) -> None:
    """Stage 1: gradients must be everywhere and the same. Reads the device.

    Raises:
        ValueError: a gradient is on some ranks only, or the ranks' gradients differ by more than `TOLERANCE`.
    """
    present = facts.present.tolist()
    partial = [name for name, count in zip(names, present, strict=True) if 0 < count < world_size]
    if partial:
        count = int(present[list(names).index(partial[0])])
        raise ValueError(
            f"stage=1 got a gradient of {partial[0]!r} on {count} of {world_size} ranks only (and of "
            f"{len(partial) - 1} more parameters): .grad must hold gradients averaged over ranks, as "
            f"DistributedDataParallel leaves them. Use DistributedDataParallel(find_unused_parameters=True), or "
            f"ShardedLamb(stage=2) on the bare model, which reduces gradients itself"
        )
    if facts.totals is None or not facts.totals.isfinite().all():
        return
    sums, squares = facts.totals.tolist()
    scale = max(squares)
    for rank, (total, square) in enumerate(zip(sums, squares, strict=True)):
        if abs(square - squares[0]) > TOLERANCE * scale or abs(total - sums[0]) > TOLERANCE * scale**0.5:
            raise ValueError(
                f"stage=1 got different gradients on rank 0 (Σg = {sums[0]:.6g}, Σg² = {squares[0]:.6g}) and on "
                f"rank {rank} (Σg = {total:.6g}, Σg² = {square:.6g}): they are not averaged over ranks, and every "
                f"rank would train on its own. Wrap the model in DistributedDataParallel, or use "
                f"ShardedLamb(stage=2) on the bare model, which averages gradients itself"
            )


class SkipCounter:
    """Steps left out, counted on the device; the host reads them one step late, so that no step waits."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self.limit = limit
        self._counts = torch.zeros(
            3, dtype=torch.int64, device=device
        )  # in all, in a row, the last's first bad one
        self._seen = torch.zeros(3, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def total(self) -> int:
        """Steps left out since construction. Reads the device."""
        return int(self._counts[0].item())

    def record(self, skip: Tensor, bad: Tensor) -> None:
        """``skip``: bool scalar; ``bad``: [P] bool."""
        skipped = skip.to(torch.int64)
        self._counts[0] += skipped
        self._counts[1] = (self._counts[1] + 1) * skipped
        self._counts[2] = torch.where(skip, bad.to(torch.int64).argmax(), self._counts[2])
        self._seen.copy_(self._counts, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def reset(self) -> None:
        """Other weights and state were loaded: skips in a row start again."""
        self._counts[1] = 0
        self._seen[1] = 0

    def check(self, names: Sequence[str]) -> None:
        """Raises RuntimeError, on every rank alike, after ``limit`` skipped steps in a row."""
        if self._arrived is not None:
            self._arrived.synchronize()  # of the step before: long done
        total, in_a_row, first = self._seen.tolist()
        if in_a_row >= self.limit:
            raise RuntimeError(
                f"{in_a_row} steps in a row ({total} in all) had non-finite gradients and were skipped; the first bad "
                f"parameter of the last one is {names[first]!r}. Look for a loss that is nan or inf, too high a "
                f"learning rate or, under GradScaler, too high an init_scale (max_consecutive_skips={self.limit})"
            )
