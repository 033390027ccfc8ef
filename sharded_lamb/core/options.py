"""Parameter groups → `ParameterOptions`: Python values as device tensors, rebuilt only when a value changes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.core.host_values import as_tensor, to_device
from sharded_lamb.core.hyperparams import PATTERN_OPTIONS
from sharded_lamb.core.layers import Layers
from sharded_lamb.core.names import matching
from sharded_lamb.core.parameters import NamedParameter, ndim_of
from sharded_lamb.core.rule import ParameterOptions


@dataclass(frozen=True, slots=True)
class _GroupOptions:
    """One group's options as numbers: fields of `ParameterOptions`, and ``adapts_without_decay``."""

    beta1: float
    beta2: float
    c1: float
    c2: float
    corrects: float
    corrects_lr: float
    eps_inside: float
    eps_outside: float
    l2: float
    decay: float
    weight_norm_low: float
    weight_norm_high: float
    ratio_low: float
    ratio_high: float
    adapts_without_decay: float
    normalizes: float
    nesterov: float
    decoupled: float
    peak_lr: float
    trust_coefficient: float
    includes_lr: float
    larc_clip: float
    opposed: float

    @staticmethod
    def of(group: Mapping[str, Any]) -> "_GroupOptions":
        beta1, beta2 = group["betas"]
        phi = group["weight_norm_clip"] or (0.0, math.inf)
        clip = group["trust_clip"] or (0.0, math.inf)
        eps, decay = group["eps"], group["weight_decay"]
        return _GroupOptions(
            beta1=beta1,
            beta2=beta2,
            c1=1 - beta1 if group["grad_averaging"] else 1.0,
            c2=1 - beta2,
            corrects=float(group["bias_correction"] is True),
            corrects_lr=float(group["bias_correction"] == "lr"),
            eps_inside=eps if group["eps_inside_sqrt"] else 0.0,
            eps_outside=0.0 if group["eps_inside_sqrt"] else eps,
            l2=0.0 if group["adam_w_mode"] else decay,
            decay=decay if group["adam_w_mode"] else 0.0,
            weight_norm_low=phi[0],
            weight_norm_high=phi[1],
            ratio_low=clip[0],
            ratio_high=clip[1],
            adapts_without_decay=float(group["adapt_without_decay"]),
            normalizes=float(group["normalize_grad"]),
            nesterov=float(group["nesterov"]),
            decoupled=float(group["decoupled_decay"]),
            peak_lr=group["corrected_weight_decay"] or math.inf,
            trust_coefficient=group["trust_coefficient"],
            includes_lr=float(group["momentum_includes_lr"]),
            larc_clip=float(group["larc_clip"]),
            opposed=float(not group["caution"]),
        )


def effective_patterns(group: Mapping[str, Any], option: str) -> tuple[str, ...]:
    """The group's patterns; ``exclude_from_layer_adaptation=None`` means the patterns of weight decay."""
    patterns = group[option]
    return tuple(group["exclude_from_weight_decay"] if patterns is None else patterns)


class OptionTable:
    """The options of all layers, as tensors on the device of the update; [L] where `rule` says [P].

    Reads the groups, whose options are valid (`sharded_lamb.core.hyperparams.validate_group`), at every call. A step
    whose groups hold the same values as in the previous step builds no tensor and copies nothing.
    """

    def __init__(self, rows: Sequence[NamedParameter], layers: Layers, device: torch.device) -> None:
        """``rows``: the parameters of ``layers``."""
        self.rows, self.layers, self._device = list(rows), layers, device
        self._groups = list({id(group): group for _, _, group in rows}.values())
        index_of = {id(group): index for index, group in enumerate(self._groups)}
        group_of = [index_of[id(group)] for _, _, group in rows]
        self._group_of = layers.expand(torch.tensor(group_of, dtype=torch.int64, device=device))
        self.is_fp64 = layers.expand(
            torch.tensor([p.dtype == torch.float64 for _, p, _ in rows], device=device)
        )
        self._numel = torch.tensor(layers.numels(), dtype=torch.float64, device=device)
        self._of_groups: list[_GroupOptions] | None = None
        self._patterns: list[list[tuple[str, ...]]] | None = None
        self._decays = self._adapts = self.is_fp64  # [P] bool, of the patterns
        self._options: ParameterOptions | None = None
        self._lrs: list[float] | None = None
        self._lr: Tensor | None = None

    def __len__(self) -> int:
        return len(self._group_of)

    @property
    def names(self) -> list[str]:
        """The layers' names."""
        return self.layers.names([name for name, _, _ in self.rows])

    @property
    def parameter_of(self) -> dict[str, NamedParameter]:
        """{layer's name: its parameter}."""
        rows = [row for row, count in zip(self.rows, self.layers.counts, strict=True) for _ in range(count)]
        return dict(zip(self.names, rows, strict=True))

    def options(self) -> ParameterOptions:
        """The groups' current options, one entry per layer."""
        of_groups = [_GroupOptions.of(group) for group in self._groups]
        patterns = [
            [effective_patterns(group, option) for option in PATTERN_OPTIONS] for group in self._groups
        ]
        if patterns != self._patterns:
            self._decays, self._adapts = map(self._unmatched, PATTERN_OPTIONS)
            self._patterns, self._options = patterns, None
        if self._options is None or of_groups != self._of_groups:
            self._of_groups, self._options = of_groups, self._assemble(of_groups)
        return self._options

    def _unmatched(self, option: str) -> Tensor:
        """[L] bool: no pattern of ``option`` matches the parameter."""
        unmatched = [
            not matching(effective_patterns(g, option), name, ndim_of(p)) for name, p, g in self.rows
        ]
        return self.layers.expand(torch.tensor(unmatched, dtype=torch.bool, device=self._device))

    def lr(self) -> Tensor:
        """[L] fp64: each layer's learning rate; a tensor lr is read on the device, never on the host."""
        values = [group["lr"] for group in self._groups]
        if any(isinstance(value, Tensor) for value in values):
            self._lrs = None
            parts = [
                as_tensor(value).to(self._device, torch.float64, non_blocking=True).reshape(())
                for value in values
            ]
            return torch.stack(parts)[self._group_of]
        if self._lr is None or values != self._lrs:
            self._lrs = values
            self._lr = to_device(values, torch.float64, self._device)[self._group_of]
        return self._lr

    def _assemble(self, of_groups: Sequence[_GroupOptions]) -> ParameterOptions:
        table = to_device([astuple(options) for options in of_groups], torch.float64, self._device)
        table = table[self._group_of]
        names = [field.name for field in fields(_GroupOptions)]
        named = dict(zip(names, table.unbind(dim=1), strict=True))
        without_decay = named.pop("adapts_without_decay").bool()
        l2, decay = named.pop("l2") * self._decays, named.pop("decay") * self._decays
        adapts = self._adapts & (without_decay | (l2 + decay > 0))
        flags = {
            name: named.pop(name).bool() for name in ("normalizes", "decoupled", "includes_lr", "larc_clip")
        }
        return ParameterOptions(
            **named,
            **flags,
            l2=l2,
            decay=decay,
            adapts=adapts,
            is_fp64=self.is_fp64,
            numel=self._numel,
            any_normalizes=any(options.normalizes for options in of_groups),
            any_nesterov=any(options.nesterov for options in of_groups),
            any_decoupled=any(options.decoupled for options in of_groups),
            is_lars=any(group["lars"] for group in self._groups),
            any_caution=not all(options.opposed for options in of_groups),
        )
