"""Failures seen with parameters over flat buckets, and with masters beside them. Replaced memory: test_storages.py."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from tests import training
from tests.harness import run_ranks, run_ranks_expecting_errors

LR = 0.01


# -- flat buckets ------------------------------------------------------------------


def to_bfloat16(model: nn.Module) -> None:
    model.bfloat16()


def to_double(model: nn.Module) -> None:
    model.double()


def step_after(rank: int, detach: Callable[[nn.Module], None], stage: int) -> None:
    model = nn.Linear(7, 5)
    opt = ShardedLamb(model.named_parameters(), stage=stage)
    detach(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("detach", [to_bfloat16, to_double])
def test_parameters_that_left_their_bucket_are_an_error(
    detach: Callable[[nn.Module], None], stage: int
) -> None:
    for kind, message in run_ranks_expecting_errors(2, step_after, detach, stage).values():
        assert kind == "RuntimeError"
        assert "is no longer in its bucket" in message
        assert "now torch." in message
        assert "Convert the model first and construct the optimizer after" in message


def train_channels_last(rank: int, stage: int) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    shapes = {"conv.weight": (9, 5, 3, 3), "conv.bias": (9,)}
    params = training.parameters(shapes)
    conv = params["conv.weight"]
    conv.data = conv.data.to(memory_format=torch.channels_last)
    strides = conv.stride()
    opt = ShardedLamb(params.items(), lr=LR, stage=stage)

    def gradients(r: int, step: int) -> dict[str, Tensor | None]:
        grads = training.own_gradients(r, step, shapes)
        weight = grads["conv.weight"]
        assert weight is not None
        if step % 2:  # autograd may give either format
            grads["conv.weight"] = weight.to(memory_format=torch.channels_last)
        return grads

    training.train(opt, params, stage=stage, rank=rank, world=2, steps=range(4), gradients=gradients)
    assert strides == (45, 1, 15, 5)
    return training.copies(params), {name: p.stride() for name, p in params.items()}


@pytest.mark.parametrize("stage", [1, 2])
def test_parameters_keep_channels_last(stage: int) -> None:
    shapes = {"conv.weight": (9, 5, 3, 3), "conv.bias": (9,)}
    averaged = [
        training.average(training.own_gradients(r, step, shapes) for r in range(2)) for step in range(4)
    ]
    oracle = training.oracle_run(training.weights(shapes), averaged, lr=LR)
    for weights, strides in run_ranks(2, train_channels_last, stage):
        assert strides == {"conv.weight": (45, 1, 15, 5), "conv.bias": (1,)}
        training.assert_follows(weights, oracle)


def outlive_the_optimizer(rank: int, stage: int) -> None:
    model = nn.Linear(7, 5)
    opt = ShardedLamb(model.named_parameters(), stage=stage)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    opt.zero_grad()
    reference = weakref.ref(opt)
    del opt
    gc.collect()
    assert reference() is None
    x = training.draw((3, 7), "x", rank)
    model(x).sum().backward()
    assert model.weight.grad is not None  # no hook reduces and frees it
    torch.testing.assert_close(model.weight.grad, x.sum(0).expand(5, 7))
    model.zero_grad()
    again = ShardedLamb(model.named_parameters(), stage=stage)  # the parameters are unclaimed
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model.weight.detach().clone()
    again.step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_outlives_its_optimizer(stage: int) -> None:
    run_ranks(2, outlive_the_optimizer, stage)


# -- weights loaded after construction --------------------------------------------------------------------


def by_load_state_dict(model: nn.Module, values: dict[str, Tensor]) -> None:
    model.load_state_dict(values)


def by_data_copy(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data.copy_(values[name])


def load_weights(
    rank: int, load: Callable[[nn.Module, dict[str, Tensor]], None], stage: int, lr: float
) -> dict[str, Tensor]:
    model = nn.Linear(41, 29).bfloat16()
    opt = ShardedLamb(model.named_parameters(), lr=0.1, stage=stage)
    params = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in params.items()}

    def gradients(r: int, step: int) -> dict[str, Tensor | None]:
        return training.own_gradients(r, step, shapes)

    training.train(opt, params, stage=stage, rank=rank, world=2, steps=[0], gradients=gradients)
    load(model, {name: value.bfloat16() for name, value in training.weights(shapes).items()})
    opt.param_groups[0]["lr"] = lr
    training.train(opt, params, stage=stage, rank=rank, world=2, steps=[1], gradients=gradients)
    masters = {name: opt.state[p]["master"] for name, p in params.items()}
    return {**training.copies(params), **{f"master of {n}": m.clone() for n, m in masters.items()}}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("load", [by_load_state_dict, by_data_copy])
def test_loaded_weights_win_over_masters(
    load: Callable[[nn.Module, dict[str, Tensor]], None], stage: int
) -> None:
    shapes = {"weight": (29, 41), "bias": (29,)}
    loaded = {name: value.bfloat16() for name, value in training.weights(shapes).items()}
    parts = run_ranks(2, load_weights, load, stage, 0.0)
    for part in parts:
        training.assert_same_bits({name: part[name] for name in shapes}, loaded)
    for name in shapes:  # the ranks' slices together are the whole master
        master = torch.cat([part[f"master of {name}"] for part in parts])
        assert torch.equal(master, loaded[name].float().flatten())


def test_a_step_after_loading_starts_from_the_loaded_weights() -> None:
    shapes = {"weight": (29, 41), "bias": (29,)}
    loaded = {name: value.bfloat16() for name, value in training.weights(shapes).items()}
    averaged = [
        training.average(
            {n: g.bfloat16() for n, g in training.own_gradients(r, step, shapes).items() if g is not None}
            for r in range(2)
        )
        for step in range(2)
    ]
    oracle = training.oracle_run(loaded, averaged[:1], lr=0.0)
    for options in oracle.options.values():
        options["lr"] = 0.1
    oracle.step({name: g.numpy() for name, g in averaged[1].items() if g is not None})
    parts = run_ranks(2, load_weights, by_load_state_dict, 2, 0.1)
    masters = {name: torch.cat([part[f"master of {name}"] for part in parts]) for name in shapes}
    training.assert_follows({n: m.view(shapes[n]) for n, m in masters.items()}, oracle, 2e-5)
