"""Invalid arguments at construction: each error names the argument, the value and the remedy."""

from typing import Any

import pytest
from torch import nn
from torch.optim import Optimizer

from sharded_lamb import Lamb, ShardedLamb

pytestmark = pytest.mark.parametrize("cls", [Lamb, ShardedLamb])


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, r"lr must be a finite number >= 0.*got -1\.0"),
    ({"lr": float("nan")}, ValueError, r"lr must be a finite number >= 0.*got nan"),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be a number in \[0, 1\), got 1\.0"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be a number in \[0, 1\), got -0\.1"),
    ({"betas": 0.9}, ValueError, r"betas must be a pair of numbers"),
    ({"eps": 0.0}, ValueError, r"eps must be a finite number > 0.*got 0\.0"),
    ({"weight_decay": -1}, ValueError, r"weight_decay must be a finite number >= 0, got -1"),
    ({"max_grad_norm": -1.0}, ValueError, r"max_grad_norm must be a number > 0, or None.*got -1\.0"),
    ({"trust_clip": (2, 1)}, ValueError, r"trust_clip must be None or a pair.*got \(2, 1\)"),
    ({"weight_norm_clip": 3}, ValueError, r"weight_norm_clip must be None or a pair.*got 3"),
    ({"bias_correction": "m"}, ValueError, r"bias_correction must be True, False or \"lr\", got 'm'"),
    ({"grad_averaging": 1}, ValueError, r"grad_averaging must be True or False, got 1"),
    ({"variant": "lomb"}, ValueError, r"variant must be one of .*got 'lomb'"),
    ({"exclude_from_weight_decay": "bias"}, TypeError, r"must be a sequence of patterns, got 'bias'"),
    ({"exclude_from_weight_decay": ("b(",)}, ValueError, r"'b\(' is not a regular expression"),
    ({"exclude_from_weight_decay": ("bais",)}, ValueError, r"matches no parameter.*looks like '0\.weight'"),
    ({"bias_corection": True}, TypeError, r"'bias_corection'; did you mean 'bias_correction'\?"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments(
    cls: type[Optimizer], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        cls(small_model().named_parameters(), **options)


def test_patterns_need_names(cls: type[Optimizer]) -> None:
    with pytest.raises(
        ValueError, match=r"pass model\.named_parameters\(\) instead of model\.parameters\(\)"
    ):
        cls(small_model().parameters(), exclude_from_weight_decay=("bias",))
    cls(small_model().parameters(), exclude_from_weight_decay=("ndim<=1",))
