"""torch.compile of a training step: the optimizer runs uncompiled, with the same bits and reports."""

from typing import Any

import pytest
import torch
from torch import nn

from sharded_lamb import Lamb, ShardedLamb
from tests import training

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
