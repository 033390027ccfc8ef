"""An independent LAMB in numpy float64: slow, plain, and independent of the package's code.

Equations: You et al., "Large Batch Optimization for Deep Learning", arXiv 1904.00962, Algorithm 2. `VARIANT_FACTS`
lists the differences of known implementations, read from their own sources. LANS: arXiv 2006.13484, Algorithm 2.
LARS: arXiv 1708.03888, Algorithm 1.
Caution: timm/optim/lamb.py, after arXiv 2411.16085.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

Array = np.ndarray

PLAIN: dict[str, Any] = {
    "bias_correction": True,
    "grad_averaging": True,
    "adam_w_mode": True,
    "eps_inside_sqrt": False,
    "max_grad_norm": None,
    "trust_clip": None,
    "weight_norm_clip": None,
    "adapt_without_decay": True,
    "normalize_grad": False,
    "nesterov": False,
    "decoupled_decay": False,
    "corrected_weight_decay": False,  # or the peak learning rate
    "lars": False,
    "trust_coefficient": 1.0,
    "momentum_includes_lr": False,
    "larc_clip": False,
    "caution": False,
    # None, "decay patterns" (parameters without decay have ratio 1 too) or "everything"
    "adaptation_excludes": None,
}

LARS: dict[str, Any] = {
    **PLAIN,
    "lars": True,
    "trust_coefficient": 0.001,
    "bias_correction": False,
    "grad_averaging": False,
    "adam_w_mode": False,
}

VARIANT_FACTS: dict[str, dict[str, Any]] = {
    # Algorithm 2 with Adam's bias correction kept inside the ratio; no bounds on phi.
    "lamb": PLAIN,
    # arXiv 1904.00962v3 and later: no bias correction (Appendix: warm-up has the same effect), phi(z) = z.
    # ymcui/LAMB_Optimizer_TF optimization.py: eps outside the root, where(|w|>0, where(|u|>0, |w|/|u|, 1), 1)
    # on every variable. google-research/albert lamb_optimizer.py has the same rule, but its
    # exclude_from_layer_adaptation, left unset, takes over exclude_from_weight_decay.
    "paper_v3": {**PLAIN, "bias_correction": False},
    # tensorflow/addons tensorflow_addons/optimizers/lamb.py: m and v corrected by iterations + 1; an unset
    # (or empty) exclude_from_layer_adaptation takes over exclude_from_weight_decay.
    "tfa": {**PLAIN, "adaptation_excludes": "decay patterns"},
    # arXiv 1904.00962v1 has Adam's correction, dropped in v3 (fastai/swiftai PR 13 shows both). The paper
    # gives phi's bounds no values (ymcui's and cybertronai's notes); 10 is cybertronai/pytorch-lamb's choice.
    "paper_v1": {**PLAIN, "weight_norm_clip": (0.0, 10.0)},
    # NVIDIA/apex apex/optimizers/fused_lamb.py (max_grad_norm=1.0, use_nvlamb=False, bias_correction=True)
    # and csrc/multi_tensor_lamb.cu (ratio only where decay != 0; g / (norm / max_norm), no epsilon).
    "apex": {**PLAIN, "max_grad_norm": 1.0, "adapt_without_decay": False},
    # The same kernel with use_nvlamb=True: the ratio on every parameter.
    "nvlamb": {**PLAIN, "max_grad_norm": 1.0},
    # microsoft/DeepSpeed csrc/lamb/fused_lamb_cuda_kernel.cu: u from raw m and v, step size
    # lr * sqrt(1 - b2^t) / (1 - b1^t), coefficient clamped only where both norms are non-zero.
    # deepspeed/ops/lamb/fused_lamb.py: max_coeff=10.0, min_coeff=0.01, no clip of its own by default.
    "deepspeed": {**PLAIN, "bias_correction": "lr", "trust_clip": (0.01, 10.0)},
    # timm/optim/lamb.py: max_grad_norm=1.0, always_adapt=False, trust_clip=False, decoupled_decay=False.
    "timm": {**PLAIN, "max_grad_norm": 1.0, "adapt_without_decay": False},
    # torch/optim/adamw.py: ratio 1; p *= 1 - lr * wd is the same as wd * w inside u when the ratio is 1.
    "adamw": {**PLAIN, "adaptation_excludes": "everything"},
    # arXiv 2006.13484, Algorithm 2; its authors' multi_tensor_lans.cu (dmlc/gluon-nlp) adds eps to the gradient's norm.
    "lans": {**PLAIN, "normalize_grad": True, "nesterov": True},
    # arXiv 1708.03888, Algorithm 1: v <- m v + gamma lambda (g + beta w), w <- w - v; so does MLPerf's reference
    # (mlcommons/training resnet_model lars_optimizer.py: scaled_lr = lr eeta |w| / (|g| + decay |w| + epsilon)).
    "lars": {**LARS, "momentum_includes_lr": True},
    # kakaobrain/torchlars, Lightning Bolts' LARS and timm/optim/lars.py: gradients times the ratio, then torch's SGD.
    "torch_lars": LARS,
}


def variant_options(
    variant: str,
    names: Collection[str],
    no_decay: Collection[str] = (),
    no_adapt: Collection[str] | None = None,
) -> dict[str, Any]:
    """`OracleLamb` keywords for a variant; `no_adapt` None means that the user named no exclusion."""
    options = dict(VARIANT_FACTS[variant])
    excludes = options.pop("adaptation_excludes")
    if excludes == "everything":
        chosen = set(names)
    elif no_adapt is not None:
        chosen = set(no_adapt)
    else:
        chosen = set(no_decay) if excludes == "decay patterns" else set()
    return {**options, "no_decay": set(no_decay), "no_adapt": chosen}


def l2(array: Array) -> float:
    return math.sqrt(float(np.sum(np.square(array))))


def clamp(value: float, bounds: tuple[float, float] | None) -> float:
    return value if bounds is None else min(max(value, bounds[0]), bounds[1])


def split_blocks(values: Mapping[str, Any], blocks: Mapping[str, int]) -> dict[str, Any]:
    """{"name[i]": the i-th of ``blocks[name]`` equal parts along the first dimension}; other values as they are."""
    parts: dict[str, Any] = {}
    for name, value in values.items():
        if name not in blocks:
            parts[name] = value
            continue
        for i in range(blocks[name]):
            length = 0 if value is None else len(value) // blocks[name]
            parts[f"{name}[{i}]"] = None if value is None else value[i * length : (i + 1) * length]
    return parts


class OracleLamb:
    """LAMB over named arrays. `overrides[name]` replaces per-group options for one parameter.

    `blocks[name]`: the number of equal parts of an array, each of which is a parameter of its own.
    """

    def __init__(
        self,
        params: Mapping[str, Array],
        *,
        no_decay: Collection[str] = (),
        no_adapt: Collection[str] = (),
        max_grad_norm: float | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        blocks: Mapping[str, int] | None = None,
        **options: Any,
    ) -> None:
        self.blocks = blocks or {}
        self.whole = {part: name for name in params for part in split_blocks({name: None}, self.blocks)}
        parts = split_blocks(params, self.blocks)
        self.params = {name: np.array(value, dtype=np.float64) for name, value in parts.items()}
        self.m = {name: np.zeros_like(value) for name, value in self.params.items()}
        self.v = {name: np.zeros_like(value) for name, value in self.params.items()}
        self.steps = dict.fromkeys(self.params, 0)
        self.ratios: dict[str, float] = {}
        self.norms: dict[str, tuple[float, float, float, float]] = {}  # ‖w‖, ‖u‖, ‖g‖ before clipping, ratio
        self.grad_norm = 0.0
        self.max_grad_norm = max_grad_norm
        self.no_decay, self.no_adapt = (
            {part for part, name in self.whole.items() if name in chosen} for chosen in (no_decay, no_adapt)
        )
        defaults: dict[str, Any] = {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-6,
            "weight_decay": 0.01,
            **PLAIN,
        }
        del defaults["max_grad_norm"], defaults["adaptation_excludes"]
        overrides = overrides or {}
        unknown = {*options, *(key for group in overrides.values() for key in group)} - set(defaults)
        if unknown or not {*overrides, *no_decay, *no_adapt, *self.blocks} <= set(params):
            raise ValueError(f"unknown options {unknown} or parameter names")
        self.options = {
            part: {**defaults, **options, **overrides.get(name, {})} for part, name in self.whole.items()
        }

    def step(self, grads: Mapping[str, Array | None]) -> None:
        """One step. Skips parameters without a gradient; their step counts do not change."""
        parts = split_blocks(grads, self.blocks)
        present = {name: np.array(g, dtype=np.float64) for name, g in parts.items() if g is not None}
        self.grad_norm = math.sqrt(sum(float(np.sum(g * g)) for g in present.values()))
        scale = 1.0
        if self.max_grad_norm is not None and self.grad_norm > self.max_grad_norm:
            scale = self.max_grad_norm / self.grad_norm
        self.norms = {}
        self.ratios = {name: self._update(name, g * scale) for name, g in present.items()}
        for name, (weight, update, _, ratio) in self.norms.items():
            self.norms[name] = weight, update, l2(present[name]), ratio

    def stored(self, kind: str, name: str, exact: Array) -> Array:
        """What is stored of a new moment, of which the update is made."""
        return exact

    def _update(self, name: str, g: Array) -> float:
        opt, w = self.options[name], self.params[name]
        (beta1, beta2), eps = opt["betas"], opt["eps"]
        decay = 0.0 if name in self.no_decay else opt["weight_decay"]
        self.steps[name] += 1
        t = self.steps[name]
        has_decay = decay > 0
        if opt["decoupled_decay"]:
            peak = opt["corrected_weight_decay"] or opt["lr"]
            w, decay = w * (1 - opt["lr"] * opt["lr"] / peak * decay), 0.0

        if opt["lars"]:
            return self._update_of_lars(name, g, decay)
        if opt["normalize_grad"] and l2(g) > 0:
            g = g / l2(g)
        if not opt["adam_w_mode"]:
            g = g + decay * w
        of_gradient = 1 - beta1 if opt["grad_averaging"] else 1.0
        m = self.m[name] = self.stored("exp_avg", name, beta1 * self.m[name] + of_gradient * g)
        v = self.v[name] = self.stored("exp_avg_sq", name, beta2 * self.v[name] + (1 - beta2) * g * g)

        m_hat, v_hat, step_size = m, v, opt["lr"]
        if opt["bias_correction"] == "lr":
            step_size = opt["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        elif opt["bias_correction"]:
            m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        denominator = np.sqrt(v_hat + eps) if opt["eps_inside_sqrt"] else np.sqrt(v_hat) + eps
        decayed = decay * w if opt["adam_w_mode"] else 0.0
        adaptive = m_hat / denominator
        if opt["caution"]:  # as timm: what has the gradient's sign, over its share of the parameter
            agrees = adaptive * g > 0
            adaptive = np.where(agrees, adaptive, 0.0) / max(agrees.mean() if agrees.size else 1.0, 1e-3)
        u = adaptive + decayed
        ratio = self._ratio(name, l2(w), l2(u), has_decay)
        self.norms[name] = l2(w), l2(u), l2(g), ratio
        change = ratio * u
        if opt["nesterov"]:
            along = g / denominator + decayed
            change = beta1 * change + of_gradient * self._ratio(name, l2(w), l2(along), has_decay) * along
        self.params[name] = np.asarray(w - step_size * change)
        return ratio

    def _update_of_lars(self, name: str, g: Array, decay: float) -> float:
        opt, w = self.options[name], self.params[name]
        momentum, lr = opt["betas"][0], opt["lr"]
        below = l2(g) + decay * l2(w) + opt["eps"] if l2(g) > 0 else 0.0
        ratio = self._ratio(name, l2(w), below, decay > 0)
        is_fallback = l2(w) == 0 or l2(g) == 0 or name in self.no_adapt
        is_fallback |= decay == 0 and not opt["adapt_without_decay"]
        if opt["larc_clip"] and not is_fallback and lr > 0:
            ratio = min(ratio / lr, 1.0)
        entering = (1 - momentum if opt["grad_averaging"] else 1.0) * ratio * (g + decay * w)
        if opt["momentum_includes_lr"]:
            entering, lr = lr * entering, 1.0
        m = self.m[name] = self.stored("exp_avg", name, momentum * self.m[name] + entering)
        self.norms[name] = l2(w), math.nan, l2(g), ratio
        self.params[name] = np.asarray(w - lr * (momentum * m + entering if opt["nesterov"] else m))
        return ratio

    def _ratio(self, name: str, w_norm: float, u_norm: float, has_decay: bool) -> float:
        opt = self.options[name]
        if name in self.no_adapt or (not has_decay and not opt["adapt_without_decay"]):
            return 1.0
        if w_norm > 0 and u_norm > 0:
            phi = clamp(w_norm, opt["weight_norm_clip"])
            return clamp(opt["trust_coefficient"] * phi / u_norm, opt["trust_clip"])
        return 1.0
