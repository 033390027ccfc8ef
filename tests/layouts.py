"""Models in every layout over ranks, their optimizers, and steps on the same averaged gradients."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sharded_lamb import ShardedLamb
from tests import training
from tests.optim import fsdp_models as models

OPTIONS: dict[str, Any] = {"lr": 0.02, "max_grad_norm": 5.0}


@dataclass(frozen=True)
class Layout:
    """A model's layout over ranks. ``stage`` 0: DTensors, on a mesh of ``axes``."""

    world: int
    stage: int = 0
    axes: tuple[str, ...] = ("dp",)
    dtype: torch.dtype = torch.float32
    remainders: bool = False  # store only the low 16 bits of masters

    def __str__(self) -> str:
        how = f"stage{self.stage}" if self.stage else "fsdp"
        mesh = "" if self.axes == ("dp",) else "-" + "x".join(self.axes)
        split = "-remainders" if self.remainders else ""
        return f"{self.world}-{how}{mesh}-{str(self.dtype).removeprefix('torch.')}{split}"

    @property
    def arithmetic(self) -> str:
        """Layouts of equal arithmetic have equal bits: blocks of flat buckets do not depend on the number of ranks.

        An average of three equal gradients in stage 2 is not exactly that gradient.
        """
        if self.stage == 2 and self.world == 3:
            return "flat, thirds"
        return "flat" if self.stage else f"{self.world} {self.axes}"


def build(layout: Layout) -> tuple[nn.Module, ShardedLamb]:
    """Returns a model and its optimizer, with two groups."""
    if layout.stage:
        model: nn.Module = models.block().to(layout.dtype)
        options: dict[str, Any] = {"stage": layout.stage, "bucket_mb": 0.0005}
        if len(layout.axes) > 1:
            options["mesh"] = models.named_mesh(replicate=2, shard=layout.world // 2)
    else:
        options = {}
        first, rest = (layout.world, 1) if len(layout.axes) == 1 else (2, layout.world // 2)
        mesh = models.named_mesh(**dict(zip(layout.axes, (first, rest), strict=False)))
        if layout.axes == ("tp",):
            model = models.parallel_block(mesh, None, "tp")
        elif "tp" in layout.axes:
            model = models.parallel_block(mesh, "dp", "tp")
        else:
            model = models.parallel_block(mesh, layout.axes if len(layout.axes) > 1 else "dp", None)
        model = model.to(layout.dtype)
    return model, ShardedLamb(groups(model), **OPTIONS, **options, store_param_remainders=layout.remainders)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.ndim > 1]},
        {"params": [(n, p) for n, p in named if p.ndim <= 1], "weight_decay": 0.0, "lr": 0.03},
    ]


def steps(model: nn.Module, opt: Any, which: range) -> None:
    """Steps on averaged gradients that do not depend on the layout."""
    for step in which:
        for name, p in model.named_parameters():
            g = training.draw(tuple(p.shape), "layouts", name, step).to(p.dtype)
            if isinstance(p, DTensor):
                g = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = g
        opt.step()
        opt.zero_grad()
