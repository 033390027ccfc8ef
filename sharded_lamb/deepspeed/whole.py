"""Whole state tensors from DeepSpeed's partitions and back: the form that every optimizer of this package loads."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.core.hyperparams import validate_group
from sharded_lamb.core.layout import Segment
from sharded_lamb.deepspeed.calling import accelerator_device
from sharded_lamb.deepspeed.mapping import OptimizerPartitions, Partition, Row, model_slice, tensor_slice
from sharded_lamb.deepspeed.stepped import MOMENTS, State
from sharded_lamb.sharding.state import check_complete, check_full

KEYS = ("master", *MOMENTS)


def groups_of_rows(rows: Sequence[Row], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups as a state dict packs them: options, and the places of the model's parameters."""
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [i for i, row in enumerate(rows) if row[2] is group],
        }
        for group in groups
    ]


def _shape(p: Tensor) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))


def _places(held: OptimizerPartitions) -> dict[int, tuple[Partition, list[tuple[Partition, Segment]]]]:
    """{parameter: (a partition that steps it, this rank's segments)}, in one order on every rank."""
    found: dict[int, tuple[Partition, list[tuple[Partition, Segment]]]] = {}
    for partition in held.partitions:
        for param in partition.params:
            found.setdefault(param, (partition, []))
        for segment in partition.segments:
            found[segment.param][1].append((partition, segment))
    return dict(sorted(found.items()))


def _memory(partition: Partition, key: str, state: State) -> Tensor:
    return partition.tensor.detach() if key == "master" else state[partition.tensor][key]


def gather(
    rows: Sequence[Row], held: OptimizerPartitions, state: State, collectives: Collectives
) -> dict[int, dict[str, Tensor]]:
    """{parameter: whole tensors} on the first rank's CPU; nothing elsewhere. Under ZeRO: 3 reductions a parameter."""
    first = dist.get_rank() == 0
    states: dict[int, dict[str, Tensor]] = {}
    for param, (partition, parts) in _places(held).items():
        shape = _shape(rows[param][1])
        kept: dict[str, Tensor] = {"step": state[partition.tensor]["step"].cpu().clone()}
        for key in KEYS:
            memory = _memory(partition, key, state)
            if not held.sharded:
                kept[key] = memory.cpu().clone()
                continue
            whole = torch.zeros(math.prod(shape), dtype=memory.dtype)
            for owner, segment in parts:
                piece = tensor_slice(_memory(owner, key, state), segment)
                whole[segment.start : segment.start + segment.length] = piece.cpu()
            collectives.sum_to_first(whole)
            kept[key] = whole.view(shape)
        if first:
            states[param] = kept
    return states


def check(
    rows: Sequence[Row], held: OptimizerPartitions, state_dict: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The options of the saved groups. Raises ValueError where a full state does not fit."""
    saved = check_complete(state_dict)
    strangers = sorted(set(saved["state"]) - set(_places(held)), key=str)
    if strangers:
        raise ValueError(
            f"the full state dict has state of parameters {strangers}, which are not trained here"
        )
    check_full([name for name, _, _ in rows], [_shape(p) for _, p, _ in rows], saved["state"])
    options = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in saved["param_groups"]
    ]
    groups = list({id(group): group for _, _, group in rows}.values())
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    ours = [sum(row[2] is group for row in rows) for group in groups]
    if theirs != ours:
        raise ValueError(
            f"the full state dict holds groups of {theirs} parameters and this optimizer has {ours}: construct it from "
            f"the same model with the same groups"
        )
    for group, own in zip(groups, options, strict=True):
        validate_group({**group, **own})
    for partition in held.partitions:
        steps = {float(saved["state"].get(param, {}).get("step", 0.0)) for param in partition.params}
        if len(steps) > 1:
            raise ValueError(
                f"parameters from {rows[partition.params[0]][0]!r} on were saved at steps {sorted(steps)}: DeepSpeed "
                f"steps them as one tensor with one step count (gradients were missing in the run that saved them)"
            )
    return options


def scatter(
    rows: Sequence[Row], held: OptimizerPartitions, state: State, state_dict: Mapping[str, Any] | None
) -> None:
    """The reverse of `gather`: the first rank has ``state_dict``. Collective: 4 broadcasts a parameter.

    What was not saved starts anew: moments and steps 0. Weights are left as they are where there is no master.
    """
    saved = state_dict["state"] if state_dict is not None else {}
    for param, (partition, parts) in _places(held).items():
        p = rows[param][1]
        own = saved.get(param, {})
        flags = torch.tensor([float(own.get("step", 0.0)), float("master" in own)], dtype=torch.float64)
        _broadcast(flags)
        state[partition.tensor]["step"].fill_(float(flags[0]))
        for key in KEYS:
            if key == "master" and not flags[1]:
                continue
            whole = torch.zeros(_shape(p), dtype=state[partition.tensor]["exp_avg"].dtype)
            if key in own:
                whole.copy_(own[key])
            _broadcast(whole)
            if not held.sharded:
                _memory(partition, key, state).copy_(whole)
                if key == "master":
                    p.detach().copy_(whole)
                continue
            for owner, segment in parts:
                piece = whole.view(-1)[segment.start : segment.start + segment.length]
                tensor_slice(_memory(owner, key, state), segment).copy_(piece)
                if key == "master" and hasattr(p, "ds_tensor"):
                    model_slice(p, segment).copy_(piece)
            if key == "master" and p.numel() == whole.numel():  # what every rank has whole
                p.detach().copy_(whole)


def _broadcast(tensor: Tensor) -> None:
    if dist.get_world_size() > 1:
        wire = tensor.to(accelerator_device())
        dist.broadcast(wire, 0)
        tensor.copy_(wire)
