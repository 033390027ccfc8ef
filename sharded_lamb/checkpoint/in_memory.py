"""A checkpoint as whole CPU tensors in one process, for converters."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from sharded_lamb.checkpoint import plain, tensorfile
from sharded_lamb.checkpoint.manifest import Manifest, SavedTensor, check_files, read_manifest
from sharded_lamb.checkpoint.saving import ExtraTensors, written_by
from sharded_lamb.checkpoint.storage import ManifestHeader, Writer
from sharded_lamb.core.host_values import as_tensor


@dataclass(frozen=True)
class InMemoryCheckpoint:
    """Weights, optimizer state and extra data of a checkpoint; names are those of the unwrapped model."""

    weights: dict[str, Tensor]  # parameters and buffers, in the model's dtype
    # {parameter: {kind: tensor}}: step (fp64 scalar), exp_avg, exp_avg_sq; master if it is not the weight itself
    states: dict[str, dict[str, Tensor]]
    groups: list[dict[str, Any]]  # {"names": [...], "options": {"lr": …, "betas": …, …}}
    optimizer: dict[str, Any] = field(default_factory=dict)  # max_grad_norm, skipped_steps
    extra: dict[str, Any] = field(default_factory=dict)  # plain data and tensors
    aliases: dict[str, str] = field(default_factory=dict)  # {other name of a tied parameter: first name}
    written_by: dict[str, Any] = field(default_factory=dict)  # set on reading, ignored on writing


def read_tensor(folder: Path, tensor: SavedTensor) -> Tensor:
    """Returns the whole tensor, on the CPU.

    Raises:
        CheckpointError: a file is missing or truncated.
    """
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    for chunk in tensor.chunks:
        zeros = (0,) * len(chunk.sizes)
        part = tensorfile.read(folder, chunk.place, tensor.dtype, chunk.sizes, zeros, chunk.sizes)
        box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box].copy_(part)
    return whole


def read_contents(path: str | os.PathLike[str]) -> InMemoryCheckpoint:
    """Reads a whole checkpoint into memory and verifies its hashes.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or in a newer format.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return _contents(folder, manifest)


def _contents(folder: Path, manifest: Manifest) -> InMemoryCheckpoint:
    def read(name: str) -> Tensor:
        return read_tensor(folder, manifest.tensors[name])

    groups = [
        {"names": list(group["names"]), "options": plain.decoded(group["options"], read)}
        for group in manifest.groups
    ]
    states = {
        name: {kind: read_tensor(folder, tensor) for kind, tensor in kinds.items()}
        for name, kinds in manifest.kinds().items()
    }
    return InMemoryCheckpoint(
        {name: read(f"model.{name}") for name in manifest.model_names},
        states,
        groups,
        plain.decoded(dict(manifest.optimizer), read),
        plain.decoded(manifest.extra or {}, read),
        dict(manifest.aliases),
        dict(manifest.written_by),
    )


def write_contents(path: str | os.PathLike[str], contents: InMemoryCheckpoint) -> None:
    """Writes a checkpoint from this process alone; `load` reads it on any number of ranks. No collectives.

    Raises:
        ValueError: a state or group names no weight, or a state's shape is not its weight's.
        OSError: the checkpoint could not be written.
    """
    _check(contents)
    extra_tensors = ExtraTensors(is_first=True)
    tensors = {f"model.{name}": tensor for name, tensor in contents.weights.items()}
    for name, state in contents.states.items():
        for kind, value in state.items():
            value = as_tensor(value)
            tensors[f"optimizer.{name}.{kind}"] = value.double().reshape(()) if kind == "step" else value
    groups = tuple(
        {
            "names": list(group["names"]),
            "options": plain.encoded(group["options"], f"options of group {i}", extra_tensors),
        }
        for i, group in enumerate(contents.groups)
    )
    steps = [int(state["step"]) for state in contents.states.values()]
    optimizer = {
        "max_grad_norm": None,
        "skipped_steps": 0,
        "step": max(steps, default=0),
        **contents.optimizer,
    }
    extra = plain.encoded(contents.extra, "extra", extra_tensors)
    header = ManifestHeader(
        written_by(1, None, None),
        contents.aliases,
        groups,
        plain.encoded(optimizer, "optimizer", extra_tensors),
        extra,
    )
    _write_alone(Writer(path, header), {**tensors, **extra_tensors.tensors})


def _check(contents: InMemoryCheckpoint) -> None:
    for name, state in contents.states.items():
        if name not in contents.weights:
            raise ValueError(f"the checkpoint has state of {name!r} but no weight of that name")
        for kind, value in state.items():
            if kind != "step" and value.shape != contents.weights[name].shape:
                raise ValueError(
                    f"{kind} of {name!r} has shape {tuple(value.shape)}, its weight "
                    f"{tuple(contents.weights[name].shape)}"
                )
    names = [name for group in contents.groups for name in group["names"]]
    unexpected = [name for name in [*names, *contents.states] if name not in contents.weights]
    if unexpected:
        raise ValueError(f"group member {unexpected[0]!r} is not a weight of the checkpoint")


def _write_alone(writer: Writer, tensors: dict[str, Tensor]) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state_dict=tensors, is_coordinator=True)
    writer.set_up_storage_writer(True)
    try:
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
        writer.finish(metadata, [writer.write_data(plan, planner).wait()])
    finally:
        writer.abandon()
