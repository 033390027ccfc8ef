"""The ``.grad`` of a gradient that stage 2 has reduced and freed: a tensor without memory.

Its 2-norm is the averaged gradient's. Scaling by a number, zeroing and ``GradScaler`` act on the next step. Other
results that follow from its values are NaN; those that cannot be NaN, and every other edit, raise RuntimeError.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from sharded_lamb.core.host_values import as_tensor

aten = torch.ops.aten


class ReducedGradients(Protocol):
    """The owner of reduced gradients, as handles reach it."""

    def holds(self, origin: "Mark") -> bool:
        """Whether ``origin`` still stands for the gradient in the shards."""

    def square_sum(self, param: int) -> Tensor | None:
        """Σg² of a parameter over all ranks: fp64 scalar; None inside backward. May be collective."""

    def any_bad(self) -> Tensor:
        """Bool scalar: a gradient is non-finite on any rank. May be collective."""


class Factors:
    """Products of factors; equal ones of many handles are one tensor, so that a common factor shows by identity."""

    def __init__(self) -> None:
        self._last: tuple[Tensor | None, Any, int, bool, Tensor] | None = None

    def times(self, factor: Tensor | None, by: Any, *, divides: bool, device: torch.device) -> Tensor:
        """``factor`` (None: 1) times ``by``, or divided by it: fp64 scalar on ``device``."""
        version = by._version if isinstance(by, Tensor) else 0
        if self._last is not None:
            last_factor, last_by, last_version, last_divides, product = self._last
            same = last_by is by or (
                not isinstance(by, Tensor) and type(last_by) is type(by) and last_by == by
            )
            if last_factor is factor and same and (last_version, last_divides) == (version, divides):
                return product
        scale = as_tensor(by).detach().to(device, torch.float64).reshape(())
        one = torch.ones((), dtype=torch.float64, device=device) if factor is None else factor
        product = one / scale if divides else one * scale
        self._last = factor, by, version, divides, product
        return product


@dataclass(eq=False, slots=True, weakref_slot=True)
class Mark:
    """The gradient that a handle stands for, and its factor; views of a handle share it, copies have their own."""

    owner: Callable[[], ReducedGradients | None]  # weak: a model may outlive its optimizer
    name: str
    param: int
    factors: Factors
    factor: Tensor | None = None  # fp64 scalar, not yet in the shards; None: 1
    is_zeroed: bool = False
    is_absent: bool = (
        False  # no rank had a gradient; a handle that was read before that was known means zeros
    )
    gave_nan: bool = False  # something unknown, NaN, was computed from it
    copy_of: "Mark | None" = None

    @property
    def origin(self) -> "Mark":
        """The mark of the parameter's ``.grad``."""
        return self if self.copy_of is None else self.copy_of

    def copied(self) -> "Mark":
        return replace(self, copy_of=self.origin)

    def holder(self) -> ReducedGradients | None:
        """The owner, while it still has the gradient."""
        owner = self.owner()
        return owner if owner is not None and owner.holds(self.origin) else None

    def scale(self, by: Any, *, divides: bool, device: torch.device) -> None:
        self.factor = self.factors.times(self.factor, by, divides=divides, device=device)

    def zero(self) -> None:
        self.factor, self.is_zeroed = None, True

    def norm(self, device: torch.device) -> Tensor:
        """2-norm of the averaged gradient times the factor: fp64 scalar, NaN if it is not known (any more)."""
        holder = self.holder()
        square_sum = None if holder is None or self.is_zeroed else holder.square_sum(self.param)
        if self.origin.is_absent or (self.is_zeroed and holder is not None):
            return torch.zeros((), dtype=torch.float64, device=device)
        # Settling may have dropped it. A copy of a gradient that was zeroed since is no longer known.
        if square_sum is None or self.holder() is None or self.origin.is_zeroed:
            self.origin.gave_nan = True
            return torch.full((), torch.nan, dtype=torch.float64, device=device)
        norm = square_sum.sqrt()
        return norm if self.factor is None else norm * self.factor.abs()


class ReducedGradient(Tensor):
    """A tensor of a parameter's shape, strides and gradients' dtype, without memory.

    Attributes:
        mark: None: all NaN, a result of other operations.
        is_part: a view of some elements of the gradient.
    """

    mark: Mark | None
    is_part: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        mark: Mark | None,
        device: torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
        is_part: bool = False,
    ) -> "ReducedGradient":
        handle: ReducedGradient = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype or like.dtype, device=device or like.device
        )
        handle.mark, handle.is_part = mark, is_part
        return handle

    def __init__(
        self,
        like: Tensor,
        mark: Mark | None,
        device: torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
        is_part: bool = False,
    ) -> None:
        """See the class; sized as ``like``, with its device and dtype where they are None."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        of = "NaN" if self.mark is None else f"of {self.mark.name!r}, reduced and freed by stage=2"
        return f"ReducedGradient({of}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(_refused("pickling", self.mark))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    def share_memory_(self) -> "ReducedGradient":
        """Does nothing: there is no memory."""
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        handler = _HANDLERS.get(func.overloadpacket)
        result = NotImplemented if handler is None else handler(func, args, kwargs)
        return _without_values(func, args, kwargs) if result is NotImplemented else result


def _refused(operation: str, mark: Mark | None) -> str:
    whose = "a gradient" if mark is None else f"the gradient of {mark.name!r}"
    if mark is not None and mark.owner() is None:
        return f"{operation} on {whose}, of an optimizer that no longer exists: call model.zero_grad() first"
    if mark is not None and mark.holder() is None:
        return f"{operation} on {whose}, which was zeroed or replaced since: read .grad again"
    node = torch._C._current_autograd_node()
    if node is not None and node.name() == "torch::autograd::AccumulateGrad":
        return (
            f"backward adds to {whose}, which stage=2 has reduced and freed: the model was converted or moved since "
            f"(model.to(…), model.double()), which removes hooks. Call zero_grad() before this backward"
        )
    return (
        f"{operation} on {whose}, which stage=2 has reduced and freed: its norm can be read, and it can be scaled by a "
        f"number, zeroed or set to None. To clip, call opt.clip_grad_norm_(max_norm) or pass max_grad_norm; "
        f"for other edits, and schedules that add to .grad (zero bubble), run backward inside opt.no_sync(), or use "
        f"stage=1"
    )


# -- operations that are honoured --------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    if isinstance(value, ReducedGradient):
        return False
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))


def _alias(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A view of all elements: shares the mark."""
    handle = args[0]
    like = func(_meta(handle), *args[1:], **kwargs)
    return ReducedGradient(like, handle.mark, handle.device, is_part=handle.is_part)


def _copy(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A copy, also on another device or in another floating-point dtype: has a mark of its own."""
    device = torch.device(kwargs.pop("device", None) or args[0].device)
    kwargs.pop("pin_memory", None)
    like, mark = func(_meta(args[0]), *args[1:], **kwargs), None if args[0].is_part else args[0].mark
    if not like.is_floating_point():
        raise RuntimeError(_refused(str(func), mark))
    return ReducedGradient(like, None if mark is None else mark.copied(), device)


def _scaled_copy(divides: bool) -> Callable[..., Any]:
    def handler(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        handle, by = (args[1], args[0]) if _is_number(args[0]) and not divides else args[:2]
        if kwargs or not isinstance(handle, ReducedGradient) or not _is_number(by):
            return NotImplemented
        if handle.mark is None or handle.is_part:
            return NotImplemented
        mark = handle.mark.copied()
        mark.scale(by, divides=divides, device=handle.device)
        return ReducedGradient(func(*tree_map(_meta, args)), mark, handle.device)

    return handler


def _scaled(divides: bool) -> Callable[..., Any]:
    """In place; one handle, or a list that may hold plain tensors too."""

    def handler(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        target, by = args[:2]
        if kwargs or len(args) > 2:
            return NotImplemented
        if isinstance(target, Tensor):
            return target if _scale(target, by, divides) else NotImplemented
        factors = by if isinstance(by, (list, tuple)) else [by] * len(target)
        if not all(_is_number(each) for each in factors):
            return NotImplemented
        for tensor, each in zip(target, factors, strict=True):
            _scale(tensor, each, divides)
        return None

    return handler


def _scale(tensor: Tensor, by: Any, divides: bool) -> bool:
    if not _is_number(by):
        return False
    if not isinstance(tensor, ReducedGradient):
        tensor.div_(by) if divides else tensor.mul_(by)
    elif tensor.mark is not None:
        _check_whole(tensor, "scaling")
        _check_factor(tensor.mark, by)
        tensor.mark.scale(by, divides=divides, device=tensor.device)
    return True


def _check_whole(handle: ReducedGradient, operation: str) -> None:
    """Raises RuntimeError unless all elements of a gradient that is still held would be changed alike."""
    if handle.mark is not None and (_is_stale(handle.mark) or handle.is_part):
        raise RuntimeError(_refused(f"{operation} a part" if handle.is_part else operation, handle.mark))


def _is_stale(mark: Mark) -> bool:
    return mark.holder() is None and not mark.origin.is_absent


def _check_factor(mark: Mark, by: Any) -> None:
    """Raises RuntimeError for NaN that may come from an unknown value; on a CPU, where the host does not wait for it.

    The norm of all gradients of a model is NaN if one of another optimizer is.
    """
    if not isinstance(by, Tensor) or by.device.type != "cpu" or not bool(by.isnan().any()):
        return
    if not mark.origin.gave_nan:
        return
    holder = mark.holder()
    if holder is not None and not bool(holder.any_bad()):
        raise RuntimeError(_refused("scaling by NaN (of its norms only the 2-norm is known)", mark))


def _zeroed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if len(args) > 1 and (isinstance(args[1], Tensor) or args[1] != 0):  # fill_
        return NotImplemented
    for tensor in args[0] if isinstance(args[0], (list, tuple)) else [args[0]]:
        if not isinstance(tensor, ReducedGradient):
            tensor.zero_()
        elif tensor.mark is not None:
            _check_whole(tensor, "zeroing")
            tensor.mark.zero()
    return args[0] if isinstance(args[0], Tensor) else None


def _norm(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The 2-norm of all elements."""
    handle, order = args[0], args[1] if len(args) > 1 else 2
    result = func(*tree_map(_meta, args), **kwargs)
    if order not in (2, None) or result.numel() != 1 or not isinstance(handle, ReducedGradient):
        return NotImplemented
    if handle.mark is None or handle.is_part:
        return NotImplemented
    return handle.mark.norm(handle.device).to(result.dtype).reshape(result.shape)


def _foreach_norm(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    dtype = args[2] if len(args) > 2 else kwargs.get("dtype")
    return [torch.linalg.vector_norm(tensor, order, dtype=dtype) for tensor in args[0]]


def _unscaled(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``GradScaler``'s check and unscaling of a list, which may hold plain tensors too."""
    grads, found_inf, inverse = args
    plain = [grad for grad in grads if not isinstance(grad, ReducedGradient)]
    marks = [grad.mark for grad in grads if isinstance(grad, ReducedGradient)]
    if plain:
        func(plain, found_inf, inverse)
    for mark in marks:
        if mark is None or _is_stale(mark):
            raise RuntimeError(_refused("GradScaler", mark))
    for owner in {id(mark.owner()): mark.holder() for mark in marks if mark is not None}.values():
        if owner is not None:
            found_inf.copy_(torch.maximum(found_inf, owner.any_bad().to(found_inf)))
    for mark in marks:
        if mark is not None:
            mark.scale(inverse, divides=False, device=grads[0].device)
    return None


def _item(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    _note_nan(func, args)
    return torch.nan


def _made_alike(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A new tensor that depends on no value."""
    stand_in = torch.empty((), dtype=args[0].dtype, device=args[0].device).expand(args[0].shape)
    return func(stand_in, *args[1:], **kwargs)


def _nothing(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    return None


_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys([aten.detach, aten.alias, aten.view, aten._unsafe_view, aten._reshape_alias], _alias),
    **dict.fromkeys([aten.t, aten.transpose, aten.permute, aten.squeeze, aten.unsqueeze], _alias),
    **dict.fromkeys([aten.clone, aten._to_copy], _copy),
    aten.mul: _scaled_copy(divides=False),
    aten.div: _scaled_copy(divides=True),
    **dict.fromkeys([aten.mul_, aten._foreach_mul_], _scaled(divides=False)),
    **dict.fromkeys([aten.div_, aten._foreach_div_], _scaled(divides=True)),
    **dict.fromkeys([aten.zero_, aten._foreach_zero_, aten.fill_], _zeroed),
    **dict.fromkeys([aten.norm, aten.linalg_vector_norm], _norm),
    aten._foreach_norm: _foreach_norm,
    aten._amp_foreach_non_finite_check_and_unscale_: _unscaled,
    aten._local_scalar_dense: _item,
    aten.record_stream: _nothing,
    **dict.fromkeys([aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like], _made_alike),
    **dict.fromkeys([aten.rand_like, aten.randn_like, aten.randint_like], _made_alike),
    **dict.fromkeys([aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full], _made_alike),
    aten.new_empty_strided: _made_alike,
}


# -- every other operation ---------------------------------------------------------------------------


def _meta(value: Any) -> Any:
    """A tensor without memory in place of a tensor."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _without_values(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """NaN of the shape and dtype of the result.

    Raises:
        RuntimeError: the result cannot be NaN, or a reduced gradient or a plain tensor would be written.
    """
    handles = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, ReducedGradient)]
    mark = next((handle.mark for handle in handles if handle.mark is not None), None)
    refusal = RuntimeError(_refused(str(func), mark))
    if func._schema.is_mutable:
        written = _written(func, args, kwargs)
        if not all(isinstance(t, ReducedGradient) and _is_free(t) for t in written):
            raise refusal
        _note_nan(func, handles)
        for tensor in written:
            tensor.mark = None
        return args[0] if len(written) == 1 else None
    device = kwargs.pop("device", None) or handles[0].device
    try:
        results = func(*tree_map(_meta, args), **tree_map(_meta, kwargs))
    except (NotImplementedError, RuntimeError) as error:
        raise refusal from error
    leaves = tree_flatten(results)[0]
    if not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        raise refusal
    if any(returned.alias_info is not None for returned in func._schema.returns):
        viewed = handles[0]
        return tree_map(lambda leaf: ReducedGradient(leaf, viewed.mark, device, is_part=True), results)
    _note_nan(func, handles)
    return tree_map(lambda leaf: _nan(leaf, device), results)


def _note_nan(func: Any, handles: Sequence[Any]) -> None:
    """Warns of NaN that ``func`` computes from gradients, once for each operation."""
    marks = [handle.mark for handle in handles if handle.mark is not None]
    for mark in marks:
        mark.origin.gave_nan = True
    if marks:
        warnings.warn(
            f"{func} reads the values of a gradient that stage=2 has reduced and freed: the result is NaN. Programs "
            f"that compute with gradients need stage=1 and DistributedDataParallel",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_free(handle: ReducedGradient) -> bool:
    """Whether an edit reaches no gradient: a copy, or NaN."""
    return handle.mark is None or (handle.mark.copy_of is not None and not handle.is_part)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Tensors that the operation writes."""
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return [leaf for leaf in tree_flatten(written)[0] if isinstance(leaf, Tensor)]


def _nan(like: Tensor, device: torch.device) -> Tensor:
    """NaN, with memory if it is one number."""
    if like.numel() <= 1:
        return torch.full(like.shape, torch.nan, dtype=like.dtype, device=device)
    return ReducedGradient(like, None, device)


def version_of(grad: Tensor) -> int:
    """The number of changes of ``grad`` in place, but those that a handle applies itself."""
    return 0 if isinstance(grad, ReducedGradient) else grad._version
