"""Steps that are skipped for non-finite gradients, counted on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SkipCounter:
    """Steps left out, counted on the device; the host reads them one step late, so that no step waits.

    A CUDA graph that is replayed counts them too, and nothing reads them but `total`.
    """

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
        if self._arrived is not None and not torch.cuda.is_current_stream_capturing():
            self._arrived.record()

    def set_total(self, total: int) -> None:
        """As a checkpoint has it."""
        self._counts[0] = total
        self._seen[0] = total

    def reset(self) -> None:
        """Other weights and state were loaded: skips in a row start again."""
        self._counts[1] = 0
        self._seen[1] = 0

    def check(self, names: Sequence[str]) -> None:
        """Raises RuntimeError, on every rank alike, after ``limit`` skipped steps in a row."""
        if self._arrived is not None:
            if torch.cuda.is_current_stream_capturing():
                return
            self._arrived.synchronize()  # of the step before: long done
        total, in_a_row, first = self._seen.tolist()
        if in_a_row >= self.limit:
            raise RuntimeError(
                f"{in_a_row} steps in a row ({total} in all) had non-finite gradients and were skipped; the first bad "
                f"parameter of the last one is {names[first]!r}. Look for a loss that is nan or inf, too high a "
                f"learning rate or, under GradScaler, too high an init_scale (max_consecutive_skips={self.limit})"
            )
