"""Tensors of a model and an optimizer by their names in a checkpoint, and the reads that fill them."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sharded_lamb.checkpoint.manifest import Manifest, SavedTensor
from sharded_lamb.checkpoint.rank_group import bare_optimizer
from sharded_lamb.checkpoint.sparse import is_sparse
from sharded_lamb.core.host_values import as_tensor
from sharded_lamb.core.names import normalize
from sharded_lamb.core.rule import MOMENTS
from sharded_lamb.kernels.state_format import OF_WEIGHTS
from sharded_lamb.optim.base import LambOptimizer
from sharded_lamb.optim.lamb import Lamb
from sharded_lamb.optim.sharded_state import ShardedOptimizer

logger = logging.getLogger("sharded_lamb")


@dataclass(frozen=True, slots=True)
class ModelParts:
    """A model's state dict, by kind of entry."""

    tensors: dict[str, Tensor]  # by first name, in the state dict's order; live memory
    aliases: dict[str, str]  # {other name of a tied parameter: first name}
    plain: dict[str, Any]  # ``_extra_state``, sparse tensors, and entries that are not tensors
    raw: dict[str, str]  # {name in ``plain``: name with wrappers' prefixes}
    names: dict[Tensor, str]  # of parameters
    buffers: frozenset[str]  # keys of ``tensors`` that are neither parameters nor DTensors

    @staticmethod
    def of(model: nn.Module) -> "ModelParts":
        """Reads the model's state dict.

        Raises:
            ValueError: two tensors share a name, or a tensor is a copy or has no memory.
            TypeError: a tensor's values are not all in memory of its own shape (quantized, nested, a subclass).
        """
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        plain: dict[str, Any] = {}
        raw_names: dict[str, str] = {}
        first: dict[int, str] = {}
        entries = model.state_dict(
            keep_vars=True
        )  # first: it reshards an FSDP2 model that was just evaluated
        live = {id(value) for value in (*model.parameters(), *model.buffers())}
        memory = {
            _memory(value) for value in (*model.parameters(), *model.buffers()) if not _unsupported(value)
        }
        for raw, value in entries.items():
            name = normalize(raw)
            own_state = raw.rpartition(".")[2] == "_extra_state"  # set by the module itself
            if own_state or not isinstance(value, Tensor) or is_sparse(value):
                plain[name], raw_names[name] = value, raw
            elif id(value) in first and isinstance(value, nn.Parameter):
                aliases[name] = first[id(value)]
            elif name in tensors:
                raise ValueError(
                    f"the model has two tensors called {name!r}, which is {raw!r} without wrappers' prefixes"
                )
            elif value.is_meta:
                raise ValueError(
                    f"{name} is on the meta device and has no memory: call model.to_empty() first"
                )
            elif kind := _unsupported(value):
                raise TypeError(
                    f"{name} is a {kind}, and a checkpoint holds dense and sparse tensors of numbers: keep it out of "
                    f"the model's state dict (persistent=False), or save its parts as buffers or as extra"
                )
            elif id(value) not in live and _memory(value) not in memory:
                raise ValueError(
                    f"{name} in the model's state_dict() is a copy, made by its module or a wrapper such as FSDP1 or a "
                    f"quantised layer: nothing can be loaded into it. Pass the module that holds the parameters"
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


def _unsupported(tensor: Tensor) -> str | None:
    """The kind of a tensor that the bytes of one memory do not make up; None for others."""
    if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):
        return type(tensor).__name__
    if tensor.is_quantized:
        return f"quantized tensor ({tensor.dtype} with scales)"
    return None if tensor.layout is torch.strided else f"tensor of layout {tensor.layout}"


def _memory(tensor: Tensor) -> int | None:
    """Returns the address of the tensor's storage; None for a tensor without elements."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr() or None


def checked_optimizer(optimizer: Any) -> Lamb | ShardedOptimizer:
    """Returns the `Lamb` or `ShardedLamb`, without wrappers. Raises TypeError for any other optimizer."""
    optimizer = bare_optimizer(optimizer)
    if isinstance(optimizer, Lamb | ShardedOptimizer):
        return optimizer
    if type(optimizer).__module__.startswith(("sharded_lamb.deepspeed", "deepspeed")):
        raise TypeError(
            f"a {type(optimizer).__name__} steps DeepSpeed's partitions: save with engine.save_checkpoint(), which "
            f"`sharded-lamb convert` reads"
        )
    inside = [name for name, value in vars(optimizer).items() if isinstance(value, LambOptimizer)]
    raise TypeError(
        f"checkpoints hold the state of Lamb and ShardedLamb, got {type(optimizer).__name__}: "
        + (
            f"pass its .{inside[0]}, and state of its own as extra"
            if inside
            else "use torch.distributed.checkpoint for other optimizers"
        )
    )


def names_of_groups(optimizer: LambOptimizer, model: ModelParts) -> list[list[str]]:
    """Returns the names of each group's parameters.

    Raises:
        ValueError: a parameter of the optimizer is not in the model.
    """
    names: list[list[str]] = []
    for number, group in enumerate(optimizer.param_groups):
        for place, p in enumerate(group["params"]):
            if p not in model.names:
                raise ValueError(
                    f"parameter {place} of group {number} is not one of the model's: pass the model that the optimizer "
                    f"updates, as it was when the optimizer was made (fully_shard and prepare replace parameters)"
                )
        names.append([model.names[p] for p in group["params"]])
    return names


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a group's options; a tensor ``lr`` becomes a number."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    if isinstance(options["lr"], Tensor):
        options["lr"] = options["lr"].item()
    return options


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Fill ``target`` from the checkpoint's tensor ``source``, converted to the dtype of ``target``."""

    source: str
    target: Tensor


def check_same_model(manifest: Manifest, model: ModelParts, where: str) -> None:
    """Raises ValueError, naming the differences, if the checkpoint is of another model."""
    theirs, ours = set(manifest.model_names) | set(manifest.aliases), set(model.tensors) | set(model.aliases)
    # Files that converters read may hold a tied tensor once.
    theirs |= {name for name, first in model.aliases.items() if first in theirs}
    if theirs != ours:
        raise ValueError(
            f"{where} is of another model:"
            + _listed(" it lacks", sorted(ours - theirs))
            + _listed(" this model lacks", sorted(theirs - ours))
        )
    saved_states = set(manifest.optimizer.get("model", {}))
    if saved_states - set(model.plain):
        raise ValueError(
            f"{where} is of another model: this model lacks"
            + _listed("", sorted(saved_states - set(model.plain)))
        )
    if set(model.plain) - saved_states:  # as converted checkpoints do
        logger.warning(
            "%s lacks%s The model keeps its own", where, _listed("", sorted(set(model.plain) - saved_states))
        )
    for name, value in model.plain.items():
        saved_value = manifest.optimizer.get("model", {}).get(name)
        shape = saved_value["__sparse__"]["shape"] if _is_sparse_data(saved_value) else None
        if is_sparse(value) and saved_value is not None and shape != list(value.shape):
            raise ValueError(
                f"{where} is of another model: {name} has shape {shape} there, but {list(value.shape)} here"
            )
    for name, tensor in model.tensors.items():
        saved = manifest.tensors["model." + manifest.aliases.get(name, name)]
        if saved.dtype.is_complex != tensor.is_complex():
            raise ValueError(
                f"{where} is of another model: {name} is {saved.dtype} there, but {tensor.dtype} here"
            )
        if saved.shape != tuple(tensor.shape):
            raise ValueError(
                f"{where} is of another model: {name} has shape {saved.shape} there, but {tuple(tensor.shape)} here"
            )


def _is_sparse_data(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"__sparse__"}


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what} {', '.join(names[:5])}{more}."


def gather_dtype_of(optimizer: LambOptimizer | None) -> str | None:
    """Returns the ``gather_dtype`` to which the optimizer rounds the model's weights; None: it does not."""
    chosen = optimizer.gather_dtype if isinstance(optimizer, ShardedOptimizer) else None
    return None if chosen is None else str(chosen).removeprefix("torch.")


def weight_requests(
    manifest: Manifest, model: ModelParts, optimizer: LambOptimizer | None
) -> Iterator[ReadRequest]:
    """Reads of the model's tensors.

    One of another dtype than saved, or that was saved under another ``gather_dtype`` than that of ``optimizer``, is
    rounded from the master, if saved.
    """
    saved_gather = manifest.optimizer.get("gather_dtype", None)
    is_other = optimizer is not None and gather_dtype_of(optimizer) != saved_gather
    for name, tensor in model.tensors.items():
        saved_name = manifest.aliases.get(name, name)
        source, master = f"model.{saved_name}", f"optimizer.{saved_name}.master"
        if (is_other or tensor.dtype != manifest.tensors[source].dtype) and master in manifest.tensors:
            source = master
        yield ReadRequest(source, tensor)


def state_requests(
    name: str, saved: Mapping[str, SavedTensor], state: Mapping[str, Tensor], where: str
) -> Iterator[ReadRequest]:
    """Reads of one parameter's state. A master or an average that was not saved is the saved weight itself.

    Raises:
        ValueError: the checkpoint lacks a kind of state.
    """
    moments = [kind for kind in MOMENTS if kind in state]
    missing = [kind for kind in ("step", *moments) if kind not in saved]
    if missing:
        raise ValueError(
            f"{where} has no {missing[0]} of {name}: it was not written from Lamb or ShardedLamb, or from LARS, which "
            f"keeps one moment"
        )
    if moments != [kind for kind in MOMENTS if kind in saved]:
        raise ValueError(
            f"{where} has two moments of {name}, and this optimizer is LARS, which keeps one: construct it with the "
            f"variant that was saved"
        )
    for kind, target in state.items():
        if kind in OF_WEIGHTS and kind not in saved:
            yield ReadRequest(f"model.{name}", target)
        elif kind in ("step", *MOMENTS, *OF_WEIGHTS):
            yield ReadRequest(f"optimizer.{name}.{kind}", target)


def rounds(requests: Iterable[ReadRequest]) -> list[dict[str, Tensor]]:
    """Returns state dicts to load in turn: in each, a source fills one target."""
    made: list[dict[str, Tensor]] = []
    for request in requests:
        free = next((one for one in made if request.source not in one), None)
        if free is None:
            made.append(free := {})
        free[request.source] = request.target
    return made


def steps_taken(states: Mapping[Any, Mapping[str, Any]]) -> int:
    """Returns the largest step count of all parameters. Reads the device."""
    steps = [as_tensor(state["step"]).reshape(()) for state in states.values()]
    return int(torch.stack(steps).max()) if steps else 0
