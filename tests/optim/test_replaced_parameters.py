"""Parameters replaced in the groups after construction, as Accelerate's prepare does under FSDP2."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from sharded_lamb import ShardedLamb
from sharded_lamb.checkpoint import load, save
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.optim import fsdp_models as models


def replace_parameters(model: torch.nn.Module, opt: ShardedLamb) -> None:
    """Accelerate's order: construct the optimizer, then replace the parameters in its groups."""
    fully_shard(model)
    opt.param_groups[0]["params"] = list(model.parameters())


def train_after_replacing_parameters(rank: int, stage: int) -> models.Run:
    model = models.block()
    opt = ShardedLamb(model.named_parameters(), lr=0.02, stage=stage)
    before = [weakref.ref(p) for p in model.parameters()]
    replace_parameters(model, opt)
    run = models.train(model, opt, lambda step: model(models.inputs(rank, step)).square().sum(), 3)
    gc.collect()
    assert [p() for p in before] == [None] * len(before)  # nor is their memory kept
    return run


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_replaced_after_construction_are_followed(stage: int) -> None:
    models.check(run_ranks(2, train_after_replacing_parameters, stage), lr=0.02)


def replace_after_a_step(rank: int, replaces: bool) -> dict[str, torch.Tensor]:
    """Weights and whole state of three steps, on the first rank; fully_shard after the first, if ``replaces``."""
    model = models.block()
    opt = ShardedLamb(model.named_parameters(), lr=0.02)
    for step in range(3):
        if step == 1 and replaces:
            replace_parameters(model, opt)
        for number, p in enumerate(model.parameters()):
            grad = training.draw(tuple(p.shape), "g", number, step)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        opt.step()
    found = {name: p.full_tensor() if replaces else p.detach() for name, p in model.named_parameters()}
    for position, entry in (opt.full_state_dict() or {"state": {}})["state"].items():
        found |= {f"{position}/{kind}": torch.as_tensor(value) for kind, value in entry.items()}
    return found


def test_parameters_replaced_after_a_step_keep_their_state() -> None:
    replaced, whole = (run_ranks(2, replace_after_a_step, replaces)[0] for replaces in (True, False))
    assert replaced.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(replaced[name], value, rtol=2e-6, atol=2e-6)


def resume_after_replacing_parameters(rank: int, folder: str, how: str) -> None:
    def anew() -> tuple[torch.nn.Module, ShardedLamb]:
        model = models.block()
        opt = ShardedLamb(model.named_parameters(), lr=0.02)
        replace_parameters(model, opt)
        return model, opt

    model, opt = anew()
    if how == "untrained":
        save(folder, model, opt)  # before the first step, which would register the new parameters
    model(models.inputs(rank, 0)).square().mean().backward()
    opt.step()
    if how == "checkpoint":
        save(folder, model, opt)
    expected = opt.full_state_dict()
    whole = [expected]
    dist.broadcast_object_list(whole, 0)
    other, resumed = anew()
    if how == "checkpoint":
        load(folder, other, resumed)
    elif how == "dcp":
        state = get_optimizer_state_dict(model, opt)
        get_optimizer_state_dict(other, resumed)
        set_optimizer_state_dict(other, resumed, state)
    else:
        resumed.load_full_state_dict(whole[0] if rank == 0 else None)
    found = resumed.full_state_dict()
    if rank == 0:
        for position, entry in expected["state"].items():
            training.assert_same_bits(found["state"][position], entry)


@pytest.mark.parametrize("how", ["checkpoint", "dcp", "whole", "untrained"])
def test_state_is_saved_and_loaded_right_after_parameters_were_replaced(how: str, tmp_path: Path) -> None:
    run_ranks(2, resume_after_replacing_parameters, str(tmp_path / "saved"), how)


def state_dict_after_replacing_parameters(rank: int) -> None:
    model = models.block()
    opt = ShardedLamb(model.named_parameters(), lr=0.02)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    opt.param_groups[0]["params"] = [Parameter(p.detach().clone()) for p in model.parameters()]
    if dist.get_world_size() > 1:
        for read in (opt.state_dict, opt.local_state_dict):
            with pytest.raises(RuntimeError, match=r"register_replaced\(\) on every rank"):
                read()
        opt.register_replaced()
    state = opt.state_dict()["state"]
    assert sorted(state) == list(range(len(opt.param_groups[0]["params"])))
    assert {float(entry["step"]) for entry in state.values()} == {1.0}


@pytest.mark.filterwarnings("ignore:state_dict")
@pytest.mark.parametrize("world", [1, 2])
def test_state_dict_of_replaced_parameters_names_the_collective_call(world: int) -> None:
    """It is local, and moving state to the new parameters is not; one rank moves it by itself."""
    run_ranks(world, state_dict_after_replacing_parameters)


def step_after_exchanging_parameters(rank: int, kind: str) -> None:
    model = models.block()
    opt = ShardedLamb(model.named_parameters(), lr=0.02)
    others = [Parameter(p.detach().clone()) for p in model.parameters()]
    if kind == "shape":
        others[0] = Parameter(torch.ones(3))
    else:
        opt.param_groups[0]["param_names"][0] = "another"
    opt.param_groups[0]["params"] = others
    for p in others:
        p.grad = torch.ones_like(p)
    opt.step()


@pytest.mark.parametrize("kind", ["shape", "name"])
def test_other_parameters_after_construction_are_an_error(kind: str) -> None:
    for raised, message in run_ranks_expecting_errors(2, step_after_exchanging_parameters, kind).values():
        assert raised == "RuntimeError"
        assert "construct ShardedLamb after that" in message
