"""The ``.grad`` that stage 2 attaches to one parameter, in place of the gradients that it freed."""

import torch
from torch import Tensor

from sharded_lamb.gradients.summary import GradientSummary


class Sentinel:
    """A ``.grad`` of ones on one parameter, attached after every round. It reports

    - to GradScaler: a non-finite gradient on any rank (the ones become inf on every rank);
    - to the reducer: the factor of ``GradScaler.unscale_``, and other changes of gradients (stock
      ``clip_grad_norm_``), which are errors;
    - to the reducer: ``model.zero_grad()``, which cannot zero reduced shards.
    """

    def __init__(self, name: str, p: Tensor) -> None:
        self.name, self.p = name, p
        self.is_set_aside = False
        """Whether reduced gradients remain while autograd accumulates a new ``.grad``."""
        self._grad: Tensor | None = None
        self._version = 0

    @property
    def is_attached(self) -> bool:
        return self._grad is not None and self.p.grad is self._grad

    def is_grad(self, grad: Tensor) -> bool:
        """Whether ``grad`` is the sentinel, not a gradient."""
        return grad is self._grad

    def attach(self, summary: GradientSummary) -> None:
        """Put it into ``.grad``, after a round whose gradients ``summary`` tells of."""
        self.is_set_aside = False
        self._grad = torch.ones_like(self.p.detach()).masked_fill_(summary.any_bad, torch.inf)
        self._version = self._grad._version
        self.p.grad = self._grad

    def drop(self) -> None:
        """Drop the sentinel, and free ``.grad`` if that is the sentinel."""
        if self.is_attached:
            self.p.grad = None
        self._grad, self.is_set_aside = None, False

    def set_aside(self, *, used: bool) -> None:
        """Free ``.grad`` for the gradient that autograd is about to accumulate."""
        if self.is_attached:
            self.is_set_aside = self.has_gradients(used=used)
            self.p.grad = None

    def has_gradients(self, *, used: bool) -> bool:
        """Whether there are reduced gradients that are not zeroed.

        Args:
            used: a step has used them.

        Raises:
            RuntimeError: ``.grad`` was assigned while no step has used them.
        """
        if self._grad is None or self.is_set_aside:
            return self.is_set_aside
        grad = self.p.grad
        if grad is not None and grad is not self._grad:
            if used:
                return False
            raise RuntimeError(
                f"the .grad of {self.name!r} was assigned while stage=2 holds reduced gradients "
                f"that no step has used: call opt.zero_grad() before assigning gradients"
            )
        # the model's zero_grad(set_to_none=False): read the value only after an in-place write.
        written = self._grad._version != self._version
        return grad is not None and not (written and bool((grad == 0).all()))

    def unscale_factor(self) -> Tensor | None:
        """The factor of ``GradScaler.unscale_`` since the last round: fp64 scalar; None if not attached.

        Raises:
            RuntimeError: gradients changed in another way.
        """
        if not self.is_attached:
            return None
        assert self._grad is not None
        # GradScaler's unscaling of a list of tensors leaves the version unchanged; other in-place changes increment it.
        if self._grad._version != self._version:
            raise RuntimeError(
                "gradients were changed after backward, and stage=2 has already reduced and freed them, so the "
                "change is lost: call opt.clip_grad_norm_(max_norm) instead of torch.nn.utils.clip_grad_norm_, or "
                "pass max_grad_norm; use stage=1 for other changes"
            )
        factor = self._grad.flatten()[0].to(torch.float64)
        # inf marks a non-finite gradient and is no factor.
        return torch.where(factor.isfinite(), factor, torch.ones_like(factor))
