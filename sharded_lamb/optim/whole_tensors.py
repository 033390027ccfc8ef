"""Whole parameters on one device, with gradients and moments where they are, as shards for the kernels."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.core.layers import Sources, check_order, repeated
from sharded_lamb.core.layout import Segment
from sharded_lamb.core.options import OptionTable
from sharded_lamb.kernels import Kernel, ScatteredShard
from sharded_lamb.sharding.buckets import flattened, in_memory_order, memory_strides, with_own_storage
from sharded_lamb.sharding.memory_record import MemoryRecord

_ADDRESS: Any = Tensor.data_ptr

State = dict[str, Tensor]
"""Of one parameter: ``step``, fp64 scalar on the CPU, and the moments in its shape."""


def new_state(p: Tensor, moments: Sequence[str]) -> State:
    """Step 0, and ``moments`` of zeros in ``p``'s memory order: fp32, or fp64 for a float64 parameter."""
    dtype = torch.promote_types(p.dtype, torch.float32)

    def zeros() -> Tensor:
        return torch.empty_strided(p.shape, memory_strides(p), dtype=dtype, device=p.device).zero_()

    return {"step": torch.zeros((), dtype=torch.float64, device="cpu"), **{key: zeros() for key in moments}}


class _Pieces:
    """Parameters with the same dtypes and their moments, as a shard without gradients: a piece for each layer."""

    def __init__(
        self,
        positions: list[int],
        params: Sequence[Tensor],
        states: Sequence[State],
        moments: Sequence[str],
        cut: tuple[Sequence[Segment], Sources],
    ) -> None:
        """``positions``: of these parameters, in the sequence of `WholeTensors`. ``cut``: see `Layers.cut`."""
        self.positions, (self._segments, self._sources) = positions, cut
        self._params = params
        self._strides = [memory_strides(p) for p in params]
        for state, strides in zip(states, self._strides, strict=True):
            for key in moments:
                moment = state[key]
                if moment.stride() != strides:  # loaded, or the parameter's memory format has changed
                    empty = torch.empty_strided(
                        moment.shape, strides, dtype=moment.dtype, device=moment.device
                    )
                    state[key] = empty.copy_(moment)
        self._flat = [self._flattened(p.detach() for p in params)]
        self._flat += [self._flattened(state[key] for state in states) for key in moments]
        self._copies = [
            (p, flat.as_strided(p.shape, strides))
            for p, flat, strides in zip(params, self._flat[0], self._strides, strict=True)
            if flat.data_ptr() != p.data_ptr()
        ]

    def _flattened(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [flattened(tensor, strides) for tensor, strides in zip(tensors, self._strides, strict=True)]

    def shard(self) -> ScatteredShard:
        params = tuple(segment.param for segment in self._segments)
        if self._sources is None:
            weight, exp_avg, *second = self._flat
            return ScatteredShard(params, weight, [], exp_avg, second[0] if second else None)
        starts = [segment.start for segment in self._segments]
        weight, exp_avg, *second = (
            [
                flat[segment.start : segment.start + segment.length]
                for flat, segment in zip(repeated(kind, self._sources), self._segments, strict=True)
            ]
            for kind in self._flat
        )
        return ScatteredShard(params, weight, [], exp_avg, second[0] if second else None, grad_starts=starts)

    def in_memory_order(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """These pieces' gradients. Brings parameters with gaps in memory into the shard's copies."""
        for p, copy in self._copies:
            copy.copy_(p.detach())
        own = [grads[position] for position in self.positions]
        return repeated([g for g in in_memory_order([*own], self._strides) if g is not None], self._sources)

    def write_back(self) -> None:
        """Write parameters with gaps in memory, which the kernels updated in copies."""
        for p, copy in self._copies:
            p.copy_(copy)


class WholeTensors:
    """Some parameters of one device, which serve for all steps in which these have a gradient.

    Attributes:
        rows: the index of each parameter among all parameters of all groups.
        steps: fp64 on the CPU, in that order; the states' ``step`` are its elements.
    """

    def __init__(
        self,
        kernel: Kernel,
        device: torch.device,
        rows: list[int],
        params: list[Tensor],
        states: list[State],
        moments: Sequence[str],
        table: OptionTable,
    ) -> None:
        """``table``: of all parameters of all groups."""
        self.kernel, self.device, self.rows, self._params, self._states = kernel, device, rows, params, states
        self._keys, self._table = moments, table
        self.steps = torch.stack([state["step"] for state in states])
        self._elements = [with_own_storage(step, (), ()) for step in torch.split(self.steps, 1)]
        for state, step in zip(states, self._elements, strict=True):
            state["step"] = step
        self._grad_dtypes: list[torch.dtype] = []
        self._kinds: list[tuple[_Pieces, ScatteredShard]] = []
        self._record = MemoryRecord([])  # of the parameters
        self._moments: list[Tensor] = []
        self._addresses: list[int] = []  # of the moments

    def steps_of(self, count: int) -> Tensor:
        """[count] fp64 on the device: each row's step, 0 for rows that are not among these."""
        step = torch.zeros(count, dtype=torch.float64, device="cpu")
        step[self.rows] = self.steps
        return step.to(self.device)

    def shards(self, grads: Sequence[Tensor]) -> list[ScatteredShard]:
        """One shard for each combination of dtypes. ``grads``: one per parameter."""
        self._take_steps()
        dtypes = [grad.dtype for grad in grads]
        if dtypes != self._grad_dtypes or self._have_moved():
            self._kinds, self._grad_dtypes = self._divide(dtypes), dtypes
            self._record, self._moments = MemoryRecord(self._params), self._moments_now()
            self._addresses = list(map(_ADDRESS, self._moments))
        return [shard.with_gradients(pieces.in_memory_order(grads)) for pieces, shard in self._kinds]

    def _moments_now(self) -> list[Tensor]:
        return [state[key] for key in self._keys for state in self._states]

    def _have_moved(self) -> bool:
        """Whether a program has replaced the memory of a parameter, or a moment."""
        moments = self._moments_now()
        return not (
            len(moments) == len(self._moments)
            and all(map(operator.is_, moments, self._moments))
            and list(map(_ADDRESS, moments)) == self._addresses
            and self._record.fits(self._params)
        )

    def _divide(self, dtypes: Sequence[torch.dtype]) -> list[tuple[_Pieces, ScatteredShard]]:
        alike: dict[Any, list[int]] = {}
        for position, (p, state, dtype) in enumerate(zip(self._params, self._states, dtypes, strict=True)):
            alike.setdefault((p.dtype, dtype, state["exp_avg"].dtype), []).append(position)
        every = [self._pieces(positions) for positions in alike.values()]
        return [(pieces, pieces.shard()) for pieces in every]

    def _pieces(self, positions: list[int]) -> _Pieces:
        """Raises ValueError if a parameter's ratio blocks are not contiguous in memory."""
        params, states = [self._params[i] for i in positions], [self._states[i] for i in positions]
        rows = [self.rows[i] for i in positions]
        layers = self._table.layers
        for row, p in zip(rows, params, strict=True):
            check_order(self._table.rows[row][0], p.shape, memory_strides(p), layers.counts[row])
        segments = [Segment(row, 0, p.numel(), 0) for row, p in zip(rows, params, strict=True)]
        return _Pieces(positions, params, states, self._keys, layers.cut(segments))

    def _take_steps(self) -> None:
        """Take over steps that a program has replaced in a state."""
        now = [state["step"] for state in self._states]
        if not all(map(operator.is_, now, self._elements)):
            for state, step, element in zip(self._states, now, self._elements, strict=True):
                state["step"] = element.copy_(step)

    def write_back(self) -> None:
        """After pass 2: see `_Pieces.write_back`."""
        for pieces, _ in self._kinds:
            pieces.write_back()
