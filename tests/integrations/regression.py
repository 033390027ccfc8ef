"""A small model that records what it trains on, and a float64 LAMB over the global batch that follows it.

The model returns its loss first, as the Trainer's do. Gradients of the reference come from torch's autograd in float64,
over the samples of all ranks at once.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests import training
from tests.oracle import OracleLamb

WIDTH, OUT, SAMPLES = 7, 3, 64
NO_DECAY = ("first.bias", "norm.weight", "norm.bias", "last.bias")
"""As the Trainer decides it."""
NO_ADAPT = (*NO_DECAY, "scale")


class Regression(nn.Module):
    """Every forward appends its samples' numbers to ``seen``. ``scalar``: fully_shard takes no 0-dim parameters."""

    def __init__(self, scalar: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(WIDTH, 13), nn.LayerNorm(13), nn.Linear(13, OUT)
        self.scale = nn.Parameter(torch.ones(() if scalar else (1,)))
        self.seen: list[list[int]] = []

    def forward(self, x: Tensor, y: Tensor, number: Tensor) -> tuple[Tensor]:
        if self.training:
            self.seen.append(number.tolist())
        hidden = self.norm(torch.tanh(self.first(x)))
        return ((self.last(hidden) * self.scale - y).square().mean(),)


def sample(number: int) -> dict[str, Tensor]:
    return {
        "x": training.draw((WIDTH,), "x", number),
        "y": training.draw((OUT,), "y", number) * 3,
        "number": torch.tensor(number),
    }


DATA = [sample(number) for number in range(SAMPLES)]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies, under the names of the unwrapped model."""
    params = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    return training.copies(params)


def follow(
    seen: Sequence[Sequence[Sequence[int]]],
    *,
    micro_batches: int = 1,
    lr: Callable[[int], float] = lambda step: 0.02,
    no_decay: Collection[str] = NO_DECAY,
    scalar: bool = True,
    **options: Any,
) -> OracleLamb:
    """The reference after the steps that ranks took. ``seen``: by rank, the numbers of every micro-batch."""
    model = Regression(scalar).double()
    params = dict(model.named_parameters())
    oracle = OracleLamb({n: p.detach().numpy() for n, p in params.items()}, no_decay=no_decay, **options)
    micro_steps = len(seen[0])
    assert all(len(of_rank) == micro_steps for of_rank in seen)
    for step in range(micro_steps // micro_batches):
        batches = slice(step * micro_batches, (step + 1) * micro_batches)
        numbers = [n for of_rank in seen for batch in of_rank[batches] for n in batch]
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(torch.from_numpy(oracle.params[name]))
        batch = {key: torch.stack([DATA[n][key] for n in numbers]) for key in ("x", "y")}
        model.zero_grad()
        model(batch["x"].double(), batch["y"].double(), torch.tensor(numbers))[0].backward()
        for options_of in oracle.options.values():
            options_of["lr"] = lr(step)
        oracle.step({name: p.grad.numpy() for name, p in params.items() if p.grad is not None})
    return oracle


def assert_follows(weights: Mapping[str, Tensor], oracle: OracleLamb, tolerance: float = 2e-5) -> None:
    training.assert_follows(weights, oracle, tolerance)
