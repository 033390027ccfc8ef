"""Flat memory: parameters as views of buckets, and this rank's shard of their state.

A bucket's parameters are views of one flat tensor, so the all-gather writes straight into them. Parameters
keep their strides (channels_last included): a bucket is flat in memory order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharded_lamb.core.footprint import Widths
from sharded_lamb.core.layout import BLOCK, Bucket, Segment
from sharded_lamb.kernels import FlatShard, formats
from sharded_lamb.kernels.incoming import GradientCopy
from sharded_lamb.kernels.state_format import StateFormat, StoredState, moments
from sharded_lamb.sharding.flat_memory import zeros


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes and formats of one bucket, or of a DTensor. float64 parameters are float64 throughout."""

    model: torch.dtype
    masters: StateFormat | None  # None: steps update the parameters' own memory
    moments: StateFormat
    wire: torch.dtype
    compute: torch.dtype

    @staticmethod
    def of(
        model: torch.dtype,
        master: torch.dtype,
        state: torch.dtype,
        reduce: torch.dtype | None,
        *,
        store_param_remainders: bool = False,
    ) -> "Precision":
        """The precision for `ShardedLamb`'s keywords and the parameters' dtype ``model``."""
        if model == torch.float64:
            master = state = model
        masters = formats.of_masters(model, master, store_param_remainders=store_param_remainders)
        compute = master if model == torch.float64 else torch.promote_types(master, torch.float32)
        return Precision(model, masters, formats.of_moments(state), reduce or model, compute)

    @property
    def widths(self) -> Widths:
        """Bytes per element, by role."""
        masters = self.masters
        return Widths(
            model=self.model.itemsize,
            master=masters.storage.itemsize if masters else 0,
            state=self.moments.storage.itemsize,
            wire=self.wire.itemsize,
            compute=self.compute.itemsize,
            beside_weight=masters is not None and masters.beside_weight,
        )


def memory_strides(p: Tensor) -> tuple[int, ...]:
    """The strides of ``p`` if its elements fill memory without gaps, else contiguous ones."""
    expected = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return torch.empty(p.shape, device="meta").stride()
        expected *= size
    return tuple(p.stride())


def flattened(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``tensor`` as a 1-D view in the memory order of ``strides``; copies only a tensor with other strides."""
    if tensor.numel() and tensor.stride() != strides:
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(
            tensor
        )
    return tensor.as_strided((tensor.numel(),), (1,))


class FlatBucket:
    """One bucket's memory on this rank. Construction copies the parameters' values into it."""

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
        position_of = {param: position for position, param in enumerate(plan.params)}
        positions = [position_of[segment.param] for segment in self.segments]
        self._segment_strides = [
            self.strides[position] for position in positions
        ]  # of each segment's parameter
        self._contiguous = all(self.params[position].is_contiguous() for position in positions)
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
        shard_flat, masters = self.flat[self.low : self.high], None
        if precision.masters is not None:
            masters = zeros(numel, precision.masters.storage, device, lane=4)
            precision.masters.reset(masters, shard_flat)
        block_param = torch.full((numel // BLOCK,), self.plan.params[0], dtype=torch.int64)
        for segment in self.segments:
            first = segment.shard_start // BLOCK
            block_param[first : -(-(segment.shard_start + segment.length) // BLOCK)] = segment.param
        return FlatShard(
            weight=shard_flat if masters is None else masters,
            model=None if masters is None else shard_flat,
            grad=zeros(numel, precision.compute, device, lane=1),
            exp_avg=zeros(numel, precision.moments.storage, device, lane=2),
            exp_avg_sq=zeros(numel, precision.moments.storage, device, lane=3),
            block_param=block_param.to(device),
        )

    def states_of(self, param: int) -> list[StoredState]:
        """The kinds of state of this rank's segment of a parameter: views, each [segment]; may be empty."""
        return [
            replace(
                state,
                stored=self.slice_of(param, state.stored),
                weight=None if state.weight is None else self.slice_of(param, state.weight),
            )
            for state in self.states()
        ]

    def refresh_masters(self) -> None:
        """Reset masters to the model's weights, after a broadcast or a load wrote the whole bucket."""
        if self.precision.masters is not None and self.shard.model is not None:
            self.precision.masters.reset(self.shard.weight, self.shard.model)

    def states(self) -> list[StoredState]:
        """The kinds of state of this rank's shard, each [shard]."""
        shard, masters = self.shard, self.precision.masters
        kinds = [*moments(self.precision.moments, shard.exp_avg, shard.exp_avg_sq)]
        if masters is not None:
            kinds.append(StoredState("master", masters, shard.weight, shard.model))
        return kinds

    def check_attached(self, names: Sequence[str]) -> None:
        """Raises RuntimeError if a parameter is no longer a view of this bucket."""
        dtypes = {p.dtype for p in self.params}
        if list(map(Tensor.data_ptr, self.params)) == self._pointers and dtypes == {self.precision.model}:
            return
        for p, pointer, index in zip(self.params, self._pointers, self.plan.params, strict=True):
            if p.data_ptr() != pointer or p.dtype != self.precision.model:
                raise RuntimeError(
                    f"parameter {names[index]!r} is no longer in its bucket (now {p.dtype} on {p.device}; it was "
                    f"{self.precision.model} on {self.flat.device}): model.to(…), model.bfloat16() or an assignment "
                    f"to .data replaced its memory after ShardedLamb was constructed. Convert the model first and "
                    f"construct the optimizer after; write weights in place (copy_, load_state_dict)"
                )

    def segment_of(self, param: int) -> Segment:
        """This rank's segment of a parameter; its length is 0 if the rank has none."""
        return self._segment_of.get(param, Segment(param, 0, 0, 0))

    def slice_of(self, param: int, shard_tensor: Tensor) -> Tensor:
        """This rank's segment of a parameter, in a flat tensor of the shard's size; may be empty."""
        segment = self.segment_of(param)
        return shard_tensor[segment.shard_start : segment.shard_start + segment.length]

    def param_view(self, position: int, flat: Tensor) -> Tensor:
        """A view of the ``position``-th parameter, in its shape, in a flat tensor of the bucket's size."""
        offset = flat.storage_offset() + self.plan.offsets[position]
        return flat.as_strided(self.params[position].shape, self.strides[position], offset)

    def own_gradients(self, grads: Sequence[Tensor | None]) -> GradientCopy:
        """Whole gradients, whose slices the kernel copies into the gradient shard. ``grads``: [P], all parameters."""
        return self.shard, self.segments, self.in_memory_order([grads[s.param] for s in self.segments])

    def in_memory_order(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Gradients, one per segment, in their parameters' memory order; copies only those with other strides."""
        if not (self._contiguous and all(grad is not None and grad.is_contiguous() for grad in grads)):
            grads = [
                grad if grad is None or grad.stride() == strides else flattened(grad, strides)
                for grad, strides in zip(grads, self._segment_strides, strict=True)
            ]
        return grads

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of this bucket on this rank, by kind."""
        shard = self.shard
        return {
            "parameters": self.flat.nbytes,
            "masters": shard.weight.nbytes if shard.model is not None else 0,
            "moments": shard.exp_avg.nbytes + shard.exp_avg_sq.nbytes,
            "gradient_shards": shard.grad.nbytes,
        }
