"""`load`: into any number of ranks, any stage, other dtypes."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.tensor import DTensor

from sharded_lamb.checkpoint import manifest, parts, plain
from sharded_lamb.checkpoint.errors import CheckpointError
from sharded_lamb.checkpoint.in_memory import read_tensor
from sharded_lamb.checkpoint.manifest import Manifest, read_manifest
from sharded_lamb.checkpoint.parts import ReadRequest
from sharded_lamb.checkpoint.rank_group import RankGroup, unwrapped
from sharded_lamb.checkpoint.saving import prepared
from sharded_lamb.checkpoint.storage import Reader
from sharded_lamb.core.hyperparams import check_max_grad_norm, validate_group
from sharded_lamb.optim.base import LambOptimizer
from sharded_lamb.optim.sharded_state import ShardedOptimizer


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any = None,
    extra: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
    options: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into a model and an optimizer that were made as those that were saved. Collective.

    Number of ranks, stage, mesh, buckets and dtypes may be others. Of fp16 and bf16 parameters the masters are loaded;
    weights of another dtype than the saved ones are rounded from the saved masters.

    Args:
        path: the checkpoint's folder, on storage that all ranks see.
        model, optimizer: as `save` takes them. Groups must be of the same parameters; their options become the saved
            ones.
        extra: {name: object}: those with ``load_state_dict`` are given what was saved under their name.
        verify: read all files first, divided among the ranks, and compare their hashes: nothing is loaded from a
            checkpoint that is damaged anywhere.
        options: whether groups' options, ``max_grad_norm`` and ``skipped_steps`` become the saved ones; False: as
            they are.
        process_group: as of `save`.

    Returns:
        What was passed to `save` as ``extra``, objects as what their ``state_dict`` gave; tensors whole, on the CPU.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format; nothing was loaded.
        ValueError: it is of another model or other groups; nothing was loaded.
        TypeError: ``optimizer`` is neither `Lamb` nor `ShardedLamb`.
    """
    ranks, folder, known = prepared(path, optimizer, process_group)
    found = ranks.each(lambda: read_manifest(folder))
    ranks.agree("the checkpoint", ranks.each(lambda: manifest.digest(folder)))
    ranks.each(lambda: manifest.check_files(folder, found, part=ranks.rank, parts=ranks.size, hashes=verify))
    if isinstance(known, ShardedOptimizer):
        known.synchronize()
    loading = ranks.each(lambda: _Loading(folder, found, model, known, extra or {}, options))
    _read(folder, found, ranks, loading.requests)
    return ranks.each(loading.finish)


def _read(folder: Path, found: Manifest, ranks: RankGroup, requests: list[ReadRequest]) -> None:
    try:
        for state in parts.rounds(requests):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp_load(
                    state,
                    storage_reader=Reader(folder, found),
                    planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=ranks.group,
                    no_dist=ranks.group is None,
                )
    except CheckpointException as error:
        ranks.raise_together(unwrapped(error))


class _Loading:
    """What goes where on this rank. Made without writing anything: what does not fit is found here."""

    def __init__(
        self,
        folder: Path,
        found: Manifest,
        model: nn.Module,
        optimizer: LambOptimizer | None,
        extra: Mapping[str, Any],
        options: bool,
    ) -> None:
        self.options = options
        self.where, self.found, self.optimizer, self.extra = f"checkpoint {folder}", found, optimizer, extra
        self.model = model
        self.held = held = parts.ModelParts.of(model)
        parts.check_same_model(found, held, self.where)
        self._check_ties(folder)
        self._check_memory()
        self.requests = list(parts.weight_requests(found, held))
        self.packed: dict[str, Any] = {}
        self.zeros: list[Tensor] = []
        self._check_extra()
        wanted = [found.extra, found.optimizer, [group["options"] for group in found.groups]]
        self.tensors = {
            name: _room(found, name, _template(extra, name)) for name in plain.tensor_names(wanted)
        }
        if optimizer is not None:
            self._plan_optimizer(optimizer, held)
        self.requests += [ReadRequest(name, tensor) for name, tensor in self.tensors.items()]

    def _plan_optimizer(self, optimizer: LambOptimizer, held: parts.ModelParts) -> None:
        names = parts.names_of_groups(optimizer, held)
        self._check_groups(names)
        self._check_options(optimizer)
        self.packed = optimizer.state_dict()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        kinds, aliases = self.found.kinds(), self.found.aliases
        for place, name in enumerate(name for group in names for name in group):
            source = aliases.get(name, name)
            saved = kinds.get(source)
            state = self.packed["state"].get(place)
            if saved is None:
                if state is not None:  # it was frozen, or had had no gradient: it is as new
                    self.zeros += [state[kind] for kind in ("step", *parts.KINDS)]
                    self.requests += (
                        [ReadRequest(f"model.{source}", state["master"])] if "master" in state else []
                    )
                continue
            if state is None:
                if isinstance(optimizer, ShardedOptimizer):  # frozen here
                    continue
                state = self.packed["state"][place] = _room_of_lamb(params[place])
            self.requests += parts.state_requests(self.found, source, saved, state, self.where)

    def _check_memory(self) -> None:
        """Raises ValueError for a tensor that cannot be written to element by element."""
        for name, tensor in self.held.tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if any(
                stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True)
            ):
                raise ValueError(
                    f"{name} is expanded, and its elements share memory: nothing can be loaded into it; clone() it"
                )

    def _check_ties(self, folder: Path) -> None:
        """Raises ValueError where one of two saved tensors would be lost in a parameter that this model has once."""
        for other, first in self.held.aliases.items():
            saved = [self.found.aliases.get(name, name) for name in (first, other)]
            if saved[0] != saved[1]:
                values = [read_tensor(folder, self.found.tensors[f"model.{name}"]) for name in saved]
                if not torch.equal(*values):
                    raise ValueError(
                        f"{self.where} holds {first} and {other} apart, with values of their own, and this model ties "
                        f"them: load it into a model that does not"
                    )

    def _check_extra(self) -> None:
        saved = self.found.extra or {}
        try:
            plain.decoded([saved, self.found.optimizer], self.found.tensors.get)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.where}: what was saved as extra is damaged: {error!r}") from error
        missing = [name for name in self.extra if name not in saved]
        if missing:
            raise ValueError(
                f"{self.where} has no extra {missing[0]!r}, only {sorted(saved)}: leave it out of extra, and set it "
                f"up anew"
            )

    def _check_options(self, optimizer: LambOptimizer) -> None:
        """Raises CheckpointError for options that no optimizer could have been saved with."""
        wide = self.found.optimizer
        try:
            for saved, group in zip(self.found.groups, optimizer.param_groups, strict=True):
                own = {key: value for key, value in group.items() if key != "params"}
                validate_group({**own, **plain.decoded(saved["options"], self.tensors.get)})
            check_max_grad_norm(wide["max_grad_norm"])
            if wide["skipped_steps"] < 0:
                raise ValueError(f"skipped_steps is {wide['skipped_steps']}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.where}: its options are damaged: {error!r}") from error

    def _check_groups(self, names: list[list[str]]) -> None:
        if not self.found.groups:
            raise ValueError(f"{self.where} holds weights only: load it with optimizer=None")
        alias = self.found.aliases
        theirs = [[alias.get(n, n) for n in group["names"]] for group in self.found.groups]
        ours = [[alias.get(n, n) for n in group] for group in names]
        if [sorted(group) for group in theirs] == [sorted(group) for group in ours]:
            return
        if len(theirs) != len(ours):
            raise ValueError(
                f"{self.where} has {len(theirs)} parameter groups and this optimizer {len(ours)}"
            )
        for number, (saved, own) in enumerate(zip(theirs, ours, strict=True)):
            odd = sorted(set(saved) ^ set(own))
            if odd:
                holder = "the checkpoint" if odd[0] in saved else "this optimizer"
                raise ValueError(
                    f"{self.where}: parameter groups differ: {odd[0]!r} is in group {number} of {holder} only (and "
                    f"{len(odd) - 1} more): construct the optimizer with the groups that it was saved with"
                )

    def _finish_optimizer(self, optimizer: LambOptimizer) -> None:
        for tensor in self.zeros:
            tensor.zero_()
        own_lr = [group["lr"] for group in optimizer.param_groups]
        if self.options:
            for group, saved in zip(self.packed["param_groups"], self.found.groups, strict=True):
                group.update(plain.decoded(saved["options"], self.tensors.__getitem__))
        optimizer.load_state_dict(self.packed)
        for group, lr in zip(optimizer.param_groups, own_lr, strict=True):
            if isinstance(lr, Tensor):  # a scheduler or a graph may hold it
                group["lr"] = lr.fill_(group["lr"])
        if self.options:
            optimizer.max_grad_norm = self.found.optimizer["max_grad_norm"]
            if isinstance(optimizer, ShardedOptimizer):
                optimizer.skipped_steps = self.found.optimizer["skipped_steps"]

    def finish(self) -> dict[str, Any]:
        """Once every tensor is read."""
        optimizer, wide = self.optimizer, self.found.optimizer
        if optimizer is not None:
            self._finish_optimizer(optimizer)
        if "model" in wide:
            rest: dict[str, Any] = plain.decoded(wide["model"], self.tensors.__getitem__)
            named = {self.held.raw[name]: value for name, value in rest.items() if name in self.held.raw}
            self.model.load_state_dict(named, strict=False)
        loaded: dict[str, Any] = plain.decoded(self.found.extra or {}, self.tensors.__getitem__)
        for name, value in self.extra.items():
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(loaded[name])
        return loaded


def _room(found: Manifest, name: str, template: Any) -> Tensor:
    """Where a tensor of ``extra`` is read to."""
    if isinstance(template, DTensor):
        return torch.empty_like(template)
    return torch.empty(found.tensors[name].shape, dtype=found.tensors[name].dtype, device="cpu")


def _template(extra: Mapping[str, Any], name: str) -> Any:
    """What an object's state dict has now at the place of the saved tensor ``name``, if anything."""
    steps = name.removeprefix("extra.").split(".")
    value: Any = extra.get(steps[0])
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    rest = steps[1:]
    while rest and isinstance(value, Mapping):  # keys may have dots
        key = next((k for k in (".".join(rest[:n]) for n in range(len(rest), 0, -1)) if k in value), None)
        if key is None:
            return None
        value, rest = value[key], rest[key.count(".") + 1 :]
    return None if rest else value


def _room_of_lamb(p: Tensor) -> dict[str, Tensor]:
    """The state of a parameter in `Lamb`, which makes it at the first gradient."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    return {"step": torch.zeros((), dtype=torch.float64)} | {
        kind: torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format) for kind in parts.KINDS
    }
