"""What a ds_config.json may say under ``optimizer.params``, as the options of the LAMB rule."""

import difflib
import warnings
from collections.abc import Mapping
from typing import Any, cast

from sharded_lamb.core.hyperparams import DEFAULTS, SCALAR_DEFAULTS, RuleOptions, variant_options

DEFAULT_COEFFICIENTS = (0.01, 10.0)
"""DeepSpeed's min_coeff and max_coeff, where a config sets only one of them."""

ONE_BIT = (
    "freeze_step",
    "cuda_aware",
    "comm_backend_name",
    "coeff_beta",
    "factor_max",
    "factor_min",
    "factor_threshold",
)
"""What only DeepSpeed's OneBitLamb knows; nothing is compressed here."""


SCALARS = ("lr", "betas", "eps", "weight_decay")
OWN = ("variant", "skip_nonfinite", "max_consecutive_skips")
DEEPSPEED = ("max_coeff", "min_coeff", "amsgrad")


RULE_KEYS = (*DEFAULTS, *DEEPSPEED, *ONE_BIT)
"""What `translate` takes; all but the optimizer's own switches may stand in a parameter group."""


def scalar_defaults(variant: str) -> dict[str, Any]:
    """lr, betas, eps and weight_decay where a config leaves them out: the variant's own authors' choice."""
    # microsoft/DeepSpeed deepspeed/ops/lamb/fused_lamb.py: eps=1e-8, weight_decay=0.
    theirs = {"eps": 1e-8, "weight_decay": 0.0} if variant == "deepspeed" else {}
    return {**SCALAR_DEFAULTS, **theirs}


def translate(variant: str, given: Mapping[str, Any]) -> RuleOptions:
    """DeepSpeed's keys beside our own → our own.

    Args:
        given: every key of ``optimizer.params`` but lr, betas, eps, weight_decay and variant.

    Raises:
        TypeError: a key that nobody knows, with the nearest right one.
        ValueError: amsgrad, max_grad_norm, or min_coeff / max_coeff beside trust_clip.
    """
    options = dict(given)
    accepted = {*RULE_KEYS, *SCALARS, *OWN}
    for key in options.keys() - accepted:
        near = difflib.get_close_matches(key, accepted, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the keys are {sorted(accepted)}"
        raise TypeError(f"optimizer.params has {key!r}, which ShardedLamb does not know; {hint}")
    compressed = [key for key in ONE_BIT if options.pop(key, None) is not None]
    if compressed:
        warnings.warn(
            f"{', '.join(compressed)}: 1-bit LAMB's compression is not done here, gradients and norms are exchanged in "
            f"full; remove these keys from optimizer.params",
            UserWarning,
            stacklevel=3,
        )
    if options.pop("amsgrad", False):
        raise ValueError(
            "amsgrad=True: LAMB has no AMSGrad variant (DeepSpeed's Lamb refuses it too); remove the key"
        )
    if options.pop("max_grad_norm", None):
        raise ValueError(
            f"max_grad_norm={given['max_grad_norm']!r}: under DeepSpeed gradients are clipped before the optimizer "
            f'sees them; set "gradient_clipping" at the top of the DeepSpeed config instead'
        )
    coefficients = options.pop("min_coeff", None), options.pop("max_coeff", None)
    if coefficients != (None, None):
        if options.get("trust_clip") is not None:
            raise ValueError(
                f"trust_clip={options['trust_clip']!r} beside min_coeff or max_coeff: give one of them"
            )
        low, high = (
            default if value is None else value
            for value, default in zip(coefficients, DEFAULT_COEFFICIENTS, strict=True)
        )
        options["trust_clip"] = (low, high)
    if options.get("bias_correction") is True and variant_options(variant)["bias_correction"] == "lr":
        options["bias_correction"] = "lr"  # DeepSpeed's key says whether, its kernel says where
    return cast(RuleOptions, options)
