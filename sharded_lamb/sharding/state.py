"""State as users see it: per parameter, this rank's slices, stamped; and whole tensors for one device.

A stamp is a tensor of int64, since torch.distributed.checkpoint keeps nothing but tensors of a parameter's
state: [rank, shards, start, length, numel, digest], elements in the parameter's memory order. A DTensor's state is
DTensors like it, and ``start`` is then its cell (`sharded_lamb.sharding.placements`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.core.layout import ShardLayout
from sharded_lamb.kernels import remainders
from sharded_lamb.sharding.buckets import FlatBucket, flattened
from sharded_lamb.sharding.dcp_tensors import Region, SlicedState, Stamp
from sharded_lamb.sharding.local_shards import DTensorShards
from sharded_lamb.sharding.placements import ShardSpec, local_part

STAMP = ("rank", "shards", "start", "length", "numel", "layout")
State = dict[str, Tensor]


def tensors_of(bucket: FlatBucket) -> dict[str, Tensor]:
    """The sharded kinds of state of a bucket: flat tensors of this rank, by their key."""
    kinds = {"exp_avg": bucket.shard.exp_avg, "exp_avg_sq": bucket.shard.exp_avg_sq}
    if bucket.shard.model is not None:
        kinds["remainder" if bucket.precision.splits else "master"] = bucket.shard.weight
    return kinds


def saved_key(key: str) -> str:
    """Remainders are saved as the masters that they and the model's weights are: any optimizer can load those."""
    return "master" if key == "remainder" else key


def serialized(kinds: State, model: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """``kinds`` as they are saved, masters joined in new memory. ``model``: the weights beside remainders."""
    for key, kept in kinds.items():
        if key == "remainder":
            assert model is not None
            kept = remainders.joined(model, kept)
        yield saved_key(key), kept


def empty_for(kept: Tensor) -> Tensor:
    """Memory for what is saved of ``kept``: itself, unless it is remainders."""
    return torch.empty_like(kept, dtype=torch.float32) if kept.dtype == remainders.DTYPE else kept


def take(kept: Tensor, saved: Tensor) -> None:
    """Copy what was saved; of masters to where remainders are kept, what their own rounding lacks.

    The model's weights are left alone: they are loaded too, before or after.
    """
    if kept.dtype == remainders.DTYPE:
        saved = remainders.split(saved.detach().to(torch.float32))[1]
    if kept is not saved:
        kept.copy_(saved)


def joined_masters(buckets: Sequence[FlatBucket], pieces: DTensorShards) -> dict[int, Tensor]:
    """{parameter: master} of those of which remainders are kept: this rank's parts as in `local_states`, new memory."""
    found: dict[int, Tensor] = {}
    for bucket in buckets:
        model = bucket.shard.model
        if bucket.precision.splits and model is not None:
            for position, param in enumerate(bucket.plan.params):
                own, kept = (bucket.slice_of(param, flat) for flat in (model, bucket.shard.weight))
                found[param] = SlicedState.of(remainders.joined(own, kept), _region(bucket, position))
    for param, piece in pieces.pieces.items():
        if piece.precision.splits and piece.master is not None:
            found[param] = piece.as_dtensor(remainders.joined(piece.weight(), piece.master))
    return found


def _region(bucket: FlatBucket, position: int) -> Region:
    """What this rank's slice of the bucket's ``position``-th parameter is of it."""
    start = bucket.segment_of(bucket.plan.params[position]).start
    return Region(tuple(bucket.params[position].shape), bucket.strides[position], start)


def local_states(layout: ShardLayout, buckets: Sequence[FlatBucket], step: Tensor) -> dict[int, State]:
    """{parameter: state} for every parameter in a bucket, the same keys on every rank; tensors are views."""
    digest = _short(layout.digest())
    states: dict[int, State] = {}
    for bucket in buckets:
        for position, param in enumerate(bucket.plan.params):
            segment = bucket.segment_of(param)
            region = _region(bucket, position)
            stamp = [
                layout.rank,
                layout.world_size,
                segment.start,
                segment.length,
                layout.numels[param],
                digest,
            ]
            states[param] = {"step": step[param]}
            for key, flat in tensors_of(bucket).items():
                states[param][key] = SlicedState.of(bucket.slice_of(param, flat), region)
            states[param]["shard"] = Stamp.of(stamp)
    return states


def dtensor_states(
    layout: ShardLayout,
    pieces: DTensorShards,
    cuts: Mapping[int, ShardSpec],
    rank: int,
    world: int,
    step: Tensor,
) -> dict[int, State]:
    """The same of DTensors: tensors are DTensors like the parameter, over the memory that steps update."""
    own_layout = layout.digest()
    states: dict[int, State] = {}
    for param, piece in pieces.pieces.items():
        cut = cuts[param]
        digest = _short(hashlib.sha256(json.dumps([own_layout, cut.described()]).encode()).hexdigest())
        stamp = [rank, world, cut.cell, piece.exp_avg.numel(), layout.numels[param], digest]
        states[param] = {"step": step[param]}
        for key, flat in piece.states().items():
            states[param][key] = piece.as_dtensor(flat)
        states[param]["shard"] = Stamp.of(stamp)
    return states


def _short(digest: str) -> int:
    return int(digest[:15], 16)


def check_local(name: str, own: State, saved: Mapping[str, Any]) -> None:
    """Whether one parameter's saved slices are this rank's.

    Raises:
        ValueError: the slices are another rank's, another layout's, or whole tensors.
    """
    if "shard" not in saved:
        raise ValueError(
            f"the state of {name!r} carries no stamp of a rank, so it was not made by ShardedLamb.state_dict(): "
            f"load whole tensors with ShardedLamb.load_full_state_dict() (rank 0 passes them)"
        )
    theirs, ours = torch.as_tensor(saved["shard"]).tolist(), own["shard"].tolist()
    if theirs != ours and isinstance(own["exp_avg"], DTensor):
        raise ValueError(
            f"the state of {name!r} was saved by rank {theirs[0]} of {theirs[1]} and this is rank {ours[0]} of "
            f"{ours[1]}"
            + ("" if theirs[5] == ours[5] else ", or under other placements or of another model")
            + ". state_dict() is one rank's part: save and load every rank's own, with the same mesh and model; "
            "otherwise use torch.distributed.checkpoint, or full_state_dict() and load_full_state_dict()"
        )
    if theirs != ours:
        a, b = dict(zip(STAMP, theirs, strict=True)), dict(zip(STAMP, ours, strict=True))
        raise ValueError(
            f"the state of {name!r} holds elements [{a['start']}, {a['start'] + a['length']}) of {a['numel']}, "
            f"saved by rank {a['rank']} of {a['shards']}, and this is rank {b['rank']} of {b['shards']} with "
            f"[{b['start']}, {b['start'] + b['length']}) of {b['numel']}"
            + ("" if a["layout"] == b["layout"] else " in another layout")
            + ". state_dict() is one rank's slices: save and load every rank's own, with the same ranks and the same "
            "model; for other ranks use full_state_dict() and load_full_state_dict()"
        )
    missing = {saved_key(key) for key in own} - saved.keys()
    if missing:
        raise ValueError(f"the state of {name!r} lacks {sorted(missing)}: it was saved with other dtypes")


def load_local(own: State, saved: Mapping[str, Any]) -> None:
    """Copy one parameter's saved slices, once checked, into its own."""
    for key, tensor in own.items():
        if key == "step":
            tensor.copy_(torch.as_tensor(saved[key]).reshape(()))
        elif isinstance(tensor, DTensor):
            take(local_part(tensor), local_part(saved[saved_key(key)]))
        elif key != "shard":
            take(tensor, saved[saved_key(key)])


def check_complete(state_dict: dict[str, Any] | None) -> dict[str, Any]:
    """Raises ValueError unless the first rank was given what `ShardedLamb.full_state_dict` gives."""
    if state_dict is None:
        raise ValueError("load_full_state_dict needs the state dict on the first rank, got None")
    missing = {"state", "param_groups"} - state_dict.keys()
    if missing:
        raise ValueError(f"the full state dict lacks {sorted(missing)}: pass what full_state_dict() gave")
    return state_dict


def by_index(states: Mapping[Any, State], index: Sequence[int | None]) -> dict[int, State]:
    """States keyed by place in the groups → keyed by parameter. Raises ValueError for one that is not held."""
    held = {place: param for place, param in enumerate(index) if param is not None}
    strangers = [place for place in states if place not in held]
    if strangers:
        raise ValueError(f"the full state dict has state of parameters {strangers}, which are not held")
    return {held[place]: saved for place, saved in states.items()}


def check_full(
    names: Sequence[str], shapes: Sequence[tuple[int, ...]], states: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Raises ValueError where a whole state does not fit its parameter."""
    for param, saved in states.items():
        if "step" not in saved or torch.as_tensor(saved["step"]).numel() != 1:
            raise ValueError(f"step of {names[param]!r}: expected one number, got {saved.get('step')!r}")
        for key in ("exp_avg", "exp_avg_sq", *({"master"} & saved.keys())):
            if key not in saved or tuple(saved[key].shape) != shapes[param]:
                found = tuple(saved[key].shape) if key in saved else "nothing"
                raise ValueError(
                    f"{key} of {names[param]!r}: expected a whole tensor of shape {shapes[param]}, got {found}; "
                    f"load_full_state_dict takes what full_state_dict() or Lamb.state_dict() gave"
                )


def gather_full(
    collectives: Collectives,
    layout: ShardLayout,
    buckets: Sequence[FlatBucket],
    pieces: DTensorShards,
    step: Tensor,
) -> dict[int, State] | None:
    """Whole state tensors in their parameters' shapes, on the first rank's CPU; None elsewhere. Collective.

    Streamed: one bucket of one kind at a time, one rank's shard at a time; of DTensors, one tensor at a time.
    """
    states: dict[int, State] = {param: {} for param in range(len(layout.numels))}
    steps = step.cpu()
    for bucket in buckets:
        for key, flat in serialized(tensors_of(bucket), bucket.shard.model):
            parts = collectives.gather_to_first(flat)
            if parts is None:
                continue
            whole = torch.cat(parts)
            for position, param in enumerate(bucket.plan.params):
                states[param][key] = bucket.place(position, whole).clone()
    for param, piece in pieces.pieces.items():
        for key, flat in serialized(piece.states(), piece.weight()):
            whole = piece.whole(flat)
            if collectives.topology.rank == 0:
                states[param][key] = whole.to("cpu", copy=True)
    for param, state in states.items():
        state["step"] = steps[param].clone()
    return states if collectives.topology.rank == 0 else None


def scatter_full(
    collectives: Collectives,
    buckets: Sequence[FlatBucket],
    pieces: DTensorShards,
    step: Tensor,
    states: Mapping[int, Mapping[str, Tensor]] | None,
) -> None:
    """The reverse of `gather_full`: the first rank has ``states``, every rank takes its slices. Collective.

    What was not saved starts as it would in a new optimizer: moments 0, masters from the model's weights.
    """
    first = collectives.topology.rank == 0
    saved = states or {}
    for bucket in buckets:
        for kind, kept in tensors_of(bucket).items():
            key, flat, parts = saved_key(kind), empty_for(kept), None
            if first:
                whole = bucket.flat.to("cpu", flat.dtype, copy=True)
                if key != "master":
                    whole.zero_()
                for position, param in enumerate(bucket.plan.params):
                    if key in saved.get(param, {}):
                        bucket.place(position, whole).copy_(saved[param][key])
                parts = list(whole.chunk(bucket.plan.world_size))
            collectives.scatter_from_first(flat, parts)
            take(kept, flat)
    _scatter_dtensors(collectives, pieces, saved)
    step.zero_()
    if first:
        for param, state in saved.items():
            step[param] = torch.as_tensor(state["step"]).reshape(())
    collectives.broadcast(step)


def _scatter_dtensors(
    collectives: Collectives, pieces: DTensorShards, saved: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """One whole tensor at a time to every rank, which keeps its part."""
    first, device = collectives.topology.rank == 0, collectives.device
    rows = [(param, key) for param, piece in pieces.pieces.items() for key in piece.states()]
    there = torch.tensor(
        [saved_key(key) in saved.get(param, {}) for param, key in rows], dtype=torch.int64, device=device
    )
    if rows:
        collectives.broadcast(there)
    for (param, key), given in zip(rows, there.tolist(), strict=True):
        piece = pieces.pieces[param]
        kept = piece.states()[key]
        if not given:
            kept.copy_(piece.weight()) if key == "master" else kept.zero_()
            continue
        whole = torch.empty(piece.p.shape, dtype=empty_for(kept[:0]).dtype, device=device)
        if first:
            whole.copy_(saved[param][saved_key(key)])
        collectives.broadcast(whole)
        mine = distribute_tensor(whole, piece.p.device_mesh, piece.p.placements, src_data_rank=None)
        take(kept, flattened(local_part(mine), piece.strides))
