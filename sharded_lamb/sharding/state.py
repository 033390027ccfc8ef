"""State as users see it: per parameter, this rank's slices, stamped; and whole tensors for one device.

A stamp is a tensor of int64, since torch.distributed.checkpoint keeps nothing but tensors of a parameter's
state: [rank, shards, start, length, numel, digest], elements in the parameter's memory order. A DTensor's state is
DTensors like it, and ``start`` is then its cell (`sharded_lamb.sharding.placements`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.core.layout import ShardLayout
from sharded_lamb.kernels.state_format import StoredState
from sharded_lamb.sharding.buckets import FlatBucket, flattened
from sharded_lamb.sharding.dcp_tensors import Region, SlicedState, Stamp
from sharded_lamb.sharding.local_shards import DTensorShards
from sharded_lamb.sharding.placements import ShardSpec, local_part

STAMP = ("rank", "shards", "start", "length", "numel", "layout")
State = dict[str, Tensor]


def decoded_states(buckets: Sequence[FlatBucket], dtensors: DTensorShards) -> dict[int, dict[str, Tensor]]:
    """{parameter: {kind: values}} of state that is not stored as its values, in new memory.

    This rank's parts, of the classes that `local_states` and `dtensor_states` give.
    """
    decoded: dict[int, dict[str, Tensor]] = {}
    for bucket in buckets:
        for position, param in enumerate(bucket.plan.params):
            region = _region(bucket, position)
            decoded[param] = {
                state.kind: SlicedState.of(state.values(), region)
                for state in bucket.states_of(param)
                if state.key != state.kind
            }
    for param, local in dtensors.local.items():
        decoded[param] = {
            state.kind: local.as_dtensor(state.values())
            for state in local.states()
            if state.key != state.kind
        }
    return decoded


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
            for state in bucket.states_of(param):
                states[param][state.key] = SlicedState.of(state.stored, region)
            states[param]["shard"] = Stamp.of(stamp)
    return states


def dtensor_states(
    layout: ShardLayout,
    dtensors: DTensorShards,
    specs: Mapping[int, ShardSpec],
    rank: int,
    world: int,
    step: Tensor,
) -> dict[int, State]:
    """The same of DTensors: tensors are DTensors like the parameter, over the memory that steps update."""
    own_layout = layout.digest()
    states: dict[int, State] = {}
    for param, local in dtensors.local.items():
        spec = specs[param]
        digest = _short(hashlib.sha256(json.dumps([own_layout, spec.described()]).encode()).hexdigest())
        stamp = [rank, world, spec.shard_index, local.exp_avg.numel(), layout.numels[param], digest]
        states[param] = {"step": step[param]}
        for state in local.states():
            states[param][state.key] = local.as_dtensor(state.stored)
        states[param]["shard"] = Stamp.of(stamp)
    return states


def _short(digest: str) -> int:
    return int(digest[:15], 16)


def check_local(name: str, own: State, states: Sequence[StoredState], saved: Mapping[str, Any]) -> None:
    """Check that one parameter's saved slices are this rank's.

    Args:
        own: the parameter's entry in ``optimizer.state``; ``states``: its kinds of state.

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
    missing = {"step", *(state.kind for state in states)} - saved.keys()
    if missing:
        raise ValueError(f"the state of {name!r} lacks {sorted(missing)}: it was saved with other dtypes")


def load_local(own: State, states: Sequence[StoredState], saved: Mapping[str, Any]) -> None:
    """Copy one parameter's saved slices, once checked, into its own. Arguments as of `check_local`."""
    own["step"].copy_(torch.as_tensor(saved["step"]).reshape(()))
    for state in states:
        values = saved[state.kind]
        if isinstance(values, DTensor):
            stored = own[state.key]
            assert isinstance(stored, DTensor)
            values = flattened(local_part(values), local_part(stored).stride())
        state.store(values)


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
    dtensors: DTensorShards,
    step: Tensor,
) -> dict[int, State] | None:
    """Whole state tensors in their parameters' shapes, on the first rank's CPU; None elsewhere. Collective.

    Streamed: one bucket of one kind at a time, one rank's shard at a time; of DTensors, one tensor at a time.
    """
    first = collectives.topology.rank == 0
    states: dict[int, State] = {param: {} for param in range(len(layout.numels))}
    steps = step.cpu()
    for bucket in buckets:
        for state in bucket.states():
            parts = collectives.gather_to_first(state.values())
            if parts is None:
                continue
            whole = torch.cat(parts)
            for position, param in enumerate(bucket.plan.params):
                states[param][state.kind] = bucket.place(position, whole).clone()
    for param, local in dtensors.local.items():
        for state in local.states():
            whole = local.whole(state.values())
            if first:
                states[param][state.kind] = whole.to("cpu", copy=True)
    for param, entry in states.items():
        entry["step"] = steps[param].clone()
    return states if first else None


def scatter_full(
    collectives: Collectives,
    buckets: Sequence[FlatBucket],
    dtensors: DTensorShards,
    step: Tensor,
    states: Mapping[int, Mapping[str, Tensor]] | None,
) -> None:
    """The reverse of `gather_full`: the first rank has ``states``, every rank takes its slices. Collective.

    What was not saved starts as it would in a new optimizer: moments 0, masters from the model's weights.
    """
    first = collectives.topology.rank == 0
    saved = states or {}
    for bucket in buckets:
        for state in bucket.states():
            shard, parts = state.empty(), None
            if first:
                whole = bucket.flat.to("cpu", shard.dtype, copy=True)
                if state.kind != "master":
                    whole.zero_()
                for position, param in enumerate(bucket.plan.params):
                    if state.kind in saved.get(param, {}):
                        bucket.place(position, whole).copy_(saved[param][state.kind])
                parts = list(whole.chunk(bucket.plan.world_size))
            collectives.scatter_from_first(shard, parts)
            state.store(shard)
    _scatter_dtensors(collectives, dtensors, saved)
    step.zero_()
    if first:
        for param, entry in saved.items():
            step[param] = torch.as_tensor(entry["step"]).reshape(())
    collectives.broadcast(step)


def _scatter_dtensors(
    collectives: Collectives, dtensors: DTensorShards, saved: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """One whole tensor at a time to every rank, which keeps its part."""
    first, device = collectives.topology.rank == 0, collectives.device
    rows = [(param, local, state) for param, local in dtensors.local.items() for state in local.states()]
    given = torch.tensor(
        [state.kind in saved.get(param, {}) for param, _, state in rows], dtype=torch.int64, device=device
    )
    if rows:
        collectives.broadcast(given)
    for (param, local, state), is_saved in zip(rows, given.tolist(), strict=True):
        if not is_saved:
            state.format.reset(
                state.stored, local.weight()
            ) if state.kind == "master" else state.stored.zero_()
            continue
        whole = torch.empty(local.p.shape, dtype=state.format.value, device=device)
        if first:
            whole.copy_(saved[param][state.kind])
        collectives.broadcast(whole)
        part = distribute_tensor(whole, local.p.device_mesh, local.p.placements, src_data_rank=None)
        state.store(flattened(local_part(part), local.strides))
