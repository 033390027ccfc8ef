"""Accelerate with DDP: ``torchrun --standalone --nproc-per-node 2 accelerate_ddp.py FOLDER``; again, it resumes."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from sharded_lamb import ShardedLamb
from sharded_lamb.integrations.accelerate import register

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/accelerate")
accelerator = Accelerator(
    cpu=not torch.cuda.is_available(), mixed_precision="bf16", gradient_accumulation_steps=2
)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 1))
optimizer = ShardedLamb(model.named_parameters(), lr=2e-3, exclude_from_weight_decay=["bias$", "ndim<=1"])
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=100)
loader = DataLoader(TensorDataset(torch.randn(128, 32, device="cpu")), batch_size=8)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
register(accelerator, optimizer)
if folder.exists():
    accelerator.load_state(str(folder))
for (batch,) in loader:
    with accelerator.accumulate(model):
        loss = model(batch).square().mean()
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
accelerator.save_state(str(folder))
accelerator.print(f"loss {loss.item():.4f}, trust ratios {optimizer.optimizer.trust_ratios()}")
