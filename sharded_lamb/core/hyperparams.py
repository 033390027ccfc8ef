"""The options of LAMB, their named variants and their validation.

Plain values; imports no torch.
"""

import decimal
import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Literal, NoReturn, TypedDict

from sharded_lamb.core.names import validate_patterns


class RuleOptions(TypedDict, total=False):
    """Keywords whose defaults come from ``variant``. The README's table describes each."""

    bias_correction: bool | Literal["lr"]
    grad_averaging: bool
    adam_w_mode: bool
    eps_inside_sqrt: bool
    max_grad_norm: float | None
    trust_clip: tuple[float, float] | float | None
    weight_norm_clip: tuple[float, float] | None
    exclude_from_weight_decay: Sequence[str]
    exclude_from_layer_adaptation: Sequence[str] | None
    adapt_without_decay: bool
    normalize_grad: bool
    nesterov: bool
    decoupled_decay: bool
    corrected_weight_decay: float | bool
    lars: bool
    trust_coefficient: float
    momentum_includes_lr: bool
    larc_clip: bool
    caution: bool
    ratio_blocks: Mapping[str, int | Literal["dim0"]] | None


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
        "normalize_grad": False,
        "nesterov": False,
        "decoupled_decay": False,
        "corrected_weight_decay": False,
        "lars": False,
        "trust_coefficient": 1.0,
        "momentum_includes_lr": False,
        "larc_clip": False,
        "caution": False,
        "ratio_blocks": None,
    }
)
"""Options with a default per variant; all but `OPTIMIZER_WIDE` may differ between groups."""

OPTIMIZER_WIDE: Final = {
    "max_grad_norm": "clipping is by the global norm over all groups",
    "ratio_blocks": "its patterns select parameters of all groups, and it is fixed at construction",
}
"""The options that no parameter group has, and why."""

OPTIONS_OF_TORCH: Final = ("maximize", "amsgrad", "differentiable")
"""Options of torch's optimizers that would change the update: a group may have them, but not on."""

GROUP_OPTIONS: Final = tuple(name for name in DEFAULTS if name not in OPTIMIZER_WIDE)
OPTIONS: Final = (*SCALAR_DEFAULTS, "variant", *GROUP_OPTIONS)
"""The options that every parameter group holds."""

FLAGS: Final = (
    "grad_averaging",
    "adam_w_mode",
    "eps_inside_sqrt",
    "adapt_without_decay",
    "normalize_grad",
    "nesterov",
    "decoupled_decay",
    "lars",
    "momentum_includes_lr",
    "larc_clip",
    "caution",
)
FIXED: Final = ("normalize_grad", "nesterov", "lars", "caution")
"""Options that neither an edit nor a load may change: all ranks size their all-reduces, and wait for them, by these."""

OF_LARS: Final = ("momentum_includes_lr", "larc_clip")
"""Options that only LARS has."""

NOT_OF_LARS: Final = ("bias_correction", "adam_w_mode", "eps_inside_sqrt", "normalize_grad", "caution")
"""Options that LARS does not have: False."""

PATTERN_OPTIONS: Final = ("exclude_from_weight_decay", "exclude_from_layer_adaptation")


def _variant(**options: Any) -> Mapping[str, Any]:
    assert options.keys() <= DEFAULTS.keys()
    return MappingProxyType({**DEFAULTS, **options})


_LARS: Final = {
    "lars": True,
    "trust_coefficient": 0.001,
    "bias_correction": False,
    "grad_averaging": False,
    "adam_w_mode": False,
}

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
        # arXiv 2006.13484, Algorithm 2: LAMB with normalized gradients and Nesterov's momentum.
        "lans": _variant(normalize_grad=True, nesterov=True),
        # arXiv 1708.03888, Algorithm 1, and MLPerf's reference: lr is inside the momentum.
        "lars": _variant(**_LARS, momentum_includes_lr=True),
        # torch-lars, Lightning Bolts and timm: LARS before torch's SGD.
        "torch_lars": _variant(**_LARS),
    }
)


def variant_options(name: object) -> Mapping[str, Any]:
    """The options of variant ``name``. Raises ValueError for an unknown name."""
    if not isinstance(name, str) or name not in VARIANTS:
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


FP32_MIN: Final = 2.0**-126
"""The smallest normal fp32 number. Updates of all but float64 parameters compute in fp32."""

FP32_MAX: Final = (2 - 2.0**-23) * 2.0**127
BETA_MAX: Final = 1 - 2.0**-25
"""Moment factors from here on round to 1 in fp32: moments would grow without bound."""


def _fail(name: str, value: object, expected: str) -> NoReturn:
    hint = ""
    if isinstance(value, str):
        hint = "; it is a string: convert it with float(), and in YAML write 1.0e-3 instead of 1e-3"
    raise ValueError(f"{name} must be {expected}, got {value!r}{hint}")


def _scalar(value: Any) -> Any:
    """The Python number of a NumPy scalar, or of an array or tensor of one element; other values unchanged."""
    if hasattr(value, "item") and hasattr(value, "shape") and math.prod(value.shape) == 1:
        return value.item()
    return value


def number(name: str, value: Any, low: float, high: float, expected: str) -> float:
    """``value`` as a float, if low <= value <= high.

    Takes int, float, Fraction, Decimal, NumPy scalars, and arrays and tensors of one element.

    Raises:
        ValueError: it is no number, or out of range.
    """
    plain = _scalar(value)
    try:
        is_real = isinstance(plain, (numbers.Real, decimal.Decimal)) and not isinstance(plain, bool)
        result = float(plain) if is_real else math.nan
    except (OverflowError, ValueError):
        result = math.nan
    if not low <= result <= high:
        _fail(name, value, expected)
    return result


def flag(name: str, value: Any, expected: str = "True or False") -> bool:
    """``value`` as a bool. Raises ValueError for anything else, numbers and strings included."""
    plain = _scalar(value)
    if not isinstance(plain, bool):
        _fail(name, value, expected)
    return plain


def integer(name: str, value: Any, low: int, expected: str) -> int:
    """``value``, an int or integral scalar >= ``low``, as an int. Raises ValueError for anything else."""
    plain = _scalar(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Integral) or plain < low:
        _fail(name, value, expected)
    return int(plain)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _pair(name: str, value: Any, expected: str) -> tuple[Any, Any]:
    is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    if not is_sequence or isinstance(value, (str, Mapping)):
        _fail(name, value, expected)
    try:
        first, second = value
    except (TypeError, ValueError):
        _fail(name, value, expected)
    return first, second


def learning_rate(lr: Any) -> Any:
    """``lr`` as a float; a tensor of one element as it is; its value is read, and checked, on a CPU only."""
    is_tensor = hasattr(lr, "numel")
    if is_tensor and lr.numel() != 1:
        _fail("lr", tuple(lr.shape), "a number or a tensor of one element")
    if is_tensor and lr.device.type != "cpu":
        return lr
    value = number("lr", lr, 0.0, FP32_MAX, "a finite number >= 0 or a tensor of one element")
    return lr if is_tensor else value


def check_max_grad_norm(value: Any, name: str = "max_grad_norm") -> float | None:
    """``value`` as a float or None. Raises ValueError unless it is None or > 0 (apex's 0 silently zeroes gradients)."""
    if value is None:
        return None
    return number(name, value, FP32_MIN, math.inf, "a number > 0, or None for no clipping; normal in fp32")


def _bounds(name: str, value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    expected = "None or a pair (low, high) with 0 <= low <= high and high > 0"
    pair = _pair(name, value, expected)
    low, high = (number(name, x, 0.0, math.inf, expected) for x in pair)
    if not low <= high or high == 0.0:
        _fail(name, value, expected)
    return low, high


def _peak_rate(group: Mapping[str, Any]) -> float | bool:
    """``corrected_weight_decay``: False, or the peak learning rate; True means the group's own, as it is now."""
    value = group["corrected_weight_decay"]
    if value is False:
        return False
    peak = _scalar(group["lr"]) if value is True else value
    expected = "False, True (the peak learning rate is lr, at construction), or that rate, > 0"
    return number("corrected_weight_decay", peak, FP32_MIN, FP32_MAX, expected)


def _check_decay(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options of decay that contradict each other."""
    if options["decoupled_decay"] and not options["adam_w_mode"]:
        raise ValueError(
            "decoupled_decay=True with adam_w_mode=False: the decay is outside u, or in the gradient"
        )
    if options["corrected_weight_decay"] and not options["decoupled_decay"]:
        raise ValueError("corrected_weight_decay corrects decoupled decay: give decoupled_decay=True too")


def _check_algorithm(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options of LARS without it, and for others with it."""
    named = OF_LARS if not options["lars"] else NOT_OF_LARS
    for name in named:
        if options[name]:
            reason = "has no effect with lars=True" if options["lars"] else "needs lars=True"
            raise ValueError(
                f'{name}={options[name]!r} {reason}: variant="lars" and variant="torch_lars" set the options of LARS, '
                f"whose decay is in the gradient and whose denominator is a norm"
            )


def _betas(value: Any) -> tuple[float, float]:
    expected = "a number in [0, 1)"
    pair = _pair("betas", value, "a pair of numbers (beta1, beta2)")
    first, second = (
        number(f"betas[{i}]", beta, 0.0, math.nextafter(1.0, 0.0), expected) for i, beta in enumerate(pair)
    )
    for index, beta in enumerate((first, second)):
        if beta >= BETA_MAX:
            _fail(f"betas[{index}]", beta, f"{expected} that is not 1 in fp32 (at most 0.99999997)")
    return first, second


def validate_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Validate every option of one parameter group.

    Returns:
        The options as plain immutable values: floats, bools, strings, tuples; a tensor ``lr`` stays one. Other keys of
        ``group`` are left out.

    Raises:
        ValueError: a value is missing or out of range; the message names the option, the value and the expectation.
        TypeError: patterns are not a sequence of strings.
    """
    missing = [name for name in OPTIONS if name not in group]
    if missing:
        raise ValueError(f"a parameter group lacks the option {missing[0]!r}: it was deleted, or never set")
    for name in OPTIONS_OF_TORCH:
        if group.get(name):
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group: this LAMB does not have it; leave it out"
            )
    eps = "a finite number > 0, normal in fp32 (an element whose gradients were all 0 would divide 0 by 0)"
    bias_correction = group["bias_correction"]
    if not isinstance(bias_correction, str) or bias_correction != "lr":
        bias_correction = flag("bias_correction", bias_correction, 'True, False or "lr"')
    variant_options(group["variant"])
    flags = {name: flag(name, group[name]) for name in FLAGS}
    plain = {**group, **flags, "bias_correction": bias_correction}
    _check_decay(plain)
    _check_algorithm(plain)
    check_together([plain])
    clip = _scalar(group["trust_clip"])
    adaptation = group["exclude_from_layer_adaptation"]
    if adaptation is not None:  # None: the same as exclude_from_weight_decay
        adaptation = validate_patterns("exclude_from_layer_adaptation", adaptation)
    return {
        "lr": learning_rate(group["lr"]),
        "betas": _betas(group["betas"]),
        "eps": number("eps", group["eps"], FP32_MIN, FP32_MAX, eps),
        "weight_decay": number("weight_decay", group["weight_decay"], 0.0, FP32_MAX, "a finite number >= 0"),
        "variant": str(group["variant"]),
        "bias_correction": bias_correction,
        **flags,
        "corrected_weight_decay": _peak_rate(group),
        "trust_coefficient": number(
            "trust_coefficient", group["trust_coefficient"], FP32_MIN, FP32_MAX, "a finite number > 0"
        ),
        "trust_clip": _bounds("trust_clip", (0.0, clip) if _is_number(clip) else clip),
        "weight_norm_clip": _bounds("weight_norm_clip", group["weight_norm_clip"]),
        "exclude_from_weight_decay": validate_patterns(
            "exclude_from_weight_decay", group["exclude_from_weight_decay"]
        ),
        "exclude_from_layer_adaptation": adaptation,
    }


def check_fixed(group: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """Raises ValueError if an option of `FIXED` differs in ``changed``."""
    for name in FIXED:
        value = flag(name, changed.get(name, group[name]))
        if value != group[name]:
            raise ValueError(
                f"{name}={value} cannot be given to an optimizer with {name}={group[name]}: construct the optimizer "
                f"with it (variant={changed.get('variant')!r})"
            )


def check_together(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for options of groups that one optimizer cannot combine."""
    if len({bool(group["lars"]) for group in groups}) > 1:
        raise ValueError(
            "lars=True in one parameter group and lars=False in another: LARS keeps one moment and LAMB two; construct "
            "an optimizer for each"
        )
    if any(group["nesterov"] for group in groups) and any(group["caution"] for group in groups):
        raise ValueError(
            "caution=True beside nesterov=True (LANS): caution masks an update of one direction, and nesterov adds a "
            "second; for other parameters construct another optimizer"
        )


def validate_change(group: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """`validate_group` of ``group`` with ``changed`` options: edited, or loaded.

    Raises:
        ValueError, TypeError: as `validate_group`; also for an option of `FIXED` that differs.
    """
    check_fixed(group, changed)
    return validate_group({**group, **changed})
