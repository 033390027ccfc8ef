"""Moments without gradients decay to 0, in every backend and format, not to subnormal numbers."""

import pytest
import torch
from torch import nn

from sharded_lamb import Lamb, ShardedLamb, kernels
from sharded_lamb.kernels import ScatteredShard
from sharded_lamb.kernels.engine import Update
from tests.kernels.kernel_memory import assert_subnormal_moments_become_zero

NAMES = [name for name in kernels.available() if name != "triton"]


@pytest.mark.parametrize("update", range(4), ids=["lamb", "nesterov", "caution", "lars"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_only_subnormal_moments_become_zero(name: str, dtype: torch.dtype, update: int) -> None:
    for step in (63, 64, 65, 128):
        assert_subnormal_moments_become_zero(kernels.choose(name, torch.device("cpu")), dtype, update, step)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_moments_without_gradients_do_not_stay_subnormal(name: str, state_dtype: torch.dtype) -> None:
    """An embedding's rows that batches no longer have: 1e-14 x 0.6^140 is 1e-45, and 0.6 times it rounds to it.

    The last of these steps that flushes is the 192nd.
    """
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(300))
    opt = ShardedLamb([("w", parameter)], lr=0.0, betas=(0.6, 0.6), state_dtype=state_dtype, kernel=name)
    parameter.grad = torch.randn(300) * 1e-14
    opt.step()
    assert opt.state_dict()["state"][0]["exp_avg_sq"].count_nonzero() > 250
    parameter.grad.zero_()
    for _ in range(200):
        opt.step()
    state = opt.state_dict()["state"][0]
    assert not state["exp_avg"].any()
    smallest = 2.0**-98 if state_dtype == torch.int8 else 0  # of a second moment of 8 bits
    assert (state["exp_avg_sq"] <= smallest).all()
    assert not ((state["exp_avg_sq"] > 0) & (state["exp_avg_sq"] < 2.0**-126)).any()


@pytest.mark.parametrize("variant", ["lamb", "lans", "lars"])
@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_a_gradient_keeps_subnormal_moments(name: str, variant: str) -> None:
    """Its last step was the 64th; a step of the others is none of its own."""
    torch.manual_seed(0)
    gradient = torch.randn(300)
    gradient[::2] *= 1e-37
    for make in (lambda *args, **options: ShardedLamb(*args, kernel=name, **options), Lamb):
        a, b = (nn.Parameter(torch.randn(300)) for _ in range(2))
        opt = make([a, b], lr=1e-3, weight_decay=0.0, variant=variant)
        for _ in range(64):
            a.grad, b.grad = torch.ones(300), gradient.clone()
            opt.step()
        before = opt.state_dict()["state"][1]["exp_avg"].clone()
        assert ((before != 0) & (before.abs() < 2.0**-126)).sum() > 10
        b.grad = None
        opt.step()
        assert torch.equal(opt.state_dict()["state"][1]["exp_avg"], before)


@pytest.mark.parametrize("variant", ["lamb", "lans", "lars"])
@pytest.mark.parametrize("step", [0, 64])
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_keeps_subnormal_moments(name: str, step: int, variant: str) -> None:
    """On a GPU the kernels run in a skipped step too, which the host does not see."""
    opt = ShardedLamb([nn.Parameter(torch.ones(300))], variant=variant)
    weight, grad, exp_avg = torch.ones(300), torch.full((300,), torch.nan), torch.full((300,), 1e-40)
    second = None if variant == "lars" else [exp_avg.clone()]
    shard = ScatteredShard((0,), [weight], [grad], [exp_avg], second)
    none = torch.zeros(1, dtype=torch.float64)
    update = Update(
        kernels.choose(name, torch.device("cpu")),
        opt._table.options(),
        step=none + step,
        active=torch.tensor([False]),
        grad_scale=none[0],
    )
    update.square_sums(update.moments_and_norms([shard]))
    sizes = none.expand({"lamb": 1, "lans": 2, "lars": 3}[variant], 1).clone()
    assert [*update.apply([[shard]], sizes, none, are_gathered=False)] == [0]
    for moment in (exp_avg, *(second or ())):
        assert torch.equal(moment, torch.full((300,), 1e-40))
    assert torch.equal(weight, torch.ones(300))
