"""`Lamb`: the optimizer on one device, over whole tensors; the reference for `ShardedLamb`."""

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from torch import Tensor

from sharded_lamb import kernels
from sharded_lamb.core import rule
from sharded_lamb.core.eager import run_eagerly
from sharded_lamb.core.host_values import as_tensor
from sharded_lamb.core.hyperparams import RuleOptions
from sharded_lamb.core.layers import Layers
from sharded_lamb.core.options import OptionTable
from sharded_lamb.core.parameters import Grouping, all_strided, check_gradients, check_parameter, named
from sharded_lamb.kernels import ScatteredShard
from sharded_lamb.kernels.engine import Update, gradient_square_sums
from sharded_lamb.optim.base import LambOptimizer, Live, States
from sharded_lamb.optim.grad_scaler import receives_grad_scale
from sharded_lamb.optim.step_results import LastStep, StepResults
from sharded_lamb.optim.whole_tensors import State, WholeTensors, new_state
from sharded_lamb.sharding.dtensors import is_dtensor
from sharded_lamb.sharding.state import check_full


def _check_whole(name: str, p: Tensor) -> None:
    """Raises TypeError or ValueError for a parameter that is not one whole tensor."""
    check_parameter(name, p)
    if is_dtensor(p):
        raise TypeError(
            f"parameter {name!r} is a DTensor: Lamb updates whole tensors on one device; ShardedLamb updates DTensors"
        )


class Lamb(LambOptimizer):
    """LAMB (You et al., arXiv 1904.00962, Algorithm 2) on one device, over whole parameters.

        mₜ = β1 mₜ₋₁ + (1-β1) gₜ,  vₜ = β2 vₜ₋₁ + (1-β2) gₜ²
        uₜ = mₜ/(1-β1ᵗ) / (√(vₜ/(1-β2ᵗ)) + ε) + λ wₜ₋₁
        wₜ = wₜ₋₁ - η φ(‖wₜ₋₁‖)/‖uₜ‖ uₜ

    The ratio is 1 where a norm is 0. A step skips parameters without a gradient: no decay, no moments, no step
    count. Moments are fp32 (fp64 for float64 parameters), whatever the parameter's dtype.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or group dicts of either.
        lr: learning rate η, a number or a tensor of one element.
        betas: (β1, β2), each in [0, 1).
        eps: ε > 0.
        weight_decay: λ ≥ 0.
        variant: name in `VARIANTS` that fills the keywords below; explicit keywords win. None fills lr, betas, eps and
            weight_decay: DeepSpeed's Lamb is ``variant="deepspeed", eps=1e-8, weight_decay=0.0``.
        bias_correction: True: inside the ratio, as above. False: none. "lr": √(1-β2ᵗ)/(1-β1ᵗ) on η, as in DeepSpeed.
        grad_averaging: False: m = β1 m + g.
        adam_w_mode: False: decay is added to the (clipped) gradient instead of u.
        eps_inside_sqrt: √(v̂+ε) instead of √v̂+ε.
        max_grad_norm: clip gradients by their global norm over all groups, before the moments. Not per group.
        trust_clip: (low, high) for the ratio, or high alone; does not clip the ratio 1 of norms that are 0.
        weight_norm_clip: (low, high) for φ(‖w‖).
        exclude_from_weight_decay: regexes for ``re.search`` over names, or "ndim<=1", "all".
        exclude_from_layer_adaptation: likewise, with ratio 1. None: the same patterns as for decay.
        adapt_without_decay: False: parameters with no decay get ratio 1.
        normalize_grad: divide every parameter's gradient by its norm (a gradient 0 stays 0). Fixed at construction.
        nesterov: β1 r u + (1-β1) r₂ u₂, where u₂ = gₜ/(√v̂ + ε) + λ w has a ratio of its own; `trust_ratios` are those
            of u. Fixed at construction. With ``normalize_grad``: LANS (Zheng et al., arXiv 2006.13484, Algorithm 2).
        decoupled_decay: w ← (1 - η λ) w before the update, whose u and ratio have no decay (timm).
        corrected_weight_decay: with decoupled decay: λ η / η_peak instead of λ; η_peak, or True: lr at construction.
        lars: LARS (You et al., arXiv 1708.03888, Algorithm 1), of all groups; see ``variant="lars"``. With d = g + λ w
            and c = ``trust_coefficient``: r = c φ(‖w‖)/(‖g‖ + λ ‖w‖ + ε), mₜ = β1 mₜ₋₁ + r d, wₜ = wₜ₋₁ - η mₜ; with
            ``nesterov``, β1 mₜ + r d instead of mₜ. Fixed at construction. State has no ``exp_avg_sq``.
        trust_coefficient: a factor on the ratio, before ``trust_clip``.
        momentum_includes_lr: LARS: mₜ = β1 mₜ₋₁ + η r d, wₜ = wₜ₋₁ - mₜ.
        larc_clip: LARS: min(r/η, 1) instead of r (LARC).
        caution: elements of m̂/(√v̂ + ε) whose sign is not that of gₜ (clipped, with the decay of ``adam_w_mode=False``)
            count as 0; the others are divided by max(their share of the parameter, 1e-3), before decay (timm, after
            Liang et al., arXiv 2411.16085). Not beside ``nesterov``. Fixed at construction.
        ratio_blocks: {regex over names: n, or "dim0"}: matching parameters are n equal blocks along their first
            dimension, or one per index of it, each with norms and a ratio of its own, as if it were a parameter:
            {"qkv": 3, "experts": "dim0"}. Not per group; fixed at construction; not in state dicts.

    Raises:
        ValueError: an option out of range, or patterns that match nothing.
        TypeError: complex, integer or sparse parameters, or DTensors; at `step`, sparse gradients.
    """

    _step_supports_amp_scaling = property(receives_grad_scale)
    _live: "_Live"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        variant: str = "lamb",
        **options: Unpack[RuleOptions],
    ) -> None:
        """See the class."""
        scalars = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._tables: dict[torch.device, OptionTable] = {}
        super().__init__(params, scalars, variant, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            for name, p in named(self.param_groups[-1]):
                if p.requires_grad:  # a step checks those that it finds with a gradient
                    _check_whole(str(name), p)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @run_eagerly
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns the closure's loss, or None.

        Under ``torch.amp.GradScaler`` it unscales gradients and skips a step with a non-finite gradient.
        Never writes gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grouping = Grouping(self.param_groups)
        if not grouping.equals(self._live.grouping):
            self._follow_names()
            self._tables.clear()
            self._live.grouping, self._live.found = grouping, None
        self._check_options()
        params = grouping.params
        grads = [p.grad for p in params]
        found_inf = self._live.found_inf
        if any(grad is not None for grad in grads) and not (found_inf is not None and found_inf.item()):
            self._update(params, grads)
        return loss

    def _update(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        if not all_strided(grads):
            check_gradients([name for name, _, _ in self._named_parameters()], grads)
        found = self._live.found
        rows = [row for row, grad in enumerate(grads) if grad is not None]
        if found is None or not found.serves(rows, self.state.values()):
            found = self._live.found = self._find(params, rows)
        parts = [_Part(whole, whole.shards([grads[row] for row in whole.rows])) for whole in found.by_device]  # type: ignore[misc]
        inverse, grad_norm, gradient_sums = self._gradient_norm(parts)
        for whole in found.by_device:
            whole.steps += 1
        self._live.results.settle(was_skipped=False)
        self._live.results.last = [
            self._update_part(part, own, inverse.to(part.whole.device), grad_norm.to(part.whole.device))
            for part, own in zip(parts, gradient_sums, strict=True)
        ]
        torch.autograd.graph.increment_version([params[row] for row in rows])  # as for any write

    def _find(self, params: list[Tensor], rows: list[int]) -> "_Found":
        """The parameters of ``rows`` by device; creates the state of a parameter at its first gradient."""
        devices: dict[torch.device, list[int]] = {}
        names = [name for name, _, _ in self._named_parameters()]
        for row in rows:
            _check_whole(names[row], params[row])  # a wrapper may have sharded it since construction
            devices.setdefault(params[row].device, []).append(row)
            state = self.state[params[row]]
            if not {"step", *self.moments} <= state.keys():  # wrappers keep tensors of their own there
                state.update({**new_state(params[row], self.moments), **state})
        by_device = []
        for device, own in devices.items():
            members = [params[row] for row in own]
            kernel = kernels.choose("auto", device)
            states, table = [self.state[p] for p in members], self._table(device)
            by_device.append(WholeTensors(kernel, device, own, members, states, self.moments, table))
        states = list(self.state.values())
        return _Found(rows, states, list(map(len, states)), by_device)

    def _update_part(self, part: "_Part", sums: Tensor, inverse: Tensor, grad_norm: Tensor) -> LastStep:
        """Update one device's parameters. ``sums``: [L] Σg²; the other two: `_gradient_norm`, on the device."""
        whole = part.whole
        table = self._table(whole.device)
        options, step = table.options(), table.layers.expand(whole.steps_of(len(table.rows)))
        active = step > 0  # shards hold no other parameters
        scale = inverse * rule.clip_factor(grad_norm, self.max_grad_norm)
        scales = rule.gradient_scales(scale, sums, options)
        update = Update(whole.kernel, options, step=step, active=active, grad_scale=scales)
        lr = table.lr()
        square_sums = update.square_sums(update.moments_and_norms(part.shards))
        ratios = rule.ratios_of_sums(square_sums, options, lr, sums, scales)
        step_sizes = rule.step_sizes(lr, ratios, options, step, active)
        for _ in update.apply([part.shards], step_sizes, lr, are_gathered=False):
            pass
        whole.write_back()
        return LastStep(table, active, None, sums, inverse, grad_norm, square_sums, ratios)

    def _gradient_norm(self, parts: list["_Part"]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(inverse loss scale, global norm of the unscaled gradients, [L] Σg² of each part), fp64."""
        device, loss_scale = parts[0].whole.device, self._live.grad_scale
        inverse = torch.ones((), dtype=torch.float64, device=device)
        if loss_scale is not None:
            inverse = loss_scale.to(device, torch.float64).reciprocal()
        count = len(self._table(device))
        sums = [
            gradient_square_sums(part.whole.kernel, part.shards, count, part.whole.device) for part in parts
        ]
        total = torch.stack([each.sum().to(device) for each in sums]).sum()
        return inverse, rule.norms(total, self._table(device).is_fp64.all()) * inverse, sums

    def _table(self, device: torch.device) -> OptionTable:
        if device not in self._tables:
            rows = list(self._named_parameters())
            self._tables[device] = OptionTable(rows, Layers.named(rows, self._ratio_blocks), device)
        return self._tables[device]

    def __getstate__(self) -> dict[str, Any]:
        own = {"max_grad_norm": self.max_grad_norm, "_ratio_blocks": self._ratio_blocks}
        return {**super().__getstate__(), **own}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        state = dict(pickled)
        live = _Live(state.pop("max_grad_norm"))
        super().__setstate__(state)
        self._constructed, self._tables, self._live = True, {}, live
        self._accept_options()

    def _step_results(self) -> list[StepResults]:
        return [self._live.results]

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients, unscaled and before clipping, or None. Reads the device."""
        return self._live.results.grad_norm

    def _check_states(self, states: States) -> None:
        rows = ((name, p.shape, states[p]) for name, p, _ in self._named_parameters() if p in states)
        check_full(rows, self.moments)

    def _load_states(self, states: States) -> None:
        self.state.clear()
        self._live.found = None
        for p, saved in states.items():
            moments = {key: saved[key].detach().to(p.device, copy=True) for key in self.moments}
            step = as_tensor(saved["step"]).detach().to("cpu", torch.float64, copy=True)
            self.state[p] = {"step": step.reshape(()), **moments}


@dataclass(frozen=True, slots=True)
class _Found:
    """The parameters that the last step found with a gradient."""

    rows: list[int]  # those with a gradient, among all groups'
    states: list[State]  # of the optimizer, all of them
    sizes: list[int]  # of these
    by_device: list[WholeTensors]

    def serves(self, rows: list[int], states: Collection[State]) -> bool:
        """Whether these are the rows and states of this step too."""
        return (
            rows == self.rows
            and len(states) == len(self.states)
            and all(map(operator.is_, states, self.states))
            and list(map(len, states)) == self.sizes
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """One device's parameters in a step."""

    whole: WholeTensors
    shards: list[ScatteredShard]


@dataclass(slots=True)
class _Live(Live):
    grouping: Grouping | None = None  # of the last step, which the tables are of
    found: _Found | None = None
    results: StepResults = field(default_factory=StepResults)


Lamb._live_class = _Live
