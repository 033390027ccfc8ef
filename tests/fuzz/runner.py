"""Executes one phase of a program on one rank, and compares every observation with the oracle's."""

import contextlib
import copy
import hashlib
import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sharded_lamb import ShardedLamb, checkpoint
from sharded_lamb.comm import stalls
from tests.fuzz import program as data
from tests.fuzz.compare import compare
from tests.fuzz.net import Net, Planned
from tests.fuzz.program import Program
from tests.fuzz.replay import Observation, Replay
from tests.fuzz.stored import State
from tests.fuzz.wrappers import unwrap_all, wrapped

DTYPES = ("state_dtype", "gather_dtype", "reduce_dtype")


class AtOperation(Exception):
    """An exception with the number of its operation, as JSON."""


@dataclass(frozen=True)
class Ran:
    """``digest``: of all observations, to be equal on all ranks; ``bits``: of weights, ratios and state, by operation,
    to be equal at every world size; ``replay``: the oracle at the end of the phase."""

    digest: str
    bits: list[str]
    replay: Replay


def execute(rank: int, program: Program, number: int, folder: str, replay: Replay) -> Ran:
    """Run phase ``number``. ``replay``: the oracle at its beginning.

    Raises:
        AtOperation: an operation raised, or saw another number than expected.
    """
    index, run = -1, None
    digest, bits = hashlib.sha256(), []
    patience = mock.patch.multiple(stalls, PATIENCE=0.4, PERIOD=0.3)
    try:
        patience.start()
        run = Run(rank, program, number, Path(folder))
        replay.start(program.phases[number])
        for index, op in enumerate(program.phases[number].ops):
            seen = getattr(run, op.kind)(**op.args)
            replay.follow(seen)
            replay.apply(op)
            right = replay.observations.pop((number, index), None)
            if seen is not None and right is not None:
                digest.update(repr(_plain(vars(seen))).encode())
                compare(program, program.phases[number].how, seen, right)
                if seen.weights is not None:
                    plain = _plain([seen.weights, seen.ratios, seen.state])
                    bits.append(hashlib.sha256(repr(plain).encode()).hexdigest())
        replay.follow(None)
    except Exception as error:
        where = {"at": [number, index], "kind": type(error).__name__, "message": str(error)}
        raise AtOperation(json.dumps(where)) from error
    finally:
        patience.stop()
        unwrap_all()
    return Ran(digest.hexdigest(), bits, replay)


def _plain(value: Any) -> Any:
    """Whose ``repr`` has every bit."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in sorted(value.items())}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.tobytes() if hasattr(value, "tobytes") else value


def _with_dtypes(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: getattr(torch, value) if key in DTYPES and value is not None else value
        for key, value in settings.items()
    }


class Run:
    """One rank's model and optimizers; a method per kind of operation, with `Replay`'s arguments."""

    def __init__(self, rank: int, program: Program, number: int, folder: Path) -> None:
        phase = program.phases[number]
        self.rank, self.program, self.folder, self.number = rank, program, folder, number
        self.how, self.world = phase.how, phase.world
        self.net = Net(program)
        if number:
            with torch.no_grad():
                for p in self.net.parameters():
                    p.mul_(0.25)
        self._freeze(phase.frozen, True)
        self._shard()
        self.model: nn.Module = self.net
        if self.how == "ddp" and program.seed % 2:
            self.model = DistributedDataParallel(self.net, find_unused_parameters=True)
        stage = 2 if self.how in data.REDUCED_HERE else 1
        self.inner = [
            ShardedLamb(
                [{"params": self._named(g.layers), **_with_dtypes(g.options)} for g in groups],
                stage=stage,
                **{**program.options, **_with_dtypes({**program.settings, **phase.settings})},
            )
            for groups in phase.optimizers
        ]
        if self.how == "ddp" and self.model is self.net:
            self.model = DistributedDataParallel(self.net, find_unused_parameters=True)
        self.optimizers = [wrapped(opt, program.wrapper) for opt in self.inner]
        if program.overlap_forward:
            for opt in self.inner:
                opt.overlap_forward(self.net)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        collectives = any("collective" in op.args for op in phase.ops)
        self.group = dist.new_group() if collectives else None
        self.saved: dict[int, Any] = {}
        if number:
            self._resume(folder / f"phase{number - 1}")

    def _shard(self) -> None:
        if self.how not in data.WITH_DTENSORS:
            return
        mesh = init_device_mesh("cpu", (self.world,))
        for index, layer in enumerate(self.net.layers):
            if self.program.is_dtensor(self.how, f"layers.{index}.a"):
                fully_shard(layer, mesh=mesh)

    def _named(self, layers: Any) -> list[tuple[str, Tensor]]:
        params = dict(self.net.named_parameters())
        return [(name, params[name]) for name in self.program.names_of(layers)]

    def _params(self, names: list[str]) -> list[Tensor]:
        params = dict(self.net.named_parameters())
        return [params[name] for name in names]

    # -- gradients ----------------------------------------------------------------------------------

    def backward(
        self,
        parts: list[list[int]],
        key: int,
        sync: bool = True,
        fail: list[int | None] | None = None,
        nan: int | None = None,
        collective: int | None = None,
        scale: float | None = None,
    ) -> None:
        lowest = fail[self.rank] if fail else None
        with contextlib.nullcontext() if sync else self._no_sync():
            loss = self.model(
                parts[self.rank], self.rank, key, lowest, collective, self.group, self.rank == nan
            )
            if scale is not None:
                loss = self.scaler.scale(loss)
            with contextlib.suppress(Planned):
                loss.backward()
        if sync and self.how in data.AVERAGED_BY_HAND:
            self._average()

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if isinstance(self.model, DistributedDataParallel):
                stack.enter_context(self.model.no_sync())
            elif self.how in data.REDUCED_HERE:
                for opt in self._own_api():
                    stack.enter_context(opt.no_sync())
            yield

    def _own_api(self) -> list[Any]:
        """The optimizers on which to call methods that torch's do not have."""
        return self.inner if self.program.wrapper == "accelerate" else self.optimizers

    @torch.no_grad()
    def _average(self) -> None:
        plain = [p for p in self.net.parameters() if not isinstance(p, DTensor)]
        flags = torch.tensor([float(p.grad is not None) for p in plain], dtype=torch.float64)
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).double().flatten() for p in plain]
        summed = torch.cat([flags, *flat])
        dist.all_reduce(summed)
        flags, values = summed[: len(plain)], summed[len(plain) :] / self.world
        for p, present, value in zip(plain, flags, values.split([p.numel() for p in plain]), strict=True):
            if present > 0:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad.copy_(value.view(p.shape))

    def zero_grad(self, who: Any, set_to_none: bool) -> None:
        if who == "model":
            self.net.zero_grad(set_to_none)
        elif who[0] == "layer":
            self.net.layers[who[1]].zero_grad(set_to_none)
        else:
            self.optimizers[who[1]].zero_grad(set_to_none)

    def grad_none(self, names: list[str], rank: int | None = None) -> None:
        if rank in (None, self.rank):
            for p in self._params(names):
                p.grad = None

    @torch.no_grad()
    def grad_scale(self, names: list[str], factor: float, rank: int | None = None) -> None:
        for p in self._params(names):
            if p.grad is not None and rank in (None, self.rank):
                p.grad.mul_(factor)

    @torch.no_grad()
    def grad_add(self, names: list[str], value: float) -> None:
        for name, p in zip(names, self._params(names), strict=True):
            if p.grad is not None:
                sign = torch.from_numpy(data.gradient(self.program.slots()[name], 0, 0, 0)).sign()
                p.grad.add_(sign.to(p.dtype) * value)

    @torch.no_grad()
    def grad_assign(self, names: list[str], key: int) -> None:
        rank = self.program.source_of(self.rank) if self.how in data.REDUCED_HERE else 0
        for name, p in zip(names, self._params(names), strict=True):
            value = data.gradient(self.program.slots()[name], int(name.split(".")[1]), rank, key)
            p.grad = torch.empty_like(p).copy_(torch.from_numpy(value))

    def read_norms(self) -> Observation:
        norms = {}
        for name, p in self.net.named_parameters():
            if p.grad is not None:
                norm = p.grad.norm()
                norms[name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return Observation(norms=norms)

    def clip(self, kind: str, optimizer: int, limit: float, differs: float | None = None) -> Observation:
        if differs is not None and self.rank == self.world - 1:
            limit = differs
        if kind == "torch":
            norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), limit)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        else:
            norm = self._own_api()[optimizer].clip_grad_norm_(limit)
        return Observation(number=float(norm))

    # -- steps --------------------------------------------------------------------------------------

    def step(self, missing: int | None = None) -> Observation | None:
        if missing == self.rank:
            return None
        for opt in self.optimizers:
            opt.step()
        return None if missing is not None else self._after_step()

    def closure_step(self, parts: list[list[int]], key: int) -> Observation:
        def closure() -> float:
            self.zero_grad("model", True)
            self.backward(parts, key)
            return 1.0

        for opt in self.optimizers:
            opt.step(closure)
        return self._after_step()

    def averages(self) -> Observation:
        with contextlib.ExitStack() as stack:
            for opt in self.inner:
                stack.enter_context(opt.averaged(self.net))
            inside = self._weights()
        return Observation(weights=inside, state=self._state(self._weights()))

    def _after_step(self) -> Observation:
        if self.program.overlap_forward:
            for opt in self.inner:
                opt.synchronize()
        weights = self._weights()
        return Observation(
            weights=weights,
            ratios=[opt.trust_ratios() for opt in self.inner],
            skipped=[opt.skipped_steps for opt in self.inner],
            state=self._state(weights),
        )

    def _weights(self) -> dict[str, Any]:
        weights = {}
        for name, p in self.net.named_parameters():
            whole = p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
            weights[name] = whole.double().numpy().copy()
        return weights

    def _state(self, weights: dict[str, Any]) -> State | None:
        """Every rank has the first one's, which has it all."""
        if not self.program.follows:
            return None
        states: State = {}
        for opt in self.inner:
            full = opt.full_state_dict()
            names = [name for name, _, _ in opt._named_parameters()]
            for index, entry in (full or {"state": {}})["state"].items():
                values = {kind: value.double().numpy() for kind, value in entry.items()}
                states[names[index]] = {"master": weights[names[index]], **values}
        shared = [states]
        dist.broadcast_object_list(shared)
        return shared[0]

    def look(self) -> Observation:
        if self.program.overlap_forward:
            for opt in self.inner:
                opt.synchronize()
        weights = self._weights()
        return Observation(weights=weights, state=self._state(weights))

    def amp_step(
        self,
        parts: list[list[int]],
        key: int,
        unscale: bool,
        clip: list[Any] | None = None,
        nan: int | None = None,
    ) -> Observation:
        for opt in self.optimizers:
            opt.zero_grad()
        self.backward(parts, key, nan=nan, scale=1)
        if unscale:
            for opt in self.optimizers:
                self.scaler.unscale_(opt)
        if clip is not None:
            self.clip(clip[0], 0, clip[1])
        for opt in self.optimizers:
            self.scaler.step(opt)
        self.scaler.update()
        seen = self._after_step()
        for opt in self.optimizers:
            opt.zero_grad()
        return seen

    # -- options, parameters ------------------------------------------------------------------------

    def edit(self, optimizer: int, group: int, option: str, value: Any, rank: int | None = None) -> None:
        if rank not in (None, self.rank):
            return
        opt = self.optimizers[optimizer]
        if option == "max_grad_norm":
            (self.inner[optimizer] if self.program.wrapper == "accelerate" else opt).max_grad_norm = value
        else:
            opt.param_groups[group][option] = value

    def _freeze(self, layers: Any, frozen: bool) -> None:
        for layer in layers:
            self.net.layers[layer].requires_grad_(not frozen)

    def freeze(self, layer: int) -> None:
        self._freeze([layer], True)

    def unfreeze(self, layer: int) -> None:
        self._freeze([layer], False)

    def add_group(self, optimizer: int, layer: int, options: dict[str, Any]) -> None:
        group = {"params": self._named([layer]), **_with_dtypes(options)}
        self.optimizers[optimizer].add_param_group(group)

    @torch.no_grad()
    def rewrite(self, names: list[str], factor: float, way: str) -> None:
        if self.program.overlap_forward:
            for opt in self.inner:
                opt.synchronize()
        params = self._params(names)
        if way == "vector":
            vector_to_parameters(parameters_to_vector(params) * factor, params)
            return
        for p in params:
            if way == "copy":
                p.mul_(factor)
            else:
                p.data = p.data * factor

    def evaluate(self, key: int) -> Observation:
        with torch.no_grad():
            loss = float(self.net(range(len(self.program.layers)), 0, key))
        for layer in self.net.layers:
            if isinstance(layer, FSDPModule):
                layer.reshard()  # a root keeps whole weights for a backward, and the next step makes them stale
        return Observation(number=loss)

    # -- state --------------------------------------------------------------------------------------

    def save(self, number: int, form: str) -> None:
        if form == "checkpoint":
            checkpoint.save(self.folder / f"{self.number}-{number}", self.net, self.inner[0])
            self.saved[number] = form, None, None
            return
        if self.program.overlap_forward:
            for opt in self.inner:
                opt.synchronize()
        weights = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        if form == "local":
            states: list[Any] = [_through_bytes(opt.state_dict()) for opt in self.optimizers]
        else:
            states = [opt.full_state_dict() for opt in self.inner]
            if form == "whole":
                dist.broadcast_object_list(states)
        self.saved[number] = form, weights, states

    def load(self, number: int, weights: bool) -> Observation | None:
        self._load(number, weights)
        return self.look() if self.program.follows else None

    def _load(self, number: int, weights: bool) -> None:
        form, values, states = self.saved[number]
        if form == "checkpoint":
            checkpoint.load(self.folder / f"{self.number}-{number}", self.net, self.inner[0])
            return
        if weights:
            self.net.load_state_dict(values)
        for opt, inner, state in zip(self.optimizers, self.inner, states, strict=True):
            if form == "full":
                inner.load_full_state_dict(state)
            else:
                opt.load_state_dict(copy.deepcopy(state))

    def end_phase(self, form: str) -> None:
        path = self.folder / f"phase{self.number}"
        if form == "checkpoint":
            checkpoint.save(path, self.net, self.inner[0])
            return
        weights = {name: torch.from_numpy(value) for name, value in self._weights().items()}
        whole = self.inner[0].full_state_dict()
        if whole is not None:
            torch.save((weights, whole), path.with_suffix(".pt"))

    def _resume(self, path: Path) -> None:
        if path.is_dir():
            checkpoint.load(path, self.net, self.inner[0])
            return
        weights, whole = torch.load(path.with_suffix(".pt"), weights_only=True)
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                value = weights[name].to(p.dtype)
                if isinstance(p, DTensor):
                    value = distribute_tensor(value, p.device_mesh, p.placements)
                p.copy_(value)
        self.inner[0].load_full_state_dict(whole if self.rank == 0 else None)

    # -- what frameworks do to models ---------------------------------------------------------------

    def copy(self, way: str) -> None:
        pair = self.net, self.inner
        self.net, self.inner = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
        self.model, self.optimizers = self.net, list(self.inner)

    def copy_model(self) -> None:
        copy.deepcopy(self.net)

    def replace(self) -> None:
        new = {
            p: nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in self.net.parameters()
        }
        for layer in self.net.layers:
            for attribute, p in list(layer.named_parameters()):
                setattr(layer, attribute, new[p])
        for opt in self.optimizers:
            for group in opt.param_groups:
                group["params"] = [new[p] for p in group["params"]]
            opt.zero_grad()

    def share_memory(self) -> None:
        self.net.share_memory()

    def to(self, device: str) -> None:
        self.net.to(device)

    def half(self) -> None:
        self.net.half()


def _through_bytes(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)
