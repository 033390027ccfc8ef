"""A single file for `Lamb`: ``torch.load(FILE, weights_only=True)`` returns {"model", "optimizer", …}.

`Lamb.load_state_dict` and `ShardedLamb.load_full_state_dict` accept its ``optimizer``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert import positional
from sharded_lamb.convert.common import Converted, group_options, left_out
from sharded_lamb.convert.recognition import check_format
from sharded_lamb.core.hyperparams import variant_options
from sharded_lamb.kernels.state_format import OF_WEIGHTS

_OWN_KEYS = ("params", "param_names")


def from_lamb(file: Mapping[str, Any], names: Sequence[str] | None = None) -> Converted[InMemoryCheckpoint]:
    """{"model", "optimizer"}, and "max_grad_norm", "skipped_steps", "extra" if present → contents.

    Raises:
        ValueError: parameters cannot be named, or the state is one rank's slices.
    """
    read, notes = positional.read(file, names, {"max_grad_norm", "skipped_steps", "extra"})
    check_format(read.groups, "lamb")
    sliced = [name for name, state in read.raw_states.items() if "shard" in state]
    if sliced:
        raise ValueError(
            f"the state of {sliced[0]!r} is one rank's slice, from ShardedLamb.state_dict(): save "
            f"full_state_dict() of the first rank instead"
        )

    def options(group: Mapping[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in group.items() if key not in _OWN_KEYS}
        return group_options(own.get("variant", "lamb"), own)

    states = read.states(lambda group, state: state.get("step"))
    for name, state in states.items():
        for kind in read.raw_states[name].keys() & set(OF_WEIGHTS):
            state[kind] = read.raw_states[name][kind]
    groups = read.named_groups(options)
    clip = file.get("max_grad_norm")
    if "max_grad_norm" not in file:
        clip = variant_options(groups[0]["options"]["variant"])["max_grad_norm"] if groups else None
        notes.append(
            f"the file does not hold max_grad_norm: the variant's {clip} is assumed; --set max_grad_norm=… to change it"
        )
    optimizer = {"max_grad_norm": clip, "skipped_steps": int(file.get("skipped_steps", 0))}
    return InMemoryCheckpoint(
        read.weights, states, groups, optimizer, dict(file.get("extra", {})), read.aliases
    ), notes


def to_lamb(contents: InMemoryCheckpoint) -> Converted[dict[str, Any]]:
    """InMemoryCheckpoint → the file; only non-tensor state of the model is lost."""
    groups = [positional.PositionalGroup(group["names"], group["options"]) for group in contents.groups]
    file = positional.write(contents.weights, contents.aliases, groups, contents.states)
    masters = sum("master" in state for state in contents.states.values())
    notes = left_out(
        replace(
            contents, groups=[], extra={}, states={}, optimizer={**contents.optimizer, "skipped_steps": 0}
        )
    )
    if masters:
        notes.append(
            f"{masters} masters are in the optimizer's state, where ShardedLamb.load_full_state_dict reads them; Lamb "
            f"has no masters and continues from the rounded weights"
        )
    wide = {
        "max_grad_norm": contents.optimizer.get("max_grad_norm"),
        "skipped_steps": contents.optimizer.get("skipped_steps", 0),
        "extra": contents.extra,
    }
    return {**file, **wide}, notes
