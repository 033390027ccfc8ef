"""The average of the weights over steps, sharded beside the masters (``ema_decay``), and its use for evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharded_lamb.comm.param_gather import InPlaceGather
from sharded_lamb.optim.agreed_options import collective
from sharded_lamb.optim.registration import RegisteringOptimizer


class AveragingOptimizer(RegisteringOptimizer):
    """A `RegisteringOptimizer` whose parameters can hold the average of their values for a while."""

    @property
    def ema_decay(self) -> float | None:
        """The option."""
        return self._settings.ema_decay

    @contextmanager
    def averaged(self, model: nn.Module | None = None) -> Iterator[None]:
        """Inside, parameters hold the average of their values: for evaluation, and to save ``model.state_dict()``.

        Collective at both ends: one all-gather per bucket. Afterwards they have the bits that they had before. Inside,
        `step`, checkpoints and loads of state are refused: they would take the averages for the weights. Frozen
        parameters that were never trained keep their values; buffers (BatchNorm's statistics) are never averaged.

        Args:
            model: required with DTensors: its FSDP2 modules drop unsharded copies of the other values.

        Raises:
            RuntimeError: ``ema_decay`` is None; inside another `averaged`.
            ValueError: DTensors without ``model``.
        """
        self._show_averages(model)
        try:
            yield
        finally:
            self._show_weights(model)

    @collective
    @torch.no_grad()
    def _show_averages(self, model: nn.Module | None) -> None:
        self._check_open()
        self._check_shows_weights()
        if self._settings.ema_decay is None:
            raise RuntimeError("there is no average of the weights: construct the optimizer with ema_decay=…")
        if model is None and self._store.specs:
            raise ValueError(
                "some parameters are DTensors, of which FSDP2 may hold unsharded copies: pass the model, as in "
                "averaged(model)"
            )
        self.synchronize()
        self._register_changed()
        self._store.reattach()
        self._live.own_weights = self._store.show_averages()
        self._gather_weights(model)

    @collective
    @torch.no_grad()
    def _show_weights(self, model: nn.Module | None) -> None:
        assert self._live.own_weights is not None
        self._store.show_weights(self._live.own_weights)
        self._live.own_weights = None
        self._gather_weights(model)

    def _gather_weights(self, model: nn.Module | None) -> None:
        """Send this rank's weights to the others."""
        store = self._store
        for module in () if model is None else model.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()
        gathers = [InPlaceGather(bucket.flat, self._collectives) for bucket in store.buckets]  # exact
        for gather in gathers:
            gather.start()
        for gather in gathers:
            gather.finish()
        store.write_shared()
        torch.autograd.graph.increment_version(store.params)

    def _update_averages(self, updated: Tensor) -> None:
        """After pass 2, before steps are counted. ``updated``: [P] bool, the parameters that the step has updated.

        The first step's weights are the average, as in torch.optim.swa_utils.AveragedModel.
        """
        decay, store = self._settings.ema_decay, self._store
        if decay is not None:
            share = torch.where(store.step.max() > 0, 1 - decay, 1.0)
            store.update_averages(torch.where(updated.any(), share, torch.zeros_like(share)))
