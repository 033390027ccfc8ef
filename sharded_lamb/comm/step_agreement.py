"""Ranks compare at every step what they are about to do, in an all-reduce that the step makes anyway.

Each rank adds `SLOTS` numbers to the all-reduce: d and d² for each of `LANES` 16-bit lanes d of a digest. All W ranks
have the same d if and only if W Σd² = (Σd)².
"""

import hashlib
import struct
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.consistency import Description, check_consistency
from sharded_lamb.core.host_values import to_device

LANES = 3
SLOTS = 2 * LANES
"""fp64 numbers that the comparison adds to an all-reduce."""


class StepAgreement:
    """The comparison of one optimizer. A step with the facts of the previous step computes and copies nothing."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._facts: Hashable = None
        self._slots: Tensor | None = None

    def all_reduce(
        self, parts: Sequence[Tensor], facts: Hashable, on_device: Sequence[Tensor] = ()
    ) -> Tensor:
        """Sum ``parts`` (fp64) over all ranks, in place, in one small all-reduce with a digest.

        Args:
            facts: equal on all ranks, with the same ``repr``.
            on_device: scalars, equal on all ranks, that the host must not read.

        Returns:
            Whether ranks differ in facts or scalars: bool scalar on the device of ``parts``.
        """
        device = parts[0].device
        if self._collectives.world_size == 1:
            return torch.zeros((), dtype=torch.bool, device=device)
        vector = torch.cat([part.reshape(-1) for part in parts] + [self._digest(facts, on_device, device)])
        self._collectives.all_reduce_small(vector)
        *sums, slots = torch.split(vector, [*(part.numel() for part in parts), SLOTS])
        for part, total in zip(parts, sums, strict=True):
            part.copy_(total.view_as(part))
        totals, squares = slots.to(torch.int64).view(2, LANES)
        differs: Tensor = self._collectives.world_size * squares != totals * totals
        return differs.any()

    def _digest(self, facts: Hashable, on_device: Sequence[Tensor], device: torch.device) -> Tensor:
        """[SLOTS] fp64."""
        if self._slots is None or facts != self._facts:
            lanes = struct.unpack(
                "<3H", hashlib.blake2b(repr(facts).encode(), digest_size=2 * LANES).digest()
            )
            slots = [float(lane) for lane in lanes] + [float(lane * lane) for lane in lanes]
            self._facts, self._slots = facts, to_device(slots, torch.float64, device)
        if not on_device:
            return self._slots
        scalars = torch.stack([x.to(device, torch.float64, non_blocking=True).reshape(()) for x in on_device])
        bits, weights = scalars.view(torch.int64), 2 * torch.arange(len(on_device), device=device) + 1
        # The upper 48 bits of each scalar; odd weights keep a difference in any one of them.
        lanes_of = torch.stack([(((bits >> shift) & 0xFFFF) * weights).sum() for shift in (48, 32, 16)])
        lanes_of = (lanes_of + self._slots[:LANES].to(torch.int64)) & 0xFFFF
        return torch.cat([lanes_of, lanes_of * lanes_of]).to(torch.float64)

    def refuse(self, described: Description) -> None:
        """Compare the facts in full, on every rank, after `all_reduce` has found a difference. Collective.

        Raises:
            ValueError: always; the message names the first difference of each rank.
        """
        check_consistency(
            self._collectives.topology,
            described,
            subject="the options of a step",
            remedy="No weight was changed, but moments may have been. Write the same options, and edit .grad "
            "alike (None, scaled, zeroed), on every rank: give schedulers a metric that is reduced over ranks",
        )
        raise ValueError(
            "ranks disagreed on the options of the previous step, and agree now: no weight was changed"
        )
