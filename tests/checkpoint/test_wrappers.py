"""Optimizers and models as frameworks wrap them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.checkpoint import Checkpoints, load, save
from tests import training


class Wrapper:
    """Shows the optimizer's groups and state, as Lightning's."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self._optimizer.param_groups

    @property
    def state(self) -> Any:
        return self._optimizer.state


def copied_attributes(optimizer: Any) -> Any:
    """As Fabric's: its class is made to inherit from the optimizer's, whose attributes it copies."""

    class Fabric:
        def __init__(self) -> None:
            self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "max_grad_norm"}
            self.__class__ = type("FabricOptimizer", (Fabric, type(optimizer)), {})  # type: ignore[assignment]
            self._optimizer = optimizer

        @property
        def optimizer(self) -> Any:
            return self._optimizer

        def state_dict(self) -> Any:
            raise AssertionError("checkpoints ask the optimizer itself")

    return Fabric()


def accelerated(optimizer: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


class Lookahead(Optimizer):
    """Has state of its own."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer


def trained() -> tuple[nn.Module, ShardedLamb]:
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    opt = ShardedLamb(model.named_parameters(), lr=0.1, max_grad_norm=1.0)
    model(training.draw((4, 6), "x")).square().sum().backward()
    opt.step()
    return model, opt


@pytest.mark.parametrize("wrap", [Wrapper, copied_attributes, accelerated, lambda opt: Wrapper(Wrapper(opt))])
def test_checkpoints_unwrap(wrap: Any, tmp_path: Path) -> None:
    model, opt = trained()
    expected = training.bits_of(opt, dict(model.named_parameters()))
    wrapped = nn.parallel.DataParallel(model)
    Checkpoints(tmp_path).save(1, wrapped, wrap(opt))
    other, again = trained()
    other_wrapped = wrap(again)
    again.zero_grad()
    again.step()
    resumed = Checkpoints(tmp_path).resume(other, other_wrapped)
    assert resumed is not None
    training.assert_same_bits(training.bits_of(again, dict(other.named_parameters())), expected)
    save(tmp_path / "again", other, other_wrapped)
    load(tmp_path / "again", model, wrap(opt))
    training.assert_same_bits(training.bits_of(opt, dict(model.named_parameters())), expected)


def test_a_wrapper_with_state_of_its_own_and_a_scheduler_are_refused(tmp_path: Path) -> None:
    model, opt = trained()
    with pytest.raises(
        TypeError, match=r"got Lookahead: pass its \.optimizer, and state of its own as extra"
    ):
        save(tmp_path / "step", model, Lookahead(opt))
    with pytest.raises(TypeError, match=r"got LambdaLR: pass its \.optimizer"):
        save(tmp_path / "step", model, torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0))
    lamb = Lamb(nn.Linear(2, 2).parameters())
    with pytest.raises(TypeError, match=r"got Lookahead: pass its \.optimizer"):
        save(tmp_path / "step", model, Lookahead(lamb))
