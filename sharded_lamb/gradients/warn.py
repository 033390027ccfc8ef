"""Warnings of stage 2."""

import warnings
from collections.abc import Sequence

from sharded_lamb.gradients.attached import AttachedGradients


def warn_of_late_buckets(rounds: int, seconds: float) -> None:
    """Tell that backward waits for buckets no longer, after ``rounds`` in which one took longer than ``seconds``."""
    warnings.warn(
        f"in {rounds} backward passes a bucket of stage=2 did not arrive within {seconds} s, since another rank is "
        f"late or waits in a collective of backward for this one: from now on backward does not wait for buckets, and "
        f"staging memory grows up to the size of all gradients",
        UserWarning,
        stacklevel=4,
    )


def warn_of_swapped(attached: AttachedGradients, swapped: Sequence[int], world_size: int) -> None:
    """Warn if backward came between swaps of parameters and `AccumulationHooks.renew`: no hook reduced gradients."""
    if world_size > 1 and attached.has_own_gradients(swapped):
        warnings.warn(
            f"after zero_grad() the model was converted, moved or loaded with torch.__future__.set_swap_module_params_"
            f"on_conversion(True), which removes hooks: the gradient of {attached.names[swapped[0]]!r} is reduced in "
            f"this step, not in backward, and edits of it before this step (torch's clip_grad_norm_) were edits of "
            f"this rank's own gradient. Call zero_grad() after such a change",
            UserWarning,
            stacklevel=4,
        )
