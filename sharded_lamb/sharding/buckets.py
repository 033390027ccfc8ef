"""Flat memory: parameters over buckets, and this rank's shard of their state.

A bucket's parameters cover parts of one flat tensor, so the all-gather writes straight into them. Parameters
keep their strides (channels_last included): a bucket is flat in memory order. Each has a storage of its own over its
part: torch.save, safetensors and Accelerate take parameters with one storage for tied ones.

A parameter whose ``.data`` is replaced is copied into its bucket at the next step. One in shared memory stays there,
since other processes may read it: a step copies it before, and copies the result back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import cast

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sharded_lamb.comm.wire_formats import WireFormat, of_gather, of_reduce
from sharded_lamb.core.footprint import Widths
from sharded_lamb.core.layers import Layers, Sources, repeated
from sharded_lamb.core.layout import BLOCK, Bucket, Segment
from sharded_lamb.core.rule import MOMENTS
from sharded_lamb.kernels import FlatShard, ScatteredShard, Shard, formats
from sharded_lamb.kernels.state_format import OF_WEIGHTS, Moments, StateFormat, StoredState, moments
from sharded_lamb.sharding.flat_memory import zeros
from sharded_lamb.sharding.memory_record import MemoryRecord


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes and formats of one bucket, or of a DTensor. float64 parameters are float64 throughout."""

    model: torch.dtype
    masters: StateFormat | None  # None: steps update the parameters' own memory
    moments: Moments
    wire: torch.dtype  # of gradients, unless ``reduce`` encodes them
    compute: torch.dtype
    averages: bool = False  # whether an average of the weights is kept, in the compute dtype
    second_moment: bool = True
    gather: WireFormat | None = None  # of updated parameters; None: they travel as they are
    reduce: WireFormat | None = None  # of gradients; None: they travel as ``wire``

    @staticmethod
    def of(
        model: torch.dtype,
        master: torch.dtype,
        state: torch.dtype,
        reduce: torch.dtype | None,
        *,
        remainder_bits: int = 0,
        averages: bool = False,
        second_moment: bool = True,
        gather: torch.dtype | None = None,
        grads: torch.dtype | None = None,
    ) -> "Precision":
        """The precision for `ShardedLamb`'s keywords and parameters of dtype ``model``, gradients of ``grads``."""
        if model == torch.float64:
            master = state = model
        masters, wire_format = (
            formats.of_masters(model, master, remainder_bits=remainder_bits),
            of_gather(gather, model),
        )
        if wire_format is not None and masters is None:  # the model's weights are rounded
            masters = formats.MASTERS[master]
        compute = master if model == torch.float64 else torch.promote_types(master, torch.float32)
        return Precision(
            model,
            masters,
            formats.of_moments(state),
            reduce or grads or model,
            compute,
            averages,
            second_moment,
            wire_format,
            of_reduce(reduce, grads or model),
        )

    @property
    def widths(self) -> Widths:
        """Bytes per element, by role."""
        masters = self.masters
        return Widths(
            model=self.model.itemsize,
            master=masters.storage.itemsize if masters else 0,
            state=self.moments[0].block_bytes / BLOCK,
            wire=self.wire.itemsize
            if self.reduce is None
            else self.reduce.row * self.reduce.storage.itemsize / BLOCK,
            compute=self.compute.itemsize,
            beside_weight=masters is not None and masters.beside_weight,
            message=None if self.gather is None else self.gather.row * self.gather.storage.itemsize,
            coded=self.reduce is not None,
        )


def moment_zeros(form: StateFormat, numel: int, device: torch.device, lane: int) -> Tensor:
    """The memory of a new moment of ``numel`` elements."""
    shape = form.shape(numel)
    return zeros(math.prod(shape), form.storage, device, lane).view(shape)


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


def with_own_storage(flat: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """A view of all of ``flat`` [n] whose storage holds these n elements alone; it keeps the memory alive."""
    if math.prod(shape) == 0:
        return flat.new_empty_strided(shape, strides)
    return from_dlpack(flat).as_strided(shape, strides)


def in_shared_memory(p: Tensor) -> bool:
    """Whether other processes may map the parameter's memory. CUDA memory counts as not shared."""
    return p.device.type == "cpu" and bool(p.untyped_storage().is_shared())


def in_memory_order(
    grads: list[Tensor | None], strides: Sequence[tuple[int, ...] | None]
) -> list[Tensor | None]:
    """Gradients in the memory order of their parameters, whose ``strides`` these are; None: of a contiguous one.

    Copies only gradients with other strides.
    """
    if not any(strides) and all(map(Tensor.is_contiguous, [grad for grad in grads if grad is not None])):
        return grads
    return [
        grad
        if grad is None or grad.stride() == own
        else grad.contiguous()
        if own is None
        else flattened(grad, own)
        for grad, own in zip(grads, strides, strict=True)
    ]


class FlatBucket:
    """One bucket's memory on this rank. Construction copies the parameters' values into it.

    Without ``holds_gradients`` gradients are read where they are: see `GradientsInPlace`.

    Attributes:
        shard: this rank's shard of the bucket.
        kernel_shards: the same memory for the kernels: ``shard``, or pieces where ratio blocks begin inside its blocks.
        layer_segments, layer_sources: this rank's segments, cut where layers begin: see `Layers.cut`.
    """

    def __init__(
        self,
        plan: Bucket,
        params: Sequence[Tensor],
        layers: Layers,
        precision: Precision,
        shard_rank: int,
        device: torch.device,
        *,
        holds_gradients: bool,
    ) -> None:
        """``layers``: of all parameters, which ``plan`` numbers."""
        self.plan, self.params, self.precision = plan, list(params), precision
        self.strides = [memory_strides(p) for p in params]
        self.segments = plan.segments(shard_rank)
        self.layer_segments, self.layer_sources = layers.cut(self.segments)
        self._segment_of = {segment.param: segment for segment in self.segments}
        position_of = {param: position for position, param in enumerate(plan.params)}
        positions = [position_of[segment.param] for segment in self.segments]
        self.segment_strides = [  # of each segment's parameter; None: contiguous
            None if self.params[position].is_contiguous() else self.strides[position]
            for position in positions
        ]
        self.flat = zeros(plan.numel, precision.model, device, lane=0)  # [bucket]
        self.low, self.high = plan.shard_range(shard_rank)
        self._shapes = [p.shape for p in self.params]
        self._record = MemoryRecord(self.params)
        self._shared: set[int] = set()  # positions of parameters in shared memory, outside ``flat``
        for position, p in enumerate(self.params):
            self.attach(position, p.detach())
        self.shard = self._shard(layers.slice(plan.params[0]).start, holds_gradients=holds_gradients)
        self.kernel_shards: list[Shard] = [self.shard]
        if any(segment.shard_start % BLOCK for segment in self.layer_segments):
            pieces = self.pieces()
            grad = (
                self._cut(self.shard.grad) if holds_gradients else pieces.weight
            )  # a stand-in that no pass reads
            self.kernel_shards = [replace(pieces, grad=grad, grad_starts=None)]
        self.average: Tensor | None = None  # [shard] of this rank's weights
        if precision.averages:
            self.average = zeros(plan.shard_numel, precision.compute, device, lane=5)
            self.average.copy_(self.own_weights)

    @property
    def own_weights(self) -> Tensor:
        """[shard] this rank's shard of the model's own memory."""
        return self.flat[self.low : self.high]

    def _shard(self, first_layer: int, *, holds_gradients: bool) -> FlatShard:
        numel, precision, device = self.plan.shard_numel, self.precision, self.flat.device
        shard_flat, masters = self.flat[self.low : self.high], None
        if precision.masters is not None:
            masters = zeros(numel, precision.masters.storage, device, lane=4)
            precision.masters.reset(masters, shard_flat)
        block_param = torch.full((numel // BLOCK,), first_layer, dtype=torch.int64, device="cpu")
        for segment in self.layer_segments:
            first = segment.shard_start // BLOCK
            block_param[first : -(-(segment.shard_start + segment.length) // BLOCK)] = segment.param
        kernels_see_model = (
            masters is not None and precision.gather is None
        )  # else `CompressedGather` writes it
        return FlatShard(
            weight=shard_flat if masters is None else masters,
            model=shard_flat if kernels_see_model else None,
            grad=zeros(numel if holds_gradients else 0, precision.compute, device, lane=1),
            exp_avg=moment_zeros(precision.moments[0], numel, device, lane=2),
            exp_avg_sq=moment_zeros(precision.moments[1], numel, device, lane=3)
            if precision.second_moment
            else None,
            block_param=block_param.to(device),
        )

    def pieces(self) -> ScatteredShard:
        """`shard` in pieces, one per segment of a layer, without gradients."""
        shard = self.shard
        return ScatteredShard(
            params=tuple(segment.param for segment in self.layer_segments),
            weight=self._cut(shard.weight),
            grad=(),
            exp_avg=self._cut_moment(0, shard.exp_avg),
            exp_avg_sq=None if shard.exp_avg_sq is None else self._cut_moment(1, shard.exp_avg_sq),
            model=None if shard.model is None else self._cut(shard.model),
            grad_starts=[segment.start for segment in self.layer_segments],
        )

    def _cut(self, memory: Tensor) -> list[Tensor]:
        """Views of the layers' segments in a flat tensor of the shard's size."""
        return [memory[x.shard_start : x.shard_start + x.length] for x in self.layer_segments]

    def _cut_moment(self, index: int, memory: Tensor) -> list[Tensor]:
        """`_cut` of the first or the second moment's memory."""
        form = self.precision.moments[index]
        return [form.part(memory, x.shard_start, x.length) for x in self.layer_segments]

    def states_of(self, param: int) -> list[StoredState]:
        """The kinds of state of this rank's segment of a parameter: views, each [segment]; may be empty."""
        segment = self.segment_of(param)
        return [state.part(segment.shard_start, segment.length) for state in self.states()]

    def refresh_masters(self) -> None:
        """Reset masters and averages to the model's weights, after a broadcast wrote the whole bucket."""
        for state in self.states():
            if state.kind in OF_WEIGHTS:
                state.reset()

    def segment_of_whole(self, param: int, whole: Tensor) -> Tensor:
        """[segment] this rank's segment of a tensor in the parameter's shape."""
        segment = self.segment_of(param)
        strides = self.strides[self.plan.params.index(param)]
        return flattened(whole, strides)[segment.start : segment.start + segment.length]

    def states(self) -> list[StoredState]:
        """The kinds of state of this rank's shard, each [shard]."""
        shard, masters = self.shard, self.precision.masters
        numel = self.plan.shard_numel
        kinds = [*moments(self.precision.moments, numel, shard.exp_avg, shard.exp_avg_sq)]
        if masters is not None:
            kinds.append(StoredState("master", masters, numel, shard.weight, self.own_weights))
        if self.average is not None:
            form = formats.of_memory(self.average.dtype)
            kinds.append(StoredState("ema", form, numel, self.average, self.own_weights))
        return kinds

    # -- parameters whose memory is replaced --------------------------------------------------------

    def attach(self, position: int, value: Tensor) -> None:
        """Copy ``value`` into the bucket, and let the ``position``-th parameter cover it.

        A parameter in shared memory keeps its memory; see `read_shared` and `write_shared`.
        """
        p, view = self.params[position], self.param_view(position, self.flat)
        view.copy_(value)
        self._shared.discard(position)
        if in_shared_memory(p):
            self._shared.add(position)
        else:
            offset = self.plan.offsets[position]
            part = self.flat[offset : offset + p.numel()]
            p.data = with_own_storage(part, view.shape, view.stride())
        self._record.renew(position, p)

    def replaced(self) -> list[int]:
        """The positions of parameters whose memory, strides, size or dtype is no longer that of `attach`."""
        return self._record.changed(self.params)

    def is_on(self, device: torch.device, position: int) -> bool:
        """Whether a parameter has the shape, dtype and layout that it had at construction, and is on ``device``."""
        p = self.params[position]
        is_here = p.device.type == device.type and (device.type == "cpu" or p.device == device)
        is_alike = p.shape == self._shapes[position] and p.dtype == self.precision.model
        return is_here and is_alike and p.layout is torch.strided

    def check_fits(self, position: int, name: str) -> None:
        """Raises RuntimeError if the values of a replaced parameter do not fit into the bucket."""
        p, shape, device = self.params[position], self._shapes[position], self.flat.device
        if self.is_on(device, position):
            return
        raise RuntimeError(
            f"parameter {name!r} is no longer in its bucket (now {p.dtype} {tuple(p.shape)} on {p.device}; it was "
            f"{self.precision.model} {tuple(shape)} on {device}): model.bfloat16(), model.to(…) of a part of the model "
            f"or an assignment to .data replaced its memory after ShardedLamb was constructed. Convert the model first "
            f"and construct the optimizer after; weights of the same shape and dtype may be written at any time, and a "
            f"whole model moved to another device"
        )

    def contains(self, p: Tensor) -> bool:
        """Whether the memory of ``p`` is part of this bucket's."""
        return 0 <= p.data_ptr() - self.flat.data_ptr() < self.flat.nbytes

    @property
    def has_shared(self) -> bool:
        """Whether some parameters are in shared memory, outside the bucket."""
        return bool(self._shared)

    def read_shared(self) -> None:
        """Copy parameters in shared memory into the bucket, before a step."""
        for position in self._shared:
            self.param_view(position, self.flat).copy_(self.params[position].detach())

    def write_shared(self) -> None:
        """Copy the bucket to its parameters in shared memory, after it was gathered."""
        for position in self._shared:
            self.params[position].data.copy_(self.param_view(position, self.flat))

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
        return flat.as_strided(self._shapes[position], self.strides[position], offset)

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of this bucket on this rank, by kind."""
        shard = self.shard
        return {
            "parameters": self.flat.nbytes,
            "masters": 0 if self.precision.masters is None else shard.weight.nbytes,
            "moments": sum(state.stored.nbytes for state in self.states() if state.kind in MOMENTS),
            "gradient_shards": shard.grad.nbytes,
            **({} if self.average is None else {"averages": self.average.nbytes}),
        }


class GradientsInPlace:
    """This rank's shards of some buckets in pieces, whose gradients are read where they are."""

    def __init__(self, buckets: Sequence[FlatBucket]) -> None:
        alike: dict[Precision, list[FlatBucket]] = {}
        for bucket in buckets:
            if bucket.segments:
                alike.setdefault(bucket.precision, []).append(bucket)
        self._pieces = [ScatteredShard.joined([b.pieces() for b in group]) for group in alike.values()]
        self._params = [[segment.param for b in group for segment in b.segments] for group in alike.values()]
        self._strides = [
            list(chain.from_iterable(b.segment_strides for b in group)) for group in alike.values()
        ]
        self._sources = [_joined_sources(group) for group in alike.values()]

    def shards(self, grads: Sequence[Tensor | None]) -> tuple[list[ScatteredShard], list[ScatteredShard]]:
        """(pieces with a gradient, one shard per precision and gradient dtype; pieces without one).

        The latter only take part in pass 1, where masters follow weights that the user wrote: their gradients count as
        0, and stand-ins have them.

        Args:
            grads: [P], whole gradients of all parameters.
        """
        found: list[ScatteredShard] = []
        missing: list[ScatteredShard] = []
        alike = zip(self._pieces, self._params, self._strides, self._sources, strict=True)
        for pieces, params, strides, sources in alike:
            own = repeated(in_memory_order([grads[param] for param in params], strides), sources)
            dtypes = [None if grad is None else grad.dtype for grad in own]
            kinds = dict.fromkeys(dtypes)
            for dtype in kinds:
                part, part_grads = pieces, own
                if len(kinds) > 1:
                    chosen = [piece for piece, other in enumerate(dtypes) if other == dtype]
                    part, part_grads = pieces.chosen(chosen), [own[piece] for piece in chosen]
                if dtype is None:
                    missing.append(replace(part, grad=part.weight, grad_starts=None, current={}))
                else:
                    found.append(part.with_gradients(cast(list[Tensor], part_grads)))
        return found, missing


def _joined_sources(buckets: Sequence[FlatBucket]) -> Sources:
    """`FlatBucket.layer_sources` of the segments of several buckets."""
    if all(bucket.layer_sources is None for bucket in buckets):
        return None
    joined: list[int] = []
    first = 0
    for bucket in buckets:
        count = len(bucket.segments)
        own = range(count) if bucket.layer_sources is None else bucket.layer_sources
        joined += [first + source for source in own]
        first += count
    return joined
