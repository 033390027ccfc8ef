"""Lightning with DDP: gradients are averaged by DDP, state and work are sharded by ShardedLamb (stage 1).

``python lightning_ddp.py``, or under torchrun; a second run resumes from ``last.ckpt``.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sharded_lamb import ShardedLamb


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 1))

    def configure_optimizers(self) -> Any:
        optimizer = ShardedLamb(self.net.named_parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)


if __name__ == "__main__":
    x = torch.randn(256, 16, device="cpu")
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)
    keep = ModelCheckpoint("checkpoints", save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, gradient_clip_val=1.0, callbacks=keep
    )
    trainer.fit(Regression(), loader, ckpt_path="last")
