"""`load`: into any number of ranks, any stage and any dtype."""

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

from sharded_lamb.checkpoint import parts, plain
from sharded_lamb.checkpoint.errors import CheckpointError
from sharded_lamb.checkpoint.in_memory import read_tensor
from sharded_lamb.checkpoint.manifest import Manifest, check_files, digest, read_manifest
from sharded_lamb.checkpoint.parts import ReadRequest
from sharded_lamb.checkpoint.rank_group import RankGroup, unwrapped
from sharded_lamb.checkpoint.saving import prepared
from sharded_lamb.checkpoint.sparse import is_sparse
from sharded_lamb.checkpoint.storage import Reader
from sharded_lamb.core.hyperparams import check_fixed, check_max_grad_norm, validate_group
from sharded_lamb.core.names import normalize
from sharded_lamb.core.rule import MOMENTS
from sharded_lamb.kernels.state_format import OF_WEIGHTS
from sharded_lamb.optim.base import LambOptimizer
from sharded_lamb.optim.sharded_state import ShardedOptimizer
from sharded_lamb.optim.whole_tensors import new_state
from sharded_lamb.sharding.state import warn_of_average


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
    """Loads a checkpoint into a model and an optimizer made like the saved ones. Collective.

    The number of ranks, stage, mesh, buckets and dtypes may differ. Masters of fp16 and bf16 parameters are restored;
    weights of another dtype than saved are rounded from the saved masters.

    State of parameters that are frozen now is kept for the steps after they are unfrozen, and for the next save.

    Args:
        path: the checkpoint's folder, on storage that all ranks see.
        model, optimizer: as in `save`. Each group must have the saved group's parameters; it takes its options.
        extra: {name: object}: an object with ``load_state_dict`` receives the state saved under its name.
        verify: first compare the hashes of all files, which the ranks read between them, so that nothing is loaded
            from a checkpoint with any damage.
        options: restore group options, ``max_grad_norm`` and ``skipped_steps``; False: leave them unchanged.
        process_group: as in `save`.

    Returns:
        The ``extra`` of `save`, objects as their ``state_dict``; tensors whole, on the CPU, in their saved dtype.

    Collectives: gathers and scatters of small objects on a gloo group of its own; and a registration, which broadcasts
    the first rank's weights, if frozen parameters have state.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or in a newer format; nothing was loaded.
        ValueError: the checkpoint is of another model or other groups, or ranks disagree; nothing was loaded.
        TypeError: ``optimizer`` is neither `Lamb` nor `ShardedLamb`.
        Every error is raised on every rank.
    """
    ranks, folder, known = prepared(path, optimizer, process_group)
    manifest = ranks.each(lambda: read_manifest(folder))
    ranks.agree("the checkpoint", ranks.each(lambda: digest(folder)))
    ranks.each(lambda: check_files(folder, manifest, part=ranks.rank, parts=ranks.size, hashes=verify))
    if isinstance(known, ShardedOptimizer):
        known.register_replaced()
        known.synchronize()
    loading = ranks.each(lambda: _Loading(folder, manifest, model, known, extra or {}, options))
    if isinstance(known, ShardedOptimizer):
        ranks.agree("the frozen parameters with saved state", ", ".join(loading.stateful) or "none")
        known.register_stateful(loading.stateful.values())
    ranks.each(loading.plan)
    _read(folder, manifest, ranks, loading.requests)
    return ranks.each(loading.finish)


def _read(folder: Path, manifest: Manifest, ranks: RankGroup, requests: list[ReadRequest]) -> None:
    try:
        for state in parts.rounds(requests):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp_load(
                    state,
                    storage_reader=Reader(folder, manifest),
                    planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=ranks.group,
                    no_dist=ranks.group is None,
                )
    except CheckpointException as error:
        ranks.raise_together(unwrapped(error))


class _Loading:
    """The reads of this rank. Construction checks that everything fits, and writes nothing.

    Raises:
        CheckpointError, ValueError: the checkpoint is damaged, or does not fit the model, optimizer or ``extra``.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        model: nn.Module,
        optimizer: LambOptimizer | None,
        extra: Mapping[str, Any],
        options: bool,
    ) -> None:
        self.options = options
        self.where, self.manifest, self.optimizer, self.extra = (
            f"checkpoint {folder}",
            manifest,
            optimizer,
            extra,
        )
        self.model = model
        self.model_parts = model_parts = parts.ModelParts.of(model)
        parts.check_same_model(manifest, model_parts, self.where)
        self._check_ties(folder)
        self._check_memory()
        self.requests: list[ReadRequest] = []
        self.packed: dict[str, Any] = {}
        self.zeros: list[Tensor] = []
        self._check_extra()
        wanted = [manifest.extra, manifest.optimizer, [group["options"] for group in manifest.groups]]
        self.tensors = {
            name: _empty_for(manifest, name, _template(extra, name)) for name in plain.tensor_names(wanted)
        }
        self.stateful: dict[str, Tensor] = {}  # {name: frozen parameter that was trained before the save}
        self._kinds = manifest.kinds()
        self._sources: list[
            str
        ] = []  # the saved name of every parameter of the optimizer, in its groups' order
        if optimizer is not None:
            names = parts.names_of_groups(optimizer, model_parts)
            self._check_groups(names)
            self._check_options(optimizer)
            self._sources = [manifest.aliases.get(name, name) for group in names for name in group]
            params = [p for group in optimizer.param_groups for p in group["params"]]
            pairs = zip(self._sources, params, strict=True)
            self.stateful = {n: p for n, p in pairs if not p.requires_grad and self._steps_of(folder, n)}

    def _steps_of(self, folder: Path, name: str) -> float:
        """The saved step count of a parameter; 0 if it has no state."""
        step = self._kinds.get(name, {}).get("step")
        return 0.0 if step is None else float(read_tensor(folder, step))

    def plan(self) -> None:
        """Plan the reads, once `stateful` parameters are registered, which moves their weights."""
        optimizer, self.model_parts = self.optimizer, parts.ModelParts.of(self.model)
        self.requests += parts.weight_requests(self.manifest, self.model_parts, optimizer)
        self.requests += [ReadRequest(name, tensor) for name, tensor in self.tensors.items()]
        if optimizer is None:
            return
        self.packed = optimizer.local_state_dict()
        if not any("ema" in state for state in self.packed["state"].values()):
            warn_of_average(self._kinds.values())
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for place, source in enumerate(self._sources):
            saved = self._kinds.get(source)
            state = self.packed["state"].get(place)
            if saved is None:
                if state is not None:  # saved while frozen or before its first gradient: starts anew
                    self.zeros += [state[kind] for kind in ("step", *MOMENTS) if kind in state]
                    for kind in state.keys() & set(OF_WEIGHTS):
                        self.requests.append(ReadRequest(f"model.{source}", state[kind]))
                continue
            if state is None:
                if isinstance(optimizer, ShardedOptimizer):  # frozen here, and never trained
                    continue
                state = self.packed["state"][place] = new_state(params[place], optimizer.moments)
            self.requests += parts.state_requests(source, saved, state, self.where)

    def _check_memory(self) -> None:
        """Raises ValueError for a tensor whose elements share memory."""
        for name, tensor in self.model_parts.tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            strides = zip(local.stride(), local.shape, strict=True)
            if local.numel() and any(stride == 0 and size > 1 for stride, size in strides):
                raise ValueError(
                    f"{name} is expanded, and its elements share memory: nothing can be loaded into it; clone() it"
                )

    def _check_ties(self, folder: Path) -> None:
        """Raises ValueError if this model ties two parameters that were saved with different values."""
        for other, first in self.model_parts.aliases.items():
            saved = [self.manifest.aliases.get(name, name) for name in (first, other)]
            if saved[0] != saved[1] and f"model.{saved[1]}" in self.manifest.tensors:
                values = [read_tensor(folder, self.manifest.tensors[f"model.{name}"]) for name in saved]
                if not torch.equal(*values):
                    raise ValueError(
                        f"{self.where} holds different values of {first} and {other}, but this model ties them: load "
                        f"it into a model that does not"
                    )

    def _check_extra(self) -> None:
        saved = self.manifest.extra or {}
        try:
            plain.decoded([saved, self.manifest.optimizer], self.manifest.tensors.get)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.where}: its extra data is damaged: {error!r}") from error
        missing = [name for name in self.extra if name not in saved]
        if missing:
            raise ValueError(
                f"{self.where} has no extra {missing[0]!r}, only {sorted(saved)}: leave it out of extra, and "
                f"initialize it anew"
            )

    def _check_options(self, optimizer: LambOptimizer) -> None:
        """Raises CheckpointError for options that no optimizer accepts, ValueError for those of another algorithm."""
        optimizer_wide, decoded = self.manifest.optimizer, []
        try:
            for saved, group in zip(self.manifest.groups, optimizer.param_groups, strict=True):
                decoded.append(plain.decoded(saved["options"], self.tensors.get))
                validate_group({**group, **decoded[-1]})
            check_max_grad_norm(optimizer_wide["max_grad_norm"])
            if optimizer_wide["skipped_steps"] < 0:
                raise ValueError(f"skipped_steps is {optimizer_wide['skipped_steps']}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.where}: its options are damaged: {error!r}") from error
        if self.options:
            try:
                for own, group in zip(decoded, optimizer.param_groups, strict=True):
                    check_fixed(group, own)
                optimizer.check_names_of_patterns(decoded)
            except ValueError as error:
                raise ValueError(f"{self.where}: {error}") from error

    def _check_groups(self, names: list[list[str]]) -> None:
        if not self.manifest.groups:
            raise ValueError(f"{self.where} holds weights only: load it with optimizer=None")
        alias = self.manifest.aliases
        theirs = [[alias.get(n, n) for n in group["names"]] for group in self.manifest.groups]
        ours = [[alias.get(n, n) for n in group] for group in names]
        if [sorted(group) for group in theirs] == [sorted(group) for group in ours]:
            return
        if len(theirs) != len(ours):
            raise ValueError(
                f"{self.where} has {len(theirs)} parameter groups, this optimizer has {len(ours)}"
            )
        for number, (saved, own) in enumerate(zip(theirs, ours, strict=True)):
            mismatched = sorted(set(saved) ^ set(own))
            if mismatched:
                holder = "the checkpoint" if mismatched[0] in saved else "this optimizer"
                raise ValueError(
                    f"{self.where}: parameter groups differ: {mismatched[0]!r} is in group {number} of {holder} only "
                    f"(and {len(mismatched) - 1} more): construct the optimizer with the saved groups"
                )

    def _finish_optimizer(self, optimizer: LambOptimizer) -> None:
        for tensor in self.zeros:
            tensor.zero_()
        own_lr = [group["lr"] for group in optimizer.param_groups]
        if self.options:
            for group, saved in zip(self.packed["param_groups"], self.manifest.groups, strict=True):
                group.update(plain.decoded(saved["options"], self.tensors.__getitem__))
        optimizer.load_local_state_dict(self.packed)
        for group, lr in zip(optimizer.param_groups, own_lr, strict=True):
            if isinstance(lr, Tensor):  # schedulers and graphs may refer to this tensor
                group["lr"] = lr.fill_(group["lr"])
        if self.options:
            optimizer.max_grad_norm = self.manifest.optimizer["max_grad_norm"]
            if isinstance(optimizer, ShardedOptimizer):
                optimizer.skipped_steps = self.manifest.optimizer["skipped_steps"]

    def finish(self) -> dict[str, Any]:
        """Loads the state that is not read in place, after all reads. Returns the saved ``extra``."""
        optimizer, optimizer_wide = self.optimizer, self.manifest.optimizer
        if optimizer is not None:
            self._finish_optimizer(optimizer)
        if "model" in optimizer_wide:
            rest: dict[str, Any] = plain.decoded(optimizer_wide["model"], self.tensors.__getitem__)
            named = {
                self.model_parts.raw[name]: value
                for name, value in rest.items()
                if name in self.model_parts.raw
            }
            sparse = {
                raw: value
                for raw, value in named.items()
                if is_sparse(self.model_parts.plain[normalize(raw)])
            }
            self.model.load_state_dict(
                {raw: v for raw, v in named.items() if raw not in sparse}, strict=False
            )
            for raw, value in sparse.items():  # another number of elements may be stored than here
                own = self.model_parts.plain[normalize(raw)]
                self.model.load_state_dict({raw: value.to(own.device, own.dtype)}, strict=False, assign=True)
        loaded: dict[str, Any] = plain.decoded(self.manifest.extra or {}, self.tensors.__getitem__)
        for name, value in self.extra.items():
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(loaded[name])
        return loaded


def _empty_for(manifest: Manifest, name: str, template: Any) -> Tensor:
    """Returns a new tensor to read a tensor of ``extra`` into; a DTensor like ``template`` if that is one."""
    if isinstance(template, DTensor):
        return torch.empty_like(template)
    return torch.empty(manifest.tensors[name].shape, dtype=manifest.tensors[name].dtype, device="cpu")


def _template(extra: Mapping[str, Any], name: str) -> Any:
    """Returns the current entry of an object's state dict for the saved tensor ``name``, if there is one."""
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
