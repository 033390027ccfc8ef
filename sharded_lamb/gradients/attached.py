"""Which gradients stage 2 holds reduced, by the handles that it attaches to ``.grad``, and users' edits of them."""

import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sharded_lamb.core.parameters import grad_dtype_of
from sharded_lamb.gradients.handles import Factors, Mark, ReducedGradient, ReducedGradients, version_of
from sharded_lamb.sharding.buckets import FlatBucket

Kept = tuple[bool, Tensor | None]
"""Whether the gradient in the shard stays, to be added to, and its factor (fp64 scalar; None: 1)."""


class AttachedGradients:
    """The handles of one optimizer's parameters; P parameters, in its order.

    A parameter that has a mark has a gradient in the shards. Its ``.grad`` is a handle of the mark, or, where the mark
    is *aside*, a gradient of this rank that the next reduction adds to it.
    """

    def __init__(self, owner: Callable[[], ReducedGradients | None]) -> None:
        """``owner``: a weak reference to the holder of the shards."""
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.removed: set[int] = set()
        """Parameters whose ``.grad`` was set to None since the last reduction."""
        self.zeroed: set[int] = set()
        """Parameters whose ``.grad`` was zeroed in place since the last reduction."""
        self._marks: list[Mark | None] = []
        self._aside: set[int] = set()
        self.kept_rounds: list[int] = []
        """[P] how many of the latest reductions added to the gradient that was in the shards. Reductions match by their
        number, so ranks whose counts are equal have summed the same gradients, whenever they zeroed."""
        self._versions: dict[
            int, int
        ] = {}  # of gradients that backward accumulated and no reduction includes
        self._owner, self._factors = owner, Factors()

    def __del__(self) -> None:
        """Free the handles of an optimizer that is deleted. No weak references to parameters: torch swaps none with."""
        if sys.is_finalizing():
            return
        for p in self.params:
            grad = p.grad
            if isinstance(grad, ReducedGradient) and (grad.mark is None or grad.mark.owner is self._owner):
                p.grad = None

    def extend(self, names: Sequence[str], params: Sequence[Tensor]) -> None:
        """Add parameters, without gradients."""
        self.names.extend(names)
        self.params.extend(params)
        self._marks.extend([None] * len(params))
        self.kept_rounds.extend([0] * len(params))

    def holds(self, mark: Mark) -> bool:
        """Whether ``mark`` stands for the gradient in the shards."""
        return self._marks[mark.param] is mark and mark.param not in self._aside

    # -- one parameter --------------------------------------------------------------------------------

    def own_gradient(self, param: int) -> Tensor | None:
        """This rank's own gradient in ``.grad``, that no reduction includes yet.

        Raises:
            RuntimeError: ``.grad`` is a handle of an earlier gradient or of another optimizer's.
        """
        grad = self.params[param].grad
        if not isinstance(grad, ReducedGradient):
            return grad
        if self._marks[param] is None or not self._is_handle(param, grad):
            raise self._assigned(param)
        return None

    def _is_handle(self, param: int, grad: Tensor) -> bool:
        return (
            isinstance(grad, ReducedGradient)
            and grad.mark is not None
            and grad.mark.origin is self._marks[param]
        )

    def has_gradient(self, param: int) -> bool:
        """Whether a gradient is in the shards or was zeroed in place: ``.grad`` was not set to None."""
        return self._marks[param] is not None and self.params[param].grad is not None

    def keeps(self, param: int, *, used: bool) -> bool:
        """Whether the shards keep the gradient of ``param``: its ``.grad`` was neither zeroed nor taken away.

        Args:
            used: a step has used the gradients.

        Raises:
            RuntimeError: ``.grad`` was assigned, and no step has used the reduced gradient.
        """
        mark, grad = self._marks[param], self.params[param].grad
        if mark is None:
            return False
        if param in self._aside:
            kept = grad is not None and not self._was_zeroed(param, grad)
        elif grad is None:
            kept = False
        elif isinstance(grad, ReducedGradient) and self._is_handle(param, grad):
            self._adopt(mark, grad)
            kept = not mark.is_zeroed
        elif used and not isinstance(grad, ReducedGradient):
            kept = False
        else:
            raise self._assigned(param)
        if not kept:
            self.drop(param)
        return kept

    def _was_zeroed(self, param: int, grad: Tensor) -> bool:
        """``model.zero_grad(set_to_none=False)``; reads the value only after an in-place write."""
        version = self._versions.get(param)
        return version is not None and version != grad._version and not bool(grad.any())

    @staticmethod
    def _adopt(mark: Mark, grad: ReducedGradient) -> None:
        """Take over the factor of a scaled copy that was assigned to ``.grad``."""
        copied = grad.mark
        if copied is not None and copied is not mark:
            mark.factor, mark.is_zeroed = copied.factor, copied.is_zeroed

    def _assigned(self, param: int) -> RuntimeError:
        return RuntimeError(
            f"the .grad of {self.names[param]!r} was assigned while stage=2 holds its reduced gradient, which no step "
            f"has used: assign gradients before backward has reduced others, call opt.zero_grad() first, or use stage=1"
        )

    def set_aside(self, param: int, *, used: bool) -> None:
        """Free ``.grad`` for the gradient that autograd is about to accumulate. Raises as `keeps`."""
        if self.keeps(param, used=used) and param not in self._aside:
            self._aside.add(param)
            self._versions.pop(param, None)
            self.params[param].grad = None

    def accumulated(self, param: int) -> None:
        """Note the gradient that autograd has accumulated."""
        grad = self.params[param].grad
        if grad is not None:
            self._versions[param] = grad._version

    def take_edits(self, param: int, *, used: bool) -> Kept:
        """Whether the shards keep the gradient, and its factor, which the caller applies to them. Raises as `keeps`."""
        keeps = self.keeps(param, used=used)
        self.kept_rounds[param] = self.kept_rounds[param] + 1 if keeps else 0
        mark = self._marks[param]
        if not keeps or mark is None:
            return False, None
        factor, mark.factor = mark.factor, None
        return True, factor

    def forget_rounds(self) -> None:
        """A step has used the gradients, on every rank."""
        self.kept_rounds = [0] * len(self.params)

    def attach(self, param: int, *, renew: bool) -> None:
        """Put a handle into ``.grad``; ``renew``: handles of earlier gradients become invalid."""
        p, mark = self.params[param], self._marks[param]
        self._aside.discard(param)
        self._versions.pop(param, None)
        if mark is None or renew:
            mark = self._marks[param] = Mark(self._owner, self.names[param], param, self._factors)
        if p.grad is None or not self._is_handle(param, p.grad):
            p.grad = ReducedGradient(p, mark, dtype=grad_dtype_of(p))
        elif isinstance(p.grad, ReducedGradient):
            p.grad.mark = mark

    def drop_absent(self, param: int) -> None:
        """`drop` a gradient that no rank has; its handles are zeros from now on."""
        mark = self._marks[param]
        if mark is not None:
            mark.is_absent = True
        self.drop(param)

    def drop(self, param: int) -> None:
        """Forget the gradient in the shards, and free ``.grad`` if it is a handle of it."""
        grad = self.params[param].grad
        if grad is not None and self._is_handle(param, grad):
            self.params[param].grad = None
        self._marks[param] = None
        self._aside.discard(param)
        self._versions.pop(param, None)

    def identity(self, param: int) -> tuple[Mark | Tensor, int] | None:
        """See `GradientSource.identities`: the mark stays if backward adds to a gradient in the shards."""
        grad, mark = self.params[param].grad, self._marks[param]
        if grad is None:
            return None
        if mark is not None and (param in self._aside or self._is_handle(param, grad)):
            return mark, 0
        return grad, version_of(grad)

    # -- all parameters -------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop all, and forget edits."""
        for param in self._marked():
            self.drop(param)
        self.removed.clear()
        self.zeroed.clear()
        self.forget_rounds()

    def zero(self) -> list[int]:
        """Zero handles in place, and drop gradients that ``.grad`` adds to or replaces: callers zero that too.

        Returns:
            As `collect_edits`.
        """
        for param in [*self._marked()]:
            grad = self.params[param].grad
            if (
                param not in self._aside
                and isinstance(grad, ReducedGradient)
                and self._is_handle(param, grad)
            ):
                grad.zero_()
            elif grad is not None:
                self.drop(param)
        self.forget_rounds()
        return self.collect_edits()

    @property
    def has_marks(self) -> bool:
        return any(mark is not None for mark in self._marks)

    def _marked(self) -> Iterator[int]:
        return (param for param, mark in enumerate(self._marks) if mark is not None)

    def _touched(self) -> list[int]:
        """The marked parameters whose ``.grad`` is no longer the handle it was given, or zeroed: mostly none."""
        touched = []
        for param, (p, mark) in enumerate(zip(self.params, self._marks, strict=True)):
            if mark is not None:
                grad = p.grad
                if type(grad) is not ReducedGradient or grad.mark is not mark or mark.is_zeroed:
                    touched.append(param)
        return touched

    def holds_any(self) -> bool:
        """Whether the shards hold a gradient whose ``.grad`` was neither set to None nor zeroed in place."""
        return any(self.has_gradient(param) and not self.is_zeroed(param) for param in self._marked())

    def is_zeroed(self, param: int) -> bool:
        """Whether ``.grad``, a handle or this rank's gradient, was zeroed in place."""
        grad = self.params[param].grad
        if isinstance(grad, ReducedGradient):
            return grad.mark is not None and grad.mark.is_zeroed
        return grad is not None and self._was_zeroed(param, grad)

    def expect(self, param: int) -> bool:
        """Attach a handle where there is no gradient, of one that another rank may have; False: there is one.

        Forgets one that was removed before.
        """
        p = self.params[param]
        if p.grad is not None or param in self._aside:
            return False
        self.drop(param)
        if p.requires_grad:
            self.attach(param, renew=True)
        return p.requires_grad

    def edits_during(self, fired: Container[int], awaited: Iterable[int]) -> tuple[list[int], list[int]]:
        """Take back the edits of gradients since their hooks have ``fired``, and the handles of ``awaited``.

        Returns:
            The parameters that were removed, and zeroed, for `repeat`.
        """
        zeroed = [*filter(self.is_zeroed, range(len(self.params)))]
        missing = [param for param, p in enumerate(self.params) if p.grad is None]
        removed = [param for param in missing if param in fired or self._marks[param] is not None]
        for param in removed:
            if self._marks[param] is not None:
                self.attach(param, renew=False)
        for param in awaited:
            self.drop(param)
        return removed, zeroed

    def repeat(self, removed: Iterable[int], zeroed: Iterable[int]) -> None:
        """Edit gradients as `edits_during` found."""
        for param in removed:
            self.params[param].grad = None
        for param in zeroed:
            mark = self._marks[param]
            if mark is not None:
                mark.zero()

    def has_own_gradients(self, params: Sequence[int]) -> bool:
        """Whether any ``.grad`` is no handle."""
        grads = (self.params[param].grad for param in params)
        return any(grad is not None and not isinstance(grad, ReducedGradient) for grad in grads)

    def check(self, *, used: bool) -> None:
        """Raises RuntimeError as `keeps`; changes nothing."""
        for param in self._touched():
            grad = self.params[param].grad
            if grad is None or param in self._aside or self._is_handle(param, grad):
                continue
            if not used or isinstance(grad, ReducedGradient):
                raise self._assigned(param)

    def collect_edits(self) -> list[int]:
        """Parameters newly removed or zeroed; afterwards `removed` and `zeroed` contain them."""
        edited = []
        for param in self._touched():
            mark, grad = self._marks[param], self.params[param].grad
            assert mark is not None
            if param in self._aside:
                continue
            if grad is None:
                self.drop(param)
                self.removed.add(param)
                edited.append(param)
            elif isinstance(grad, ReducedGradient) and self._is_handle(param, grad):
                self._adopt(mark, grad)
                if mark.is_zeroed and param not in self.zeroed:
                    self.zeroed.add(param)
                    edited.append(param)
        return edited

    def factor(self) -> Tensor | None:
        """The factor that the shards lack: fp64 scalar if it is common to all, else [P]; None: 1."""
        marks = [mark for mark in self._marks if mark is not None and not mark.is_zeroed]
        first = marks[0].factor if marks else None
        return first if all(mark.factor is first for mark in marks) else self._factors_of_all()

    def _factors_of_all(self) -> Tensor | None:
        """[P] fp64; None: all are 1."""
        factors = [None if mark is None or mark.is_zeroed else mark.factor for mark in self._marks]
        given = next((factor for factor in factors if factor is not None), None)
        if given is None:
            return None
        one = torch.ones_like(given)
        return torch.stack([one if factor is None else factor for factor in factors])

    def signature(self) -> Tensor | None:
        """fp64 scalar: an integer below 2³¹ that differs between ranks whose edits differ; None: no edits, as 0."""
        edits = hash((tuple(sorted(self.removed)), tuple(sorted(self.zeroed)))) % _PRIME
        edits = edits if self.removed or self.zeroed else 0
        if self.params[0].device.type == "cpu":  # on a GPU it would be copied to the device in every step
            edits = (edits + (hash(tuple(self.kept_rounds)) if any(self.kept_rounds) else 0)) % _PRIME
        factors = self._factors_of_all()
        if factors is None:
            return torch.tensor(float(edits), dtype=torch.float64, device="cpu") if edits else None
        bits = factors.view(torch.int64) - torch.ones_like(factors).view(torch.int64)
        weights = torch.arange(1, len(bits) + 1, device=bits.device) * 2 + 1
        return ((bits * weights).sum().remainder(_PRIME) + edits).remainder(_PRIME).to(torch.float64)

    def described_edits(self) -> list[tuple[str, str]]:
        """What `signature` hashes, by parameter."""
        described = []
        for param, mark in enumerate(self._marks):
            factor = None if mark is None or mark.is_zeroed else mark.factor
            edit = "zeroed" if param in self.zeroed else "set to None" if param in self.removed else "none"
            edit = edit if factor is None else f"scaled by {float(factor):.6g}"
            label = f"edits of .grad of {self.names[param]!r}, and earlier reductions that it keeps"
            described.append((label, f"{edit}, {self.kept_rounds[param]}"))
        return described


_PRIME = 2**31 - 1


def apply_edits(bucket: FlatBucket, kept: Sequence[Kept]) -> bool:
    """Zero and scale gradients in the shard of ``bucket`` as users did; False: none of them is kept."""
    if not any(keeps for keeps, _ in kept):
        return False
    for param, (keeps, factor) in zip(bucket.plan.params, kept, strict=True):
        if not keeps:
            bucket.slice_of(param, bucket.shard.grad).zero_()
        elif factor is not None:
            bucket.slice_of(param, bucket.shard.grad).mul_(factor.to(bucket.shard.grad.dtype))
    return True
