"""A whole checkpoint in memory, for converters: whole CPU tensors in one process."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from sharded_lamb.checkpoint import plain, tensorfile
from sharded_lamb.checkpoint.manifest import Manifest, SavedTensor, check_files, read_manifest
from sharded_lamb.checkpoint.saving import Kept, written_by
from sharded_lamb.checkpoint.storage import ManifestHeader, Writer


@dataclass(frozen=True)
class InMemoryCheckpoint:
    """What a checkpoint holds. Names are as the bare model has them."""

    weights: dict[str, Tensor]  # parameters and buffers, in the model's dtype
    states: dict[
        str, dict[str, Tensor]
    ]  # parameter → step (fp64 scalar), exp_avg, exp_avg_sq; master, where kept apart
    groups: list[dict[str, Any]]  # {"names": [...], "options": {"lr": …, "betas": …, …}}
    optimizer: dict[str, Any] = field(default_factory=dict)  # max_grad_norm, skipped_steps
    extra: dict[str, Any] = field(default_factory=dict)  # plain data and tensors
    aliases: dict[str, str] = field(default_factory=dict)  # other names of tied parameters → the first
    written_by: dict[str, Any] = field(default_factory=dict)  # as read; not written


def read_tensor(folder: Path, tensor: SavedTensor) -> Tensor:
    """A whole tensor. Raises CheckpointError."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    for chunk in tensor.chunks:
        zeros = (0,) * len(chunk.sizes)
        part = tensorfile.read(folder, chunk.place, tensor.dtype, chunk.sizes, zeros, chunk.sizes)
        box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box].copy_(part)
    return whole


def read_contents(path: str | os.PathLike[str]) -> InMemoryCheckpoint:
    """Everything in a checkpoint, hashes verified.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    folder = Path(path)
    found = read_manifest(folder)
    check_files(folder, found)
    return _contents(folder, found)


def _contents(folder: Path, found: Manifest) -> InMemoryCheckpoint:
    def read(name: str) -> Tensor:
        return read_tensor(folder, found.tensors[name])

    groups = [
        {"names": list(group["names"]), "options": plain.decoded(group["options"], read)}
        for group in found.groups
    ]
    states = {
        name: {kind: read_tensor(folder, tensor) for kind, tensor in kinds.items()}
        for name, kinds in found.kinds().items()
    }
    return InMemoryCheckpoint(
        {name: read(f"model.{name}") for name in found.model_names},
        states,
        groups,
        plain.decoded(dict(found.optimizer), read),
        plain.decoded(found.extra or {}, read),
        dict(found.aliases),
        dict(found.written_by),
    )


def write_contents(path: str | os.PathLike[str], contents: InMemoryCheckpoint) -> None:
    """A checkpoint that `load` takes on any number of ranks; this process writes all of it.

    Raises:
        ValueError: state of a parameter that is no weight, or of another shape.
        OSError: it could not be written.
    """
    _check(contents)
    kept = Kept(is_first=True)
    tensors = {f"model.{name}": tensor for name, tensor in contents.weights.items()}
    for name, state in contents.states.items():
        for kind, value in state.items():
            value = torch.as_tensor(value)
            tensors[f"optimizer.{name}.{kind}"] = value.double().reshape(()) if kind == "step" else value
    groups = tuple(
        {
            "names": list(group["names"]),
            "options": plain.encoded(group["options"], f"options of group {i}", kept),
        }
        for i, group in enumerate(contents.groups)
    )
    steps = [int(state["step"]) for state in contents.states.values()]
    wide = {"max_grad_norm": None, "skipped_steps": 0, "step": max(steps, default=0), **contents.optimizer}
    extra = plain.encoded(contents.extra, "extra", kept)
    header = ManifestHeader(
        written_by(1, None, None), contents.aliases, groups, plain.encoded(wide, "optimizer", kept), extra
    )
    _write_alone(Writer(path, header), {**tensors, **kept.tensors})


def _check(contents: InMemoryCheckpoint) -> None:
    for name, state in contents.states.items():
        if name not in contents.weights:
            raise ValueError(f"there is state of {name!r} and no weight of that name")
        for kind, value in state.items():
            if kind != "step" and value.shape != contents.weights[name].shape:
                raise ValueError(
                    f"{kind} of {name!r} has shape {tuple(value.shape)} and the weight "
                    f"{tuple(contents.weights[name].shape)}"
                )
    names = [name for group in contents.groups for name in group["names"]]
    strangers = [name for name in [*names, *contents.states] if name not in contents.weights]
    if strangers:
        raise ValueError(f"group member {strangers[0]!r} is no weight of the checkpoint")


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
