"""The two passes with `torch._fused_adamw_`, for CPUs without a compiler.

One call of torch's fused AdamW with lr = a, decoupled decay κ and epsilon ε' does, element by element::

    m ← m + c1 (g - m);  v ← β2 v + c2 g²;  p ← p (1 - a κ) - a (m / √correction1) / (√v / √correction2 + ε')

LAMB's direction is u = b1 m / (√(b2 v) + ε) + λ w. Both bias corrections fit into other numbers: with a = b1 / √b2 and
ε' = ε / √b2 and no correction in the call (an infinite step count), a m / (√v + ε') is u without its decay, so that

    pass 1   p = a copy of w, a κ = 1 + λ:  p becomes -u
    pass 2   p = w, lr = η r a, and no gradient with betas so near 1 that m and v stay; decay inside or after

Results are those of `reference` to rounding, not to the bit, and not the same bits on any number of ranks or threads.
What one call cannot express goes to `reference`: c1 ≠ 1 - β1, ε inside the root, state that is not fp32; and so do
crowds of short runs, which are faster side by side. Masters that are split are joined, chunk by chunk, for each pass.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sharded_lamb.core.layout import BLOCK
from sharded_lamb.core.rule import Coefficients
from sharded_lamb.kernels import formats
from sharded_lamb.kernels.incoming import StockIncoming
from sharded_lamb.kernels.reference import ReferenceKernel, resync_master
from sharded_lamb.kernels.shard import FlatShard, ScatteredShard, Shard

CHUNK = 1 << 16
"""Elements of a call: a chunk of everything that it touches stays in a core's cache between calls."""

SHORT = 8 * BLOCK
CROWD = 8
"""`CROWD` runs of at most `SHORT` elements in a row are a crowd."""

STILL = 1 - 1e-12
"""A beta that is 1 in fp32, whose power to an infinite step is 0: with gradient 0, moments keep their bits."""


LARGE = 2**-17
"""η r λ from which rounding 1 - η r λ to fp32 changes a decay by less than half a percent of itself."""


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of pass 1 and pass 2 to `torch._fused_adamw_` for one parameter."""

    grad_scale: float
    l2: float
    beta1: float
    beta2: float
    rate: float  # a: b1 / √b2
    eps: float  # ε / √b2
    decay: float  # λ


def _call(row: Sequence[float]) -> _Call | None:
    """One row of `rule.table`; None where one call cannot do it."""
    k = Coefficients(*row)
    # A beta is kept as what the call computes the other factor from: in fp32, 1 - 0.999 is off by 1e-5.
    faithful = abs(1 - k.c1 - k.beta1) < 1e-7 and abs(1 - k.c2 - k.beta2) < 1e-7
    if not faithful or k.eps_inside != 0 or not (k.unbias1 > 0 and k.unbias2 > 0):
        return None
    root = math.sqrt(k.unbias2)
    return _Call(
        k.grad_scale,
        k.l2,
        min(1 - k.c1, STILL),
        min(1 - k.c2, STILL),
        k.unbias1 / root,
        k.eps_outside / root,
        k.decay,
    )


class _Calls:
    """The calls of a table's parameters, made when they are asked for."""

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._known: dict[int, _Call | None] = {}

    def of(self, param: int) -> _Call | None:
        if param not in self._known:
            self._known[param] = _call(self._table[param].tolist())
        return self._known[param]

    def possible(self, param: int) -> bool:
        return self.of(param) is not None


class _Run(NamedTuple):
    """Elements of one parameter, in any form of shard."""

    param: int
    weight: Tensor  # [n] fp32; int16: `remainders` of the model's weights
    model: Tensor | None  # [n] model dtype
    grad: Tensor  # [n] any floating-point dtype
    exp_avg: Tensor  # [n] fp32
    exp_avg_sq: Tensor  # [n] fp32

    def joined(self) -> "_Run":
        """With whole masters, which are a copy where they are kept split; then without a model, which those follow."""
        masters = formats.of_memory(self.weight.dtype)
        if self.model is None or not masters.beside_weight:
            return self
        return self._replace(weight=masters.decode(self.weight, self.model), model=None)

    def take(self, other: "_Run") -> None:
        """Keep the masters of ``other``, which is `joined`, and the model's copy of them."""
        if self.model is None:
            return
        if self.weight is other.weight:
            self.model.copy_(self.weight)
            return
        stored, model = formats.of_memory(self.weight.dtype).encode(other.weight)
        assert model is not None
        self.model.copy_(model)
        self.weight.copy_(stored)

    def chunks(self) -> Iterator["_Run"]:
        """Runs of at most `CHUNK` elements."""
        if self.weight.numel() <= CHUNK:
            yield self
            return
        kinds = [torch.split(kind, CHUNK) for kind in (self.weight, self.exp_avg, self.exp_avg_sq)]
        models = [None] * len(kinds[0]) if self.model is None else torch.split(self.model, CHUNK)
        grads = torch.split(self.grad, CHUNK) if len(self.grad) else [self.grad] * len(kinds[0])
        for w, model, g, m, v in zip(kinds[0], models, grads, *kinds[1:], strict=True):
            yield _Run(self.param, w, model, g, m, v)


@lru_cache(maxsize=64)
def _crowded(lengths: tuple[int, ...]) -> tuple[bool, ...]:
    flags: list[bool] = []
    for short, row in groupby(lengths, key=lambda length: length <= SHORT):
        size = len(list(row))
        flags += [short and size >= CROWD] * size
    return tuple(flags)


@dataclass(frozen=True, slots=True)
class _Span:
    """Elements [low, high) of a flat shard: one parameter's, or a crowd's."""

    param: int | None
    low: int
    high: int


def _spans(block_param: Tensor) -> list[_Span]:
    params, blocks = torch.unique_consecutive(block_param, return_counts=True)
    lengths = tuple((blocks * BLOCK).tolist())
    spans: list[_Span] = []
    at = 0
    for param, length, crowded in zip(params.tolist(), lengths, _crowded(lengths), strict=True):
        if crowded and spans and spans[-1].param is None:
            spans[-1] = _Span(None, spans[-1].low, at + length)
        else:
            spans.append(_Span(None if crowded else param, at, at + length))
        at += length
    return spans


def _flat_run(shard: FlatShard, param: int, low: int, high: int) -> _Run:
    model = None if shard.model is None else shard.model[low:high]
    g, m, v = (kind[low:high] for kind in (shard.grad, shard.exp_avg, shard.exp_avg_sq))
    return _Run(param, shard.weight[low:high], model, g, m, v)


def _flat_part(shard: FlatShard, low: int, high: int) -> FlatShard:
    run = _flat_run(shard, -1, low, high)
    owners = shard.block_param[low // BLOCK : high // BLOCK]
    return FlatShard(run.weight, run.model, run.grad, run.exp_avg, run.exp_avg_sq, owners)


def _piece_run(shard: ScatteredShard, i: int) -> _Run:
    model = None if shard.model is None else shard.model[i]
    return _Run(shard.params[i], shard.weight[i], model, shard.grad[i], shard.exp_avg[i], shard.exp_avg_sq[i])


def _is_fp32(shard: Shard) -> bool:
    """Whether masters and moments are; a piece's gradients and a model's copies may be anything."""
    kinds = [shard.exp_avg, shard.exp_avg_sq, *([] if shard.master_format.beside_weight else [shard.weight])]
    return all((x if isinstance(x, Tensor) else x[0]).dtype == torch.float32 for x in kinds)


class _Scratch(NamedTuple):
    """Memory of one chunk's length, fp32; all lengths share it."""

    zeros: Tensor
    update: Tensor
    grad: Tensor


class FusedKernel(StockIncoming):
    """CPU tensors only; the module's docstring gives its accuracy."""

    name = "fused"

    def __init__(self) -> None:
        self._reference = ReferenceKernel()
        self._spans: Any = WeakIdKeyDictionary()  # block_param → list[_Span]
        self._scratch = {
            CHUNK: _Scratch(
                torch.zeros(CHUNK, device="cpu"),
                torch.empty(CHUNK, device="cpu"),
                torch.empty(CHUNK, device="cpu"),
            )
        }
        self._no_correction = [torch.tensor(math.inf, device="cpu")]  # the step count of a call

    def square_sums(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """Adds Σg² per parameter to ``sums`` [P] fp64."""
        for shard in shards:
            runs, rest = self._divided(shard, lambda param: True)
            self._add(
                sums.view(1, -1), [(c.param, self._square_sum(c.grad)) for run in runs for c in run.chunks()]
            )
            if rest:
                self._reference.square_sums(rest, sums)

    def moments_and_norms(self, shards: Sequence[Shard], table: Tensor, sums: Tensor) -> None:
        """m, v ← g; adds Σw², Σu² per parameter to ``sums`` [SUMS, P] fp64."""
        calls = _Calls(table)
        for shard in shards:
            runs, rest = self._divided(shard, calls.possible)
            found = []
            for run in runs:
                call = calls.of(run.param)
                assert call is not None
                found += [(run.param, *self._moved(chunk, call)) for chunk in run.chunks()]
            self._add(sums, found)
            if rest:
                self._reference.moments_and_norms(rest, table, sums)

    def apply(self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor) -> None:
        """w ← w - step_size u, u recomputed from m and v."""
        calls, sizes = _Calls(table), step_sizes.tolist()
        for shard in shards:
            runs, rest = self._divided(shard, calls.possible)
            for run in runs:
                call = calls.of(run.param)
                assert call is not None
                for chunk in run.chunks():
                    self._descend(chunk, call, sizes[run.param])
            if rest:
                self._reference.apply(rest, table, step_sizes)

    def _moved(self, run: _Run, call: _Call) -> tuple[float, float]:
        """m, v ← g; Σw² and Σu²."""
        run = run.joined()
        if run.model is not None and not torch.equal(run.weight.to(run.model.dtype), run.model):
            run.weight.copy_(resync_master(run.weight, run.model))
        weight_squares = self._square_sum(run.weight)
        update = self._scratch_of(run.weight).update.copy_(run.weight)
        self._fused(
            (update, self._gradient(run, call), run.exp_avg, run.exp_avg_sq),
            lr=call.rate,
            betas=(call.beta1, call.beta2),
            weight_decay=(1 + call.decay) / call.rate,
            eps=call.eps,
        )
        return weight_squares, update.mul_(update).sum().item()

    def _gradient(self, run: _Run, call: _Call) -> Tensor:
        """g x scale + l2 x w, in fp32; the gradient's own memory where it is that already."""
        if call.grad_scale == 1 and call.l2 == 0 and run.grad.dtype == torch.float32:
            return run.grad
        zeros, _, scaled = self._scratch_of(run.weight)
        if call.grad_scale == 0 and call.l2 == 0:
            return zeros
        scaled.copy_(run.grad if call.grad_scale != 0 else zeros)  # 0 x nan would be nan
        return scaled.mul_(call.grad_scale).add_(run.weight, alpha=call.l2)

    def _descend(self, run: _Run, call: _Call, step_size: float) -> None:
        """w ← w - step_size u.

        A small decay comes after the call, with a rounding of its own: (1 - η r λ) (w - η r a … / (1 - η r λ)). Inside
        it is a factor that is rounded to fp32 alike for all elements: of a decay of 1e-7 that makes 1.2e-7 every step.
        """
        kept, run = run, run.joined()
        if step_size != 0:
            shrink = step_size * call.decay
            inside = abs(shrink) > LARGE
            self._fused(
                (run.weight, self._scratch_of(run.weight).zeros, run.exp_avg, run.exp_avg_sq),
                lr=step_size * call.rate / (1 if inside else 1 - shrink),
                betas=(STILL, STILL),
                weight_decay=call.decay / call.rate if inside else 0.0,
                eps=call.eps,
            )
            if shrink != 0 and not inside:
                run.weight.add_(run.weight, alpha=-shrink)
        kept.take(run)

    def _fused(
        self,
        memory: tuple[Tensor, Tensor, Tensor, Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float,
    ) -> None:
        p, g, m, v = memory
        torch._fused_adamw_(
            [p],
            [g],
            [m],
            [v],
            [],
            self._no_correction,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    def _square_sum(self, x: Tensor) -> float:
        """Σx² by torch's cascade in fp32. A dot product is twice as fast, and off by 1e-5 where elements are alike."""
        x = x.float()
        return torch.mul(x, x, out=self._scratch_of(x).update).sum().item()

    def _scratch_of(self, x: Tensor) -> _Scratch:
        numel = x.numel()
        if numel not in self._scratch:
            self._scratch[numel] = _Scratch(*(memory[:numel] for memory in self._scratch[CHUNK]))
        return self._scratch[numel]

    @staticmethod
    def _add(sums: Tensor, found: Sequence[tuple[float, ...]]) -> None:
        """``found``: (parameter, one value for each row of ``sums`` [k, P])."""
        if found:
            params, *values = zip(*found, strict=True)
            sums.index_add_(
                1, torch.tensor(params, device="cpu"), torch.tensor(values, dtype=torch.float64, device="cpu")
            )

    def _divided(self, shard: Shard, possible: Callable[[int], bool]) -> tuple[list[_Run], list[Shard]]:
        """(runs to update with calls, shards left to the reference)."""
        if not _is_fp32(shard):
            return [], [shard]
        if isinstance(shard, FlatShard):
            return self._divided_flat(shard, possible)
        shard = replace(shard, grad=shard.gradients(), grad_starts=None)
        fusible = [
            not crowded and possible(param)
            for param, crowded in zip(shard.params, _crowded(shard.lengths), strict=True)
        ]
        if not any(fusible):
            return [], [shard]
        rest = [i for i, fuses in enumerate(fusible) if not fuses]
        runs = [_piece_run(shard, i) for i, fuses in enumerate(fusible) if fuses]
        return runs, [shard.chosen(rest)] if rest else []

    def _divided_flat(
        self, shard: FlatShard, possible: Callable[[int], bool]
    ) -> tuple[list[_Run], list[Shard]]:
        runs: list[_Run] = []
        rest: list[Shard] = []
        for span in self._spans_of(shard):
            if span.param is not None and possible(span.param):
                runs.append(_flat_run(shard, span.param, span.low, span.high))
            else:
                rest.append(_flat_part(shard, span.low, span.high))
        return runs, rest

    def _spans_of(self, shard: FlatShard) -> list[_Span]:
        if shard.block_param not in self._spans:
            self._spans[shard.block_param] = _spans(shard.block_param)
        spans: list[_Span] = self._spans[shard.block_param]
        return spans
