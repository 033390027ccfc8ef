"""timm's options beside timm's own Lamb: decoupled and corrected decay, the ratio's bound, caution."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import Lamb, ShardedLamb
from tests import training
from tests.harness import run_ranks
from tests.timm_peer import load_timm_lamb

SHAPES: dict[str, training.Shape] = {
    "embed.weight": (67, 31),
    "fc.weight": (37, 23),
    "fc.bias": (1,),
    "scale": (),
}
PEAK, STEPS = 0.05, 6
RATES = [PEAK, PEAK, 0.8 * PEAK, 0.5 * PEAK, 0.1 * PEAK, 0.0]
DECAY = 0.3


def trained(make: Any, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Tensor]:
    params = {name: nn.Parameter(w.to(dtype)) for name, w in training.weights(SHAPES).items()}
    optimizer = make(params, lr=PEAK, weight_decay=DECAY, **options)
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in params.items():
            p.grad = training.draw(SHAPES[name], name, step).to(dtype)
        optimizer.step()
    return training.copies(params)


def ours(cls: Any) -> Any:
    return lambda params, **options: cls(params.items(), variant="timm", **options)


def timms(params: Mapping[str, nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    return load_timm_lamb()(list(params.values()), **options)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "decoupled": ({"decoupled_decay": True}, {"decoupled_decay": True}),
    "corrected": (corrected := {"decoupled_decay": True, "corrected_weight_decay": True}, corrected),
    "corrected, with the peak": ({"decoupled_decay": True, "corrected_weight_decay": PEAK}, corrected),
    "caution": ({"caution": True}, {"caution": True}),
    "caution, corrected": (all_of_it := {**corrected, "caution": True}, all_of_it),
    "clipped": ({"trust_clip": 1.0, "decoupled_decay": True}, {"trust_clip": True, "decoupled_decay": True}),
}


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize("case", CASES)
def test_options_follow_timms_class(case: str, cls: Any) -> None:
    own, theirs = CASES[case]
    expected = trained(timms, **theirs)
    for name, value in trained(ours(cls), **own).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-13)
    plain = trained(ours(cls))
    assert not torch.allclose(plain["embed.weight"], expected["embed.weight"], rtol=1e-4)


def test_corrected_decay_follows_timm() -> None:
    """Corrected and plain decoupled decay differ once the rate has left its peak."""
    plain, fixed = (trained(ours(ShardedLamb), **CASES[case][0]) for case in ("decoupled", "corrected"))
    assert not torch.allclose(plain["embed.weight"], fixed["embed.weight"], rtol=1e-4)


def sharded(rank: int, stage: int, variant: str) -> dict[str, Tensor]:
    def make(params: Mapping[str, nn.Parameter], **options: Any) -> ShardedLamb:
        return ShardedLamb(params.items(), stage=stage, variant=variant, bucket_mb=0.002, **options)

    return trained(make, torch.float32, decoupled_decay=True, corrected_weight_decay=True)


@pytest.mark.parametrize(("variant", "stage"), [("timm", 1), ("timm", 2), ("lans", 2)])
def test_decoupled_decay_has_the_same_bits_on_any_number_of_ranks(variant: str, stage: int) -> None:
    alone = sharded(0, stage, variant)
    for world in (2, 4):  # of which averages of equal gradients are those gradients
        for params in run_ranks(world, sharded, stage, variant):
            training.assert_same_bits(params, alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoupled_decay": True, "adam_w_mode": False}, "the decay is outside u, or in the gradient"),
        ({"corrected_weight_decay": True}, "give decoupled_decay=True too"),
        ({"corrected_weight_decay": -1.0, "decoupled_decay": True}, "or that rate, > 0"),
        ({"corrected_weight_decay": True, "decoupled_decay": True, "lr": 0.0}, "or that rate, > 0"),
        ({"trust_clip": 0.0}, r"trust_clip must be None or a pair \(low, high\)"),
        ({"trust_clip": True}, r"trust_clip must be None or a pair \(low, high\)"),
    ],
    ids=str,
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lamb([nn.Parameter(torch.ones(3))], **options)
