"""Lightning with FSDP2: ShardedLamb finds that the parameters are DTensors (stage 3).

``python lightning_fsdp2.py``, or under torchrun; a second run resumes from ``last.ckpt``, a folder.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from sharded_lamb import ShardedLamb


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 1))

    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):
            assert self.device_mesh is not None
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> ShardedLamb:
        return ShardedLamb(self.net.named_parameters(), lr=2e-3)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


if __name__ == "__main__":
    x = torch.randn(256, 16, device="cpu")
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)
    keep, strategy = ModelCheckpoint("checkpoints", save_last=True), ModelParallelStrategy(2, 1)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, callbacks=keep)
    trainer.fit(Regression(), loader, ckpt_path="last")
