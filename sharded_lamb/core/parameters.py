"""Parameters passed to an optimizer: names, groups, and the checks that LAMB can update them."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

NamedParameter = tuple[str, Tensor, dict[str, Any]]
"""(name without wrappers' prefixes, parameter, its group)."""


def named(group: Mapping[str, Any]) -> Iterable[tuple[str | None, Tensor]]:
    """(name or None, parameter) of every parameter of ``group``."""
    params: list[Tensor] = group["params"]
    names: list[str | None] = group.get("param_names") or [None] * len(params)
    return zip(names, params, strict=True)


class Grouping:
    """The groups and their parameters at one time: a program may replace, move or remove any of them.

    Attributes:
        params: all groups' parameters, in order.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._groups, self._sizes = [*groups], [len(group["params"]) for group in groups]
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]

    def equals(self, other: "Grouping | None") -> bool:
        """Whether both have the same objects."""
        return (
            other is not None
            and self._sizes == other._sizes
            and all(map(operator.is_, self._groups, other._groups))
            and all(map(operator.is_, self.params, other.params))
        )


def follow_names(
    groups: Sequence[dict[str, Any]], known: Mapping[Tensor, str | None]
) -> dict[Tensor, str | None]:
    """Bring ``param_names`` to the parameters that a program added, removed or moved without them.

    A parameter keeps its name in ``known``; a new one has the name in its place, if its group has a name for each
    parameter, else none.

    Returns:
        {parameter of ``groups``: its name}.

    Raises:
        ValueError: a parameter is in two places.
    """
    now: dict[Tensor, str | None] = {}
    for index, group in enumerate(groups):
        params, names = group["params"], group.get("param_names") or []
        in_place = names if len(names) == len(params) else [None] * len(params)
        found = [known.get(p, name) for p, name in zip(params, in_place, strict=True)]
        for position, (name, p) in enumerate(zip(found, params, strict=True)):
            if p in now:
                shown = name or f"group{index}.param{position}"
                raise ValueError(
                    f"parameter {shown!r} is passed twice: pass each parameter once, in one group"
                )
            now[p] = name
        if any(found) and found != names:
            group["param_names"] = found
    return now


def shape_of(p: Tensor) -> Sequence[int]:
    """The shape of the full parameter: DeepSpeed's ZeRO-3 replaces ``p.data`` by an empty tensor."""
    shape: Sequence[int] = getattr(p, "ds_shape", p.shape)
    return shape


def ndim_of(p: Tensor) -> int:
    """Dimensions of the full parameter."""
    return len(shape_of(p))


GRAD_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of gradients that kernels read."""


def grad_dtype_of(p: Tensor) -> torch.dtype:
    """The dtype of gradients of ``p``; its own one where it takes any. Older versions of torch have no other one."""
    dtype: torch.dtype | None = getattr(p, "grad_dtype", None)
    return dtype or p.dtype


def check_parameter(name: str, p: Tensor) -> None:
    """Reject a parameter whose LAMB step would be silently wrong.

    Raises:
        TypeError: not a real floating-point, dense parameter, or its gradients have a dtype out of `GRAD_DTYPES`.
        ValueError: a parameter of FSDP1.
    """
    if p.is_complex():
        raise TypeError(
            f"parameter {name!r} is {p.dtype}: LAMB is defined for real parameters, not complex ones"
        )
    if not p.is_floating_point():
        raise TypeError(f"parameter {name!r} is {p.dtype}: LAMB updates floating-point parameters")
    if p.layout is not torch.strided:
        raise TypeError(f"parameter {name!r} has layout {p.layout}: LAMB needs dense (strided) parameters")
    if (given := getattr(p, "grad_dtype", None)) is not None and given not in GRAD_DTYPES:
        raise TypeError(
            f"parameter {name!r} has grad_dtype={given}: LAMB reads gradients of {', '.join(map(str, GRAD_DTYPES))}"
        )
    is_flat = getattr(p, "_is_flat_param", False) or type(p).__name__ == "FlatParameter"
    if is_flat or getattr(p, "_fsdp_flattened", False):  # the latter with use_orig_params
        raise ValueError(
            f"parameter {name!r} is {'a flat parameter' if is_flat else 'a view of a flat parameter'} of FSDP1, which "
            f"mixes parameters in one tensor and shards it anywhere: a rank cannot know a parameter's norm, so its "
            f"trust ratio would be wrong. Use torch.distributed.fsdp.fully_shard, or ShardedLamb(stage=2) on the bare "
            f"model"
        )


def all_strided(grads: Iterable[Tensor | None]) -> bool:
    """Whether no gradient is sparse; None: no gradient."""
    return {grad.layout for grad in grads if grad is not None} <= {torch.strided}


def check_gradients(names: Sequence[str], grads: Sequence[Tensor | None]) -> None:
    """`check_gradient` for many; None: no gradient."""
    if not all_strided(grads):
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                check_gradient(name, grad)


def check_gradient(name: str, grad: Tensor) -> None:
    """Raises TypeError for a sparse gradient, as torch's own Adam does."""
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {name!r} has layout {grad.layout}: LAMB needs dense gradients "
            f"(torch.nn.Embedding(sparse=False))"
        )
