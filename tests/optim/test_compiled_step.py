"""torch.compile of a training step: the optimizer runs uncompiled, with the same bits and reports."""

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.harness import run_ranks

SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Lamb": (Lamb, {}),
    "stage 1": (ShardedLamb, {"stage": 1}),
    "stage 2": (ShardedLamb, {"stage": 2}),
}


def trained(made: str, compiled: bool, *, clips: bool) -> tuple[dict[str, torch.Tensor], list[Any]]:
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    cls, settings = SETTINGS[made]
    opt = cls(model.named_parameters(), lr=0.05, **settings)
    reports = []

    def step() -> None:
        if clips:
            opt.clip_grad_norm_(0.1)
        opt.step()
        opt.zero_grad()

    run = torch.compile(step, backend="eager") if compiled else step
    for number in range(3):
        opt.param_groups[0]["lr"] = 0.05 / (1 + number)
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        model(inputs).square().mean().backward()
        run()
        reports.append((opt.trust_ratios(), opt.grad_norm))
    return training.copies(dict(model.named_parameters())), reports


@pytest.mark.parametrize("made", SETTINGS)
def test_a_compiled_step_has_the_same_bits_and_reports(made: str) -> None:
    clips = made != "Lamb"
    weights, reports = trained(made, True, clips=clips)
    plain, expected = trained(made, False, clips=clips)
    training.assert_same_bits(weights, plain)
    assert reports == expected
    assert all(ratios and norm for ratios, norm in reports)


def train_whole_steps(
    rank: int, stage: int, backend: str | None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights after steps that are one function, compiled by ``backend``; the functions of ours that were compiled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
    opt = ShardedLamb(model.named_parameters(), lr=0.05, stage=stage, bucket_mb=0.0001)

    def step(inputs: torch.Tensor) -> None:
        opt.zero_grad()
        model(inputs).square().mean().backward()
        opt.step()

    run = step if backend is None else torch.compile(step, backend=backend)
    torch._dynamo.utils.clear_compilation_metrics()
    for number in range(3):
        own = number if stage == 1 else (rank, number)
        run(torch.randn(4, 6, generator=torch.Generator().manual_seed(hash(own) % 1000)))
    compiled = [str(seen.co_filename) for seen in torch._dynamo.utils.get_compilation_metrics()]
    return training.copies(dict(model.named_parameters())), [f for f in compiled if "/sharded_lamb/" in f]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_compiled_training_step_compiles_nothing_of_the_optimizer(world: int, stage: int) -> None:
    expected = run_ranks(world, train_whole_steps, stage, None)
    for (weights, compiled), (plain, _) in zip(
        run_ranks(world, train_whole_steps, stage, "eager"), expected, strict=True
    ):
        training.assert_same_bits(weights, plain)
        assert compiled == []


def compile_the_backward(rank: int) -> str:
    """The error; the next step, uncompiled, has the bits of a run without it."""
    weights = []
    message = ""
    for fails in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        opt = ShardedLamb(model.named_parameters(), lr=0.05, stage=2)

        def backward(model: nn.Module = model) -> None:
            model(torch.ones(4, 6)).square().mean().backward()

        if fails:
            with torch._dynamo.config.patch(compiled_autograd=True), pytest.raises(RuntimeError) as error:
                torch.compile(backward, backend="eager")()
            message = str(error.value)
        opt.zero_grad()
        backward()
        opt.step()
        weights.append(training.copies(dict(model.named_parameters())))
    training.assert_same_bits(*weights)
    return message


@pytest.mark.parametrize("world", [1, 2])
def test_a_compiled_backward_is_an_error_with_the_remedy(world: int) -> None:
    for message in run_ranks(world, compile_the_backward):
        assert "compile the forward only" in message
