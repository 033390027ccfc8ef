"""`clip_grad_norm_` followed by other changes of gradients, as torch's own acts on ``.grad``."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sharded_lamb import ShardedLamb
from tests.harness import run_ranks, run_ranks_expecting_errors
from tests.training import (
    assert_follows,
    average,
    backward,
    oracle_run,
    own_gradients,
    parameters,
    weights,
)

Gradients = dict[str, Tensor | None]
ONE = "fc.weight"
LIMIT = 0.5


def averaged(step: int) -> Gradients:
    return average([own_gradients(rank, step) for rank in range(2)])


def give(params: dict[str, Parameter], rank: int, step: int, stage: int, only: str = "") -> None:
    """Gradients as backward leaves them in either stage."""
    grads = own_gradients(rank, step) if stage == 2 else averaged(step)
    grads = {name: grad if only in ("", name) else None for name, grad in grads.items()}
    if stage == 2:
        backward(params, grads)
    else:
        for name, grad in grads.items():
            if grad is not None:
                params[name].grad = grad.to(params[name].dtype)


def clipped(grads: Gradients, limit: float = LIMIT) -> Gradients:
    norm = torch.cat([grad.double().flatten() for grad in grads.values() if grad is not None]).norm()
    factor = min(1.0, limit / float(norm))
    return {name: None if grad is None else grad.double() * factor for name, grad in grads.items()}


def twice(opt: ShardedLamb, params: dict[str, Parameter], rank: int, stage: int) -> Gradients:
    opt.clip_grad_norm_(LIMIT)
    assert float(opt.clip_grad_norm_(4 * LIMIT)) == pytest.approx(LIMIT, rel=1e-5)
    return clipped(averaged(0))


def zeroed(opt: ShardedLamb, params: dict[str, Parameter], rank: int, stage: int) -> Gradients:
    opt.clip_grad_norm_(LIMIT)
    for p in params.values():
        p.grad = None
    give(params, rank, 1, stage)
    return averaged(1)


def one_zeroed(opt: ShardedLamb, params: dict[str, Parameter], rank: int, stage: int) -> Gradients:
    opt.clip_grad_norm_(LIMIT)
    params[ONE].grad = None
    give(params, rank, 1, stage, ONE)
    return {**clipped(averaged(0)), ONE: averaged(1)[ONE]}


def zeroed_and_clipped(opt: ShardedLamb, params: dict[str, Parameter], rank: int, stage: int) -> Gradients:
    zeroed(opt, params, rank, stage)
    opt.clip_grad_norm_(2 * LIMIT)
    return clipped(averaged(1), 2 * LIMIT)


def zeroed_in_place(opt: ShardedLamb, params: dict[str, Parameter], rank: int, stage: int) -> Gradients:
    opt.clip_grad_norm_(LIMIT)
    for p in params.values():
        assert p.grad is not None
        p.grad.zero_()
    if stage == 2:
        backward(params, own_gradients(rank, 1))
    else:
        for name, grad in averaged(1).items():
            params[name].grad += grad.float()  # type: ignore[operator, union-attr]
    opt.clip_grad_norm_(2 * LIMIT)
    return clipped(averaged(1), 2 * LIMIT)


def zeroed_and_added(opt: ShardedLamb, params: dict[str, Parameter], rank: int, stage: int) -> Gradients:
    """Two backwards after the gradients that were clipped are gone."""
    zeroed(opt, params, rank, stage)
    if stage == 2:
        backward(params, own_gradients(rank, 2))
    else:
        for name, grad in averaged(2).items():
            params[name].grad += grad.float()  # type: ignore[operator, union-attr]
    return {name: grad + averaged(2)[name] for name, grad in averaged(1).items()}  # type: ignore[operator]


def moved(opt: ShardedLamb, params: dict[str, Parameter], rank: int, stage: int) -> Gradients:
    """`module.to` copies gradients; what was their memory then holds other values."""
    opt.clip_grad_norm_(LIMIT)
    before = [p.grad.data for p in params.values() if p.grad is not None and stage == 1]
    nn.ParameterDict({name.replace(".", "_"): p for name, p in params.items()}).to("cpu:0")
    for values in before:
        values.fill_(7.0)
    return clipped(averaged(0))


Change = Callable[[ShardedLamb, dict[str, Parameter], int, int], Gradients]


def run(rank: int, change: Change, stage: int) -> tuple[dict[str, Tensor], Gradients]:
    params = parameters()
    opt = ShardedLamb(params.items(), stage=stage)
    give(params, rank, 0, stage)
    expected = change(opt, params, rank, stage)
    opt.step()
    return {name: p.detach().clone() for name, p in params.items()}, expected


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "change", [twice, zeroed, one_zeroed, zeroed_and_added, zeroed_and_clipped, zeroed_in_place, moved]
)
def test_the_step_clips_the_gradients_that_were_clipped(change: Change, stage: int) -> None:
    for stepped, expected in run_ranks(2, run, change, stage):
        assert_follows(stepped, oracle_run(weights(), [expected]))


def changed_after(rank: int) -> None:
    params = parameters()
    opt = ShardedLamb(params.items())
    give(params, rank, 0, 1)
    opt.clip_grad_norm_(LIMIT)
    assert params[ONE].grad is not None
    params[ONE].grad.mul_(2)
    opt.step()


def test_a_change_in_place_after_clipping_is_an_error() -> None:
    for kind, message in run_ranks_expecting_errors(2, changed_after).values():
        assert (kind, "call it again after the last change" in message) == ("RuntimeError", True)
