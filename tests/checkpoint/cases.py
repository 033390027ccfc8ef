"""Saving and resuming in every layout over ranks, and the gathered state."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sharded_lamb import checkpoint
from tests import training
from tests.layouts import Layout, build, steps
from tests.optim import fsdp_models as models

Whole = tuple[dict[str, Tensor], dict[str, Any] | None]


def whole(model: nn.Module, opt: Any) -> Whole:
    """Returns whole weights, and on the first rank the optimizer's state by parameter, through bytes."""
    full = opt.full_state_dict()
    return models.whole_weights(model), None if full is None else training.through_bytes(full["state"])


def saved(rank: int, layout: Layout, folder: Path) -> tuple[Whole, Whole]:
    """The run after 3 steps, as saved, and after 2 more."""
    model, opt = build(layout)
    steps(model, opt, range(3))
    checkpoint.save(folder, model, opt)
    at_save = whole(model, opt)
    steps(model, opt, range(3, 5))
    return at_save, whole(model, opt)


def resumed(rank: int, layout: Layout, folder: Path) -> tuple[Whole, Whole]:
    """The run as loaded, and after 2 more steps."""
    model, opt = build(layout)
    steps(model, opt, range(97, 98))  # loading must replace this state
    for group in opt.param_groups:
        group["lr"] = 7.0
    checkpoint.load(folder, model, opt)
    at_load = whole(model, opt)
    steps(model, opt, range(3, 5))
    return at_load, whole(model, opt)


def saved_and_resumed(
    rank: int, layout: Layout, folder: Path
) -> tuple[tuple[Whole, Whole], tuple[Whole, Whole]]:
    """`saved`, then `resumed` in the same layout on the same ranks."""
    return saved(rank, layout, folder), resumed(rank, layout, folder)
