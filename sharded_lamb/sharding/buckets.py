"""Flat memory: parameters as views of buckets, and the slices of state that this rank keeps beside them.

A bucket's parameters are views of one flat tensor, so the all-gather writes straight into them. Strides
are kept (channels_last stays so): what is flat is memory order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_lamb.core.footprint import Widths
from sharded_lamb.core.layout import BLOCK, Bucket, Segment
from sharded_lamb.kernels import FlatShard, remainders
from sharded_lamb.kernels.incoming import GradientCopy
from sharded_lamb.sharding.flat_memory import zeros


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of one bucket. float64 parameters are computed and kept in float64 throughout."""

    model: torch.dtype
    master: torch.dtype
    state: torch.dtype
    wire: torch.dtype
    compute: torch.dtype
    splits: bool = False  # masters are kept as remainders of the model's weights

    @staticmethod
    def of(
        model: torch.dtype,
        master: torch.dtype,
        state: torch.dtype,
        reduce: torch.dtype | None,
        *,
        store_param_remainders: bool = False,
    ) -> "Precision":
        """``store_param_remainders``: of masters, where weights are bfloat16; others are kept whole."""
        if model == torch.float64:
            return Precision(model, model, model, reduce or model, model)
        splits = store_param_remainders and (model, master) == (torch.bfloat16, torch.float32)
        compute = torch.promote_types(master, torch.float32)
        return Precision(model, master, state, reduce or model, compute, splits)

    @property
    def apart(self) -> torch.dtype | None:
        """What is kept of masters beside the model's weights; None: those are what is updated."""
        if self.splits:
            return remainders.DTYPE
        return self.master if self.master != self.model else None

    @property
    def widths(self) -> Widths:
        """Bytes an element, by role."""
        return Widths(
            self.model.itemsize,
            self.apart.itemsize if self.apart else 0,
            self.state.itemsize,
            self.wire.itemsize,
            self.compute.itemsize,
            self.splits,
        )


def memory_strides(p: Tensor) -> tuple[int, ...]:
    """The strides of ``p`` where its elements fill memory without gaps, else contiguous ones."""
    expected = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return torch.empty(p.shape, device="meta").stride()
        expected *= size
    return tuple(p.stride())


def flattened(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` as one run in the memory order that ``strides`` give it; a copy only where it lies otherwise."""
    if tensor.numel() and tensor.stride() != strides:
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(
            tensor
        )
    return tensor.as_strided((tensor.numel(),), (1,))


def masters_of(model: Tensor, kept: Tensor) -> Tensor:
    """``kept``, now the masters that the model's weights are; of remainders, none."""
    return kept.zero_() if kept.dtype == remainders.DTYPE else kept.copy_(model)


class FlatBucket:
    """One bucket's memory on this rank. Construction moves the parameters' values into it."""

    def __init__(
        self,
        plan: Bucket,
        params: Sequence[Tensor],
        precision: Precision,
        shard_rank: int,
        device: torch.device,
    ) -> None:
        self.plan, self.params, self.precision = plan, list(params), precision
        self.strides = [memory_strides(p) for p in params]
        self.segments = plan.segments(shard_rank)
        self._segment_of = {segment.param: segment for segment in self.segments}
        position = {param: place for place, param in enumerate(plan.params)}
        places = [position[segment.param] for segment in self.segments]
        self._sliced = [self.strides[place] for place in places]  # of the parameter of each segment
        self._contiguous = all(self.params[place].is_contiguous() for place in places)
        self.flat = zeros(plan.numel, precision.model, device, lane=0)
        self.low, self.high = plan.shard_range(shard_rank)
        for p, offset, strides in zip(params, plan.offsets, self.strides, strict=True):
            view = self.flat.as_strided(p.shape, strides, offset)
            view.copy_(p.detach())
            p.data = view
        self._pointers = [p.data_ptr() for p in params]
        self.shard = self._shard()

    def _shard(self) -> FlatShard:
        numel, precision, device = self.plan.shard_numel, self.precision, self.flat.device
        mine, apart = self.flat[self.low : self.high], precision.apart
        block_param = torch.full((numel // BLOCK,), self.plan.params[0], dtype=torch.int64)
        for segment in self.segments:
            first = segment.shard_start // BLOCK
            block_param[first : -(-(segment.shard_start + segment.length) // BLOCK)] = segment.param
        return FlatShard(
            weight=mine if apart is None else masters_of(mine, zeros(numel, apart, device, lane=4)),
            model=None if apart is None else mine,
            grad=zeros(numel, precision.compute, device, lane=1),
            exp_avg=zeros(numel, precision.state, device, lane=2),
            exp_avg_sq=zeros(numel, precision.state, device, lane=3),
            block_param=block_param.to(device),
        )

    def refresh_masters(self) -> None:
        """Masters from the model's weights, after those were written as a whole (broadcast, loading)."""
        if self.shard.model is not None:
            masters_of(self.shard.model, self.shard.weight)

    def check_attached(self, names: Sequence[str]) -> None:
        """Raises RuntimeError where a parameter no longer is the view that this bucket gathers into."""
        dtypes = {p.dtype for p in self.params}
        if list(map(Tensor.data_ptr, self.params)) == self._pointers and dtypes == {self.precision.model}:
            return
        for p, pointer, index in zip(self.params, self._pointers, self.plan.params, strict=True):
            if p.data_ptr() != pointer or p.dtype != self.precision.model:
                raise RuntimeError(
                    f"parameter {names[index]!r} no longer lies in its bucket (now {p.dtype} on {p.device}; it was "
                    f"{self.precision.model} on {self.flat.device}): model.to(…), model.bfloat16() or an assignment "
                    f"to .data replaced its memory after ShardedLamb was constructed. Convert the model first and "
                    f"construct the optimizer after; write weights in place (copy_, load_state_dict)"
                )

    def segment_of(self, param: int) -> Segment:
        """This rank's segment of a parameter; of length 0 where it has none."""
        return self._segment_of.get(param, Segment(param, 0, 0, 0))

    def slice_of(self, param: int, shard_tensor: Tensor) -> Tensor:
        """The part of a parameter in one of this rank's flat tensors; may be empty."""
        segment = self.segment_of(param)
        return shard_tensor[segment.shard_start : segment.shard_start + segment.length]

    def place(self, position: int, flat: Tensor) -> Tensor:
        """The ``position``-th parameter's region of a flat tensor of the bucket's size, in its shape."""
        offset = flat.storage_offset() + self.plan.offsets[position]
        return flat.as_strided(self.params[position].shape, self.strides[position], offset)

    def own_gradients(self, grads: Sequence[Tensor | None]) -> GradientCopy:
        """Whole gradients of which this rank's slices go into the gradient shard. ``grads``: [P] of all parameters."""
        return self.shard, self.segments, self.in_memory_order([grads[s.param] for s in self.segments])

    def in_memory_order(self, mine: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients, one a segment, whose elements lie as their parameters' do; a copy only of one that does not."""
        if not (self._contiguous and all(grad is not None and grad.is_contiguous() for grad in mine)):
            mine = [
                grad if grad is None or grad.stride() == strides else flattened(grad, strides)
                for grad, strides in zip(mine, self._sliced, strict=True)
            ]
        return mine

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of this bucket on this rank, by what they are for."""
        shard = self.shard
        return {
            "parameters": self.flat.nbytes,
            "masters": shard.weight.nbytes if shard.model is not None else 0,
            "moments": shard.exp_avg.nbytes + shard.exp_avg_sq.nbytes,
            "gradient_shards": shard.grad.nbytes,
        }
