"""torchtitan's OptimizersContainer over an FSDP2 model, on a rank of the harness."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from tests.integrations import cases

NO_DECAY = {"up.bias", "scale"}


def made() -> tuple[cases.Net, Any]:
    from torchtitan.components.optimizer import ParamGroupConfig

    from sharded_lamb.integrations.torchtitan import ShardedLambContainer

    net = cases.Net()
    fully_shard(net.up)
    fully_shard(net)
    decays = ParamGroupConfig(pattern=r".*", optimizer_name="ShardedLamb", optimizer_kwargs=cases.OPTIONS)
    others = {**cases.OPTIONS, "weight_decay": 0.0}
    exempt = ParamGroupConfig(pattern="bias|scale", optimizer_name="ShardedLamb", optimizer_kwargs=others)
    factory = {"ShardedLamb": {"max_grad_norm": 0.5}}
    config = ShardedLambContainer.Config(
        param_groups=[exempt, decays], optimizer_factory_kwargs_by_name=factory
    )
    return net, config.build(model_parts=[net])


def train(net: cases.Net, opt: Any, rank: int, steps: range) -> None:
    dataset = cases.data(4)
    for step in steps:
        first = step * cases.BATCH * cases.WORLD + rank
        own = [tensor[first :: cases.WORLD][: cases.BATCH] for tensor in dataset.tensors]
        net(*own).backward()
        opt.step()
        opt.zero_grad()


def fit(rank: int) -> dict[str, Tensor]:
    net, opt = made()
    train(net, opt, rank, range(4))
    (own,) = opt.optimizers
    assert set(own.trust_ratios()) == {name for name, _ in cases.Net().named_parameters()}
    return cases.values(net)


def resumed(rank: int, folder: Path) -> dict[str, Tensor]:
    """As `fit`, with a checkpoint and new objects after two steps."""
    net, opt = made()
    train(net, opt, rank, range(2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*slices.*")
        dcp.save({"model": net.state_dict(), "optimizer": opt.state_dict()}, checkpoint_id=folder)
    again, opt = made()
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    state = {"model": again.state_dict(), "optimizer": opt.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    again.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])
    train(again, opt, rank, range(2, 4))
    return cases.values(again)


def adamw(rank: int) -> str:
    from torchtitan.components.optimizer import default_adamw

    from sharded_lamb.integrations.torchtitan import ShardedLambContainer

    config = ShardedLambContainer.Config(param_groups=default_adamw().param_groups, implementation="for-loop")
    (own,) = config.build(model_parts=[cases.Net()]).optimizers
    with pytest.raises(NotImplementedError, match="Nothing"):
        ShardedLambContainer._resolve_optimizer_factory("Nothing")
    return type(own).__name__
