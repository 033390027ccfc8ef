"""Parameters of equal names in one optimizer (two models, experts) are distinguished by group and position."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.harness import run_ranks
from tests.oracle import OracleLamb

NAMES = ["weight", "bias", "weight (group 1, parameter 0)", "bias (group 1, parameter 1)"]
OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "exclude_from_weight_decay": ("^bias$",),
    "exclude_from_layer_adaptation": ("bias",),
}


def groups(one: nn.Module, other: nn.Module, *, together: bool) -> list[Any]:
    if together:
        return [*one.named_parameters(), *other.named_parameters()]
    return [{"params": one.named_parameters()}, {"params": other.named_parameters(), "lr": 0.01}]


def trained(rank: int, made: str, together: bool) -> list[str]:
    """Three steps beside the oracle; the names that the optimizer gives the parameters."""
    torch.manual_seed(0)
    one, other = nn.Linear(8, 16), nn.Linear(16, 4)
    start = [p.detach().clone() for module in (one, other) for p in module.parameters()]
    if made == "fully_shard":
        fully_shard(one)
        fully_shard(other)
    cls: Any = Lamb if made == "Lamb" else ShardedLamb
    settings = {"stage": 2} if made == "stage 2" else {}
    opt = cls(groups(one, other, together=together), **OPTIONS, **settings)
    names = list(map(str, range(4)))
    oracle = OracleLamb(
        dict(zip(names, (p.double().numpy() for p in start), strict=True)),
        lr=0.02,
        no_decay=("1", "3"),
        no_adapt=("1", "3"),
        overrides={} if together else {"2": {"lr": 0.01}, "3": {"lr": 0.01}},
    )
    for step in range(3):
        grads = [training.draw(tuple(p.shape), "g", i, step) for i, p in enumerate(start)]
        params = [*one.parameters(), *other.parameters()]
        whole = [p.full_tensor() if made == "fully_shard" else p for p in params]  # type: ignore[operator]
        torch.stack([(p * g).sum() for p, g in zip(whole, grads, strict=True)]).sum().backward()
        opt.step()
        opt.zero_grad()
        oracle.step({name: g.double().numpy() for name, g in zip(names, grads, strict=True)})
        opt.load_state_dict(opt.state_dict())
    now = [p.full_tensor() if made == "fully_shard" else p for p in (*one.parameters(), *other.parameters())]  # type: ignore[operator]
    training.assert_follows({n: p.detach() for n, p in zip(names, now, strict=True)}, oracle)
    ratios = opt.trust_ratios()
    assert list(ratios.values()) == pytest.approx(list(oracle.ratios.values()), rel=1e-5)
    if made != "Lamb":
        state = opt.full_state_dict()
        assert rank > 0 or len(state["state"]) == 4
        opt.load_full_state_dict(state)
    return list(ratios)


@pytest.mark.parametrize("together", [False, True], ids=["two groups", "one group"])
@pytest.mark.parametrize("made", ["Lamb", "stage 1", "stage 2", "fully_shard"])
def test_two_models_with_equal_names(made: str, together: bool) -> None:
    for names in run_ranks(1 if made == "Lamb" else 2, trained, made, together):
        expected = [n.replace("group 1, parameter 0", "group 0, parameter 2") for n in NAMES]
        expected = [n.replace("group 1, parameter 1", "group 0, parameter 3") for n in expected]
        assert names == (expected if together else NAMES)


def test_a_name_stays_when_a_group_is_added() -> None:
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    opt = ShardedLamb(one.named_parameters())
    opt.add_param_group({"params": other.named_parameters()})
    for module in (one, other):
        module(torch.ones(1, 3)).sum().backward()
    opt.step()
    assert list(opt.trust_ratios()) == NAMES


def test_names_that_look_like_added_ones_stay_apart() -> None:
    params = [nn.Parameter(torch.full((2,), float(i + 1))) for i in range(4)]
    given = ["a", "a (group 0, parameter 1)", "a", "module.a"]
    opt = Lamb(list(zip(given, params, strict=True)))
    for p in params:
        p.grad = torch.ones(2)
    opt.step()
    assert len(opt.trust_ratios()) == 4
