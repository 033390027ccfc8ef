"""Fabric on a rank of the harness."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from sharded_lamb import ShardedLamb
from sharded_lamb.integrations.lightning import ShardedLambFabricStrategy
from tests.integrations import cases
from tests.integrations.lightning_cases import SCALE


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model.up, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def strategy_of(how: str) -> Strategy:
    if how == "fsdp2":
        return ModelParallelStrategy(shard, data_parallel_size=cases.WORLD, tensor_parallel_size=1)
    return DDPStrategy() if how == "ddp" else ShardedLambFabricStrategy()


class Run:
    """A model and an optimizer that Fabric has set up."""

    def __init__(self, how: str, *, precision: str = "32-true") -> None:
        own: dict[str, Any] = {"precision": precision, "plugins": [TorchElasticEnvironment()]}
        if precision == "16-mixed":  # as a flag Fabric takes it on GPUs only
            scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=100)
            own = {"plugins": [TorchElasticEnvironment(), MixedPrecision("16-mixed", "cpu", scaler)]}
        self.fabric = Fabric(accelerator="cpu", devices=cases.WORLD, strategy=strategy_of(how), **own)
        self.fabric.launch()
        self.net = cases.Net()
        stage: Any = 1 if how == "ddp" else 2
        if how == "fsdp2":
            self.model: Any = self.fabric.setup_module(self.net)
            opt = ShardedLamb(self.net.named_parameters(), **cases.OPTIONS)
            self.opt: Any = self.fabric.setup_optimizers(opt)
        else:
            opt = ShardedLamb(self.net.named_parameters(), stage=stage, bucket_mb=0.001, **cases.OPTIONS)
            self.model, self.opt = self.fabric.setup(self.net, opt)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.opt, 0.5)

    def train(
        self,
        dataset: Any,
        batches: Iterable[int],
        *,
        accumulate: int = 1,
        clip: float | None = None,
        scheduled: bool = False,
    ) -> None:
        loader = list(self.fabric.setup_dataloaders(DataLoader(dataset, batch_size=cases.BATCH)))
        for batch in batches:
            is_last = batch % accumulate == accumulate - 1
            with self.fabric.no_backward_sync(self.model, enabled=not is_last):
                self.fabric.backward(self.model(*loader[batch]) / accumulate)
            if not is_last:
                continue
            if clip is not None:
                self.fabric.clip_gradients(self.model, self.opt, max_norm=clip, error_if_nonfinite=False)
            self.opt.step()
            self.opt.zero_grad()
            if scheduled:
                self.schedule.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.opt, "schedule": self.schedule}

    def bits(self) -> dict[str, Tensor]:
        return {**cases.values(self.net), **cases.flat(self.opt.optimizer.local_state_dict())}


def fit(
    rank: int,
    how: str,
    batches: int,
    *,
    overflowing: int | None = None,
    precision: str = "32-true",
    **options: Any,
) -> dict[str, Tensor]:
    """The parameters after ``batches`` global batches."""
    run = Run(how, precision=precision)
    run.train(cases.data(batches, overflowing), range(batches), **options)
    return cases.values(run.net)


def sends_while_accumulating(rank: int) -> dict[str, int]:
    run = Run("sharded")
    before = dict(run.opt.traffic.calls)
    run.train(cases.data(3), range(3), accumulate=4)
    return {name: calls - before.get(name, 0) for name, calls in run.opt.traffic.calls.items()}


def parted(rank: int) -> dict[str, Tensor]:
    """Buffers and frozen parameters that differ over ranks before ``setup``."""
    fabric = launched()
    net = cases.Net()
    net.up.bias.requires_grad_(False)
    with torch.no_grad():
        for tensor in (*net.parameters(), net.seen):
            tensor += rank
    fabric.setup(net, ShardedLamb(net.named_parameters(), stage=2))
    return {**cases.values(net), "seen": net.seen.clone()}


def resumed(rank: int, folder: Path, how: str, precision: str) -> None:
    """Four steps; two, a checkpoint, and two more from it in new objects: the same weights and state."""
    dataset, options = cases.data(4), {"clip": 1.0, "scheduled": True}
    whole = Run(how, precision=precision)
    whole.train(dataset, range(4), **options)
    first = Run(how, precision=precision)
    first.train(dataset, range(2), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*slices.*")
        first.fabric.save(folder / "kept", first.state())
    again = Run(how, precision=precision)
    with torch.no_grad():
        for p in again.net.parameters():
            p.zero_()
    again.fabric.load(folder / "kept", again.state())
    again.train(dataset, range(2, 4), **options)
    expected, actual = whole.bits(), again.bits()
    assert actual.keys() == expected.keys()
    assert [name for name, value in actual.items() if not torch.equal(value, expected[name])] == []


def refused(rank: int) -> str:
    fabric, net = launched(), cases.Net()
    try:
        fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    except ValueError as error:
        return str(error)
    return "none"


def launched() -> Fabric:
    fabric = Fabric(
        accelerator="cpu",
        devices=cases.WORLD,
        strategy=ShardedLambFabricStrategy(),
        plugins=[TorchElasticEnvironment()],
    )
    fabric.launch()
    return fabric
