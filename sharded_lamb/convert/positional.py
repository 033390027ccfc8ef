"""torch's optimizer state dicts, which know parameters by their place: names for them, and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.convert.common import Converted, Note, moment_state, state_dict_of, weights_of
from sharded_lamb.core.names import normalize

MODEL_KEYS = ("model", "state_dict", "module", "model_state_dict")
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")
_NOT_TRAINED = ("running_mean", "running_var")
HOW = (
    "give --names FILE, a JSON list (or a name a line) in the optimizer's order. Where the optimizer is at hand: "
    "names = {p: n for n, p in model.named_parameters()}; "
    "json.dump([names[p] for g in optimizer.param_groups for p in g['params']], open('names.json', 'w'))"
)


@dataclass(frozen=True)
class PositionalFile:
    """A file's model and optimizer, parameters named. ``groups`` are the file's own, with any keys."""

    weights: dict[str, Tensor]
    aliases: dict[str, str]
    groups: list[Mapping[str, Any]]
    names: list[list[str]]  # of each group's parameters
    raw_states: dict[str, Mapping[str, Any]]  # of those that have one

    def states(self, step_of: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]) -> dict[str, Any]:
        """States in our form; ``step_of(group, state)`` is a parameter's step count."""
        return {
            name: moment_state(
                name, self.weights[name], self.raw_states[name], step_of(group, self.raw_states[name])
            )
            for group, names in zip(self.groups, self.names, strict=True)
            for name in names
            if name in self.raw_states
        }

    def named_groups(self, options: Callable[[Mapping[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"names": names, "options": options(group)}
            for group, names in zip(self.groups, self.names, strict=True)
        ]


def read(file: Mapping[str, Any], names: Sequence[str] | None) -> Converted[PositionalFile]:
    """A file's contents, ``names`` those of the user.

    Raises:
        ValueError: the model or the optimizer is not there, or parameters cannot be named.
    """
    model, optimizer = _pick(file, MODEL_KEYS, "model"), _pick(file, OPTIMIZER_KEYS, "optimizer")
    if not {"state", "param_groups"} <= optimizer.keys():
        raise ValueError(
            f"the optimizer's state dict has {sorted(map(str, optimizer))}, expected state and param_groups"
        )
    weights, aliases, notes = weights_of(model)
    groups = list(optimizer["param_groups"])
    if not groups:
        raise ValueError("the optimizer's state dict has no parameter groups")
    places = [place for group in groups for place in group["params"]]
    flat, how = _flat_names(groups, places, weights, names)
    flat = [aliases.get(normalize(name), normalize(name)) for name in flat]
    _check(flat, weights)
    by_place = dict(zip(places, flat, strict=True))
    raw = {
        by_place[place]: state for place, state in optimizer["state"].items() if place in by_place and state
    }
    per_group = [[by_place[place] for place in group["params"]] for group in groups]
    return PositionalFile(weights, aliases, groups, per_group, raw), notes + how


def _pick(file: Mapping[str, Any], keys: Sequence[str], what: str) -> Mapping[str, Any]:
    there = (file.get(key) for key in keys)
    found = next((value for value in there if isinstance(value, Mapping)), None)
    if found is None:
        remedy = (
            "give the weights with --weights FILE" if what == "model" else "it holds no optimizer's state"
        )
        raise ValueError(
            f"the file has {sorted(map(str, file))[:8]} and none of {', '.join(keys)}, where the {what} would be: "
            f"{remedy}"
        )
    return found


def _flat_names(
    groups: Sequence[Mapping[str, Any]],
    places: Sequence[Any],
    weights: Mapping[str, Tensor],
    given: Sequence[str] | None,
) -> tuple[list[str], list[Note]]:
    """Names in the optimizer's order: the user's, the file's own, or the model's order where it leaves no doubt."""
    if given is not None:
        if len(given) != len(places):
            raise ValueError(
                f"--names has {len(given)} names and the optimizer {len(places)} parameters: {HOW}"
            )
        return list(given), []
    if all(group.get("param_names") for group in groups):
        return [name for group in groups for name in group["param_names"]], []
    if len(groups) > 1:
        raise ValueError(
            f"the file names no parameters, and its {len(groups)} groups are not in the model's order: {HOW}"
        )
    likely = [
        name
        for name, value in weights.items()
        if value.is_floating_point() and name.rsplit(".", 1)[-1] not in _NOT_TRAINED
    ]
    if len(likely) != len(places):
        raise ValueError(
            f"the file names no parameters, and its model has {len(likely)} tensors where the optimizer has "
            f"{len(places)} parameters: {HOW}"
        )
    return likely, [f"the file names no parameters: taken in the model's order, {likely[0]} to {likely[-1]}"]


def _check(names: Sequence[str], weights: Mapping[str, Tensor]) -> None:
    for name in names:
        if name not in weights:
            example = next(iter(weights), None)
            raise ValueError(
                f"parameter {name!r} is not in the model, where names look like {example!r}: {HOW}"
            )
    if len(set(names)) != len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"parameter {twice!r} is named twice: {HOW}")


@dataclass(frozen=True)
class PositionalGroup:
    """A group to write: ``options`` are the target's keys."""

    names: Sequence[str]
    options: Mapping[str, Any]


def write(
    weights: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    groups: Sequence[PositionalGroup],
    states: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """The file's contents: {"model": …, "optimizer": …}. Groups carry their parameters' names, which loaders ignore."""
    place = {name: i for i, name in enumerate(name for group in groups for name in group.names)}
    packed = [
        {**group.options, "params": [place[name] for name in group.names], "param_names": list(group.names)}
        for group in groups
    ]
    state = {place[name]: dict(states[name]) for name in place if name in states}
    return {"model": state_dict_of(weights, aliases), "optimizer": {"state": state, "param_groups": packed}}


def moments(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {name: {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")} for name, state in states.items()}


def group_steps(
    groups: Sequence[Sequence[str]], states: Mapping[str, Mapping[str, Tensor]]
) -> Converted[list[int]]:
    """One step count a group, for formats that have no other: the largest, and a note of parameters that differ."""
    steps, behind = [], []
    for names in groups:
        own = {name: int(states[name]["step"]) for name in names if name in states}
        steps.append(max(own.values(), default=0))
        behind += [name for name, step in own.items() if step != steps[-1]]
    if not behind:
        return steps, []
    return steps, [
        f"steps are counted once a group there: {len(behind)} parameters that had fewer steps ({behind[0]} has "
        f"{int(states[behind[0]]['step'])}) get their group's"
    ]


def as_int(step: Any) -> int:
    return int(torch.as_tensor(step).item())
