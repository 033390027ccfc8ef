"""`Lamb` updates parameters where they are, in any memory layout, by the kernels."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sharded_lamb import Lamb, ShardedLamb
from tests.oracle import OracleLamb

OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "max_grad_norm": 0.7}


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def with_gaps(x: Tensor) -> Tensor:
    return torch.full((x.shape[0], x.shape[1] + 3), 7.0, dtype=x.dtype)[:, : x.shape[1]].copy_(x)


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((7, 300), torch.Tensor.contiguous),
    "transposed": ((13, 29), transposed),
    "gaps": ((9, 61), with_gaps),
    "channels_last": ((4, 5, 3, 3), channels_last),
    "1x1_channels_last": ((6, 7, 1, 1), channels_last),
    "expanded_size_1": ((1, 70), lambda x: x.as_strided(x.shape, (999, 1))),
    "scalar": ((), torch.Tensor.clone),
    "empty": ((0, 3), torch.Tensor.clone),
}


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters() -> dict[str, Tensor]:
    return {
        name: lay(random(shape, seed)).requires_grad_()
        for seed, (name, (shape, lay)) in enumerate(LAYOUTS.items())
    }


def gradients(step: int) -> dict[str, Tensor]:
    return {name: random(shape, 100 * step + seed) for seed, (name, (shape, _)) in enumerate(LAYOUTS.items())}


def train(
    params: dict[str, Tensor], opt: Lamb, steps: range, lay: Callable[[str, Tensor], Tensor] = lambda _, g: g
) -> None:
    for step in steps:
        for name, g in gradients(step).items():
            params[name].grad = lay(name, g)
        opt.step()


@pytest.mark.parametrize("layouts_of_gradients", ["contiguous", "of the parameters"])
def test_parameters_and_gradients_of_any_layout_match_the_oracle(layouts_of_gradients: str) -> None:
    params = parameters()
    oracle = OracleLamb({name: p.detach().double().numpy() for name, p in params.items()}, **OPTIONS)
    opt = Lamb(params.items(), **OPTIONS)
    own = layouts_of_gradients == "of the parameters"
    train(params, opt, range(3), lambda name, g: LAYOUTS[name][1](g) if own else g)
    for step in range(3):
        oracle.step({name: g.double().numpy() for name, g in gradients(step).items()})
    for name, p in params.items():
        np.testing.assert_allclose(p.detach().double().numpy(), oracle.params[name], rtol=2e-5, atol=2e-6)
        assert p.stride() == parameters()[name].stride()
    ratios = opt.trust_ratios()
    assert list(ratios) == list(LAYOUTS)
    assert ratios == pytest.approx(oracle.ratios, rel=1e-5)
    assert opt.grad_norm == pytest.approx(oracle.grad_norm, rel=1e-6)


def test_memory_between_parameters_is_not_written() -> None:
    memory = torch.full((9, 64), 7.0)
    p = memory[:, :61].requires_grad_()
    p.grad = torch.ones(9, 61)
    Lamb([p], lr=0.1).step()
    assert not torch.equal(memory[:, :61], torch.full((9, 61), 7.0))
    assert torch.equal(memory[:, 61:], torch.full((9, 3), 7.0))


def replaced_by_clones(params: dict[str, Tensor], opt: Lamb) -> None:
    for p in params.values():
        p.data = p.data.clone()


def reloaded(params: dict[str, Tensor], opt: Lamb) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def reloaded_contiguous(params: dict[str, Tensor], opt: Lamb) -> None:
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["exp_avg"], state["exp_avg_sq"] = (
            state["exp_avg"].contiguous(),
            state["exp_avg_sq"].contiguous(),
        )
    opt.load_state_dict(saved)


def moments_moved(params: dict[str, Tensor], opt: Lamb) -> None:
    for state in opt.state.values():
        state["exp_avg"].data = state["exp_avg"].data.clone()
        state["exp_avg_sq"] = state["exp_avg_sq"].clone()


def states_replaced(params: dict[str, Tensor], opt: Lamb) -> None:
    for p in params.values():
        opt.state[p] = {key: value.clone() for key, value in opt.state[p].items()}


def steps_replaced(params: dict[str, Tensor], opt: Lamb) -> None:
    for state in opt.state.values():
        state["step"] = state["step"].clone()


CHANGES = [replaced_by_clones, reloaded, reloaded_contiguous, moments_moved, states_replaced, steps_replaced]


@pytest.mark.parametrize("change", CHANGES)
def test_memory_that_a_program_replaces_between_steps_is_followed(
    change: Callable[[dict[str, Tensor], Lamb], None],
) -> None:
    params, expected = parameters(), parameters()
    opt, undisturbed = Lamb(params.items(), **OPTIONS), Lamb(expected.items(), **OPTIONS)
    train(params, opt, range(2))
    train(expected, undisturbed, range(2))
    change(params, opt)
    train(params, opt, range(2, 4))
    train(expected, undisturbed, range(2, 4))
    assert {name for name, p in params.items() if not torch.equal(p, expected[name])} == set()
    for actual, state in zip(*(o.state_dict()["state"].values() for o in (opt, undisturbed)), strict=True):
        assert {key for key in state if not torch.equal(actual[key], state[key])} == set()


@pytest.mark.parametrize("replaces", [False, True])
def test_a_step_that_a_program_writes_counts(replaces: bool) -> None:
    """As in torch's optimizers: ``state["step"]`` is a tensor of its own, from which the next step counts on."""
    p = torch.ones(3, requires_grad=True)
    opt = Lamb([p], lr=0.1)
    for _ in range(2):
        p.grad = torch.ones(3)
        opt.step()
        state = opt.state[p]
        assert state["step"].untyped_storage().nbytes() == 8
        if replaces:
            state["step"] = torch.tensor(50.0, dtype=torch.float64)
        else:
            state["step"].fill_(50)
    assert opt.state[p]["step"] == 50
    opt.step()
    assert opt.state_dict()["state"][0]["step"] == 51
    # With constant gradients m̂ = (1 - 0.9³)/(1 - 0.9⁵¹) and v̂ = (1 - 0.999³)/(1 - 0.999⁵¹): ‖u‖ tells the step.
    u = (1 - 0.9**3) / (1 - 0.9**51) / ((1 - 0.999**3) / (1 - 0.999**51)) ** 0.5
    weight = p.detach() / (1 - 0.1)  # before the last step, which shrinks the constant vector by lr
    expected = (weight / (u + 0.01 * weight))[0].item()
    assert opt.trust_ratios()["group0.param0"] == pytest.approx(expected, rel=1e-4)


def test_weights_written_between_steps_are_read() -> None:
    params, expected = parameters(), parameters()
    opt = Lamb(params.items(), **OPTIONS)
    train(params, opt, range(1))
    with torch.no_grad():
        for name, p in params.items():
            p.mul_(2)
            expected[name].copy_(p)
    fresh = Lamb(expected.items(), **OPTIONS)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(params, opt, range(1, 2))
    train(expected, fresh, range(1, 2))
    assert {name for name, p in params.items() if not torch.equal(p, expected[name])} == set()


def test_a_model_converted_to_another_memory_format_trains_on() -> None:
    p, expected = (random((4, 5, 3, 3), 1).requires_grad_() for _ in range(2))
    opt, undisturbed = Lamb([p], **OPTIONS), Lamb([expected], **OPTIONS)
    for step in range(4):
        if step == 2:
            p.data = channels_last(p.data)
        p.grad, expected.grad = random((4, 5, 3, 3), 10 + step), random((4, 5, 3, 3), 10 + step)
        opt.step()
        undisturbed.step()
    torch.testing.assert_close(p, expected, rtol=3e-7, atol=3e-7)
    assert p.is_contiguous(memory_format=torch.channels_last)


def test_parameters_that_get_gradients_in_turn_keep_their_own_steps() -> None:
    params = {name: random((300,), seed).requires_grad_() for seed, name in enumerate("abc")}
    oracle = OracleLamb(
        {name: p.detach().double().numpy() for name, p in params.items()}, lr=0.05, weight_decay=0.1
    )
    opt = Lamb(params.items(), lr=0.05, weight_decay=0.1)
    for step, present in enumerate(["ab", "b", "ca", "abc", "c"]):
        grads = {name: random((300,), 50 + step) for name in present}
        for name, p in params.items():
            p.grad = grads.get(name)
        opt.step()
        oracle.step({name: grads[name].double().numpy() if name in grads else None for name in params})
        assert list(opt.trust_ratios()) == sorted(present)
    for name, p in params.items():
        np.testing.assert_allclose(p.detach().double().numpy(), oracle.params[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_are_those_of_one_rank(dtype: torch.dtype) -> None:
    shapes = [(300, 7), (256,), (), (1000,)]
    params, sharded = ([random(s, i).to(dtype).requires_grad_() for i, s in enumerate(shapes)] for _ in "ab")
    opt = Lamb(params, **OPTIONS)
    other = ShardedLamb(sharded, **OPTIONS)
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, sharded, strict=True)):
            p.grad = random(p.shape, 10 * step + i).to(dtype)
            q.grad = p.grad.clone()
        opt.step()
        other.step()
    assert [i for i, (p, q) in enumerate(zip(params, sharded, strict=True)) if not torch.equal(p, q)] == []


def test_a_dtensor_is_refused_with_the_remedy() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        p = distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
        with pytest.raises(TypeError, match=r"'w' is a DTensor.*ShardedLamb updates DTensors"):
            Lamb([("w", p)])
    finally:
        dist.destroy_process_group()


def test_backward_through_a_graph_from_before_the_step_raises() -> None:
    layer = nn.Linear(3, 3)
    opt = Lamb(layer.parameters())
    loss = layer(layer(torch.ones(2, 3))).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
