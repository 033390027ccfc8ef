"""A model's and an optimizer's tensors by the names that a checkpoint calls them, and what goes where on loading."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sharded_lamb.checkpoint.manifest import Manifest, SavedTensor
from sharded_lamb.core.names import normalize
from sharded_lamb.optim.base import LambOptimizer
from sharded_lamb.optim.lamb import Lamb
from sharded_lamb.optim.sharded_state import ShardedOptimizer

logger = logging.getLogger("sharded_lamb")

KINDS = ("exp_avg", "exp_avg_sq")
"""State that every parameter with state has, beside its ``step``; ``master`` where the weight is not the master."""


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What a model's state dict holds."""

    tensors: dict[str, Tensor]  # by the first of their names, in the state dict's order; live memory
    aliases: dict[str, str]  # other names of the same parameter → the first
    plain: dict[str, Any]  # ``_extra_state``, a tensor or not, and what else is no tensor
    raw: dict[str, str]  # names of ``plain`` → as the model has them, with what wrappers add
    names: dict[Tensor, str]  # of parameters
    buffers: frozenset[str]  # of ``tensors``: no parameters, and no DTensors

    @staticmethod
    def of(model: nn.Module) -> "ModelParts":
        """Raises ValueError for two tensors of one name, and for tensors that are copies or have no memory."""
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        plain: dict[str, Any] = {}
        raw_names: dict[str, str] = {}
        first: dict[int, str] = {}
        live = {id(value) for value in (*model.parameters(), *model.buffers())}
        memory = {_memory(value) for value in (*model.parameters(), *model.buffers())}
        for raw, value in model.state_dict(keep_vars=True).items():
            name = normalize(raw)
            own_state = raw.rpartition(".")[2] == "_extra_state"  # set by the module itself
            if own_state or not isinstance(value, Tensor):
                plain[name], raw_names[name] = value, raw
            elif id(value) in first and isinstance(value, nn.Parameter):
                aliases[name] = first[id(value)]
            elif name in tensors:
                raise ValueError(
                    f"the model has two tensors called {name!r}, as {raw!r} is without what wrappers add"
                )
            elif value.is_meta:
                raise ValueError(
                    f"{name} is on the meta device and has no memory: call model.to_empty() first"
                )
            elif id(value) not in live and _memory(value) not in memory:
                raise ValueError(
                    f"{name} in the model's state_dict() is a copy, made by its module or a wrapper such as FSDP1 or a "
                    f"quantised layer: nothing could be loaded into it. Give the module that holds the parameters"
                )
            else:
                first[id(value)] = name
                tensors[name] = value
        names: dict[Tensor, str] = {p: normalize(name) for name, p in model.named_parameters()}
        names |= {value: name for name, value in tensors.items() if isinstance(value, nn.Parameter)}
        buffers = frozenset(
            name for name, value in tensors.items() if not isinstance(value, nn.Parameter | DTensor)
        )
        detached = {name: value.detach() for name, value in tensors.items()}
        return ModelParts(detached, aliases, plain, raw_names, names, buffers)


def _memory(tensor: Tensor) -> int | None:
    """Where it lies; None for no elements."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr() or None


def checked_optimizer(optimizer: Any) -> Lamb | ShardedOptimizer:
    """Raises TypeError for an optimizer whose state this package does not know."""
    if isinstance(optimizer, Lamb | ShardedOptimizer):
        return optimizer
    if type(optimizer).__module__.startswith(("sharded_lamb.deepspeed", "deepspeed")):
        raise TypeError(
            f"a {type(optimizer).__name__} steps DeepSpeed's partitions: save them with engine.save_checkpoint(), "
            f"which `sharded-lamb convert` reads"
        )
    raise TypeError(
        f"checkpoints hold the state of Lamb and ShardedLamb, got {type(optimizer).__name__}: use "
        f"torch.distributed.checkpoint for other optimizers"
    )


def names_of_groups(optimizer: LambOptimizer, model: ModelParts) -> list[list[str]]:
    """The model's names of the parameters of each group. Raises ValueError for a parameter that is not the model's."""
    found: list[list[str]] = []
    for number, group in enumerate(optimizer.param_groups):
        for place, p in enumerate(group["params"]):
            if p not in model.names:
                raise ValueError(
                    f"parameter {place} of group {number} is not one of the model's: pass the model that the optimizer "
                    f"optimizes, as it was when the optimizer was made (fully_shard and prepare put new parameters in "
                    f"the place of old ones)"
                )
        found.append([model.names[p] for p in group["params"]])
    return found


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options, a learning rate in a tensor as a number."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    if isinstance(options["lr"], Tensor):
        options["lr"] = options["lr"].item()
    return options


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """``target`` is filled from the checkpoint's tensor ``source``, in its own dtype."""

    source: str
    target: Tensor


def check_same_model(found: Manifest, model: ModelParts, where: str) -> None:
    """Raises ValueError, naming what differs, where the checkpoint is of another model."""
    theirs, ours = set(found.model_names) | set(found.aliases), set(model.tensors) | set(model.aliases)
    if theirs != ours:
        raise ValueError(
            f"{where} is of another model:"
            + _listed(" it lacks", sorted(ours - theirs))
            + _listed(" it has what this model lacks:", sorted(theirs - ours))
        )
    saved_states = set(found.optimizer.get("model", {}))
    if saved_states - set(model.plain):
        raise ValueError(
            f"{where} is of another model: it has what this model lacks:"
            + _listed("", sorted(saved_states - set(model.plain)))
        )
    if set(model.plain) - saved_states:  # converted checkpoints have none
        logger.warning(
            "%s lacks%s They stay as they are", where, _listed("", sorted(set(model.plain) - saved_states))
        )
    for name, tensor in model.tensors.items():
        saved = found.tensors["model." + found.aliases.get(name, name)]
        if saved.shape != tuple(tensor.shape):
            raise ValueError(
                f"{where} is of another model: {name} has shape {saved.shape} there and {tuple(tensor.shape)} here"
            )


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what} {', '.join(names[:5])}{more}."


def weight_requests(found: Manifest, model: ModelParts) -> Iterator[ReadRequest]:
    """The model's tensors. Where the dtype differs and the checkpoint has a master, that is what is rounded."""
    for name, tensor in model.tensors.items():
        saved_name = found.aliases.get(name, name)
        source, master = f"model.{saved_name}", f"optimizer.{saved_name}.master"
        if tensor.dtype != found.tensors[source].dtype and master in found.tensors:
            source = master
        yield ReadRequest(source, tensor)


def state_requests(
    found: Manifest, name: str, saved: Mapping[str, SavedTensor], state: Mapping[str, Tensor], where: str
) -> Iterator[ReadRequest]:
    """One parameter's state. A master that was not saved is the saved weight itself."""
    missing = [kind for kind in ("step", *KINDS) if kind not in saved]
    if missing:
        raise ValueError(f"{where} has no {missing[0]} of {name}: it was not made by Lamb or ShardedLamb")
    for kind, target in state.items():
        if kind == "master" and kind not in saved:
            yield ReadRequest(f"model.{name}", target)
        elif kind in ("step", "master", *KINDS):
            yield ReadRequest(f"optimizer.{name}.{kind}", target)


def rounds(requests: Iterable[ReadRequest]) -> list[dict[str, Tensor]]:
    """State dicts to load one after the other: in each, a source fills one target."""
    made: list[dict[str, Tensor]] = []
    for request in requests:
        free = next((one for one in made if request.source not in one), None)
        if free is None:
            made.append(free := {})
        free[request.source] = request.target
    return made


def steps_taken(states: Mapping[Any, Mapping[str, Any]]) -> int:
    """Of the parameter that took most. Reads the device."""
    steps = [torch.as_tensor(state["step"]).reshape(()) for state in states.values()]
    return int(torch.stack(steps).max()) if steps else 0
