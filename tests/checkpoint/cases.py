"""Models in every layout over ranks, steps on the same averaged gradients, and their gathered state."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sharded_lamb import ShardedLamb, checkpoint
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
            g = training.draw(tuple(p.shape), "checkpoint", name, step).to(p.dtype)
            if isinstance(p, DTensor):
                g = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = g
        opt.step()
        opt.zero_grad()


Whole = tuple[dict[str, Tensor], dict[str, Any] | None]


def whole(model: nn.Module, opt: Any) -> Whole:
    """Returns whole weights, and on the first rank the optimizer's state by parameter, through bytes."""
    full = opt.full_state_dict()
    return models.whole_weights(model), None if full is None else training.through_bytes(full["state"])


def saved(rank: int, layout: Layout, folder: Path) -> tuple[Whole, Whole]:
    """The run after 5 steps, as saved, and after 5 more."""
    model, opt = build(layout)
    steps(model, opt, range(5))
    checkpoint.save(folder, model, opt)
    at_save = whole(model, opt)
    steps(model, opt, range(5, 10))
    return at_save, whole(model, opt)


def resumed(rank: int, layout: Layout, folder: Path) -> tuple[Whole, Whole]:
    """The run as loaded, and after 5 more steps."""
    model, opt = build(layout)
    steps(model, opt, range(97, 99))  # loading must replace this state
    for group in opt.param_groups:
        group["lr"] = 7.0
    checkpoint.load(folder, model, opt)
    at_load = whole(model, opt)
    steps(model, opt, range(5, 10))
    return at_load, whole(model, opt)


def saved_and_resumed(
    rank: int, layout: Layout, folder: Path
) -> tuple[tuple[Whole, Whole], tuple[Whole, Whole]]:
    """`saved`, then `resumed` in the same layout on the same ranks."""
    return saved(rank, layout, folder), resumed(rank, layout, folder)
