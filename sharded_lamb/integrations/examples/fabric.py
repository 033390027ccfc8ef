"""Fabric without DDP: ShardedLamb(stage=2) reduces gradients during backward, and frees them.

``python fabric.py``, or under torchrun; a second run resumes. With DDP: ``strategy="ddp"`` and ``stage=1``.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sharded_lamb import ShardedLamb
from sharded_lamb.integrations.lightning import ShardedLambFabricStrategy

if __name__ == "__main__":
    fabric = Fabric(
        accelerator="cpu", devices=2, strategy=ShardedLambFabricStrategy(), precision="bf16-mixed"
    )
    fabric.launch()
    net = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 1))
    model, optimizer = fabric.setup(net, ShardedLamb(net.named_parameters(), lr=2e-3, stage=2))
    x = torch.randn(256, 16, device="cpu")
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16))

    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "epoch": 0}
    if Path("fabric.ckpt").exists():
        fabric.load("fabric.ckpt", state)
    for epoch in range(state["epoch"], 2):
        for index, (inputs, target) in enumerate(loader):
            with fabric.no_backward_sync(model, enabled=index % 2 == 0):  # accumulates two batches
                fabric.backward(nn.functional.mse_loss(model(inputs), target) / 2)
            if index % 2 == 1:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
        fabric.save("fabric.ckpt", {**state, "epoch": epoch + 1})
