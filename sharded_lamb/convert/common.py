"""Shared by all formats: weights and tied names, group options, masters for formats without masters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.core.host_values import as_tensor
from sharded_lamb.core.hyperparams import GROUP_OPTIONS, SCALAR_DEFAULTS, validate_group, variant_options
from sharded_lamb.core.names import normalize
from sharded_lamb.core.rule import MOMENTS

Note = str
"""One line for the user: a loss, an assumption, or a step to do by hand."""

T = TypeVar("T")
Converted = tuple[T, list[Note]]

CARRIED = ("initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "lr_scale")
"""Group keys of numbers that torch's and timm's schedulers write and read."""


def weights_of(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], list[Note]]:
    """Returns (tensors by first name, {other name of a tied tensor: first name}, notes) of a model's state dict.

    Tied tensors share memory, which torch.save preserves.
    """
    weights: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    notes = []
    first: dict[tuple[Any, ...], str] = {}
    for raw, value in state_dict.items():
        name = normalize(str(raw))
        if not isinstance(value, Tensor):
            notes.append(
                f"{raw} of the model's state dict is a {type(value).__name__}, not a tensor: left out"
            )
            continue
        if name in weights or name in aliases:
            raise ValueError(
                f"two tensors of the model are called {name!r} once wrappers' prefixes are removed: rename one"
            )
        if name.rsplit(".", 1)[-1] == "_extra_state":
            notes.append(f"{raw} of the model's state dict is left out: the model keeps its own")
            continue
        if isinstance(value, DTensor):
            raise ValueError(
                f"{raw} is one rank's shard (a DTensor): save the whole tensors, as get_model_state_dict(model, "
                f"options=StateDictOptions(full_state_dict=True)) returns them"
            )
        value = value.detach()
        memory = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride())
        if value.numel() and memory in first:
            aliases[name] = first[memory]
        else:
            first[memory] = name
            weights[name] = value
    return weights, aliases, notes


def state_dict_of(weights: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns a model's state dict, with tied tensors under all their names, sharing memory."""
    return {**weights, **{name: weights[first] for name, first in aliases.items() if first in weights}}


def widest_weights(contents: InMemoryCheckpoint) -> Converted[dict[str, Tensor]]:
    """Returns weights for a format without masters: the masters themselves if there are any, with a note."""
    masters = {name: state["master"] for name, state in contents.states.items() if "master" in state}
    if not masters:
        return dict(contents.weights), []
    dtypes = sorted({_dtype_name(contents.weights[name].dtype) for name in masters})
    wide = sorted({_dtype_name(master.dtype) for master in masters.values()})
    rounds = "" if wide == dtypes else "; the model rounds them on loading"
    note = (
        f"{len(masters)} weights are written as their {'/'.join(wide)} masters, since the format cannot hold masters "
        f"beside {'/'.join(dtypes)} weights{rounds}"
    )
    return {**contents.weights, **masters}, [note]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def group_options(variant: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all options of a group: the variant's, overridden by ``given``.

    Raises:
        ValueError: the variant does not exist, or an option is out of range.
    """
    filled = variant_options(variant)
    options = {
        **SCALAR_DEFAULTS,
        "variant": variant,
        **{name: filled[name] for name in GROUP_OPTIONS},
        **given,
    }
    validate_group(options)
    return options


def scalars_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns lr, betas, eps, weight_decay and `CARRIED` keys of a group as plain numbers.

    Raises:
        ValueError: one is missing: the group is of another optimizer.
    """
    missing = [key for key in ("lr", "betas", "eps", "weight_decay") if key not in group]
    if missing:
        raise ValueError(
            f"a parameter group has {keys_of(group)} but no {missing[0]}: it is of another optimizer"
        )
    lr = group["lr"]
    scalars: dict[str, Any] = {
        "lr": lr.item() if isinstance(lr, Tensor) else float(lr),
        "betas": tuple(float(beta) for beta in group["betas"]),
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
    }
    for key in CARRIED:
        if group.get(key) is not None:
            scalars[key] = float(group[key])
    return scalars


def flags_of(group: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, bool]:
    """{our option: value} of the switches that the group has, from {our option: its key}.

    One that it has not is the variant's to fill.
    """
    return {ours: bool(group[theirs]) for ours, theirs in names.items() if theirs in group}


def keys_of(group: Mapping[str, Any]) -> list[str]:
    """A group's keys, to show."""
    return sorted(map(str, group))


def moment_state(
    name: str, weight: Tensor, state: Mapping[str, Any], step: Any, kinds: Sequence[str] = MOMENTS
) -> dict[str, Tensor]:
    """Returns one parameter's state in our form. fp16 and bf16 moments become fp32, which is exact.

    Raises:
        ValueError: the step or a moment is missing, or has another shape than the weight.
    """
    if step is None:
        raise ValueError(
            f"there is no step count of {name!r}: the file is not of the optimizer that --from names"
        )
    moments = {"step": as_tensor(step).detach().to("cpu", torch.float64, copy=True).reshape(())}
    for kind in kinds:
        moment = state.get(kind)
        if not isinstance(moment, Tensor):
            raise ValueError(f"the state of {name!r} has no {kind}, only {sorted(map(str, state))}")
        if moment.shape != weight.shape:
            raise ValueError(
                f"{kind} of {name!r} has shape {tuple(moment.shape)}, its weight {tuple(weight.shape)}: the names "
                f"are not in the optimizer's order; give them with --names"
            )
        moments[kind] = moment.detach().to(torch.promote_types(moment.dtype, torch.float32)).contiguous()
    return moments


def left_out(contents: InMemoryCheckpoint) -> list[Note]:
    """Returns notes of content that only this package's own formats hold."""
    notes = []
    if any("ema" in state for state in contents.states.values()):
        notes.append("the average of the weights (ema) is left out")
    own = {*group_options("lamb", {}), "state_dtype", *CARRIED}
    custom = sorted({str(key) for group in contents.groups for key in group["options"]} - own)
    if custom:
        notes.append(f"{', '.join(custom)} of the groups left out")
    if contents.extra:
        notes.append(f"extra is left out: {', '.join(map(str, contents.extra))}")
    if contents.optimizer.get("model"):
        notes.append(f"non-tensor state of the model is left out: {', '.join(contents.optimizer['model'])}")
    if contents.optimizer.get("skipped_steps"):
        notes.append(f"the count of skipped steps is left out: {contents.optimizer['skipped_steps']}")
    return notes


def differing(what: str, values: Iterable[Any], usual: Any, remark: str) -> list[Note]:
    """Returns a note if any of ``values`` is not ``usual``."""
    unusual = sorted({str(value) for value in values if value != usual})
    return [f"{what}={', '.join(unusual)}: {remark}"] if unusual else []
