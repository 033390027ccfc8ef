"""Counts steps skipped for non-finite gradients, and notes options that differ over ranks, on the device."""

import torch
from torch import Tensor

from sharded_lamb.optim.explanation import explain
from sharded_lamb.optim.step_results import StepResults


class DivergedError(RuntimeError):
    """Gradients were not finite in `max_consecutive_skips` steps in a row."""


class SkipCounter:
    """Skipped steps, counted on the device; the host reads the counts one step late, so that no step waits.

    A replayed CUDA graph counts too, and only `total` reads those counts.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.limit = limit
        # [3]: skips in total, skips in a row, whether ranks differ
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._host_counts = torch.zeros(3, dtype=torch.int64, pin_memory=device.type == "cuda", device="cpu")
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def total(self) -> int:
        """Steps skipped since construction. Reads the device."""
        return int(self._counts[0].item())

    def record(self, skip: Tensor, differs: Tensor | None = None) -> None:
        """Count a step.

        Args:
            skip: bool scalar.
            differs: bool scalar, whether the options of the step differ over ranks; None: unknown.
        """
        skipped = skip.to(torch.int64)
        self._counts[0] += skipped
        self._counts[1] = (self._counts[1] + 1) * skipped
        if differs is not None:
            self._counts[2] = differs
        self._host_counts.copy_(self._counts, non_blocking=True)
        if self._arrived is not None and not torch.cuda.is_current_stream_capturing():
            self._arrived.record()

    def set_total(self, total: int) -> None:
        """Set the total, as a checkpoint stores it."""
        self._counts[0] = total
        self._host_counts[0] = total

    def reset(self) -> None:
        """Reset the skips in a row, after other weights and state were loaded."""
        self._counts[1] = 0
        self._host_counts[1] = 0

    def check(self, results: StepResults) -> bool:
        """Settle ``results``. Returns whether the options of the previous step differed over ranks.

        Raises:
            DivergedError: ``limit`` steps in a row were skipped; on every rank, with `explain`'s findings.
        """
        if self._arrived is not None:
            if torch.cuda.is_current_stream_capturing():
                return False
            self._arrived.synchronize()  # recorded in the previous step, so complete by now
        total, in_a_row, differs = self._host_counts.tolist()
        if in_a_row >= self.limit:
            raise DivergedError(self._message(total, in_a_row, results))
        results.settle(was_skipped=in_a_row > 0)
        self._host_counts[2] = 0
        return bool(differs)

    def _message(self, total: int, in_a_row: int, results: StepResults) -> str:
        bad = next((name for name, result in results.read().items() if result.bad), None)
        first = "" if bad is None else f"; the first bad parameter of the last one is {bad!r}"
        return (
            f"{in_a_row} steps in a row ({total} in all) had non-finite gradients and were skipped{first} "
            f"(max_consecutive_skips={self.limit}). The first of them:\n{explain([results])}"
        )
