"""`Lamb`: the optimizer on one device, over whole tensors; the reference for `ShardedLamb`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from sharded_lamb.core import rule
from sharded_lamb.core.host_values import as_tensor
from sharded_lamb.core.hyperparams import RuleOptions
from sharded_lamb.core.options import OptionTable
from sharded_lamb.core.parameters import check_gradient, check_parameter, named
from sharded_lamb.core.rule import Coefficients, PerTensor
from sharded_lamb.optim.base import LambOptimizer, Live, States, receives_grad_scale, run_eagerly


class Lamb(LambOptimizer):
    r"""LAMB (You et al., arXiv 1904.00962, Algorithm 2) on one device, over whole parameters.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        u_t &= \frac{m_t/(1-\beta_1^t)}{\sqrt{v_t/(1-\beta_2^t)} + \epsilon} + \lambda w_{t-1} \\
        w_t &= w_{t-1} - \eta\, \frac{\phi(\lVert w_{t-1}\rVert)}{\lVert u_t\rVert}\, u_t

    The ratio is 1 where a norm is 0. A step skips parameters without a gradient: no decay, no moments, no step
    count. Moments are fp32 (fp64 for float64 parameters), whatever the parameter's dtype.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or group dicts of either.
        lr: learning rate η, a number or a tensor of one element.
        betas: (β1, β2), each in [0, 1).
        eps: ε > 0.
        weight_decay: λ ≥ 0.
        variant: name in `VARIANTS` that fills the keywords below; explicit keywords win.
        bias_correction: True: inside the ratio, as above. False: none. "lr": √(1-β2ᵗ)/(1-β1ᵗ) on η, as in DeepSpeed.
        grad_averaging: False: m = β1 m + g.
        adam_w_mode: False: decay is added to the (clipped) gradient instead of u.
        eps_inside_sqrt: √(v̂+ε) instead of √v̂+ε.
        max_grad_norm: clip gradients by their global norm over all groups, before the moments. Not per group.
        trust_clip: (low, high) for the ratio; does not clip the ratio 1 of norms that are 0.
        weight_norm_clip: (low, high) for φ(‖w‖).
        exclude_from_weight_decay: regexes for ``re.search`` over names, or "ndim<=1", "all".
        exclude_from_layer_adaptation: likewise, with ratio 1. None: the same patterns as for decay.
        adapt_without_decay: False: parameters with no decay get ratio 1.

    Raises:
        ValueError: an option out of range, or patterns that match nothing.
        TypeError: complex, integer or sparse parameters; at `step`, sparse gradients.
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
        scalars = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._tables: dict[torch.device, OptionTable] = {}
        super().__init__(params, scalars, variant, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._tables.clear()
        try:
            for name, p in named(self.param_groups[-1]):
                check_parameter(str(name), p)
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
        self._check_options()
        found_inf = self._live.found_inf
        entries = self._entries()
        if entries and not (found_inf is not None and found_inf.item()):
            self._update(entries)
        return loss

    def _entries(self) -> list["_Entry"]:
        """The parameters with a gradient; creates the state of a parameter at its first gradient."""
        entries = []
        for row, (name, p, _) in enumerate(self._named_parameters()):
            if p.grad is None:
                continue
            check_gradient(name, p.grad)
            state = self.state[p]
            if not state:
                dtype = torch.promote_types(p.dtype, torch.float32)
                state["step"] = torch.zeros((), dtype=torch.float64, device="cpu")
                state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            entries.append(_Entry(row, name, p, p.grad, state))
        return entries

    def _update(self, entries: list["_Entry"]) -> None:
        device = entries[0].p.device
        rows = torch.tensor([entry.row for entry in entries], device="cpu")
        m = [entry.state["exp_avg"] for entry in entries]
        v = [entry.state["exp_avg_sq"] for entry in entries]
        w = [entry.p.to(moment.dtype) for entry, moment in zip(entries, m, strict=True)]
        g = [entry.grad.to(moment.dtype) for entry, moment in zip(entries, m, strict=True)]

        scale, grad_norm = self._gradient_scale(g, device)
        step = torch.zeros(len(self._table(torch.device("cpu"))), dtype=torch.float64, device="cpu")
        for entry in entries:
            entry.state["step"] += 1
            step[entry.row] = entry.state["step"]
        k = self._per_tensor(step, rows, [scale.to(x.device) for x in g])

        rule.update_moments(m, v, rule.scaled_gradients(g, w, k), k)
        u = rule.direction(m, v, w, k)

        options, lr = self._table(device).options(), self._table(device).lr()
        square_sums = torch.zeros(len(rule.SUMS), len(step), dtype=torch.float64, device=device)
        square_sums[:, rows] = torch.stack([_square_sums(w, device), _square_sums(u, device)])
        norms = rule.norms(square_sums, options.is_fp64)
        ratio = rule.trust_ratios(norms[0], norms[1], options)
        active = torch.ones_like(ratio, dtype=torch.bool)
        step_sizes = rule.step_sizes(lr, ratio, options, step.to(device), active)[rows]
        rule.descend(w, u, [size.to(x.device) for size, x in zip(step_sizes.unbind(), w, strict=True)])
        for entry, new in zip(entries, w, strict=True):
            if new is not entry.p:
                entry.p.copy_(new)
        self._live.last = _Step([entry.name for entry in entries], ratio[rows], grad_norm)

    def _table(self, device: torch.device) -> OptionTable:
        if device not in self._tables:
            self._tables[device] = OptionTable(list(self._named_parameters()), device)
        return self._tables[device]

    def _gradient_scale(self, g: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """(clip factor x inverse loss scale, global norm of the unscaled gradients): fp64 scalars."""
        loss_scale = self._live.grad_scale
        inverse = torch.ones((), dtype=torch.float64, device=device)
        if loss_scale is not None:
            inverse = loss_scale.to(device, torch.float64).reciprocal()
        grad_norm = _square_sums(g, device).sum().sqrt() * inverse
        return inverse * rule.clip_factor(grad_norm, self.max_grad_norm), grad_norm

    def _per_tensor(self, step: Tensor, rows: Tensor, scale: list[Tensor]) -> PerTensor:
        active = torch.ones(len(step), dtype=torch.bool, device="cpu")
        one = torch.ones((), dtype=torch.float64, device="cpu")
        options = self._table(torch.device("cpu")).options()
        vectors = rule.coefficients(options, step, active, one)
        lists = {name: getattr(vectors, name)[rows].tolist() for name in rule.COLUMNS}
        return Coefficients(**{**lists, "grad_scale": scale})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        state = dict(pickled)
        live = _Live(state.pop("max_grad_norm"))
        super().__setstate__(state)
        self._constructed, self._tables, self._live = True, {}, live
        self._accept_options()

    def trust_ratios(self) -> dict[str, float]:
        """{name: ratio} of the parameters that the last step updated. Reads the device."""
        last = self._live.last
        return {} if last is None else dict(zip(last.names, last.ratios.tolist(), strict=True))

    @property
    def grad_norm(self) -> float | None:
        """Global norm of the last step's gradients, unscaled and before clipping, or None. Reads the device."""
        return None if self._live.last is None else self._live.last.grad_norm.item()

    def _check_states(self, states: States) -> None:
        for p, saved in states.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if saved[key].shape != p.shape:
                    raise ValueError(
                        f"{key} of shape {tuple(saved[key].shape)} cannot be loaded for a parameter of shape "
                        f"{tuple(p.shape)}: the state dict is of another model, or one rank's slices of it "
                        f"(ShardedLamb.full_state_dict() gives whole tensors)"
                    )

    def _load_states(self, states: States) -> None:
        self.state.clear()
        for p, saved in states.items():
            moments = {key: saved[key].detach().to(p.device, copy=True) for key in ("exp_avg", "exp_avg_sq")}
            step = as_tensor(saved["step"]).detach().to("cpu", torch.float64, copy=True)
            self.state[p] = {"step": step.reshape(()), **moments}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One parameter of this step. ``row``: its index among all parameters of all groups."""

    row: int
    name: str
    p: Tensor
    grad: Tensor
    state: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Step:
    names: list[str]
    ratios: Tensor
    grad_norm: Tensor


@dataclass(slots=True)
class _Live(Live):
    last: _Step | None = None


Lamb._live_class = _Live


def _square_sums(tensors: list[Tensor], device: torch.device) -> Tensor:
    """[len(tensors)] Σx² in fp64, on ``device``."""
    sums = [torch.linalg.vector_norm(x, dtype=torch.float64).square().to(device) for x in tensors]
    return torch.stack(sums)
