"""What `Lamb` and `ShardedLamb` share as torch optimizers: groups, variants, names, loading."""

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

PATTERN_OPTIONS = ("exclude_from_weight_decay", "exclude_from_layer_adaptation")


def effective_patterns(group: Mapping[str, Any], option: str) -> tuple[str, ...]:
    """The group's patterns; ``exclude_from_layer_adaptation=None`` means those of weight decay."""
    patterns = group[option]
    return tuple(group["exclude_from_weight_decay"] if patterns is None else patterns)


class LambOptimizer(Optimizer):
    """The part of a LAMB optimizer that knows groups and names but no arithmetic and no ranks.

    ``max_grad_norm`` (None or > 0) is optimizer-is_fp64 and may be changed between steps.
    """

    max_grad_norm: float | None
    _clip_remedy = "give the optimizer max_grad_norm"
    _name_remedy = "pass model.named_parameters() instead of model.parameters()"

    def __init__(self, params: Any, scalars: dict[str, Any], variant: str, explicit: RuleOptions) -> None:
        """``scalars``: lr, betas, eps, weight_decay. ``explicit``: what the variant must not fill."""
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
        """Add a group: its own options, else its own variant's, else the optimizer's.

        Raises:
            ValueError: an option out of range, a misspelt option, or ``max_grad_norm``, which is optimizer-is_fp64.
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
                f"variant={group['variant']!r} in a parameter group clips at {clip} and clipping is optimizer-is_fp64: "
                f"{self._clip_remedy} {clip} (it is {self.max_grad_norm})"
            )

    def _check_patterns(self, groups: list[dict[str, Any]], only: set[str] | None = None) -> None:
        """Refuse patterns without names, and patterns that pick nothing in all the groups that hold them."""
        for option in PATTERN_OPTIONS:
            if only is not None and option not in only:
                continue
            holders: dict[tuple[str, ...], list[dict[str, Any]]] = {}
            for group in groups:
                if group[option]:
                    holders.setdefault(tuple(group[option]), []).append(group)
            for patterns, holding in holders.items():
                held = [pair for group in holding for pair in named(group)]
                if needs_names(patterns) and any(name is None for name, _ in held):
                    raise ValueError(
                        f"{option}={patterns!r} goes by names and the parameters came without: {self._name_remedy}"
                    )
                used = set().union(*(matching(patterns, name, ndim_of(p)) for name, p in held))
                example = next((name for name, _ in held if name is not None), None)
                check_use(option, patterns, used, example)

    def _named_parameters(self) -> Iterator[NamedParameter]:
        """(name without wrappers' prefixes, parameter, group) in order; unnamed ones are called by position."""
        for index, group in enumerate(self.param_groups):
            for position, (name, p) in enumerate(named(group)):
                yield (normalize(name) if name is not None else f"group{index}.param{position}"), p, group

    def _option_table(self, chosen: Sequence[NamedParameter], device: torch.device) -> OptionTable:
        """The options of ``chosen`` rows of `_named_parameters`, in their order."""
        groups = list({id(group): group for _, _, group in chosen}.values())
        place = {id(group): index for index, group in enumerate(groups)}

        def free(option: str) -> list[bool]:
            return [not matching(effective_patterns(g, option), name, ndim_of(p)) for name, p, g in chosen]

        return OptionTable(
            groups,
            group_of=[place[id(group)] for _, _, group in chosen],
            decays=free("exclude_from_weight_decay"),
            adapts=free("exclude_from_layer_adaptation"),
            is_fp64=[p.dtype == torch.float64 for _, p, _ in chosen],
            device=device,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state made by `state_dict`; every tensor keeps its own dtype.

        Raises:
            ValueError: groups or parameters differ from this optimizer's, or a tensor's shape does.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved_groups = state_dict["param_groups"]
        self._check_saved_groups(saved_groups)
        pairs = [
            (key, p)
            for saved, group in zip(saved_groups, self.param_groups, strict=True)
            for key, p in zip(saved["params"], group["params"], strict=True)
        ]
        self._load_tensors({p: state_dict["state"][key] for key, p in pairs if key in state_dict["state"]})
        self._load_groups(saved_groups)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        """Take on saved options, once checked; parameters and names stay this optimizer's."""
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            group.update(copy.deepcopy(_options_of(saved)))

    def _check_saved_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        theirs = [len(group["params"]) for group in saved_groups]
        ours = [len(group["params"]) for group in self.param_groups]
        if theirs != ours:
            raise ValueError(
                f"the state dict holds parameter groups of {theirs} parameters and this optimizer has {ours}: "
                f"construct it from the same model with the same groups"
            )
        for index, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            validate_group({**group, **_options_of(saved)})
            names, own = saved.get("param_names"), group.get("param_names")
            if names is None or own is None:
                continue
            for theirs_name, our_name in zip(names, own, strict=True):
                if normalize(theirs_name) != normalize(our_name):
                    raise ValueError(
                        f"the state dict's group {index} holds {theirs_name!r} where this optimizer has {our_name!r}: "
                        f"pass the parameters in the order that they were saved in"
                    )

    def _load_tensors(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        raise NotImplementedError


def _options_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in saved.items() if key not in ("params", "param_names")}
