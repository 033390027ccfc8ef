"""torch.optim.Adam and AdamW: numbered parameters, no trust ratio, no clipping."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert import positional
from sharded_lamb.convert.common import (
    Converted,
    Note,
    group_options,
    left_out,
    scalars_of,
    widest_weights,
)
from sharded_lamb.convert.grouping import lost_options, plain_groups
from sharded_lamb.convert.recognition import check_format, check_states, foreign_keys


def from_adam(
    file: Mapping[str, Any], names: Sequence[str] | None = None, variant: str | None = None
) -> Converted[InMemoryCheckpoint]:
    """{"model", "optimizer"} → contents; the variant defaults to "adamw".

    Raises:
        ValueError: parameters cannot be named, gradients were maximized, or the file is of another optimizer.
    """
    read, notes = positional.read(file, names)
    check_adam(read.groups)
    check_states(read.raw_states, "adam")

    def options(group: Mapping[str, Any]) -> dict[str, Any]:
        return group_options(variant or "adamw", adam_options(group))

    notes += adam_notes(read.groups)
    contents = InMemoryCheckpoint(
        read.weights,
        read.states(lambda group, state: state.get("step", group.get("step"))),
        read.named_groups(options),
        {"max_grad_norm": None, "skipped_steps": 0},
        {},
        read.aliases,
    )
    return contents, notes


_BIAS = (
    "bias_correction",
    "correct_bias",
)  # of the FusedAdam of apex and DeepSpeed, and of transformers' AdamW


def check_adam(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for groups of another optimizer, and for gradients that were maximized."""
    check_format(groups, "adam")
    if any("decoupled_weight_decay" in group and "amsgrad" not in group for group in groups):
        raise ValueError("the file's groups have no amsgrad: they are RAdam's, which is another update rule")
    if any(group.get("maximize") for group in groups):
        raise ValueError(
            "the file's Adam had maximize=True, which is not supported: its moments have the opposite sign"
        )


def adam_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a group of any Adam.

    Those that hold whether they correct bias decouple decay by default, and do not hold whether they did.
    """
    own, corrects = scalars_of(group), [key for key in _BIAS if key in group]
    if corrects:
        own["bias_correction"] = all(group[key] for key in corrects)
    decoupled = group.get("decoupled_weight_decay", bool(corrects) or not own["weight_decay"])
    return {**own, "adam_w_mode": bool(decoupled)}


def adam_notes(groups: Sequence[Mapping[str, Any]]) -> list[Note]:
    """What `adam_options` assumes of these groups, and their keys that no Adam has."""
    notes = foreign_keys(groups, "adam")
    if any(group.get("amsgrad") for group in groups):
        notes.append("max_exp_avg_sq of amsgrad=True is left out: LAMB has no AMSGrad variant")
    undecided = [g for g in groups if g.get("weight_decay") and "decoupled_weight_decay" not in g]
    modes = {adam_options(group)["adam_w_mode"] for group in undecided}
    if modes:
        assumed = "decoupled (--set adam_w_mode=false if it was not)"
        if modes != {True}:
            assumed = "added to gradients; --set adam_w_mode=true for AdamW"
        notes.append(
            f"the file does not hold whether decay was decoupled (AdamW) or added to gradients (Adam): assumed is "
            f"{assumed}"
        )
    return notes


def to_adam(contents: InMemoryCheckpoint) -> Converted[dict[str, Any]]:
    """InMemoryCheckpoint → {"model", "optimizer"}, the latter for ``load_state_dict`` of Adam or AdamW."""
    weights, notes = widest_weights(contents)
    groups, cut = plain_groups(contents)
    packed = [
        positional.PositionalGroup(
            group.names,
            {
                **scalars_of(group.options),
                "weight_decay": group.weight_decay,
                "amsgrad": False,
                "maximize": False,
                "foreach": None,
                "capturable": False,
                "differentiable": False,
                "fused": None,
                "decoupled_weight_decay": bool(group.options["adam_w_mode"]),
            },
        )
        for group in groups
    ]
    states = {
        name: {"step": torch.tensor(float(state["step"]), dtype=torch.float32, device="cpu"), **moments}
        for (name, state), moments in zip(
            contents.states.items(), positional.moments(contents.states).values(), strict=True
        )
    }
    if any(group.weight_decay and not group.options["adam_w_mode"] for group in groups):
        notes.append("decay is added to gradients: load it into Adam (AdamW always decouples decay)")
    adapted = sum(len(group.names) for group in groups if group.adapts)
    if adapted:
        notes.append(
            f"Adam has no trust ratio: the updates of {adapted} parameters will have another norm; tune lr again"
        )
    clip = contents.optimizer.get("max_grad_norm")
    if clip is not None:
        notes.append(f"Adam does not clip: call clip_grad_norm_(model.parameters(), {clip}) before its steps")
    notes += lost_options(groups, {"adam_w_mode", "trust_clip", "weight_norm_clip"}, "Adam")
    return positional.write(weights, contents.aliases, packed, _checked(states)), notes + cut + left_out(
        contents
    )


def _checked(states: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Raises ValueError for step counts of 2²⁴ or more, which Adam's fp32 counts cannot hold."""
    for name, state in states.items():
        if float(state["step"]) >= 2**24:
            raise ValueError(
                f"{name!r} has {int(state['step']):,} steps, but Adam counts them in fp32, which ends at 16,777,215"
            )
    return states
