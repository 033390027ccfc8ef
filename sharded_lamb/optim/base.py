"""Base class of `Lamb` and `ShardedLamb` as torch optimizers: groups, variants, names, loading."""

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sharded_lamb.core.hyperparams import (
    GROUP_OPTIONS,
    RuleOptions,
    check_max_grad_norm,
    fill,
    validate_group,
    variant_options,
)
from sharded_lamb.core.names import check_use, matching, needs_names, normalize
from sharded_lamb.core.options import OptionTable
from sharded_lamb.core.parameters import NamedParameter, named, ndim_of

States = Mapping[Tensor, Mapping[str, Any]]
"""{parameter: its saved state}."""
PATTERN_OPTIONS = ("exclude_from_weight_decay", "exclude_from_layer_adaptation")


def effective_patterns(group: Mapping[str, Any], option: str) -> tuple[str, ...]:
    """The group's patterns; ``exclude_from_layer_adaptation=None`` means the patterns of weight decay."""
    patterns = group[option]
    return tuple(group["exclude_from_weight_decay"] if patterns is None else patterns)


class LambOptimizer(Optimizer):
    """Groups and names of a LAMB optimizer, without arithmetic and ranks.

    ``max_grad_norm`` (None or > 0) applies to all groups and may change between steps.
    """

    max_grad_norm: float | None
    _clip_remedy = "give the optimizer max_grad_norm"
    _name_remedy = "pass model.named_parameters() instead of model.parameters()"

    def __init__(self, params: Any, scalars: dict[str, Any], variant: str, explicit: RuleOptions) -> None:
        """``scalars``: lr, betas, eps, weight_decay. ``explicit``: options that win over the variant's."""
        options = fill(variant, explicit)
        self.max_grad_norm = options.pop("max_grad_norm")
        check_max_grad_norm(self.max_grad_norm)
        self._constructed = False
        defaults = {**scalars, "variant": variant, **options}
        validate_group(defaults)
        super().__init__(params, defaults)
        self._constructed = True
        self._check_patterns(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own options, else its variant's, else the optimizer's.

        Raises:
            ValueError: an option out of range, a misspelt option, or ``max_grad_norm``, which is optimizer-wide.
            TypeError: the group is no dict.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group must be a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        if "max_grad_norm" in group:
            raise ValueError(
                f"max_grad_norm={group['max_grad_norm']!r} in a parameter group: clipping is by the global norm "
                f"over all groups, so pass max_grad_norm to the optimizer instead"
            )
        for key in group.keys() - self.defaults.keys():
            near = difflib.get_close_matches(key, [*self.defaults, "params"], n=1, cutoff=0.8)
            if near and key not in ("params", "param_names"):
                raise ValueError(f"unknown option {key!r} in a parameter group; did you mean {near[0]!r}?")
        if group.get("variant", self.defaults["variant"]) != self.defaults["variant"]:
            self._fill_from_variant(group)
        validate_group({**self.defaults, **{key: value for key, value in group.items() if key != "params"}})
        super().add_param_group(group)
        if self._constructed:
            own = {option for option in PATTERN_OPTIONS if option in param_group}
            try:
                self._check_patterns([self.param_groups[-1]], own)
            except ValueError:
                self.param_groups.pop()
                raise

    def _fill_from_variant(self, group: dict[str, Any]) -> None:
        options = variant_options(group["variant"])
        for name in GROUP_OPTIONS:
            group.setdefault(name, options[name])
        clip = options["max_grad_norm"]
        if clip is not None and clip != self.max_grad_norm:
            raise ValueError(
                f"variant={group['variant']!r} in a parameter group clips at {clip} and clipping is optimizer-wide: "
                f"{self._clip_remedy} {clip} (it is {self.max_grad_norm})"
            )

    def _check_patterns(self, groups: list[dict[str, Any]], only: set[str] | None = None) -> None:
        """Raises ValueError for patterns that need missing names, or that match no parameter of their groups."""
        for option in PATTERN_OPTIONS:
            if only is not None and option not in only:
                continue
            groups_of: dict[tuple[str, ...], list[dict[str, Any]]] = {}
            for group in groups:
                if group[option]:
                    groups_of.setdefault(tuple(group[option]), []).append(group)
            for patterns, members in groups_of.items():
                params = [pair for group in members for pair in named(group)]
                if needs_names(patterns) and any(name is None for name, _ in params):
                    raise ValueError(
                        f"{option}={patterns!r} matches names and the parameters have none: {self._name_remedy}"
                    )
                used = set().union(*(matching(patterns, name, ndim_of(p)) for name, p in params))
                example = next((name for name, _ in params if name is not None), None)
                check_use(option, patterns, used, example)

    def _named_parameters(self) -> Iterator[NamedParameter]:
        """(name without wrappers' prefixes, parameter, group) in order; unnamed parameters are named by position."""
        for index, group in enumerate(self.param_groups):
            for position, (name, p) in enumerate(named(group)):
                yield (normalize(name) if name is not None else f"group{index}.param{position}"), p, group

    def _option_table(self, rows: Sequence[NamedParameter], device: torch.device) -> OptionTable:
        """The options of ``rows`` of `_named_parameters`, in their order."""
        groups = list({id(group): group for _, _, group in rows}.values())
        index_of = {id(group): index for index, group in enumerate(groups)}

        def unmatched(option: str) -> list[bool]:
            return [not matching(effective_patterns(g, option), name, ndim_of(p)) for name, p, g in rows]

        return OptionTable(
            groups,
            group_of=[index_of[id(group)] for _, _, group in rows],
            decays=unmatched("exclude_from_weight_decay"),
            adapts=unmatched("exclude_from_layer_adaptation"),
            is_fp64=[p.dtype == torch.float64 for _, p, _ in rows],
            device=device,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`; every tensor keeps its own dtype.

        Raises:
            ValueError: groups, parameters or a tensor's shape differ from this optimizer's; nothing was loaded.
        """
        self.load_local_state_dict(state_dict)

    def local_state_dict(self) -> dict[str, Any]:
        """This rank's state, in the memory that steps update."""
        return super().state_dict()

    def load_local_state_dict(self, state_dict: dict[str, Any]) -> None:
        """`load_state_dict` of this rank alone."""
        self._load(*self._checked(self._after_pre_hooks(state_dict)))

    def _after_pre_hooks(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        return state_dict

    def _checked(self, state_dict: Mapping[str, Any]) -> tuple[list[dict[str, Any]], States]:
        """(groups, {parameter: state}) of a state dict that fits this optimizer. Raises ValueError if it does not."""
        missing = {"state", "param_groups"} - state_dict.keys()
        if missing:
            raise ValueError(f"the state dict lacks {sorted(missing)}: pass the result of state_dict()")
        groups, saved = state_dict["param_groups"], state_dict["state"]
        self._check_saved_groups(groups)
        keys = [key for group in groups for key in group["params"]]
        unexpected = [key for key in saved if key not in keys]
        if unexpected:
            raise ValueError(
                f"the state dict has state of parameters {unexpected}, which this optimizer does not have: construct "
                f"it from the same model with the same groups"
            )
        params = [p for group in self.param_groups for p in group["params"]]
        states = {p: saved[key] for key, p in zip(keys, params, strict=True) if key in saved}
        self._check_states(states)
        return groups, states

    def _load(self, saved_groups: list[dict[str, Any]], states: States) -> None:
        """Load the result of `_checked`."""
        self._load_states(states)
        self._load_groups(saved_groups)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        """Load checked, saved options; keep this optimizer's parameters and names."""
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            group.update(copy.deepcopy(_options_of(saved)))

    def _check_saved_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        saved_sizes = [len(group["params"]) for group in saved_groups]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if saved_sizes != own_sizes:
            raise ValueError(
                f"the state dict has parameter groups of {saved_sizes} parameters and this optimizer has {own_sizes}: "
                f"construct it from the same model with the same groups"
            )
        for index, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            validate_group({**group, **_options_of(saved)})
            names, own = saved.get("param_names"), group.get("param_names")
            if names is None or own is None:
                continue
            for saved_name, own_name in zip(names, own, strict=True):
                if normalize(saved_name) != normalize(own_name):
                    raise ValueError(
                        f"the state dict's group {index} has {saved_name!r} where this optimizer has {own_name!r}: "
                        f"pass the parameters in the order in which they were saved"
                    )

    def _check_states(self, states: States) -> None:
        """Raises ValueError for states that `_load_states` cannot load."""

    def _load_states(self, states: States) -> None:
        raise NotImplementedError


def _options_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in saved.items() if key not in ("params", "param_names")}
