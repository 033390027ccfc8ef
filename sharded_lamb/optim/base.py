"""Base class of `Lamb` and `ShardedLamb` as torch optimizers: groups, variants, names, loading."""

import copy
import difflib
import hashlib
import operator
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from sharded_lamb.core.hyperparams import (
    FIXED,
    FP32_MAX,
    GROUP_OPTIONS,
    OPTIMIZER_WIDE,
    OPTIONS,
    OPTIONS_OF_TORCH,
    PATTERN_OPTIONS,
    RuleOptions,
    check_max_grad_norm,
    check_together,
    fill,
    learning_rate,
    validate_change,
    validate_group,
    variant_options,
)
from sharded_lamb.core.layers import RatioBlocks, validate_ratio_blocks
from sharded_lamb.core.names import check_same_order, check_use, matching, needs_names, normalize, unique
from sharded_lamb.core.parameters import NamedParameter, follow_names, named, ndim_of
from sharded_lamb.core.rule import moments_of, sums_of
from sharded_lamb.optim.reports import StepReports
from sharded_lamb.sharding.dcp_tensors import asked_by_dcp
from sharded_lamb.sharding.layer_parts import check_blocks

States = Mapping[Tensor, Mapping[str, Any]]
"""{parameter: its saved state}."""

_CHECKED = (
    *OPTIONS[1:],
    *OPTIONS_OF_TORCH,
    "state_dtype",
)  # without lr, which a schedule writes at every step


@dataclass(slots=True)
class Live:
    """The attributes that methods rebind, in one object that an optimizer never replaces.

    Wrappers (Fabric's, Composer's) run the optimizer's methods on themselves: reads reach the optimizer, writes of
    attributes stay on the wrapper.
    """

    max_grad_norm: float | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    checked: list["_CheckedGroup"] = field(default_factory=list)
    names: dict[Tensor, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _CheckedGroup:
    """A group's options when they were last checked."""

    keys: int
    values: tuple[Any, ...]  # of `_CHECKED`; immutable, so that comparing identities is enough
    digest: str

    @staticmethod
    def of(group: Mapping[str, Any]) -> "_CheckedGroup":
        values = tuple(map(group.get, _CHECKED))
        return _CheckedGroup(len(group), values, hashlib.blake2b(repr(values).encode()).hexdigest())

    def is_current(self, group: Mapping[str, Any]) -> bool:
        return len(group) == self.keys and all(map(operator.is_, map(group.get, _CHECKED), self.values))

    def __getitem__(self, option: str) -> Any:
        return self.values[_CHECKED.index(option)]


class LambOptimizer(StepReports, Optimizer):
    """Groups and names of a LAMB optimizer, without arithmetic and ranks.

    ``max_grad_norm`` (None or > 0) applies to all groups and may change between steps.
    """

    _live: Live
    _live_class: type[Live] = Live
    registered_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of a group that count when its parameters are registered, and are not loaded."""
    _clip_remedy = "give the optimizer max_grad_norm"
    _name_remedy = (
        "pass model.named_parameters() instead of model.parameters() (in Hugging Face's Trainer: "
        "sharded_lamb.integrations.transformers.ShardedLambFactory instead of the class)"
    )

    def __init__(self, params: Any, scalars: dict[str, Any], variant: str, explicit: RuleOptions) -> None:
        """``scalars``: lr, betas, eps, weight_decay. ``explicit``: options that win over the variant's."""
        options = fill(variant, explicit)
        self._live = self._live_class(check_max_grad_norm(options.pop("max_grad_norm")))
        self._ratio_blocks: RatioBlocks = validate_ratio_blocks(options.pop("ratio_blocks"))
        self._constructed = False
        super().__init__(params, validate_group({**scalars, "variant": variant, **options}))
        self._follow_names()
        self._check_patterns(self.param_groups, self.param_groups)
        self._check_ratio_blocks(self.param_groups)
        self._constructed = True
        self._accept_options()

    @property
    def ratio_blocks(self) -> RatioBlocks:
        """{pattern: number of ratio blocks}; empty: none. Fixed at construction."""
        return dict(self._ratio_blocks)

    @property
    def max_grad_norm(self) -> float | None:
        """The norm at which every step clips; None: none. Raises ValueError when set to another value than > 0."""
        return self._live.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._live.max_grad_norm = check_max_grad_norm(value)

    def _any(self, option: str) -> bool:
        """Whether a group has the flag ``option`` of `FIXED`."""
        return any(checked[option] for checked in self._live.checked)

    @property
    def _sums(self) -> tuple[str, ...]:
        """The sums that pass 1 computes for every parameter."""
        return sums_of(lars=self._any("lars"), nesterov=self._any("nesterov"), caution=self._any("caution"))

    @property
    def moments(self) -> tuple[str, ...]:
        """The keys of the moments in every parameter's state: ``exp_avg`` alone for LARS, else ``exp_avg_sq`` too."""
        return moments_of(lars=self._any("lars"))

    @property
    def grad_scale(self) -> Tensor:
        """GradScaler's loss scale, which it sets for one step. Raises AttributeError if it has set none."""
        if self._live.grad_scale is None:
            raise AttributeError("grad_scale is not set")
        return self._live.grad_scale

    @grad_scale.setter
    def grad_scale(self, value: Tensor | None) -> None:
        self._live.grad_scale = value

    @grad_scale.deleter
    def grad_scale(self) -> None:
        self._live.grad_scale = None

    @property
    def found_inf(self) -> Tensor:
        """Whether GradScaler has found an infinite gradient, as `grad_scale`."""
        if self._live.found_inf is None:
            raise AttributeError("found_inf is not set")
        return self._live.found_inf

    @found_inf.setter
    def found_inf(self, value: Tensor | None) -> None:
        self._live.found_inf = value

    @found_inf.deleter
    def found_inf(self) -> None:
        self._live.found_inf = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own options, else its variant's, else the optimizer's.

        Raises:
            ValueError: an option out of range, a misspelt option, one of `OPTIMIZER_WIDE`, or ``caution`` beside
                ``nesterov``.
            TypeError: the group is no dict.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"a parameter group must be a dict, got {type(param_group).__name__}")
        group = {name: value for name, value in param_group.items() if not self._is_own(name, value)}
        self._follow_names()
        self._check_keys(group)
        if group.get("variant", self.defaults["variant"]) != self.defaults["variant"]:
            self._fill_from_variant(group)
        group |= validate_group({**self.defaults, **group})
        check_together([*self.param_groups, group])
        super().add_param_group(group)
        if self._constructed:
            try:
                self._follow_names()
                self._check_patterns(self.param_groups[-1:], self.param_groups[-1:], param_group.keys())
                self._check_ratio_blocks(self.param_groups[-1:])
            except ValueError:
                self.param_groups.pop()
                raise
            self._accept_options()

    def _is_own(self, name: str, value: Any) -> bool:
        """Whether this optimizer, not a group, has the option: SAM and others repeat keywords in their groups."""
        return name in OPTIMIZER_WIDE and (value or None) == (getattr(self, name) or None)

    def _check_keys(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError for a misspelt option or one of `OPTIMIZER_WIDE`."""
        for name, reason in OPTIMIZER_WIDE.items():
            if name in group:
                raise ValueError(
                    f"{name}={group[name]!r} in a parameter group: {reason}, so pass {name} to the optimizer instead"
                )
        if "state_dtype" in group and "state_dtype" not in self.registered_keys:
            raise ValueError(
                f"state_dtype={group['state_dtype']} in a parameter group: ShardedLamb alone stores moments in other "
                f"dtypes than {type(self).__name__}'s"
            )
        for key in group.keys() - self.defaults.keys():
            known = [*self.defaults, *self.registered_keys, "params"]
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            if near and key not in (*self.registered_keys, "params", "param_names"):
                raise ValueError(f"unknown option {key!r} in a parameter group; did you mean {near[0]!r}?")

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

    def _check_patterns(
        self,
        groups: Sequence[dict[str, Any]],
        changed: Sequence[dict[str, Any]],
        only: Container[str] = PATTERN_OPTIONS,
    ) -> None:
        """Check the patterns of ``changed``, each over all ``groups`` with equal ones.

        Raises:
            ValueError: patterns need missing names, or match no parameter of their groups.
        """
        for option in (option for option in PATTERN_OPTIONS if option in only):
            for patterns in dict.fromkeys(group[option] for group in changed if group[option]):
                params = [
                    pair for group in groups if group[option] == patterns for pair in self._members(group)
                ]
                if needs_names(patterns) and any(name is None for name, _ in params):
                    raise ValueError(
                        f"{option}={patterns!r} matches names and the parameters have none: {self._name_remedy}"
                    )
                used = set().union(*(matching(patterns, name, ndim_of(p)) for name, p in params))
                example = next((name for name, _ in params if name is not None), None)
                check_use(option, patterns, used, example)

    def _check_ratio_blocks(self, groups: Sequence[dict[str, Any]]) -> None:
        """Check ``ratio_blocks`` with the parameters of ``groups``: at construction all, later a new one.

        Raises:
            ValueError: parameters have no names; as `check_blocks`; at construction, a pattern matches no parameter.
        """
        unused = dict.fromkeys(self._ratio_blocks)
        if not unused:
            return
        for given, p in (pair for group in groups for pair in self._members(group)):
            if given is None and needs_names(unused):
                raise ValueError(
                    f"ratio_blocks={self._ratio_blocks} matches names and the parameters have none: {self._name_remedy}"
                )
            name = "an unnamed one" if given is None else normalize(given)
            check_blocks(name, p, self._ratio_blocks)
            for pattern in matching(self._ratio_blocks, given, ndim_of(p)):
                unused.pop(pattern, None)
        if unused and not self._constructed:
            raise ValueError(
                f"ratio_blocks: {[*unused]} matches no parameter. Patterns are searched with re.search in the names "
                f"that named_parameters() gives, wrappers' prefixes removed"
            )

    def _follow_names(self) -> None:
        """After groups were edited. Raises ValueError for a parameter that is in two places."""
        self._live.names = follow_names(self.param_groups, self._live.names)

    def _members(self, group: Mapping[str, Any]) -> Iterable[tuple[str | None, Tensor]]:
        """(name or None, parameter) of every parameter of a group."""
        return named(group)

    def _groups_of_options(self) -> list[dict[str, Any]]:
        return self.param_groups

    def _named_parameters(self) -> Iterator[NamedParameter]:
        """(name without wrappers' prefixes, parameter, group) in order; no two names are equal.

        An unnamed parameter is named by group and position, a repeated name is followed by them.
        """
        seen = set()
        for index, group in enumerate(self.param_groups):
            for position, (given, p) in enumerate(named(group)):
                name = f"group{index}.param{position}" if given is None else normalize(given)
                while name in seen:
                    name = unique(name, index, position)
                seen.add(name)
                yield name, p, group

    # -- options written into groups ------------------------------------------------------------------

    def _accept_options(self) -> None:
        """Accept all groups' options, which are valid, as they are now."""
        self._live.checked[:] = map(_CheckedGroup.of, self._groups_of_options())

    def _check_options(self) -> None:
        """Check options that were written into groups since the last call, and make them plain values.

        Raises:
            ValueError, TypeError: as at construction, with the group's index; a new ``variant``.
        """
        checked = self._live.checked
        for index, group in enumerate(self._groups_of_options()):
            lr = group.get("lr")
            is_plain = type(lr) is float and 0.0 <= lr <= FP32_MAX
            if not (is_plain and checked[index].is_current(group)):
                try:
                    self._check_group(group, checked[index])
                except (ValueError, TypeError) as error:
                    raise type(error)(f"parameter group {index}: {error}") from error
                checked[index] = _CheckedGroup.of(group)

    def _check_group(self, group: dict[str, Any], before: _CheckedGroup) -> None:
        if before.is_current(group):
            group["lr"] = learning_rate(group["lr"])
            return
        self._check_keys(group)
        if group.get("state_dtype") is not before["state_dtype"]:
            raise ValueError(
                f"state_dtype was changed to {group.get('state_dtype')}: it counts as parameters are registered"
            )
        options = validate_change({name: before[name] for name in FIXED}, group)
        variants = before["variant"], options["variant"]
        # Loading a checkpoint changes the name together with the options.
        if variants[0] != variants[1] and all(options[name] == before[name] for name in GROUP_OPTIONS):
            raise ValueError(
                f"variant {variants[0]!r} was changed to {variants[1]!r}, but a variant fills options at construction "
                f"only: write the options that differ (VARIANTS[{variants[1]!r}]), or construct the optimizer anew"
            )
        group.update(options)
        edited = [name for name in PATTERN_OPTIONS if options[name] != before[name]]
        self._check_patterns(self._groups_of_options(), [group], edited)

    def _option_facts(self) -> tuple[list[Hashable], list[Tensor]]:
        """The groups' options, equal on all ranks, and the learning rates that the host must not read."""
        lrs = [group["lr"] for group in self._groups_of_options()]
        is_remote = [isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in lrs]
        facts: list[Hashable] = [seen.digest for seen in self._live.checked]
        facts += [None if remote else float(lr) for lr, remote in zip(lrs, is_remote, strict=True)]
        return facts, [lr for lr, remote in zip(lrs, is_remote, strict=True) if remote]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`; every tensor keeps its own dtype.

        Raises:
            ValueError: groups, parameters or a tensor's shape differ from this optimizer's; nothing was loaded.
        """
        self.load_local_state_dict(state_dict)

    def local_state_dict(self) -> dict[str, Any]:
        """This rank's state, in the memory that steps update; without that of parameters that are in no group."""
        grouped = {p for group in self.param_groups for p in group["params"]}
        hidden = [key for key in self.state if isinstance(key, Tensor) and key not in grouped]
        kept = {p: self.state.pop(p) for p in hidden}  # torch's state_dict fails on them
        try:
            return super().state_dict()
        finally:
            self.state.update(kept)

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
            group.update(validate_group(group))
        self._accept_options()

    def _check_saved_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        saved_sizes = [len(group["params"]) for group in saved_groups]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if saved_sizes != own_sizes:
            raise ValueError(
                f"the state dict has parameter groups of {saved_sizes} parameters and this optimizer has {own_sizes}: "
                f"construct it from the same model with the same groups"
            )
        self.check_names_of_patterns(saved_groups)
        for index, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            validate_change(group, _options_of(saved))
            if not asked_by_dcp():  # which matches names, and copies groups of another layout
                check_same_order(saved, group, f"the state dict's group {index}")

    def check_names_of_patterns(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError if patterns of saved groups match names, and parameters of the group here have none."""
        for index, (options, group) in enumerate(zip(saved, self.param_groups, strict=True)):
            patterns = [p for option in PATTERN_OPTIONS for p in options.get(option) or ()]
            if needs_names(patterns) and any(name is None for name, _ in self._members(group)):
                raise ValueError(
                    f"group {index} was saved with the patterns {patterns}, which match names, and the parameters have "
                    f"none: {self._name_remedy}"
                )

    def _check_states(self, states: States) -> None:
        """Raises ValueError for states that `_load_states` cannot load."""

    def _load_states(self, states: States) -> None:
        raise NotImplementedError


def _options_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in saved.items() if key not in ("params", "param_names", "state_dtype")}
