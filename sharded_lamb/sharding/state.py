"""State in state dicts: per parameter, this rank's slices with a stamp; or whole tensors on one device.

A stamp is an int64 tensor [rank, shards, start, length, numel, digest], since torch.distributed.checkpoint keeps only
the tensors of a parameter's state; it counts elements in the parameter's memory order. A DTensor's state consists of
DTensors like it; ``start`` in its stamp is the shard index (`sharded_lamb.sharding.placements`).
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.core.host_values import as_tensor
from sharded_lamb.core.layout import ShardLayout
from sharded_lamb.kernels.state_format import OF_WEIGHTS, StoredState
from sharded_lamb.sharding.buckets import FlatBucket, flattened, memory_strides
from sharded_lamb.sharding.dcp_tensors import Region, SlicedState, Stamp
from sharded_lamb.sharding.dtensors import is_dtensor
from sharded_lamb.sharding.local_shards import DTensorShards
from sharded_lamb.sharding.placements import ShardSpec, local_part

logger = logging.getLogger("sharded_lamb")

STAMP = ("rank", "shards", "start", "length", "numel", "layout")
REMEDY = (
    "call consolidate_state_dict() on every rank before the first rank saves its state_dict(), or use "
    "sharded_lamb.checkpoint, torch.distributed.checkpoint, or full_state_dict() and load_full_state_dict()"
)
"""How to save state that any number of ranks can load."""
State = dict[str, Tensor]


def decoded_states(buckets: Sequence[FlatBucket], dtensors: DTensorShards) -> dict[int, dict[str, Tensor]]:
    """{parameter: {kind: values}} of state whose storage format is not its values, in new memory.

    This rank's parts, as the tensor classes of `local_states` and `dtensor_states`.
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
    """The part of the bucket's ``position``-th parameter that this rank's slice covers."""
    start = bucket.segment_of(bucket.plan.params[position]).start
    return Region(tuple(bucket.params[position].shape), bucket.strides[position], start)


def local_states(layout: ShardLayout, buckets: Sequence[FlatBucket], step: Tensor) -> dict[int, State]:
    """{parameter: state} of every parameter in a bucket, with the same keys on every rank; tensors are views."""
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
                is_by_element = state.is_by_element
                states[param][state.key] = (
                    SlicedState.of(state.stored, region) if is_by_element else state.stored
                )
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
    """{parameter: state} of the DTensors: DTensors like the parameter, views of the memory that steps update."""
    own_layout = layout.digest()
    states: dict[int, State] = {}
    for param, local in dtensors.local.items():
        spec = specs[param]
        digest = _short(hashlib.sha256(json.dumps([own_layout, spec.described()]).encode()).hexdigest())
        stamp = [rank, world, spec.shard_index, local.numel, layout.numels[param], digest]
        states[param] = {"step": step[param]}
        for state in local.states():
            states[param][state.key] = local.as_dtensor(state.stored) if state.is_by_element else state.stored
        states[param]["shard"] = Stamp.of(stamp)
    return states


def _short(digest: str) -> int:
    return int(digest[:15], 16)


def warn_of_average(saved: Iterable[Iterable[str]]) -> None:
    """Log that an average of the weights is not loaded. ``saved``: kinds of state of each parameter."""
    if any("ema" in kinds for kinds in saved):
        logger.warning(
            "the saved state has an average of the weights, which this optimizer does not keep: construct it with "
            "ema_decay=… to continue it"
        )


def warn_of_masters(states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Log that masters of the parameters' own dtype are not loaded. ``states``: {parameter: saved state}."""
    if any("master" in saved and saved["master"].dtype == p.dtype for p, saved in states.items()):
        logger.warning(
            "the saved state has masters, the exact weights of a model that held rounded ones (of 16 bits, or by "
            "gather_dtype), and this optimizer starts from the model's: load the masters into the model first, or use "
            "sharded_lamb.checkpoint, which does"
        )


def check_local(
    name: str, p: Tensor, own: State, states: Sequence[StoredState], saved: Mapping[str, Any]
) -> None:
    """Check that one parameter's saved slices belong to this rank.

    Args:
        own: the parameter's entry in ``optimizer.state``.
        states: its kinds of state.

    Raises:
        ValueError: the slices belong to another rank or layout, or are whole tensors.
    """
    if "shard" not in saved:
        raise ValueError(
            f"the state of {name!r} has no stamp of a rank and others have one: load the result of one state_dict(), "
            f"consolidate_state_dict() or full_state_dict()"
        )
    stamp, expected = as_tensor(saved["shard"]).tolist(), own["shard"].tolist()
    if stamp != expected and is_dtensor(p):
        raise ValueError(
            f"the state of {name!r} was saved by rank {stamp[0]} of {stamp[1]} and this is rank {expected[0]} of "
            f"{expected[1]}"
            + ("" if stamp[5] == expected[5] else ", or under other placements or of another model")
            + ". state_dict() is one rank's part: save and load every rank's own, with the same mesh and model; "
            f"otherwise {REMEDY}"
        )
    if stamp != expected:
        a, b = dict(zip(STAMP, stamp, strict=True)), dict(zip(STAMP, expected, strict=True))
        raise ValueError(
            f"the state of {name!r} holds elements [{a['start']}, {a['start'] + a['length']}) of {a['numel']}, "
            f"saved by rank {a['rank']} of {a['shards']}, and this is rank {b['rank']} of {b['shards']} with "
            f"[{b['start']}, {b['start'] + b['length']}) of {b['numel']}"
            + ("" if a["layout"] == b["layout"] else " in another layout")
            + ". state_dict() is one rank's slices: save and load every rank's own, with the same ranks, the same "
            f"model and the same state_dtype of each group; otherwise {REMEDY}"
        )
    # Masters of the parameter's own dtype exist where gathers are compressed: they begin as its weights.
    begins = {state.kind for state in states if state.kind == "master" and state.format.value == p.dtype}
    missing = {"step", *(state.kind for state in states)} - {"ema"} - begins - saved.keys()
    if missing:
        raise ValueError(f"the state of {name!r} lacks {sorted(missing)}: it was saved with other dtypes")
    check_step(name, saved)


def load_local(p: Tensor, own: State, states: Sequence[StoredState], saved: Mapping[str, Any]) -> None:
    """Copy one parameter's checked, saved slices into its state. Arguments as of `check_local`."""
    own["step"].copy_(as_tensor(saved["step"]).reshape(()))
    for state in states:
        if state.kind not in saved:  # an average that was not kept begins here
            state.reset()
            continue
        values = saved[state.kind]
        if is_dtensor(values):
            assert is_dtensor(p)
            values = flattened(local_part(values), memory_strides(local_part(p)))
        state.store(values)


def check_complete(state_dict: dict[str, Any] | None) -> dict[str, Any]:
    """Raises ValueError unless ``state_dict`` is a result of `ShardedLamb.full_state_dict`. On the first rank."""
    if state_dict is None:
        raise ValueError("load_full_state_dict needs the state dict on the first rank, got None")
    missing = {"state", "param_groups"} - state_dict.keys()
    if missing:
        raise ValueError(f"the full state dict lacks {sorted(missing)}: pass the result of full_state_dict()")
    return state_dict


def is_whole(states: Iterable[Mapping[str, Any]]) -> bool:
    """Whether states hold whole tensors: none has the stamp of a rank."""
    return not any("shard" in saved for saved in states)


def steps_of(saved: Mapping[str, Any]) -> float:
    """The step count of one parameter's saved state. Reads the device."""
    return float(as_tensor(saved["step"]))


def check_step(name: str, saved: Mapping[str, Any]) -> None:
    """Raises ValueError unless the step of one parameter's saved state is a count. Reads the device."""
    step = as_tensor(saved.get("step", ()))
    if step.numel() != 1 or not (0 <= float(step) < 2.0**53 and float(step).is_integer()):
        raise ValueError(f"step of {name!r}: expected a whole number >= 0, got {saved.get('step')!r}")


def check_full(rows: Iterable[tuple[str, Sequence[int], Mapping[str, Any]]], moments: Sequence[str]) -> None:
    """Raises ValueError if a whole state does not fit its parameter. ``rows``: (name, shape, saved state)."""
    for name, shape, saved in rows:
        lacking = [key for key in moments if key not in saved]
        if lacking:
            raise ValueError(
                f"the state of {name!r} has {sorted(saved)} and lacks {lacking}: it is of another optimizer or variant"
            )
        for key in (*moments, *(kind for kind in OF_WEIGHTS if kind in saved)):
            if tuple(saved[key].shape) != tuple(shape):
                actual = tuple(saved[key].shape)
                raise ValueError(
                    f"{key} of {name!r}: expected a whole tensor of shape {tuple(shape)}, got {actual}; load the "
                    f"result of full_state_dict(), Lamb.state_dict(), or state_dict() after consolidate_state_dict()"
                )
        check_step(name, saved)


def gather_full(
    collectives: Collectives,
    layout: ShardLayout,
    buckets: Sequence[FlatBucket],
    dtensors: DTensorShards,
    step: Tensor,
    to: int,
) -> dict[int, State] | None:
    """Whole state tensors in their parameters' shapes, on the CPU of rank ``to``; None elsewhere. Collective.

    Streamed: one kind of one bucket at a time, one rank's shard at a time; DTensors one tensor at a time.
    """
    receives = collectives.topology.rank == to
    states: dict[int, State] = {param: {} for param in range(len(layout.numels))}
    steps = step.cpu()
    for bucket in buckets:
        for state in bucket.states():
            parts = collectives.gather_to(state.values(), to)
            if parts is None:
                continue
            whole = torch.cat(parts)
            for position, param in enumerate(bucket.plan.params):
                states[param][state.kind] = bucket.param_view(position, whole).clone()
    for param, local in dtensors.local.items():
        for state in local.states():
            whole = local.whole(state.values())
            if receives:
                states[param][state.kind] = whole.to("cpu", copy=True)
    for param, entry in states.items():
        entry["step"] = steps[param].clone()
    return states if receives else None


def scatter_full(
    collectives: Collectives,
    buckets: Sequence[FlatBucket],
    dtensors: DTensorShards,
    step: Tensor,
    states: Mapping[int, Mapping[str, Tensor]] | None,
) -> None:
    """The inverse of `gather_full`: the first rank passes ``states``, every rank stores its slices. Collective.

    Missing state starts as in a new optimizer: moments 0, masters and averages from the model's weights.
    """
    first = collectives.topology.rank == 0
    saved = states or {}
    for bucket in buckets:
        for state in bucket.states():
            shard, parts = state.empty(), None
            if first:
                whole = bucket.flat.to("cpu", shard.dtype, copy=True)
                if state.kind not in OF_WEIGHTS:
                    whole.zero_()
                for position, param in enumerate(bucket.plan.params):
                    if state.kind in saved.get(param, {}):
                        bucket.param_view(position, whole).copy_(saved[param][state.kind])
                parts = list(whole.chunk(bucket.plan.world_size))
            collectives.scatter_from_first(shard, parts)
            state.store(shard)
    _scatter_dtensors(collectives, dtensors, saved)
    step.zero_()
    if first:
        for param, entry in saved.items():
            step[param] = as_tensor(entry["step"]).reshape(())
    collectives.broadcast(step)


def _scatter_dtensors(
    collectives: Collectives, dtensors: DTensorShards, saved: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Broadcast one whole tensor at a time; every rank stores its part."""
    first, device = collectives.topology.rank == 0, collectives.device
    rows = [(param, local, state) for param, local in dtensors.local.items() for state in local.states()]
    saved_mask = torch.tensor(
        [state.kind in saved.get(param, {}) for param, _, state in rows], dtype=torch.int64, device=device
    )
    if rows:
        collectives.broadcast(saved_mask)
    for (param, local, state), is_saved in zip(rows, saved_mask.tolist(), strict=True):
        if not is_saved:
            state.reset()
            continue
        whole = torch.empty(local.p.shape, dtype=state.format.value, device=device)
        if first:
            whole.copy_(saved[param][state.kind])
        collectives.broadcast(whole)
        from torch.distributed.tensor import distribute_tensor

        part = distribute_tensor(whole, local.p.device_mesh, local.p.placements, src_data_rank=None)
        state.store(flattened(local_part(part), local.strides))
