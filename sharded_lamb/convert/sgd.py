"""LARS as others save it: timm's Lars; torch.optim.SGD's state under torch-lars, apex's LARC or Lightning Bolts.

One momentum per parameter, no step counts. The file of a LARS that wraps SGD holds SGD's options.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert import positional
from sharded_lamb.convert.common import (
    Converted,
    flags_of,
    group_options,
    left_out,
    moment_state,
    scalars_of,
    widest_weights,
)
from sharded_lamb.convert.grouping import PlainGroup, lost_options, plain_groups
from sharded_lamb.convert.recognition import check_format, check_states, foreign_keys
from sharded_lamb.core.rule import LARS_MOMENTS

_KEPT = {
    *("bias_correction", "grad_averaging", "adam_w_mode", "nesterov"),
    *("lars", "trust_coefficient", "momentum_includes_lr", "larc_clip"),
}
_FLAGS = {"nesterov": "nesterov", "larc_clip": "trust_clip", "adapt_without_decay": "always_adapt"}


def from_sgd(
    file: Mapping[str, Any], names: Sequence[str] | None = None, variant: str | None = None
) -> Converted[InMemoryCheckpoint]:
    """{"model", "optimizer"} → contents; the variant defaults to "torch_lars".

    Raises:
        ValueError: parameters cannot be named, the file is of another optimizer, or has options that LARS lacks here.
    """
    read, notes = positional.read(file, names)
    check_format(read.groups, "sgd")
    check_states(read.raw_states, "sgd")
    notes += foreign_keys(read.groups, "sgd")
    variant = variant or "torch_lars"

    def options(group: Mapping[str, Any]) -> dict[str, Any]:
        own = scalars_of({"eps": 1e-8, **group, "betas": (group.get("momentum", 0.0), 0.999)})
        own |= {**flags_of(group, _FLAGS), "grad_averaging": _averages(group)}
        if "trust_coeff" in group:
            own["trust_coefficient"] = float(group["trust_coeff"])
        return group_options(variant, own)

    groups = read.named_groups(options)
    if not all(group["options"]["lars"] for group in groups):
        raise ValueError(f"variant {variant!r} is not LARS: give --variant torch_lars or lars")
    if any("trust_coeff" not in group for group in read.groups):
        notes.append(
            "the file is SGD's and does not hold LARS's options: trust_coefficient=0.001, eps=1e-8, larc_clip=False "
            "and a ratio on every parameter are assumed; --set them otherwise"
        )
    states: dict[str, dict[str, Tensor]] = {}
    for group in groups:
        for name in group["names"]:
            momentum = read.raw_states.get(name, {}).get("momentum_buffer")
            if momentum is not None:
                found = {"exp_avg": momentum}
                states[name] = moment_state(name, read.weights[name], found, 1.0, LARS_MOMENTS)
                states[name]["exp_avg"] = states[name]["exp_avg"] * _rate_inside(group["options"])
    contents = InMemoryCheckpoint(
        read.weights, states, groups, {"max_grad_norm": None, "skipped_steps": 0}, {}, read.aliases
    )
    return contents, notes


def _averages(group: Mapping[str, Any]) -> bool:
    """``grad_averaging`` for a group's dampening. Raises ValueError for an option that LARS lacks."""
    if group.get("maximize"):
        raise ValueError("the file's SGD had maximize=True, which is not supported: its momentum is reversed")
    momentum, dampening = float(group.get("momentum", 0.0)), float(group.get("dampening", 0.0))
    if dampening not in (0.0, momentum):
        raise ValueError(
            f"the file's SGD had dampening={dampening} with momentum={momentum}: expected 0, or the momentum "
            f"(grad_averaging=True)"
        )
    return dampening != 0.0


def _rate_inside(options: Mapping[str, Any]) -> float:
    """The learning rate in this package's momentum, which SGD's does not have."""
    return float(options["lr"]) if options["momentum_includes_lr"] else 1.0


def to_sgd(contents: InMemoryCheckpoint) -> Converted[dict[str, Any]]:
    """InMemoryCheckpoint → {"model", "optimizer"}, the latter for ``load_state_dict`` of SGD or of timm's Lars.

    Raises:
        ValueError: the checkpoint is not of LARS, or its learning rate, 0, is inside the momentum.
    """
    if not all(group["options"]["lars"] for group in contents.groups):
        raise ValueError(
            "the checkpoint is not of LARS: its second moments have no place in SGD's state, and its first ones are "
            "no momentum of SGD's"
        )
    weights, notes = widest_weights(contents)
    groups, cut = plain_groups(contents)
    packed = [positional.PositionalGroup(group.names, _group(group)) for group in groups]
    states: dict[str, dict[str, Tensor]] = {}
    for group in groups:
        rate = _rate_inside(group.options)
        for name in group.names:
            if name in contents.states:
                if rate == 0.0:
                    raise ValueError(
                        f"{name!r} has lr=0 inside its momentum (momentum_includes_lr=True), which SGD keeps outside: "
                        f"give the rate with --set lr=…"
                    )
                states[name] = {"momentum_buffer": contents.states[name]["exp_avg"] / rate}
    if any(group.options["momentum_includes_lr"] for group in groups):
        notes.append(
            "momenta are divided by lr, which SGD keeps outside them: a schedule acts differently on them"
        )
    notes.append(
        "timm's Lars reads LARS's options from the file; SGD alone has no ratio: wrap it in LARC or torch-lars"
    )
    fixed = [name for group in groups if group.weight_decay and not group.adapts for name in group.names]
    if fixed:
        notes.append(
            f"timm's Lars applies a ratio wherever there is decay: {len(fixed)} parameters had decay and no ratio "
            f"({fixed[0]}), and will have one"
        )
    clip = contents.optimizer.get("max_grad_norm")
    if clip is not None:
        notes.append(f"SGD does not clip: call clip_grad_norm_(model.parameters(), {clip}) before its steps")
    notes += [*cut, *lost_options(groups, _KEPT, "SGD"), *left_out(contents)]
    return positional.write(weights, contents.aliases, packed, states), notes


def _group(group: PlainGroup) -> dict[str, Any]:
    options = group.options
    momentum = float(options["betas"][0])
    scalars = scalars_of(options)
    del scalars["betas"]
    return {
        **scalars,
        "weight_decay": group.weight_decay,
        "momentum": momentum,
        "dampening": momentum if options["grad_averaging"] else 0.0,
        "nesterov": bool(options["nesterov"]),
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
        "trust_coeff": float(options["trust_coefficient"]),
        "trust_clip": bool(options["larc_clip"]),
        "always_adapt": group.adapts if group.weight_decay == 0 else bool(options["adapt_without_decay"]),
    }
