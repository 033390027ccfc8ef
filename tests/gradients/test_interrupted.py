"""Stage 2 beside what programs do to threads: interrupts, backward in several, inference mode, fork."""

import os
import sys
import threading
import time
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.gradients.reducer import BackwardReducer
from tests import training
from tests.harness import run_ranks


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 10))


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 30, generator=torch.Generator().manual_seed(step))


def one(model: nn.Module, opt: Any, step: int) -> None:
    opt.zero_grad()
    model(batch(step)).square().mean().backward()
    opt.step()


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_an_interrupt_between_two_states_is_followed_by_ordinary_steps(moment: int) -> None:
    """KeyboardInterrupt at each transition of a step: in zero_grad, at a round's beginning and end, as it settles."""
    model, other = model_of(), model_of()
    opt, lamb = ShardedLamb(model.named_parameters(), stage=2), Lamb(other.named_parameters())
    one(model, opt, 0)
    one(other, lamb, 0)
    transitions = 0

    def interrupt(frame: FrameType, event: str, _: object) -> None:
        nonlocal transitions
        if event == "call" and frame.f_code is BackwardReducer._enter.__code__:
            transitions += 1
            if transitions == moment:
                sys.settrace(None)
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            one(model, opt, 1)
    finally:
        sys.settrace(before)
    for step in (2, 3):
        one(model, opt, step)
        one(other, lamb, step)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class Held(torch.autograd.Function):
    """A backward that waits, while others run."""

    entered, released = threading.Event(), threading.Event()

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        Held.entered.set()
        assert Held.released.wait(60)
        return grad


def test_backward_in_two_threads_at_once_is_an_error_and_one_after_another_is_not() -> None:
    model, other = model_of(), model_of()
    opt, lamb = ShardedLamb(model.named_parameters(), stage=2), Lamb(other.named_parameters())

    def in_a_thread(call: Any) -> threading.Thread:
        thread = threading.Thread(target=call)
        thread.start()
        return thread

    def held() -> None:
        hidden = Held.apply(model[1](model[0](batch(0))))  # type: ignore[no-untyped-call]
        model[2](hidden).square().mean().backward()

    first = in_a_thread(held)
    assert Held.entered.wait(60)  # the gradients of the last layer have arrived
    with pytest.raises(RuntimeError, match="two threads run backward or step"):
        model(batch(1)).square().mean().backward()
    with pytest.raises(RuntimeError, match="two threads run backward or step"):
        opt.step()
    Held.released.set()
    first.join()
    opt.zero_grad()
    for step in range(2):
        in_a_thread(lambda step=step: model(batch(step)).square().mean().backward()).join()  # type: ignore[misc]
        other(batch(step)).square().mean().backward()
    in_a_thread(opt.step).join()
    lamb.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_construction_under_inference_mode_leaves_parameters_that_train(stage: int) -> None:
    model, other = model_of(), model_of()
    with torch.inference_mode():
        opt = ShardedLamb(model.named_parameters(), stage=stage)
        assert torch.is_inference_mode_enabled()
    usual = ShardedLamb(other.named_parameters(), stage=stage)
    for step in range(2):
        one(model, opt, step)
        one(other, usual, step)
    assert not any(p.is_inference() for p in model.parameters())
    training.assert_same_bits(model.state_dict(), other.state_dict())


def delete_in_a_child(rank: int) -> None:
    model = model_of()
    opt: Any = ShardedLamb(model.named_parameters(), stage=2)
    one(model, opt, 0)
    child = os.fork()
    if child == 0:
        del opt
        os._exit(7)
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child still waits for the threads of its parent")
    assert os.waitstatus_to_exitcode(status) == 7
    one(model, opt, 1)


def test_a_forked_child_deletes_the_optimizer_and_the_parent_continues() -> None:
    run_ranks(2, delete_in_a_child)
