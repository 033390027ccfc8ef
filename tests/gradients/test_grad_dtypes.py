"""Gradients of another dtype than their parameters': ``Tensor.grad_dtype``."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.harness import run_ranks
from tests.pairs import pairs

pytestmark = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch has no Tensor.grad_dtype")

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
DTYPES = {
    "float32 of bfloat16": (HALF, SINGLE),
    "bfloat16 of float32": (SINGLE, HALF),
    "float32 of float16": (torch.float16, SINGLE),
    "float64 of float32": (SINGLE, DOUBLE),
    "float32 of float64": (DOUBLE, SINGLE),
    "any of bfloat16": (HALF, None),
    "any of float32": (SINGLE, None),
}
LR, STEPS = 0.02, 4


class WithGradient(torch.autograd.Function):
    """A loss whose gradient is given, in its own dtype."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, grad: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(grad)
        return (p.detach().double() * grad.double()).sum()

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * by.to(grad.dtype), None


def given(rank: int, step: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Each rank lacks fc.bias in every other step, and every rank norm.bias."""
    grads = training.own_gradients(rank, step)
    lacks = {"norm.bias"} | ({"fc.bias"} if (rank + step) % 2 else set())
    return {name: None if name in lacks or g is None else g.to(dtype) for name, g in grads.items()}


def parameters(dtype: torch.dtype, grad_dtype: torch.dtype | None) -> dict[str, nn.Parameter]:
    params: dict[str, Any] = training.parameters(dtype=dtype)
    for p in params.values():
        p.grad_dtype = grad_dtype
    return params


def backward(params: dict[str, nn.Parameter], grads: dict[str, Tensor | None]) -> None:
    terms = [WithGradient.apply(params[name], g) for name, g in grads.items() if g is not None]
    torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]


def train(rank: int, kind: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], list[float | None]]:
    """Weights and norms; each step accumulates in no_sync, then reduces, twice."""
    dtype, grad_dtype = DTYPES[kind]
    params, norms = parameters(dtype, grad_dtype), []
    opt = ShardedLamb(params.items(), lr=LR, stage=2, bucket_mb=0.002, **options)
    for step in range(STEPS):
        for part in range(4):
            with contextlib.nullcontext() if part % 2 else opt.no_sync():
                backward(params, given(rank, 4 * step + part, grad_dtype or SINGLE))
        for p in params.values():
            assert p.grad is None or p.grad.dtype == (grad_dtype or dtype)
        nn.utils.clip_grad_norm_(params.values(), 1e6)
        opt.step()
        norms.append(opt.grad_norm)
        opt.zero_grad(set_to_none=step % 2 == 0)
    return training.copies(params), norms


@pairs(kind=[*DTYPES], world=[1, 2, 3], wide=[False, True])
def test_the_step_uses_gradients_of_their_own_dtype(kind: str, world: int, wide: bool) -> None:
    """``wide``: they travel as fp32."""
    dtype, grad_dtype = DTYPES[kind]
    sums = []
    for step in range(STEPS):
        total: dict[str, Tensor] = {}
        for part in range(4):
            average = training.average(given(r, 4 * step + part, grad_dtype or SINGLE) for r in range(world))
            for name, g in average.items():
                if g is not None:
                    total[name] = total[name] + g if name in total else g
        sums.append(total)
    start = {name: w.to(dtype) for name, w in training.weights().items()}
    oracle = training.oracle_run(start, sums, lr=LR)
    expected = [float(torch.cat([g.flatten() for g in s.values()]).norm()) for s in sums]
    rounds = {HALF: 2.0**-8, torch.float16: 2.0**-11}
    # Gradients that accumulate, or travel, in 16 bits are rounded; gradients of any dtype travel as the parameters'.
    any_narrow = grad_dtype is None and not wide
    of_gradients = rounds.get(dtype if any_narrow else grad_dtype or SINGLE, 0)
    options = {"reduce_dtype": SINGLE} if wide and dtype != DOUBLE else {}
    for weights, norms in run_ranks(world, train, kind, options):
        assert norms == pytest.approx(expected, rel=max(3e-6, of_gradients))
        training.assert_follows(
            weights, oracle, max(4e-6, rounds.get(dtype, 0) + 4 * LR * STEPS * of_gradients)
        )


@pytest.mark.parametrize("make", [Lamb, lambda p: ShardedLamb(p, stage=1), lambda p: ShardedLamb(p, stage=2)])
def test_a_dtype_that_kernels_do_not_read_is_refused(make: Any) -> None:
    p: Any = nn.Parameter(torch.ones(3))
    p.grad_dtype = torch.float8_e4m3fn
    with pytest.raises(
        TypeError, match=r"grad_dtype=torch\.float8_e4m3fn: LAMB reads gradients of torch\.float16"
    ):
        make([("w", p)])
