"""Lightning without DDP: ShardedLamb(stage=2) reduces gradients during backward, and frees them.

``python lightning_stage2.py``, or under torchrun; a second run resumes from ``last.ckpt``.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sharded_lamb import ShardedLamb
from sharded_lamb.integrations.lightning import ShardedLambStrategy


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 1))

    def configure_optimizers(self) -> ShardedLamb:
        return ShardedLamb(self.net.named_parameters(), lr=2e-3, stage=2)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)


if __name__ == "__main__":
    x = torch.randn(256, 16, device="cpu")
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)
    keep = ModelCheckpoint("checkpoints", save_last=True)
    strategy = ShardedLambStrategy()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, gradient_clip_val=1.0, callbacks=keep
    )
    trainer.fit(Regression(), loader, ckpt_path="last")
