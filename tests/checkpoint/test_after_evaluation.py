"""A checkpoint of a `fully_shard` model right after a forward without gradients, which leaves its root unsharded."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_lamb import ShardedLamb
from sharded_lamb.checkpoint import load, save
from tests.harness import run_ranks


def saved_after_evaluation(rank: int, folder: str) -> tuple[list[float], list[float]]:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    opt = ShardedLamb(model.named_parameters(), lr=0.1)
    model(torch.ones(3, 6)).sum().backward()
    opt.step()
    with torch.no_grad():
        before = model(torch.ones(3, 6)).flatten().tolist()
        save(folder, model, opt)
        model(torch.ones(3, 6))
    model(torch.ones(3, 6)).sum().backward()
    opt.step()
    with torch.no_grad():
        model(torch.ones(3, 6))
        load(folder, model, opt)
        return before, model(torch.ones(3, 6)).flatten().tolist()


def test_save_and_load_after_evaluation(tmp_path: Path) -> None:
    for before, after in run_ranks(2, saved_after_evaluation, str(tmp_path / "step")):
        assert before == after
