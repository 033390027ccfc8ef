"""Whole parameters on one device, with gradients and moments where they are, as shards for the kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharded_lamb import kernels
from sharded_lamb.kernels import ScatteredShard
from sharded_lamb.sharding.buckets import flattened, in_memory_order, memory_strides

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of a step. ``row``: its index among all parameters of all groups."""

    row: int
    p: Tensor
    grad: Tensor
    state: dict[str, Tensor]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return self.p.dtype, self.grad.dtype, self.state["exp_avg"].dtype


def zero_moment(p: Tensor) -> Tensor:
    """Zeros of ``p``'s shape in its memory order: fp32, or fp64 for a float64 parameter."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    return torch.empty_strided(p.shape, memory_strides(p), dtype=dtype, device=p.device).zero_()


class _Pieces:
    """Parameters of one dtype and their moments, as a shard without gradients."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.strides = [memory_strides(entry.p) for entry in entries]
        for entry, strides in zip(entries, self.strides, strict=True):
            for key in MOMENTS:
                moment = entry.state[key]
                if moment.stride() != strides:  # loaded, or the parameter's memory format has changed
                    empty = torch.empty_strided(
                        moment.shape, strides, dtype=moment.dtype, device=moment.device
                    )
                    entry.state[key] = empty.copy_(moment)
        self._tensors, self._layout = _tensors(entries), _layout(entries)
        weight, exp_avg, exp_avg_sq = (
            [
                flattened(tensor.detach(), strides)
                for tensor, strides in zip(tensors, self.strides, strict=True)
            ]
            for tensors in self._tensors
        )
        self._copies = [
            (entry.p, flat.as_strided(entry.p.shape, strides))
            for entry, flat, strides in zip(entries, weight, self.strides, strict=True)
            if flat.data_ptr() != entry.p.data_ptr()
        ]
        rows = tuple(entry.row for entry in entries)
        self._shard = ScatteredShard(rows, weight, [], exp_avg, exp_avg_sq)

    def are_of(self, entries: Sequence[Entry]) -> bool:
        """Whether ``entries`` have the parameters and moments of this shard, which keeps their memory alive."""
        return _layout(entries) == self._layout

    def with_gradients(self, grads: list[Tensor]) -> ScatteredShard:
        for p, copy in self._copies:
            copy.copy_(p.detach())
        return self._shard.with_gradients(
            [g for g in in_memory_order([*grads], self.strides) if g is not None]
        )

    def write_back(self) -> None:
        """Write parameters with gaps in memory, which the kernels updated in copies."""
        for p, copy in self._copies:
            p.copy_(copy)


def _tensors(entries: Sequence[Entry]) -> tuple[list[Tensor], ...]:
    return ([entry.p for entry in entries], *([entry.state[key] for entry in entries] for key in MOMENTS))


def _layout(entries: Sequence[Entry]) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Addresses and strides: a program may have replaced a tensor's memory (``p.data = …``)."""
    address: Any = Tensor.data_ptr
    stride: Any = Tensor.stride
    parameters, *moments = _tensors(entries)
    return [list(map(address, each)) for each in (parameters, *moments)], list(map(stride, parameters))


class WholeTensors:
    """Parameters on one device as shards; those of the step before serve again while their memory is the same."""

    def __init__(self, device: torch.device) -> None:
        self.kernel = kernels.choose("auto", device)
        self._pieces: dict[tuple[torch.dtype, ...], _Pieces] = {}

    def shards(self, entries: Sequence[Entry]) -> list[ScatteredShard]:
        """One shard for each combination of dtypes."""
        alike: dict[tuple[torch.dtype, ...], list[Entry]] = {}
        for entry in entries:
            alike.setdefault(entry.dtypes, []).append(entry)
        kept = self._pieces
        self._pieces = {
            dtypes: kept[dtypes] if dtypes in kept and kept[dtypes].are_of(each) else _Pieces(each)
            for dtypes, each in alike.items()
        }
        return [
            self._pieces[dtypes].with_gradients([entry.grad for entry in each])
            for dtypes, each in alike.items()
        ]

    def write_back(self) -> None:
        """After pass 2: see `_Pieces.write_back`."""
        for pieces in self._pieces.values():
            pieces.write_back()
