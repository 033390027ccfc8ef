"""Whether GradScaler hands its scale to the optimizer, or unscales gradients itself."""

import sys
from types import FrameType

from torch.amp.grad_scaler import GradScaler

from sharded_lamb.optim.base import LambOptimizer


def receives_grad_scale(optimizer: object) -> bool:
    """Whether GradScaler's attributes reach ``optimizer``; read as ``_step_supports_amp_scaling``.

    True where GradScaler.step reads it, of a LambOptimizer or a wrapper with its class. A wrapper of another class
    forwards the read and keeps ``grad_scale`` and ``found_inf`` for itself: GradScaler must unscale gradients and skip
    steps, as for any optimizer. False for everyone else: frameworks that read it as "gradients cannot be unscaled
    before the step" (Lightning, Fabric) refuse to clip, and gradients can be.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(4):  # past the wrapper's __getattr__
        if frame is not None and frame.f_code is GradScaler.step.__code__:
            return isinstance(frame.f_locals["optimizer"], LambOptimizer)
        frame = frame.f_back if frame is not None else None
    return False
