"""A model whose gradients are known in every precision, its data, and the oracle of training it on a global batch.

The loss is linear in the parameters, and data are small integers: gradients are exact in bf16 and fp16, and equal to
`gradients`, which numpy computes from the data.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from tests.oracle import OracleLamb
from tests.training import draw

WORLD = 2
BATCH = 4  # of a rank
LR = 0.05
OPTIONS: dict[str, Any] = {
    "lr": LR,
    "eps": 0.1,
    "weight_decay": 0.1,
}  # a scale of gradients shows beside a large eps
OVERFLOW = 2.0**12  # times GradScaler's scale, fp16's largest number is exceeded


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 9)
        self.head = nn.Linear(12, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros(()))
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(draw(p.shape, "weight", name))

    def forward(self, x: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """The loss of a batch: x [B, 12], c [B, 9], d [B]."""
        scores = (self.up(x) * c).sum(1) + self.head(x)[:, 0] * d + self.scale.sum() * d
        return scores.mean()


def data(batches: int, overflowing: int | None = None) -> TensorDataset:
    """``batches`` global batches; gradients of batch ``overflowing`` are infinite in fp16."""
    samples = batches * BATCH * WORLD
    x, c, d = (integers(samples, width, name) for name, width in (("x", 12), ("c", 9), ("d", 1)))
    if overflowing is not None:
        x[overflowing * BATCH * WORLD : (overflowing + 1) * BATCH * WORLD] *= OVERFLOW
    return TensorDataset(x, c, d[:, 0])


def integers(samples: int, width: int, name: str) -> Tensor:
    """From -2 to 2."""
    return draw((samples, width), "data", name).round().clamp(-2, 2)


def gradients(dataset: Dataset[Any], first: int, batches: int = 1) -> dict[str, np.ndarray]:
    """The gradient of the mean loss over ``batches`` global batches from ``first``."""
    per_batch = BATCH * WORLD
    x, c, d = (
        tensor[first * per_batch : (first + batches) * per_batch].double().numpy()
        for tensor in dataset.tensors  # type: ignore[attr-defined]
    )
    return {
        "up.weight": c.T @ x / len(x),
        "up.bias": c.mean(0),
        "head.weight": (d @ x)[None] / len(x),
        "scale": np.full(3, d.mean()),
    }


def oracle(
    dataset: Dataset[Any],
    steps: Iterable[int],
    *,
    batches: int = 1,
    lr_of: Callable[[int], float] = lambda step: 1.0,
    scales: Mapping[str, float] = MappingProxyType({}),
    **options: Any,
) -> OracleLamb:
    """The float64 LAMB after ``steps``, each over ``batches`` global batches; ``lr_of``: a schedule's factor;
    ``scales``: a parameter's."""
    followed = OracleLamb(
        {name: p.detach().double().numpy() for name, p in Net().named_parameters()}, **OPTIONS, **options
    )
    for step in steps:
        for name, own in followed.options.items():
            own["lr"] = LR * lr_of(step) * scales.get(name, 1.0)
        followed.step(gradients(dataset, step * batches, batches))
    return followed


def values(net: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, whole."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in net.named_parameters()
    }


def flat(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a nested optimizer state, by path."""
    if isinstance(state, Tensor):
        return {prefix: (state.to_local() if hasattr(state, "to_local") else state).detach().clone()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    found: dict[str, Tensor] = {}
    for key, value in items:
        found |= flat(value, f"{prefix}/{key}")
    return found


def run_file(path: Path, folder: Path) -> dict[str, Any]:
    """Run an example as torchrun would, in ``folder``; return its globals."""
    import os
    import runpy

    before = os.getcwd()
    os.chdir(folder)
    try:
        return runpy.run_path(str(path), run_name="__main__")
    finally:
        os.chdir(before)
