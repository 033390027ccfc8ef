"""The optimizers that benchmarks compare, ours and others, behind one interface.

A candidate that needs averaged gradients gets them as users do, from DistributedDataParallel (its buckets are the
gradients' memory), so that its all-reduce is counted and overlaps with backward.
"""

import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.bench import peers
from sharded_lamb.bench.workload import Synthetic, Workload

LAMB: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
"""Every candidate's options. No clipping: each rank of ZeroRedundancyOptimizer would clip by its own norm."""


@dataclass(frozen=True)
class Setting:
    """The workload that candidates are built for."""

    workload: Workload
    world_size: int
    bucket_mb: float = 32


class Candidate:
    """A model and the optimizer that trains it."""

    def __init__(self, model: Synthetic, forward: Callable[[], Tensor], optimizer: Any) -> None:
        self.model, self.forward, self.optimizer = model, forward, optimizer

    def iterate(self) -> None:
        """Zero the gradients, run backward, and update this rank's weights. Collective."""
        self.optimizer.zero_grad()
        self.forward().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def close(self) -> None:
        """Release resources that outlive the object. Collective."""

    def bytes_by_kind(self) -> dict[str, int] | None:
        """Bytes by kind, as `ShardedLamb.memory` reports them; None for other optimizers."""
        return self.optimizer.memory() if isinstance(self.optimizer, ShardedLamb) else None

    @property
    def kernel(self) -> str | None:
        """The name of our kernel; None for other optimizers."""
        return self.optimizer._kernel.name if isinstance(self.optimizer, ShardedLamb) else None


class _NoOptimizer:
    """Backward alone, which every candidate's iteration contains."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def step(self) -> None:
        pass


def _bare(setting: Setting) -> Candidate:
    model = setting.workload.model()
    return Candidate(model, model, _NoOptimizer(model))


def _ours(stage: Literal[1, 2]) -> Callable[[Setting], Candidate]:
    def build(setting: Setting) -> Candidate:
        model = setting.workload.model()
        optimizer = ShardedLamb(model.named_parameters(), stage=stage, bucket_mb=setting.bucket_mb, **LAMB)
        return Candidate(model, _averaging(model, setting) if stage == 1 else model, optimizer)

    return build


def _averaging(model: Synthetic, setting: Setting) -> Callable[[], Tensor]:
    """The model, wrapped so that its backward averages gradients over ranks."""
    if setting.world_size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _replicated(optimizer: Callable[[Sequence[nn.Parameter]], Any]) -> Callable[[Setting], Candidate]:
    """Every rank holds the whole state and computes the whole update."""

    def build(setting: Setting) -> Candidate:
        model = setting.workload.model()
        return Candidate(model, _averaging(model, setting), optimizer(list(model.parameters())))

    return build


def _timm(params: Sequence[nn.Parameter]) -> Any:
    timm: Any = peers.timm_lamb()
    return timm(params, max_grad_norm=None, **LAMB)


def _zero(*, views: bool) -> Callable[[Setting], Candidate]:
    def build(setting: Setting) -> Candidate:
        model = setting.workload.model()
        forward = _averaging(model, setting)
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(),
            optimizer_class=peers.timm_lamb(),
            parameters_as_bucket_view=views,
            max_grad_norm=None,
            **LAMB,
        )
        return Candidate(model, forward, optimizer)

    return build


def _engine(stage: int, *, ours: bool) -> Callable[[Setting], Candidate]:
    def build(setting: Setting) -> Candidate:
        return Engine(setting.workload.model(), stage, LAMB, timm=None if ours else peers.timm_lamb())

    return build


@dataclass(frozen=True)
class Kind:
    """A candidate that can be chosen by name."""

    name: str
    title: str
    build: Callable[[Setting], Candidate]
    exact: bool = True  # in exact arithmetic it equals ours, step for step
    needs: tuple[str, ...] = ()  # modules that it imports; "ranks" (several), "one rank", "compiler"

    def titled(self, world_size: int) -> str:
        """Its title; one rank needs no DDP."""
        return self.title if world_size > 1 else self.title.removeprefix("DDP + ")

    def missing(self, world_size: int, shapes: Sequence[Sequence[int]]) -> str | None:
        """Why it cannot run here; None if it can."""
        for need in self.needs:
            if need == "deepspeed" and not all(math.prod(shape) and shape for shape in shapes):
                return "takes neither scalars nor empty tensors"
            if need == "ranks" and world_size == 1:
                return "needs several ranks: run it under torchrun"
            if need == "one rank" and world_size > 1:
                return "is measured on one rank only: run it without torchrun"
            if need == "compiler" and shutil.which("c++") is None and shutil.which("g++") is None:
                return "needs a C++ compiler"
            if need in ("timm", "deepspeed") and not peers.is_installed(need):
                return f"needs {need}, which is not installed"
        return None


BARE = Kind("bare", "backward alone", _bare, exact=False)

_DDP_ADAMW = functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-6, weight_decay=0.01, fused=True)

OURS = {
    2: Kind("ours-2", "ShardedLamb, stage 2", _ours(2)),
    1: Kind("ours-1", "DDP + ShardedLamb, stage 1", _ours(1)),
}

PEERS = {
    kind.name: kind
    for kind in (
        Kind("allreduce-lamb", "DDP + sharded_lamb.Lamb", _replicated(lambda ps: Lamb(ps, **LAMB))),
        Kind("allreduce-timm", "DDP + timm Lamb", _replicated(_timm), needs=("timm",)),
        Kind("zero-timm", "DDP + ZeroRedundancyOptimizer(timm)", _zero(views=False), needs=("ranks", "timm")),
        Kind(
            "zero-views-timm",
            "DDP + ZeroRedundancyOptimizer(timm), bucket views",
            _zero(views=True),
            needs=("ranks", "timm"),
        ),
        Kind(
            "deepspeed1-timm",
            "DeepSpeed ZeRO-1 + timm (wrong ratios)",
            _engine(1, ours=False),
            exact=False,  # one ratio per flat partition, not per parameter
            needs=("ranks", "timm", "deepspeed"),
        ),
        Kind(
            "deepspeed1-ours",
            "DeepSpeed ZeRO-1 + our plugin",
            _engine(1, ours=True),
            needs=("ranks", "deepspeed"),
        ),
        Kind(
            "deepspeed2-ours",
            "DeepSpeed ZeRO-2 + our plugin",
            _engine(2, ours=True),
            needs=("ranks", "deepspeed"),
        ),
        Kind(
            "compiled",
            "LAMB under torch.compile, a call a tensor",
            _replicated(lambda ps: peers.CompiledLamb(ps, **LAMB)),
            needs=("one rank", "compiler"),
        ),
        Kind("adamw", "DDP + fused AdamW", _replicated(lambda ps: _DDP_ADAMW(ps)), exact=False),
    )
}


def choose(
    names: str | None, stage: Literal["1", "2", "both"], world_size: int, shapes: Sequence[Sequence[int]]
) -> tuple[list[Kind], dict[str, str]]:
    """Ours of ``stage`` first, then the peers in ``names`` (comma-separated; None: all).

    Returns:
        The kinds that can run here, and {name: reason} for the others.

    Raises:
        ValueError: an unknown name.
    """
    ours = list(OURS.values()) if stage == "both" else [OURS[int(stage)]]
    chosen = list(PEERS) if names is None else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in PEERS]
    if unknown:
        raise ValueError(f"--peers: {unknown[0]!r} is none of {', '.join(PEERS)}")
    missing = {name: PEERS[name].missing(world_size, shapes) for name in chosen}
    peers_here = [PEERS[name] for name in dict.fromkeys(chosen) if missing[name] is None]
    return [*ours, *peers_here], {name: reason for name, reason in missing.items() if reason is not None}


class Engine(Candidate):
    """DeepSpeed's engine with ZeRO 1 or 2 in fp32, without clipping. Construction takes seconds: it imports deepspeed.

    Args:
        timm: the optimizer class that steps DeepSpeed's flat partitions as if they were parameters; None: our plugin.
    """

    def __init__(
        self,
        model: Synthetic,
        stage: int,
        options: Mapping[str, Any],
        timm: type[torch.optim.Optimizer] | None,
    ) -> None:
        import deepspeed

        import sharded_lamb.deepspeed as plugin

        deepspeed.logger.setLevel("ERROR")
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        }
        keywords: dict[str, Any] = {}
        if timm is None:
            plugin.register()
            params = {**options, "betas": list(options["betas"])}
            config["optimizer"] = {"type": "ShardedLamb", "params": params}
        else:
            config["zero_allow_untested_optimizer"] = True
            optimizer: Any = timm
            keywords["optimizer"] = optimizer(model.parameters(), max_grad_norm=None, **options)
        engine, *_ = deepspeed.initialize(model=model, config=config, **keywords)
        super().__init__(model, engine, engine)

    def iterate(self) -> None:
        """In DeepSpeed's idiom; its `step` zeroes the gradients."""
        self.optimizer.backward(self.forward())
        self.optimizer.step()

    def close(self) -> None:
        dist.barrier()
        self.optimizer.destroy()
