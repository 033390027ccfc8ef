"""Parameters that were trained and are frozen when a run is saved and resumed keep their moments and step counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_lamb import ShardedLamb
from sharded_lamb.checkpoint import load, save
from tests import training
from tests.harness import run_ranks

WAYS = ["stays", "checkpoint", "checkpoint twice", "load_state_dict", "load_full_state_dict"]


def build(stage: int, dtype: torch.dtype, frozen: bool) -> tuple[nn.Sequential, ShardedLamb]:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(training.draw(tuple(p.shape), name))
    if stage == 3:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model[0].requires_grad_(not frozen)
    return model, ShardedLamb(model.named_parameters(), lr=0.05, stage=min(stage, 2))


def resumed(
    way: str, folder: str, rank: int, model: nn.Sequential, opt: ShardedLamb, build_again: Any
) -> Any:
    again, new = build_again()
    if way == "checkpoint":
        save(folder, model, opt)
        load(folder, again, new)
    elif way == "checkpoint twice":
        save(folder, model, opt)
        load(folder, again, new)
        save(folder, again, new)  # while it is frozen
        again, new = build_again()
        load(folder, again, new)
    else:
        again.load_state_dict(model.state_dict())
        full = opt.full_state_dict()
        if way == "load_full_state_dict":
            new.load_full_state_dict(full)
        else:
            opt.consolidate_state_dict()
            box = [opt.state_dict() if rank == 0 else None]
            torch.distributed.broadcast_object_list(box, 0)
            new.load_state_dict(box[0])
    assert not any(p.requires_grad for p in again[0].parameters())
    return again, new


def trained(rank: int, way: str, stage: int, dtype: torch.dtype, folder: str) -> dict[str, Tensor]:
    model, opt = build(stage, dtype, frozen=False)

    def step(seed: int) -> None:
        x = training.draw((4, 8), rank if stage > 1 else 0, seed).to(dtype)
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    step(1)
    step(2)
    model[0].requires_grad_(False)
    step(3)
    if way != "stays":
        model, opt = resumed(way, folder, rank, model, opt, lambda: build(stage, dtype, frozen=True))
    step(4)
    model[0].requires_grad_(True)
    step(5)
    step(6)
    assert opt.state[model[0].weight]["step"].item() == 4
    full = opt.full_state_dict()
    weights = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in model.named_parameters()}
    bits = {name: p.detach().clone() for name, p in weights.items()}
    if full is not None:
        bits |= {f"{i}/{kind}": v for i, entry in full["state"].items() for kind, v in entry.items()}
    return bits


@pytest.mark.parametrize(
    ("stage", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (3, torch.float32)], ids=str
)
def test_unfreezing_after_a_resume_continues_the_run(stage: int, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = run_ranks(2, trained, "stays", stage, dtype, "")
    for way in WAYS[1:]:
        folder = str(tmp_path / way.replace(" ", "-"))
        for ours, bits in zip(run_ranks(2, trained, way, stage, dtype, folder), expected, strict=True):
            training.assert_same_bits(ours, bits)


def test_a_frozen_layer_that_was_never_trained_takes_no_memory(tmp_path: Path) -> None:
    model, opt = build(1, torch.float32, frozen=True)
    save(tmp_path / "step", model, opt)
    again, new = build(1, torch.float32, frozen=True)
    load(tmp_path / "step", again, new)
    new.load_state_dict(opt.state_dict())
    assert new.memory() == opt.memory()
    assert again[0].weight not in new.state
