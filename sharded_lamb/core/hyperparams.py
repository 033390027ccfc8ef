"""The options of LAMB, their named variants and their validation.

Plain values; imports no torch.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal, TypedDict

from sharded_lamb.core.names import validate_patterns


class RuleOptions(TypedDict, total=False):
    """Keywords whose defaults come from ``variant``. The README's table describes each."""

    bias_correction: bool | Literal["lr"]
    grad_averaging: bool
    adam_w_mode: bool
    eps_inside_sqrt: bool
    max_grad_norm: float | None
    trust_clip: tuple[float, float] | None
    weight_norm_clip: tuple[float, float] | None
    exclude_from_weight_decay: Sequence[str]
    exclude_from_layer_adaptation: Sequence[str] | None
    adapt_without_decay: bool


SCALAR_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
)
"""What the signatures of `Lamb` and `ShardedLamb` say; no variant fills these."""

DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "bias_correction": True,
        "grad_averaging": True,
        "adam_w_mode": True,
        "eps_inside_sqrt": False,
        "max_grad_norm": None,
        "trust_clip": None,
        "weight_norm_clip": None,
        "exclude_from_weight_decay": (),
        "exclude_from_layer_adaptation": (),
        "adapt_without_decay": True,
    }
)
"""Options with a default per variant; all but ``max_grad_norm`` may differ between groups."""

GROUP_OPTIONS: Final = tuple(name for name in DEFAULTS if name != "max_grad_norm")


def _variant(**options: Any) -> Mapping[str, Any]:
    assert options.keys() <= DEFAULTS.keys()
    return MappingProxyType({**DEFAULTS, **options})


VARIANTS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "lamb": _variant(),
        # arXiv 1904.00962 as its reference TensorFlow LAMBOptimizer computes it.
        "paper_v3": _variant(bias_correction=False),
        # TensorFlow Addons: bias-corrected; patterns that exclude from decay also exclude from adaptation
        # (None: the same patterns) unless given separately.
        "tfa": _variant(exclude_from_layer_adaptation=None),
        # The paper's first version: phi(|w|) = min(max(|w|, 0), 10), bias-corrected.
        "paper_v1": _variant(weight_norm_clip=(0.0, 10.0)),
        # NVIDIA apex FusedLAMB as NVIDIA's BERT uses it (use_nvlamb=False).
        "apex": _variant(max_grad_norm=1.0, adapt_without_decay=False),
        "nvlamb": _variant(max_grad_norm=1.0),
        # DeepSpeed's kernel: the ratio clamped, the bias correction on lr instead of inside the ratio.
        "deepspeed": _variant(bias_correction="lr", trust_clip=(0.01, 10.0)),
        "timm": _variant(max_grad_norm=1.0, adapt_without_decay=False),
        "adamw": _variant(exclude_from_layer_adaptation=("all",)),
    }
)


def variant_options(name: object) -> Mapping[str, Any]:
    """The options of variant ``name``. Raises ValueError for an unknown name."""
    if name not in VARIANTS:
        raise ValueError(f"variant must be one of {sorted(VARIANTS)}, got {name!r}")
    return VARIANTS[str(name)]


def fill(variant: str, explicit: RuleOptions) -> dict[str, Any]:
    """The options of ``variant``, overridden by ``explicit``.

    Raises:
        ValueError: unknown variant.
        TypeError: unknown option; the message names the nearest valid one.
    """
    options = dict(variant_options(variant))
    for name in explicit:
        if name not in options:
            near = difflib.get_close_matches(name, DEFAULTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {sorted(DEFAULTS)}"
            raise TypeError(f"unexpected keyword argument {name!r}{hint}")
    return {**options, **explicit}


def _fail(name: str, value: object, expected: str) -> None:
    raise ValueError(f"{name} must be {expected}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _check_lr(lr: Any) -> None:
    if hasattr(
        lr, "numel"
    ):  # a tensor: reading its value may synchronize with a device, so only its shape is checked
        if lr.numel() != 1:
            _fail("lr", tuple(lr.shape), "a number or a tensor of one element")
    elif not _is_number(lr) or not 0.0 <= lr < math.inf:
        _fail("lr", lr, "a finite number >= 0 or a tensor of one element")


def check_max_grad_norm(value: Any) -> None:
    """Raises ValueError unless ``value`` is None or a number > 0 (apex's 0 silently zeroes gradients)."""
    if value is not None and (not _is_number(value) or value <= 0):
        _fail("max_grad_norm", value, "a number > 0, or None for no clipping")


def _check_range(name: str, value: Any) -> None:
    if value is None:
        return
    ok = isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(x) for x in value)
    if not ok or not 0.0 <= value[0] <= value[1] or value[1] == 0.0:
        _fail(name, value, "None or a pair (low, high) with 0 <= low <= high and high > 0")


def validate_group(group: Mapping[str, Any]) -> None:
    """Validate every option of one parameter group.

    Raises:
        ValueError: a value is out of range; the message names the option, the value and the expectation.
        TypeError: patterns are not a sequence of strings.
    """
    _check_lr(group["lr"])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        _fail("betas", betas, "a pair of numbers (beta1, beta2)")
    for index, beta in enumerate(betas):
        if not _is_number(beta) or not 0.0 <= beta < 1.0:
            _fail(f"betas[{index}]", beta, "a number in [0, 1)")
    eps = group["eps"]
    if not _is_number(eps) or not 0.0 < eps < math.inf:
        _fail("eps", eps, "a finite number > 0 (an element whose gradients were all 0 would divide 0 by 0)")
    decay = group["weight_decay"]
    if not _is_number(decay) or not 0.0 <= decay < math.inf:
        _fail("weight_decay", decay, "a finite number >= 0")
    if not isinstance(group["bias_correction"], bool) and group["bias_correction"] != "lr":
        _fail("bias_correction", group["bias_correction"], 'True, False or "lr"')
    for name in ("grad_averaging", "adam_w_mode", "eps_inside_sqrt", "adapt_without_decay"):
        if not isinstance(group[name], bool):
            _fail(name, group[name], "True or False")
    _check_range("trust_clip", group["trust_clip"])
    _check_range("weight_norm_clip", group["weight_norm_clip"])
    validate_patterns("exclude_from_weight_decay", group["exclude_from_weight_decay"])
    if group["exclude_from_layer_adaptation"] is not None:  # None: the same as exclude_from_weight_decay
        validate_patterns("exclude_from_layer_adaptation", group["exclude_from_layer_adaptation"])
