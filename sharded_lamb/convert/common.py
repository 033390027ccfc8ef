"""What formats share: weights and tied names, options of groups, masters where a format has no place for them."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharded_lamb.checkpoint.contents import Contents
from sharded_lamb.core.hyperparams import GROUP_OPTIONS, SCALAR_DEFAULTS, validate_group, variant_options
from sharded_lamb.core.names import normalize

Note = str
"""One line for the user: what was lost, assumed or must be done by hand."""

T = TypeVar("T")
Converted = tuple[T, list[Note]]

MOMENTS = ("exp_avg", "exp_avg_sq")
CARRIED = ("initial_lr",)
"""Keys that schedulers of torch put into groups, and expect there again."""


def weights_of(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], list[Note]]:
    """A model's state dict → (tensors by the first of their names, {other name of a tied one: first}, notes).

    Tied tensors are told by their memory, which torch.save keeps shared.
    """
    weights: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    notes = []
    first: dict[tuple[Any, ...], str] = {}
    for raw, value in state_dict.items():
        name = normalize(str(raw))
        if not isinstance(value, Tensor):
            notes.append(f"{raw} of the model's state dict is a {type(value).__name__}, no tensor: left out")
            continue
        value = value.detach()
        memory = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride())
        if value.numel() and memory in first:
            aliases[name] = first[memory]
        else:
            first[memory] = name
            weights[name] = value
    return weights, aliases, notes


def state_dict_of(weights: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The model's state dict: tied tensors under all their names, in one memory."""
    return {**weights, **{name: weights[first] for name, first in aliases.items() if first in weights}}


def widest_weights(contents: Contents) -> Converted[dict[str, Tensor]]:
    """Weights for a format without masters: the masters themselves where there are any."""
    masters = {name: state["master"] for name, state in contents.states.items() if "master" in state}
    if not masters:
        return dict(contents.weights), []
    dtypes = sorted({_dtype_name(contents.weights[name].dtype) for name in masters})
    wide = sorted({_dtype_name(master.dtype) for master in masters.values()})
    note = (
        f"{len(masters)} weights are written as their {'/'.join(wide)} masters, since the format has no place for "
        f"masters beside {'/'.join(dtypes)} weights; the model rounds them when it loads them"
    )
    return {**contents.weights, **masters}, [note]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def group_options(variant: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a group: the variant's, over them ``given``.

    Raises:
        ValueError: no such variant, or an option out of range.
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
    """lr, betas, eps and weight_decay as plain numbers, and what schedulers keep there.

    Raises:
        ValueError: the group is of an optimizer that has other options.
    """
    missing = [key for key in ("lr", "betas", "eps", "weight_decay") if key not in group]
    if missing:
        raise ValueError(
            f"a parameter group has {_keys(group)} and no {missing[0]}: it is of another optimizer"
        )
    lr = group["lr"]
    found: dict[str, Any] = {
        "lr": lr.item() if isinstance(lr, Tensor) else float(lr),
        "betas": tuple(float(beta) for beta in group["betas"]),
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
    }
    for key in CARRIED:
        if key in group:
            found[key] = float(group[key])
    return found


def flags_of(group: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, bool]:
    """{our option: value} of the switches that the group has, from {our option: its key}.

    One that it has not is the variant's to fill.
    """
    return {ours: bool(group[theirs]) for ours, theirs in names.items() if theirs in group}


_MARKS = {
    "variant": "lamb",
    "always_adapt": "timm",
    "trust_clip": "timm",
    "max_coeff": "deepspeed",
    "momentum_decay": "",
    "grad_averaging": "apex",
    "max_grad_norm": "apex",
}
"""Key of groups → the format that it tells of where none above it is there; "": torch's NAdam, which is not read."""


def check_format(groups: Iterable[Mapping[str, Any]], form: str) -> None:
    """Raises ValueError where a group is another format's: its moments would go on under another rule."""
    for group in groups:
        mark = next((key for key in _MARKS if key in group), None)
        if mark is None and form == "lamb":
            raise ValueError(
                f"a parameter group has {_keys(group)} and no variant, as those of Lamb and ShardedLamb have: give "
                f"--from the format that it is of"
            )
        if mark is not None and _MARKS[mark] != form:
            like = f"--from {_MARKS[mark]}" if _MARKS[mark] else "NAdam, which is not read"
            raise ValueError(f"a parameter group has {mark!r} and looks like {like}, not like --from {form}")


def _keys(group: Mapping[str, Any]) -> list[str]:
    return sorted(map(str, group))


def moment_state(name: str, weight: Tensor, state: Mapping[str, Any], step: Any) -> dict[str, Tensor]:
    """One parameter's state in our form. Moments of fp16 and bf16 become fp32, which is exact.

    Raises:
        ValueError: the step or a moment is missing, or has another shape than the weight.
    """
    if step is None:
        raise ValueError(
            f"there is no step count of {name!r}: the file is of another optimizer than --from says"
        )
    found = {"step": torch.as_tensor(step).detach().to("cpu", torch.float64, copy=True).reshape(())}
    for kind in MOMENTS:
        moment = state.get(kind)
        if not isinstance(moment, Tensor):
            raise ValueError(f"the state of {name!r} has no {kind}, only {sorted(map(str, state))}")
        if moment.shape != weight.shape:
            raise ValueError(
                f"{kind} of {name!r} has shape {tuple(moment.shape)} and the weight {tuple(weight.shape)}: the names "
                f"are not in the optimizer's order; give them with --names"
            )
        found[kind] = moment.detach().to(torch.promote_types(moment.dtype, torch.float32)).contiguous()
    return found


def left_out(contents: Contents) -> list[Note]:
    """A note of what only this package's own formats hold."""
    notes = []
    if contents.extra:
        notes.append(f"extra is left out: {', '.join(map(str, contents.extra))}")
    if contents.optimizer.get("model"):
        notes.append(f"what is no tensor in the model is left out: {', '.join(contents.optimizer['model'])}")
    if contents.optimizer.get("skipped_steps"):
        notes.append(f"the count of skipped steps is left out: {contents.optimizer['skipped_steps']}")
    return notes


def differing(what: str, values: Iterable[Any], usual: Any, remark: str) -> list[Note]:
    """A note where any of ``values`` is not ``usual``."""
    odd = sorted({str(value) for value in values if value != usual})
    return [f"{what}={', '.join(odd)}: {remark}"] if odd else []
