"""``sharded-lamb plan --check``: compares predictions with the memory, traffic and time of real ranks."""

import gc
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_lamb.comm import devices
from sharded_lamb.gradients.handles import ReducedGradient
from sharded_lamb.optim.sharded import ShardedLamb
from sharded_lamb.plan.costs import Costs, Shapes, costs, trainable
from sharded_lamb.plan.machine import Machine
from sharded_lamb.plan.probe import probed
from sharded_lamb.plan.sharding import Choices, Sharding
from sharded_lamb.plan.table import aligned
from sharded_lamb.plan.times import Computation, times
from sharded_lamb.sharding.placements import local_part

WARM_STEPS = 2
"""Steps that also compare gradients over ranks, which sends bytes of its own."""

TIMED_STEPS = 5


@dataclass(frozen=True, slots=True)
class Compared:
    """A predicted and a measured number of one rank."""

    what: str
    predicted: int
    measured: int


@dataclass(frozen=True)
class Measured:
    """One rank's memory, its traffic in one step, and the time of ``step()``."""

    memory: Mapping[str, int]  # {kind: bytes}
    wire: Mapping[str, int]  # {collective: bytes}
    calls: Mapping[str, int]  # {collective: calls}
    allocated: int  # bytes of distinct storages that model, gradients and optimizer refer to
    seconds: float = field(compare=False)


def check(
    shapes: Shapes,
    choices: Choices,
    machine: Machine | None,
    device: torch.device,
    stages: Sequence[int] = (1, 2, 3),
) -> int:
    """Compare every stage, also on a 2-D mesh if there are enough ranks. Collective.

    Args:
        choices: ``sums_here`` is ignored; the ranks' backend decides it.
        machine: None measures its speeds first.

    Returns:
        0 if all bytes and calls on all ranks equal the prediction, else 1. Times are shown, not judged.

    Raises:
        ValueError: there is no process group.
    """
    if not dist.is_initialized():
        raise ValueError("--check needs ranks: torchrun --nproc-per-node 4 -m sharded_lamb plan --check")
    world, first = dist.get_world_size(), dist.get_rank() == 0
    machine = machine or probed(device)
    choices = replace(choices, sums_here=device.type == "cpu")
    failed: list[str] = []
    for sharding in _shardings(world, stages):
        measured = measure(shapes, choices, sharding, device, timed_steps=TIMED_STEPS)
        cost = costs(shapes, choices, sharding, dist.get_rank())
        own = compare(cost, measured)
        all_rows: list[list[Compared]] = [[] for _ in range(world)]
        dist.all_gather_object(all_rows, own)
        name = f"stage {sharding.stage}, mesh {sharding.mesh}"
        failed += [
            f"{name}, rank {rank}: {row.what} {row.measured:,}, predicted {row.predicted:,}"
            for rank, rows in enumerate(all_rows)
            for row in rows
            if row.predicted != row.measured
        ]
        if first:
            seconds = times(cost, choices, machine, Computation()).in_step
            print(_table(name, own, seconds, measured.seconds), flush=True)
    if first:
        print(
            "\n".join(
                [*failed, f"{world} ranks: {'FAIL' if failed else 'PASS'} (bytes and calls; not times)"]
            )
        )
    return 1 if failed else 0


def _shardings(world: int, stages: Sequence[int]) -> list[Sharding]:
    two_levels = world >= 4 and world % 2 == 0
    return [
        *(Sharding(stage, world) for stage in stages),
        *(Sharding(stage, world // 2, 2) for stage in stages if two_levels),
    ]


def _table(name: str, rows: Sequence[Compared], predicted: float, measured: float) -> str:
    """One sharding's numbers; times of ``step()`` come in as seconds."""
    lines = [[name, "predicted", "measured", "ratio"]]
    lines += [[row.what, f"{row.predicted:,}", f"{row.measured:,}", _ratio(row)] for row in rows]
    milliseconds = (f"{seconds * 1e3:,.2f}" for seconds in (predicted, measured))
    lines += [["step(), ms", *milliseconds, f"{measured / predicted:.2f}"]]
    return aligned(lines) + "\n"


def _ratio(row: Compared) -> str:
    return f"{row.measured / row.predicted:.4f}" if row.predicted else "1.0000" if not row.measured else "inf"


def compare(cost: Costs, measured: Measured) -> list[Compared]:
    """Every predicted number beside the measured one."""
    rows = [Compared(f"{kind}, bytes", size, measured.memory[kind]) for kind, size in cost.memory.items()]
    rows.append(Compared("allocated, bytes", cost.total_memory + cost.padding, measured.allocated))
    for unit, predicted, counted in (
        ("bytes", cost.wire, measured.wire),
        ("calls", cost.calls, measured.calls),
    ):
        for name in sorted({*predicted, *counted}):
            rows.append(Compared(f"{name}, {unit}", predicted.get(name, 0), counted.get(name, 0)))
    return rows


# -- measuring ----------------------------------------------------------------------------------------


class Weights(nn.Module):
    """Parameters of the given shapes, and a loss whose gradients are the same on every rank."""

    def __init__(self, sizes: Iterable[Sequence[int]], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.full(size, 0.5, dtype=dtype, device=device) for size in sizes)

    def forward(self) -> Tensor:
        """The sum of all weights times a constant: a scalar, fp32."""
        return torch.stack([weight.sum(dtype=torch.float32) for weight in self.weights]).sum() * 1e-3


def measure(
    shapes: Shapes, choices: Choices, sharding: Sharding, device: torch.device, *, timed_steps: int
) -> Measured:
    """Train synthetic weights for some steps. Collective over the default group."""
    choices = choices.of_stage(sharding.stage)
    gc.collect()  # frees the previous model: modules and their hooks refer to each other
    shapes = trainable(shapes, sharding)
    model = Weights(shapes.values(), choices.model_dtype, device)
    mesh = _mesh(sharding, device)
    if sharding.stage == 3:
        fully_shard(model, mesh=mesh)
    optimizer = ShardedLamb(
        zip(shapes, model.parameters(), strict=True),
        stage=2 if sharding.stage == 2 else 1,
        mesh=mesh,
        bucket_mb=choices.bucket_mb,
        master_dtype=choices.master_dtype,
        state_dtype=choices.state_dtype,
        reduce_dtype=choices.reduce_dtype if sharding.stage == 2 else None,
        gather_dtype=choices.gather_dtype,
        store_param_remainders=choices.store_param_remainders,
        overlap=choices.overlap,
        ratio_blocks=choices.ratio_blocks,
    )
    for _ in range(WARM_STEPS):
        _train(model, optimizer)
    before = optimizer.traffic.calls.copy(), optimizer.traffic.bytes.copy()
    _train(model, optimizer)
    calls, sent = optimizer.traffic.calls - before[0], optimizer.traffic.bytes - before[1]
    grads = [p.grad for p in model.parameters() if not isinstance(p.grad, (NoneType, ReducedGradient))]
    gradients = sum(_local(grad).nbytes for grad in grads)
    memory = {**optimizer.memory(), "gradients": gradients}
    allocated = bytes_of(_local(tensor) for tensor in _tensors([model, grads, optimizer]))
    seconds = statistics.median(_train(model, optimizer) for _ in range(timed_steps))
    return Measured(memory, dict(sent), dict(calls), allocated, seconds)


def _mesh(sharding: Sharding, device: torch.device) -> DeviceMesh:
    if sharding.replicate == 1:
        return init_device_mesh(device.type, (sharding.shard,))
    return init_device_mesh(
        device.type, (sharding.replicate, sharding.shard), mesh_dim_names=("replicate", "shard")
    )


def _train(model: nn.Module, optimizer: ShardedLamb) -> float:
    """Run one step; returns the seconds of ``step()`` from the last rank's backward on."""
    optimizer.zero_grad()
    model().backward()
    dist.barrier()
    device = optimizer.param_groups[0]["params"][0].device
    devices.synchronize(device)
    start = time.perf_counter()
    optimizer.step()
    devices.synchronize(device)
    return time.perf_counter() - start


def _local(tensor: Tensor) -> Tensor:
    return local_part(tensor) if isinstance(tensor, DTensor) else tensor


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, counted once where several cover the same memory (parameters and buckets)."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    total = end = 0
    for begin, size in sorted((storage.data_ptr(), storage.nbytes()) for storage in storages):
        total += max(0, begin + size - max(begin, end))
        end = max(end, begin + size)
    return total


_SMALL = (torch.uint8, torch.int8, torch.int16)
"""Integer dtypes that hold data: bytes of staging, remainders of masters."""


def _tensors(roots: Sequence[Any]) -> Iterator[Tensor]:
    """Tensors that ``roots`` refer to through containers, modules and this package's objects.

    Per-parameter and per-block scalars (fp64 and wide integers) are not counted.
    """
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if item.dtype in _SMALL or (item.is_floating_point() and item.dtype != torch.float64):
                yield item
        elif isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset) or type(item).__name__ == "deque":
            todo += item
        elif isinstance(item, nn.Module):
            todo += item.parameters()
        elif type(item).__module__.startswith("sharded_lamb."):
            names = [*getattr(item, "__dict__", ()), *(n for k in type(item).__mro__ for n in _slots(k))]
            todo += [getattr(item, name) for name in names if hasattr(item, name)]


def _slots(kind: type[Any]) -> Sequence[str]:
    names: str | Sequence[str] = kind.__dict__.get("__slots__", ())
    # Python 3.11.2 raises TypeError for a dataclass's own "__weakref__".
    return [name for name in ((names,) if isinstance(names, str) else names) if name != "__weakref__"]
