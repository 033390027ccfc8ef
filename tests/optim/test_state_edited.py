"""``optimizer.state`` that a program resets or replaces between steps, as of torch's optimizers."""

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_lamb import Lamb, ShardedLamb
from tests.harness import run_ranks, run_ranks_expecting_errors

Edit = Callable[[Any, list[torch.Tensor]], None]


def rebind(opt: Any, params: list[torch.Tensor]) -> None:
    opt.state = defaultdict(dict)


def clear(opt: Any, params: list[torch.Tensor]) -> None:
    opt.state.clear()


def pop(opt: Any, params: list[torch.Tensor]) -> None:
    opt.state.pop(params[1])


def restart_count(opt: Any, params: list[torch.Tensor]) -> None:
    opt.state[params[0]]["step"] = torch.tensor(0.0)


def replace_moment(opt: Any, params: list[torch.Tensor]) -> None:
    opt.state[params[0]]["exp_avg"] = torch.zeros_like(opt.state[params[0]]["exp_avg"])


def replace_by_whole(opt: Any, params: list[torch.Tensor]) -> None:
    shape = params[0].shape
    opt.state[params[0]]["exp_avg"] = torch.linspace(-1, 1, shape.numel()).view(shape)


def reset_in_loop(opt: Any, params: list[torch.Tensor]) -> None:
    for p in params:
        opt.state[p] = {}


def exchange(opt: Any, params: list[torch.Tensor]) -> None:
    """Moments of two parameters of one shape."""
    first, second = opt.state[params[1]]["exp_avg"], opt.state[params[3]]["exp_avg"]
    opt.state[params[1]]["exp_avg"], opt.state[params[3]]["exp_avg"] = second, first


def mark(opt: Any, params: list[torch.Tensor]) -> None:
    """As wrappers do; no edit."""
    opt.state[params[0]]["slow"] = torch.ones(3)


EDITS = (rebind, clear, pop, restart_count, replace_moment, replace_by_whole, reset_in_loop, exchange, mark)


def model_of(sharded: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(31, 24), torch.nn.Linear(24, 24))
    if sharded:
        fully_shard(model)
    return model


def run(opt: Any, model: torch.nn.Module, edit: Edit) -> list[torch.Tensor]:
    for step in range(5):
        if step == 3:
            edit(opt, list(model.parameters()))
        opt.zero_grad()
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(8, 31, generator=generator)).square().mean().backward()
        opt.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def edited(rank: int, edit: Edit, kind: str) -> None:
    model, alone = model_of(kind == "fsdp2"), model_of(False)
    options = {} if kind == "fsdp2" else {"stage": int(kind)}
    opt = ShardedLamb(model.named_parameters(), lr=0.02, **options)  # type: ignore[arg-type]
    lamb = Lamb(alone.named_parameters(), lr=0.02)
    expected = run(lamb, alone, edit)
    for p, q in zip(run(opt, model, edit), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=3e-6, atol=1e-7)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert float(opt.state[p]["step"]) == float(lamb.state[q]["step"])
    assert len(opt.local_state_dict()["state"]) == 4
    if edit is mark:
        assert torch.equal(opt.state[next(model.parameters())]["slow"], torch.ones(3))


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize(("kind", "world"), [("1", 1), ("2", 1), ("1", 2), ("2", 2), ("fsdp2", 2)])
def test_edits_of_state_are_obeyed(edit: Edit, kind: str, world: int) -> None:
    if edit is exchange and world == 2 and kind != "fsdp2":
        edit = mark  # slices of two parameters differ in shape, which is an error
    run_ranks(world, edited, edit, kind)


def disagree(rank: int) -> None:
    model = model_of(False)
    opt = ShardedLamb(model.named_parameters(), lr=0.02, stage=2)
    run(opt, model, (clear, mark)[rank])


def test_ranks_that_edit_state_differently_raise() -> None:
    for kind, message in run_ranks_expecting_errors(2, disagree).values():
        assert kind == "ValueError"
        assert "optimizer.state" in message


def misshapen(rank: int, edit: str) -> None:
    model = model_of(False)
    opt = ShardedLamb(model.named_parameters(), lr=0.02)

    def replace(opt: Any, params: list[torch.Tensor]) -> None:
        if rank == 0:
            opt.state[params[0]][edit] = torch.full((7,), -1.0)

    run(opt, model, replace)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("exp_avg", r"optimizer.state has \(7,\) as exp_avg of '0.weight'"),
        ("step", "expected a whole number"),
    ],
)
def test_state_that_does_not_fit_is_an_error_on_every_rank(edit: str, message: str) -> None:
    failed = run_ranks_expecting_errors(2, misshapen, edit)
    assert {kind for kind, _ in failed.values()} == {"ValueError"}
    assert any(message.replace("\\", "") in text for _, text in failed.values())


def frozen_round_trip(rank: int, stage: int) -> None:
    """torch's AdamW and `Lamb` load what get_state_dict(ignore_frozen_params=True) gives; so does `ShardedLamb`."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)

    def start() -> tuple[torch.nn.Module, ShardedLamb]:
        model = model_of(False)
        opt = ShardedLamb(model.named_parameters(), lr=0.02, stage=stage)
        model[0].requires_grad_(False)  # type: ignore[operator, index]
        return model, opt

    model, opt = start()
    run(opt, model, mark)
    weights, state = get_state_dict(model, opt, options=options)
    again, resumed = start()
    set_state_dict(again, resumed, model_state_dict=weights, optim_state_dict=state, options=options)
    for p, q in zip(run(resumed, again, mark), run(opt, model, mark), strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_state_without_frozen_parameters_is_loaded(stage: int, world: int) -> None:
    run_ranks(world, frozen_round_trip, stage)


def load_after_reset(rank: int) -> None:
    model = model_of(False)
    opt = ShardedLamb(model.named_parameters(), lr=0.02)
    run(opt, model, mark)
    saved = copy.deepcopy(opt.state_dict())
    opt.state = defaultdict(dict)
    opt.load_state_dict(saved)
    for key, entry in saved["state"].items():
        assert torch.equal(opt.state_dict()["state"][key]["exp_avg"], entry["exp_avg"])


@pytest.mark.parametrize("world", [1, 2])
def test_state_is_loaded_after_a_reset(world: int) -> None:
    run_ranks(world, load_after_reset)


def save_after_reset(rank: int) -> None:
    model = model_of(False)
    params = list(model.parameters())
    opt = ShardedLamb([{"params": params[:2]}, {"params": params[2:]}], lr=0.02)
    run(opt, model, mark)
    opt.consolidate_state_dict()
    opt.state = defaultdict(dict)
    for saved in (opt.local_state_dict(), opt.full_state_dict(), opt.state_dict()):
        if rank == 0:
            assert {float(entry["step"]) for entry in saved["state"].values()} == {0.0}
            assert not any(entry["exp_avg"].any() for entry in saved["state"].values())
    run(opt, model, mark)
    for p in opt.param_groups.pop()["params"]:
        opt.state.pop(p)
    run(opt, model, mark)
    assert sorted(opt.local_state_dict()["state"]) == [0, 1]


@pytest.mark.filterwarnings("ignore:state_dict")
@pytest.mark.parametrize("world", [1, 2])
def test_state_dicts_after_a_reset_hold_the_new_state(world: int) -> None:
    run_ranks(world, save_after_reset)


def by_each_method(opt: Any, params: list[torch.Tensor], method: str) -> None:
    """Edit one entry through one method of dict; those that remove a key remove the moments' first."""
    entry = opt.state[params[1]]
    zeros = {"exp_avg": torch.zeros_like(entry["exp_avg"])}
    match method:
        case "pop" | "popitem":
            while "exp_avg" in entry:
                entry.pop("exp_avg") if method == "pop" else entry.popitem()
        case "clear":
            entry.clear()
        case "delitem":
            del entry["exp_avg"]
        case "update":
            entry.update(zeros)
        case "ior":
            entry |= zeros
        case "foreign":  # an entry that the program made and keeps
            own = opt.state[params[1]] = {**entry, "exp_avg": entry["exp_avg"].clone()}
            opt.step()
            own["exp_avg"] = zeros["exp_avg"]
        case "again":  # after a reset the entries are new ones
            opt.state.clear()
            opt.step()
            opt.state[params[1]]["exp_avg"] = zeros["exp_avg"]


METHODS = ("pop", "popitem", "clear", "delitem", "update", "ior", "foreign", "again")


def edited_by(rank: int, method: str) -> None:
    edited(rank, lambda opt, params: by_each_method(opt, params, method), "1")


@pytest.mark.parametrize("method", METHODS)
def test_each_way_to_edit_an_entry_is_noticed(method: str) -> None:
    run_ranks(1, edited_by, method)


def copied(rank: int) -> None:
    model = model_of(False)
    opt = ShardedLamb(model.named_parameters(), lr=0.02)
    run(opt, model, mark)
    entry = opt.state[next(model.parameters())]
    for copied_entry in (
        copy.copy(entry),
        copy.deepcopy(entry),
        pickle.loads(pickle.dumps(entry)),
        {**entry},
    ):
        assert type(copied_entry) is dict
        assert copied_entry.keys() == entry.keys()
    assert {type(entry) for entry in opt.local_state_dict()["state"].values()} == {dict}
    other = type(entry)({"exp_avg": entry["exp_avg"]})  # as code that maps nested containers does
    other["exp_avg"] = torch.zeros(3)
    before = opt.state[next(model.parameters())]["exp_avg"].clone()
    opt._take_state_edits()
    assert torch.equal(opt.state[next(model.parameters())]["exp_avg"], before)


def test_copies_of_an_entry_are_plain_dicts() -> None:
    run_ranks(1, copied)


def edited_values(rank: int, kind: str) -> None:
    """Moments of 8 bits, replaced by values of the parameter's shape; only their codes remain in the entry."""
    model, other = model_of(kind == "fsdp2"), model_of(kind == "fsdp2")
    options = {} if kind == "fsdp2" else {"stage": int(kind)}
    made: Any = [
        ShardedLamb(each.named_parameters(), lr=0.02, state_dtype=torch.int8, **options)  # type: ignore[arg-type]
        for each in (model, other)
    ]
    p = next(model.parameters())
    values = torch.linspace(-1, 1, p.numel()).view(p.shape)

    def write_values(opt: Any, params: list[torch.Tensor]) -> None:
        opt.state[params[0]]["exp_avg"] = values
        whole = opt.full_state_dict()
        if rank == 0:
            torch.testing.assert_close(whole["state"][0]["exp_avg"].float(), values, rtol=0.07, atol=0.001)
        assert "exp_avg" not in opt.state[params[0]]
        opt.state[params[0]]["exp_avg"] = values * 0
        opt.state[params[2]] = {
            "exp_avg": torch.zeros(params[2].shape)
        }  # the second moment and the count begin anew

    def write_codes(opt: Any, params: list[torch.Tensor]) -> None:
        opt.state[params[0]]["exp_avg_codes"].zero_()
        opt.state[params[2]] = {}

    for p, q in zip(run(made[0], model, write_values), run(made[1], other, write_codes), strict=True):
        assert torch.equal(p, q)
    made[0].state[next(model.parameters())]["exp_avg"] = torch.zeros(3)
    model(torch.ones(8, 31)).square().mean().backward()
    with pytest.raises(ValueError, match=r"optimizer.state has \(3,\) as exp_avg of '0.weight'"):
        made[0].step()


@pytest.mark.parametrize(("kind", "world"), [("1", 1), ("2", 1), ("1", 2), ("fsdp2", 2)])
def test_values_replace_encoded_moments(kind: str, world: int) -> None:
    run_ranks(world, edited_values, kind)
