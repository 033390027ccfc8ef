"""The model of a program, in torch: layers in a chain, linear in their parameters."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from tests.fuzz import program as data
from tests.fuzz.program import Program, Slot


class Planned(Exception):
    """The exception that a program raises in a module's backward."""


class _Raise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise Planned


class _AllReduce(torch.autograd.Function):
    """A collective of the user's in backward, as SyncBatchNorm makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        summed = grads[0].clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed / dist.get_world_size(ctx.group), None


def _parameter(slot: Slot) -> Parameter:
    value = torch.from_numpy(data.weight(slot)).to(getattr(torch, slot.dtype))
    value = value.clone(memory_format=torch.contiguous_format)  # numpy's empty arrays have odd strides
    if slot.transposed:
        value = value.t().contiguous().t()
    return Parameter(value)


class Layer(nn.Module):
    def forward(self, x: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        for p, c in zip((getattr(self, name) for name in self.attributes), coefficients, strict=True):
            x = x + (p * c.to(p.dtype)).sum(dtype=torch.float64)
        return x

    attributes: Sequence[str] = ()


class Net(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        named: dict[str, Parameter] = {}
        self.layers = nn.ModuleList()
        for slots in program.layers:
            layer = Layer()
            layer.attributes = "abc"[: len(slots)]
            for attribute, slot in zip(layer.attributes, slots, strict=True):
                if slot.name not in named:
                    named[slot.name] = _parameter(slot)
                layer.register_parameter(attribute, named[slot.name])
            self.layers.append(layer)

    def forward(
        self,
        part: Sequence[int],
        rank: int,
        key: int,
        fail: int | None = None,
        collective: int | None = None,
        group: dist.ProcessGroup | None = None,
        nan: bool = False,
    ) -> Tensor:
        """The loss, whose gradients are `program.gradient`'s."""
        x = torch.zeros((), dtype=torch.float64, requires_grad=True)
        for index, slots in enumerate(self.program.layers):
            if index == fail:
                x = _Raise.apply(x)  # type: ignore[no-untyped-call]
            if index in part:
                values = [data.gradient(slot, index, self.program.source_of(rank), key) for slot in slots]
                x = self.layers[index](
                    x, [torch.from_numpy(value) * (torch.nan if nan else 1) for value in values]
                )
            if index == collective and group is not None:
                x = _AllReduce.apply(x, group)  # type: ignore[no-untyped-call]
        if fail == len(self.program.layers):
            x = _Raise.apply(x)  # type: ignore[no-untyped-call]
        return x
