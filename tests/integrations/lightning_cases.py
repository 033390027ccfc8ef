"""Lightning's Trainer on a rank of the harness."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from sharded_lamb import ShardedLamb
from sharded_lamb.integrations.lightning import ShardedLambStrategy
from tests.integrations import cases

SCALE = 2.0**8


def strategy_of(how: str) -> Strategy:
    if how.startswith("fsdp2"):
        return ModelParallelStrategy(cases.WORLD, 1, save_distributed_checkpoint=how != "fsdp2, one file")
    return DDPStrategy() if how == "ddp" else ShardedLambStrategy()


class Module(pl.LightningModule):
    def __init__(
        self, how: str, *, manual: bool = False, scheduled: bool = False, clip: float | None = None
    ) -> None:
        super().__init__()
        self.how, self.scheduled, self.clip = how, scheduled, clip
        self.automatic_optimization = not manual
        self.net = cases.Net()

    def configure_model(self) -> None:
        if self.how.startswith("fsdp2") and not isinstance(self.net, FSDPModule):  # called by every fit
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            fully_shard(self.net.up, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> Any:
        stage: Any = 1 if self.how == "ddp" else 2
        opt = ShardedLamb(self.net.named_parameters(), stage=stage, bucket_mb=0.001, **cases.OPTIONS)
        if not self.scheduled:
            return opt
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.net(*batch)
        opt: Any = self.optimizers()
        last = index % 2 == 1  # accumulates two batches
        with opt.toggle_model(sync_grad=last):
            self.manual_backward(self.net(*batch) / 2)
        if last:
            self.clip_gradients(opt, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            opt.step()
            opt.zero_grad()
        return None


def precision_of(name: str) -> dict[str, Any]:
    if name != "16-mixed":
        return {"precision": name}
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=100)
    return {
        "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]
    }  # as a flag Lightning takes it on GPUs only


def trainer(how: str, folder: Path, *, precision: str = "32-true", **options: Any) -> pl.Trainer:
    own = precision_of(precision)
    plugins = [TorchElasticEnvironment(), *own.pop("plugins", [])]
    quiet: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    options = {"enable_checkpointing": False, "max_epochs": 1, **options}
    return pl.Trainer(
        accelerator="cpu",
        devices=cases.WORLD,
        strategy=strategy_of(how),
        plugins=plugins,
        default_root_dir=folder,
        **quiet,
        **own,
        **options,
    )


def loader(dataset: TensorDataset) -> DataLoader[Any]:
    """Lightning splits it over ranks by a DistributedSampler that shuffles: global batches arrive as in ``dataset``."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).argsort()
    return DataLoader(TensorDataset(*(tensor[order] for tensor in dataset.tensors)), batch_size=cases.BATCH)


def fit(
    rank: int,
    folder: Path,
    how: str,
    batches: int,
    *,
    overflowing: int | None = None,
    manual: bool = False,
    scheduled: bool = False,
    clip: float | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The parameters after an epoch of ``batches`` global batches."""
    module = Module(how, manual=manual, scheduled=scheduled, clip=clip)
    if not manual:
        options["gradient_clip_val"] = clip
    trainer(how, folder, **options).fit(module, loader(cases.data(batches, overflowing)))
    return cases.values(module.net)


def resumed(rank: int, folder: Path, how: str, precision: str) -> None:
    """Two epochs; one, a checkpoint, and another from it in a new Trainer: the same weights and state."""
    batches, options = loader(cases.data(3)), {"precision": precision, "gradient_clip_val": 1.0}
    whole = Module(how, scheduled=True)
    trainer(how, folder, max_epochs=2, **options).fit(whole, batches)
    expected = weights_and_state(whole)

    keep = ModelCheckpoint(folder / "kept", filename="{epoch}")
    first = trainer(how, folder, callbacks=[keep], enable_checkpointing=True, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*slices.*")
        first.fit(Module(how, scheduled=True), batches)
    again = Module(how, scheduled=True)
    with torch.no_grad():
        for p in again.net.parameters():
            p.zero_()
    trainer(how, folder, max_epochs=2, **options).fit(
        again, batches, ckpt_path=folder / "kept" / "epoch=0.ckpt"
    )
    actual = weights_and_state(again)
    assert actual.keys() == expected.keys()
    assert [name for name, value in actual.items() if not torch.equal(value, expected[name])] == []


def weights_and_state(module: Module) -> dict[str, Tensor]:
    opt: Any = module.optimizers()
    state = cases.flat(opt.local_state_dict())
    assert state
    return {**cases.values(module.net), **state}


def fitted_twice(rank: int, folder: Path, how: str) -> None:
    """A second fit constructs a second optimizer over the same parameters, and trains on."""
    module, batches = Module(how), cases.data(2)
    twice = trainer(how, folder, max_epochs=1)
    twice.fit(module, loader(batches))
    twice.fit_loop.max_epochs = 2
    if how == "ddp":  # the other strategies drop the optimizers of the first fit
        twice.strategy.optimizers[0].close()  # type: ignore[attr-defined]
    twice.fit(module, loader(batches))
    twice.save_checkpoint(folder / "after.ckpt")


def parted(rank: int, folder: Path) -> dict[str, Tensor]:
    """Frozen parameters and buffers that differ over ranks before ``fit``."""
    module = Module("sharded")
    module.net.up.bias.requires_grad_(False)
    with torch.no_grad():
        for tensor in (*module.net.parameters(), module.net.seen):
            tensor += rank
    trainer("sharded", folder).fit(module, loader(cases.data(2)))
    return {**cases.values(module.net), "seen": module.net.seen.clone()}


def refused(rank: int, folder: Path, optimizer: str) -> str:
    module = Module("ddp")  # stage 1
    if optimizer == "SGD":
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    try:
        trainer("sharded", folder).fit(module, loader(cases.data(2)))
    except ValueError as error:
        return str(error)
    return "none"


def reductions(rank: int, folder: Path, accumulate: int) -> int:
    module = Module("sharded")
    trainer("sharded", folder, accumulate_grad_batches=accumulate).fit(module, loader(cases.data(4)))
    opt: Any = module.optimizers()
    return int(opt.traffic.calls["reduce_scatter"])
