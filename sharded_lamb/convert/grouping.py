"""Groups for optimizers that know no patterns: what a pattern excludes becomes a group of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert.common import Converted, Note
from sharded_lamb.core.names import matching
from sharded_lamb.optim.base import effective_patterns


@dataclass(frozen=True)
class PlainGroup:
    """Parameters that are treated alike, in the order of their group."""

    names: list[str]
    options: Mapping[str, Any]  # ours
    weight_decay: float  # 0 where a pattern excludes them
    adapts: bool  # whether they have a trust ratio


def plain_groups(contents: InMemoryCheckpoint) -> Converted[list[PlainGroup]]:
    """The groups, cut where patterns cut them. A group without patterns stays as it is."""
    found: list[PlainGroup] = []
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
            found.append(PlainGroup([], options, float(options["weight_decay"]), True))
        found += [PlainGroup(names, options, *cell) for cell, names in cells.items()]
    notes: list[Note] = []
    if len(found) > len(contents.groups):
        sizes = ", ".join(str(len(group.names)) for group in found)
        notes.append(
            f"patterns became groups: construct the optimizer with {len(found)} groups of {sizes} parameters, named by "
            f"'param_names' in the file"
        )
    return found, notes


def lost_options(groups: list[PlainGroup], kept: set[str], target: str) -> list[Note]:
    """A note an option of ours that ``target`` has no place for and that is in use. ``kept``: those it has."""
    usual = {
        "bias_correction": (True,),
        "grad_averaging": (True,),
        "adam_w_mode": (True,),
        "eps_inside_sqrt": (False,),
        "trust_clip": (None,),
        "weight_norm_clip": (None,),
    }
    notes = []
    for option, values in usual.items():
        odd = sorted({repr(g.options[option]) for g in groups if g.options[option] not in values})
        if odd and option not in kept:
            notes.append(f"{target} has no {option}={', '.join(odd)}: its updates will differ")
    return notes
