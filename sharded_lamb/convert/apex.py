"""apex's FusedLAMB: numbered parameters, a step count per group; fp16 runs of amp hold a list of masters.

As in apex/optimizers/fused_lamb.py, groups hold lr, bias_correction, betas, eps, weight_decay, grad_averaging,
max_grad_norm and, from the first step on, step. ``adam_w_mode`` and ``use_nvlamb`` are constructor arguments, and not
saved.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert import positional
from sharded_lamb.convert.common import (
    Converted,
    Note,
    flags_of,
    group_options,
    left_out,
    scalars_of,
    widest_weights,
)
from sharded_lamb.convert.grouping import PlainGroup, lost_options, plain_groups
from sharded_lamb.convert.recognition import check_format, check_states, foreign_keys

MASTERS = "master params"


def from_apex(
    file: Mapping[str, Any], names: Sequence[str] | None = None, variant: str | None = None
) -> Converted[InMemoryCheckpoint]:
    """{"model", "optimizer"}, and "master params" if amp wrote them → contents.

    Raises:
        ValueError: parameters cannot be named, or masters do not match them.
    """
    read, notes = positional.read(file, names, {MASTERS})
    check_format(read.groups, "apex")
    check_states(read.raw_states, "apex")
    notes += foreign_keys(read.groups, "apex")
    clips = [group.get("max_grad_norm") for group in read.groups]
    if variant is None:
        notes.append(
            "apex files do not hold use_nvlamb and adam_w_mode: False and True are assumed (variant apex); --variant "
            "nvlamb for use_nvlamb=True, --set adam_w_mode=false for adam_w_mode=False"
        )

    states = read.states(lambda group, state: group.get("step"))
    if MASTERS in file:
        names = [name for group in read.names for name in group]
        notes += _add_masters(list(file[MASTERS]), names, read.weights, states)
    contents = InMemoryCheckpoint(
        read.weights,
        states,
        read.named_groups(partial(apex_options, variant=variant)),
        {"max_grad_norm": clips[0] or None, "skipped_steps": 0},
        {},
        read.aliases,
    )
    return contents, notes


def apex_options(group: Mapping[str, Any], variant: str | None) -> dict[str, Any]:
    """Options of a group of FusedLAMB."""
    own = flags_of(group, {name: name for name in ("bias_correction", "grad_averaging")})
    return group_options(variant or "apex", {**scalars_of(group), **own})


def _add_masters(
    masters: list[Tensor],
    names: list[str],
    weights: dict[str, Tensor],
    states: dict[str, dict[str, Tensor]],
) -> list[Note]:
    """amp's O2 saves weights in fp32 that are rounded to fp16: their masters replace them."""
    if len(masters) != len(names):
        raise ValueError(
            f"the file has {len(masters)} {MASTERS!r}, but its optimizer has {len(names)} parameters"
        )
    replaced = 0
    for name, master in zip(names, masters, strict=True):
        master, weight = master.detach().contiguous(), weights[name]
        if master.shape != weight.shape:
            raise ValueError(
                f"the master of {name!r} has shape {tuple(master.shape)}, its weight {tuple(weight.shape)}: "
                f"{positional.HOW}"
            )
        if master.dtype == weight.dtype:
            replaced += not torch.equal(master, weight.to(master.device))
            weights[name] = master
        elif name in states:
            states[name]["master"] = master
    return (
        [f"{replaced} weights are replaced by amp's masters, of which they are roundings"] if replaced else []
    )


def to_apex(contents: InMemoryCheckpoint) -> Converted[dict[str, Any]]:
    """InMemoryCheckpoint → {"model", "optimizer"}, the latter for ``FusedLAMB.load_state_dict``."""
    weights, notes = widest_weights(contents)
    groups, cut = plain_groups(contents)
    steps, behind = positional.group_steps([group.names for group in groups], contents.states)
    clip = contents.optimizer.get("max_grad_norm")
    packed = []
    for group, step in zip(groups, steps, strict=True):
        options = {
            **scalars_of(group.options),
            "weight_decay": group.weight_decay,
            "bias_correction": group.options["bias_correction"] is not False,
            "grad_averaging": group.options["grad_averaging"],
            "max_grad_norm": clip,
        }
        packed.append(positional.PositionalGroup(group.names, {**options, "step": step} if step else options))
    file = positional.write(weights, contents.aliases, packed, positional.moments(contents.states))
    return file, notes + cut + behind + _lost(groups) + left_out(contents) + _constructor(groups, clip)


def _lost(groups: list[PlainGroup]) -> list[Note]:
    notes = lost_options(groups, {"bias_correction", "grad_averaging", "adam_w_mode"}, "FusedLAMB")
    if any(group.options["bias_correction"] == "lr" for group in groups):
        notes.append(
            "FusedLAMB corrects bias inside the ratio, not on the learning rate: its updates will differ"
        )
    if any(group.weight_decay and not group.adapts for group in groups):
        notes.append(
            "FusedLAMB applies a ratio wherever there is decay: parameters with decay and no ratio will have one"
        )
    return notes


def _constructor(groups: list[PlainGroup], clip: float | None) -> list[Note]:
    undecayed = {group.adapts for group in groups if group.weight_decay == 0}
    nvlamb = True in undecayed or (not undecayed and all(g.options["adapt_without_decay"] for g in groups))
    modes = {bool(group.options["adam_w_mode"]) for group in groups}
    notes = [
        f"FusedLAMB reads these from its constructor: use_nvlamb={nvlamb}, adam_w_mode={modes != {False}}, "
        f"max_grad_norm={'a large number (it has no None)' if clip is None else clip}"
    ]
    if len(undecayed) > 1 or len(modes) > 1:
        notes.append("groups differ in use_nvlamb or adam_w_mode, which FusedLAMB has only for all groups")
    return notes
