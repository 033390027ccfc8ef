"""Groups for optimizers without patterns: parameters that a pattern excludes become a separate group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert.common import Converted, Note
from sharded_lamb.core.names import matching
from sharded_lamb.core.options import effective_patterns


@dataclass(frozen=True)
class PlainGroup:
    """Parameters with equal options, in their group's order."""

    names: list[str]
    options: Mapping[str, Any]  # with our keys
    weight_decay: float  # 0 where a pattern excludes them
    adapts: bool  # whether they have a trust ratio


def plain_groups(contents: InMemoryCheckpoint) -> Converted[list[PlainGroup]]:
    """Returns the groups, split by their patterns. A group without patterns is unchanged."""
    groups: list[PlainGroup] = []
    for group in contents.groups:
        options = group["options"]
        cells: dict[tuple[float, bool], list[str]] = {}
        for name in group["names"]:
            ndim = contents.weights[name].dim()
            excluded = matching(options["exclude_from_weight_decay"], name, ndim)
            decay = 0.0 if excluded else float(options["weight_decay"])
            adapts = not matching(effective_patterns(options, "exclude_from_layer_adaptation"), name, ndim)
            if not options["adapt_without_decay"] and decay == 0.0:
                adapts = False
            cells.setdefault((decay, adapts), []).append(name)
        if not cells:
            groups.append(PlainGroup([], options, float(options["weight_decay"]), True))
        groups += [PlainGroup(names, options, *cell) for cell, names in cells.items()]
    notes: list[Note] = []
    if len(groups) > len(contents.groups):
        sizes = ", ".join(str(len(group.names)) for group in groups)
        notes.append(
            f"patterns became groups: construct the optimizer with {len(groups)} groups of {sizes} parameters, which "
            f"'param_names' in the file lists"
        )
    return groups, notes


def lost_options(groups: list[PlainGroup], kept: set[str], target: str) -> list[Note]:
    """Returns a note for each option in use that ``target`` lacks. ``kept``: the options it has."""
    usual = {
        "bias_correction": (True,),
        "grad_averaging": (True,),
        "adam_w_mode": (True,),
        "eps_inside_sqrt": (False,),
        "trust_clip": (None,),
        "weight_norm_clip": (None,),
        "normalize_grad": (False,),
        "nesterov": (False,),
        "decoupled_decay": (False,),
        "caution": (False,),
        "lars": (False,),
        "trust_coefficient": (1.0,),
        "momentum_includes_lr": (False,),
        "larc_clip": (False,),
    }
    notes = []
    for option, values in usual.items():
        unusual = sorted({repr(g.options[option]) for g in groups if g.options[option] not in values})
        if unusual and option not in kept:
            notes.append(f"{target} has no {option}={', '.join(unusual)}: its updates will differ")
    return notes
