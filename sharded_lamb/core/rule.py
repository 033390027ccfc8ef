"""The updates of LAMB (You et al., arXiv 1904.00962, Algorithm 2) and LANS (Zheng et al., arXiv 2006.13484,
Algorithm 2) on plain tensors.

For every parameter w with gradient g at its step t::

    m ← β1 m + c1 g          c1 = 1-β1, or 1 without gradient averaging
    v ← β2 v + (1-β2) g²
    u = (b1 m) / (√(b2 v + ε_inside) + ε_outside) + λ w      b = 1/(1-βᵗ), or 1 without bias correction
    r = φ(‖w‖) / ‖u‖         1 where a raw norm is 0 or adaptation is off
    w ← w - η r u

At every `FLUSH_STEPS`-th step of a parameter, subnormal m and v count as 0. Without gradients they would not decay
further than to about 1 / (2 - 2β) times the smallest number: β times that rounds to it, and processors take many times
as long on them.

LANS: g is divided by ‖g‖ first (``normalize_grad``), and the update has a second direction, along the gradient, with a
ratio of its own (``nesterov``)::

    u₂ = g / (√(b2 v + ε_inside) + ε_outside) + λ w,  r₂ = φ(‖w‖) / ‖u₂‖
    w ← w - η (β1 r u + c1 r₂ u₂)

Caution (Liang et al., arXiv 2411.16085, as in timm): a = (b1 m) / (√(b2 v + ε_inside) + ε_outside) counts where it
agrees with the gradient in sign, scaled up for what is left out (``caution``)::

    μ = 1 where a g > 0, else 0;  u = c μ a + λ w,  c = 1 / max(mean(μ), 1e-3), mean over the whole parameter

Decoupled decay (``decoupled_decay``, as in timm) is outside u and its ratio: w shrinks by η λ first, or by
η² λ / η_peak (``corrected_weight_decay``), and φ(‖w‖) is that of the smaller w.

LARS (You et al., arXiv 1708.03888, Algorithm 1) keeps m alone, and its ratio r scales what enters it::

    d = g + λ w
    r = c φ(‖w‖) / (‖g‖ + λ ‖w‖ + ε)
    m ← β1 m + c1 r d        with η inside: c1 η r d
    w ← w - η m              with η inside: w - m; with ``nesterov``, β1 m + c1 r d instead of m

Functions take lists of tensors, one entry per parameter or chunk of a shard. A coefficient is a list of the same
length: floats, or tensors that broadcast (one row per block), so that the same code updates a whole parameter and
a chunk with blocks of many parameters. Every operation is one correctly rounded IEEE operation (no fused
multiply-add, no alpha argument), so an element's bits depend neither on its position in a vector nor on the number
of threads or ranks.
"""

from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sharded_lamb.core.hyperparams import FP32_MAX

Coefficient = Any  # list[float] | list[Tensor]; torch's foreach stubs overload each, not their union
C = TypeVar("C")


@dataclass(frozen=True)
class Coefficients(Generic[C]):
    """Coefficients of both passes: fp64 vectors [P], or lists with one entry per tensor (`Coefficient`)."""

    grad_scale: C  # clip factor x inverse loss scale; 0 leaves a parameter unchanged
    l2: C  # decay added to the gradient (adam_w_mode=False)
    beta1: C
    c1: C
    beta2: C
    c2: C
    unbias1: C  # 1/(1-βᵗ): a multiplication costs a tenth of a division
    unbias2: C
    eps_inside: C
    eps_outside: C
    decay: C  # decay added to u (adam_w_mode=True)
    opposed: C  # μ where the update does not agree with the gradient: 0 with caution, else 1; used with `CAUTION_SUMS`
    salt: C  # the step: for `FLUSH_STEPS`, and a key of the random numbers that round moments


SUMS = ("weight", "update")
"""Sums of squares that pass 1 computes for every parameter, in order: Σw² and Σu². The all-reduce between the passes,
kernels' block sums and predicted traffic have ``len(SUMS)`` numbers per parameter."""

NESTEROV_SUMS = (*SUMS, "gradient update")
"""`SUMS` of an optimizer with a ``nesterov`` parameter: also Σu₂². Its other parameters' step along u₂ is 0."""

LARS_SUMS = ("weight",)
"""`SUMS` of LARS: Σg², of which its ratio is made too, is in the summary of gradients."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The state of a parameter, m and v, by its key in state dicts and checkpoints."""

LARS_MOMENTS = ("exp_avg",)
"""`MOMENTS` of LARS: torch.optim.SGD's ``momentum_buffer``."""

FLUSH_STEPS = 64
"""Steps of a parameter between flushes of subnormal moments. At every step, with AVX2, they take 5 to 13 % of pass 1
(Intel Xeon, Cascade Lake)."""

CAUTION_SUMS = (*SUMS, "update weight", "mask")
"""`SUMS` of an optimizer with a ``caution`` parameter: also Σu w and Σμ. With caution pass 1's u is μ a, since c is not
known: `of_whole_update` adds c and decay. Other parameters have the sums that they have in another optimizer."""


def sums_of(*, lars: bool, nesterov: bool, caution: bool) -> tuple[str, ...]:
    """The sums that pass 1 computes for every parameter of an optimizer with such parameters; at most one of these."""
    return LARS_SUMS if lars else NESTEROV_SUMS if nesterov else CAUTION_SUMS if caution else SUMS


def moments_of(*, lars: bool) -> tuple[str, ...]:
    """The state of every parameter."""
    return LARS_MOMENTS if lars else MOMENTS


COLUMNS = tuple(field.name for field in fields(Coefficients))
Vectors = Coefficients[Tensor]
PerTensor = Coefficients[Coefficient]


def table(vectors: Vectors, dtype: torch.dtype) -> Tensor:
    """[P, COLUMNS] in the compute dtype."""
    return torch.stack([getattr(vectors, name) for name in COLUMNS], dim=1).to(dtype)


def _mul(tensors: list[Tensor], by: Any) -> list[Tensor]:
    return list(torch._foreach_mul(tensors, by))


def scaled_gradients(g: list[Tensor], w: list[Tensor], k: PerTensor) -> list[Tensor]:
    """g x scale + l2 x w, in the dtype of ``g``."""
    scaled = _mul(g, k.grad_scale)
    torch._foreach_add_(scaled, _mul(w, k.l2))
    return scaled


def update_moments(m: list[Tensor], v: list[Tensor], g: list[Tensor], k: PerTensor) -> None:
    """m ← β1 m + c1 g and v ← β2 v + c2 g², in place (Algorithm 2, lines 6 and 7)."""
    update_momentum(m, g, k)
    squares = _mul(g, g)
    torch._foreach_mul_(squares, k.c2)
    torch._foreach_mul_(v, k.beta2)
    torch._foreach_add_(v, squares)


def update_momentum(m: list[Tensor], g: list[Tensor], k: PerTensor) -> None:
    """m ← β1 m + c1 g, in place."""
    torch._foreach_mul_(m, k.beta1)
    torch._foreach_add_(m, _mul(g, k.c1))


def flush_subnormals(moments: list[Tensor], step: Tensor) -> None:
    """At every `FLUSH_STEPS`-th step, numbers below the smallest normal one in magnitude become 0, in place.

    ``step`` broadcasts to each of ``moments``, which is updated afterwards.
    """
    is_due = step.to(torch.int64) % FLUSH_STEPS == 0
    if step.device.type == "cpu" and not is_due.any():  # elsewhere the question would wait for the device
        return
    for x in moments:
        x.masked_fill_((x.abs() < torch.finfo(x.dtype).tiny) & is_due, 0)


def root(x: Tensor) -> Tensor:
    """√x, correctly rounded in fp32.

    On CPUs torch calls MKL's square root, which is off by one ulp in 0.6 % of values. The fp64 root rounded to fp32 is
    exact: the root of a 24-bit number is never closer than 2⁻⁵¹ to the midpoint of two fp32 numbers.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return x.double().sqrt_().float()
    return x.sqrt()


def denominators(v: list[Tensor], k: PerTensor) -> list[Tensor]:
    """√(b2 v + ε_inside) + ε_outside (Algorithm 2, lines 9 and 10)."""
    inside = _mul(v, k.unbias2)
    torch._foreach_add_(inside, k.eps_inside)
    outside = [root(x) for x in inside]
    torch._foreach_add_(outside, k.eps_outside)
    return outside


def direction(m: list[Tensor], denominator: list[Tensor], w: list[Tensor], k: PerTensor) -> list[Tensor]:
    """u, the update before the trust ratio (Algorithm 2, lines 8 to 10, and the decay of line 11)."""
    u = _mul(m, k.unbias1)
    torch._foreach_div_(u, denominator)
    torch._foreach_add_(u, _mul(w, k.decay))
    return u


def cautious_direction(
    m: list[Tensor], scaled: list[Tensor], denominator: list[Tensor], w: list[Tensor], k: PerTensor
) -> tuple[list[Tensor], list[Tensor]]:
    """(`direction` times μ before the decay, μ). ``scaled``: `scaled_gradients`. A nan stays one: nan x 0 is nan."""
    u = _mul(m, k.unbias1)
    torch._foreach_div_(u, denominator)
    masks = [
        torch.where(product > 0, torch.ones_like(product), opposed)
        for product, opposed in zip(_mul(u, scaled), k.opposed, strict=True)
    ]
    torch._foreach_mul_(u, masks)
    torch._foreach_add_(u, _mul(w, k.decay))
    return u, masks


def gradient_direction(
    scaled: list[Tensor], denominator: list[Tensor], w: list[Tensor], k: PerTensor
) -> list[Tensor]:
    """u₂, the update along the gradient, before its trust ratio. ``scaled``: `scaled_gradients`."""
    u = list(torch._foreach_div(scaled, denominator))
    torch._foreach_add_(u, _mul(w, k.decay))
    return u


def descend(w: list[Tensor], u: list[Tensor], step_size: Coefficient) -> None:
    """w ← w - step_size x u, in place; step_size = η r."""
    torch._foreach_sub_(w, _mul(u, step_size))


@dataclass(frozen=True, slots=True)
class ParameterOptions:
    """The options as tensors [P] on one device: fp64; bool where it says so."""

    beta1: Tensor
    beta2: Tensor
    c1: Tensor
    c2: Tensor
    corrects: Tensor  # 1: bias correction inside the ratio
    corrects_lr: Tensor  # 1: bias correction on the step size, as in DeepSpeed
    eps_inside: Tensor
    eps_outside: Tensor
    l2: Tensor
    decay: Tensor
    weight_norm_low: Tensor
    weight_norm_high: Tensor
    ratio_low: Tensor
    ratio_high: Tensor
    adapts: Tensor  # bool
    normalizes: Tensor  # bool: gradients are divided by their norm
    nesterov: Tensor  # 1: the update has a second direction, along the gradient
    decoupled: Tensor  # bool: decay is outside the update
    peak_lr: Tensor  # η_peak of corrected decay; inf: none
    trust_coefficient: Tensor
    includes_lr: Tensor  # bool: LARS's momentum has η inside
    larc_clip: Tensor  # bool: LARS's η r is at most η, as in LARC
    opposed: Tensor  # 0 with caution, else 1
    numel: Tensor  # of the whole parameter
    is_fp64: Tensor  # bool: float64 parameters, whose norms are not rounded to fp32
    any_normalizes: bool  # on the host
    any_nesterov: bool
    any_decoupled: bool
    any_caution: bool
    is_lars: bool

    @property
    def sums(self) -> tuple[str, ...]:
        """See `sums_of`."""
        return sums_of(lars=self.is_lars, nesterov=self.any_nesterov, caution=self.any_caution)

    @property
    def pass_2_reads_gradients(self) -> bool:
        """Whether pass 2 reads gradients again."""
        return self.is_lars or self.any_nesterov or self.any_caution


def coefficients(options: ParameterOptions, step: Tensor, active: Tensor, grad_scale: Tensor) -> Vectors:
    """The coefficients of both passes.

    Where ``active`` is False they leave moments unchanged: m x 1 + g x 0, at a step that flushes none.

    Args:
        step: [P] fp64, each parameter's step, this one included.
        active: [P] bool, the parameters to update.
        grad_scale: fp64 scalar (or [P]): clip factor times inverse loss scale.
    """
    mask = active.to(torch.float64)
    one = torch.ones_like(mask)
    # A parameter that was never updated has step 0: 1 / (1 - β⁰) would give inf x 0 for its zero moments.
    correct = options.corrects.bool() & (step > 0)
    return Coefficients(
        grad_scale=grad_scale * mask,
        l2=options.l2 * mask,
        beta1=torch.where(active, options.beta1, one),
        c1=options.c1 * mask,
        beta2=torch.where(active, options.beta2, one),
        c2=options.c2 * mask,
        unbias1=torch.where(correct, 1 / (1 - options.beta1**step), one),
        unbias2=torch.where(correct, 1 / (1 - options.beta2**step), one),
        eps_inside=options.eps_inside,
        eps_outside=options.eps_outside,
        decay=options.decay * ~options.decoupled * options.opposed,
        opposed=options.opposed,
        salt=torch.where(active, step, one),
    )


def norms(square_sums: Tensor, is_fp64: Tensor) -> Tensor:
    """√ of fp64 sums of squares, rounded to fp32 before use.

    The order of summation over ranks changes fp64's last bits but not fp32's: rounding gives the same bits on any
    number of ranks. Norms of float64 parameters (``is_fp64``) are not rounded.
    """
    exact = square_sums.sqrt()
    return torch.where(is_fp64, exact, exact.float().double())


def gradient_scales(scale: Tensor, square_sums: Tensor, options: ParameterOptions) -> Tensor:
    """``scale``, and ±1/‖g‖ where gradients are normalized: [P] fp64, or ``scale`` itself where none are.

    Args:
        scale: fp64 scalar (or [P]): clip factor times inverse loss scale, which a norm cancels but for its sign.
        square_sums: [P] fp64, Σg² over all ranks of the stored gradients. A gradient 0 stays 0.
    """
    if not options.any_normalizes:
        return scale
    norm = norms(square_sums, options.is_fp64)
    inverse = torch.where(norm > 0, scale.sign() / norm, torch.zeros_like(norm))
    return torch.where(options.normalizes, inverse, scale)


def shrinkage(lr: Tensor, options: ParameterOptions) -> Tensor:
    """[P] fp64: the share η λ (η / η_peak) of itself that decoupled decay takes from a weight; 0 for other decay."""
    rate = torch.where(options.peak_lr.isinf(), lr, lr * lr / options.peak_lr)
    return torch.where(options.decoupled, rate * options.decay, torch.zeros_like(lr))


def of_whole_update(sums: Tensor, options: ParameterOptions) -> tuple[Tensor, Tensor]:
    """`CAUTION_SUMS` over all ranks, [4, P] fp64 → (`SUMS`, u with c and decay: [2, P] fp64; c: [P] fp64).

    ‖c a + λ w‖² = c² Σa² + 2 c λ Σa w + λ² Σw². c is 1 without caution.
    """
    weight, update, both, mask = sums
    cautious = options.opposed == 0
    mean = (mask / options.numel.clamp(min=1)).clamp(min=1e-3)
    c = torch.where(cautious, 1 / mean, torch.ones_like(mean))
    decay = options.decay * ~options.decoupled
    whole = (c * c * update + 2 * c * decay * both + decay * decay * weight).clamp(min=0)
    return torch.stack([weight, torch.where(cautious, whole, update)]), c


def decay_of_pass_2(lr: Tensor, step_sizes: Tensor, c: Tensor | float, options: ParameterOptions) -> Tensor:
    """[P] fp64: the decay in u with which ``step_sizes`` [D, P] also take `shrinkage` from the weights.

    ``step_sizes`` have the factor ``c`` ([P]) of caution, which decay inside the update does not have.
    """
    size = step_sizes.sum(dim=0)
    share = shrinkage(lr, options) / size
    decoupled = torch.where(size > 0, share, torch.zeros_like(size)).clamp(max=FP32_MAX)
    return torch.where(options.decoupled, decoupled, options.decay / c)


def ratios_of_sums(
    square_sums: Tensor,
    options: ParameterOptions,
    lr: Tensor,
    gradient_sums: Tensor | None,
    grad_scale: Tensor,
) -> Tensor:
    """[D, P] fp64: `trust_ratios` of each direction; LARS's ratio, [1, P].

    Args:
        square_sums: [``options.sums``, P] fp64 over all ranks.
        lr: [P] fp64, by which decoupled decay shrinks the weights before.
        gradient_sums: [P] fp64, Σg² over all ranks of the stored gradients; read by LARS alone.
        grad_scale: as of `coefficients`.
    """
    weight_norm, *update_norms = norms(square_sums, options.is_fp64)
    if options.is_lars:
        assert gradient_sums is not None
        gradient_norm = norms(gradient_sums, options.is_fp64) * grad_scale.abs()
        return lars_ratios(weight_norm, gradient_norm, options, lr).unsqueeze(0)
    if options.any_decoupled:
        weight_norm = weight_norm * (1 - shrinkage(lr, options)).abs()
    return torch.stack([trust_ratios(weight_norm, norm, options) for norm in update_norms])


def trust_ratios(weight_norm: Tensor, update_norm: Tensor, options: ParameterOptions) -> Tensor:
    """[P] fp64: φ(‖w‖)/‖u‖, clipped, where both raw norms are > 0 and the parameter adapts; else 1."""
    defined = options.adapts & (weight_norm > 0) & (update_norm > 0)
    return _clipped_ratio(defined, weight_norm, update_norm, options)


def lars_ratios(weight_norm: Tensor, gradient_norm: Tensor, options: ParameterOptions, lr: Tensor) -> Tensor:
    """[P] fp64: c φ(‖w‖) / (‖g‖ + λ ‖w‖ + ε), clipped, where both norms are > 0 and the parameter adapts; else 1.

    With ``larc_clip`` at most η times as much as makes η r = η: min(r / η, 1) (LARC, as in apex).
    """
    defined = options.adapts & (weight_norm > 0) & (gradient_norm > 0)
    below = gradient_norm + options.l2 * weight_norm + options.eps_outside
    ratio = _clipped_ratio(defined, weight_norm, below, options)
    return torch.where(options.larc_clip & defined & (lr > 0), (ratio / lr).clamp(max=1), ratio)


def _clipped_ratio(defined: Tensor, weight_norm: Tensor, below: Tensor, options: ParameterOptions) -> Tensor:
    phi = weight_norm.clamp(options.weight_norm_low, options.weight_norm_high)
    ratio = options.trust_coefficient * (phi / torch.where(defined, below, torch.ones_like(below)))
    ratio = ratio.clamp(options.ratio_low, options.ratio_high)
    return torch.where(defined, ratio, torch.ones_like(ratio))


def step_sizes(lr: Tensor, ratios: Tensor, options: ParameterOptions, step: Tensor, active: Tensor) -> Tensor:
    """[D, P] fp64: η r of each direction, with ``nesterov`` β1 η r and c1 η r₂; 0 where ``active`` is False.

    Times √(1-β2ᵗ)/(1-β1ᵗ) with ``bias_correction="lr"``. ``ratios``: [D, P].

    LARS: [3, P], the factors of d in m, of m in w and of d in w; the last is 0 without ``nesterov``.
    """
    if options.is_lars:
        nesterov = options.nesterov.bool()
        one = torch.ones_like(lr)
        into_momentum = options.c1 * ratios[0] * torch.where(options.includes_lr, lr, one)
        momentum = torch.where(options.includes_lr, one, lr) * torch.where(nesterov, options.beta1, one)
        gradient = torch.where(nesterov, lr * options.c1 * ratios[0], torch.zeros_like(lr))
        sizes = torch.stack([into_momentum, momentum, gradient])
        return torch.where(active, sizes, torch.zeros_like(sizes))
    correct = options.corrects_lr.bool() & (step > 0)
    one = torch.ones_like(ratios[0])
    correction = torch.where(correct, (1 - options.beta2**step).sqrt(), one)
    correction = correction / torch.where(correct, 1 - options.beta1**step, one)
    size = lr * correction
    if options.any_nesterov:
        nesterov = options.nesterov.bool()
        weights = torch.where(nesterov, options.beta1, one), options.c1 * options.nesterov
        ratios = torch.stack(weights) * ratios
    return torch.where(active, size * ratios, torch.zeros_like(ratios))


def clip_factor(grad_norm: Tensor, max_grad_norm: float | None) -> Tensor:
    """min(1, max_grad_norm / grad_norm), without an epsilon in the denominator."""
    if max_grad_norm is None:
        return torch.ones_like(grad_norm)
    return torch.where(grad_norm > max_grad_norm, max_grad_norm / grad_norm, torch.ones_like(grad_norm))
