"""Moments without gradients decay to 0, in every backend and format, not to subnormal numbers."""

import pytest
import torch
from torch import nn

from sharded_lamb import ShardedLamb, kernels
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
