"""Norms of every parameter over training: a recorder; sinks for TensorBoard, Weights & Biases, MLflow and a picture.

One rank is enough: norms are the same on all, and recording makes no collective::

    recorder = LayerNormRecorder(optimizer, [to_tensorboard(SummaryWriter())], every=100)
    for step in range(steps):
        ...
        optimizer.step()
        recorder.step(step)
    recorder.close()

A sink is any function of a step and {name: `LayerNorms`}.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sharded_lamb.core.hyperparams import integer
from sharded_lamb.optim.reports import PendingNorms, StepReports
from sharded_lamb.optim.step_results import LayerNorms

__all__ = [
    "HeatMap",
    "LayerNormRecorder",
    "LayerNorms",
    "Sink",
    "to_mlflow",
    "to_tensorboard",
    "to_wandb",
]

Sink = Callable[[int, Mapping[str, LayerNorms]], None]
"""Called with a step and the norms of the parameters that it updated: none if it was skipped."""

KINDS = {
    "weight": "weight_norm",
    "update": "update_norm",
    "gradient": "gradient_norm",
    "ratio": "trust_ratio",
}
"""{field of `LayerNorms`: the first part of a metric's name}; the rest is the parameter's, as in
``trust_ratio/encoder.0.weight``."""


class LayerNormRecorder:
    """Gives the norms of every ``every``-th step to ``sinks``, one step late, so that no step waits for a GPU.

    Args:
        optimizer: `Lamb`, `ShardedLamb`, or a DeepSpeed engine's ``basic_optimizer``; of a wrapper, what it wraps.
        sinks: called in order, on this rank, in the training thread.
        every: steps from one record to the next, >= 1.
    """

    def __init__(self, optimizer: StepReports, sinks: Sequence[Sink], every: int = 1) -> None:
        self._optimizer, self._sinks = optimizer, tuple(sinks)
        self._every = integer("every", every, 1, ">= 1, an int")
        self._pending: tuple[int, PendingNorms] | None = None

    def step(self, step: int) -> None:
        """Call after ``optimizer.step()``: passes on the record before, if there is one, and starts this step's."""
        self.close()
        if step % self._every == 0:
            self._pending = step, self._optimizer.fetch_layer_norms()

    def close(self) -> None:
        """Pass on the last record. Waits for the device."""
        if self._pending is not None:
            (step, norms), self._pending = self._pending, None
            for sink in self._sinks:
                sink(step, norms.read())

    def __enter__(self) -> "LayerNormRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def metrics(norms: Mapping[str, LayerNorms]) -> dict[str, float]:
    """{"kind/name": value} of all finite values, see `KINDS`."""
    return {
        f"{KINDS[field]}/{name}": value
        for name, own in norms.items()
        for field, value in own._asdict().items()
        if math.isfinite(value)
    }


def to_tensorboard(writer: Any) -> Sink:
    """A sink to a ``torch.utils.tensorboard.SummaryWriter``."""

    def write(step: int, norms: Mapping[str, LayerNorms]) -> None:
        for name, value in metrics(norms).items():
            writer.add_scalar(name, value, step)

    return write


def to_wandb(run: Any) -> Sink:
    """A sink to a run of Weights & Biases, the result of ``wandb.init()``.

    Values have a step axis of their own, ``layer_norms_step``, since wandb drops values of a step before its current
    one, and records are one step late. Each record is a row, which advances wandb's own step by one: pass to your
    ``run.log`` the training step as ``step``, or none.
    """
    axis = "layer_norms_step"
    for kind in KINDS.values():
        run.define_metric(f"{kind}/*", step_metric=axis)

    def write(step: int, norms: Mapping[str, LayerNorms]) -> None:
        run.log({**metrics(norms), axis: step})

    return write


def to_mlflow(run_id: str | None = None) -> Sink:
    """A sink to a run of MLflow, by default the active one. Characters that MLflow refuses become ``_``.

    Raises:
        ImportError: mlflow is not installed (``pip install mlflow-skinny`` is enough).
    """
    import mlflow

    def write(step: int, norms: Mapping[str, LayerNorms]) -> None:
        values = {re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name): value for name, value in metrics(norms).items()}
        mlflow.log_metrics(values, step=step, run_id=run_id)

    return write


class HeatMap:
    """A sink that collects one number of every parameter and draws it: parameters by steps, on a logarithmic scale.

    Args:
        of: "ratio", "weight", "update" or "gradient".
    """

    def __init__(self, of: str = "ratio") -> None:
        if of not in KINDS:
            raise ValueError(f"of={of!r} is no field of LayerNorms: expected one of {[*KINDS]}")
        self._of = of
        self._steps: dict[int, dict[str, float]] = {}

    def __call__(self, step: int, norms: Mapping[str, LayerNorms]) -> None:
        self._steps[step] = {name: getattr(own, self._of) for name, own in norms.items()}

    def save(self, path: str | Path) -> None:
        """Draw what was collected. Skipped steps, missing gradients and the value 0 are grey.

        Raises:
            ValueError: nothing was collected; the path's suffix is no format of matplotlib.
            ImportError: matplotlib is not installed.
            OSError: the path cannot be written.
        """
        from sharded_lamb.pictures.heat_map import draw_heat_map

        names = list(dict.fromkeys(name for values in self._steps.values() for name in values))
        if not names:
            raise ValueError("no step with norms was recorded: call recorder.step(…) after optimizer.step()")
        rows = [[values.get(name, math.nan) for values in self._steps.values()] for name in names]
        title = KINDS[self._of].replace("_", " ")
        draw_heat_map(rows, names, [str(step) for step in self._steps], title, path)
