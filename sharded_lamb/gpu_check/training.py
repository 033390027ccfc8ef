"""Small training runs that checks compare, and a process group of one rank under every collective."""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_lamb import ShardedLamb, shapes
from sharded_lamb.bench.workload import Synthetic, Workload
from sharded_lamb.comm import collectives
from sharded_lamb.comm.groups import OwnedGroup
from sharded_lamb.core.hyperparams import RuleOptions
from sharded_lamb.gpu_check.battery import Setting

Stage = Literal[1, 2]
STAGES: tuple[Stage, ...] = (1, 2)
CPU = torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class GivenRun:
    """A run whose gradients are the same numbers on every device, so that its result is too, to the bit.

    In stage 2 each rank has its own gradients, in stage 1 all have the same.
    """

    stage: Stage
    dtype: torch.dtype = torch.float32
    steps: int = 4
    width: int = 190
    micro_batches: int = 1
    remainders: bool | int = False
    reduce_dtype: torch.dtype | None = None
    state_dtype: torch.dtype = torch.float32
    gather_dtype: torch.dtype | None = None
    rule: RuleOptions = field(default_factory=RuleOptions)
    variant: str = "lamb"

    def trained(
        self, device: torch.device, kernel: str, stream: "torch.cuda.Stream | None" = None
    ) -> list[Tensor]:
        """Weights and state after the last step, on the CPU. ``stream``: of training, not of construction."""
        return result_of(*self.run(device, kernel, stream))

    def run(
        self,
        device: torch.device,
        kernel: str,
        stream: "torch.cuda.Stream | None" = None,
        moves: Sequence[torch.device] = (),
    ) -> tuple[nn.Module, ShardedLamb]:
        """The model and its optimizer after the last step. ``moves``: where the model moves before each step."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(self.width, self.width + 7), nn.LayerNorm(self.width + 7), nn.Linear(self.width + 7, 3)
        ).to(device, self.dtype)
        rule: RuleOptions = {"max_grad_norm": 1.0, "exclude_from_weight_decay": ["bias$"], **self.rule}
        optimizer = ShardedLamb(
            model.named_parameters(),
            lr=0.01,
            weight_decay=0.1,
            stage=self.stage,
            reduce_dtype=self.reduce_dtype,
            state_dtype=self.state_dtype,
            gather_dtype=self.gather_dtype,
            bucket_mb=0.02,
            kernel=kernel,
            store_param_remainders=self.remainders,
            variant=self.variant,
            **rule,
        )
        generator = torch.Generator().manual_seed(1 + (rank() if self.stage == 2 else 0))
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for step in range(self.steps):
                if step < len(moves):
                    model.to(moves[step])
                optimizer.zero_grad()
                for index in range(self.micro_batches):
                    with nullcontext() if index + 1 == self.micro_batches else optimizer.no_sync():
                        _given_backward(model, generator)
                optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return model, optimizer


def result_of(model: nn.Module, optimizer: ShardedLamb) -> list[Tensor]:
    """Weights, then (on rank 0) every tensor of the whole state, on the CPU."""
    state = optimizer.full_state_dict() or {"state": {}}
    weights = [p.detach().cpu() for p in model.parameters()]
    return weights + [value.cpu() for row in state["state"].values() for value in row.values()]


def _given_backward(model: nn.Module, generator: torch.Generator) -> None:
    """Add gradients that are drawn on the CPU."""
    terms = [
        (p * torch.randn(p.shape, generator=generator, device="cpu").to(p.device, p.dtype)).float().sum()
        for p in model.parameters()
    ]
    torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Trained:
    """The end of `train_small`."""

    weights: list[Tensor]  # fp32, whole, on the CPU
    losses: list[float]
    optimizer: Any


def small_model(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.LayerNorm(300)
    nn.init.normal_(norm.bias, std=0.1)  # a relative difference from a parameter that starts at 0 says little
    return nn.Sequential(nn.Linear(64, 300), nn.GELU(), norm, nn.Linear(300, 64)).to(device)


def small_data(device: torch.device, steps: int) -> list[Tensor]:
    """[32, 64] fp32 inputs, each rank's own, the same on every device."""
    generator = torch.Generator().manual_seed(3 + rank())
    return [torch.randn(32, 64, generator=generator, device="cpu").to(device) for _ in range(steps)]


def reconstruction_loss(model: Any, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x).float().square().mean()
    return loss


def train_small(
    make: Callable[[nn.Module], Any],
    device: torch.device,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    scaler: "torch.amp.GradScaler | None" = None,
    overflow_at: int | None = None,
    steps: int = 5,
) -> Trained:
    """Train a small model on fixed data with ``make(model)``; with a scaler under float16 autocast."""
    model = wrap(small_model(device))
    optimizer, losses = make(model), []
    for step, x in enumerate(small_data(device, steps)):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16, enabled=scaler is not None):
            loss = reconstruction_loss(model, x)
        losses.append(loss.detach())
        if step == overflow_at:
            loss = loss * float("inf")
        if scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        else:
            _scaled_step(scaler, loss, model, optimizer)
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return Trained([w.detach().float().cpu() for w in weights], [float(x) for x in losses], optimizer)


def _scaled_step(scaler: "torch.amp.GradScaler", loss: Tensor, model: nn.Module, optimizer: Any) -> None:
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


@contextmanager
def group_of_one(setting: Setting) -> Iterator[None]:
    """A process group of one rank, NCCL's on a GPU, that every collective of the package runs on.

    Alone, a rank sends nothing; here its collectives take the path of NCCL all the same.
    """
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if setting.on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    forced = staticmethod(lambda ranks, device: OwnedGroup(ranks))
    try:
        with (
            mock.patch.object(collectives.Collectives, "_group", forced),
            mock.patch.object(collectives, "_backend", return_value="nccl"),
        ):
            yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Large:
    """The setting's shape list (BERT-large's on a GPU) and an optimizer over it."""

    model: Synthetic
    optimizer: ShardedLamb

    def backward(self) -> None:
        """The same gradients at every call, in fresh memory, which autograd keeps as ``.grad`` without a copy."""
        backward(self.model)

    def iterate(self) -> None:
        backward(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()


def backward(model: Synthetic) -> None:
    model.step = 0
    model().backward()


def synthetic(setting: Setting) -> Synthetic:
    """The setting's shape list as a model whose backward yields given gradients in fresh memory."""
    gc.collect()  # frees the previous model: modules and their hooks refer to each other
    return Workload(shapes.load(setting.shapes), 0, setting.device).model()


def gradients_alone(setting: Setting) -> Callable[[], None]:
    """Backward without an optimizer: the part of an iteration that is not ours."""
    model = synthetic(setting)

    def run() -> None:
        backward(model)
        model.zero_grad()

    return run


def large(
    setting: Setting,
    stage: Stage,
    dtype: torch.dtype = torch.float32,
    *,
    kernel: str | None = None,
    remainders: bool = False,
) -> Large:
    """Memory for all of its steps; ``kernel``: the setting's by default."""
    model = synthetic(setting).to(dtype)
    optimizer = ShardedLamb(
        model.named_parameters(),
        lr=1e-3,
        weight_decay=0.01,
        stage=stage,
        kernel=kernel or setting.kernel,
        max_grad_norm=1.0,
        store_param_remainders=remainders,
    )
    return Large(model, optimizer)


def set_gradients(params: Sequence[nn.Parameter]) -> None:
    """Fixed random gradients in ``.grad``, as DDP leaves them."""
    for p in params:
        p.grad = torch.randn_like(p) * 0.01


@contextmanager
def recorded_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Every warning, also those that were shown before."""
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        yield recorded
