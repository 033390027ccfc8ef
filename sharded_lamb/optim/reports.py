"""What an optimizer reports of its last step, read when someone asks."""

from collections.abc import Iterable

from sharded_lamb.optim.explanation import Explanation, explain
from sharded_lamb.optim.step_results import LayerNorms, PendingResults, StepResults


class PendingNorms:
    """The norms of a step, on their way to the host."""

    def __init__(self, pending: PendingResults) -> None:
        self._pending = pending

    def read(self) -> dict[str, LayerNorms]:
        """{name: norms} of the parameters that the step updated. Waits until they have arrived."""
        return {name: result.norms for name, result in self._pending.read().items() if result.updated}


class StepReports:
    """Readers of `StepResults`: no collective, the same on every rank, nothing computed before they are called."""

    def _step_results(self) -> Iterable[StepResults]:
        raise NotImplementedError

    def fetch_layer_norms(self) -> PendingNorms:
        """Start to copy the last step's norms to the host, into pinned memory, without waiting for the device.

        Returns:
            An object whose ``read()`` gives, later, what `layer_norms` would give now.
        """
        last = [step for results in self._step_results() for step in results.last]
        return PendingNorms(PendingResults(last))

    def layer_norms(self) -> dict[str, LayerNorms]:
        """{name: norms} of the parameters that the last step updated; none if it was skipped.

        From the sums that the step made over ranks anyway: no collective, the same on every rank. Waits for the device.
        ‖g‖ is the averaged gradient's, unscaled, before clipping; under DeepSpeed, which clips before `step`, after it.
        It is NaN under DeepSpeed with ``skip_nonfinite=False``, where no step sums it. With ``nesterov`` (LANS), ‖u‖
        and ratio are those of the first direction. After a step of `Lamb` that GradScaler skips: those of the step
        before.
        """
        return self.fetch_layer_norms().read()

    def trust_ratios(self) -> dict[str, float]:
        """{name: ratio} of the parameters that the last step updated: `layer_norms` without the norms."""
        return {name: norms.ratio for name, norms in self.layer_norms().items()}

    def explain(self) -> Explanation:
        """What the last steps say about a divergence: causes, the parameters that show them, what helps.

        Which gradients were non-finite (in the first of the steps skipped in a row) and their norms in the step before;
        gradients that jumped; ratios at a clamp, at 1 or far from the others, and why. Call it after the step in
        question. Makes no collective, the same on every rank. Waits for the device.
        """
        return explain(self._step_results())
