"""An fp64 LAMB, LANS and LARS in one process: whole tensors, one parameter at a time, straight from the papers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, or the difference itself where that norm is 0."""
    gap, size = float((actual.double() - expected).norm()), float(expected.norm())
    return gap / size if size > 0 else gap


class Reference:
    """Variants "lamb" (arXiv 1904.00962, Algorithm 2), with global clipping, "lans" (2006.13484, Algorithm 2) and
    "lars" (1708.03888, Algorithm 1)."""

    def __init__(
        self, weights: Sequence[Tensor], lr: float, max_grad_norm: float | None, variant: str = "lamb"
    ) -> None:
        self.w = [weight.detach().to("cpu", torch.float64, copy=True) for weight in weights]
        self.m = [torch.zeros_like(w) for w in self.w]
        self.v = [torch.zeros_like(w) for w in self.w]
        self.ratios = [1.0] * len(self.w)
        self.grad_norm = 0.0
        self.t, self.lr, self.max_grad_norm = 0, lr, max_grad_norm
        self.is_lans, self.is_lars = variant == "lans", variant == "lars"
        self.moment_error = 0.0  # the largest of `_rounded`

    def step(self, gradients: Sequence[Tensor], stored: Sequence[Sequence[Tensor]] | None = None) -> None:
        """One step with averaged gradients: fp64, one per weight, of its shape.

        Args:
            stored: moments of each weight after the optimizer's step, where it rounds them; they replace exact ones.
        """
        self.t += 1
        self.grad_norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        clip = 1.0
        if self.max_grad_norm is not None and self.grad_norm > self.max_grad_norm:
            clip = self.max_grad_norm / self.grad_norm
        for i, gradient in enumerate(gradients):
            g = gradient * clip
            if self.is_lars:
                self._step_of_lars(i, g)
                continue
            if self.is_lans:
                g = gradient / gradient.norm() if gradient.any() else gradient
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g * g
            if stored is not None:
                self.m[i], self.v[i] = map(self._rounded, (self.m[i], self.v[i]), stored[i])
            m_hat, v_hat = self.m[i] / (1 - 0.9**self.t), self.v[i] / (1 - 0.999**self.t)
            update = m_hat / (v_hat.sqrt() + 1e-6) + 0.01 * self.w[i]
            self.ratios[i] = self._ratio(self.w[i], update)
            change = self.ratios[i] * update
            if self.is_lans:
                along = g / (v_hat.sqrt() + 1e-6) + 0.01 * self.w[i]
                change = 0.9 * change + 0.1 * self._ratio(self.w[i], along) * along
            self.w[i] -= self.lr * change

    def _step_of_lars(self, i: int, g: Tensor) -> None:
        w_norm, g_norm = float(self.w[i].norm()), float(g.norm())
        is_defined = w_norm > 0 and g_norm > 0
        self.ratios[i] = 0.001 * w_norm / (g_norm + 0.01 * w_norm + 1e-6) if is_defined else 1.0
        self.m[i] = 0.9 * self.m[i] + self.lr * self.ratios[i] * (g + 0.01 * self.w[i])
        self.w[i] -= self.m[i]

    def _rounded(self, exact: Tensor, stored: Tensor) -> Tensor:
        self.moment_error = max(self.moment_error, relative(stored, exact))
        return stored.double()

    @staticmethod
    def _ratio(w: Tensor, update: Tensor) -> float:
        w_norm, u_norm = float((w**2).sum()) ** 0.5, float((update**2).sum()) ** 0.5
        return w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
