"""torch's optimizer state dicts, which number parameters: to names and back."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sharded_lamb.checkpoint.in_memory import InMemoryCheckpoint
from sharded_lamb.convert.common import Converted, Note, moment_state, state_dict_of, weights_of
from sharded_lamb.core.names import normalize
from sharded_lamb.core.rule import MOMENTS, moments_of

MODEL_KEYS = ("model", "state_dict", "module", "model_state_dict")
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim", "optim_state_dict", "optimizer_states")
_BUFFER_NAMES = ("running_mean", "running_var")
HOW = (
    "give --names FILE, a JSON list (or one name per line) in the optimizer's order. To write it from the optimizer: "
    "names = {p: n for n, p in model.named_parameters()}; "
    "json.dump([names[p] for g in optimizer.param_groups for p in g['params']], open('names.json', 'w'))"
)


def in_order(contents: InMemoryCheckpoint, names: Sequence[str]) -> InMemoryCheckpoint:
    """The contents with each group's parameters in the order of ``names``.

    Raises:
        ValueError: ``names`` are not those of the groups' parameters.
    """
    given = [contents.aliases.get(normalize(name), normalize(name)) for name in names]
    own = [name for group in contents.groups for name in group["names"]]
    for unmatched, what in ((set(own) - set(given), "lacks"), (set(given) - set(own), "has unknown")):
        if unmatched:
            raise ValueError(
                f"--names {what} {', '.join(sorted(unmatched)[:3])} ({len(unmatched)} names): {HOW}"
            )
    place = {name: number for number, name in enumerate(given)}
    groups = [{**group, "names": sorted(group["names"], key=place.__getitem__)} for group in contents.groups]
    return replace(contents, groups=groups)


class Unordered(dict[str, Tensor]):
    """A model from a file that does not keep the order of its parameters, such as safetensors."""


@dataclass(frozen=True)
class PositionalFile:
    """A file's model and optimizer with named parameters."""

    weights: dict[str, Tensor]
    aliases: dict[str, str]
    groups: list[Mapping[str, Any]]  # as in the file, with any keys
    names: list[list[str]]  # of each group's parameters
    raw_states: dict[str, Mapping[str, Any]]  # of the parameters that have one

    def states(self, step_of: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]) -> dict[str, Any]:
        """Returns {parameter: state} in our form; ``step_of(group, state)`` returns a parameter's step count."""
        return {
            name: moment_state(
                name,
                self.weights[name],
                self.raw_states[name],
                step_of(group, self.raw_states[name]),
                moments_of(lars=bool(group.get("lars"))),
            )
            for group, names in zip(self.groups, self.names, strict=True)
            for name in names
            if name in self.raw_states
        }

    def named_groups(self, options: Callable[[Mapping[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns groups in our form; ``options(group)`` returns a group's options."""
        return [
            {"names": names, "options": options(group)}
            for group, names in zip(self.groups, self.names, strict=True)
        ]


def read(
    file: Mapping[str, Any], names: Sequence[str] | None, used: Collection[str] = ()
) -> Converted[PositionalFile]:
    """Reads {"model", "optimizer"}; ``names`` are the user's, in the optimizer's order.

    What else the file holds is noted as left out, except for the keys ``used``.

    Raises:
        ValueError: the model or the optimizer is missing, or parameters cannot be named.
    """
    if isinstance(many := file.get("optimizer_states"), list):  # Lightning's
        if len(many) != 1:
            raise ValueError(
                f"the file has {len(many)} optimizers, expected one: save each in a file of its own"
            )
        file = {**file, "optimizer": many[0]}
    model, optimizer = _pick(file, MODEL_KEYS, "model"), _pick(file, OPTIMIZER_KEYS, "optimizer")
    if not {"state", "param_groups"} <= optimizer.keys():
        raise ValueError(
            f"the optimizer's state dict has {sorted(map(str, optimizer))}, expected state and param_groups"
        )
    weights, aliases, notes = weights_of(model)
    rest = [str(key) for key in file if key not in (*MODEL_KEYS, *OPTIMIZER_KEYS, *used)]
    if rest:
        notes.append(f"left out of the file: {', '.join(rest[:12])}{', …' if len(rest) > 12 else ''}")
    groups = list(optimizer["param_groups"])
    if not groups:
        raise ValueError("the optimizer's state dict has no parameter groups")
    places = [place for group in groups for place in group["params"]]
    is_ordered = not isinstance(model, Unordered)
    flat, how = _flat_names(groups, places, weights, names, is_ordered=is_ordered)
    flat = [aliases.get(normalize(name), normalize(name)) for name in flat]
    _check(flat, weights)
    by_place = dict(zip(places, flat, strict=True))
    raw = {
        by_place[place]: state for place, state in optimizer["state"].items() if place in by_place and state
    }
    per_group = [[by_place[place] for place in group["params"]] for group in groups]
    return PositionalFile(weights, aliases, groups, per_group, raw), notes + how


def _pick(file: Mapping[str, Any], keys: Sequence[str], what: str) -> Mapping[str, Any]:
    values = (file.get(key) for key in keys)
    content = next((value for value in values if isinstance(value, Mapping)), None)
    if content is None:
        remedy = "give the weights with --weights FILE" if what == "model" else "it holds no optimizer state"
        raise ValueError(
            f"the file has {sorted(map(str, file))[:8]}, but none of {', '.join(keys)} for the {what}: {remedy}"
        )
    return content


def _flat_names(
    groups: Sequence[Mapping[str, Any]],
    places: Sequence[Any],
    weights: Mapping[str, Tensor],
    given: Sequence[str] | None,
    *,
    is_ordered: bool,
) -> tuple[list[str], list[Note]]:
    """Returns names in the optimizer's order: the user's, the file's, or those of an ordered model if counts agree."""
    if given is not None:
        if len(given) != len(places):
            raise ValueError(
                f"--names has {len(given)} names, but the optimizer has {len(places)} parameters: {HOW}"
            )
        return list(given), []
    if all(group.get("param_names") for group in groups):
        return [name for group in groups for name in group["param_names"]], []
    if all(isinstance(place, str) for place in places):  # FSDP's, and torch.distributed.checkpoint's
        return list(places), []
    if not is_ordered:
        raise ValueError(
            f"neither the optimizer nor a file of weights alone has the parameters' order: {HOW}"
        )
    if len(groups) > 1:
        raise ValueError(
            f"the file names no parameters, and its {len(groups)} groups are not in the model's order: {HOW}"
        )
    likely = [
        name
        for name, value in weights.items()
        if value.is_floating_point() and name.rsplit(".", 1)[-1] not in _BUFFER_NAMES
    ]
    if len(likely) != len(places):
        raise ValueError(
            f"the file names no parameters, and its model has {len(likely)} tensors, but the optimizer has "
            f"{len(places)} parameters: {HOW}"
        )
    return likely, [
        f"the file names no parameters: the model's order is assumed, {likely[0]} to {likely[-1]}"
    ]


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
    """A group to write; ``options`` has the target format's keys."""

    names: Sequence[str]
    options: Mapping[str, Any]


def write(
    weights: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    groups: Sequence[PositionalGroup],
    states: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """Returns {"model": …, "optimizer": …}. Groups hold their parameters' names, which loaders ignore."""
    place = {name: i for i, name in enumerate(name for group in groups for name in group.names)}
    packed = [
        {**group.options, "params": [place[name] for name in group.names], "param_names": list(group.names)}
        for group in groups
    ]
    state = {place[name]: dict(states[name]) for name in place if name in states}
    return {"model": state_dict_of(weights, aliases), "optimizer": {"state": state, "param_groups": packed}}


def moments(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Returns {parameter: its two moments}. Raises ValueError for LARS's state, which has one."""
    single = next((name for name, state in states.items() if "exp_avg_sq" not in state), None)
    if single is not None:
        raise ValueError(
            f"the checkpoint is of LARS, with one moment of {single!r}: expected two; use --to sgd"
        )
    return {name: {kind: state[kind] for kind in MOMENTS} for name, state in states.items()}


def group_steps(
    groups: Sequence[Sequence[str]], states: Mapping[str, Mapping[str, Tensor]]
) -> Converted[list[int]]:
    """Returns each group's largest step count, and a note of parameters that took fewer steps."""
    steps, behind = [], []
    for names in groups:
        own = {name: int(states[name]["step"]) for name in names if name in states}
        steps.append(max(own.values(), default=0))
        behind += [name for name, step in own.items() if step != steps[-1]]
    if not behind:
        return steps, []
    return steps, [
        f"the format has one step count per group: {len(behind)} parameters with fewer steps ({behind[0]} has "
        f"{int(states[behind[0]]['step'])}) take their group's"
    ]
