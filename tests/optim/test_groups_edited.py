"""Groups that a program replaces, shrinks or reorders after construction, as torch's optimizers allow."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from sharded_lamb import Lamb, ShardedLamb, checkpoint
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors

Edit = Callable[[Optimizer], None]
LRS = (0.02, 0.005)


def replace_dicts(opt: Optimizer) -> None:
    opt.param_groups = [dict(group) for group in opt.param_groups]
    opt.param_groups[0]["lr"] = 0.0


def replace_one(opt: Optimizer) -> None:
    opt.param_groups[1] = {**opt.param_groups[1], "lr": 0.0, "weight_decay": 0.3}


def replace_lists(opt: Optimizer) -> None:
    opt.param_groups[0]["params"] = list(opt.param_groups[0]["params"])
    opt.param_groups[0]["weight_decay"] = 0.7


def pop_group(opt: Optimizer) -> None:
    opt.param_groups.pop()


def pop_first_group(opt: Optimizer) -> None:
    opt.param_groups.pop(0)


def pop_parameter(opt: Optimizer) -> None:
    opt.param_groups[0]["params"].pop(0)


def move_parameter(opt: Optimizer) -> None:
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop(0))


def reverse_groups(opt: Optimizer) -> None:
    opt.param_groups.reverse()


def pop_and_return(opt: Optimizer) -> None:
    group = opt.param_groups.pop()
    step(opt, 5)
    opt.param_groups.append(group)


EDITS = (
    replace_dicts,
    replace_one,
    replace_lists,
    pop_group,
    pop_first_group,
    pop_parameter,
    move_parameter,
    reverse_groups,
    pop_and_return,
)
SHAPES = ((30, 20), (20,), (7, 5), (600,))


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "lr": LRS[0]}, {"params": params[2:], "lr": LRS[1], "weight_decay": 0.2}]


def all_params(opt: Optimizer) -> list[Parameter]:
    return opt.every  # type: ignore[attr-defined, no-any-return]


def gradient_of(p: Parameter, number: int, index: int) -> torch.Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * number + index))


def step(opt: Optimizer, number: int) -> None:
    """Gradients of all parameters that the optimizer began with, whatever its groups have now."""
    opt.zero_grad()
    loss = torch.zeros(())
    for index, p in enumerate(all_params(opt)):
        p.grad = None
        loss = loss + (p * gradient_of(p, number, index)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    opt.step()


def alone(edit: Edit) -> list[torch.Tensor]:
    """The weights by `Lamb`, constructed anew with the edited groups; moments move there by state dict."""
    params = parameters()
    opt = Lamb(groups(params))
    opt.every = params  # type: ignore[attr-defined]
    step(opt, 0)
    step(opt, 1)
    edit(opt)
    kept = {id(p): opt.state[p] for p in params}
    anew = Lamb([{**group, "params": [*group["params"]]} for group in opt.param_groups])
    anew.every = params  # type: ignore[attr-defined]
    for group in anew.param_groups:
        for p in group["params"]:
            anew.state[p] = {key: value.clone() for key, value in kept[id(p)].items()}
    step(anew, 2)
    step(anew, 3)
    return [p.detach() for p in params]


def edited(rank: int, edit: Edit, stage: int, clips: bool) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    limit = 0.05 if clips else None
    opt: Optimizer = Lamb(groups(params)) if stage == 0 else ShardedLamb(groups(params), stage=stage)
    opt.every = params  # type: ignore[attr-defined]
    step(opt, 0)
    step(opt, 1)
    edit(opt)
    now = [p.detach().clone() for p in params]
    assert not any(map(torch.equal, before, now))
    opt.max_grad_norm = limit  # type: ignore[attr-defined]
    step(opt, 2)
    step(opt, 3)
    grouped = {id(p): group for group in opt.param_groups for p in group["params"]}
    for p, old in zip(params, now, strict=True):
        group = grouped.get(id(p), {"lr": 0.0})
        assert torch.equal(p, old) == (group["lr"] == 0.0)
    if clips:
        norms = [
            gradient_of(p, 3, index).norm().double() for index, p in enumerate(params) if id(p) in grouped
        ]
        assert opt.grad_norm == pytest.approx(torch.stack(norms).norm().item(), rel=1e-6)  # type: ignore[attr-defined]
    else:
        for p, expected in zip(params, alone(edit), strict=True):
            torch.testing.assert_close(p.detach(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 1), (2, 1), (1, 2), (2, 2)])
def test_edited_groups_are_obeyed(edit: Edit, stage: int, world: int) -> None:
    run_ranks(world, edited, edit, stage, False)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_without_a_group_count_in_no_norm(stage: int) -> None:
    run_ranks(1, edited, pop_group, stage, True)


def disagree(rank: int, stage: int) -> None:
    params = parameters()
    opt = ShardedLamb(groups(params), stage=stage)
    opt.every = params  # type: ignore[attr-defined]
    step(opt, 0)
    (pop_parameter, move_parameter)[rank](opt)
    step(opt, 1)


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_that_edit_groups_differently_raise(stage: int) -> None:
    for kind, message in run_ranks_expecting_errors(2, disagree, stage).values():
        assert kind == "ValueError"
        assert "groups" in message


def test_a_model_that_gets_a_new_head_for_each_task() -> None:
    body, opt = nn.Linear(6, 5), None
    heads = [nn.Linear(5, 1) for _ in range(3)]
    opt = Lamb([{"params": list(body.parameters())}, {"params": list(heads[0].parameters())}])
    for head in heads:
        opt.param_groups.pop()
        opt.add_param_group({"params": list(head.parameters())})
        before = [p.detach().clone() for each in heads for p in each.parameters()]
        for each in heads:
            each(body(torch.ones(2, 6))).sum().backward()
        opt.step()
        moved = [
            not torch.equal(p, old)
            for p, old in zip((p for each in heads for p in each.parameters()), before, strict=True)
        ]
        assert moved == [
            p is q for each in heads for p, q in zip(each.parameters(), head.parameters(), strict=True)
        ]


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize("option", ["maximize", "amsgrad", "differentiable"])
def test_options_of_torch_that_would_change_the_update_are_refused(cls: Any, option: str) -> None:
    cls([{"params": parameters(), option: False}])
    with pytest.raises(ValueError, match=f"{option}=True in a parameter group"):
        cls([{"params": parameters(), option: True}])


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_frozen_parameters_may_have_any_dtype_and_layout(cls: Any) -> None:
    """As quantized weights beside adapters."""
    frozen = [
        Parameter(torch.ones(4, dtype=dtype), requires_grad=False)
        for dtype in (torch.uint8, torch.bool, torch.complex64)
    ]
    frozen.append(Parameter(torch.ones(3, 3).to_sparse(), requires_grad=False))
    p = Parameter(torch.ones(5))
    opt = cls([*frozen, p], lr=0.1)
    p.grad = torch.ones(5)
    opt.step()
    assert not torch.equal(p, torch.ones(5))
    assert len(opt.state) == 1


def leave_name(opt: Optimizer) -> None:
    """The name remains where the parameter was."""
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop(0))


def drop(opt: Optimizer) -> None:
    opt.param_groups[0]["params"].pop(0)


def reverse(opt: Optimizer) -> None:
    opt.param_groups[0]["params"].reverse()


def rebuild(opt: Optimizer) -> None:
    """Groups without names."""
    opt.param_groups = [
        {key: value for key, value in group.items() if key != "param_names"} for group in opt.param_groups
    ]


def add_again(opt: Optimizer) -> None:
    p = opt.param_groups[0]["params"].pop(0)
    opt.add_param_group({"params": [("a.bias", p)]})


def named_parameters() -> dict[str, Parameter]:
    return dict(zip(("a.bias", "a.weight", "b.bias", "b.weight"), parameters(), strict=True))


def decayed(rank: int, edit: Edit, stage: int) -> None:
    """Biases, excluded by name, do not decay: with gradients of 0 they stay, and the others shrink."""
    params = named_parameters()
    every = [*params.items()]
    grouped: Any = [{"params": every[:2]}, {"params": every[2:]}]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "exclude_from_weight_decay": ["bias"]}
    opt: Any = Lamb(grouped, **options) if stage == 0 else ShardedLamb(grouped, stage=stage, **options)
    edit(opt)
    start = {name: p.detach().clone() for name, p in params.items()}
    for _ in range(2):
        opt.zero_grad()
        for p in params.values():
            p.grad = None
        torch.stack([p.sum() * 0 for p in params.values()]).sum().backward()
        opt.step()
    here = {p for group in opt.param_groups for p in group["params"]}
    for name, p in params.items():
        assert torch.equal(p, start[name]) == ("bias" in name or p not in here), name
    names = {p: name for name, p in params.items()}
    for group in opt.param_groups:
        assert group["param_names"] == [names[p] for p in group["params"]]
    states = dict(opt.state)
    saved = opt.local_state_dict()
    assert [group["param_names"] for group in saved["param_groups"]] == [
        group["param_names"] for group in opt.param_groups
    ]
    assert len(saved["state"]) == len(here)
    assert {p: id(entry) for p, entry in opt.state.items()} == {p: id(entry) for p, entry in states.items()}
    opt.load_local_state_dict(saved)
    opt.add_param_group({"params": [("new", Parameter(torch.ones(3)))]})


@pytest.mark.parametrize(
    "edit", [leave_name, drop, reverse, rebuild, add_again], ids=lambda edit: edit.__name__
)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_names_follow_parameters(edit: Edit, stage: int) -> None:
    run_ranks(1, decayed, edit, stage)


def repeat(rank: int, stage: int, ranks_with: int) -> None:
    params = named_parameters()
    every = [*params.items()]
    grouped: Any = [{"params": every[:2]}, {"params": every[2:]}]
    opt: Any = Lamb(grouped) if stage == 0 else ShardedLamb(grouped, stage=stage)
    opt.every = [*params.values()]
    step(opt, 0)
    if rank < ranks_with:
        opt.param_groups[1]["params"].append(params["a.weight"])
    for _ in range(2):  # it stays an error
        with pytest.raises(ValueError, match=r"'a\.weight' is passed twice|groups"):
            opt.step()
    if rank < ranks_with:
        opt.param_groups[1]["params"].pop()
    step(opt, 1)


@pytest.mark.parametrize(("stage", "world", "ranks_with"), [(0, 1, 1), (1, 1, 1), (2, 2, 2), (1, 2, 1)])
def test_a_parameter_in_two_groups_is_an_error_until_it_is_removed(
    stage: int, world: int, ranks_with: int
) -> None:
    run_ranks(world, repeat, stage, ranks_with)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_a_parameter_twice_in_a_group_is_an_error(cls: Any) -> None:
    p, new = Parameter(torch.ones(3)), Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"'group0\.param1' is passed twice"):
        cls([p, p])
    opt = cls([p])
    with pytest.raises(ValueError, match=r"'group1\.param1' is passed twice"):
        opt.add_param_group({"params": [new, new]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_options_of_torch_are_refused_when_edited_and_when_loaded(cls: Any) -> None:
    opt = cls([{"params": parameters(), "maximize": False}])
    saved = opt.local_state_dict()
    opt.param_groups[0]["maximize"] = True
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="parameter group 0: maximize=True"):
        opt.step()
    opt.param_groups[0]["maximize"] = False
    opt.step()
    saved["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad=True"):
        opt.load_local_state_dict(saved)


def saved_without(rank: int, folder: str, stage: int) -> None:
    """A group is removed; then its parameters are in no state dict or checkpoint, and the others train alike."""

    def start() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
        named = [list(layer.named_parameters(prefix=str(index))) for index, layer in enumerate(model)]
        return model, ShardedLamb([{"params": params} for params in named], lr=0.1, stage=stage)

    def train(model: nn.Module, opt: Any) -> None:
        opt.zero_grad()
        model(torch.ones(2, 5)).sum().backward()
        opt.step()

    model, opt = start()
    train(model, opt)
    removed = opt.param_groups.pop(0)
    train(model, opt)
    checkpoint.save(folder, model, opt)
    full, local = opt.full_state_dict(), copy.deepcopy(opt.local_state_dict())
    opt.consolidate_state_dict()
    whole = opt.state_dict()
    assert [len(each["state"]) for each in (local, whole)] == [2, 2]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, opt)
    for load in (
        lambda model, opt: checkpoint.load(folder, model, opt),
        lambda model, opt: opt.load_full_state_dict(full),
        lambda model, opt: opt.load_state_dict(local),
        lambda model, opt: opt.load_local_state_dict(local),
    ):
        other, into = start()
        into.param_groups.pop(0)
        train(other, into)
        other.load_state_dict(weights)
        load(other, into)
        train(other, into)
        training.assert_same_bits(other.state_dict(), model.state_dict())
    opt.param_groups.insert(0, removed)  # its state is still there
    assert float(opt.state[removed["params"][0]]["step"]) == 1.0


@pytest.mark.parametrize("stage", [1, 2])
def test_state_is_saved_and_loaded_without_removed_parameters(stage: int, tmp_path: Path) -> None:
    run_ranks(2, saved_without, str(tmp_path / "checkpoint"), stage)
