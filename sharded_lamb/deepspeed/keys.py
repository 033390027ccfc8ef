"""Translates the keys of ``optimizer.params`` in a ds_config.json to the options of the LAMB rule."""

import difflib
import warnings
from collections.abc import Mapping
from typing import Any, cast

from sharded_lamb.core.hyperparams import DEFAULTS, SCALAR_DEFAULTS, RuleOptions, variant_options

DEFAULT_COEFFICIENTS = (0.01, 10.0)
"""DeepSpeed's defaults of min_coeff and max_coeff, for a config that sets only one."""

ONE_BIT = (
    "freeze_step",
    "cuda_aware",
    "comm_backend_name",
    "coeff_beta",
    "factor_max",
    "factor_min",
    "factor_threshold",
)
"""Keys of DeepSpeed's OneBitLamb only; this optimizer does not compress."""

SCALARS = ("lr", "betas", "eps", "weight_decay")
OWN = ("variant", "skip_nonfinite", "max_consecutive_skips")
DEEPSPEED = ("max_coeff", "min_coeff", "amsgrad")

RULE_KEYS = (*DEFAULTS, *DEEPSPEED, *ONE_BIT)
"""Keys of the rule, which may also be set per parameter group; `translate` also accepts `OWN`."""


ZEROS_OWN = {
    "gather_dtype": 'ZeRO gathers parameters itself, in the model\'s dtype (ZeRO 3 also by "zero_quantized_weights")',
    "reduce_dtype": 'ZeRO reduces gradients itself, in the dtype of "communication_data_type"',
    "state_dtype": "ZeRO splits, offloads and checkpoints moments as tensors like its float32 partitions",
    "store_param_remainders": "ZeRO keeps whole float32 masters in its own partitions",
}
"""{option of `ShardedLamb`: the reason why it has none here}."""


def scalar_defaults(variant: str) -> dict[str, Any]:
    """Defaults of lr, betas, eps and weight_decay: with variant "deepspeed" those of DeepSpeed's Lamb."""
    # microsoft/DeepSpeed deepspeed/ops/lamb/fused_lamb.py: eps=1e-8, weight_decay=0.
    own = {"eps": 1e-8, "weight_decay": 0.0} if variant == "deepspeed" else {}
    return {**SCALAR_DEFAULTS, **own}


def translate(variant: str, given: Mapping[str, Any]) -> RuleOptions:
    """DeepSpeed's keys and this package's own → this package's own.

    Args:
        given: all keys of ``optimizer.params`` except lr, betas, eps, weight_decay and variant.

    Raises:
        TypeError: unknown key; the message names the nearest valid one.
        ValueError: amsgrad, max_grad_norm, a key of `ZEROS_OWN`, or min_coeff / max_coeff together with trust_clip.
    """
    options = dict(given)
    for key, reason in ZEROS_OWN.items():
        if options.pop(key, None) is not None:
            raise ValueError(
                f"{key}={given[key]!r}: under DeepSpeed {reason}; remove the key from optimizer.params"
            )
    accepted = {*RULE_KEYS, *SCALARS, *OWN}
    for key in options.keys() - accepted:
        near = difflib.get_close_matches(key, accepted, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the keys are {sorted(accepted)}"
        raise TypeError(f"optimizer.params has {key!r}, which ShardedLamb does not know; {hint}")
    compressed = [key for key in ONE_BIT if options.pop(key, None) is not None]
    if compressed:
        warnings.warn(
            f"{', '.join(compressed)}: 1-bit LAMB's compression is not supported, gradients and norms are exchanged "
            f"uncompressed; remove these keys from optimizer.params",
            UserWarning,
            stacklevel=3,
        )
    if options.pop("amsgrad", False):
        raise ValueError(
            "amsgrad=True: LAMB has no AMSGrad variant (DeepSpeed's Lamb rejects it too); remove the key"
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
                f"trust_clip={options['trust_clip']!r} together with min_coeff or max_coeff: give one of them"
            )
        low, high = (
            default if value is None else value
            for value, default in zip(coefficients, DEFAULT_COEFFICIENTS, strict=True)
        )
        options["trust_clip"] = (low, high)
    if options.get("bias_correction") is True and variant_options(variant)["bias_correction"] == "lr":
        options["bias_correction"] = "lr"  # DeepSpeed's key enables it, its kernel applies it to lr
    return cast(RuleOptions, options)
