"""Full state dicts from DeepSpeed's partitions and back: the format that every optimizer of this package loads."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.core.hyperparams import validate_change
from sharded_lamb.core.layout import Segment
from sharded_lamb.deepspeed.engine_probe import accelerator_device
from sharded_lamb.deepspeed.mapping import OptimizerPartitions, Partition, Row, model_slice, tensor_slice
from sharded_lamb.deepspeed.step_tensors import State
from sharded_lamb.sharding.state import check_complete, check_full


def groups_of_rows(rows: Sequence[Row], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups as in a state dict: options, and the indices of the model's parameters."""
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [i for i, row in enumerate(rows) if row[2] is group],
        }
        for group in groups
    ]


def _shape(p: Tensor) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))


def _by_parameter(
    partitions: OptimizerPartitions,
) -> dict[int, tuple[Partition, list[tuple[Partition, Segment]]]]:
    """{parameter: (a partition that steps it, this rank's segments)}, in the same order on every rank."""
    by_parameter: dict[int, tuple[Partition, list[tuple[Partition, Segment]]]] = {}
    for partition in partitions.local:
        for param in partition.params:
            by_parameter.setdefault(param, (partition, []))
        for segment in partition.segments:
            by_parameter[segment.param][1].append((partition, segment))
    return dict(sorted(by_parameter.items()))


def _memory(partition: Partition, key: str, state: State) -> Tensor:
    return partition.tensor.detach() if key == "master" else state[partition.tensor][key]


def gather(
    rows: Sequence[Row],
    partitions: OptimizerPartitions,
    state: State,
    moments: Sequence[str],
    collectives: Collectives,
) -> dict[int, dict[str, Tensor]]:
    """{parameter: full tensors} on the first rank's CPU; {} elsewhere. Under ZeRO collective: 3 reduces a parameter."""
    first = dist.get_rank() == 0
    states: dict[int, dict[str, Tensor]] = {}
    for param, (partition, segments) in _by_parameter(partitions).items():
        shape = _shape(rows[param][1])
        entry: dict[str, Tensor] = {"step": state[partition.tensor]["step"].cpu().clone()}
        for key in ("master", *moments):
            memory = _memory(partition, key, state)
            if not partitions.sharded:
                entry[key] = memory.cpu().clone()
                continue
            full = torch.zeros(math.prod(shape), dtype=memory.dtype, device="cpu")
            for owner, segment in segments:
                part = tensor_slice(_memory(owner, key, state), segment)
                full[segment.start : segment.start + segment.length] = part.cpu()
            collectives.sum_to_first(full)
            entry[key] = full.view(shape)
        if first:
            states[param] = entry
    return states


def check(
    rows: Sequence[Row],
    partitions: OptimizerPartitions,
    moments: Sequence[str],
    state_dict: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """The options of the saved groups.

    Raises:
        ValueError: the full state dict does not fit this optimizer.
    """
    saved = check_complete(state_dict)
    unexpected = sorted(set(saved["state"]) - set(_by_parameter(partitions)), key=str)
    if unexpected:
        raise ValueError(
            f"the full state dict has state of parameters {unexpected}, which are not trained here"
        )
    check_full(
        ((rows[param][0], _shape(rows[param][1]), entry) for param, entry in saved["state"].items()), moments
    )
    options = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in saved["param_groups"]
    ]
    groups = list({id(group): group for _, _, group in rows}.values())
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    sizes = [sum(row[2] is group for row in rows) for group in groups]
    if saved_sizes != sizes:
        raise ValueError(
            f"the full state dict has groups of {saved_sizes} parameters and this optimizer has {sizes}: construct it "
            f"from the same model with the same groups"
        )
    for group, own in zip(groups, options, strict=True):
        validate_change(group, own)
    for partition in partitions.local:
        steps = {float(saved["state"].get(param, {}).get("step", 0.0)) for param in partition.params}
        if len(steps) > 1:
            raise ValueError(
                f"parameters from {rows[partition.params[0]][0]!r} on have step counts {sorted(steps)}, but DeepSpeed "
                f"steps them as one tensor with one step count (gradients were missing in the run that saved them)"
            )
    return options


def scatter(
    rows: Sequence[Row],
    partitions: OptimizerPartitions,
    state: State,
    moments: Sequence[str],
    state_dict: Mapping[str, Any] | None,
) -> None:
    """The reverse of `gather`: the first rank passes ``state_dict``. Collective: 4 broadcasts per parameter.

    Moments and steps without a saved entry become 0. Weights without a saved master are unchanged.
    """
    saved = state_dict["state"] if state_dict is not None else {}
    for param, (partition, segments) in _by_parameter(partitions).items():
        p = rows[param][1]
        entry = saved.get(param, {})
        flags = torch.tensor(
            [float(entry.get("step", 0.0)), float("master" in entry)], dtype=torch.float64, device="cpu"
        )
        _broadcast(flags)
        state[partition.tensor]["step"].fill_(float(flags[0]))
        for key in ("master", *moments):
            if key == "master" and not flags[1]:
                continue
            full = torch.zeros(_shape(p), dtype=state[partition.tensor]["exp_avg"].dtype, device="cpu")
            if key in entry:
                full.copy_(entry[key])
            _broadcast(full)
            if not partitions.sharded:
                _memory(partition, key, state).copy_(full)
                if key == "master":
                    p.detach().copy_(full)
                continue
            for owner, segment in segments:
                part = full.view(-1)[segment.start : segment.start + segment.length]
                tensor_slice(_memory(owner, key, state), segment).copy_(part)
                if key == "master" and hasattr(p, "ds_tensor"):
                    model_slice(p, segment).copy_(part)
            if key == "master" and p.numel() == full.numel():  # a parameter that every rank has in full
                p.detach().copy_(full)


def _broadcast(tensor: Tensor) -> None:
    if dist.get_world_size() > 1:
        wire = tensor.to(accelerator_device())
        dist.broadcast(wire, 0)
        tensor.copy_(wire)
